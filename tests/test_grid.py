"""run_grid.py: with a stand-in for a training script that takes a quarter of a second, and with the real ones."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, assert_same_run, flags, read_meta

import run_grid

SCRIPT = """
import fcntl, hashlib, json, os, signal, sys, time
from pathlib import Path

class Args:
    pass

def parse_args(argv=None):
    args = Args()
    vars(args).update(env_id="A-v0", seed=1, runs_dir="runs", resume=None, total_timesteps=20, n=0, mode="")
    vars(args).update(track=True, threads=1)
    argv = sys.argv[1:] if argv is None else argv
    for name, value in zip(argv[::2], argv[1::2]):
        key = name[2:].replace("-", "_")
        if key not in vars(args):
            raise SystemExit(2)
        old = getattr(args, key)
        setattr(args, key, value if old is None else type(old)(value))
    if args.n < 0:
        raise ValueError("--n must be at least 0")
    return args

def make_env(env_id):
    if env_id == "No-v0":
        raise ValueError("there is no No-v0")
    return open(os.devnull)

def code_hash(source):
    return hashlib.sha256(source.encode()).hexdigest()

def write(path, text):
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)  # a kill never leaves half of it

def main():
    args = parse_args([word for word in sys.argv[1:] if word != "--track"])
    folder = Path(args.resume) if args.resume else Path(args.runs_dir, f"{args.env_id}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"script": Path(__file__).name, "args": vars(args) | {"resume": None}, "exit_reason": "running"}
    meta |= {"code": code_hash(Path(__file__).read_text())}
    meta |= {name: os.environ.get(name) for name in ("WANDB_TAGS", "OMP_NUM_THREADS")}
    if args.resume:
        meta = json.loads((folder / "meta.json").read_text())
        vars(args).update(meta["args"])
    write_meta = lambda **facts: write(folder / "meta.json", json.dumps(meta | facts))
    file = open(folder / "metrics.csv", "a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpoint = folder / "checkpoint.pt"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with open(Path(args.runs_dir, "started.txt"), "a") as log:
        log.write(f"{args.env_id} {args.n} s{args.seed} from {step} on {len(os.sched_getaffinity(0))} cores\\n")
    write_meta()
    print(f"{folder}: started", flush=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGINT, lambda *_: print("SIGINT reached a run"))
    while step < args.total_timesteps:
        step += 1
        print(step, file=file, flush=True)
        write(checkpoint, str(step))
        time.sleep(0.01)
        if args.mode == "nan" and step == 5:
            write_meta(exit_reason="nan")
            print("error: loss is NaN")
            return 1
        if args.mode == "always" and step >= 5 or args.mode == "once" and step == 5:
            write_meta(exit_reason="error")
            print("error: it broke at", step)
            return 1
        if args.mode == "input":
            print("error: bad file")
            return 2
        if stopped and args.mode == "breaks":
            print("error: the disk is full")
            return 1
        if stopped and args.mode != "deaf":
            write_meta(exit_reason="sigterm")
            return 143
    write_meta(exit_reason="finished", final_score=float(args.seed + args.n), wall_time_s=60.0)
    return 0

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def grid(tmp_path):
    """grid(*commands, env_ids=, seeds=, wait=) -> (exit code, stdout, stderr), or the process."""
    (tmp_path / "toy.py").write_text(SCRIPT)

    def call(*commands, env_ids=("A-v0",), seeds=(1, 2), more=(), wait=True, tags=""):
        argv = [sys.executable, str(ROOT / "run_grid.py"), "--commands", *commands, "--env-ids", *env_ids, "--seeds"]
        argv += [*map(str, seeds), *map(str, more)]
        process = subprocess.Popen(
            argv,
            cwd=tmp_path,
            env=os.environ | {"WANDB_TAGS": tags, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return call


def started(tmp_path):
    """What the runs themselves wrote when they started, in order."""
    path = tmp_path / "runs" / "started.txt"
    return [line.split(" on ")[0] for line in path.read_text().splitlines()] if path.exists() else []


def metas(tmp_path):
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/meta.json"))]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_a_grid_runs_once_and_is_reported(grid, tmp_path):
    command = ("toy.py --n 1", "toy.py --n 2")
    code, out, err = grid(*command, env_ids=("A-v0", "B-v0"), more=("--workers", 1, "--name", "study"))
    assert (code, err) == (0, "")
    order = [f"{env} {n} s{seed} from 0" for seed in (1, 2) for env in ("A-v0", "B-v0") for n in (1, 2)]
    assert started(tmp_path) == order
    assert {(meta["WANDB_TAGS"], meta["OMP_NUM_THREADS"]) for meta in metas(tmp_path)} == {("study", "1")}
    rows = [re.split(r"  +", line) for line in out.splitlines() if re.match(r"toy --n", line)]
    spread = "0.7"  # the scores are n + seed: 2 and 3, or 3 and 4
    assert rows == [
        [f"toy --n {n}", env, "2 of 2", f"{n + 1.5} ± {spread}", "1.0"] for env in ("A-v0", "B-v0") for n in (1, 2)
    ]
    assert out.splitlines()[-1] == "figures: python sad_analysis.py runs"
    assert out.count("\nstarted: ") + out.startswith("started: ") == 8 and out.count("finished: ") == 8
    code, again, _ = grid(*command, env_ids=("A-v0", "B-v0"), more=("--workers", 1))
    assert code == 0 and started(tmp_path) == order and "started: " not in again
    code, _, _ = grid(*command, env_ids=("A-v0", "B-v0"), seeds=(1, 2, 3))
    assert code == 0 and len(started(tmp_path)) == 12  # what is missing, and no more


def test_what_makes_another_run(grid, tmp_path):
    assert grid("toy.py --n 1", seeds=(1,))[0] == 0
    assert grid("toy.py --track x --threads 2 --n 1", seeds=(1,))[0] == 0  # tracking and threads do not
    assert len(started(tmp_path)) == 1
    assert grid("toy.py --n 1 --total-timesteps 21", seeds=(1,), more=("--name", "study"), tags="mine")[0] == 0
    assert len(started(tmp_path)) == 2 and {meta["WANDB_TAGS"] for meta in metas(tmp_path)} == {"", "mine,study"}


def test_other_code_stops_the_grid_unless_accepted(grid, tmp_path):
    assert grid("toy.py", seeds=(1,))[0] == 0
    with open(tmp_path / "toy.py", "a") as file:
        file.write("# edited\n")
    code, out, err = grid("toy.py", seeds=(1, 2))
    assert code == 2 and out == "" and "1 runs are of other code" in err and "--accept-code" in err
    assert len(started(tmp_path)) == 1
    code, out, _ = grid("toy.py", seeds=(1, 2), more=("--accept-code",))
    assert code == 0 and started(tmp_path) == ["A-v0 0 s1 from 0", "A-v0 0 s2 from 0"]


def test_other_code_that_lived_elsewhere_is_not_counted(grid, tmp_path):
    """A run of a killed grid goes on; then the script is edited and the same command typed again."""
    assert grid("toy.py", seeds=(1,))[0] == 0
    (path,), (log,) = (tmp_path.glob(f"runs/{name}") for name in ("*/meta.json", "grid/*.log"))
    meta = json.loads(path.read_text())
    (path.parent / "checkpoint.pt").unlink()
    path.write_text(json.dumps(meta | {"exit_reason": "running", "code": "other"}))
    with open(log) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # it lives
        process = grid("toy.py", seeds=(1,), wait=False)
        assert "waiting for what lives elsewhere" in process.stdout.readline()
        path.write_text(json.dumps(meta | {"code": "other"}))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and len(started(tmp_path)) == 1
    assert f"failed: A-v0 toy s1: {path.parent.relative_to(tmp_path)} is of other code: use another --runs-dir" in out
    assert "0 of 1" in out and "--resume" not in out


def test_a_script_edited_while_the_grid_runs(grid, tmp_path):
    process = grid("toy.py --total-timesteps 50", more=("--workers", 1), wait=False)
    wait_for(lambda: started(tmp_path))
    with open(tmp_path / "toy.py", "a") as file:
        file.write("# edited\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and len(started(tmp_path)) == 1
    assert "failed: A-v0 toy --total-timesteps 50 s2: the script was edited while the grid ran" in out


@pytest.mark.parametrize(
    ("mode", "tries", "code", "last"),
    [
        ("once", ["0", "5"], 0, None),
        ("always", ["0", "5"], 1, "exit code 1: error: it broke at 6"),
        ("nan", ["0"], 1, "exit code 1: error: loss is NaN"),
        ("input", ["0"], 1, "exit code 2: error: bad file"),
    ],
)
def test_failures(grid, tmp_path, mode, tries, code, last):
    """Tried again once from the checkpoint, but not after NaN or bad input; the other run goes on."""
    got = grid(f"toy.py --mode {mode}", "toy.py", seeds=(1,), more=("--workers", 1))
    assert got[0] == code, got
    steps = [line.split()[-1] for line in started(tmp_path)]
    assert steps == [*tries, "0"]
    assert "finished: A-v0 toy s1" in got[1]
    if last:
        report = got[1].split("failed: ")[-1]
        assert f"A-v0 toy --mode {mode} s1: {last}\n  log: runs/grid/A-v0__toy__s1__" in report
        again = re.search(r"  again: (.*)", report)[1]
        assert again.startswith(f"{sys.executable} toy.py --resume runs/A-v0-")
        assert "1 of 1" in got[1] and "0 of 1" in got[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_grid_goes_on(grid, tmp_path, number):
    """The runs get SIGTERM, save themselves and go on from there; Ctrl-C reaches them through the grid alone."""
    process = grid("toy.py --total-timesteps 100", seeds=(1, 2, 3), more=("--workers", 2), wait=False)
    wait_for(lambda: len(started(tmp_path)) == 2)
    os.killpg(process.pid, number)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "once more to leave at once" in out and out.count("stopped: ") == 2 and err == ""
    assert {meta["exit_reason"] for meta in metas(tmp_path)} == {"sigterm"} and len(started(tmp_path)) == 2
    code, out, _ = grid("toy.py --total-timesteps 100", seeds=(1, 2, 3), more=("--workers", 2))
    assert code == 0 and out.count("resumed: ") == 2 and out.count("started: ") == 1
    assert all(" from 0" not in line for line in started(tmp_path)[2:4]) and len(started(tmp_path)) == 5
    assert len(metas(tmp_path)) == 3
    assert "SIGINT reached" not in "".join(path.read_text() for path in tmp_path.glob("runs/grid/*.log"))


def test_a_second_signal_kills(grid, tmp_path):
    process = grid("toy.py --mode deaf --total-timesteps 3000", more=("--workers", 2), wait=False)
    wait_for(lambda: len(started(tmp_path)) == len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("started: ") and process.stdout.readline().startswith("started: ")
    assert process.stdout.readline().startswith("stopping all runs")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    logs = list(tmp_path.glob("runs/grid/*.log"))
    wait_for(lambda: not any(map(run_grid.lives, logs)), 5)  # no run is left
    assert len(logs) == 2
    process.communicate()


def test_a_run_that_fails_while_it_stops(grid, tmp_path):
    process = grid("toy.py --mode breaks --total-timesteps 3000", seeds=(1,), wait=False)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and out.count(" s1: exit code 1: error: the disk is full") == 2
    assert "tried again" not in out and "stopped: " not in out and len(started(tmp_path)) == 1


def test_a_stopped_grid_whose_reader_is_gone(grid, tmp_path):
    """In `run_grid.py ... | tee log` Ctrl-C takes tee, too; the exit code tells a shell loop to stop."""
    process = grid("toy.py --total-timesteps 100", seeds=(1,), wait=False)
    wait_for(lambda: started(tmp_path))
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_killed_grid_and_its_orphans(grid, tmp_path):
    """kill -9 of the grid leaves its runs alive: the next grid waits for them, and starts none of them again."""
    process = grid("toy.py --total-timesteps 300", more=("--workers", 2), wait=False)
    wait_for(lambda: len(started(tmp_path)) == 2)
    process.kill()
    process.communicate()
    code, out, _ = grid("toy.py --total-timesteps 300", more=("--dry-run",))
    assert code == 0 and out.count("runs elsewhere") == 2
    code, out, _ = grid("toy.py --total-timesteps 300", seeds=(1, 2, 3))
    assert code == 0 and len(started(tmp_path)) == 3 and "3 of 3" in out


def test_a_killed_run_is_tried_again(grid, tmp_path):
    process = grid("toy.py --total-timesteps 100", seeds=(1,), wait=False)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    (folder,) = tmp_path.glob("runs/A-v0-*")
    os.kill(int(folder.name.split("-")[-1]), signal.SIGKILL)  # the stand-in's folder is named by its process
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and " s1: signal 9: " in out
    assert len(started(tmp_path)) == 2 and " from 0" not in started(tmp_path)[1]


def test_two_grids_share_the_work(grid, tmp_path):
    seeds = (1, 2, 3, 4, 5)
    grids = [grid("toy.py", seeds=seeds, more=("--workers", 2), wait=False) for _ in range(2)]
    for process in grids:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "5 of 5" in out
    assert sorted(started(tmp_path)) == [f"A-v0 0 s{seed} from 0" for seed in seeds]


def test_a_run_started_by_hand_is_waited_for(grid, tmp_path):
    assert grid("toy.py", seeds=(1,))[0] == 0
    (folder,) = tmp_path.glob("runs/A-v0-*")
    meta = json.loads((folder / "meta.json").read_text()) | {"exit_reason": "running"}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "checkpoint.pt").write_text("7")
    with open(folder / "metrics.csv", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert grid("toy.py", seeds=(1,), more=("--dry-run",))[1].startswith("runs elsewhere  A-v0 toy s1, ")
        process = grid("toy.py", seeds=(1,), wait=False)
        assert process.stdout.readline() == "waiting for what lives elsewhere: A-v0 toy s1\n"
        assert len(started(tmp_path)) == 1
    process.communicate(timeout=60)
    assert process.returncode == 0 and started(tmp_path)[1] == "A-v0 0 s1 from 7"


BAD = [
    (("toy.py --what 1",), "toy.py --what 1: this script does not take these flags"),
    (("toy.py --n -1",), "toy.py --n -1: --n must be at least 0"),
    (("gone.py",), "there is no script gone.py"),
    (("toy.py --seed 3",), "the grid itself sets --seed"),
    (("toy.py --env_id=B-v0",), "the grid itself sets --env-id"),
    (("toy.py", "toy.py --n 0"), "the same run twice"),
    (("",), "there is no script"),
    (("toy.py --n '1",), "No closing quotation"),
    (("other.py",), "other.py: "),
]


@pytest.mark.parametrize(("commands", "message"), BAD)
def test_bad_input_stops_before_anything_starts(grid, tmp_path, commands, message):
    (tmp_path / "other.py").write_text("x = 1\n")
    code, out, err = grid("toy.py --n 5", *commands)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()


def test_bad_flags_of_the_grid(grid, tmp_path):
    for env_ids, more, message in [
        (("A-v0", "No-v0"), (), "there is no No-v0"),
        (("A-v0",), ("--workers", 0), "--workers must be at least 1"),
        (("A-v0",), ("--task", 2), "--task must be from 0 to 1"),
        (("A-v0",), ("--runs-dir", "toy.py"), "Not a directory: 'toy.py/grid'"),
    ]:
        code, _, err = grid("toy.py", env_ids=env_ids, more=more)
        assert code == 2 and message in err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_changes_nothing(grid, tmp_path):
    assert grid("toy.py", seeds=(1,))[0] == 0
    shutil.copytree(next(tmp_path.glob("runs/A-v0-*")), tmp_path / "runs" / "stopped")
    path = tmp_path / "runs" / "stopped" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"args": meta["args"] | {"seed": 2}, "exit_reason": "sigterm"}))
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    code, out, err = grid("toy.py", seeds=(1, 2, 3), more=("--dry-run",))
    assert (code, err) == (0, "")
    states = [re.split(r"  +", line) for line in out.splitlines()]
    assert states == [
        ["is finished", "A-v0 toy s1, 20 steps done"],
        ["goes on", "A-v0 toy s2, 20 steps done"],
        ["starts", "A-v0 toy s3, 0 steps done"],
    ]
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
    assert len(started(tmp_path)) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_full_workers_have_a_core_each(grid, tmp_path):
    assert grid("toy.py", seeds=(1,))[0] == 0
    assert grid("toy.py", seeds=(2,), more=("--workers", 1))[0] == 0
    assert grid("toy.py --threads 2", seeds=(3,))[0] == 0
    cores = [line.split(" on ")[1] for line in (tmp_path / "runs" / "started.txt").read_text().splitlines()]
    assert cores == ["1 cores", *[f"{len(os.sched_getaffinity(0))} cores"] * 2]


def test_a_real_script(rnm, grid, tmp_path):
    """Stopped and finished by repetition, the run is that of the script alone, bit for bit."""
    common = " ".join(flag for flag in flags(total_timesteps=900) if not flag.startswith("--env"))
    command = f"{ROOT}/rnm_td3_continuous.py {common} --n 1 --m 4 --no-track"
    options = {"env_ids": ("toy_envs:Reach-v0",), "seeds": (1,)}
    process = grid(command, **options, wait=False)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    code, out, err = grid(command, **options)
    assert code == 0 and "1 of 1" in out and "resumed: " in out, (out, err)
    (run,) = [path.parent for path in tmp_path.glob("runs/*/meta.json")]
    whole = rnm.train(rnm.Args(**read_meta(run)["args"] | {"runs_dir": str(tmp_path / "whole")}))
    assert read_meta(run)["exit_reason"] == "finished"
    assert_same_run(whole["run_dir"], run)


def test_the_readme_s_grid_and_sweep(rnm, tmp_path):
    text = (ROOT / "README.md").read_text()
    command = re.search(r"```bash\npython (run_grid.py .*?)```", text, re.DOTALL)[1]
    argv = [sys.executable, *shlex.split(command.replace("\\\n", " ")), "--runs-dir", str(tmp_path), "--dry-run"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("starts  ") == 30, result.stderr
    text = (ROOT / "docs/many_runs.md").read_text()
    sweep = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert (ROOT / sweep["program"]).is_file()
    choices = {name: choice.get("values") or [choice["value"]] for name, choice in sweep["parameters"].items()}
    args = rnm.parse_args([f"--{name}={values[-1]}" for name, values in choices.items()])  # as `wandb agent` types it
    assert (args.env_id, args.n, args.m, args.mask_update_interval) == ("Ant-v4", 1, 8, 10_000)


def test_a_signal_reaches_runs_that_are_just_starting(grid, tmp_path):
    """At whatever moment it comes, the grid ends in much less time than its runs would take."""
    for delay in (0.0, 0.05, 0.1, 0.3):
        more = ("--workers", 3, "--runs-dir", f"runs{delay}")
        process = grid("toy.py --total-timesteps 3000", seeds=(1, 2, 3), more=more, wait=False)
        wait_for((tmp_path / f"runs{delay}" / "grid").exists)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130, (out, err)
        assert not any(name in out.split("stopping all")[-1] for name in ("started: ", "resumed: "))


def test_a_flag_that_older_runs_do_not_have(grid, tmp_path):
    """They count as runs with the script's default, and as nothing else."""
    assert grid("toy.py", seeds=(1,))[0] == 0
    path = next(tmp_path.glob("runs/*/meta.json"))
    meta = json.loads(path.read_text())
    del meta["args"]["n"]
    path.write_text(json.dumps(meta))
    code, out, _ = grid("toy.py --n 0", "toy.py --n 1", "toy.py --n 2", seeds=(1,), more=("--dry-run",))
    assert code == 0 and [line.split("  ")[0] for line in out.splitlines()] == ["is finished", "starts", "starts"]


def test_a_script_with_a_module_beside_it(grid, tmp_path):
    folder = tmp_path / "fork"
    folder.mkdir()
    (folder / "helper.py").write_text("")
    (folder / "toy.py").write_text("import helper\n" + SCRIPT)
    code, out, err = grid("fork/toy.py", seeds=(1,))
    assert code == 0 and "1 of 1" in out, err


@pytest.mark.parametrize("change", ["broken", "gone"])
def test_a_script_that_breaks_while_the_grid_runs(grid, tmp_path, change):
    process = grid("toy.py --total-timesteps 50", more=("--workers", 1), wait=False)
    wait_for(lambda: started(tmp_path))
    if change == "broken":
        (tmp_path / "toy.py").write_text("def (")
    else:
        (tmp_path / "toy.py").unlink()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == "" and "finished: A-v0 toy --total-timesteps 50 s1" in out
    assert out.count("failed: A-v0 toy --total-timesteps 50 s2: ") == 2 and "0 of" not in out and "1 of 2" in out
