"""Does your fork hold what its original holds? A few short runs of a training script, compared with each other.

  python check_fork.py my_fork.py --env-id Ant-v4 --n 1 --m 8        the script and, if you like, its flags

  repeats    the same seed gives the same run, also if it is evaluated and saved at other times
  resumes    a run that was stopped half-way and goes on in a new process ends as one that was not
  computes   C kernels and torch give the same losses, up to rounding, after 30 updates and some changes of masks
  keeps      --evaluate returns with the saved policy what the run's own last evaluation returned
  trains     which tensors of model.pt stay as they are: right if you froze them

Runs have 2,500 steps and small networks, unless your flags say otherwise: it takes some minutes. A fork can pass and
still be wrong: what it does after these steps is not seen (bring it forward by flags), and whether your loss is the one
that you mean, no comparison can tell. Exit codes: 0 all alike, 1 not, 2 a run failed. What is not alike keeps its runs,
and a line says where. Remedies are in the README's "Forking it".
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

SHORT = {"total_timesteps": 2500, "learning_starts": 400, "eval_interval": 1000, "checkpoint_interval": 1000}
SHORT |= {"eval_episodes": 2, "mask_update_interval": 100, "delay_nstep": 800, "diagnostics_interval": 1000}
SHORT |= {"buffer_check_interval": 100, "hidden_dim": 64, "actor_hidden_dim": 32, "critic_hidden_dim": 64}
OTHERWISE = {"eval_interval": 300, "checkpoint_interval": 200, "diagnostics_interval": 300}  # must not matter
CLOCKS = "charts/SPS", "charts/update_ms", "charts/wall_time_s", "charts/cpu_time_s"
ACTION = "action_scale", "action_bias"  # constants
BRIEF = {"total_timesteps": 1000, "learning_starts": 970, "mask_update_interval": 10, "delay_nstep": 15}
ROUNDING = 1e-4  # largest relative difference of a loss between C and torch


class Failure(Exception):
    """A run that did not end as it should: its last words."""


def known(script: Path, flags: dict) -> list[str]:
    """--key=value for what is in the script's Args, or so named there."""
    fields = re.findall(r"^    (\w+): ", script.read_text(), re.MULTILINE)
    if "total_timesteps" not in fields:
        raise Failure(f"{script} has no field total_timesteps: is it a training script?")
    return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items() if key in fields]


def call(command: list[str], log: Path, stop: Path | None = None) -> str:
    """What the command prints; `stop`: the folder of its run, which SIGTERM ends half-way."""
    environment = os.environ | {"WANDB_MODE": "disabled"}
    with open(log, "w+") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while stop and process.poll() is None and not half_way(stop):
                time.sleep(0.05)
            if stop:
                process.send_signal(signal.SIGTERM)
            code = process.wait()
        finally:
            process.kill()
        file.seek(0)
        text = file.read()
    if code == 0 and stop:
        raise Failure("it ended before it could be stopped half-way: give a larger --total-timesteps")
    if code != (143 if stop else 0):
        raise Failure("\n".join([" ".join(command), *text.strip().splitlines()[-12:]]))
    return text


def half_way(runs: Path) -> bool:
    for path in runs.glob("*/metrics.csv"):
        steps = re.findall(r"^(\d+),.*\n", path.read_text(), re.MULTILINE)
        return bool(steps) and int(steps[-1]) >= read_meta(path.parent)["args"]["total_timesteps"] / 2
    return False


def read_meta(run: Path) -> dict:
    return json.loads((run / "meta.json").read_text())


def read_model(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "model.pt", weights_only=True)
    content["probe"] = dict(zip(("observations", "actions"), content["probe"], strict=True))
    return {f"{net}.{name}": tensor for net, state in content.items() for name, tensor in state.items()}


def read_rows(run: Path) -> pd.DataFrame:
    rows = pd.read_csv(run / "metrics.csv", index_col="global_step").drop(columns=list(CLOCKS), errors="ignore")
    return rows.groupby(level=0).last()  # a fork may log twice in a step


