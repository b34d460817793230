"""Bring a grid of training runs (environments x configurations x seeds) to its end: locally, or as a SLURM job array.

  python run_grid.py --env-ids HalfCheetah-v5 Ant-v5 --seeds 1 2 3 4 5 --workers 2 \\
    --commands "dense_td3_continuous.py" "rnm_td3_continuous.py --n 2 --m 4" "rnm_td3_continuous.py --n 1 --m 8"

The same command again skips what is finished, resumes what stopped and starts what is missing, whatever happened in
between. A run is known by the script's file name and the arguments in meta.json; tracking, W&B's names, --keep-replay,
--checkpoint-interval, --capture-video and --threads do not make another run. Runs of other code, and a meta.json that
can't be read, stop the grid before it starts anything (of other code unless --accept-code). Each run has a log in
RUNS_DIR/grid, which is locked while the run lives: two grids share the work, and a killed grid's runs live on and are
waited for.

Exit codes: 0 all finished, 1 some failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import tyro
from tqdm import tqdm

FREE = set("runs_dir resume evaluate track wandb_project_name wandb_entity".split())  # these do not make another run
FREE |= set("checkpoint_interval capture_video keep_replay threads".split())
RESUMED = "track wandb_project_name wandb_entity checkpoint_interval capture_video keep_replay".split()  # as typed now
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
LOCK = fcntl.LOCK_EX | fcntl.LOCK_NB
STOP_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


@dataclass
class Args:
    commands: tuple[str, ...]
    """a training script with its own flags, in quotes, for each configuration"""
    env_ids: tuple[str, ...]
    """gymnasium ids of the environments"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds, integers >= 0; all runs of a seed come before those of the next"""
    workers: int = len(CORES)
    """runs at a time, >= 1, each with one thread and, if there are as many, a core of its own"""
    runs_dir: str = "runs"
    """folder of the runs"""
    name: str | None = None
    """name of the study, a tag of each run in Weights & Biases"""
    accept_code: bool = False
    """count finished runs of other code as finished, and resume stopped ones with today's"""
    dry_run: bool = False
    """only say what is finished, what would be resumed and what would start"""
    slurm_partition: str | None = None
    """make a SLURM job array of what is not finished, in this partition"""
    slurm_time: int = 240
    """minutes until SLURM stops a run, >= 2; its episode must end in the last tenth, or minute, then it is requeued"""
    task: int | None = None
    """number of the one run to bring to its end, from 0; the job array uses it"""


