import csv
import functools
import importlib.util
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the scripts that tests start
os.environ.setdefault("WANDB_MODE", "offline")

import toy_envs  # noqa: E402, F401

import dense_td3_continuous  # noqa: E402
import mst_td3_continuous  # noqa: E402
import rlx2_td3_continuous  # noqa: E402
import rnm_td3_continuous  # noqa: E402

NETS = ["actor", "qf1", "qf2", "target_actor", "qf1_target", "qf2_target"]
CLOCKS = ("SPS", "time", "ms", "wall", "hardware")
SMALL = {
    "env_id": "Reach-v0",
    "hidden_dim": 16,
    "batch_size": 16,
    "buffer_size": 2000,
    "learning_starts": 100,
    "total_timesteps": 400,
    "eval_interval": 250,
    "eval_episodes": 2,
    "track": False,
}


RLX2 = {"actor_sparsity": 0.7, "critic_sparsity": 0.6, "mask_update_interval": 20, "delay_nstep": 150}
RLX2 |= {"buffer_check_interval": 50, "buffer_min_size": 90, "buffer_threshold": 1e-3}


MST = {"actor_hidden_dim": 8, "critic_hidden_dim": 8, "critic_blocks": 1, "mask_update_interval": 20}
MST |= {"diagnostics_interval": 250, "learning_rate": 1e-3}


def settings_of(module):
    """Of a small run of this script."""
    if module is mst_td3_continuous:
        return {key: value for key, value in (SMALL | MST).items() if key != "hidden_dim"}
    return SMALL | (RLX2 if module is rlx2_td3_continuous else {})


def as_flags(settings):
    """--key=value, for the command line."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if key != "track"]


def flags(**settings):
    """Of SMALL and `settings`."""
    return as_flags(SMALL | settings)


def read_rows(run_dir, clocks=False):
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows if clocks else [{k: v for k, v in row.items() if not any(c in k for c in CLOCKS)} for row in rows]


def read_meta(run_dir):
    return json.loads((Path(run_dir) / "meta.json").read_text())


def steps_with(run_dir, key="charts/episodic_return"):
    """The steps of the rows that have a value of `key`: of an episode's end."""
    return [int(row["global_step"]) for row in read_rows(run_dir, clocks=True) if row[key]]


def checkpoint_step(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)["own"]["state"]["global_step"]


def read_model(run_dir):
    model = torch.load(Path(run_dir) / "model.pt", weights_only=True)
    assert set(model) == {*NETS, "probe"}
    return model


def drops_at(module, args, update):
    """Of drop_fractions, with one update a step."""
    return module.drop_fractions(args, update, args.learning_starts + update)


def assert_same_model(a, b):
    a, b = read_model(a), read_model(b)
    for net in NETS:
        assert a[net].keys() == b[net].keys() and len(a[net]) >= 6
        assert all(torch.equal(value, b[net][key]) for key, value in a[net].items()), net
    assert all(map(torch.equal, a["probe"], b["probe"]))


def assert_same_run(a, b):
    """Everything but clocks: rows, weights, masks, final score."""
    rows_a, rows_b = read_rows(a), read_rows(b)
    assert len(rows_a) > 5 and rows_a == rows_b
    assert_same_model(a, b)
    if read_meta(a)["pattern"] != "dense":
        masks = [np.load(Path(run) / "masks.npz") for run in (a, b)]
        assert masks[0].files == masks[1].files
        assert all(np.array_equal(masks[0][key], masks[1][key]) for key in masks[0].files)
    assert read_meta(a)["final_score"] == read_meta(b)["final_score"]


def stop_at(monkeypatch, module, step, number=signal.SIGTERM, times=1):
    add = module.ReplayBuffer.add

    def add_and_stop(rb, **transition):
        add(rb, **transition)
        if rb.added == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(module.ReplayBuffer, "add", add_and_stop)


def draw_everywhere(module, monkeypatch):
    """A fork that draws from the global generators, in the actor and in updates; what its updates draw, and modes."""
    draws, modes, evaluating = [], [], []
    update_agent, evaluate, make_networks = module.update_agent, module.evaluate, module.make_networks

    def draw():
        return torch.rand(1).item(), np.random.normal(), random.gauss(0, 1)

    def noisy_update(*args):
        draws.append(draw())
        return update_agent(*args)

    def noisy_actor(actor, inputs, _output):
        draw()
        if len(inputs[0]) == 1:  # act(), which evaluations call, too
            modes.append((bool(evaluating), actor.training))

    def noisy_networks(*args):
        networks = make_networks(*args)
        networks["actor"].register_forward_hook(noisy_actor)
        return networks

    def marked(*args, **options):
        evaluating.append(1)
        try:
            return evaluate(*args, **options)
        finally:
            evaluating.clear()

    monkeypatch.setattr(module, "update_agent", noisy_update)
    monkeypatch.setattr(module, "make_networks", noisy_networks)
    monkeypatch.setattr(module, "evaluate", marked)
    monkeypatch.setattr(module, "hardware_report", lambda *_: None)
    return draws, modes


def load(path):
    """A script that a test wrote, imported; without its hardware report."""
    spec = importlib.util.spec_from_file_location(f"loaded_{len(sys.modules)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.hardware_report = lambda *_: None
    return module


SCRIPTS = dense_td3_continuous, rnm_td3_continuous, rlx2_td3_continuous, mst_td3_continuous
for module in SCRIPTS:  # a quarter of a short run's time
    module.code_hash = functools.cache(module.code_hash)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time that a run of a second spends on its files
    for module in SCRIPTS:
        monkeypatch.setattr(module, "hardware_report", functools.partial(module.hardware_report, seconds=0.001))


@pytest.fixture
def dense():
    return dense_td3_continuous


@pytest.fixture
def rnm():
    return rnm_td3_continuous


@pytest.fixture
def rlx2():
    return rlx2_td3_continuous


@pytest.fixture
def mst():
    return mst_td3_continuous


@pytest.fixture(params=["dense", "rnm", "rlx2", "mst"])
def script(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["dense", "rnm"])
def twin(request):
    return {"dense": dense_td3_continuous, "rnm": rnm_td3_continuous}[request.param]


@pytest.fixture
def small(tmp_path):
    """args of a run of a second: small(module, **changes) -> Args; each call has a folder of its own for its run."""
    folders = (str(tmp_path / f"runs{i}") for i in range(1000))
    return lambda module, **changes: module.Args(**(settings_of(module) | {"runs_dir": next(folders)} | changes))


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """cli(module, "--flag", ...) -> (exit code, stdout, stderr) of main() in this process."""

    def call(module, *argv, small=True):
        monkeypatch.setattr(sys, "argv", [module.__file__, *as_flags(settings_of(module)) * small, *map(str, argv)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()  # what was printed before
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
