"""A run that was stopped, killed or extended goes on bit for bit; what can't go on says why in one line."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    checkpoint_step,
    draw_everywhere,
    flags,
    load,
    read_meta,
    read_rows,
    steps_with,
    stop_at,
)


def test_resume_after_sigterm_is_bit_for_bit(script, small, monkeypatch, cli):
    options = {"n": 1, "m": 4, "mask_update_interval": 30} if hasattr(script, "refresh_masks") else {}
    whole = script.train(small(script, **options))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 317)
        part = script.train(small(script, **options))
    assert part["exit_reason"] == "sigterm" and read_meta(part["run_dir"])["exit_reason"] == "sigterm"
    end = next(step for step in steps_with(whole) if step >= 317)
    assert int(read_rows(part["run_dir"])[-1]["global_step"]) == checkpoint_step(part["run_dir"]) == end
    code, out, err = cli(script, "--resume", part["run_dir"], small=False)
    assert code == 0 and f"resumed at step {end}" in out and "finished" in out and err == ""
    assert_same_run(whole, part["run_dir"])
    assert not (Path(part["run_dir"]) / "checkpoint.pt").exists()


def test_resume_from_the_very_first_checkpoint(script, small, monkeypatch, cli):
    whole = script.train(small(script))["run_dir"]
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "checkpoint_due", lambda *_: False)  # as if it had been killed
        stop_at(patch, script, 210)
        part = script.train(small(script))["run_dir"]
    assert checkpoint_step(part) == 0 and int(read_rows(part)[-1]["global_step"]) >= 210
    assert cli(script, "--resume", part, small=False)[0] == 0
    assert_same_run(whole, part)


def test_resume_restores_the_global_generators(script, small, monkeypatch, cli):
    """torch's, numpy's (with the second half of a pair of normal numbers) and random's."""
    draws, _ = draw_everywhere(script, monkeypatch)
    whole, wanted = script.train(small(script))["run_dir"], list(draws)
    draws.clear()
    with monkeypatch.context() as patch:
        stop_at(patch, script, 317)
        part = script.train(small(script))["run_dir"]
    assert 200 < len(draws) < 280
    torch.manual_seed(6), np.random.seed(6), random.seed(6)  # what the resuming process finds
    assert cli(script, "--resume", part, small=False)[0] == 0
    assert draws == wanted and len(wanted) == 300
    assert_same_run(whole, part)


def test_resume_after_kill_drops_the_rows_past_the_checkpoint(rnm, small, cli, tmp_path):
    """A ring smaller than the run, several checkpoints, kill -9 in the middle of training."""
    options = {"n": 1, "m": 4, "mask_update_interval": 30, "buffer_size": 220, "checkpoint_interval": 150}
    options |= {"total_timesteps": 1500, "eval_interval": 500}
    whole = rnm.train(small(rnm, **options, keep_replay=True))["run_dir"]
    command = [sys.executable, rnm.__file__, *flags(**options | {"env_id": "toy_envs:Reach-v0"}), "--no-track"]
    command += ["--keep-replay", "--runs-dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    run = wait_for_run(tmp_path / "killed")
    while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_text().splitlines()) < 40:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_meta(run)["exit_reason"] == "running"
    assert 0 < checkpoint_step(run) <= int(read_rows(run)[-1]["global_step"]) < 1500
    with open(run / "metrics.csv", "a") as file:
        file.write("1499,0.1")  # a torn line
    code, _, err = cli(rnm, "--resume", run, small=False)
    assert code == 0 and err == ""
    assert_same_run(whole, run)
    replay = torch.load(run / "checkpoint.pt", weights_only=True)["rb"]
    assert replay["added"] == checkpoint_step(run) > 1400 and len(replay["rows"]) == 220


def wait_for_run(folder):
    for _ in range(3000):
        if folder.exists() and list(folder.iterdir()):
            return next(folder.iterdir())
        time.sleep(0.01)
    raise AssertionError("no run was started")


