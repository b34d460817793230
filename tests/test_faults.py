"""What goes wrong: bad input, NaN, a full disk, lost streams, Weights & Biases; and the command line as typed."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    checkpoint_step,
    flags,
    read_meta,
    read_model,
    read_rows,
    steps_with,
    stop_at,
)

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
    (["--buffer-size", 10**15], "--buffer-size must be"),
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
    (["--env-id", "HalfCheeta-v4"], "HalfCheetah"),
    (["--env-id", "Ant"], "version"),
    (["--env-id", "no_such_module:X-v0"], "no_such_module"),
    (["--runs-dir", "/proc/none"], "/proc/none"),
    (["--runs-dir", __file__], "test_faults.py"),
    (["--evaluate", "/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "")
def test_bad_input_is_one_clear_line(rnm, cli, argv, message, tmp_path):
    """The flag is named as it is typed."""
    code, out, err = cli(rnm, *argv, "--no-track")
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(dense, small, cli):
    code, _, err = cli(dense, "--device", "cuda")
    assert code == 2 and "no GPU" in err and "--device cpu" in err
    run = dense.train(small(dense))["run_dir"]
    meta = read_meta(run)
    meta["args"]["device"] = "cuda"  # a policy that was trained on another machine
    (Path(run) / "meta.json").write_text(json.dumps(meta))
    code, out, err = cli(dense, "--evaluate", run, "--device", "cpu", small=False)
    assert code == 0 and "return" in out, err


@pytest.mark.parametrize("env_id", ["ReachNaN-v0", "ReachInf-v0"])
def test_non_finite_values_stop_the_run(rnm, cli, env_id, tmp_path):
    code, out, err = cli(rnm, "--env-id", env_id, "--no-track", "--checkpoint-interval", 50)
    assert code == 1 and err == "error: observation or reward at step 150 is NaN or infinite\n"
    run = next((tmp_path / "runs").iterdir())
    assert read_meta(run)["exit_reason"] == "nan" and int(read_rows(run)[-1]["global_step"]) < 150
    end = next(step for step in steps_with(run) if step >= 50)
    saved = checkpoint_step(run)
    assert end <= saved < 150 and f"stopped by nan; last checkpoint: step {saved}, runs/{run.name}" in out


def test_a_loss_that_explodes_stops_the_run(dense, cli):
    code, _, err = cli(dense, "--env-id", "Huge-v0", "--no-track")
    assert code == 1 and err == "error: a loss at step 101 is NaN or infinite\n"


def test_nan_in_an_evaluation_stops_the_run(dense, cli, monkeypatch):
    act = dense.act
    monkeypatch.setattr(dense, "act", lambda *a: act(*a) * 0 + 0.5)  # 150 steps in 20 episodes
    code, _, err = cli(dense, "--env-id", "ReachNaN-v0", "--eval-episodes", 20, "--no-track")
    assert code == 1 and err == "error: observation or reward in the evaluation at step 0 is NaN or infinite\n"


def test_odd_environments(dense, cli, tmp_path):
    """float64 actions; a reset that returns NaN, in the warm-up and after it: a fault, and the checkpoint is clean."""
    assert cli(dense, "--env-id", "Float64-v0", "--no-track", "--total-timesteps", 200)[0] == 0
    for i, starts in enumerate((1000, 100)):
        options = ["--learning-starts", starts, "--checkpoint-interval", 1, "--runs-dir", tmp_path / str(i)]
        code, out, err = cli(dense, "--env-id", "ResetNaN-v0", "--no-track", *options)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "NaN or infinite" in err
        run = next((tmp_path / str(i)).iterdir())
        saved = checkpoint_step(run)
        assert saved == steps_with(run)[-1] and f"last checkpoint: step {saved}" in out
        replay = torch.load(run / "checkpoint.pt", weights_only=True)["rb"]
        assert replay["added"] == saved > 100 and torch.isfinite(replay["rows"]).all()


def test_full_disk_keeps_the_old_checkpoint(script, small, monkeypatch, cli):
    """Files may not grow beyond a limit: the system's answer is the one of a full disk, an OSError from write()."""
    with monkeypatch.context() as patch:
        stop_at(patch, script, 210)
        run = Path(script.train(small(script))["run_dir"])
    names = ("checkpoint.pt", "model.pt")
    old = {name: (run / name).read_bytes() for name in names}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old["model.pt"]) // 2, limits[1]))
    try:
        code, _, err = cli(script, "--resume", run, "--checkpoint-interval", 50, small=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert {name: (run / name).read_bytes() for name in names} == old
    assert not list(run.rglob("*.tmp"))
    assert cli(script, "--resume", run, small=False)[0] == 0


@pytest.mark.parametrize("size", [1000, 100_000])  # of the larger, torch says it with a RuntimeError
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(dense, tmp_path, size):
    path, limits = tmp_path / "x.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    dense.write_atomic(path, lambda file: file.write(b"old"))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large" if size == 1000 else "x.pt can't be written"):
            dense.write_atomic(path, lambda file: torch.save(torch.zeros(size), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_evaluate_repeats_the_last_evaluation(script, small, cli):
    run = script.train(small(script))["run_dir"]
    row = read_rows(run)[-1]
    mean, std, length = (float(row[f"eval/episodic_{key}"]) for key in ("return", "return_std", "length"))
    code, out, _ = cli(script, "--evaluate", run, small=False)
    assert code == 0 and out == f"{Path(run).name}: return {mean:.1f} ± {std:.1f} (mean ± std), length {length:.0f}\n"
    code, more, _ = cli(script, "--evaluate", run, "--eval-episodes", 5, small=False)
    assert code == 0 and more != out
    model = read_model(run)
    next(x for key, x in model["actor"].items() if key.endswith(".weight")).mul_(1.5)  # not what the run acted with
    torch.save(model, Path(run) / "model.pt")
    code, out, err = cli(script, "--evaluate", run, small=False)
    assert code == 2 and out == "" and "do not act as the run" in err and err.count("\n") == 1
    for damage in (b"", b"no model"):
        (Path(run) / "model.pt").write_bytes(damage)
        code, out, err = cli(script, "--evaluate", run, small=False)
        assert code == 2 and out == "" and "model.pt is missing, damaged" in err and err.count("\n") == 1


def test_video_that_fails_does_not_stop_the_run(dense, cli, tmp_path):
    code, out, err = cli(dense, "--no-track", "--capture-video")  # Reach-v0 draws nothing
    assert code == 0 and err == "" and out.count("warning: no video") == 1 and "finished" in out
    assert read_meta(next((tmp_path / "runs").iterdir()))["exit_reason"] == "finished"


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
    assert os.environ.get("WANDB_MODE") == mode  # the next run in this process makes its own choice


@pytest.mark.parametrize(
    ("tags", "wanted"), [("paper,second try", {"paper", "second try"}), ("x" * 65, {"x" * 64}), ("", set())]
)
def test_wandb_tags_of_the_user_are_added(rnm, cli, monkeypatch, tmp_path, tags, wanted):
    import wandb

    runs, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: runs.append(init(**options)) or runs[-1])
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_TAGS", tags)
    code, out, _ = cli(rnm, "--n", 1, "--m", 8, "--total-timesteps", 1)
    assert code == 0 and "W&B is offline" in out
    assert [set(run.tags) for run in runs] == [{"1of8", "rnm_td3_continuous"} | wanted]
    assert runs[0].group == "Reach-v0" and os.environ["WANDB_TAGS"] == tags


def test_a_lost_wandb_does_not_stop_a_run(dense, cli, monkeypatch):
    class Gone:
        def log(self, _):
            raise ConnectionError("connection lost")

    monkeypatch.setattr(dense, "start_wandb", lambda *_: Gone())
    code, out, _ = cli(dense)
    assert code == 0 and "finished" in out and out.count("connection lost") == 1


@pytest.mark.parametrize("shell", ['"$@" | head -1', '"$@" >&- 2>&-'])
def test_lost_streams_do_not_stop_a_run(dense, tmp_path, shell):
    command = [sys.executable, dense.__file__, *flags(env_id="toy_envs:Reach-v0"), "--no-track"]
    bash = ["bash", "-c", shell, "-", *command, "--runs-dir", tmp_path / "lost"]
    subprocess.run(bash, capture_output=True)
    assert [read_meta(run)["exit_reason"] for run in (tmp_path / "lost").iterdir()] == ["finished"]


@pytest.mark.slow
def test_as_a_user_types_it(tmp_path):
    """A subprocess with W&B offline and a video: files, keys, one line about W&B, no warnings."""
    command = [sys.executable, str(ROOT / "rnm_td3_continuous.py"), "--env-id", "Hopper-v4", "--n", "1", "--m", "8"]
    command += "--total-timesteps 2000 --learning-starts 1900 --eval-interval 1000 --mask-update-interval 50".split()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    environment |= {"CUDA_HOME": "", "CUDA_PATH": ""}  # else torch warns of a toolkit without a GPU
    done = subprocess.run([*command, "--capture-video"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = next((tmp_path / "runs").iterdir())
    assert ("warning: no video" in done.stdout) != bool(list((run / "videos").glob("*.mp4")))  # no driver here
    assert done.stdout.count("warning") <= 1
    assert done.stdout.count("W&B is offline: look with `wandb leet") == 1
    assert read_meta(run)["exit_reason"] == "finished" and steps_with(run, "sad/actor") == [1950]
    offline = list((tmp_path / "wandb").glob(f"offline-run-*-{run.name}-*"))
    assert len(offline) == 1 and next(offline[0].glob("*.wandb")).stat().st_size > 1000
    assert {"masks.npz", "meta.json", "rnm_td3_continuous.py"} <= {p.name for p in (offline[0] / "files").iterdir()}
    text = subprocess.run([*command[:2], "--help"], capture_output=True, text=True).stdout
    assert "--env-id" in text and "--no-track" in text


def test_a_finished_run_is_on_the_disk_before_it_says_so(dense, small, monkeypatch):
    """Also after a power cut: metrics.csv, then meta.json, and only then the checkpoint goes."""
    calls, fsync, unlink = [], os.fsync, Path.unlink
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(Path(f"/proc/self/fd/{fd}").readlink().name) or fsync(fd))
    monkeypatch.setattr(Path, "unlink", lambda path, **more: calls.append(f"no {path.name}") or unlink(path, **more))
    dense.train(small(dense, total_timesteps=5))
    wanted = {"metrics.csv": "c", "meta.json.tmp": "m", "no checkpoint.pt": "-"}
    assert "".join(wanted.get(name, "") for name in calls) == "mc" + "cm-" + "mm"  # the report, the end


def test_a_file_system_without_locks(dense, small, monkeypatch, capsys):
    def fail(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(dense.fcntl, "flock", fail(errno.ENOLCK))
    assert dense.train(small(dense, total_timesteps=5))["exit_reason"] == "finished"
    assert "can't be locked: don't resume a run twice at once" in capsys.readouterr().err
    monkeypatch.setattr(dense.fcntl, "flock", fail(errno.EIO))
    with pytest.raises(dense.UserError, match="Input/output error"):
        dense.train(small(dense, total_timesteps=5))


def test_what_another_process_finishes_while_this_one_loads(dense, small, monkeypatch, cli):
    with monkeypatch.context() as patch:
        stop_at(patch, dense, 100)
        part = Path(dense.train(small(dense))["run_dir"])
    load_checkpoint, files = dense.load_checkpoint, {}

    def load_late(args, *things):
        load_checkpoint(args, *things)
        (part / "checkpoint.pt").unlink()  # as Run.finish does
        files.update({path.name: path.read_bytes() for path in part.iterdir()})

    monkeypatch.setattr(dense, "load_checkpoint", load_late)
    code, _, err = cli(dense, "--resume", part, small=False)
    assert code == 2 and err == f"error: {part} has been finished by another process\n"
    assert files == {path.name: path.read_bytes() for path in part.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_resumed_run_lets_go_of_its_checkpoint(twin, small, monkeypatch, cli):
    """Which would take its place on the disk as long as the run lives."""
    with monkeypatch.context() as patch:
        stop_at(patch, twin, 200)
        part = twin.train(small(twin))["run_dir"]
    maps, update = [], twin.update_agent
    look = lambda: len(maps) > 1 or maps.append(Path("/proc/self/maps").read_text())  # noqa: E731
    monkeypatch.setattr(twin, "update_agent", lambda *args: (look(), update(*args))[1])
    assert cli(twin, "--resume", part, small=False)[0] == 0
    assert maps and not any("checkpoint.pt" in text for text in maps)


def test_a_replay_that_keeps_itself_in_another_way(dense, small, monkeypatch, cli):
    class Own(dense.ReplayBuffer):
        def state_dict(self):
            return {"number": self.added, "mine": self.rows.clone()}

        def load_state_dict(self, state):
            self.added = state["number"]
            self.rows[:] = state["mine"]

    monkeypatch.setattr(dense, "ReplayBuffer", Own)
    whole = dense.train(small(dense))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, dense, 200)
        part = dense.train(small(dense))["run_dir"]
    assert cli(dense, "--resume", part, small=False)[0] == 0
    assert_same_run(whole, part)
