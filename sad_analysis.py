"""What the masks of RNM-TD3 did during training, and what it had to do with the return: figures and tables from runs.

Reads the folders that rnm_td3_continuous.py and dense_td3_continuous.py leave behind; needs no account:
  python sad_analysis.py runs/                       run folders, folders of them, or globs -> analysis/
  python sad_analysis.py --wandb-entity E --wandb-project-name P      the same for runs in the cloud

  SAD_{i:j} = |E_i - E_j|_0, Sparse Architecture Divergence (arXiv 2102.04010)              -> sad_metrics, pairwise_sad
  settled SAD: from the mask a tenth of training (or the longest K) before the end to the final one -> settled_sad
  settled: from when on the mask stays within 10 % of the final one                         -> settled_step
  correlation of settled SAD and score: of ranks within configurations, pooled             -> correlation
  IQM, stratified bootstrap, probability of improvement (Agarwal et al., arXiv 2108.13264)  -> iqm, interval, better
Only finished runs count, and they are compared only if environment, steps, physics and hyper-parameters agree.
"""

import glob
import io
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from tqdm import tqdm


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders, folders that hold runs, or globs of them"""
    out: str = "analysis"
    """folder for figures and tables"""
    wandb_entity: str | None = None
    """user or team whose runs in Weights & Biases to read (with --wandb-project-name), and to write to"""
    wandb_project_name: str | None = None
    """project in Weights & Biases whose runs to read; the analysis is written there, else to nm-sparse-rl"""
    resamples: int = 2000
    """bootstrap resamples for each interval, >= 100"""
    thin: str | None = None
    """folder to copy the runs to, thinned: rows of evaluations and of 60 refreshes, 6 masks, no weights"""
    track: bool = True
    """mirror figures and tables to Weights & Biases (offline when not logged in)"""


class UserError(Exception):
    """Something that the user typed or pointed to is wrong: one line, exit code 2."""


class BadRun(Exception):
    """Why a run can't be used."""