@dataclass
class Run:
    """One run of the grid: what it is, and what has become of it."""

    label: str  # of its configuration
    env_id: str
    seed: int
    script: str  # its path
    code: str  # hash of its code
    argv: list[str]  # starts it
    resume_argv: list[str]  # behind --resume FOLDER
    identity: dict  # the arguments that make it this run
    defaults: dict  # of the script, for runs that were made before it had all of its arguments
    total: int  # environment steps
    threads: int
    log: Path
    folder: Path | None = None
    state: str = "missing"  # or stopped (it has a checkpoint), finished
    tries: int = 0
    failure: str | None = None  # why it was given up
    process: subprocess.Popen | None = None
    stopped: bool = False  # it was told to
    bar: tqdm | None = None
    log_start: int = 0  # where this try begins in the log

    def __str__(self) -> str:
        return f"{self.env_id} {self.label} s{self.seed}"


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def load_script(path: str) -> ModuleType:
    """The training script as a module: its own parser, checks and hash say what a command means."""
    sys.path.insert(0, str(Path(path).resolve().parent))  # as for `python script.py`
    spec = importlib.util.spec_from_file_location(f"script_{hashlib.sha256(path.encode()).hexdigest()[:8]}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_env, module.code_hash = cache(module.make_env), cache(module.code_hash)
    return module


def hash_code(path: str) -> str:
    return load_script(path).code_hash(Path(path).read_text())


@cache
def parse(command: str) -> tuple[str, list[str], dict, dict]:
    """Script, flags, its arguments by these flags and by none."""
    script, *flags = shlex.split(command) or [""]
    own = {"--env-id", "--seed", "--runs-dir", "--resume", "--evaluate"}
    if taken := own & {word.split("=")[0].replace("_", "-") for word in flags}:
        raise ValueError(f"the grid itself sets {min(taken)}")
    if not Path(script).is_file():
        raise ValueError(f"there is no script {script}")
    args, defaults = (json.loads(json.dumps(vars(load_script(script).parse_args(x)))) for x in (flags, []))
    return script, flags, args, defaults


def shorten(commands: tuple[str, ...]) -> dict[str, str]:
    """A label for each command: its script, and the flags that not all have."""
    words = [re.split(r"\s+(?=--)", command.strip()) for command in commands]
    common = set.intersection(*(set(own[1:]) for own in words)) if len(words) > 1 else set()
    for own in words:
        own[0] = Path(own[0]).stem
    return {command: " ".join(w for w in own if w not in common) for command, own in zip(commands, words, strict=True)}


def make_run(command: str, label: str, env_id: str, seed: int, runs_dir: str) -> Run:
    """Check a command as its script would; errors end the program before anything starts."""
    try:
        script, flags, args, defaults = parse(command)
        code = hash_code(script)
        load_script(script).make_env(env_id).close()
    except SystemExit:
        fail(f"{command}: this script does not take these flags")
    except Exception as error:
        fail(f"{command}: {first_line(error)}")
    identity = {key: x for key, x in args.items() if key not in FREE} | {"env_id": env_id, "seed": seed}
    digest = hashlib.sha256(json.dumps([Path(script).name, identity], sort_keys=True).encode()).hexdigest()[:8]
    argv = [sys.executable, script, *flags, "--env-id", env_id, "--seed", str(seed), "--runs-dir", runs_dir]
    again = []
    for key, value in ((key.replace("_", "-"), args.get(key)) for key in RESUMED):
        if value is not None:
            again += [f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", str(value)]
    log = Path(runs_dir, "grid", f"{env_id.replace('/', '-')}__{Path(script).stem}__s{seed}__{digest}.log")
    sizes = args["total_timesteps"], args.get("threads", 1)
    return Run(label, env_id, seed, script, code, argv, again, identity, defaults, *sizes, log)


def make_grid(args: Args) -> list[Run]:
    if not (args.commands and args.env_ids and args.seeds) or min(args.seeds) < 0:
        fail("--commands, --env-ids and --seeds must each name one at least, seeds are at least 0")
    every, labels = itertools.product(args.seeds, args.env_ids, args.commands), shorten(args.commands)
    grid = [make_run(command, labels[command], env_id, seed, args.runs_dir) for seed, env_id, command in every]
    for run, other in itertools.combinations(grid, 2):
        if run.log == other.log:
            fail(f"the same run twice, by the script's file name, environment, seed and arguments: {run} and {other}")
    return grid


def read_runs(runs_dir: str, strict: bool = False) -> list[tuple[Path, dict]]:
    """Folders and metas. strict: what can't be read ends the program, for it may be a finished run."""
    found = []
    for path in sorted(Path(runs_dir).glob("*/meta.json")):
        try:
            meta = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            if strict:
                fail(f"{path} can't be read ({first_line(error)}): repair it, or move its folder away")
            continue
        if isinstance(meta, dict) and isinstance(meta.get("args"), dict):
            found.append((path.parent, meta))
    return found


def look(run: Run, found: list[tuple[Path, dict]]) -> dict:
    """Set the run's state and folder by its traces on disk; returns its meta. Own code, finished, newest come first."""
    same = []
    for folder, meta in found:
        saved, checkpoint, age = run.defaults | meta["args"], folder / "checkpoint.pt", 0.0
        if meta.get("script") == Path(run.script).name and run.identity.items() <= saved.items():
            with contextlib.suppress(FileNotFoundError):
                age = checkpoint.stat().st_mtime
            if (finished := meta.get("exit_reason") == "finished") or age:
                same.append((meta.get("code") == run.code, finished, age, folder, meta))
    nothing = False, False, 0.0, None, {}
    _, finished, _, run.folder, meta = max(same, key=lambda entry: entry[:3], default=nothing)
    run.state = "finished" if finished else "stopped" if run.folder else "missing"
    return meta


def is_foreign(run: Run, meta: dict, args: Args) -> bool:
    """Whether what `look` found is of other code, so that it does not count."""
    return bool(meta) and meta.get("code") != run.code and not args.accept_code


def lives(path: Path) -> bool:
    """Whether a process holds a lock on this file."""
    try:
        with open(path, "r+") as file:
            fcntl.flock(file, LOCK)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def steps_done(run: Run) -> int:
    """Environment steps by the last whole row of metrics.csv."""
    if run.folder is None and run.process:
        started = re.search(r"^(.+): started$", read_log(run), re.MULTILINE)
        run.folder = Path(started[1]) if started else None
    if run.state == "finished":
        return run.total
    with contextlib.suppress(Exception), open(run.folder / "metrics.csv", "rb") as file:  # there may be none yet
        file.seek(-min(4096, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return int(file.read().split(b"\n")[-2].split(b",")[0])
    return 0


def read_log(run: Run) -> str:
    with contextlib.suppress(OSError), open(run.log, errors="replace") as file:
        file.seek(run.log_start)
        return file.read()
    return ""


def start(run: Run, args: Args, cores: list[int]) -> bool:
    """Start or resume a run unless it lives somewhere else (then False) or turns out to be finished (then True)."""
    with open(run.log, "a") as log:
        try:
            fcntl.flock(log, LOCK)  # the run inherits it with its output, so that it holds it whatever becomes of us
        except BlockingIOError:
            return False
        if is_foreign(run, look(run, read_runs(args.runs_dir)), args):  # it lived elsewhere when the grid began
            raise ValueError(f"{run.folder} is of other code: use another --runs-dir, or --accept-code")
        if run.state == "finished":
            return True
        if run.folder and lives(run.folder / "metrics.csv"):
            return False
        if hash_code(run.script) != run.code:
            raise ValueError("the script was edited while the grid ran")
        command = [*run.argv[:2], "--resume", str(run.folder), *run.resume_argv] if run.folder else run.argv
        tags = {"WANDB_TAGS": ",".join(filter(None, (os.environ.get("WANDB_TAGS"), args.name)))}
        run.log_start, run.tries, env = log.tell(), run.tries + 1, os.environ | tags | {"OMP_NUM_THREADS": "1"}
        # a session of its own: Ctrl-C in the terminal reaches the grid alone, which passes it on
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        run.process = subprocess.Popen(command, env=env, **options)
        if cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(run.process.pid, cores)
    return True


class Pool:
    """Runs the grid: `workers` at a time, each tried twice, in order; those that live elsewhere are looked at again."""

    def __init__(self, grid: list[Run], args: Args):
        self.grid, self.args, self.stop_signal = grid, args, None
        self.waiting, self.slots = [run for run in grid if run.state != "finished"], [None] * args.workers
        self.terminal, self.bar, self.again, self.told = sys.stderr.isatty() and args.task is None, None, 0.0, ""

    def stop(self, number: int, _frame) -> None:
        """First signal: the loop tells every run to stop at its episode's end, with a checkpoint. Second one: now."""
        if self.stop_signal:
            self.kill(filter(None, self.slots), signal.SIGKILL)
            os._exit(STOP_CODES[number])
        self.stop_signal = number

    def kill(self, runs: Iterable[Run], number: int) -> None:
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, number)
            run.stopped = True

    def say(self, message: str) -> None:
        try:
            tqdm.write(message)
            sys.stdout.flush()
        except OSError:  # whoever reads this is gone; what is left unwritten would change the exit code
            sys.stdout = open(os.devnull, "w")

    def run(self) -> None:
        for number in STOP_CODES:
            signal.signal(number, self.stop)
        if self.terminal:
            total, done = sum(run.total for run in self.grid), sum(map(steps_done, self.grid))
            self.bar = tqdm(total=total, initial=done, unit="step", desc="grid", dynamic_ncols=True, smoothing=0.02)
        while any(self.slots) or (self.waiting and not self.stop_signal):
            for slot, run in enumerate(self.slots):
                if run and run.process.poll() is not None:
                    self.settle(slot)
                if self.slots[slot] is None:
                    self.fill(slot)
            if self.stop_signal and (untold := [run for run in self.slots if run and not run.stopped]):
                self.say("stopping all runs at the end of their episodes; once more to leave at once")
                self.kill(untold, signal.SIGTERM)
            if self.terminal:
                self.draw()
            elif self.args.task is not None and self.waiting and not any(self.slots):
                break  # it lives elsewhere: a job of SLURM does not wait for it
            time.sleep(0.2)
        if self.bar is not None:
            self.bar.close()

    def fill(self, slot: int) -> None:
        """Start the first waiting run that nobody else runs."""
        own = [CORES[slot]] if len(self.slots) == len(CORES) else []  # with fewer workers, others want cores, too
        for run in list(self.waiting):
            if self.stop_signal or time.monotonic() < self.again:
                return
            try:
                if not start(run, self.args, own if run.threads == 1 else []):
                    continue
            except (OSError, SyntaxError, ValueError) as error:
                self.give_up(run, first_line(error))
            self.waiting.remove(run)
            if run.process is None:  # finished elsewhere in the meantime, or given up
                continue
            self.slots[slot] = run
            if self.terminal:
                options = {"desc": str(run)[:40], "position": slot + 1, "leave": False, "dynamic_ncols": True}
                run.bar = tqdm(total=run.total, initial=steps_done(run), unit="step", **options)
            else:
                self.say(f"{'resumed' if run.folder else 'started'}: {run}")
            return
        names = ", ".join(map(str, self.waiting))
        if names not in ("", self.told) and not any(self.slots):
            self.told = names
            self.say(f"waiting for what lives elsewhere: {names}")
        self.again = time.monotonic() + 2

    def give_up(self, run: Run, why: str) -> None:
        run.failure = why
        self.say(f"failed: {run}: {why}")

    def settle(self, slot: int) -> None:
        """A run has ended: finished, stopped with the grid, to be tried again, or failed."""
        run, self.slots[slot] = self.slots[slot], None
        code, run.process = run.process.returncode, None
        if run.bar is not None:
            run.bar.close()
        meta, lines = look(run, read_runs(self.args.runs_dir)), re.split(r"[\r\n]+", read_log(run).strip())
        why = f"{f'signal {-code}' if code < 0 else f'exit code {code}'}: {lines[-1].strip()}"
        if run.state == "finished":
            if not self.terminal:
                self.say(f"finished: {run}, final score {meta.get('final_score')!s:.8}")
        elif run.stopped and code in (130, 143, -signal.SIGTERM):
            self.say(f"stopped: {run}")
        elif run.tries < 2 and code != 2 and meta.get("exit_reason") != "nan" and not self.stop_signal:
            self.say(f"failed, tried again: {run}: {why}")
            self.waiting.insert(0, run)
        else:
            self.give_up(run, why)

    def draw(self) -> None:
        for run in filter(None, self.slots):
            run.bar.n = steps_done(run)
            run.bar.refresh()
        self.bar.n = sum(map(steps_done, self.grid))
        ended = sum(run.state == "finished" for run in self.grid)
        self.bar.set_postfix_str(f"{ended} of {len(self.grid)} runs")


def submit(grid: list[Run], args: Args) -> int:
    """A job array whose task i brings run i of this grid to its end. A task near its time limit is requeued."""
    tasks = ",".join(str(i) for i, run in enumerate(grid) if run.state != "finished")
    words = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    options = f"--parsable --array={tasks}%{args.workers} --time={args.slurm_time} --requeue".split()
    options += [f"--signal=B:USR1@{max(60, 6 * args.slurm_time)}"]  # seconds before the end, for the episode's end
    options += ["--open-mode=append", f"--partition={args.slurm_partition}", f"--job-name={args.name or 'grid'}"]
    options += [f"--output={args.runs_dir}/grid/slurm-%A_%a.log", f"--cpus-per-task={max(run.threads for run in grid)}"]
    script = f"#!/bin/sh\nexec {shlex.join(words)} --task $SLURM_ARRAY_TASK_ID\n"
    result = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)
    if result.returncode:
        fail(f"sbatch: {result.stderr.strip()}")
    where = f"see `squeue --me`, logs are in {args.runs_dir}/grid"
    print(f"job {result.stdout.strip()}: {tasks.count(',') + 1} runs; {where}")
    return 0


def report(grid: list[Run], metas: list[dict]) -> str:
    """A row for each configuration and environment, the failures, and how to draw the rest."""
    rows, ended = [["configuration", "environment", "finished", "score ± std", "minutes"]], {}
    for run, meta in zip(grid, metas, strict=True):
        ended.setdefault((run.label, run.env_id), []).append(meta if run.state == "finished" else None)
    for (label, env_id), all_metas in ended.items():
        own = list(filter(None, all_metas))
        scores, seconds = ([m[key] for m in own if m.get(key) is not None] for key in ("final_score", "wall_time_s"))
        spread = f" ± {statistics.stdev(scores):,.1f}" if len(scores) > 1 else ""
        score = f"{statistics.fmean(scores):,.1f}{spread}" if scores else ""
        minutes = f"{statistics.fmean(seconds) / 60:,.1f}" if seconds else ""
        rows.append([label, env_id, f"{len(own)} of {len(all_metas)}", score, minutes])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for run in grid:
        if run.failure and run.state != "finished":
            again = [*run.argv[:2], "--resume", str(run.folder)] if run.folder else run.argv
            lines.append(f"failed: {run}: {run.failure}\n  log: {run.log}\n  again: {shlex.join(again)}")
    return "\n".join([*lines, f"figures: python sad_analysis.py {shlex.quote(str(grid[0].log.parents[1]))}"])


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if args.workers < 1 or args.slurm_time < 2:
        fail("--workers must be at least 1, --slurm-time at least 2")
    grid = make_grid(args)
    if args.task is not None and not 0 <= args.task < len(grid):
        fail(f"--task must be from 0 to {len(grid) - 1}, not {args.task}")
    found = read_runs(args.runs_dir, strict=True)
    if other := [run for run in grid if is_foreign(run, look(run, found), args)]:
        fail(f"{len(other)} runs are of other code, as {other[0].folder}: use another --runs-dir, or --accept-code")
    if args.dry_run:
        for run in grid:
            states = {"missing": "starts", "stopped": "goes on", "finished": "is finished"}
            alive = lives(run.log) or (run.folder is not None and lives(run.folder / "metrics.csv"))
            print(f"{'runs elsewhere' if alive else states[run.state]:<14}  {run}, {steps_done(run)} steps done")
        return 0
    grid = grid if args.task is None else [grid[args.task]]
    Path(args.runs_dir, "grid").mkdir(parents=True, exist_ok=True)
    if args.slurm_partition and args.task is None and any(run.state != "finished" for run in grid):
        return submit(grid, args)
    pool = Pool(grid, args)
    pool.run()
    found = read_runs(args.runs_dir)
    metas = [look(run, found) for run in grid]  # others may have finished some
    for run, meta in zip(grid, metas, strict=True):
        if is_foreign(run, meta, args):
            run.state, run.folder = "missing", None
    if args.task is None:
        pool.say(report(grid, metas))
    if all(run.state == "finished" for run in grid):
        return 0
    if pool.stop_signal == signal.SIGUSR1 and args.task is not None:  # SLURM's time limit; the run has saved itself
        subprocess.run(["scontrol", "requeue", "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ)])
    return STOP_CODES[pool.stop_signal] if pool.stop_signal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:  # a folder that can't be written, no sbatch
        fail(first_line(error))
    except KeyboardInterrupt:  # before anything ran
        sys.exit(130)
