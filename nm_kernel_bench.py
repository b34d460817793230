"""How fast the training scripts are, end to end: environment steps per second, side by side with dense peers.

Each configuration runs as a process of its own on the same cores, all configurations in turns, repeated. The scripts
report charts/SPS and charts/update_ms in their metrics.csv; rows during warm-up and the first one after it don't
count. stable-baselines3's and sbx-rl's TD3 (JAX) are timed where they are installed, with the same networks, batch
and one update per step.

  python nm_kernel_bench.py --end-to-end
"""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gymnasium as gym
import torch
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    end_to_end: bool = True
    """time whole training runs"""
    env_id: str = "Ant-v4"
    """gymnasium id of the environment"""
    hidden_dim: int = 256
    """units in each of the two hidden layers, >= 1"""
    steps: int = 3000
    """environment steps with updates in each run, >= 2000; the first 1000 are not counted"""
    repetitions: int = 5
    """runs of each configuration, >= 1"""
    threads: int = 1
    """threads of each run and cores that it is pinned to, >= 1"""
    out: str = "results/end_to_end"
    """folder for results.json"""


# Trains a peer and prints [environment step, seconds] every 1000 steps as json.
PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
name, env_id, hidden, steps, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
import gymnasium as gym, torch
torch.set_num_threads(threads)
from stable_baselines3.common.callbacks import BaseCallback
if name == "sb3":
    from stable_baselines3 import TD3
else:
    from sbx import TD3
marks = []
class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps % 1000 == 0:
            marks.append([self.num_timesteps, time.perf_counter()])
        return True
TD3("MlpPolicy", gym.make(env_id, disable_env_checker=True), learning_rate=3e-4, batch_size=256, learning_starts=1000,
    train_freq=1, gradient_steps=1, policy_delay=2, buffer_size=100_000, policy_kwargs={"net_arch": [hidden, hidden]},
    ).learn(1000 + steps, callback=Clock())
print(json.dumps(marks))
"""


BF16 = """
import runpy, sys, torch
torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()  # a cache would keep the first weights for ever
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def configurations(args: Args) -> dict[str, tuple[list[str], int, int]]:
    """Label -> (command, threads of a run, runs at once). Of 256 units 0.336 have as many weights as 1:8 keeps."""
    common = [
        f"--env-id={args.env_id}", f"--total-timesteps={1000 + args.steps}", "--learning-starts=1000", "--no-track",
        "--eval-interval=1000000000", "--eval-episodes=1", "--buffer-size=100000",
    ]  # fmt: skip
    width, threads = f"--hidden-dim={args.hidden_dim}", args.threads
    rnm, dense = ([str(HERE / f"{name}_td3_continuous.py"), *common] for name in ("rnm", "dense"))
    narrow = round(args.hidden_dim * 0.336)
    found = {"dense": ([*dense, width], threads, 1)}
    if torch.backends.cpu.get_cpu_capability() == "AVX512" or platform.machine() != "x86_64":
        found["dense, bf16 autocast"] = (["-c", BF16, *dense, width], threads, 1)
    found[f"dense, width {narrow}"] = ([*dense, f"--hidden-dim={narrow}"], threads, 1)
    for n, m in ((2, 4), (1, 4), (1, 8)):
        found[f"{n}:{m}"] = ([*rnm, width, f"--n={n}", f"--m={m}"], threads, 1)
    sparse = [*rnm, width, "--n=1", "--m=8"]
    found["1:8, --kernel torch"] = ([*sparse, "--kernel=torch"], threads, 1)
    for label, name, module in (("SB3", "sb3", "stable_baselines3"), ("SBX (JAX)", "sbx", "sbx")):
        if importlib.util.find_spec(module):
            numbers = map(str, (args.hidden_dim, args.steps, threads))
            found[label] = (["-c", PEER, name, args.env_id, *numbers], threads, 1)
    if len(os.sched_getaffinity(0)) >= 2 * threads:
        found[f"1:8, {2 * threads} threads"] = (sparse, 2 * threads, 1)
        found["1:8, two runs at once"] = (sparse, threads, 2)
    return found