# --- shared: projection ---
def project(W: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """P_{N:M}: the mask E [out, in] (bool) of the n largest magnitudes in each m consecutive weights of a row of W."""
    magnitude = F.pad(W.abs(), (0, -W.shape[1] % m), value=-1.0)  # fill a ragged last group with what never wins (D1)
    order = magnitude.view(len(W), -1, m).argsort(dim=2, descending=True, stable=True)  # [out, groups, m]
    E = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
    return E.view(len(W), -1)[:, : W.shape[1]].contiguous()


# --- end shared ---


# --- shared: sad ---
def sad_metrics(first: dict, previous: dict, current: dict) -> dict[str, float]:
    """SAD_{i:j} = |E_i - E_j|_0 (Zhou et al., SR-STE) over twice the active weights; masks by '<net>.<layer>'."""
    row = {}
    for key, reference in (("sad", previous), ("sad_initial", first)):
        for net in ("actor", "qf1", "qf2"):
            count = {name: int((E != reference[name]).sum()) for name, E in current.items() if name.startswith(net)}
            active = {name: int(current[name].sum()) for name in count}
            row[f"{key}/{net}"] = sum(count.values()) / (2 * sum(active.values()))
            row |= {f"{key}/{name.replace('.', '/')}": count[name] / (2 * active[name]) for name in count}
            if key == "sad":
                row[f"sad_count/{net}"] = sum(count.values())
    return row


# --- end shared ---


# --- shared: score ---
def final_score(evaluations: list[list]) -> float:
    """Mean of the last 10 evaluations [step, return], of fewer than 20 the last half; none is from step 0."""
    last = min(10, (len(evaluations) + 1) // 2)
    return statistics.fmean(score for _, score in evaluations[-last:])


# --- end shared ---


NETS = ("actor", "qf1", "qf2")  # targets share their masks
METHOD = ("n", "m", "mask_update_interval", "sparse_head", "hidden_dim")  # what tells configurations apart
DEFAULTS = {"mask_update_interval": 1000, "sparse_head": False, "hidden_dim": 256}  # not named in a label
# Of no consequence for the numbers. All other arguments must agree between runs that are compared.
NEUTRAL = """exp_name seed runs_dir track wandb_project_name wandb_entity capture_video resume evaluate keep_replay
    checkpoint_interval kernel threads device""".split()


@dataclass
class Topology:
    """What is kept of a run's masks; S snapshots."""

    steps: np.ndarray  # [S] environment steps
    pairwise: dict[str, np.ndarray]  # by network [S, S]: SAD_{i:j} over twice the active weights
    ever: dict[str, np.ndarray]  # by network [S]: share of weights active in a snapshot so far (at least)
    age: dict[str, np.ndarray]  # by network [2, S]: active weights' mean age in steps, upper bound and lower estimate


@dataclass
class Run:
    name: str
    folder: Path
    meta: dict
    metrics: pd.DataFrame  # indexed by global_step
    topology: Topology | None
    label: str = ""  # configuration, such as "1:8, K = 100"

    @property
    def args(self) -> dict:
        return self.meta["args"]

    @property
    def pattern(self) -> str:
        return "dense" if self.meta["n"] is None else f"{self.meta['n']}:{self.meta['m']}"

    @property
    def score(self) -> float:
        return self.meta["final_score"]

    @property
    def setting(self) -> tuple:
        """What must agree between runs for them to be compared."""
        rest = {k: v for k, v in self.args.items() if k not in (*NEUTRAL, *METHOD)}
        return (*rest.items(), ("mujoco", ".".join(self.meta["versions"]["mujoco"].split(".")[:2])))

    def curve(self, key: str) -> pd.Series:
        """A logged key over environment steps, where it was logged."""
        return self.metrics[key].dropna() if key in self.metrics else pd.Series(dtype=float)

    def settled_sad(self, window: float) -> float:
        """SAD from the mask `window` steps before the end to the final one, mean of the networks; NaN without masks.

        A window at least as long as the longest K compared: a mask that is taken seldom is old when the window begins.
        """
        if self.topology is None or self.args["mask_update_interval"] > window:
            return math.nan
        start = near(self.topology.steps, self.args["total_timesteps"] - window)
        return statistics.fmean(float(pairwise[start, -1]) for pairwise in self.topology.pairwise.values())


def near(steps: np.ndarray, step: float) -> int:
    """Index of the last snapshot at or before a step."""
    return max(0, int(np.searchsorted(steps, step, side="right")) - 1)


# --- Reading ------------------------------------------------------------------------------------------------------


def find_folders(patterns: tuple[str, ...]) -> list[Path]:
    """Folders that hold a meta.json or a metrics.csv, at or below what the patterns match; sorted, each once."""
    found = set()
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else glob.glob(pattern)
        if not paths:
            raise UserError(f"there is no {pattern}")
        for path in map(Path, paths):
            if path.is_file():  # a glob may hit a run's files, or others
                if path.name not in ("meta.json", "metrics.csv", "masks.npz"):
                    continue
                path = path.parent
            found |= {file.parent.resolve() for name in ("meta.json", "metrics.csv") for file in path.rglob(name)}
    return sorted(found)


def load_run(folder: Path) -> Run:
    """Raises BadRun with the reason if the run can't be used, other errors if its files are not as they should be.

    Whatever is read later is read here once, so that a bad run is found before it is mixed with others.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        metrics = read_metrics(folder / "metrics.csv")
    except FileNotFoundError as error:
        raise BadRun(f"{Path(error.filename).name} is missing") from None
    if (reason := meta["exit_reason"]) != "finished":
        raise BadRun(f"not finished (exit reason: {reason})")
    run = Run(str(meta["run_name"]), folder, meta, metrics, None)
    evaluations, total = run.curve("eval/episodic_return"), run.args["total_timesteps"]
    if metrics.index[-1] != total:
        raise BadRun(f"damaged: metrics.csv ends at step {metrics.index[-1]} of {total}")
    score = final_score([list(pair) for pair in evaluations[evaluations.index > 0].items()])
    if not math.isclose(score, run.score, rel_tol=1e-9, abs_tol=1e-9) or not np.isfinite(evaluations).all():
        raise BadRun(f"damaged: final score {run.score} in meta.json, {score} in metrics.csv")
    versions = [{k: v for k, v in part["versions"].items() if k not in ("wandb", "python")} for part in
               (meta, *meta.get("resumed", []))]  # fmt: skip
    if any(other != versions[0] for other in versions):
        raise BadRun("mixed versions: it was resumed with other ones than it began with")
    numbers = [run.args["seed"], run.args["hidden_dim"], meta["params_active"], meta["flops_per_update"]["sparse"]]
    numbers += [meta["threads"], metrics["charts/wall_time_s"].iloc[-1]]
    numbers += [run.args[name] for name in METHOD if meta["n"] is not None]
    if not np.isfinite(np.array(numbers, dtype=float)).all():
        raise BadRun("damaged: a number in meta.json or metrics.csv is not finite")
    for text in (meta["start"], meta["hardware"], meta["kernel"], run.args["env_id"]):
        text.encode("ascii", "ignore")
    _ = hash(run.setting), label_run(run)
    for key in metrics:
        metrics[key].astype(float)
    if meta["n"] is not None and (folder / "masks.npz").exists():
        try:
            run.topology = read_masks(folder / "masks.npz", meta["n"], meta["m"], metrics)
        except Exception as error:  # of zipfile, zlib and numpy, whatever the damage is
            raise BadRun(f"damaged: masks.npz: {first_line(error)}") from None
    return run


def read_metrics(path: Path) -> pd.DataFrame:
    """metrics.csv by global_step; a torn last line is dropped, rows of one step are merged."""
    content = path.read_bytes()
    frame = pd.read_csv(io.BytesIO(content[: content.rfind(b"\n") + 1]))
    return frame.groupby("global_step").last()  # of each column the last value that is there


def read_masks(path: Path, n: int, m: int, metrics: pd.DataFrame) -> Topology:
    """Raises BadRun if the masks are not N:M or not those whose SAD was logged."""
    with np.load(path, allow_pickle=False) as file:
        data = dict(file)
    steps = data["global_step"]
    shapes = {name.removesuffix(".shape"): tuple(shape) for name, shape in data.items() if name.endswith(".shape")}
    masks = {name: np.unpackbits(data[name], axis=1, count=math.prod(shape)) for name, shape in shapes.items()}
    if len(steps) < 1 or any(len(E) != len(steps) for E in masks.values()) or not (np.diff(steps) > 0).all():
        raise BadRun("steps and masks do not belong together")
    last = metrics["sad/actor"].last_valid_index() if "sad/actor" in metrics else None
    if last is not None and steps[-1] != last:
        raise BadRun(f"its last mask is of step {steps[-1]}, the last refresh of step {last}")
    ends = [{name: torch.from_numpy(E[i].reshape(shapes[name])).bool() for name, E in masks.items()} for i in (0, -1)]
    for name, E in masks.items():
        kept = n * (shapes[name][1] // m) + min(n, shapes[name][1] % m)
        whole = all(torch.equal(project(end[name].float(), n, m), end[name]) for end in ends)
        if not whole or not (E.reshape(len(steps), *shapes[name]).sum(axis=2) == kept).all():
            raise BadRun(f"it holds a mask that is not {n}:{m}")
    for key, value in sad_metrics(ends[0], ends[0], ends[1]).items():
        if key.startswith("sad_initial") and len(steps) > 1:
            logged = metrics[key].get(steps[-1], math.nan)
            if not abs(logged - value) <= 1e-9:
                raise BadRun(f"{key} of step {steps[-1]} is {logged} in metrics.csv, {value} from the masks")
    nets = {net: np.hstack([E for name, E in masks.items() if name.startswith(net + ".")]) for net in NETS}
    spans = {net: ever_and_age(E, steps) for net, E in nets.items()}
    pairwise = {net: pairwise_sad(E) for net, E in nets.items()}
    return Topology(steps, pairwise, {net: s[0] for net, s in spans.items()}, {net: s[1:] for net, s in spans.items()})


def fetch_wandb(entity: str, project: str, folder: Path) -> list[tuple[str, str]]:
    """Write the files of each run of a W&B project into a folder of its own; (run, reason) of what can't be read."""
    import wandb

    try:
        runs = list(wandb.Api().runs(f"{entity}/{project}"))
    except Exception as error:
        raise UserError(f"W&B project {entity}/{project} can't be read: {first_line(error)}") from None
    skipped = []
    for run in tqdm(runs, desc="downloading", disable=not sys.stderr.isatty()):
        if run.job_type in ("analysis", "benchmark"):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                files = {file.name for file in run.files()}
                if "meta.json" not in files:
                    raise BadRun("it has no meta.json, so it has not ended")
                for name in files & {"meta.json", "masks.npz"}:
                    run.file(name).download(root=scratch, replace=True)
                rows = pd.DataFrame(run.scan_history())
                rows = rows.drop(columns=[key for key in rows if key.startswith("_")])
                rows.to_csv(Path(scratch, "metrics.csv"), index=False)
            except Exception as error:
                reason = str(error) if isinstance(error, BadRun) else f"can't be downloaded: {first_line(error)}"
                skipped.append((run.name, reason))
                continue
            shutil.copytree(scratch, folder / run.id)
    return skipped


def thin_run(run: Run, out: Path, window: float, rows: int = 60, masks: int = 6) -> None:
    """Copy what this script needs of a run: some hundred kilobytes that draw the same figures, coarser in time."""

    def some(things, count: int):  # evenly spaced, first and last included
        return things[np.unique(np.linspace(0, len(things) - 1, min(count, len(things))).round().astype(int))]

    target = out / run.folder.name
    target.mkdir(parents=True)
    evaluations, refreshes = (run.curve(key).index for key in ("eval/episodic_return", "sad/actor"))
    snapshots = np.array([], int)
    if run.topology:
        snapshots = some(np.arange(len(run.topology.steps)), masks)
        ends = [run.args["total_timesteps"] * 0.9, run.args["total_timesteps"] - window]
        snapshots = np.union1d(snapshots, [near(run.topology.steps, end) for end in ends])
    kept = evaluations.union(some(refreshes, rows))
    if run.topology:
        kept = kept.union(run.metrics.index.intersection(run.topology.steps[snapshots]))
        with np.load(run.folder / "masks.npz", allow_pickle=False) as file:
            arrays = {key: value if key.endswith(".shape") else value[snapshots] for key, value in file.items()}
        np.savez_compressed(target / "masks.npz", **arrays)
    run.metrics.loc[kept].to_csv(target / "metrics.csv")
    meta = run.meta | {"args": run.args | {"runs_dir": "runs"}}  # where it was on some machine is nobody's concern
    (target / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def load_all(folders: list[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The usable runs, and (name, reason) of the others."""
    runs, skipped = [], []
    for folder in tqdm(folders, desc="reading", unit="run", delay=2, disable=not sys.stderr.isatty()):
        try:
            runs.append(load_run(folder))
        except Exception as error:  # whatever is wrong with one run, the others count
            other = f"damaged, or of another version ({type(error).__name__}: {first_line(error)})"
            name = folder.name.encode(errors="replace").decode()
            skipped.append((name, str(error) if isinstance(error, BadRun) else other))
    seen = {}
    for run in sorted(runs, key=lambda run: run.meta["start"]):
        key = (run.setting, run.pattern, *(run.args.get(name) for name in METHOD), run.args["seed"])
        if key in seen:
            old = seen[key]
            reason = f"same configuration and seed as the later {run.name}"
            if old.meta["kernel"] != run.meta["kernel"]:
                reason += f" (kernel {old.meta['kernel']}, the later one {run.meta['kernel']})"
            skipped.append((old.name, reason))
        seen[key] = run
    return list(seen.values()), skipped


# --- Masks --------------------------------------------------------------------------------------------------------


def pairwise_sad(E: np.ndarray) -> np.ndarray:
    """SAD_{i:j} over twice the active weights, [S, S], of masks E [S, weights] that all have as many active ones."""
    active = E.sum(axis=1, dtype=np.int64)
    floats = torch.from_numpy(E).float()
    common = (floats @ floats.T).numpy()  # exact: counts below 2**24
    return ((active[:, None] + active[None, :] - 2 * common) / (2 * active[0])).astype(np.float32)


def ever_and_age(E: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """[3, S] of masks E [S, weights]: share seen active so far; mean age of the active: upper bound, lower estimate.

    Snapshots miss what comes and goes between them, so the share is a lower bound. A weight that was inactive at one
    snapshot and is active at the next became so in between: the age is at most that since the former, and at least
    that since the latter for those that do not come and go between snapshots.
    """
    E = E.astype(bool)
    after = np.full(E.shape[1], steps[0], dtype=np.float32)
    until, seen, found = after.copy(), E[0].copy(), [(E[0].mean(), 0.0, 0.0)]
    for i in range(1, len(E)):
        new = E[i] & ~E[i - 1]
        after[new], until[new] = steps[i - 1], steps[i]
        seen |= E[i]
        active = E[i].astype(np.float32)
        found.append((seen.mean(), *(steps[i] - since @ active / active.sum() for since in (after, until))))
    return np.array(found).T


def settled_step(pairwise: np.ndarray, steps: np.ndarray, threshold: float = 0.1) -> float:
    """First snapshot from which on all are within `threshold` (SAD) of the final mask; NaN if only the last one is.

    In the spirit of Early-Bird tickets (You et al., arXiv 1909.11957), which end a search when masks of five epochs
    differ by less than 0.1 of all weights; here 0.1 of the active ones, against the final mask. It is an upper bound
    as fine as the snapshots. A mask that drifts for ever comes near its final state too: read it beside settled SAD.
    """
    far = np.flatnonzero(pairwise[:, -1] >= threshold)
    first = far[-1] + 1 if len(far) else 0
    return float(steps[first]) if first < len(steps) - 1 or len(steps) == 1 else math.nan


# --- Statistics ---------------------------------------------------------------------------------------------------


def iqm(scores: np.ndarray, axis: int | None = None):
    """Interquartile mean: of the middle half (25 % trimmed at each end, rounded down), over all entries or an axis."""
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


def interval(groups: list[np.ndarray], statistic, resamples: int) -> np.ndarray:
    """95 % stratified percentile bootstrap, [2, ...]: each array [runs, ...] is resampled by its runs on its own.

    statistic takes the resampled arrays [resamples, runs, ...] and returns [resamples, ...]. NaN from a single run.
    """
    rng = np.random.default_rng(0)
    drawn = [group[rng.integers(len(group), size=(resamples, len(group)))] for group in groups]
    low_high = np.percentile(statistic(*drawn), [2.5, 97.5], axis=0)
    return low_high if min(map(len, groups)) > 1 else np.full_like(low_high, np.nan)


def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of x has a higher score than one of y, ties half: [..., runs] each -> [...]."""
    difference = x[..., :, None] - y[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1))


def correlation(groups: list[np.ndarray], resamples: int) -> tuple[float, np.ndarray]:
    """Correlation of ranks within each group [runs, 2], pooled, and its 95 % stratified bootstrap interval.

    Of one group it is Spearman's. What sets groups apart, such as K, neither makes nor hides it.
    """

    def statistic(*drawn):  # [resamples, runs, 2] each; a constant resample has no correlation
        ranks = [scipy.stats.rankdata(group, axis=1) / group.shape[1] for group in drawn]
        a, b = np.moveaxis(np.concatenate([r - r.mean(axis=1, keepdims=True) for r in ranks], axis=1), 2, 0)
        norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        return (a * b).sum(axis=1)[norm > 0] / norm[norm > 0]

    return float(statistic(*(group[None] for group in groups))[0]), interval(groups, statistic, resamples)


# --- Matching -----------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """Runs of one setting, by configuration."""

    name: str  # for titles: environment, steps and what else is special
    file: str  # for file names
    setting: tuple
    configurations: dict[str, list[Run]]  # label -> runs, ordered by seed; dense first
    reference: dict[str, str]  # label -> label of the dense configuration that it is compared with

    @property
    def window(self) -> float:
        """Of settled SAD, in steps: a tenth of training, or the longest K up to a quarter."""
        total = dict(self.setting)["total_timesteps"]
        intervals = [runs[0].args.get("mask_update_interval", 0) for runs in self.configurations.values()]
        return max(0.1 * total, *(k for k in intervals if k <= total / 4), 0)

    def scores(self, label: str) -> np.ndarray:
        return np.array([run.score for run in self.configurations[label]])


def density(run: Run) -> float:
    """Sorts dense first: 1, and less for any N:M."""
    return 1.0 if run.meta["n"] is None else run.meta["n"] / run.meta["m"] - 1e-9


def label_run(run: Run) -> str:
    """A configuration's name: its pattern and what is not the training scripts' default."""
    words = {"mask_update_interval": "K = {}", "sparse_head": "sparse head", "hidden_dim": "width {}"}
    other = [
        word.format(run.args[name])
        for name, word in words.items()
        if run.args.get(name, DEFAULTS[name]) != DEFAULTS[name]
    ]
    return ", ".join([run.pattern, *("static masks" if word == "K = 0" else word for word in other)])


def make_studies(runs: list[Run]) -> tuple[list[Study], list[tuple[str, str]]]:
    """One study for each setting, and (run, reason) of those that have no dense run to compare with."""
    settings, studies, unmatched = {}, [], []
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    varying = {
        key for setting in settings for key, value in setting if any(dict(o).get(key) != value for o in settings)
    }
    for setting, members in sorted(settings.items(), key=lambda item: str(item[0])):
        for run in members:
            run.label = label_run(run)
        members.sort(key=lambda run: (-density(run), run.label, run.args["seed"]))
        values = dict(setting)
        extra = [f"{key} {values[key]}" for key in sorted(varying - {"env_id", "total_timesteps"}) if key in values]
        name = ", ".join([values["env_id"], f"{values['total_timesteps']:,} steps", *extra])
        configurations = {}
        for run in members:
            configurations.setdefault(run.label, []).append(run)
        dense = {
            group[0].args["hidden_dim"]: label for label, group in configurations.items() if density(group[0]) == 1
        }
        reference = {}
        for label, group in configurations.items():
            width = DEFAULTS["hidden_dim"] if density(group[0]) == 1 else group[0].args["hidden_dim"]
            if width in dense:
                reference[label] = dense[width]
            elif density(group[0]) < 1:
                unmatched += [(run.name, f"no dense run of the same setting ({name})") for run in group]
        file = re.sub(r"[^\w.-]+", "_", name)[:80]
        file += f"_{len(studies)}" if any(study.file == file for study in studies) else ""
        studies.append(Study(name, file, setting, configurations, reference))
    return studies, unmatched


# --- Figures ------------------------------------------------------------------------------------------------------

# --- shared: colors ---
# Okabe and Ito's colours first, one for each pattern everywhere.
COLORS = {"dense": "#000000", "2:4": "#0072B2", "1:4": "#E69F00", "1:8": "#009E73", "1:16": "#CC79A7", "4:8": "#56B4E9",
          "2:8": "#D55E00", "1:2": "#882255", "3:4": "#AA8800", "1:32": "#332288", "2:16": "#6699CC",
          "4:16": "#44AA99"}  # fmt: skip


def pattern_color(pattern: str) -> str:
    """Of its numbers where it is not in COLORS, so that it is the same everywhere."""
    n, _, m = pattern.partition(":")
    return COLORS.get(pattern) or to_hex(colormaps["turbo"]((37 * int(n) + 11 * int(m)) % 97 / 97))


# --- end shared ---


# Configurations of one pattern differ in the line.
LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (8, 2, 1, 2))]
MARKERS = "osD^vP*X"


def style(study: Study, label: str) -> tuple[str, int]:
    """Colour of the pattern, and a number for line and marker within the pattern."""
    pattern = study.configurations[label][0].pattern
    same = [name for name, runs in study.configurations.items() if runs[0].pattern == pattern]
    return pattern_color(pattern), same.index(label)


def new_figure(title: str, rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(textwrap.fill(title, 95), fontsize=10)
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3, linewidth=0.5)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def describe(ax, title: str = "", x: str = "", y: str = "") -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)


def add_legend(figure: Figure) -> None:
    """One legend below the panels, where it covers no data."""
    handles = {
        label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if handles:
        columns = 3 if max(map(len, handles)) < 28 else 1
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def band(ax, study: Study, label: str, curves: list[pd.Series], resamples: int, scale: float = 1e-3) -> None:
    """IQM over seeds and its 95 % bootstrap band, where all seeds have a value; x is multiplied by `scale`."""
    table = pd.concat(curves, axis=1, join="inner").dropna()
    if table.empty:
        return
    table = table.iloc[np.unique(np.linspace(0, len(table) - 1, min(300, len(table))).round().astype(int))]
    rows, (color, line) = table.to_numpy().T, style(study, label)
    name = f"{label} ({count(len(rows), 'seed')})"
    marker = "." if len(table) < 3 else None
    ax.plot(
        table.index * scale,
        iqm(rows, axis=0),
        color=color,
        linestyle=LINES[line % len(LINES)],
        clip_on=False,
        linewidth=1.2,
        label=name,
        marker=marker,
    )
    if len(rows) > 1:
        low, high = interval([rows], lambda drawn: iqm(drawn, axis=1), resamples)
        ax.fill_between(table.index * scale, low, high, color=color, alpha=0.15, linewidth=0)


def sparse_labels(study: Study) -> list[str]:
    return [label for label, runs in study.configurations.items() if runs[0].pattern != "dense"]


def moving_labels(study: Study) -> list[str]:
    """N:M configurations whose masks were refreshed: others have no SAD but 0."""
    return [name for name in sparse_labels(study) if any(len(r.curve("sad/actor")) for r in study.configurations[name])]


def draw_sad(study: Study, resamples: int) -> Figure | None:
    """1: SAD over training by network, against the previous and against the first mask."""
    if not moving_labels(study):
        return None
    figure, axes = new_figure(f"How masks change: {study.name}", 2, 3, 5, sharex=True, sharey="row")
    for row, (key, what) in zip(axes, (("sad", "previous"), ("sad_initial", "first")), strict=True):
        for ax, net in zip(row, NETS, strict=True):
            for label in moving_labels(study):
                band(ax, study, label, [run.curve(f"{key}/{net}") for run in study.configurations[label]], resamples)
            describe(ax, net if key == "sad" else "", "" if key == "sad" else "thousand environment steps",
                     f"SAD to the {what} mask\n(share of active weights)" if net == "actor" else "")  # fmt: skip
        row[0].set_ylim(bottom=0)
    add_legend(figure)
    return figure


def draw_layers(study: Study, resamples: int) -> Figure | None:
    """1: the same by layer."""
    runs = [run for label in moving_labels(study) for run in study.configurations[label]]
    found = re.findall(r"sad/(\w+)/(\w+)(?:$|\n)", "\n".join({key for run in runs for key in run.metrics}))
    layers = sorted({layer for _, layer in found if layer not in ("fc_mu", "fc3")}) + ["head"] * (
        "fc3" in dict(map(reversed, found))
    )
    if not layers:
        return None
    title, height = f"SAD to the previous and to the first mask, by layer: {study.name}", 1 + 2.7 * len(layers)
    figure, axes = new_figure(title, 2 * len(layers), 3, height, sharex=True, sharey="row")
    for i, (layer, key) in enumerate((layer, key) for layer in layers for key in ("sad", "sad_initial")):
        for ax, net in zip(axes[i], NETS, strict=True):
            name = layer if layer != "head" else ("fc_mu" if net == "actor" else "fc3")
            for label in moving_labels(study):
                curves = [run.curve(f"{key}/{net}/{name}") for run in study.configurations[label]]
                if all(len(curve) for curve in curves):
                    band(ax, study, label, curves, resamples)
            what = "previous" if key == "sad" else "first"
            x_label = "thousand environment steps" if i == len(axes) - 1 else ""
            y_label = f"to {what}" if net == "actor" else ""
            describe(ax, f"{net}, {name}" if key == "sad" else "", x_label, y_label)
        axes[i, 0].set_ylim(bottom=0)
    add_legend(figure)
    return figure


def draw_divergence(study: Study, _resamples: int) -> Figure | None:
    """2: SAD_{i:j} between all snapshots, mean over the seeds that have the same snapshots."""
    labels = [label for label in moving_labels(study) if any(run.topology for run in study.configurations[label])]
    if not labels:
        return None
    title = f"SAD between the masks at two times: {study.name}"
    figure, axes = new_figure(title, len(labels), 3, 1.6 + min(1.75 * len(labels), 7.4))
    kept = {}
    for label in labels:
        topologies = [run.topology for run in study.configurations[label] if run.topology]
        kept[label] = [t for t in topologies if np.array_equal(t.steps, topologies[0].steps)]
    top = max(float(t.pairwise[net].max()) for group in kept.values() for t in group for net in NETS) or 1.0
    for row, (label, group) in zip(axes, kept.items(), strict=True):
        for ax, net in zip(row, NETS, strict=True):
            steps = group[0].steps * 1e-3
            edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])  # a cell around each snapshot
            ax.grid(False)
            image = ax.pcolormesh(edges, edges, np.mean([t.pairwise[net] for t in group], axis=0), vmin=0, vmax=top,
                                  cmap="viridis", rasterized=True)  # fmt: skip
            ax.set_aspect("equal")
            seeds = f"{label}\n({count(len(group), 'seed')})\nthousand steps"
            x_label = "thousand steps" if label == labels[-1] else ""
            describe(ax, net if label == labels[0] else "", x_label, seeds if net == "actor" else "")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("SAD (share of active weights)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_ages(study: Study, resamples: int) -> Figure | None:
    """2: share of weights ever active, and age of the active ones."""
    kept = {
        label: [run.topology for run in study.configurations[label] if run.topology] for label in moving_labels(study)
    }
    kept = {label: topologies for label, topologies in kept.items() if topologies}
    if not kept:
        return None
    title = f"Which weights were ever active, and for how long: {study.name}"
    figure, axes = new_figure(title, 2, 3, 5, sharex=True, sharey="row")
    total = dict(study.setting)["total_timesteps"] * 1e-3
    for ax, net in zip(axes.T, NETS, strict=True):
        for label, topologies in kept.items():
            band(ax[0], study, label, [pd.Series(t.ever[net], t.steps) for t in topologies], resamples)
            bounds = [pd.concat([pd.Series(t.age[net][i], t.steps) for t in topologies], axis=1, join="inner").dropna()
                      for i in (0, 1)]  # fmt: skip
            high, low = (iqm(bound.to_numpy(), axis=1) * 1e-3 for bound in bounds)
            color, line = style(study, label)
            for edge in (low, high):
                ax[1].plot(bounds[0].index * 1e-3, edge, color=color, linestyle=LINES[line % len(LINES)], linewidth=0.8)
        ax[1].plot([0, total], [0, total], color="0.6", linewidth=0.8, label="never replaced")
        first = net == "actor"
        describe(ax[0], net, "", "ever active, at least\n(share of all weights)" if first else "")
        y_label = "mean age of the active: upper\nbound, lower estimate (k steps)" if first else ""
        describe(ax[1], "", "thousand environment steps", y_label)
    axes[0, 0].set_ylim(0, 1)
    add_legend(figure)
    return figure


def draw_sad_against_return(study: Study, resamples: int) -> Figure | None:
    """3: each run a point."""
    found = {label: sad_and_score(study, label) for label in moving_labels(study)}
    found = {label: pairs for label, pairs in found.items() if len(pairs)}
    if not found:
        return None
    texts = correlation_texts(study, resamples)
    figure, axes = new_figure(
        f"Does settling go with return? {study.name}", 1, 1, 3.8 + 0.2 * (len(found) + len(texts))
    )
    for label, pairs in found.items():
        color, number = style(study, label)
        text = f"{label} ({count(len(pairs), 'run')})"
        axes[0, 0].scatter(*pairs.T, color=color, marker=MARKERS[number % 8], s=22, label=text, alpha=0.8)
    x_label = f"settled SAD: from the mask {study.window:,.0f} steps before the end to the last (of active weights)"
    describe(axes[0, 0], "", x_label, "final score")
    axes[0, 0].set_title("\n".join(textwrap.fill(text, 100) for text in texts), fontsize=8, loc="left")
    add_legend(figure)
    return figure


def draw_interval(study: Study, resamples: int) -> Figure | None:
    """4: mask-update interval K against return and SAD, for each pattern that was run with several K."""
    groups = {}
    for label in sparse_labels(study):
        first = study.configurations[label][0]
        other = [word for word in label.split(", ") if not re.match("K = |static", word)]
        groups.setdefault(", ".join(other), []).append((first.args["mask_update_interval"], label))
    groups = {
        name: sorted(found, key=lambda pair: pair[0] or math.inf) for name, found in groups.items() if len(found) > 1
    }
    if not groups:
        return None
    figure, axes = new_figure(f"How often should masks move? {study.name}", 1, 2, 3.4)
    order = sorted({k for found in groups.values() for k, _ in found}, key=lambda k: k or math.inf)
    for name, found in groups.items():
        runs = [study.configurations[label] for _, label in found]
        places = [order.index(k) for k, _ in found]
        color, _ = style(study, found[0][1])
        number = list(groups).index(name)
        moved = [[run.topology.pairwise for run in group if run.topology] for group in runs]
        sads = [np.array([np.mean([pairwise[net][0, -1] for net in NETS]) for pairwise in group]) for group in moved]
        for ax, values in zip(axes[0], ([study.scores(label) for _, label in found], sads), strict=True):
            middle = [iqm(v) if len(v) else math.nan for v in values]
            low, high = np.array(
                [interval([v], lambda d: iqm(d, axis=1), resamples) if len(v) else [math.nan] * 2 for v in values]
            ).T
            look = {"color": color, "marker": MARKERS[number % 8], "linestyle": LINES[number % len(LINES)]}
            bars = [middle - low, high - middle]
            moving = sum(k > 0 for k, _ in found)
            ax.errorbar(places, middle, bars, capsize=3, linewidth=0, elinewidth=1.2, label=name, **look)
            ax.plot(places[:moving], middle[:moving], linewidth=1.2, **look)  # static masks are no longer K
    for ax in axes[0]:
        ax.set_xticks(range(len(order)), [f"{k:,}" if k else "static" for k in order])
    describe(axes[0, 0], "", "K, critic updates between refreshes", "final score (IQM, 95 % interval)")
    describe(
        axes[0, 1],
        "",
        "K, critic updates between refreshes",
        "SAD of the last to the first mask\n(share of active weights)",
    )
    add_legend(figure)
    return figure


def draw_returns(study: Study, resamples: int) -> Figure:
    """5: learning curves over steps and over training time."""
    dense = [label for label in study.configurations if label not in sparse_labels(study)]
    patterns = dict.fromkeys(study.configurations[label][0].pattern for label in sparse_labels(study))
    rows = []
    for pattern in patterns:
        own = [label for label in sparse_labels(study) if study.configurations[label][0].pattern == pattern]
        rows += [[*dense, *own[i : i + 3]] for i in range(0, len(own), 3)]
    rows = rows or [dense]
    title, height = f"Return of the noise-free policy: {study.name}", 1.4 + 2 * len(rows) + 0.08 * len(study.reference)
    figure, axes = new_figure(title, len(rows), 2, height, sharex="col", sharey=True)
    for row, label in ((row, label) for row, labels in zip(axes, rows, strict=True) for label in labels):
        runs = study.configurations[label]
        curves = [run.curve("eval/episodic_return") for run in runs]
        band(row[0], study, label, curves, resamples)
        clocks = [
            run.metrics["charts/wall_time_s"].loc[curve.index].to_numpy() / 60
            for run, curve in zip(runs, curves, strict=True)
        ]
        end = min(clock[-1] for clock in clocks)
        grid = np.geomspace(end / 30, end, 100)
        timed = [pd.Series(np.interp(grid, clock, curve), grid) for clock, curve in zip(clocks, curves, strict=True)]
        if len({(run.meta["hardware"], run.meta["threads"], run.meta["kernel"]) for run in runs}) == 1:
            band(row[1], study, label, timed, resamples, scale=1)
        row[1].set_xscale("log")
        row[1].xaxis.set_major_formatter("{x:g}")
        describe(row[0], "", "", "evaluation return\n(IQM over seeds, 95 % band)")
    hardware = sorted({f"{run.meta['hardware']}, {count(run.meta['threads'], 'thread')}"
                       for runs in study.configurations.values() for run in runs})  # fmt: skip
    axes[-1, 0].set_xlabel("thousand environment steps", fontsize=8)
    machines = "; ".join(hardware[:2]) + "; ..." * (len(hardware) > 2)
    axes[-1, 1].set_xlabel(f"training minutes, to the first seed's end (log scale)\n{machines}", fontsize=8)
    add_legend(figure)
    return figure


def draw_scores(study: Study, resamples: int) -> Figure:
    """5: final scores, a point for each seed."""
    labels = list(study.configurations)
    figure, axes = new_figure(f"Final scores: {study.name}", 1, 1, 1.2 + 0.32 * len(labels))
    ax = axes[0, 0]
    for place, label in enumerate(labels):
        scores, (color, _) = study.scores(label), style(study, label)
        ax.scatter(scores, np.full(len(scores), place), color=color, s=14, alpha=0.5, linewidths=0)
        low, high = interval([scores], lambda drawn: iqm(drawn, axis=1), resamples)
        ax.errorbar(iqm(scores), place, xerr=[[iqm(scores) - low], [high - iqm(scores)]] if len(scores) > 1 else None,
                    color=color, marker="|", markersize=12, capsize=3, linewidth=1.5)  # fmt: skip
    ax.set_yticks(range(len(labels)), [f"{label} ({len(study.scores(label))})" for label in labels])
    ax.invert_yaxis()
    describe(ax, "", "mean of the last evaluations; dots: seeds, bar: IQM with 95 % interval", "configuration (seeds)")
    return figure


FIGURES = {"returns": draw_returns, "scores": draw_scores, "sad": draw_sad, "sad_layers": draw_layers,
           "divergence": draw_divergence, "ages": draw_ages, "sad_return": draw_sad_against_return,
           "interval": draw_interval}  # fmt: skip


# --- Tables -------------------------------------------------------------------------------------------------------

ENOUGH = 10  # runs below which a correlation is not commented on


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def sad_and_score(study: Study, label: str) -> np.ndarray:
    """[runs, 2]: settled SAD and final score, of the runs that have both."""
    pairs = np.array([(run.settled_sad(study.window), run.score) for run in study.configurations[label]])
    return pairs[~np.isnan(pairs).any(axis=1)]


def correlation_texts(study: Study, resamples: int) -> list[str]:
    """For each N:M pattern and for all together; static masks, which have no SAD, are left out."""
    groups = {}
    for label in moving_labels(study):
        groups.setdefault(study.configurations[label][0].pattern, []).append(sad_and_score(study, label))
    if len(groups) > 1:
        groups["all N:M"] = [*itertools.chain(*groups.values())]
    return [f"{name}: {correlation_text(found, resamples)}" for name, found in groups.items()]


def correlation_text(groups: list[np.ndarray], resamples: int) -> str:
    """What configurations [runs, 2] say together: within them, and over all runs, where configurations differ too."""
    every = sum(map(len, groups))
    groups = [group for group in groups if len(group) > 1 and (np.ptp(group, axis=0) > 0).all()]
    total = sum(map(len, groups))
    if total < 3:
        return f"{count(every, 'run')}, too few to correlate"
    rho, (low, high) = correlation(groups, resamples)
    limits = f" [{low:+.2f}, {high:+.2f}]" if total >= ENOUGH else f" (too few runs to conclude, {ENOUGH} needed)"
    text = f"rank correlation {rho:+.2f}{limits}, {count(total, 'run')}"
    if len(groups) > 1:
        across, _ = correlation([np.concatenate(groups)], 1)
        text += f", within {len(groups)} configurations; over all runs {across:+.2f}, confounded by configuration"
    return text


def relative(scores: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """IQM over IQM of dense, [resamples, runs] each -> [resamples]."""
    return iqm(scores, axis=1) / iqm(dense, axis=1)


def paired_difference(runs: list[Run], others: list[Run], resamples: int) -> dict[str, float]:
    """Mean difference of the scores of equal seeds, with its interval and the number of pairs."""
    by_seed = {run.args["seed"]: run.score for run in others}
    paired = np.array([run.score - by_seed[run.args["seed"]] for run in runs if run.args["seed"] in by_seed])
    row = {"pairs": len(paired)}
    if len(paired):
        row["difference"] = paired.mean()
        row["difference_low"], row["difference_high"] = interval([paired], lambda d: d.mean(axis=1), resamples)
    return row


def variant_texts(study: Study, resamples: int) -> list[str]:
    """Each N:M configuration against its pattern's default one, such as other K against K = 1000."""
    texts = []
    for label in sparse_labels(study):
        pattern = study.configurations[label][0].pattern
        if label != pattern and pattern in study.configurations:
            row = paired_difference(study.configurations[label], study.configurations[pattern], resamples)
            if row["pairs"]:
                limits = [row["difference_low"], row["difference_high"]]
                limits = "" if np.isnan(limits).any() else f" [{limits[0]:+,.0f}, {limits[1]:+,.0f}]"
                texts.append(f"{label}: {row['difference']:+,.0f}{limits}, {count(row['pairs'], 'pair')}")
    return texts


def configuration_row(study: Study, label: str, resamples: int) -> dict:
    runs, scores = study.configurations[label], study.scores(label)
    row = {"setting": study.name, "configuration": label} | {name: runs[0].args.get(name) for name in METHOD}
    row |= {"seeds": len(runs), "final_score_iqm": iqm(scores)}
    row["low"], row["high"] = interval([scores], lambda drawn: iqm(drawn, axis=1), resamples)
    reference = study.reference.get(label)
    if reference and reference != label:
        dense = study.scores(reference)
        row["dense"] = reference
        if (dense > 0).all():  # a share of a negative return means nothing
            row["of_dense"] = iqm(scores) / iqm(dense)
            row["of_dense_low"], row["of_dense_high"] = interval([scores, dense], relative, resamples)
        row |= paired_difference(runs, study.configurations[reference], resamples)
        row["p_better"] = float(better(scores, dense))
        row["p_better_low"], row["p_better_high"] = interval([scores, dense], better, resamples)
    stats = runs[0].meta
    row["params_active"] = stats["params_active"]
    row["mflops_per_update"] = stats["flops_per_update"]["sparse"] / 1e6
    minutes = statistics.median(run.metrics["charts/wall_time_s"].iloc[-1] / 60 for run in runs)
    alike = len({(run.meta["hardware"], run.meta["threads"], run.meta["kernel"]) for run in runs}) == 1
    row["training_minutes"] = minutes if alike else math.nan
    row["kernel"] = ", ".join(sorted({run.meta["kernel"] for run in runs}))
    sads = [run.settled_sad(study.window) for run in runs if run.pattern != "dense"]
    sads = [sad for sad in sads if not math.isnan(sad)]
    row["settled_sad"] = statistics.fmean(sads) if sads else math.nan
    for net in NETS:
        steps = [settled_step(run.topology.pairwise[net], run.topology.steps) for run in runs if run.topology]
        row[f"settled_step_{net}"] = (
            statistics.median_high(math.inf if math.isnan(s) else s for s in steps) if steps else math.nan
        )
    return row


def pooled_rows(studies: list[Study], resamples: int) -> list[dict]:
    """Dense-normalised scores over the environments of otherwise equal settings: IQM, stratified by environment.

    Environments in which a dense run scored below zero are not in it; the others count by their number of seeds.
    """
    rows, settings = [], {}
    for study in studies:
        values = dict(study.setting)
        rest = tuple(pair for pair in study.setting if pair[0] != "env_id")
        for label, reference in study.reference.items():
            if label != reference and (study.scores(reference) > 0).all():
                found = (values["env_id"], study.scores(label), study.scores(reference))
                settings.setdefault((rest, study.name.partition(", ")[2], label), []).append(found)
    for (_, other, label), found in settings.items():
        if len(found) < 2:
            continue
        names, *pairs = zip(*found, strict=True)
        found = [*zip(*pairs, strict=True)]

        def pooled(*drawn):  # scores and dense scores, in turns; axis 1 are the runs
            parts = [x / iqm(dense, axis=1)[:, None] for x, dense in zip(drawn[::2], drawn[1::2], strict=True)]
            return iqm(np.concatenate(parts, axis=1), axis=1)

        groups = [*itertools.chain(*found)]
        row = {"setting": f"{' + '.join(names)}, {other}: relative to dense", "configuration": label}
        row["seeds"] = " + ".join(str(len(scores)) for scores, _ in found)
        row["of_dense"] = float(pooled(*(group[None] for group in groups))[0])
        row["of_dense_low"], row["of_dense_high"] = interval(groups, pooled, resamples)
        rows.append(row)
    return rows


def describe_conditions(study: Study) -> list[str]:
    """What the numbers may depend on besides the setting: once if it is the same everywhere, else by configuration."""

    def condition(run: Run) -> dict[str, str]:
        commit = f"{run.meta.get('commit')}{' and changes' * bool(run.meta.get('dirty'))}"
        versions = {name: run.meta["versions"].get(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
        found = {"commit": commit} | versions | {"kernel": run.meta["kernel"]}
        return {k: str(v) for k, v in found.items()} | {"on": f"{run.meta['hardware']}, threads {run.meta['threads']}"}

    found = {label: [condition(run) for run in runs] for label, runs in study.configurations.items()}
    every = [*itertools.chain(*found.values())]
    same = {key for key in every[0] if len({one[key] for one in every}) == 1}
    lines = [", ".join(f"{key} {value}" for key, value in every[0].items() if key in same)]
    others = {}
    for label, ones in found.items():
        parts = [f"{key} {' or '.join(sorted({one[key] for one in ones}))}" for key in every[0] if key not in same]
        others.setdefault(", ".join(parts), []).append(label)
    lines += [f"{text}: {'; '.join(labels)}" for text, labels in others.items() if text]
    return lines


def table_line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write_summary(out: Path, studies, skipped, unmatched, resamples: int) -> pd.DataFrame:
    rows = [configuration_row(study, label, resamples) for study in studies for label in study.configurations]
    frame = pd.DataFrame(rows + pooled_rows(studies, resamples))
    frame.to_csv(out / "summary.csv", index=False)

    def span(row, key: str, digits: int = 0, low: str = "", high: str = "") -> str:
        if pd.isna(row.get(key)):
            return ""
        ends = [row.get(low or f"{key}_low"), row.get(high or f"{key}_high")]
        numbers = "" if any(map(pd.isna, ends)) else f" [{ends[0]:,.{digits}f}, {ends[1]:,.{digits}f}]"
        return f"{row[key]:,.{digits}f}{numbers}"

    lines = [
        "# Runs compared",
        "",
        f"In brackets: 95 % bootstrap intervals over seeds ({resamples:,} resamples). One seed has none, and of few",
        "they are too narrow: of five they hold the mean in about 84 % of cases. No correction for many comparisons.",
        "The IQM of up to three seeds is their mean. Of dense: the ratio of the IQMs of all seeds, where every dense",
        "run scored above zero; differences: means over the seeds that both have. Minutes: of training, where all",
        "seeds ran on the same hardware, threads and kernel. Settled SAD: mean over seeds; the step: median.",
        "",
    ]
    for setting, part in frame.groupby("setting", sort=False):
        lines += [f"## {setting}", ""]
        header = """configuration / seeds / final score (IQM) / of dense / mean difference to dense, by seed
            / P(better than dense) / active parameters / MFLOP per update / minutes / settled SAD
            / within 10 % of the final mask at the latest from step: actor, qf1, qf2"""
        header = [" ".join(cell.split()) for cell in header.split("/")]
        lines += [table_line(header), table_line(["---"] * len(header))]
        for row in part.to_dict("records"):
            whole = [row.get(key) for key in ("params_active", "mflops_per_update", "training_minutes", "settled_sad")]
            numbers = [
                "" if pd.isna(x) else f"{x:{f}}" for x, f in zip(whole, (",.0f", ",.0f", ".1f", ".4f"), strict=True)
            ]
            settled = [row.get(f"settled_step_{net}") for net in NETS]
            settled = ["the last" if x == math.inf else f"{x:,.0f}" for x in settled if not pd.isna(x)]
            pairs = f" ({count(int(row['pairs']), 'pair')})" if not pd.isna(row.get("pairs")) and row["pairs"] else ""
            scores = [span(row, "final_score_iqm", low="low", high="high"), span(row, "of_dense", 2)]
            scores += [span(row, "difference") + pairs, span(row, "p_better", 2)]
            lines.append(table_line([row["configuration"], row["seeds"], *scores, *numbers, ", ".join(settled)]))
        lines.append("")
        for study in studies:
            if study.name == setting:
                if moving_labels(study):
                    about = f"Settled SAD (from the mask {study.window:,.0f} steps before the end to the final one)"
                    lines += [f"{about} against final score, each run a point:", ""]
                    lines += [*(f"- {text}" for text in correlation_texts(study, resamples)), ""]
                if variants := variant_texts(study, resamples):
                    lines += ["Mean difference to the pattern's default configuration, by seed:", ""]
                    lines += [*(f"- {text}" for text in variants), ""]
                lines += ["Ran on:", "", *(f"- {text}" for text in describe_conditions(study)), ""]
    for title, pairs in (("Skipped", skipped), ("Not compared with dense", unmatched)):
        if pairs:
            lines += [f"## {title}", "", *(f"- {name}: {reason}" for name, reason in pairs), ""]
    (out / "summary.md").write_text("\n".join(lines))
    return frame


# --- shared: wandb ---
def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_wandb(args: Args, job: str, out: Path, tables: dict[str, list[dict]], figures: list[Path]) -> None:
    """A W&B run with the same figures and tables; offline without a login."""
    import wandb

    try:
        online = os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=args.wandb_project_name or "nm-sparse-rl",
            entity=args.wandb_entity,
            job_type=job,
            name=f"{job}_{out.resolve().name}",
            config=vars(args),
            mode=None if online else "offline",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        for name, rows in tables.items():
            if rows:
                run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})
        run.log({path.stem: wandb.Image(str(path)) for path in figures})
        summary = wandb.Artifact(f"{job}_summary", type=job)
        for path in sorted(out.glob("summary.*")):
            summary.add_file(str(path))
        run.log_artifact(summary)
        run.finish()
    except Exception as error:
        print(f"warning: not in W&B: {first_line(error)}", file=sys.stderr)


# --- end shared ---


def analyse(args: Args, folders: list[Path], skipped: list[tuple[str, str]]) -> None:
    """Read, compare, draw and write; `skipped`: runs that could not be had, with the reason."""
    runs, bad = load_all(folders)
    skipped = skipped + bad
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if not runs:
        raise UserError(
            f"no finished runs among {len(folders) or len(skipped)} in {' '.join(args.runs) or args.wandb_project_name}"
        )
    studies, unmatched = make_studies(runs)
    for name, reason in unmatched:
        print(f"not compared {name}: {reason}", file=sys.stderr)
    if any(run.meta["n"] is not None and run.topology is None for run in runs):
        print("note: N:M runs without masks.npz are not in the figures of masks", file=sys.stderr)
    out, figures, missing = Path(args.out), [], {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        frame = write_summary(out, studies, skipped, unmatched, args.resamples)
        jobs = [(study, name) for study in studies for name in FIGURES]
        for study, name in tqdm(jobs, desc="drawing", unit="figure", delay=2, disable=not sys.stderr.isatty()):
            figure = FIGURES[name](study, args.resamples)
            if figure is None:
                missing.setdefault(study.name, []).append(name)
            else:
                figures.append(out / f"{study.file}_{name}.png")
                for path in (figures[-1], figures[-1].with_suffix(".svg")):
                    figure.savefig(path, dpi=150)
        if args.thin:
            for study in studies:
                for run in itertools.chain(*study.configurations.values()):
                    thin_run(run, Path(args.thin), study.window)
    except OSError as error:
        raise UserError(f"{args.out}{f' or {args.thin}' if args.thin else ''} can't be written: {error}") from None
    for name, kinds in missing.items():
        reason = "for want of refreshed masks (interval: of several K)"
        print(f"note: not drawn of {name}, {reason}: {', '.join(kinds)}", file=sys.stderr)
    print((out / "summary.md").read_text())
    if args.track:
        table = frame.astype(object).where(frame.notna(), None).to_dict("records")
        log_wandb(args, "analysis", out, {"summary": table}, figures)
    print(f"{count(len(runs), 'run')}, {len(skipped)} skipped: figures and tables are in {out}")


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)  # masks are small
    try:
        if args.resamples < 100:
            raise UserError("--resamples must be at least 100")
        if args.thin and Path(args.thin).exists():
            raise UserError(f"--thin {args.thin} exists already: name a new folder")
        if bool(args.runs) == bool(args.wandb_project_name) or (args.wandb_project_name and not args.wandb_entity):
            raise UserError("name run folders, or --wandb-entity and --wandb-project-name")
        with tempfile.TemporaryDirectory() as scratch:
            skipped = []
            if args.wandb_project_name:
                skipped = fetch_wandb(args.wandb_entity, args.wandb_project_name, Path(scratch))
            folders = find_folders(args.runs or (scratch,))
            if not folders and not skipped:
                raise UserError(f"no runs in {' '.join(args.runs) or args.wandb_project_name}")
            analyse(args, folders, skipped)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
