"""Whole runs: files, streams, resume, faults, the command line."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL

CLOCKS = ("SPS", "time", "ms", "wall", "hardware")
NETS = ["actor", "qf1", "qf2", "target_actor", "qf1_target", "qf2_target"]


def read_rows(run_dir, clocks=False):
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows if clocks else [{k: v for k, v in row.items() if not any(c in k for c in CLOCKS)} for row in rows]


def read_meta(run_dir):
    return json.loads((Path(run_dir) / "meta.json").read_text())


def assert_same_run(a, b):
    """Everything but clocks: rows, weights, masks, final score."""
    rows_a, rows_b = read_rows(a), read_rows(b)
    assert len(rows_a) > 5 and rows_a == rows_b
    models = [torch.load(Path(run) / "model.pt", weights_only=True) for run in (a, b)]
    for net in NETS:
        for key, value in models[0][net].items():
            assert torch.equal(value, models[1][net][key]), (net, key)
    if (Path(a) / "masks.npz").exists():
        masks = [np.load(Path(run) / "masks.npz") for run in (a, b)]
        assert masks[0].files == masks[1].files
        assert all(np.array_equal(masks[0][key], masks[1][key]) for key in masks[0].files)
    assert read_meta(a)["final_score"] == read_meta(b)["final_score"]


def episode_ends(run_dir):
    return [int(row["global_step"]) for row in read_rows(run_dir) if row["charts/episodic_return"]]


def stop_at(monkeypatch, module, step, number=signal.SIGTERM, times=1):
    add = module.ReplayBuffer.add

    def add_and_stop(rb, *transition):
        add(rb, *transition)
        if rb.added == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(module.ReplayBuffer, "add", add_and_stop)


def test_a_run_leaves_the_contract_behind(rnm, small):
    args = small(rnm, n=1, m=4, mask_update_interval=100, total_timesteps=2100, learning_starts=200)
    result = rnm.train(args)
    run = Path(result["run_dir"])
    assert result["exit_reason"] == "finished"
    assert run.name.startswith("Reach-v0__rnm_td3_continuous_1of4__s1__2")
    assert {p.name for p in run.iterdir()} == {"checkpoint.pt", "masks.npz", "meta.json", "metrics.csv", "model.pt"}

    rows = {int(row["global_step"]): row for row in read_rows(run, clocks=True)}
    steps = list(rows)
    assert steps == sorted(steps) and next(iter(rows[0])) == "global_step"
    assert {s for s in steps if rows[s]["eval/episodic_return"]} == {0, *range(250, 2100, 250), 2100}
    assert {s for s in steps if rows[s]["sad/qf1/fc2"]} == set(range(300, 2101, 100))
    assert {s for s in steps if rows[s]["charts/SPS"]} == {1000, 2000}
    assert {s for s in steps if rows[s]["losses/actor_loss"]} == {1000, 2000}
    ends = [s for s in steps if rows[s]["charts/episodic_return"]]
    assert np.array_equal(np.diff([0, *ends]), [int(rows[s]["charts/episodic_length"]) for s in ends])
    assert float(rows[0]["sparsity/density/qf1"]) == pytest.approx((16 * 2 + 16 * 4 + 16) / (16 * 5 + 16 * 16 + 16))
    assert float(rows[1000]["charts/update_ms"]) > 0
    walls = [float(rows[s]["charts/wall_time_s"]) for s in steps]
    assert walls == sorted(walls)

    meta = read_meta(run)
    assert meta["args"]["env_id"] == "Reach-v0" and (meta["n"], meta["m"]) == (1, 4)
    assert meta["kernel"] == ("nm" if shutil.which(os.environ.get("CC", "cc")) else "torch")
    assert set(meta["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy", "wandb"}
    assert meta["exit_reason"] == "finished" and meta["start"] <= meta["end"]
    assert len(meta["commit"] or "-" * 40) == 40 and meta["hardware"]
    evaluations = [float(rows[s]["eval/episodic_return"]) for s in steps if s and rows[s]["eval/episodic_return"]]
    assert meta["final_score"] == pytest.approx(np.mean(evaluations[-5:]))  # the last half of nine
    for key in ("actor_us", "critic_update_us", "update_us"):
        assert meta["hardware_report"][f"hardware/{key}"] > 0 and meta["hardware_report"][f"hardware/{key}_dense"] > 0

    masks = np.load(run / "masks.npz")
    assert masks["update"].tolist() == [0, *range(100, 1901, 100)]
    assert masks["global_step"].tolist() == [0, *range(300, 2101, 100)]
    model = torch.load(run / "model.pt", weights_only=True)
    assert list(model) == NETS
    for net in ("actor", "qf1", "qf2"):
        for layer in ("fc1", "fc2"):
            shape = masks[f"{net}.{layer}.shape"]
            E = np.unpackbits(masks[f"{net}.{layer}"], axis=1)[:, : shape.prod()].reshape(-1, *shape)
            for weights in (model[net], model[net.replace("actor", "target_actor").replace("qf1", "qf1_target")]):
                assert (weights[f"{layer}.weight"].numpy()[E[-1] == 0] == 0).all()
            differ = (E[-1] != E[-2]).sum() / (2 * E[-1].sum())
            assert float(rows[2100][f"sad/{net}/{layer}"]) == pytest.approx(differ)
    actor = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    names = {"0": "fc1", "2": "fc2", "4": "fc_mu"}
    actor.load_state_dict({k: model["actor"][f"{names[k[0]]}.{k[2:]}"] for k in actor.state_dict()})


def test_mask_history_stays_small_and_even(rnm):
    history, E = [], {"actor.fc1": torch.ones(2, 4, dtype=torch.bool)}
    for refresh in range(1000):
        history = rnm.add_masks(history, E, global_step=refresh + 5, update=refresh, refresh=refresh)
        kept = [snapshot["refresh"] for snapshot in history]
        assert kept[0] == 0 and kept[-1] == refresh and len(kept) <= 129
        assert len(set(np.diff(kept[:-1]))) <= 1
    assert len(kept) >= 65


def test_all_six_networks_are_nm_at_every_moment(rnm, small, monkeypatch):
    agents, masks = [], set()
    make_agent, add = rnm.make_agent, rnm.ReplayBuffer.add
    monkeypatch.setattr(rnm, "make_agent", lambda *a: agents.append(make_agent(*a)) or agents[-1])

    def look_and_add(rb, *transition):
        agent = agents[0]
        for net in NETS:
            online = getattr(agent, net.replace("target_actor", "actor").removesuffix("_target"))
            layers = rnm.nm_layers(getattr(agent, net))
            assert set(layers) == {"fc1", "fc2", "fc_mu" if "actor" in net else "fc3"}
            for name, layer in layers.items():
                weight = nn.functional.pad(layer.weight, (0, -layer.W.shape[1] % 4))
                assert (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 1
                assert torch.equal(layer.weight != 0, getattr(online, name).E)
        masks.add(agent.actor.fc2.E.numpy().tobytes())
        add(rb, *transition)

    monkeypatch.setattr(rnm.ReplayBuffer, "add", look_and_add)
    rnm.train(small(rnm, n=1, m=4, mask_update_interval=50, sparse_head=True))
    assert len(masks) > 3


def test_n_equals_m_is_dense_bit_for_bit(rnm, dense, small):
    a = dense.train(small(dense, exp_name="twin"))["run_dir"]
    b = rnm.train(small(rnm, exp_name="twin", n=4, m=4, mask_update_interval=100, sparse_head=True))["run_dir"]
    columns = list(read_rows(a)[0])
    rows = [{k: row[k] for k in columns} for row in read_rows(b) if any(row[k] for k in columns[1:])]
    assert rows == read_rows(a)
    models = [torch.load(Path(run) / "model.pt", weights_only=True) for run in (a, b)]
    for net in NETS:
        assert list(models[0][net]) == list(models[1][net])
        assert all(torch.equal(models[0][net][key], models[1][net][key]) for key in models[0][net])


def test_same_seed_same_numbers_and_evaluation_is_free(script, small):
    a, b, c = (
        script.train(small(script, **change))["run_dir"]
        for change in ({"seed": 3}, {"seed": 3}, {"seed": 3, "eval_interval": 70, "eval_episodes": 1})
    )
    assert_same_run(a, b)
    models = [torch.load(Path(run) / "model.pt", weights_only=True) for run in (a, c)]
    assert all(torch.equal(models[0][net][key], models[1][net][key]) for net in NETS for key in models[0][net])
    d = script.train(small(script, seed=4))["run_dir"]
    assert read_rows(a) != read_rows(d)
    assert len({a, b, c, d}) == 4  # started within the same seconds


def test_resume_after_sigterm_is_bit_for_bit(script, small, monkeypatch, cli):
    whole = script.train(small(script))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 317)
        part = script.train(small(script))
    assert part["exit_reason"] == "sigterm" and read_meta(part["run_dir"])["exit_reason"] == "sigterm"
    end = next(step for step in episode_ends(whole) if step >= 317)
    assert int(read_rows(part["run_dir"])[-1]["global_step"]) == end
    code, out, _ = cli(script, "--resume", part["run_dir"], small=False)
    assert code == 0 and f"resumed at step {end}" in out
    assert_same_run(whole, part["run_dir"])
    assert not (Path(part["run_dir"]) / "replay").exists()


def test_resume_from_the_very_first_checkpoint(rnm, small, monkeypatch, cli):
    whole = rnm.train(small(rnm))["run_dir"]
    with monkeypatch.context() as patch:
        patch.setattr(rnm.Run, "checkpoint_due", lambda *_: False)  # as if it had been killed
        stop_at(patch, rnm, 210)
        part = rnm.train(small(rnm))["run_dir"]
    assert torch.load(Path(part) / "checkpoint.pt", weights_only=True)["progress"]["global_step"] == 0
    assert cli(rnm, "--resume", part, small=False)[0] == 0
    assert_same_run(whole, part)


def test_what_is_stored_and_how_it_was_chosen(dense, rnm, small, monkeypatch):
    """Termination against truncation, acting noise per dimension, its own random stream, learning rates."""
    seen = {}
    for module in (dense, rnm):
        rows, policies, agents = seen.setdefault(module, ([], [], []))
        add, act, make_agent = module.ReplayBuffer.add, module.act, module.make_agent
        monkeypatch.setattr(module.ReplayBuffer, "add", lambda rb, *row, f=add, to=rows: to.append(row) or f(rb, *row))
        monkeypatch.setattr(module, "act", lambda *a, f=act, to=policies: to.append(f(*a)) or to[-1].clone())
        monkeypatch.setattr(module, "make_agent", lambda *a, f=make_agent, to=agents: to.append(f(*a)) or to[-1])
        flags = {"exploration_noise": 0.2, "learning_rate": 0.002, "eval_episodes": 1, "eval_interval": 10**6}
        flags |= {"env_id": "ReachShort-v0", "total_timesteps": 700, "learning_starts": 300}
        run = module.train(small(module, **flags))["run_dir"]
        ends = [r for r in read_rows(run) if r["charts/episodic_length"]]
        cut = [int(r["global_step"]) for r in ends if r["charts/episodic_length"] == "25"]  # by the time limit
        ended = [int(r["global_step"]) for r in ends if int(r["charts/episodic_length"]) < 25]
        stored = {step for step, row in enumerate(rows[:700], 1) if row[4]}
        assert ended and set(ended) <= stored <= {*ended, *cut} and set(cut) - stored
        assert all(optimizer.param_groups[0]["lr"] == 0.002 for optimizer in
                   (agents[0].q_optimizer, agents[0].actor_optimizer))  # fmt: skip
        acted = np.array([row[2] for row in rows[300:700]])
        wanted = policy_actions(policies, acted)
        noise = (acted - wanted)[((acted > [-0.99, 0.51]) & (acted < [0.49, 1.99])).all(1)]
        assert len(noise) > 30
        assert np.all(np.abs(noise) < 5 * 0.2 * 0.75) and np.all(noise.std(0) > 0.03)
    warm = [np.array([row[2] for row in rows[:300]]) for rows, *_ in seen.values()]
    assert np.array_equal(*warm) and warm[0].min(0) == pytest.approx([-1, 0.5], abs=0.05)
    assert warm[0].max(0) == pytest.approx([0.5, 2], abs=0.05)


def policy_actions(policies, acted):
    """The calls of act() that belong to training: the 400 between the first and the last evaluation."""
    policies = np.array([p.numpy() for p in policies])
    starts = range(len(policies) - len(acted) + 1)
    best = min(starts, key=lambda s: np.abs(np.clip(policies[s : s + len(acted)], -1, 2) - acted).mean())
    return policies[best : best + len(acted)]


def test_clocks_go_on_after_a_resume(dense, small, monkeypatch, cli):
    with monkeypatch.context() as patch:
        stop_at(patch, dense, 1300)
        run = dense.train(small(dense, total_timesteps=2500))["run_dir"]
    before = float(read_rows(run, clocks=True)[-1]["charts/wall_time_s"])
    started = time.perf_counter()
    assert cli(dense, "--resume", run, small=False)[0] == 0
    took = time.perf_counter() - started
    rows = read_rows(run, clocks=True)
    walls = [float(row["charts/wall_time_s"]) for row in rows]
    assert walls == sorted(walls) and before < walls[-1] < before + took
    row = next(row for row in rows if row["global_step"] == "1000")
    assert 0.5 * 1000 / float(row["charts/wall_time_s"]) < float(row["charts/SPS"])
    assert float(row["charts/update_ms"]) * 0.9 < float(row["charts/wall_time_s"])  # 900 updates


def test_a_finished_run_stays_finished(dense, small, monkeypatch, capsys):
    def broken(*_):
        raise FileNotFoundError("no such thing")

    monkeypatch.setattr(dense, "hardware_report", broken)
    result = dense.train(small(dense))
    assert result["exit_reason"] == "finished" and read_meta(result["run_dir"])["exit_reason"] == "finished"
    assert "warning: no hardware report: no such thing" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["disabled", "nonsense", "", None])
def test_wandb_never_costs_a_run(dense, cli, monkeypatch, tmp_path, mode):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    if mode is None:
        monkeypatch.setenv("WANDB_API_KEY", "too-short")
    else:
        monkeypatch.setenv("WANDB_MODE", mode)
    code, out, err = cli(dense)
    assert code == 0 and "finished" in out and "Traceback" not in err
    if mode is not None:  # what a bad key does depends on what this process did before
        assert ("warning: W&B" in err) == (mode == "nonsense")
        assert ("W&B is offline" in out) == (mode != "disabled")


def test_lost_streams_and_a_lost_wandb_do_not_stop_a_run(dense, cli, monkeypatch, tmp_path):
    class Gone:
        dir, disabled, offline = str(tmp_path), False, True

        def log(self, _):
            raise ConnectionError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(dense, "start_wandb", lambda *_: Gone())
        code, out, _ = cli(dense)
        assert code == 0 and "finished" in out and out.count("connection lost") == 1
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"]
    command = [sys.executable, dense.__file__, *flags, "--no-track", "--env-id", "toy_envs:Reach-v0"]
    for shell in ('"$@" | head -1', '"$@" >&- 2>&-'):
        bash = ["bash", "-c", shell, "-", *command, "--runs-dir", tmp_path / "lost"]
        subprocess.run(bash, check=True, capture_output=True)
    reasons = [read_meta(run)["exit_reason"] for run in (tmp_path / "lost").iterdir()]
    assert reasons == ["finished", "finished"]


def test_resume_after_kill_drops_the_rows_past_the_checkpoint(rnm, small, tmp_path):
    """A ring smaller than the run, several checkpoints, kill -9 in the middle of training."""
    flags = {"n": 1, "m": 4, "mask_update_interval": 30, "buffer_size": 220, "checkpoint_interval": 150}
    flags |= {"total_timesteps": 1500, "eval_interval": 500, "keep_replay": True}
    whole = rnm.train(small(rnm, **flags))["run_dir"]
    argv = {k: v for k, v in (SMALL | flags).items() if k not in ("track", "keep_replay")}
    command = [sys.executable, rnm.__file__, "--no-track", "--keep-replay", "--runs-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [*command, *(f"--{k.replace('_', '-')}={v}" for k, v in (argv | {"env_id": "toy_envs:Reach-v0"}).items())],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = wait_for_run(tmp_path / "killed")
    while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_text().splitlines()) < 40:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_meta(run)["exit_reason"] == "running"
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["global_step"]
    last = int(read_rows(run)[-1]["global_step"])
    assert 0 < checkpoint <= last < 1500
    with open(run / "metrics.csv", "a") as file:
        file.write("1499,0.1")  # a torn line
    done = subprocess.run([sys.executable, rnm.__file__, "--resume", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, run)
    files = sorted(tuple(map(int, p.stem.split("-"))) for p in (run / "replay").iterdir())
    assert files[-1][1] - files[0][0] >= 220 and files[0][1] > files[-1][1] - 220


def wait_for_run(folder):
    for _ in range(3000):
        if folder.exists() and list(folder.iterdir()):
            return next(folder.iterdir())
        time.sleep(0.01)
    raise AssertionError("no run was started")


def test_extending_a_finished_run(script, small, cli):
    whole = script.train(small(script, keep_replay=True))["run_dir"]
    half = script.train(small(script, keep_replay=True, total_timesteps=333))["run_dir"]
    assert int(read_rows(half)[-1]["global_step"]) == 333
    end = max(step for step in episode_ends(half) if step < 333)
    code, out, _ = cli(script, "--resume", half, "--total-timesteps", 600, small=False)
    assert code == 0 and f"resumed at step {end}" in out
    assert_same_run(whole, half)
    before = {p.name: p.read_bytes() for p in Path(half).glob("*.*")}
    code, out, _ = cli(script, "--resume", half, small=False)
    assert code == 0 and "nothing to do" in out
    assert before == {p.name: p.read_bytes() for p in Path(half).glob("*.*")}

    dropped = script.train(small(script, total_timesteps=200))["run_dir"]
    code, _, err = cli(script, "--resume", dropped, "--total-timesteps", 600, small=False)
    assert code == 2 and "--keep-replay" in err and err.count("\n") == 1


def test_second_signal_leaves_at_once(rnm, small, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop_at(monkeypatch, rnm, 310, signal.SIGINT, times=2)
    assert rnm.train(small(rnm))["exit_reason"] == "sigint"
    assert codes == [130]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_of_signals(dense, cli, monkeypatch, number, code):
    stop_at(monkeypatch, dense, 120, number)
    assert cli(dense, "--no-track")[0] == code


def test_bad_resumes_are_refused_by_name(rnm, dense, small, cli, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, rnm, 210)
        run = Path(rnm.train(small(rnm, n=1, m=4))["run_dir"])
    rows = read_rows(run)

    def refused(*argv, module=rnm):
        code, _, err = cli(module, *argv, small=False)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert read_rows(run) == rows and read_meta(run)["exit_reason"] == "sigterm"
        return err

    assert "--seed is 1" in refused("--resume", run, "--seed", 2)
    assert "--n is 1" in refused("--resume", run, "--n", 2)
    assert "only grow" in refused("--resume", run, "--total-timesteps", 500)
    assert "rnm_td3_continuous.py" in refused("--resume", run, module=dense)
    assert "meta.json does not exist" in refused("--resume", tmp_path / "nowhere")
    assert "exclude" in refused("--resume", run, "--evaluate", run)
    checkpoint = (run / "checkpoint.pt").read_bytes()
    for damage in (checkpoint[: len(checkpoint) // 2], b"", b"no checkpoint"):
        (run / "checkpoint.pt").write_bytes(damage)
        assert "damaged" in refused("--resume", run)
    torch.save({"another": "file"}, run / "checkpoint.pt")
    assert "foreign" in refused("--resume", run)
    (run / "checkpoint.pt").unlink()
    assert "checkpoint.pt is missing" in refused("--resume", run)
    flipped = bytearray(checkpoint)
    flipped[len(checkpoint) // 2] ^= 0xFF
    (run / "checkpoint.pt").write_bytes(flipped)
    assert "damaged" in refused("--resume", run)
    other = Path(rnm.train(small(rnm, n=1, m=4, seed=2))["run_dir"])
    (run / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes())
    assert "written with --seed 2" in refused("--resume", run)
    assert "not the folder of a run" in refused("--resume", "")
    (run / "checkpoint.pt").write_bytes(checkpoint)
    part = next((run / "replay").iterdir())
    rows_file = part.read_bytes()
    for damage in (rows_file[:-40], rows_file[:2000] + bytes([rows_file[2000] ^ 1]) + rows_file[2001:]):
        part.write_bytes(damage)
        assert "damaged" in refused("--resume", run)
    part.unlink()
    assert f"{part.name} is missing" in refused("--resume", run)
    part.write_bytes(rows_file)
    with rnm.open_metrics(run / "metrics.csv", csv_header(run), (run / "metrics.csv").stat().st_size):
        assert "another process" in refused("--resume", run)
    table = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").unlink()
    code, _, err = cli(rnm, "--resume", run, small=False)
    assert code == 2 and "metrics.csv is missing" in err
    (run / "metrics.csv").write_bytes(table[:-30])
    code, _, err = cli(rnm, "--resume", run, small=False)
    assert code == 2 and "metrics.csv is damaged" in err
    (run / "metrics.csv").write_bytes(table + b"\0" * 100)  # as a power cut may leave it
    meta = (run / "meta.json").read_text()
    (run / "meta.json").write_text(meta[:100])
    code, _, err = cli(rnm, "--resume", run, small=False)
    assert code == 2 and "meta.json is damaged" in err
    (run / "meta.json").write_text(meta.replace('"threads": 1', '"threads": 2', 1))
    code, _, err = cli(rnm, "--resume", run, "--checkpoint-interval", 50, small=False)
    assert code == 0 and err.count("warning: not bit for bit: threads was 2, is 1") == 1


def csv_header(run):
    return (Path(run) / "metrics.csv").read_text().split("\n")[0].split(",")


BAD = [
    (["--n", 0], "--n must be"),
    (["--n", 5, "--m", 4], "--n <= --m"),
    (["--m", 64], "--hidden-dim"),
    (["--batch-size", 0], "--batch-size must be at least 1"),
    (["--tau", 2], "--tau must be"),
    (["--tau", 0], "--tau must be"),
    (["--gamma", 1.5], "--gamma must be"),
    (["--learning-rate", -1], "--learning-rate must be"),
    (["--learning-rate", "nan"], "--learning-rate must be"),
    (["--policy-noise", "inf"], "--policy-noise must be"),
    (["--exploration-noise", -0.1], "--exploration-noise must be"),
    (["--noise-clip", "nan"], "--noise-clip must be"),
    (["--total-timesteps", 0], "--total-timesteps must be"),
    (["--buffer-size", 0], "--buffer-size must be"),
    (["--buffer-size", 10**15], "GiB"),
    (["--seed", -1], "--seed must be"),
    (["--threads", 0], "--threads must be"),
    (["--policy-frequency", 0], "--policy-frequency must be"),
    (["--mask-update-interval", -1], "--mask-update-interval must be"),
    (["--hidden-dim", 0], "--hidden-dim must be"),
    (["--eval-interval", 0], "--eval-interval must be"),
    (["--eval-episodes", 0], "--eval-episodes must be"),
    (["--checkpoint-interval", 0], "--checkpoint-interval must be"),
    (["--learning-starts", -1], "--learning-starts must be"),
    (["--env-id", "CartPole-v1"], "continuous actions"),
    (["--env-id", "Unbounded-v0"], "bounded actions"),
    (["--env-id", "DictObs-v0"], "flat observations"),
    (["--env-id", "HalfCheeta-v4"], "HalfCheetah-v4"),
    (["--env-id", "Ant"], "version"),
    (["--batch-size", 10**9], "--batch-size must be at least 1 and at most"),
    (["--env-id", "no_such_module:X-v0"], "no_such_module"),
    (["--runs-dir", "/proc/none"], "--runs-dir /proc/none"),
    (["--runs-dir", __file__], "--runs-dir"),
    (["--evaluate", "/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_line(rnm, cli, argv, message, tmp_path):
    code, out, err = cli(rnm, *argv, "--no-track")
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(rnm, cli):
    code, _, err = cli(rnm, "--device", "cuda")
    assert code == 2 and "no GPU" in err


@pytest.mark.parametrize("env_id", ["ReachNaN-v0", "ReachInf-v0"])
def test_non_finite_values_stop_the_run(rnm, cli, env_id, tmp_path):
    code, _, err = cli(rnm, "--env-id", env_id, "--no-track", "--checkpoint-interval", 50)
    assert code == 1 and "error: observation or reward of step 150 is NaN or infinite" in err
    assert "Traceback" not in err
    run = next((tmp_path / "runs").iterdir())
    assert read_meta(run)["exit_reason"] == "nan" and int(read_rows(run)[-1]["global_step"]) <= 150
    end = next(step for step in episode_ends(run) if step >= 50)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["global_step"]
    assert end <= saved < 150 and f"{run.name}/checkpoint.pt, step {saved}" in err


def test_a_loss_that_explodes_stops_the_run(dense, cli):
    code, _, err = cli(dense, "--env-id", "Huge-v0", "--no-track")
    assert code == 1 and "error: a loss of step 101 is NaN or infinite" in err


def test_odd_environments(dense, cli, tmp_path):
    assert cli(dense, "--env-id", "Float64-v0", "--no-track", "--total-timesteps", 200)[0] == 0
    code, _, err = cli(dense, "--env-id", "ResetNaN-v0", "--no-track", "--checkpoint-interval", 1)
    assert code == 1 and "error: reset after step" in err and "NaN or infinite" in err
    run = next((tmp_path / "runs").glob("ResetNaN*"))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["global_step"]
    assert f"step {saved} (--resume" in err
    for part in (run / "replay").iterdir():
        assert np.isfinite(np.load(part)["rows"]).all()


def test_full_disk_keeps_the_old_checkpoint(script, small, monkeypatch, cli):
    """Files may not grow beyond a limit: the system's answer is the one of a full disk, an OSError from write()."""
    with monkeypatch.context() as patch:
        stop_at(patch, script, 210)
        run = Path(script.train(small(script))["run_dir"])
    old = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        code, _, err = cli(script, "--resume", run, "--checkpoint-interval", 50, small=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "File too large" in err and "Traceback" not in err
    assert (run / "checkpoint.pt").read_bytes() == old
    assert not list(run.rglob("*.tmp"))
    assert cli(script, "--resume", run, small=False)[0] == 0


def test_evaluate_repeats_the_last_evaluation(script, small, cli):
    run = script.train(small(script))["run_dir"]
    last = float(read_rows(run)[-1]["eval/episodic_return"])
    code, out, _ = cli(script, "--evaluate", run, small=False)
    assert code == 0 and f"return {last:.1f} ±" in out and "of 2 episodes" in out
    code, out, _ = cli(script, "--evaluate", run, "--eval-episodes", 5, small=False)
    assert code == 0 and "of 5 episodes" in out
    assert cli(script, "--evaluate", run, "--n", 1, small=False)[0] == 2
    (Path(run) / "model.pt").write_bytes(b"")
    assert cli(script, "--evaluate", run, small=False)[0] == 2


def test_video_that_fails_does_not_stop_the_run(dense, cli):
    code, out, err = cli(dense, "--no-track", "--capture-video")  # Reach-v0 is not even known to a fresh interpreter
    assert code == 0 and err.count("warning: going on without video") == 1 and "finished" in out


@pytest.mark.slow
def test_as_a_user_types_it(tmp_path):
    """A subprocess with W&B offline and a video: files, keys, one line about W&B, no warnings."""
    command = [sys.executable, str(ROOT / "rnm_td3_continuous.py"), "--env-id", "Hopper-v4", "--n", "1", "--m", "8",
               "--total-timesteps", "2000", "--learning-starts", "1900", "--eval-interval", "1000",
               "--mask-update-interval", "50", "--capture-video"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or done.stderr.startswith("warning: going on without video")  # no driver here
    assert bool(done.stderr) != bool(list((tmp_path / "runs").glob("*/videos/final*.mp4")))
    assert done.stdout.count("W&B is offline: look with `wandb leet") == 1
    run = next((tmp_path / "runs").iterdir())
    assert read_meta(run)["exit_reason"] == "finished"
    offline = list((tmp_path / "wandb").glob(f"offline-run-*-{run.name}-*"))
    assert len(offline) == 1 and next(offline[0].glob("*.wandb")).stat().st_size > 1000
    assert {"masks.npz", "meta.json"} <= {p.name for p in (offline[0] / "files").iterdir()}
    for script in ("rnm_td3_continuous.py", "dense_td3_continuous.py"):
        text = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True).stdout
        assert "--env-id" in text and "--no-track" in text


@pytest.mark.slow
def test_it_learns(script, small):
    """Reach from -1..1 to 1: an untrained policy runs away, a trained one stands still there."""
    args = small(script, total_timesteps=4000, learning_starts=500, hidden_dim=64, batch_size=64, eval_interval=4000,
                 eval_episodes=10, buffer_size=10_000)  # fmt: skip
    run = script.train(args)["run_dir"]
    returns = [float(row["eval/episodic_return"]) for row in read_rows(run) if row["eval/episodic_return"]]
    assert returns[0] < -20 and returns[-1] > -8, returns
