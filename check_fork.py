"""Does your fork hold what its original holds? A few short runs of a training script, compared with each other.

  python check_fork.py my_fork.py --env-id Ant-v4 --n 1 --m 8        the script and, if you like, its flags

  repeats    the same seed gives the same run, also if it is evaluated and saved at other times; another seed another
  resumes    a run that was stopped half-way and goes on in a new process leaves the same files as one that was not
  computes   C kernels and torch give the same losses, up to rounding, after 30 updates and some changes of masks
  keeps      --evaluate returns with the saved policy what the run's own last evaluation returned (if C kernels
             computed the run: that of the 30 updates which torch computed)
  trains     which tensors of model.pt stay as they are: right if you froze them

Runs have 2,500 steps and small networks, unless your flags say otherwise (30 updates and the times of `repeats` are
fixed): it takes some minutes. A fork can pass and still be wrong: what it does after these steps is not seen (bring it
forward by flags), and whether your loss is the one that you mean, no comparison can tell. What is not alike keeps its
runs, and a line says where. Remedies are in docs/forking.md. Exit codes: 0 all alike, 1 not, 2 a run or a comparison
failed, 130 stopped.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

SHORT = {"total_timesteps": 2500, "learning_starts": 399, "eval_interval": 1000, "checkpoint_interval": 1000}
SHORT |= {"eval_episodes": 2, "delay_nstep": 800, "diagnostics_interval": 1000, "buffer_check_interval": 100}
SHORT |= {"mask_update_interval": 70, "mask_end": 1}  # episodes of 200 or 1,000 steps end between two changes
SHORT |= {"buffer_min_size": 500, "hidden_dim": 64, "actor_hidden_dim": 32, "critic_hidden_dim": 64}
OTHERWISE = {"eval_interval": 300, "checkpoint_interval": 200, "diagnostics_interval": 300}  # must not matter
CLOCKS = "charts/SPS", "charts/update_ms", "charts/wall_time_s", "charts/cpu_time_s"
ACTION = "action_scale", "action_bias"  # constants
BRIEF = {"total_timesteps": 1000, "learning_starts": 970, "mask_update_interval": 10, "delay_nstep": 15, "seed": 4321}
OWN = {"meta.json", "metrics.csv", "checkpoint.pt", "model.pt"}  # files that hold clocks or are compared by content
STARTED = []  # processes
ROUNDING = 1e-4  # largest relative difference of a loss between C and torch


class Failure(Exception):
    """A run that did not end as it should: its last words."""


def known(script: Path, flags: dict) -> list[str]:
    """--key=value for what is in the script's Args, or so named there."""
    args = re.search(r"^class Args.*?(?=^\S)", script.read_text(), re.MULTILINE | re.DOTALL)
    fields = re.findall(r"^    (\w+): ", args[0] if args else "", re.MULTILINE)
    if "total_timesteps" not in fields:
        raise Failure(f"{script} has no field total_timesteps: is it a training script?")
    return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if key in fields]


def call(command: list[str], log: Path, stop: Path | None = None) -> str:
    """What the command prints; `stop`: the folder of its run, which SIGTERM ends half-way."""
    environment = os.environ | {"WANDB_MODE": "disabled"}
    with open(log, "w+") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
        STARTED.append(process)
        while stop and process.poll() is None and not half_way(stop):
            time.sleep(0.05)
        if stop:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        file.seek(0)
        text = file.read()
    if code == 0 and stop:
        raise Failure("it ended before it could be stopped half-way: give a larger --total-timesteps")
    if code != (143 if stop else 0):
        raise Failure("\n".join([" ".join(command), *text.strip().splitlines()[-12:]]))
    return text


def half_way(runs: Path) -> bool:
    """A little earlier: a run stops at its episode's end, which may be 1,000 steps away."""
    for path in runs.glob("*/metrics.csv"):
        steps = re.findall(r"^(\d+),.*\n", path.read_text(), re.MULTILINE)
        return bool(steps) and int(steps[-1]) >= read_meta(path.parent)["args"]["total_timesteps"] * 0.4
    return False


def read_meta(run: Path) -> dict:
    return json.loads((run / "meta.json").read_text())


def read_model(run: Path) -> dict:
    """What model.pt holds, by '<net>.<name>', or by its name alone if it is no network."""
    content, found = torch.load(run / "model.pt", weights_only=True), {}
    for net, state in content.items():
        found |= {f"{net}.{name}": x for name, x in state.items()} if isinstance(state, dict) else {net: state}
    return found


def read_rows(run: Path) -> pd.DataFrame:
    rows = pd.read_csv(run / "metrics.csv", index_col="global_step").drop(columns=list(CLOCKS), errors="ignore")
    return rows.groupby(level=0).last()  # a fork may log twice in a step


def difference(run: Path, other: Path, join: str = "inner") -> str:
    """Where two runs first differ and how far their models are apart; empty if nowhere. inner: in what both logged;
    outer: in what one logged, and in files of their own."""
    rows, others = read_rows(run).align(read_rows(other), join=join)
    apart = (rows != others) & (rows.notna() | others.notna())
    if join == "inner":
        apart &= rows.notna() & others.notna()
    words = []
    if apart.any(axis=None):
        step, key = apart.stack().idxmax()
        words.append(f"first at step {step}, {key}: {rows.at[step, key]} and {others.at[step, key]}")
    model, models = read_model(run), read_model(other)
    changed = [name for name in model.keys() | models.keys() if not same(model.get(name), models.get(name))]
    if changed:
        words.append(f"{len(changed)} tensors of model.pt, such as {min(changed)}")
    if join == "outer":
        pair = [{path.name: path.read_bytes() for path in x.iterdir() if path.is_file()} for x in (run, other)]
        names = sorted((pair[0].keys() | pair[1].keys()) - OWN)
        words += [name for name in names if pair[0].get(name) != pair[1].get(name)]
    return "; ".join(words)


