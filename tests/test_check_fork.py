"""check_fork.py passes what is right and names what is not, for each thing that it looks at."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, drops_at, load

import check_fork

FLAGS = ["--env-id=toy_envs:Reach-v0", "--hidden-dim=16", "--batch-size=16", "--total-timesteps=1100"]
LOOP = "        while state.global_step < args.total_timesteps:\n"
QUICK = {"seconds: float = 0.2": "seconds: float = 0.001"}  # for the report on hardware
INIT = "        for name, net in networks.items():  # targets"
ACT = "    return actor(torch.tensor(obs[None]"
FAULTS = QUICK | {
    "    rng = make_generators(args.seed,": "    rng = make_generators(1,",
    LOOP: f"        noise_left = 1.0\n{LOOP}",  # a local variable: a resume sets it anew
    "exploration_scale * torch.randn(low.shape,": "noise_left * exploration_scale * torch.randn(low.shape,",
    "(act(agent.actor, obs) + noise).clamp(low, high)\n": "(act(agent.actor, obs) + noise).clamp(low, high)\n"
    "                noise_left *= 0.999\n",
    "self.positions.copy_(positions)": "self.positions.numpy()[:] = positions.numpy()",  # unseen by the kernels
    ACT: "    mean = vars(actor).setdefault('mean', 0.0 * obs)  # what model.pt does not hold\n"
    f"    mean += 0.1 * (obs - mean) * actor.training\n{ACT.replace('obs[None]', 'obs[None] - mean')}",
    INIT: f"        networks['qf1'].net.fc1.bias.requires_grad_(False)\n{INIT}",
}

EVALUATED = {  # evaluations change training and each other; the first one comes late
    "def evaluate(actor": "CALLS = []\n\n\ndef evaluate(actor",
    "    with evaluating(actor):\n        for seed in seeds:": "    CALLS.append(0)\n    with evaluating(actor):\n"
    "        for seed in seeds:",
    "env.step(act(actor, obs).numpy())": "env.step(act(actor, obs / len(CALLS)).numpy())",
    "exploration_scale * torch.randn(low.shape,": "(1 + len(CALLS)) * exploration_scale * torch.randn(low.shape,",
    "run.log(0, run.density | run.evaluate(agent.actor, eval_seeds, 0))": "run.log(0, run.density)",
}


def fork(path, name, edits):
    text = (ROOT / name).read_text()
    for old, new in edits.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def check(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["check_fork.py", *map(str, words)])
    code = check_fork.main()
    captured = capsys.readouterr()
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in captured.out.splitlines() if " " in line}
    return code, lines, captured.err


@pytest.mark.slow
def test_what_is_right_passes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check_fork.tempfile, "tempdir", str(tmp_path))
    path = fork(tmp_path / "fork.py", "dense_td3_continuous.py", QUICK)
    code, found, err = check(monkeypatch, capsys, path, *FLAGS)
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == [path]
    assert (
        found.pop("five")
        and found.pop("trains") == "all tensors"
        and found.pop("computes").startswith("nothing to compare: ")
    )
    assert found == dict.fromkeys(("repeats", "resumes", "keeps"), "ok")


@pytest.mark.slow
def test_each_fault_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check_fork.tempfile, "tempdir", str(tmp_path))
    path = fork(tmp_path / "fork.py", "rnm_td3_continuous.py", FAULTS)
    code, found, err = check(monkeypatch, capsys, path, *FLAGS)
    assert (code, err) == (1, "") and found["repeats"] == "NOT ALIKE: --seed 4321 begins as --seed 1 does"
    assert (
        found["resumes"].startswith("NOT ALIKE: first at step ") and "tensors of model.pt, such as" in found["resumes"]
    )
    assert found["computes"].startswith("NOT ALIKE: losses/qf1_") and " in torch" in found["computes"]
    assert found["keeps"].startswith("NOT ALIKE: error: ") and "; the run itself had return -" in found["keeps"]
    assert found["trains"] == "all but qf1.fc1.bias, qf1_target.fc1.bias"
    assert (next(tmp_path.glob("check_fork_*")) / "whole").is_dir()  # to look at


def test_evaluations_that_change_training_and_each_other(dense, small, monkeypatch, capsys, tmp_path):
    """Runs made here, in less time than those of a user; the policies are evaluated as his are."""
    path = fork(tmp_path / "dense_td3_continuous.py", dense.__file__, EVALUATED)
    made = []
    for change in ({"eval_interval": 100}, {"eval_interval": 50}, {"total_timesteps": 100}):
        module = load(path)
        made.append(Path(module.train(small(module, env_id="toy_envs:Reach-v0", **change))["run_dir"]))
    whole, again, stopped = made
    (tmp_path / "whole.log").write_text("warning: what a script warns of\n" * 2)
    monkeypatch.setattr(check_fork, "make_runs", lambda *_: (whole, again, whole, stopped, whole, whole))
    capsys.readouterr()
    assert not check_fork.check(path, [], tmp_path)
    nothing, warning, repeats, resumes, keeps, trains = capsys.readouterr().out.splitlines()
    assert nothing.startswith("computes   nothing to compare: ") and warning == "warning: what a script warns of"
    assert repeats.startswith("repeats    NOT ALIKE: first at step ")
    assert "--seed" not in repeats  # nothing is known of what they begin with
    assert re.match(r"keeps      NOT ALIKE: .*return -[^;]*; the run itself had return -", keeps)
    assert (resumes, trains) == ("resumes    ok", "trains     all tensors")


def test_short_runs_come_to_all_that_the_flags_ask_for(rlx2, mst, capsys):
    """Masks change, targets get their n steps, the replay buffer shrinks: neither script warns."""
    few, more = (x.parse_args(check_fork.known(Path(x.__file__), check_fork.SHORT)) for x in (rlx2, mst))
    rlx2.check_schedule(few)
    mst.check_schedule(more, mst.Agent(mst.sparsify(mst.make_networks(more, mst.make_env("Reach-v0")), more), lr=1e-3))
    assert capsys.readouterr().err == ""
    more = replace(more, actor_regime="rigl")
    for module, args in [(rlx2, few), (mst, more)]:  # what a layer gathers between two changes is lost by a bad resume
        last = args.total_timesteps - args.learning_starts
        for stop in (1000, 1200, 2000):  # ends of episodes of 200 and of 1,000 steps
            update = stop - args.learning_starts
            assert update % 2 and 20 < update % args.mask_update_interval < args.mask_update_interval
            assert len({name for u in range(update + 1, last + 1) for name in drops_at(module, args, u)}) == 2


def test_runs_of_two_seeds_differ_and_where(dense, small):
    runs = [check_fork.Path(dense.train(small(dense, seed=seed))["run_dir"]) for seed in (1, 1, 2)]
    assert check_fork.difference(*runs[:2]) == ""
    first, models = check_fork.difference(*runs[1:]).split("; ")
    assert (
        first.startswith("first at step 0, eval/episodic_return: -")
        and " tensors of model.pt, such as actor." in models
    )
    model = torch.load(runs[0] / "model.pt", weights_only=True)
    model["qf2"]["fc1.bias"][3] += 1e-7
    torch.save(model, runs[0] / "model.pt")
    assert check_fork.difference(*runs[:2]) == "1 tensors of model.pt, such as qf2.fc1.bias"
    rows = (runs[1] / "metrics.csv").read_text().splitlines()
    (runs[1] / "metrics.csv").write_text("\n".join(rows[:-1]) + "\n")  # what only one logged does not count
    assert check_fork.difference(*runs[:2]) == "1 tensors of model.pt, such as qf2.fc1.bias"
    model["scale"] = model["qf2"]["fc1.bias"].mean()  # a fork's own entry, and its own file
    torch.save(model, runs[0] / "model.pt"), (runs[0] / "best.pt").write_bytes(b"1")
    first, *rest = check_fork.difference(*runs[:2], "outer").split("; ")  # of a resume all must be the same
    assert first.startswith(f"first at step {int(rows[-1].partition(',')[0])}, ") and first.endswith(" and nan")
    assert rest == ["2 tensors of model.pt, such as qf2.fc1.bias", "best.pt"]


def test_where_half_of_a_run_is(monkeypatch, tmp_path):
    """With rows and episode ends every 1,000 of 2,500 steps it must be the first."""
    monkeypatch.setattr(check_fork, "read_meta", lambda _: {"args": {"total_timesteps": 2500}})
    (tmp_path / "run").mkdir()
    for text, half in (("global_step,x\n0,\n1000,1", False), ("global_step,x\n0,\n1000,1\n", True)):
        (tmp_path / "run/metrics.csv").write_text(text)
        assert check_fork.half_way(tmp_path) == half


@pytest.mark.slow
def test_sigterm_ends_the_runs(dense, tmp_path):
    command = [sys.executable, ROOT / "check_fork.py", dense.__file__, *FLAGS[:-1], "--total-timesteps=1_000_000"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while len(runs := list(tmp_path.glob("*/*/*/metrics.csv"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 130 and not list(tmp_path.glob("check_fork_*"))  # torch may leave a folder of its own
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(runs[0].parents[1]) in read(path)]
    assert not alive


def read(path):
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def test_a_run_that_fails_gives_its_last_words(dense, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check_fork.tempfile, "tempdir", str(tmp_path))
    code, found, err = check(monkeypatch, capsys, dense.__file__, "--env-id=toy_envs:Reach-v0", "--tau=2")
    assert code == 2 and not found.keys() - {"five"} and "tau" in err and "logs: " in err
    code, found, err = check(monkeypatch, capsys, "no_such_file.py")
    assert (code, found) == (2, {}) and err.startswith("error: no_such_file.py: a script, then flags of a new run")
    monkeypatch.setattr(check_fork, "make_runs", lambda *_: [tmp_path] * 6)
    monkeypatch.setattr(check_fork, "read_model", lambda _: 1 / 0)
    code, found, err = check(monkeypatch, capsys, dense.__file__, *FLAGS)
    assert code == 2 and not found and err.startswith("error: ZeroDivisionError: division by zero")
    code, _, err = check(monkeypatch, capsys, dense.__file__, "--resume=runs/mine")
    assert code == 2 and err.startswith("error: ['--resume=runs/mine']: a script, then")
    monkeypatch.setattr(check_fork.tempfile, "tempdir", str(tmp_path / "nowhere"))
    code, _, err = check(monkeypatch, capsys, dense.__file__, *FLAGS)
    assert code == 2 and err.startswith("error: no temporary folder: ")
    code, _, err = check(monkeypatch, capsys)
    assert code == 0 and err == ""
