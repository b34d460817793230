"""run_grid.py and SLURM: what sbatch gets, and with `python -m pytest -m slurm` a real one of two cores (ten minutes;
skipped without a node)."""

import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, assert_same_run, flags, read_meta

import run_grid


def shell(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def test_what_sbatch_gets(monkeypatch, capsys):
    """Tasks of what is not finished, and a signal a tenth of the time before its end, a minute at least."""
    for minutes, signal in ((2, 60), (240, 1440)):
        calls, grid = [], [SimpleNamespace(state=state, threads=1) for state in ("stopped", "finished", "missing")]
        done = SimpleNamespace(returncode=0, stdout="7\n")
        monkeypatch.setattr(subprocess, "run", lambda words, calls=calls, done=done, **_: calls.append(words) or done)
        args = run_grid.Args(("a.py",), ("A-v0",), workers=2, slurm_partition="cpu", slurm_time=minutes)
        assert run_grid.submit(grid, args) == 0 and capsys.readouterr().out.startswith("job 7: 2 runs")
        wanted = {"sbatch", "--array=0,2%2", f"--time={minutes}", f"--signal=B:USR1@{signal}", "--partition=cpu"}
        assert wanted <= {*calls[0]}


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(not shutil.which("sinfo") or not shell("sinfo", "-h", "-N"), reason="SLURM has no node here")
def test_eight_runs_through_requeue_time_limit_and_scancel(tmp_path):
    """Each is in the end what a local grid makes, bit for bit."""
    common = [flag for flag in flags(checkpoint_interval=500, eval_interval=4000) if "env" not in flag]
    common = " ".join(["--no-track", *(flag for flag in common if "total" not in flag)])
    names = {"rnm --n 1 --m 4": 32_000, "dense": 12_000, "dense --tau 0.01": 1000, "rnm --n 2 --m 4": 1000}
    commands = [
        f"{ROOT}/{name.replace(' ', '_td3_continuous.py ', 1) if ' ' in name else name + '_td3_continuous.py'} "
        f"{common} --total-timesteps {steps}"
        for name, steps in names.items()
    ]

    def grid(*more):
        words = [sys.executable, str(ROOT / "run_grid.py"), "--commands", *commands]
        words += ["--env-ids", "toy_envs:Reach-v0", "--seeds", "1", "2", "--workers", "2", *more]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    def submit():
        result = grid("--slurm-partition", shell("sinfo", "-h", "-o", "%R").split()[0], "--slurm-time", "2")
        return result, re.match(r"job (\d+): (\d+) runs", result.stdout)

    def folder(steps, seed):
        for path in tmp_path.glob("runs/*/meta.json"):
            args = read_meta(path.parent)["args"]
            if (args["total_timesteps"], args["seed"]) == (steps, seed) and (path.parent / "checkpoint.pt").exists():
                return path.parent
        return None

    def wait_for(condition, seconds):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, shell("squeue") + shell("scontrol", "show", "job")
            time.sleep(0.5)

    result, job = submit()
    assert result.returncode == 0 and job[2] == "8", result.stderr
    wait_for(lambda: folder(12_000, 1), 60)  # task 1
    time.sleep(3)
    subprocess.run(["scancel", f"{job[1]}_1"], check=True)
    wait_for(lambda: folder(32_000, 2), 200)  # task 4; task 0 meets its time limit
    time.sleep(3)
    subprocess.run(["scontrol", "requeue", f"{job[1]}_4"], check=True)
    wait_for(lambda: not shell("squeue", "-h", "-j", job[1]).strip(), 900)
    metas = {path.parent: read_meta(path.parent) for path in tmp_path.glob("runs/*/meta.json")}
    assert len(metas) == 8
    assert sorted(meta["exit_reason"] for meta in metas.values()) == ["finished"] * 7 + ["sigterm"]
    resumed = {(meta["args"]["total_timesteps"], meta["args"]["seed"]) for meta in metas.values() if "resumed" in meta}
    assert {(32_000, 1), (32_000, 2)} <= resumed  # by the time limit, and by hand
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/grid/slurm-*.log"))
    assert logs.count("started: ") == 8 and logs.count("resumed: ") >= 2

    result, job = submit()
    assert result.returncode == 0 and job[2] == "1", result.stdout + result.stderr
    wait_for(lambda: not shell("squeue", "-h", "-j", job[1]).strip(), 300)
    result, job = submit()
    assert result.returncode == 0 and job is None and result.stdout.count("2 of 2") == 4

    assert grid("--runs-dir", "local").returncode == 0
    for run, meta in metas.items():
        same = [path.parent for path in tmp_path.glob("local/*/meta.json")]
        same = [
            other for other in same if read_meta(other)["args"] | {"runs_dir": ""} == meta["args"] | {"runs_dir": ""}
        ]
        assert len(same) == 1
        if meta["n"]:
            assert len(np.load(run / "masks.npz")["update"]) >= 1
        assert_same_run(run, same[0])
