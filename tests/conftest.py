import functools
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the scripts that tests start
os.environ.setdefault("WANDB_MODE", "offline")

import toy_envs  # noqa: E402, F401

import dense_td3_continuous  # noqa: E402
import rnm_td3_continuous  # noqa: E402

SMALL = {
    "env_id": "Reach-v0",
    "hidden_dim": 16,
    "batch_size": 16,
    "buffer_size": 2000,
    "learning_starts": 100,
    "total_timesteps": 600,
    "eval_interval": 250,
    "eval_episodes": 2,
    "track": False,
}


@pytest.fixture(autouse=True)
def short_reports(monkeypatch):
    for module in (dense_td3_continuous, rnm_td3_continuous):
        monkeypatch.setattr(module, "hardware_report", functools.partial(module.hardware_report, seconds=0.05))


@pytest.fixture
def dense():
    return dense_td3_continuous


@pytest.fixture
def rnm():
    return rnm_td3_continuous


@pytest.fixture(params=["dense", "rnm"])
def script(request):
    return {"dense": dense_td3_continuous, "rnm": rnm_td3_continuous}[request.param]


@pytest.fixture
def small(tmp_path):
    """args of a run of a second: small(module, **changes) -> Args"""
    return lambda module, **changes: module.Args(**(SMALL | {"runs_dir": str(tmp_path / "runs")} | changes))


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """cli(module, "--flag", ...) -> (exit code, stdout, stderr) of main() in this process."""

    def call(module, *argv, small=True):
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if key != "track"]
        monkeypatch.setattr(sys, "argv", [module.__file__, *flags * small, *map(str, argv)])
        monkeypatch.chdir(tmp_path)
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