@pytest.mark.parametrize("total", [333, 350])  # in the middle of a cycle; at an update with a refresh in the longer run
def test_an_extended_run_is_the_longer_run(twin, small, cli, total):
    options = {"keep_replay": True}
    if hasattr(twin, "refresh_masks"):
        options |= {"n": 1, "m": 4, "mask_update_interval": 50}
    whole = twin.train(small(twin, **options))["run_dir"]
    part = twin.train(small(twin, **options, total_timesteps=total))["run_dir"]
    assert int(read_rows(part)[-1]["global_step"]) == total
    if hasattr(twin, "refresh_masks"):  # the last step ends no cycle
        assert steps_with(part, "sad/actor") == [150, 200, 250, 300] == steps_with(whole, "sad/actor")[:4]
        assert 350 in steps_with(whole, "sad/actor")
    end = max(step for step in steps_with(part) if step < total)
    code, out, _ = cli(twin, "--resume", part, "--total-timesteps", 400, small=False)
    assert code == 0 and f"resumed at step {end}" in out
    assert_same_run(whole, part)
    before = {p.name: p.read_bytes() for p in Path(part).iterdir()}
    assert "checkpoint.pt" in before
    code, out, _ = cli(twin, "--resume", part, small=False)
    assert code == 0 and "nothing to do" in out
    assert before == {p.name: p.read_bytes() for p in Path(part).iterdir()}


def test_a_finished_run_without_its_replay_cannot_go_on(script, small, cli):
    still = {"topology": "static", "critic_regime": "static"}  # others can't go on at all
    still = {name: x for name, x in still.items() if hasattr(script.Args, name)}
    run = script.train(small(script, total_timesteps=200, **still))["run_dir"]
    before = {p.name: p.read_bytes() for p in Path(run).iterdir()}
    code, _, err = cli(script, "--resume", run, "--total-timesteps", 400, small=False)
    assert code == 2 and "--keep-replay" in err and err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in Path(run).iterdir()}


def test_clocks_go_on_after_a_resume(dense, small, monkeypatch, cli):
    with monkeypatch.context() as patch:
        stop_at(patch, dense, 1300)
        run = dense.train(small(dense, total_timesteps=2500))["run_dir"]
    clocks = ("charts/wall_time_s", "charts/cpu_time_s")
    before = {clock: float(read_rows(run, clocks=True)[-1][clock]) for clock in clocks}
    started, cpu_started = time.perf_counter(), time.process_time()
    assert cli(dense, "--resume", run, small=False)[0] == 0
    took = time.perf_counter() - started, time.process_time() - cpu_started
    rows = read_rows(run, clocks=True)
    for clock, most in zip(clocks, took, strict=True):
        times = [float(row[clock]) for row in rows]
        assert times == sorted(times) and before[clock] < times[-1] < before[clock] + most


def test_speeds_by_a_clock_of_the_test_s_own(dense, small, monkeypatch):
    """A step takes 10 ms, an update 50 more, of which the CPU works half; an evaluation is no training time."""
    now = np.zeros(2)

    def slow(place, name, *seconds):
        function = getattr(place, name)

        def slow_function(*args, **options):
            now[:] += seconds
            return function(*args, **options)

        monkeypatch.setattr(place, name, slow_function)

    slow(dense.ReplayBuffer, "add", 0.01, 0.005)
    slow(dense, "update_agent", 0.05, 0.025)
    slow(dense, "evaluate", 100.0, 100.0)
    monkeypatch.setattr(dense, "clock", now.copy)
    run = dense.train(small(dense, total_timesteps=3000, learning_starts=1500, eval_interval=1000))["run_dir"]
    names = "charts/SPS", "charts/update_ms", "charts/wall_time_s", "charts/cpu_time_s"
    rows = {row["global_step"]: [float(row[name] or 0) for name in names] for row in read_rows(run, clocks=True)}
    wanted = [[1000 / 10, 0, 10, 5], [1000 / 35, 50, 45, 22.5], [1000 / 60, 50, 105, 52.5]]  # 0, 500, 1000 updates
    assert np.allclose([rows["1000"], rows["2000"], rows["3000"]], wanted)


def test_evaluations_and_checkpoints_are_no_training_time(dense, small, monkeypatch):
    """Three evaluations and the first checkpoint are made to take half a second each."""
    evaluate, write_files, stamps = dense.evaluate, dense.write_files, []

    def slow_evaluate(*args):
        stamps.append(time.perf_counter())
        time.sleep(0.5)
        row = evaluate(*args)
        stamps.append(time.perf_counter())
        return row

    def slow_write(*args):
        time.sleep(0.5)
        write_files(*args)

    monkeypatch.setattr(dense, "evaluate", slow_evaluate)
    monkeypatch.setattr(dense, "write_files", slow_write)
    run = dense.train(small(dense, total_timesteps=1000, eval_interval=500))["run_dir"]
    assert len(stamps) == 6
    last, most = read_rows(run, clocks=True)[-1], stamps[-1] - stamps[0] - 4 * 0.5 + 0.2
    assert 0.1 < float(last["charts/wall_time_s"]) < most
    assert float(last["charts/SPS"]) > 1000 / most


