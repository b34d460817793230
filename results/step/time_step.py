"""Where the time of a training step goes: `python results/step/time_step.py` prints the table of README.md in minutes.

Each script trains as ever, on one core, while a clock runs for one part at a time: a part's time is without that of the
parts which it calls. Configurations take turns; numbers are medians of their runs. Leave the machine alone meanwhile.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import dense_td3_continuous as dense  # noqa: E402
import rlx2_td3_continuous as rlx2  # noqa: E402
import rnm_td3_continuous as rnm  # noqa: E402

CONFIGURATIONS = {
    "dense": (dense, {}),
    "2:4": (rnm, {"n": 2, "m": 4}),
    "1:4": (rnm, {"n": 1, "m": 4}),
    "1:8": (rnm, {"n": 1, "m": 8}),
    "RLx2 96/88": (rlx2, {"actor_sparsity": 0.96, "critic_sparsity": 0.88, "delay_nstep": 0}),
}
PARTS = {  # name in a script -> the part of a step that it is; methods, if these of what it makes are
    "call": ("sparse products in C", []),
    "update_critics": ("losses, autograd, the rest of the networks", []),
    "update_actor": ("losses, autograd, the rest of the networks", []),
    "make_adam": ("Adam", ["step", "zero_grad"]),
    "update_targets": ("Polyak averages", []),
    "refresh_masks": ("mask updates", []),
    "act": ("acting, without its products in C", []),
    "make_env": ("environment", ["step", "reset"]),
    "ReplayBuffer": ("replay: adding, sampling", ["add", "sample"]),
}
REST = "the loop, checks, logging"


class Clock:
    """Seconds by part since it was made; one part runs at a time."""

    def __init__(self):
        parts = [part for part, _ in PARTS.values()]
        self.part, self.since, self.seconds = REST, time.perf_counter(), dict.fromkeys([*parts, REST], 0.0)

    def switch(self, part: str) -> str:
        """From now on this part runs; returns the one that ran."""
        before, now = self.part, time.perf_counter()
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before

    def timed(self, function, part: str, methods: list[str]):
        """The function, or these methods of what it makes, timed as this part."""

        def run(*args, **options):
            before = self.switch(part)
            try:
                return function(*args, **options)
            finally:
                self.switch(before)

        def make(*args, **options):
            thing = function(*args, **options)
            vars(thing).update({name: self.timed(getattr(thing, name), part, []) for name in methods})
            return thing

        return make if methods else run


def measure(script, steps: int, warm: int = 1000, **settings) -> dict[str, float]:
    """Microseconds by part of one of `steps` steps with an update; before them come `warm` without and `warm` with."""
    clock, marks, add, total = Clock(), [], script.ReplayBuffer.add, 2 * warm + steps + 1

    def add_and_mark(rb, **transition):
        if rb.added in (2 * warm, 2 * warm + steps):
            clock.switch(clock.part)
            marks.append(dict(clock.seconds))
        add(rb, **transition)

    settings |= {"total_timesteps": total, "learning_starts": warm, "eval_interval": total, "eval_episodes": 1}
    timed = {name: clock.timed(getattr(script, name), *how) for name, how in PARTS.items() if hasattr(script, name)}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(script.ReplayBuffer, "add", add_and_mark),
        mock.patch.multiple(script, hardware_report=mock.DEFAULT, **timed),
    ):
        script.train(script.Args(**settings, track=False, runs_dir=folder))
    return {part: 1e6 * (marks[1][part] - marks[0][part]) / steps for part in clock.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="Ant-v4", help="gymnasium id")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run that count, >= 1")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each configuration, >= 1")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found = {label: [] for label in CONFIGURATIONS}
    for _ in range(args.repetitions):
        for label, (script, settings) in CONFIGURATIONS.items():
            found[label].append(measure(script, args.steps, env_id=args.env_id, **settings))
    rows = {part: [statistics.median(run[part] for run in runs) for runs in found.values()] for part in found["1:8"][0]}
    rows["a step"] = [statistics.median(sum(run.values()) for run in runs) for runs in found.values()]
    print(f"\n| microseconds a step | {' | '.join(found)} |\n| --- |{' ---: |' * len(found)}")
    for part, values in rows.items():
        print(f"| {part} | {' | '.join(f'{value:,.0f}' if value else '' for value in values)} |")


if __name__ == "__main__":
    main()