def same(a, b) -> bool:
    """Of what model.pt holds: tensors, numbers, strings, lists and tuples of them."""
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is not None and a == b


def losses(run: Path) -> pd.Series:
    """The last that were logged."""
    rows = read_rows(run).filter(like="losses/").dropna(how="all")
    return rows.iloc[-1].dropna() if len(rows) else pd.Series(dtype=float)


def make_runs(script: Path, flags: list[str], folder: Path) -> tuple[Path, ...]:
    """whole, again, resumed, as it was when it stopped, brief, brief in torch. Raises Failure."""

    def train(name: str, *more: str) -> Path:
        runs = folder / name
        command = [str(script), *known(script, SHORT), *flags, *more, f"--runs-dir={runs}"]
        call(command, folder / f"{name}.log", runs if name == "resumed" else None)
        return next(runs.glob("*/meta.json")).parent

    def resume() -> tuple[Path, Path]:
        run = train("resumed")
        stopped = shutil.copytree(run, folder / "stopped")
        call([str(script), f"--resume={run}"], folder / "resume.log")
        return run, stopped

    print(f"five short runs, two at a time, in {folder}", flush=True)
    pool = ThreadPoolExecutor(2)
    try:
        whole = pool.submit(train, "whole")
        again = pool.submit(train, "again", *known(script, OTHERWISE))
        parts = pool.submit(resume)
        brief = pool.submit(train, "brief", *known(script, BRIEF))
        plain = pool.submit(train, "torch", *known(script, BRIEF | {"kernel": "torch"}))
        return whole.result(), again.result(), *parts.result(), brief.result(), plain.result()
    finally:  # after a fault or a signal: start no more, end what runs
        pool.shutdown(wait=False, cancel_futures=True)
        for process in STARTED:
            process.kill()
        pool.shutdown()


def check(script: Path, flags: list[str], folder: Path) -> bool:
    """Print what is alike and what is not; False if something is not. Raises Failure."""
    whole, again, resumed, stopped, brief, plain = make_runs(script, flags, folder)
    before, after = read_model(stopped), read_model(whole)
    names = [name for name, x in after.items() if torch.is_tensor(x) and name.split(".")[-1] not in ACTION]
    still = [name for name in names if same(before.get(name), after[name])]
    if still == names:
        raise Failure("nothing was trained: give a smaller --learning-starts or a larger --total-timesteps")
    found = {"repeats": difference(whole, again), "resumes": difference(whole, resumed, "outer")}
    first = read_rows(whole).iloc[0]
    if first.equals(read_rows(brief).iloc[0]) and first["eval/episodic_return_std"] > 0:  # 0 may be all one can score
        alike = f"--seed {BRIEF['seed']} begins as --seed {read_meta(whole)['args']['seed']} does"
        found["repeats"] = "; ".join(filter(None, (found["repeats"], alike)))
    kernels, pair = [read_meta(run)["kernel"] for run in (brief, plain)], {"nm": losses(brief), "torch": losses(plain)}
    if kernels[0] == kernels[1] or any(x.empty for x in pair.values()):
        print(f"computes   nothing to compare: kernels {' and '.join(kernels)}, {len(pair['nm'])} losses logged")
    else:
        pair = pd.DataFrame(pair)
        apart = pair[~((pair.nm - pair.torch).abs() <= ROUNDING * pair.torch.abs() + 1e-6)]
        found["computes"] = "; ".join(f"{key}: {x.nm:.6g} in C, {x.torch:.6g} in torch" for key, x in apart.iterrows())
    found["keeps"] = ""
    for run in (whole, plain):
        own = "return {eval/episodic_return:.1f} ± {eval/episodic_return_std:.1f}".format(**read_rows(run).iloc[-1])
        try:
            said = call([str(script), f"--evaluate={run}"], folder / "evaluate.log")
            alike = own in said or read_meta(run)["kernel"] == "nm"  # --evaluate computes as --kernel torch does
        except Failure as failure:
            said, alike = str(failure), False
        if not alike:
            found["keeps"] = f"{said.strip().splitlines()[-1]}; the run itself had {own}"

    for line in dict.fromkeys(re.findall(r"^warning: .*", (folder / "whole.log").read_text(), re.MULTILINE)):
        print(line)  # such as masks that never change: what they would do was not seen
    for name, fault in found.items():
        print(f"{name:10} {f'NOT ALIKE: {fault}' if fault else 'ok'}")
    print(f"trains     {'all but ' + ', '.join(still) if still else 'all tensors'}")
    return not any(found.values())


def main() -> int:
    script, flags = Path(sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if script.name in ("-h", "--help"):
        print(__doc__)
        return 0
    refused = [word for word in flags if re.match(r"-h$|--(help|resume|evaluate|runs.dir)(=|$)", word)]
    if refused or not script.is_file():
        print(
            f"error: {refused or script}: a script, then flags of a new run; python check_fork.py -h", file=sys.stderr
        )
        return 2
    try:
        folder = Path(tempfile.mkdtemp(prefix="check_fork_"))
    except OSError as error:
        print(f"error: no temporary folder: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        alike = check(script, flags, folder)
    except Exception as failure:  # whatever a fork makes the comparison do: 1 would mean that it told something
        kind = "" if isinstance(failure, Failure) else f"{type(failure).__name__}: "
        print(f"error: {kind}{failure}\nlogs: {folder}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        return 130
    if alike:
        shutil.rmtree(folder)
    else:
        print(f"runs: {folder}")
    return int(not alike)


if __name__ == "__main__":
    sys.exit(main())