def test_second_signal_leaves_at_once(rnm, small, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop_at(monkeypatch, rnm, 310, signal.SIGINT, times=2)
    assert rnm.train(small(rnm))["exit_reason"] == "sigint"
    assert codes == [130]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_of_signals(dense, cli, monkeypatch, number, code):
    stop_at(monkeypatch, dense, 120, number)
    exit_code, out, _ = cli(dense, "--no-track")
    assert exit_code == code and out.splitlines()[-1].startswith("stopped by sig") and "last checkpoint: step 1" in out


def test_resume_with_other_code_warns_in_one_line(rnm, small, monkeypatch, cli, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, rnm, 210)
        run = rnm.train(small(rnm))["run_dir"]
    source = (ROOT / "rnm_td3_continuous.py").read_text()
    fork = tmp_path / "fork" / "rnm_td3_continuous.py"
    fork.parent.mkdir()
    fork.write_text(source.replace("qf1_loss + qf2_loss\n", "qf1_loss + 2 * qf2_loss\n"))
    assert fork.read_text() != source
    code, _, err = cli(load(fork), "--resume", run, small=False)
    hashes = [rnm.code_hash(text) for text in (source, fork.read_text())]
    assert code == 0 and err == "warning: not bit for bit, code was {}, is {}\n".format(*hashes)
    assert read_meta(run)["code"] == hashes[0] and read_meta(run)["resumed"][0]["code"] == hashes[1]


def test_each_resume_is_recorded_and_another_kernel_is_said(rnm, small, monkeypatch, cli):
    with monkeypatch.context() as patch:
        stop_at(patch, rnm, 110)
        run = rnm.train(small(rnm, kernel="nm"))["run_dir"]
    assert read_meta(run)["kernel"] == "nm"
    with monkeypatch.context() as patch:
        stop_at(patch, rnm, 210)
        assert cli(rnm, "--resume", run, small=False)[::2] == (143, "")
    monkeypatch.setattr(rnm, "use_kernel", lambda *_: "torch")  # as without a compiler
    code, _, err = cli(rnm, "--resume", run, small=False)
    assert code == 0 and err == "warning: not bit for bit, kernel was nm, is torch\n"
    meta = read_meta(run)
    assert meta["kernel"] == "nm" and [again["kernel"] for again in meta["resumed"]] == ["nm", "torch"]
    assert 0 < meta["resumed"][0]["global_step"] < meta["resumed"][1]["global_step"]


@pytest.mark.parametrize("name", ["rlx2", "mst"])
def test_a_run_can_be_made_longer_only_without_a_schedule(name, request, small, cli):
    script = request.getfixturevalue(name)
    still = {"topology": "static"} if name == "rlx2" else {"critic_regime": "static"}
    for options, longer in (({}, False), (still, True)):
        run = script.train(small(script, **options, total_timesteps=300, keep_replay=longer))["run_dir"]
        before = {path.name: path.read_bytes() for path in Path(run).iterdir()}
        code, out, err = cli(script, "--resume", run, "--total-timesteps", 400, small=False)
        if longer:
            assert code == 0 and err == "" and f"{run}: finished" in out
            assert_same_run(script.train(small(script, **options, keep_replay=True))["run_dir"], run)
        else:
            assert code == 2 and err.startswith("error: --total-timesteps can't grow: this run's masks")
            assert before == {path.name: path.read_bytes() for path in Path(run).iterdir()}


def test_bad_resumes_are_refused_by_name(rnm, dense, small, cli, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, rnm, 210)
        run = Path(rnm.train(small(rnm, n=1, m=4))["run_dir"])
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert set(before) == {
        "checkpoint.pt",
        "masks.npz",
        "meta.json",
        "metrics.csv",
        "model.pt",
        "rnm_td3_continuous.py",
    }

    def refused(*argv, module=rnm, changed=()):
        code, out, err = cli(module, *argv, small=False)
        assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        files = {p.name: p.read_bytes() for p in run.iterdir() if p.name not in changed}
        assert files == {name: data for name, data in before.items() if name not in changed}  # refused, and untouched
        return err

    assert "--seed is 1" in refused("--resume", run, "--seed", 2)
    assert "--n is 1" in refused("--resume", run, "--n", 2)
    assert "only grow" in refused("--resume", run, "--total-timesteps", 300)
    assert "rnm_td3_continuous.py" in refused("--resume", run, module=dense)
    assert "holds no run" in refused("--resume", tmp_path / "nowhere")
    assert "exclude" in refused("--resume", run, "--evaluate", run)
    path = run / "checkpoint.pt"
    checkpoint = path.read_bytes()
    with zipfile.ZipFile(path) as parts:
        tensors = [part for part in parts.infolist() if "/data/" in part.filename]
        largest = parts.read(max(tensors, key=lambda part: part.file_size))  # torch.load would not see a change in it
    flipped = bytearray(checkpoint)
    flipped[checkpoint.index(largest) + len(largest) // 2] ^= 1  # one bit, in what is neither a header nor padding
    for damage in (checkpoint[: len(checkpoint) // 2], b"", b"no checkpoint", flipped):
        path.write_bytes(damage)
        assert "checkpoint.pt is damaged" in refused("--resume", run, changed=["checkpoint.pt"])
    torch.save({"another": "file"}, path)
    assert "of another version" in refused("--resume", run, changed=["checkpoint.pt"])
    path.unlink()
    assert "checkpoint.pt is missing" in refused("--resume", run, changed=["checkpoint.pt"])
    path.write_bytes(checkpoint)
    with open(run / "metrics.csv", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process" in refused("--resume", run)
    table, meta = before["metrics.csv"], before["meta.json"]
    (run / "metrics.csv").unlink()
    assert "metrics.csv is missing" in refused("--resume", run, changed=["metrics.csv"])
    for damage in (table[:-30], b"x" + table):
        (run / "metrics.csv").write_bytes(damage)
        assert "metrics.csv is damaged" in refused("--resume", run, changed=["metrics.csv"])
    (run / "metrics.csv").write_bytes(table + b"\0" * 10**6)  # as a power cut may leave it
    (run / "meta.json").write_bytes(meta[:100])
    assert "holds no run" in refused("--resume", run, changed=["metrics.csv", "meta.json"])
    (run / "meta.json").write_bytes(meta.replace(b'"threads": 1', b'"threads": 2', 1))
    code, _, err = cli(rnm, "--resume", run, "--checkpoint-interval", 50, small=False)
    assert code == 0 and err == "warning: not bit for bit, threads was 2, is 1\n"
    assert b"\0" not in (run / "metrics.csv").read_bytes()


def test_an_empty_folder_name_is_no_fresh_start(dense, cli, tmp_path):
    """As `--resume "$RUN"` gives it where RUN is not set: an error, not a run from the beginning."""
    for flag in ("--resume", "--evaluate"):
        code, _, err = cli(dense, flag, "", "--no-track", "--total-timesteps", 1)
        assert code == 2 and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_stop_outlives_who_reads_its_message(rnm, small, monkeypatch):
    """As with `2>&1 | tee log`, where Ctrl-C ends tee first."""

    def broken(*_):
        raise BrokenPipeError

    stop_at(monkeypatch, rnm, 210)
    monkeypatch.setattr(rnm.os, "write", broken)
    part = rnm.train(small(rnm))
    assert part["exit_reason"] == "sigterm" and checkpoint_step(part["run_dir"]) >= 210


def test_a_reader_that_is_gone_leaves_the_exit_code(dense, tmp_path):
    """As with `| tee log`: Python would end with 120 if it could not write the rest of stdout."""
    command = [sys.executable, dense.__file__, *flags(env_id="toy_envs:Reach-v0", learning_starts=10**6), "--no-track"]
    command += ["--runs-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.readline().endswith(b"started\n")
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (meta,) = tmp_path.glob("**/meta.json")
    assert read_meta(meta.parent)["exit_reason"] == "sigint"


def test_an_evaluation_leaves_modes_as_they_were(dense, small):
    args = small(dense)
    actor = dense.make_networks(args, dense.make_env(args.env_id))["actor"]
    actor.net.fc1.eval()
    before = [module.training for module in actor.modules()]
    with dense.evaluating(actor):
        assert not any(module.training for module in actor.modules())
    assert [module.training for module in actor.modules()] == before and not all(before) and any(before)