def run_once(command: list[str], threads: int, copies: int) -> tuple[float, float | None, float]:
    """Environment steps per second of all copies together, milliseconds per update or None, peak memory in MiB of one.

    Each copy has cores of its own. Raises RuntimeError if one fails.
    """
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "XLA_FLAGS": flags}
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs = []
        for copy in range(copies):
            folder, own = Path(scratch, str(copy)), cores[copy * threads :][:threads]
            folder.mkdir()
            output, errors = (stack.enter_context(open(folder / name, "w+")) for name in ("stdout", "stderr"))
            extra = [] if PEER in command else [f"--runs-dir={folder}", f"--threads={threads}"]
            process = subprocess.Popen(
                [sys.executable, *command, *extra], env=environment, stdout=output, stderr=errors,
                preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
            )  # fmt: skip
            stack.callback(process.kill)
            runs.append((process, folder, output, errors))
        rates, update_ms, memory = [], None, 0
        for process, folder, output, errors in runs:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)[-300:]} failed:\n{errors.read()[-2000:]}")
            memory = max(memory, usage.ru_maxrss / 1024)
            if PEER in command:
                output.seek(0)
                marks = json.loads(output.read().splitlines()[-1])
                found = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(marks) if b[0] > 2000]
            else:
                with open(next(folder.glob("*/metrics.csv"))) as file:
                    rows = [r for r in csv.DictReader(file) if r["charts/SPS"] and int(r["global_step"]) > 2000]
                found = [float(row["charts/SPS"]) for row in rows]
                update_ms = statistics.median(float(row["charts/update_ms"]) for row in rows)
            rates.append(statistics.median(found))
    return sum(rates), update_ms, memory


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if not args.end_to_end:
        print("error: --no-end-to-end leaves nothing to measure", file=sys.stderr)
        return 2
    if args.steps < 2000 or min(args.hidden_dim, args.repetitions, args.threads) < 1:
        least = "--steps must be at least 2000, --hidden-dim, --repetitions and --threads at least 1"
        print(f"error: {least}", file=sys.stderr)
        return 2
    if args.env_id not in gym.registry or args.threads > len(os.sched_getaffinity(0)):
        print(f"error: unknown --env-id {args.env_id}, or more --threads than cores", file=sys.stderr)
        return 2
    commands = configurations(args)
    results = {label: [] for label in commands}
    bar = tqdm(total=args.repetitions * len(commands), unit="run", disable=not sys.stderr.isatty())
    try:
        for _ in range(args.repetitions):
            for label, command in commands.items():
                results[label].append(run_once(*command))
                bar.update()
    except KeyboardInterrupt:
        print("stopped: what was measured follows", file=sys.stderr)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    bar.close()
    report(args, {label: runs for label, runs in results.items() if runs})
    return 0


def report(args: Args, results: dict[str, list[tuple]]) -> None:
    """Print medians, quartile ranges and ratios; write results.json with all conditions."""
    rates = {label: [rate for rate, *_ in runs] for label, runs in results.items()}
    median = {label: statistics.median(values) for label, values in rates.items()}
    cpu = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line for line in open("/proc/cpuinfo") if line.startswith("model name")).split(": ")[1].strip()
    versions = {}
    for name in ("torch", "gymnasium", "mujoco", "numpy", "stable_baselines3", "sbx-rl", "jax"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True)
    conditions = {
        "args": asdict(args), "cpu": cpu, "versions": versions, "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"), "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    print(f"{args.env_id}, hidden {args.hidden_dim}, batch 256, {args.threads} thread(s), {cpu}")
    print(f"medians and ranges of {min(map(len, rates.values()))} runs each, in turns")
    others = [label for label in ("dense", "SB3", "SBX (JAX)") if label in median]
    header = ["", "steps/s", "range", "ms/update", "peak MiB", *(f"x {label}" for label in others)]
    table = [header]
    for label, values in rates.items():
        update = [ms for _, ms, _ in results[label] if ms is not None]
        memory = statistics.median(mib for *_, mib in results[label])
        ratios = [f"{median[label] / median[other]:.2f}" for other in others]
        ms = f"{statistics.median(update):.2f}" if update else ""
        spread = f"{min(values):.0f}-{max(values):.0f}"
        table.append([label, f"{median[label]:.0f}", spread, ms, f"{memory:.0f}", *ratios])
    for row in table:
        print(f"{row[0]:22}" + "".join(f"{cell:>11}" for cell in row[1:]))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "rate_update_ms_peak_mib": results}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main())