def difference(run: Path, other: Path) -> str:
    """Where two runs first differ, in what both logged, and how far their models are apart; empty if nowhere."""
    rows, others = read_rows(run).align(read_rows(other), join="inner")
    apart = (rows != others) & rows.notna() & others.notna()
    words = []
    if apart.any(axis=None):
        step, key = apart.stack().idxmax()
        words.append(f"first at step {step}, {key}: {rows.at[step, key]:.8g} and {others.at[step, key]:.8g}")
    model, models = read_model(run), read_model(other)
    changed = [name for name in model.keys() | models.keys() if not same(model.get(name), models.get(name))]
    if changed:
        words.append(f"{len(changed)} tensors of model.pt, such as {min(changed)}")
    return "; ".join(words)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def losses(run: Path) -> pd.Series:
    """The last that were logged."""
    rows = read_rows(run).filter(like="losses/").dropna(how="all")
    if rows.empty:
        raise Failure(f"{run} has no losses/ at step {BRIEF['total_timesteps']}")
    return rows.iloc[-1].dropna()


def check(script: Path, flags: list[str], folder: Path) -> bool:
    """Print what is alike and what is not; False if something is not. Raises Failure."""

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
        whole, again, (resumed, stopped), brief, plain = (x.result() for x in (whole, again, parts, brief, plain))
    finally:  # after a fault or Ctrl-C, which the runs get, too: start no more
        pool.shutdown(cancel_futures=True)

    before, after = read_model(stopped), read_model(whole)
    names = [name for name in after if not name.startswith("probe.") and name.split(".")[-1] not in ACTION]
    still = [name for name in names if same(before.get(name), after[name])]
    if still == names:
        raise Failure("nothing was trained: give a smaller --learning-starts or a larger --total-timesteps")
    found = {"repeats": difference(whole, again)}
    found["resumes"] = "can't be told before it repeats" if found["repeats"] else difference(whole, resumed)
    if read_meta(brief)["kernel"] == read_meta(plain)["kernel"]:
        print("computes   nothing to compare: torch computes it all")
    else:
        pair = pd.DataFrame({"nm": losses(brief), "torch": losses(plain)})
        apart = pair[~((pair.nm - pair.torch).abs() <= ROUNDING * pair.torch.abs() + 1e-6)]
        found["computes"] = "; ".join(f"{key}: {x.nm:.6g} in C, {x.torch:.6g} in torch" for key, x in apart.iterrows())
    found["keeps"] = ""
    for run in (whole, plain):
        own = "return {eval/episodic_return:.1f} ± {eval/episodic_return_std:.1f}".format(**read_rows(run).iloc[-1])
        try:
            said = call([str(script), f"--evaluate={run}"], folder / "evaluate.log")
            alike = run == whole or own in said  # it computes as --kernel torch does
        except Failure as failure:
            said, alike = str(failure), False
        if not alike:
            found["keeps"] = f"{said.strip().splitlines()[-1]}; the run itself had {own}"

    for name, fault in found.items():
        print(f"{name:10} {f'NOT ALIKE: {fault}' if fault else 'ok'}")
    print(f"trains     {'all but ' + ', '.join(still) if still else 'all tensors'}")
    return not any(found.values())


def main() -> int:
    script, flags = Path(sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if script.name in ("-h", "--help"):
        print(__doc__)
        return 0
    refused = [word for word in flags if re.match(r"-h$|--(help|resume|evaluate|runs.dir)\b", word)]
    if refused or not script.is_file():
        print(
            f"error: {refused or script}: a script, then flags of a new run; python check_fork.py -h", file=sys.stderr
        )
        return 2
    folder = Path(tempfile.mkdtemp(prefix="check_fork_"))
    try:
        alike = check(script, flags, folder)
    except (Failure, OSError) as failure:
        print(f"error: {failure}\nlogs: {folder}", file=sys.stderr)
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
