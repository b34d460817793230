"""What the masks of RNM-TD3 did during training, and what it had to do with the return: figures and tables from runs.

Reads the folders that the training scripts and their forks leave behind; needs no account:
  python sad_analysis.py runs/                       run folders, folders of them, or globs -> analysis/
  python sad_analysis.py --wandb-entity E --wandb-project-name P      the same for runs in the cloud

  SAD_{i:j} = |E_i - E_j|_0, Sparse Architecture Divergence (arXiv 2102.04010)              -> sad_metrics, pairwise_sad
  settled SAD: from the mask a tenth of training (or the longest K) before the last to the last -> settled_sad
  settled step: from there on the mask stays within 10 % of the final one                   -> settled_step
  correlation of settled SAD and score: of ranks within configurations, pooled              -> correlation
  steps and core minutes to 50, 75 and 90 % of dense's score                                -> time_to
  score minus that of dense, stopped after as much CPU time                                 -> score_within
  IQM, stratified bootstrap, probability of improvement (Agarwal et al., arXiv 2108.13264)  -> iqm, interval, better

Only finished runs count. They are compared if environment, steps, physics and TD3's hyper-parameters agree. They are
seeds of one configuration if pattern, all other arguments, script, exp_name and code agree too: a fork is never pooled
with the original. Exit codes: 0 done, 2 bad input or disk, 130 Ctrl-C.
"""

import functools
import glob
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps, rc
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from tqdm import tqdm


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders, folders that hold runs at any depth, or globs of them"""
    out: str = "analysis"
    """folder for figures and tables; files of the same names are replaced, older figures of the same studies go"""
    wandb_entity: str | None = None
    """user or team whose runs in Weights & Biases to read (with --wandb-project-name), and to write to"""
    wandb_project_name: str | None = None
    """project in Weights & Biases whose runs to read; the analysis is written there, else to nm-sparse-rl"""
    resamples: int = 10_000
    """bootstrap resamples for each interval, >= 100"""
    thin: str | None = None
    """new folder to copy the runs to, thinned: rows of evaluations and of 40 refreshes, SAD between as many masks"""
    pool_code: bool = False
    """pool runs whose script and exp_name agree, whatever their code: for edits that do not change the method"""
    track: bool = True
    """mirror figures and tables to Weights & Biases (offline when not logged in)"""


class UserError(Exception):
    """Something that the user typed or pointed to is wrong, in a line; of a run: why it can't be used."""


# --- shared: projection ---
def project(W: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """P_{N:M}: the mask E [out, in] (bool) of the n largest magnitudes in each m consecutive weights of a row of W."""
    magnitude = F.pad(W.abs(), (0, -W.shape[1] % m), value=-1.0)  # fill a ragged last group with what never wins
    order = magnitude.view(len(W), -1, m).argsort(dim=2, descending=True, stable=True)  # [out, groups, m]
    E = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
    return E.view(len(W), -1)[:, : W.shape[1]].contiguous()


# --- end shared ---


# --- shared: sad ---
def sad_metrics(first: dict, previous: dict, current: dict) -> dict[str, float]:
    """SAD_{i:j} = |E_i - E_j|_0 (Zhou et al., SR-STE) over twice the active weights; masks by '<net>.<layer>'."""
    row = {}
    for key, reference in (("sad", previous), ("sad_initial", first)):
        for net in dict.fromkeys(name.split(".")[0] for name in current):
            layers = [name for name in current if name.split(".")[0] == net]
            count = {name: int((current[name] != reference[name]).sum()) for name in layers}
            active = {name: int(current[name].sum()) for name in layers}
            row[f"{key}/{net}"] = sum(count.values()) / (2 * sum(active.values()))
            row |= {f"{key}/{name.replace('.', '/')}": count[name] / (2 * active[name]) for name in layers}
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


SCRIPTS = {f"{name}_td3_continuous.py" for name in ("dense", "rnm", "rlx2", "mst")}  # others are forks
# What must agree between runs that are compared.
SETTING = """env_id total_timesteps learning_rate buffer_size gamma tau batch_size policy_noise exploration_noise
    noise_clip learning_starts policy_frequency eval_interval eval_episodes
    weight_decay actor_hidden_dim actor_blocks critic_hidden_dim critic_blocks""".split()
# Of no consequence for the numbers. All other arguments, those that a fork adds too, tell configurations apart.
NEUTRAL = """exp_name seed runs_dir track wandb_project_name wandb_entity capture_video resume evaluate keep_replay
    checkpoint_interval kernel threads device diagnostics_interval""".split()
DEFAULTS = {"mask_update_interval": 1000, "sparse_head": False, "hidden_dim": 256}  # not named in a label
RLX2 = {"mask_update_interval": 10_000, "drop_fraction": 0.5, "delay_nstep": 300_000, "buffer_min_size": 100_000}
RLX2 |= {"buffer_check_interval": 10_000, "buffer_threshold": 0.2}  # of rlx2_td3_continuous.py
MST = {"mask_update_interval": 1000, "drop_fraction": 0.3, "mask_end": 0.8}
# What a pattern names: of RLx2, which has --topology, and of MST, which has --critic-regime.
IN_PATTERN = {"topology": "topology nstep dynamic_buffer actor_sparsity critic_sparsity".split()}
IN_PATTERN["critic_regime"] = [f"{net}_{key}" for net in ("actor", "critic") for key in ("regime", "sparsity", "nm")]
METHODS = {"rigl": "RigL", "set": "SET"}
WORDS = {"mask_update_interval": "K = {}", "sparse_head": "sparse head", "hidden_dim": "width {}"}


@dataclass
class Run:
    name: str
    folder: Path
    meta: dict
    args: dict
    metrics: pd.DataFrame  # indexed by global_step
    masks: dict[str, pd.DataFrame]  # by network: SAD_{i:j} between snapshots, share of active weights, by steps [S, S]
    curves: pd.DataFrame  # of read_masks, by the steps of the snapshots
    rowwise: bool  # whether the first and last masks are N:M along rows
    setting: tuple  # (name, value) of what must agree between runs that are compared
    pattern: str  # "dense", "1:8", "RLx2 96/88"
    width: int
    fork: str  # what is not the project's own: script, exp_name, groups; such as "my_fork.py"
    code: str  # "code 3fa9c1"
    active: int  # parameters
    flops: float  # per update
    minutes: float  # CPU time of training; NaN on a GPU, whose work is not in it
    machine: str
    kernel: str
    start: float  # seconds since 1970
    interval: float  # K; NaN where a fork has none or no number

    def curve(self, key: str) -> pd.Series:
        """A key over environment steps, where it has a value."""
        frame = self.metrics if key in self.metrics else self.curves
        return frame[key].dropna() if key in frame else pd.Series(dtype=float)


# --- Reading ------------------------------------------------------------------------------------------------------


def find_folders(patterns: tuple[str, ...]) -> list[Path]:
    """Folders that hold a meta.json, at or below what the patterns match; sorted, each once."""

    def tell(error: OSError) -> None:
        print(f"note: {error.filename} is not read: {error.strerror}", file=sys.stderr)

    found = set()
    for pattern in patterns:
        here, seen, paths = set(), set(), [pattern] if Path(pattern).exists() else glob.glob(pattern)
        if not paths:
            raise UserError(f"there is no {pattern}: name run folders, folders that hold runs, or globs of them")
        walks = (os.walk(path, onerror=tell, followlinks=True) for path in paths)
        for path, folders, files in itertools.chain(*walks):
            real = Path(path).resolve()
            folders[:] = () if real in seen else folders  # links may go in circles
            seen.add(real)
            here |= {real} if "meta.json" in files else set()
        if not here:
            print(f"note: no run in {pattern}: it has no meta.json", file=sys.stderr)
        found |= here
    return sorted(found)


def find_pattern(meta: dict) -> str:
    """Such as "dense", "1:8"; without structure the method and the sparsities of actor and critics, in percent."""
    args = meta["args"]
    if meta["n"]:
        return f"{meta['n']}:{meta['m']}"
    if "critic_regime" in args and meta["pattern"] != "dense":
        parts = [re.fullmatch("([a-z]+)(.*)", part) for part in meta["pattern"].replace("of", ":").split("-")]
        kinds = "/".join(METHODS.get(part[1], part[1]) for part in parts)
        return f"{'MST' if kinds == 'static/RigL' else kinds} {'/'.join(part[2] or '0' for part in parts)}"
    if "topology" not in args or meta.get("pattern") == "dense":
        return meta.get("pattern", "dense")
    words = [METHODS.get(args["topology"], args["topology"])]
    words += [f"n = {args['nstep']}"] * (args["nstep"] > 1) + ["dynamic buffer"] * args["dynamic_buffer"]
    name = "RLx2" if words == ["RigL", "n = 3", "dynamic buffer"] else " + ".join(words)
    return f"{name} {100 * args['actor_sparsity']:g}/{100 * args['critic_sparsity']:g}"


def through(meta: dict, fact) -> str:
    """A fact of a run; if it went on with another one after a resume both, such as "nm then torch"."""
    return " then ".join(dict.fromkeys(fact(meta | part) for part in ({}, *meta.get("resumed", []))))


def machine(meta: dict) -> str:
    return f"{meta['hardware']}, {count(meta['threads'], 'thread')}"


def conditions(meta: dict) -> str:
    """What the numbers may depend on besides the setting."""
    parts = [f"commit {meta.get('commit')}{' and changes' * bool(meta.get('dirty'))}", f"code {meta['code']}"]
    parts += [f"{name} {meta['versions'].get(name)}" for name in ("torch", "gymnasium", "mujoco", "numpy")]
    return ", ".join([*parts, f"kernel {meta['kernel']}, on {machine(meta)}"])


def load_run(folder: Path) -> Run:
    """Raises UserError with the reason if the run can't be used, other errors if a file is not as it should be."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta["exit_reason"] != "finished":
        raise UserError(f"not finished (exit reason: {meta['exit_reason']})")
    frame = pd.read_csv(folder / "metrics.csv").astype(float)
    metrics = frame.groupby(frame.pop("global_step").astype(int)).last()  # W&B has rows twice after a resume
    script, args = meta["script"], {key: str(x) if isinstance(x, list | dict) else x for key, x in meta["args"].items()}
    args |= {"seed": int(args["seed"]), "env_id": str(args["env_id"])}
    if (end := metrics.index[-1]) != (total := args["total_timesteps"]):
        cause = f"rows are lost, or a fork stopped early (then write {end} into its meta.json)"
        raise UserError(f"metrics.csv ends at step {end} of total_timesteps = {total}: {cause}")
    evaluations = metrics["eval/episodic_return"].dropna()
    every = int(args.get("eval_interval") or total)
    if missing := {*range(0, total, every)} - {*evaluations.index}:
        raise UserError(f"it has no evaluation at step {min(missing)}: rows are lost, or tracking began at a resume")
    score = final_score([list(pair) for pair in evaluations[evaluations.index > 0].items()])
    if not math.isclose(score, meta["final_score"], rel_tol=1e-9, abs_tol=1e-9):
        raise UserError(f"damaged: final score {meta['final_score']} in meta.json, {score} in metrics.csv")
    masks, curves, rowwise, pattern = {}, pd.DataFrame(), True, find_pattern(meta)
    if pattern != "dense":
        masks, curves, rowwise = (read_sad if (folder / "sad.npz").exists() else read_masks)(folder, meta, metrics)
    physics = through(meta, lambda part: ".".join(part["versions"]["mujoco"].split(".")[:2]))
    setting = (*((name, args.get(name)) for name in SETTING), ("mujoco", physics))
    fork = [script] * (script not in SCRIPTS) + [args["exp_name"]] * (args["exp_name"] != Path(script).stem)
    fork += [f"masks not {pattern} along rows"] * (not rowwise)
    code = through(meta, lambda part: f"code {part['code'][:6]}")
    minutes = math.nan if args.get("device") == "cuda" else metrics["charts/cpu_time_s"].iloc[-1] / 60
    ends = through(meta, machine), through(meta, lambda part: part["kernel"]), pd.Timestamp(meta["start"]).timestamp()
    ends += (float(pd.to_numeric(args.get("mask_update_interval", math.nan), errors="coerce")),)
    kind = pattern, args.get("hidden_dim", DEFAULTS["hidden_dim"]), ", ".join(fork), code
    kind += meta["params_active"], flops_per_update(meta)
    return Run(meta["run_name"], folder, meta, args, metrics, masks, curves, rowwise, setting, *kind, minutes, *ends)


def read_masks(folder: Path, meta: dict, metrics: pd.DataFrame) -> tuple[dict, pd.DataFrame, bool]:
    """SAD between any two masks, by network; curves of ever_and_age; whether the first and last are N:M along rows
    (True where they need not be)."""
    with np.load(folder / "masks.npz", allow_pickle=False) as file:
        data = dict(file)
    steps, nets = data["global_step"], {}
    shapes = {key.removesuffix(".shape"): value for key, value in data.items() if key.endswith(".shape")}
    masks = {name: np.unpackbits(data[name], axis=1, count=math.prod(shape)) for name, shape in shapes.items()}
    ends = [{name: torch.from_numpy(E[i]).view(*shapes[name]).bool() for name, E in masks.items()} for i in (0, -1)]
    for key, value in sad_metrics(ends[0], *ends).items():
        logged = metrics[key].dropna() if key in metrics else ()
        if key.startswith("sad_initial/") and len(logged) and abs(logged.iloc[-1] - value) > 1e-9:
            raise UserError(f"damaged: the last {key} is {logged.iloc[-1]} in metrics.csv, {value} from masks.npz")
    for name, E in masks.items():
        net, layer = name.split(".", 1)
        known = meta["modules"][net] if not meta["n"] else ()  # of N:M the pattern tells
        said = [part["active"] for part in known if part["name"] == layer] or [E[0].sum()]
        if (E.sum(axis=1) != said[0]).any():
            raise UserError(f"damaged: the number of active weights of {name} changes in masks.npz")
        nets.setdefault(name.split(".")[0], []).append(E)
    pairwise, curves = {}, {}
    for net, layers in nets.items():
        E = np.hstack(layers)  # [S, weights]
        pairwise[net] = pd.DataFrame(pairwise_sad(E), steps, steps)
        curves[f"ever/{net}"], curves[f"age_at_most/{net}"], curves[f"age_at_least/{net}"] = ever_and_age(E, steps)
    n, m = meta["n"], meta["m"]
    rowwise = not n or all(torch.equal(project(E.float(), n, m), E) for end in ends for E in end.values())
    return pairwise, pd.DataFrame(curves, steps), rowwise


def read_sad(folder: Path, *_) -> tuple[dict, pd.DataFrame, bool]:
    """What read_masks made of a run before it was thinned."""
    with np.load(folder / "sad.npz", allow_pickle=False) as file:
        data = dict(file)
    steps, rowwise = data.pop("global_step"), bool(data.pop("rowwise"))
    pairwise = {net: pd.DataFrame(x, steps, steps) for net, x in data.items() if x.ndim == 2}
    return pairwise, pd.DataFrame({key: x for key, x in data.items() if x.ndim == 1}, steps), rowwise


def load_all(folders: list[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The usable runs, and (name, reason) of the others."""
    runs, skipped = [], []
    for folder in tqdm(folders, desc="reading", unit="run", delay=2, disable=None):
        try:
            runs.append(load_run(folder))
        except Exception as error:  # whatever is wrong with one run, the others count
            other = f"damaged, or of another version ({type(error).__name__}: {first_line(error)})"
            skipped.append((folder.name, str(error) if isinstance(error, UserError) else other))
    return runs, skipped


def fetch_wandb(entity: str, project: str, folder: Path) -> list[tuple[str, str]]:
    """Write the files of each run of a W&B project into a folder of its own; (run, reason) of what can't be read."""
    import wandb

    try:
        runs = [run for run in wandb.Api().runs(f"{entity}/{project}") if run.job_type not in ("analysis", "benchmark")]
    except Exception as error:
        reason = f"W&B project {entity}/{project} can't be read ({first_line(error)})"
        raise UserError(f"{reason}: check both names, and log in with `wandb login`") from None
    skipped = []
    for run in tqdm(runs, desc="downloading", unit="run", disable=None):
        target = folder / run.id
        try:
            target.mkdir()
            names = {file.name for file in run.files()} & {"masks.npz", "meta.json"}
            if "meta.json" not in names:
                raise UserError("it has no meta.json, so it has not ended")
            rows = pd.DataFrame(run.scan_history())
            rows = rows[[key for key in rows if not key.startswith("_")]].apply(pd.to_numeric, errors="coerce")
            rows.to_csv(target / "metrics.csv", index=False)  # without videos
            for name in sorted(names):  # meta.json, which makes it a run, at last
                run.file(name).download(root=str(target), replace=True)
        except Exception as error:  # of the network, or of a run of another kind
            skipped.append((run.name, f"not read from W&B: {first_line(error)}"))
    return skipped


def evenly(length: int, number: int) -> np.ndarray:
    """Up to `number` indices of a list, evenly spaced, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(number, length)).round().astype(int))


def thin_run(run: Run, out: Path, window: float) -> None:
    """Copy what this script needs of a run: less than 100 kB that draw the same figures, coarser in time, no masks."""
    target = out / run.folder.name
    target.mkdir(parents=True)
    refreshes = run.metrics.filter(regex="^sad/").dropna(how="all").index
    kept = run.curve("eval/episodic_return").index.union(refreshes[evenly(len(refreshes), 40)])
    kept = kept.union(run.metrics.filter(regex="^plasticity/").dropna(how="all").index)
    if run.masks:
        steps = run.curves.index
        starts = [before_end(steps, back) for back in (window, 0.1 * run.args["total_timesteps"])]
        settled = [first_settled(E) for E in run.masks.values()]
        snapshots = np.union1d(evenly(len(steps), 40), [*starts, *settled, *(i - 1 for i in settled if i)])
        arrays = {net: E.iloc[snapshots, snapshots] for net, E in run.masks.items()} | dict(run.curves.iloc[snapshots])
        np.savez_compressed(target / "sad.npz", global_step=steps[snapshots], rowwise=run.rowwise, **arrays)
    run.metrics.loc[kept].to_csv(target / "metrics.csv", float_format="%.12g")
    meta = run.meta | {"args": run.args | {"runs_dir": "runs"}}  # where it was on some machine is nobody's concern
    (target / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# --- Numbers ------------------------------------------------------------------------------------------------------


def pairwise_sad(E: np.ndarray) -> np.ndarray:
    """SAD_{i:j} over twice the active weights, [S, S], of masks E [S, weights] that all have as many active ones."""
    active = E[0].sum(dtype=np.int64)
    floats = torch.from_numpy(E).float()
    common = (floats @ floats.T).numpy()  # exact: counts below 2**24
    return ((active - common) / active).astype(np.float32)  # |E_i - E_j|_0 = 2 * (active - common)


def ever_and_age(E: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """[3, S] of masks E [S, weights]: share ever active; mean age of the active in steps, at most and at least.

    Snapshots miss what comes and goes between them. So the share is a lower bound, and a weight that was inactive at
    one snapshot and is active at the next has been so since the former at most, and since the latter at least, if it
    did not leave and return later on.
    """
    E = E.astype(bool)
    after = np.full(E.shape[1], steps[0], dtype=np.float32)
    until, seen, found = after.copy(), E[0].copy(), [(E[0].mean(), 0.0, 0.0)]
    for i in range(1, len(E)):
        new = E[i] & ~E[i - 1]
        after[new], until[new] = steps[i - 1], steps[i]
        seen |= E[i]
        found.append((seen.mean(), *(steps[i] - since[E[i]].mean() for since in (after, until))))
    return np.array(found).T


def first_settled(pairwise: pd.DataFrame, threshold: float = 0.1) -> int:
    """Index of the snapshot from which on all are within `threshold` (SAD) of the final mask."""
    far = np.flatnonzero(pairwise.iloc[:, -1] >= threshold)
    return int(far[-1]) + 1 if len(far) else 0


def settled_step(pairwise: pd.DataFrame) -> float:
    """Environment step of first_settled; inf if only the last snapshot is.

    In the spirit of Early-Bird tickets (You et al., arXiv 1909.11957), which end a search when masks of five epochs
    differ by less than 0.1 of all weights. A mask that drifts for ever comes near its final state too.
    """
    first = first_settled(pairwise)
    return math.inf if first == len(pairwise) - 1 > 0 else float(pairwise.index[first])


def before_end(steps: np.ndarray, window: float) -> int:
    """Index of the last mask that masks.npz has of at least `window` steps before the last refresh."""
    return max(0, int(np.searchsorted(steps, steps[-1] - window, side="right")) - 1)


def settled_sad(run: Run, window: float) -> float:
    """SAD from the mask at least `window` steps before the last refresh to the final one, mean of the networks.

    NaN for dense, and with a K longer than the window: then no other mask is that young.
    """
    if not run.masks or run.interval > window:
        return math.nan
    return statistics.fmean(float(E.iloc[before_end(E.index, window), -1]) for E in run.masks.values())


def time_to(run: Run, score: float) -> tuple[float, float]:
    """Environment steps and core minutes (CPU time of training) until an evaluation first returns `score`, or inf."""
    returns = run.curve("eval/episodic_return")
    reached = returns.index[returns >= score]
    if not len(reached):
        return math.inf, math.inf
    return reached[0], run.curve("charts/cpu_time_s").get(reached[0], math.nan) / 60


def score_within(run: Run, minutes: float) -> float:
    """The score, had the run been stopped after so many core minutes: of as large a share of its evaluations as a final
    score is of all (of a rising curve the mean of more lags behind). NaN if no evaluation came before."""
    returns = run.curve("eval/episodic_return").drop(0, errors="ignore")
    share = min(10, (len(returns) + 1) // 2) / len(returns)  # as in final_score
    returns = returns[run.curve("charts/cpu_time_s").reindex(returns.index) / 60 <= minutes]
    return statistics.fmean(returns[-max(1, round(share * len(returns))) :]) if len(returns) else math.nan


def flops_per_update(meta: dict) -> float:
    """A product takes 2 * batch * active weights FLOPs. An update has one for the target actor and each target critic,
    3 for each critic (2 in its first layer, whose inputs need no gradient), and every policy_frequency-th time 3 for
    the actor (2 in its first layer) and 2 for the first critic."""
    nets = meta["modules"].items()
    active = {net: [part["active"] for part in parts if len(part.get("weight", ())) == 2] for net, parts in nets}
    actor, critics = active.pop("actor"), [*active.values()]
    products = sum(actor) + sum(4 * sum(layers) - layers[0] for layers in critics)
    products += (3 * sum(actor) - actor[0] + 2 * sum(critics[0])) / meta["args"]["policy_frequency"]
    return 2 * meta["args"]["batch_size"] * products


def iqm(scores: np.ndarray, axis: int = -1):
    """Interquartile mean over an axis: of the middle half (25 % trimmed at each end, rounded down)."""
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


def interval(groups: list[np.ndarray], statistic, resamples: int) -> np.ndarray:
    """95 % stratified percentile bootstrap, [2, ...]: each array [runs, ...] is resampled by its runs on its own.

    statistic takes the resampled arrays [resamples, runs, ...] and returns [resamples, ...]. NaN from one or two runs.
    """
    rng = np.random.default_rng(0)
    drawn = [group[rng.integers(len(group), size=(resamples, len(group)))] for group in groups]
    low_high = np.percentile(statistic(*drawn), [2.5, 97.5], axis=0)
    return low_high if min(map(len, groups)) > 2 else np.full_like(low_high, np.nan)


def estimate(key: str, groups: list[np.ndarray], statistic, resamples: int) -> dict[str, float]:
    """A statistic (as in interval) of the groups themselves, and its interval, as columns of a table."""
    low, high = interval(groups, statistic, resamples)
    return {key: float(statistic(*(group[None] for group in groups))[0]), f"{key}_low": low, f"{key}_high": high}


def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that a run of x has a higher score than one of y, ties half: [..., runs] each -> [...]."""
    difference = x[..., :, None] - y[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1))


def relative(*drawn: np.ndarray) -> np.ndarray:
    """Scores and dense scores in turns, [resamples, runs] each -> IQM of all scores over their IQMs of dense."""
    parts = [x / iqm(dense)[:, None] for x, dense in zip(drawn[::2], drawn[1::2], strict=True)]
    return iqm(np.concatenate(parts, axis=1))


def correlation(*drawn: np.ndarray) -> np.ndarray:
    """Correlation of ranks within each group [resamples, runs, 2], pooled -> [resamples]; of one group Spearman's.

    What sets groups apart, such as K, neither makes nor hides it. A constant resample has none and is left out.
    """
    ranks = [scipy.stats.rankdata(group, axis=1) / group.shape[1] for group in drawn]
    a, b = np.moveaxis(np.concatenate([r - r.mean(axis=1, keepdims=True) for r in ranks], axis=1), 2, 0)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return (a * b).sum(axis=1)[norm > 0] / norm[norm > 0]


# --- Matching -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Configuration:
    label: str  # such as "1:8, K = 100"
    runs: list[Run]  # by seed
    look: dict  # colour and line
    marker: str

    def __post_init__(self):
        self.first = self.runs[0]  # for what all of them have in common
        self.scores = np.array([run.meta["final_score"] for run in self.runs])
        self.moving = any(len(E) > 1 for run in self.runs for E in run.masks.values())  # others have no SAD but 0


@dataclass
class Study:
    """Runs of one setting."""

    name: str  # for titles: environment, steps and what else is special
    setting: dict
    configurations: list[Configuration]  # dense first

    def __post_init__(self):
        self.moving = [c for c in self.configurations if c.moving]
        # Whose minutes compare: most runs of a configuration, on the machine on which most of dense's ran, one kernel.
        dense = self.plain("dense", DEFAULTS["hidden_dim"]) or self.configurations[0]
        self.machine = Counter(run.machine for run in dense.runs).most_common(1)[0][0]
        self.timed = {c: [run for run in c.runs if run.machine == self.machine] for c in self.configurations}
        for c, runs in self.timed.items():
            few = len(runs) <= len(c.runs) / 2
            if few or len({run.kernel for run in runs}) > 1 or any(math.isnan(run.minutes) for run in runs):
                self.timed[c] = []
        self.nets = list(dict.fromkeys(net for c in self.configurations for run in c.runs for net in run.masks))
        # Of settled SAD, in steps: a tenth of training, or the longest K up to a quarter.
        total, Ks = self.setting["total_timesteps"], [c.first.interval for c in self.moving]
        self.window = max(0.1 * total, *(K for K in Ks if K <= total / 4), 0)

    def plain(self, pattern: str, width: int) -> Configuration | None:
        """The project's own with all else at its default; of several codes the one with the most seeds."""
        found = [c for c in self.configurations if c.first.pattern == pattern and c.first.width == width]
        found = [c for c in found if not c.first.fork and method_words(c.first).keys() <= {"hidden_dim"}]
        return max(found, key=lambda c: len(c.runs), default=None)

    def dense(self, c: Configuration) -> Configuration | None:
        """What a configuration is compared with: dense of the same width, for dense ones of the default width."""
        return self.plain("dense", DEFAULTS["hidden_dim"] if c.first.pattern == "dense" else c.first.width)

    def pairs(self, c: Configuration) -> np.ndarray:
        """[runs, 2]: settled SAD and final score, of the runs that have both."""
        pairs = np.stack([[settled_sad(run, self.window) for run in c.runs], c.scores], axis=1)
        return pairs[~np.isnan(pairs[:, 0])]


def method_words(run: Run) -> dict[str, str]:
    """Argument -> its name in a label, of all that tell configurations apart and are not at their default."""
    found = [key for key, names in IN_PATTERN.items() if not run.meta["n"] and {*names} <= run.args.keys()]
    method = found[0] if found else None  # a fork may have some of these names, too
    words, defaults = {}, DEFAULTS | {"topology": RLX2, "critic_regime": MST}.get(method, {})
    named = {"n", "m", *SETTING, *NEUTRAL}
    if run.pattern != "dense":
        named |= {*IN_PATTERN.get(method, ())}
    elif method and not run.fork:
        named |= {*IN_PATTERN[method], *MST}  # of masks, which it has not
    for name in dict.fromkeys([*WORDS, *run.args]):
        value = run.args.get(name)
        if name not in named and value not in (None, defaults.get(name)):
            text = f"{value:,}" if type(value) is int else value
            words[name] = WORDS.get(name, f"{name} {{}}").format(text)
    if words.get("mask_update_interval") == "K = 0":
        words["mask_update_interval"] = "static masks"
    return words


def count_active(meta: dict, biases: bool) -> int:
    """Active parameters of the online networks, or active weights alone."""
    if biases:
        return meta["params_active"]
    return sum(part.get("active", 0) for parts in meta["modules"].values() for part in parts)


def dense_twins(runs: list[Run]) -> dict[int, str]:
    """Width of a narrow dense network -> the pattern that keeps as many weights (within 3 %; of N:M biases count);
    one for each pattern."""
    own, twins = [run for run in runs if not run.fork and not run.args.get("sparse_head")], {}
    for run in own:
        if run.pattern != "dense" and run.width == DEFAULTS["hidden_dim"]:
            narrow = [other for other in own if other.pattern == "dense" and other.width != run.width]
            biases = bool(run.meta["n"])
            size = count_active(run.meta, biases)
            gaps = [(abs(count_active(other.meta, biases) / size - 1), other.width) for other in narrow]
            gap, width = min(gaps, default=(1, 0))
            name = f"as many weights as {run.pattern.split()[-1]}"
            if gap <= 0.03 and name not in twins.values():
                twins.setdefault(width, name)
    return twins


def configure(runs: list[Run]) -> tuple[list[Configuration], list[tuple[str, str]]]:
    """The configurations of one setting, dense first; (run, reason) of runs that a later one replaces.

    A label has all that tells configurations apart: pattern, arguments that are not at their default, a fork's name,
    and the code where a script was run with several. So the runs of one label are seeds of one configuration.
    """
    twins, codes, found, replaced, configurations = dense_twins(runs), {}, {}, [], []
    for run in runs:
        codes.setdefault((run.meta["script"], run.fork), set()).add(run.code)
    for run in sorted(runs, key=lambda run: run.start):
        words = method_words(run)
        if run.pattern == "dense" and not run.fork and run.width in twins:
            words["hidden_dim"] = twins[run.width]
        several = len(codes[run.meta["script"], run.fork]) > 1
        words = [run.pattern, *words.values(), run.fork, run.code * several]
        seeds = found.setdefault(", ".join(filter(None, words)), {})
        if old := seeds.get(run.args["seed"]):
            replaced.append((old.name, f"same configuration and seed as the later {run.name}"))
        seeds[run.args["seed"]] = run
    groups = [(label, [seeds[seed] for seed in sorted(seeds)]) for label, seeds in found.items()]
    groups.sort(key=lambda item: (place(item[1][0]), in_words_and_numbers(item[0])))
    for label, group in groups:
        color = pattern_color(group[0].pattern)
        i = sum(pattern_color(c.first.pattern) == color for c in configurations) % 8
        look = {"color": shade(color, i), "linestyle": LINES[i]}
        configurations.append(Configuration(label, group, look, MARKERS[i]))
    return configurations, replaced


def in_words_and_numbers(label: str) -> list[str | float]:
    """A label as a key that sorts K = 500 before K = 1,000."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", label.replace(",", ""))  # words and numbers in turns
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def place(run: Run) -> tuple[int, float]:
    """Dense first, N:M by density, then the others, of these the ones without N:M first."""
    if run.pattern == "dense":
        return 0, 0.0
    return (1, -run.meta["n"] / run.meta["m"]) if run.meta["n"] else (2, ":" in run.pattern)


def make_studies(runs: list[Run]) -> tuple[list[Study], list[tuple[str, str]]]:
    """One study for each setting; (run, reason) of runs that a later one replaces."""
    settings, studies, replaced = {}, [], []
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    varying = {pair for setting in settings for pair in setting if any(pair not in other for other in settings)}
    for setting, members in sorted(settings.items(), key=lambda item: str(item[0])):
        configurations, old = configure(members)
        replaced += old
        values = dict(setting)
        extra = [f"{key} {values[key]}" for key, _ in sorted(varying & {*setting}) if key not in SETTING[:2]]
        name = ", ".join([values["env_id"], f"{values['total_timesteps']:,} steps", *extra])
        studies.append(Study(name, values, configurations))
    return studies, replaced


# --- Figures ------------------------------------------------------------------------------------------------------

# --- shared: colors ---
# Okabe and Ito's colours first, one for each pattern everywhere.
PATTERNS = "dense 2:4 1:4 1:8 1:16 4:8 2:8 1:2 3:4 1:32 2:16 4:16".split()
PATTERNS += "RLx2 RigL SET static MST".split()  # methods without structure, whatever their sparsity
CODES = "000000 0072B2 E69F00 009E73 CC79A7 56B4E9 D55E00 882255 AA8800 332288 6699CC 44AA99".split()
CODES += "D62728 9467BD 17BECF 8C564B E377C2".split()
COLORS = {pattern: f"#{code}" for pattern, code in zip(PATTERNS, CODES, strict=True)}


def pattern_color(pattern: str) -> str:
    """Of its letters where it is not in COLORS, so that it is the same everywhere."""
    found = COLORS.get(pattern) or COLORS.get(pattern.split()[0])
    return found or to_hex(colormaps["turbo"](sum(37**i * ord(x) for i, x in enumerate(pattern)) % 97 / 97))


# --- end shared ---


# Configurations of one colour differ in the line and in how much white (positive) or black is mixed in.
SHADES = [0, 0.4, -0.4, 0.6, -0.6, 0.2, -0.2, 0.7]
LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (8, 2, 1, 2))]
MARKERS = "osD^vP*X"
STEPS = "thousand environment steps"
rc("font", size=8)
rc("axes", grid=True, titlesize=9)
rc("axes.spines", top=False, right=False)
rc("grid", alpha=0.3, linewidth=0.5)


def shade(color: str, i: int) -> str:
    """The i-th shade of a colour."""
    share = abs(SHADES[i])
    return to_hex([(1 - share) * x + share * (SHADES[i] > 0) for x in to_rgb(color)])


def new_figure(title: str, rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(7, 2.3 * columns), height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 95), fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in (axis for ax in axes.flat for axis in (ax.xaxis, ax.yaxis)):
        axis.set_major_formatter("{x:,.10g}")
    return figure, axes


def add_legend(figure: Figure) -> Figure:
    """One legend below the panels, where it covers no data."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in figure.axes]
    handles = {label: handle for handle, label in itertools.chain(*pairs)}
    columns = max(1, min(3, 100 // (max(map(len, handles), default=0) + 5)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def band(ax, c: Configuration, curves: list[pd.Series], resamples: int, clock=None, shaded=True) -> None:
    """IQM over seeds, its 95 % bootstrap band if `shaded`, and each seed faintly, where all have a value; over thousand
    steps, or over the `clock` at each step."""
    table = pd.concat(curves, axis=1, join="inner").dropna()
    if len(table):
        table = table.iloc[evenly(len(table), 300)]
        x = table.index * 1e-3 if clock is None else clock[table.index]
        rows, marker = table.to_numpy().T, "." if len(table) < 3 else None
        label = f"{c.label} ({count(len(rows), 'seed')})"
        ax.plot(x, iqm(rows, axis=0), linewidth=1.2, label=label, clip_on=False, marker=marker, **c.look)
        if len(rows) > 1:
            ax.plot(x, rows.T, linewidth=0.5, alpha=0.4, color=c.look["color"])
        if shaded and len(rows) > 3:  # of fewer it is their range
            low, high = interval([rows], lambda drawn: iqm(drawn, axis=1), resamples)
            ax.fill_between(x, low, high, color=c.look["color"], alpha=0.15, linewidth=0)


def draw_curves(study: Study, title: str, labels: dict, parts: list, resamples: int, shown=None) -> Figure:
    """A row of panels for each of `parts`, such as (actor/fc1, qf1/fc1), and each kind of curve in `labels`."""
    rows = [(names, key, label) for names in parts for key, label in labels.items()]
    size = len(rows), len(parts[0]), 1.2 + 1.9 * len(rows)
    figure, axes = new_figure(f"{title}: {study.name}", *size, sharex=True, sharey="row")
    for panels, (names, key, label) in zip(axes, rows, strict=True):
        for ax, name in zip(panels, names, strict=True):
            for c in shown or study.moving:
                band(ax, c, [run.curve(key.format(name)) for run in c.runs], resamples)
            ax.set_title(str(name).replace("/", ", "))
            ax.set_visible(name is not None)  # a network may have fewer layers than others
        panels[0].set(ylabel=label, **({"yscale": "log"} if "gradient" in key else {"ylim": (0, None)}))
    for ax in axes[-1]:
        ax.set_xlabel(STEPS)
    return add_legend(figure)


SADS = {"sad/{}": "SAD to the previous\nmask (of active)", "sad_initial/{}": "SAD to the first\nmask (of active)"}
AGES = {
    "ever/{}": "ever active in a kept\nmask (share of all)",
    "age_at_most/{}": "mean age of the active,\nat most (steps)",
}
AGES["age_at_least/{}"] = "mean age of the active,\nas kept masks tell (steps)"


def draw_sad(study: Study, resamples: int) -> Figure:
    """1: SAD over training by network, against the previous and against the first mask."""
    return draw_curves(study, "How masks change", SADS, [study.nets], resamples)


def draw_layers(study: Study, resamples: int) -> Figure | None:
    """1: the same by layer, the first sparse layer of each network in the first rows."""
    keys = dict.fromkeys(key for c in study.moving for run in c.runs for key in run.metrics)
    layers = [[key.removeprefix("sad/") for key in keys if key.startswith(f"sad/{net}/")] for net in study.nets]
    parts = [*itertools.zip_longest(*layers)]  # none, where a fork logs no SAD
    return draw_curves(study, "How masks change, by layer", SADS, parts, resamples) if parts else None


def draw_ages(study: Study, resamples: int) -> Figure:
    """2: share of weights ever active, and mean age of the active ones, as the masks tell that are in masks.npz."""
    title = "Which weights were ever active, and for how long (with another K other masks are kept)"
    return draw_curves(study, title, AGES, [study.nets], resamples)


PLASTICITY = {
    "dormant": "dormant units\n(share)",
    "srank": "srank of the\nfeatures",
    "feature_norm": "norm before the\nlast LayerNorm",
}
PLASTICITY |= {"weight_norm": "norm of the\nweights", "gradient_norm": "norm of the\ngradient"}
PLASTICITY |= {"ever_active": "ever active\n(share)", "grown_norm": "outside the first mask\n(share of squared norm)"}


def draw_plasticity(study: Study, resamples: int) -> Figure | None:
    """3: what mst_td3_continuous.py logs of its networks."""
    labels = {f"plasticity/{{}}/{key}": label for key, label in PLASTICITY.items()}
    keys = dict.fromkeys(key for c in study.configurations for key in c.first.metrics)
    nets = [key.split("/")[1] for key in keys if key.endswith("/srank")]
    return draw_curves(study, "Plasticity", labels, [nets], resamples, study.configurations) if nets else None


def draw_divergence(study: Study, _resamples: int) -> Figure:
    """2: SAD_{i:j} between all snapshots that the seeds share, mean over these."""
    size = len(study.moving), len(study.nets), 1.6 + min(1.75 * len(study.moving), 7.4)
    figure, axes = new_figure(f"SAD between the masks at two times: {study.name}", *size)
    for row, c in zip(axes, study.moving, strict=True):
        for ax, net in zip(row, study.nets, strict=True):
            every = [run.masks[net] for run in c.runs if net in run.masks]
            ax.set_visible(bool(every))
            if every:
                common = functools.reduce(pd.Index.intersection, [E.index for E in every])
                group, steps = [E.loc[common, common] for E in every], common * 1e-3
                edges = [steps[0], *(steps[1:] + steps[:-1]) / 2, steps[-1]]  # a cell around each snapshot
                image = ax.pcolormesh(edges, edges, np.mean(group, axis=0), vmin=0, vmax=1, rasterized=True)
                ax.set(title=f"{net} ({count(len(group), 'seed')})", aspect="equal")
                ax.grid(False)
        row[0].set_ylabel(f"{textwrap.fill(c.label, 25)}\nthousand steps")
    for ax in axes[-1]:
        ax.set_xlabel("thousand steps")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("SAD (share of active weights)")
    return figure


def draw_sad_return(study: Study, resamples: int) -> Figure:
    """3: each run a point."""
    texts = correlation_texts(study, resamples)
    height = 3.8 + 0.2 * (len(study.moving) + len(texts))
    figure, ((ax,),) = new_figure(f"Does settling go with return? {study.name}", 1, 1, height)
    for c in study.moving:
        label = f"{c.label} ({count(len(study.pairs(c)), 'run')})"
        ax.scatter(*study.pairs(c).T, color=c.look["color"], marker=c.marker, s=22, alpha=0.8, label=label)
    what = f"SAD from the mask at least {study.window:,.0f} steps before the last refresh to the final one"
    ax.set(xlabel=f"settled {what} (of active)", ylabel="final score")
    ax.set_title("\n".join(textwrap.fill(text, 110) for text in texts), fontsize=8, loc="left")
    return add_legend(figure)


def draw_interval(study: Study, resamples: int) -> Figure | None:
    """4: mask-update interval K against return and SAD, for configurations that differ in K alone."""
    families = {}
    for c in study.configurations:
        if c.first.pattern != "dense" and not math.isnan(c.first.interval):
            family = ", ".join(word for word in c.label.split(", ") if not re.match("K = |static masks", word))
            families.setdefault(family, {})[c.first.interval or math.inf] = c
    families = {name: dict(sorted(found.items())) for name, found in families.items() if len(found) > 1}
    if not families:
        return None
    order = sorted({K for found in families.values() for K in found})
    figure, (axes,) = new_figure(f"How often should masks move? {study.name}", 1, 2, 3.4)
    for i, (name, found) in enumerate(families.items()):
        color = pattern_color(next(iter(found.values())).first.pattern)
        look = {"color": color, "marker": MARKERS[i % 8], "linestyle": LINES[i % 8]}
        scores = {K: c.scores for K, c in found.items()}
        moved = {K: np.array([settled_sad(run, math.inf) for run in c.runs]) for K, c in found.items()}
        for ax, values in zip(axes, (scores, moved), strict=True):
            for K, value in values.items():
                if len(value) > 3:  # of fewer it is their range
                    ax.plot([order.index(K)] * 2, interval([value], iqm, resamples), color=look["color"])
                ax.plot(order.index(K), iqm(value), **look)
            line = [K for K in values if K < math.inf]  # static masks are no longer K
            ax.plot([order.index(K) for K in line], [iqm(values[K]) for K in line], label=name, **look)
    labels = "final score (IQM; of over three\nseeds with a 95 % interval)", "SAD of the last to the first mask"
    for ax, y in zip(axes, labels, strict=True):
        ax.set(xlabel="K, updates between refreshes", ylabel=y)
        ax.set_xticks(range(len(order)), [f"{K:,.0f}" if K < math.inf else "static" for K in order])
    return add_legend(figure)


def draw_minutes(ax, study: Study, c: Configuration, resamples: int, shaded=True) -> None:
    """Returns over CPU time, where it is known: at each step the median of the seeds."""
    if runs := study.timed[c]:
        clock = pd.concat([run.metrics["charts/cpu_time_s"] / 60 for run in runs], axis=1).median(axis=1)
        band(ax, c, [run.curve("eval/episodic_return") for run in runs], resamples, clock, shaded)


def draw_returns(study: Study, resamples: int) -> Figure:
    """5: learning curves over steps and CPU time (if not only dense's is known)."""
    patterns = {}
    for c in study.configurations:
        patterns.setdefault(c.first.pattern.split()[-1], []).append(c)  # "RLx2 96/88" beside "SET 96/88"
    dense = patterns.pop("dense", [])
    rows = [(own, i) for own in patterns.values() for i in range(1, max(2, len(own)), 2)]  # its first and two others
    rows = [[*dense, own[0], *own[i : i + 2]] for own, i in rows] or [dense]
    columns = 1 + any(study.timed[c] for row in rows for c in row[len(dense) :] or row)
    size = len(rows), columns, 1.4 + 2 * len(rows) + 0.08 * len(study.configurations)
    figure, axes = new_figure(f"Return of the noise-free policy: {study.name}", *size, sharex="col", sharey=True)
    for panels, row in zip(axes, rows, strict=True):
        own = row[len(dense) :] or row
        shaded = row[0], own[0]  # more bands would hide each other
        for c in row:
            band(panels[0], c, [run.curve("eval/episodic_return") for run in c.runs], resamples, shaded=c in shaded)
            if columns == 2:
                draw_minutes(panels[1], study, c, resamples, c in shaded)
        kind = "IQM" + ", 95 % band" * (max(len(c.runs) for c in shaded) > 3)
        panels[0].set_ylabel(f"evaluation return\n({kind}; faint: seeds)")
        panels[0].set_title("; ".join(c.label for c in own), loc="left")
    elsewhere = "; what is missing ran elsewhere" * any(len(runs) < len(c.runs) for c, runs in study.timed.items())
    minutes = "core minutes of training (CPU time, no evaluations; at each step the median of the seeds) on "
    for ax, label in zip(axes[-1], (STEPS, textwrap.fill(minutes + study.machine + elsewhere, 48)), strict=False):
        ax.set_xlabel(label)
    return add_legend(figure)


def draw_scores(study: Study, resamples: int) -> Figure:
    """5: final scores, a point for each seed."""
    figure, ((ax,),) = new_figure(f"Final scores: {study.name}", 1, 1, 1.2 + 0.32 * len(study.configurations))
    for place, c in enumerate(study.configurations):
        color = c.look["color"]
        ax.scatter(c.scores, [place] * len(c.runs), color=color, s=14, alpha=0.5, linewidths=0)
        ax.plot(interval([c.scores], iqm, resamples), [place] * 2, color=color, marker="|", markersize=5)
        ax.plot(iqm(c.scores), place, color=color, marker="|", markersize=12, markeredgewidth=1.5)
    ax.set_yticks(range(place + 1), [f"{c.label} ({len(c.runs)})" for c in study.configurations])
    ax.invert_yaxis()
    ax.set(xlabel="mean of the last evaluations; dots: seeds, bar: IQM with 95 % interval")
    return figure


FIGURES = {"returns": draw_returns, "scores": draw_scores, "sad": draw_sad, "sad_layers": draw_layers}
FIGURES |= {"ages": draw_ages, "divergence": draw_divergence, "interval": draw_interval, "sad_return": draw_sad_return}
FIGURES |= {"plasticity": draw_plasticity}


# --- Tables -------------------------------------------------------------------------------------------------------

ABOUT = """# Runs compared

In brackets: 95 % bootstrap intervals over seeds ({resamples:,} resamples). One or two seeds have none, and of few
they are too narrow: they hold the mean of three in about 75 %, of five in about 84 % of cases. No correction for many
comparisons. The IQM of up to three seeds is their mean. Each configuration is compared with the dense script's and
with its pattern's default one; of several codes of those, with the one that has the most seeds. Of dense: the ratio of
the IQMs of all seeds (dense's are named if they are others), where every dense run scored above zero. Gain: mean
difference of the scores of equal seeds (in pairs). P better: probability that a run scores more than a dense one (at 0
and 1 its interval says nothing). Skipped runs, those that diverged among them, are in no mean. Core minutes: CPU time
of training, median of the seeds that ran on the kind of CPU (with as many threads) on which most of dense's did, if
they are more than half, the fastest and the slowest; "Ran on" tells where the others ran. Settled SAD: mean over
seeds. Settled step: from there on the mask is within 10 % of the final one, at the latest (median; inf: only the final
mask is).
"""
TIMES = """Steps and core minutes until an evaluation first returned 50, 75, 90 % of dense's score: medians (of an
even number the higher one); inf: half of the seeds or more never did. One evaluation is enough, also in a run that
scores less in the end. Gain at equal core minutes: as gain, but of the two runs of a seed the one that used more CPU
time is stopped when it had used as much as the other; its score is of as large a share of its evaluations. Other work
on the machine adds to core minutes."""
# Columns that the first table leaves out.
HIDDEN = f"setting|script|exp_name|n|m|kernel|.*_low|.*_high|.*_to_..|gain_at_.*|{'|'.join(DEFAULTS)}"
COLUMNS = "dense of_dense gain gain_pairs p_better default default_gain default_gain_pairs".split()


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def span(row: dict, key: str) -> str:
    """A number of a row, to three digits if not whole, with its interval if it has one."""
    if isinstance(row[key], str):
        return row[key]
    found = [row[name] for name in (key, f"{key}_low", f"{key}_high") if not pd.isna(row.get(name))]
    texts = [f"{x:,.0f}" if abs(x) >= 100 or float(x).is_integer() else f"{x:.3g}" for x in found]
    return "".join(texts[:1]) + f" [{', '.join(texts[1:])}]" * (len(texts) > 1)


def correlation_texts(study: Study, resamples: int) -> list[str]:
    """For each pattern and for all together; static masks, which have no SAD, are left out."""
    groups, texts = {}, []
    for c in study.moving:
        groups.setdefault(c.first.pattern, []).append(study.pairs(c))
    if len(groups) > 1:
        groups["all"] = [*itertools.chain(*groups.values())]
    for name, found in groups.items():
        found = [pairs for pairs in found if len(pairs) > 2 and (np.ptp(pairs, axis=0) > 0).all()]
        total = sum(map(len, found))
        text = f"{name}: too few runs of a configuration to correlate"
        if total >= 3:
            rho = estimate("rho", found, correlation, resamples)
            rho = span(rho, "rho") if total >= 10 else f"{rho['rho']:.2f} (too few runs to conclude)"
            what = f"{count(total, 'run')} of {count(len(found), 'configuration')}"
            text = f"{name}: rank correlation within each configuration {rho}, {what}"
        texts.append(text)
    return texts


def paired_difference(key: str, c: Configuration, other: Configuration, resamples: int, stop=False) -> dict[str, float]:
    """Mean difference of the scores of equal seeds, with its interval and the number of pairs; with `stop` both runs of
    a pair end when they have used as much CPU time as the one that used less."""
    seeds = ([run.args["seed"] for run in one.runs] for one in (c, other))
    _, own, others = np.intersect1d(*seeds, return_indices=True)
    pairs = [(c.runs[i], other.runs[j]) for i, j in zip(own, others, strict=True)]
    gains = c.scores[own] - other.scores[others]
    if stop:
        ends = [min(one.minutes, two.minutes) for one, two in pairs]
        both = ([score_within(run, end) for run in pair] for pair, end in zip(pairs, ends, strict=True))
        gains = np.array([a - b for a, b in both])
        gains = gains[~np.isnan(gains)]  # a run without an evaluation until then has no score
    row = estimate(key, [gains], lambda drawn: drawn.mean(axis=1), resamples) if len(gains) else {}
    return row | {f"{key}_pairs": len(gains)}


def configuration_row(study: Study, c: Configuration, resamples: int) -> dict:
    meta, args, dense = c.first.meta, c.first.args, study.dense(c)
    row = {"setting": study.name, "configuration": c.label, "script": meta["script"], "exp_name": args["exp_name"]}
    row |= {name: args.get(name) for name in ("n", "m", *DEFAULTS)} | {"seeds": len(c.runs)}
    row |= estimate("final_score_iqm", [c.scores], iqm, resamples) | dict.fromkeys(COLUMNS)  # in this order
    if dense and dense is not c:
        seeds = [sorted(run.args["seed"] for run in one.runs) for one in (c, dense)]
        few = f" (seed{'s' * (len(seeds[1]) > 1)} {', '.join(map(str, seeds[1]))})" * (seeds[0] != seeds[1])
        row |= {"dense": dense.label + few} | paired_difference("gain", c, dense, resamples)
        row |= estimate("p_better", [c.scores, dense.scores], better, resamples)
        if (dense.scores > 0).all():  # a share of a negative return means nothing
            row |= estimate("of_dense", [c.scores, dense.scores], relative, resamples)
    default = study.plain(c.first.pattern, c.first.width)  # such as 1:8, for 1:8 with another K
    if default and default is not c and c.first.pattern != "dense":
        row |= {"default": default.label} | paired_difference("default_gain", c, default, resamples)
    row |= {"active_parameters": c.first.active, "mflop_per_update": c.first.flops / 1e6}
    timed = study.timed[c]
    minutes = [run.minutes for run in timed] or [math.nan]
    row |= {"core_minutes": statistics.median(minutes), "fastest_seed": min(minutes), "slowest_seed": max(minutes)}
    row["kernel"] = ", ".join(sorted({run.kernel for run in c.runs}))
    row["settled_sad"] = pd.Series(study.pairs(c)[:, 0]).mean()
    for net in study.nets:
        steps = [settled_step(run.masks[net]) for run in c.runs if net in run.masks]
        row[f"settled_step/{net}"] = statistics.median_high(steps) if steps else math.nan
    for percent in (50, 75, 90) if dense and (dense.scores > 0).all() else ():
        target = percent / 100 * iqm(dense.scores)
        row[f"steps_to_{percent}"] = statistics.median_high(time_to(run, target)[0] for run in c.runs)
        minutes = [time_to(run, target)[1] for run in timed]
        row[f"core_minutes_to_{percent}"] = statistics.median_high(minutes) if timed else math.nan
    if dense and dense is not c and timed and study.timed[dense]:
        two = (replace(one, runs=study.timed[one]) for one in (c, dense))
        gain = paired_difference("gain_at_equal_core_minutes", *two, resamples, stop=True)
        row |= gain if len(gain) > 1 else {}
    return row


def pooled_rows(studies: list[Study], resamples: int) -> list[dict]:
    """Scores relative to dense over the environments of otherwise equal settings: IQM, stratified by environment.

    Environments in which a dense run scored below zero are not in it; the others count by their number of seeds.
    """
    rows, pools = [], {}
    for study in studies:
        env_id, _, rest = study.name.partition(", ")
        for c in study.configurations:
            dense = study.dense(c)
            if dense and dense is not c and (dense.scores > 0).all():
                label = c.label.removesuffix(f", {c.first.code}")  # which it has where a script ran with several
                pool = pools.setdefault((rest, label, c.first.code, dense.first.code), {})
                pool[env_id] = c.scores, dense.scores
    for (rest, label, *_), found in pools.items():
        if len(found) > 1:
            names, seeds = " + ".join(found), " + ".join(str(len(scores)) for scores, _ in found.values())
            row = {"setting": f"{names}, {rest}: relative to dense", "configuration": label, "seeds": seeds}
            rows.append(row | estimate("of_dense", [*itertools.chain(*found.values())], relative, resamples))
    return rows


def condition_texts(study: Study) -> list[str]:
    """The conditions, and the configurations that ran so."""
    found = {}
    for label, run in [(c.label, run) for c in study.configurations for run in c.runs]:
        found.setdefault(through(run.meta, conditions), {})[label] = None
    return [f"{text}: {'; '.join(labels)}" for text, labels in found.items()]


def study_lines(study: Study, resamples: int) -> list[str]:
    """What stands below a study's table."""
    lines, alone = [], [c.label for c in study.configurations if c.first.pattern != "dense" and not study.dense(c)]
    settled = f"Settled SAD (from the mask at least {study.window:,.0f} steps before the last refresh to the final one)"
    sections = {
        "Not compared with dense, for want of dense runs of the same setting and width:": alone,
        f"{settled} and final score, within configurations:": correlation_texts(study, resamples),
        "Ran on:": condition_texts(study),
    }
    for title, texts in sections.items():
        lines += [title, "", *(f"- {text}" for text in texts), ""] if texts else []
    return lines


def table(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    cells = [[re.sub("( to ..)$", r"\1 %", key.replace("_", " ")) for key in keys], ["---"] * len(keys)]
    cells += [[span(row, key) for key in keys] for row in frame.to_dict("records")]
    return [*(f"| {' | '.join(line)} |" for line in cells), ""]


def write_summary(out: Path, studies: list[Study], skipped: list[tuple[str, str]], resamples: int) -> pd.DataFrame:
    """Write summary.csv and summary.md; returns the table."""
    rows = [configuration_row(study, c, resamples) for study in studies for c in study.configurations]
    frame = pd.DataFrame(rows + pooled_rows(studies, resamples))
    frame.to_csv(out / "summary.csv", index=False)
    lines, notes = [ABOUT.format(resamples=resamples)], {study.name: study_lines(study, resamples) for study in studies}
    for name, part in frame.groupby("setting", sort=False):
        keys = list(part.dropna(axis=1, how="all"))
        times = [key for key in keys if re.fullmatch(".*_to_..|gain_at_equal_core_minutes(_pairs)?", key)]
        lines += [f"## {name}", "", *table(part, [key for key in keys if not re.fullmatch(HIDDEN, key)])]
        lines += [TIMES, "", *table(part, ["configuration", "seeds", *times])] if times else []
        lines += notes.get(name, [])
    if skipped:
        lines += ["## Skipped", "", *(f"- {name}: {reason}" for name, reason in skipped), ""]
    (out / "summary.md").write_text("\n".join(lines))
    return frame


# --- shared: wandb ---
def say(text: str) -> None:
    """Print, whether or not somebody still reads (`| head`): what is left unwritten would change the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_wandb(args: Args, job: str, out: Path, tables: dict[str, list[dict]], figures: list[Path]) -> None:
    """A W&B run with the same figures and tables; offline without a login."""
    try:
        import wandb

        online = os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=args.wandb_project_name or "nm-sparse-rl",
            entity=args.wandb_entity,
            job_type=job,
            name=f"{job}_{out.resolve().name}",
            config=vars(args),
            mode=None if online else "offline",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=600),
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


def draw(study: Study, out: Path, resamples: int) -> list[Path]:
    """Write the figures of a study as PNG and SVG; returns the PNGs."""
    names = FIGURES if study.moving else ("returns", "scores", "plasticity")
    figures = {name: figure for name in names if (figure := FIGURES[name](study, resamples))}
    if missing := [name for name in FIGURES if name not in (*figures, "plasticity")]:  # which is MST's
        reason = "for want of refreshed masks (interval: of several K)"
        print(f"note: not drawn of {study.name}, {reason}: {', '.join(missing)}", file=sys.stderr)
    file = re.sub(r"[^a-zA-Z0-9_.-]+", "_", study.name)
    for name, kind in itertools.product(FIGURES, ("png", "svg")):
        path = out / f"{file}_{name}.{kind}"
        path.unlink(missing_ok=True)  # of an earlier analysis, maybe of other runs
        if name in figures:
            figures[name].savefig(path, dpi=150)
            figures[name].set_layout_engine(None)  # as it is found, the SVG keeps it
    return [out / f"{file}_{name}.png" for name in figures]


def analyse(args: Args, folders: list[Path], skipped: list[tuple[str, str]]) -> None:
    """Read, compare, draw and write; `skipped`: runs that could not be had, with the reason."""
    runs, bad = load_all(folders)
    for run in runs if args.pool_code else ():
        run.code = ""
    studies, replaced = make_studies(runs)
    skipped = skipped + bad + replaced
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if not runs:
        raise UserError(f"no usable run ({len(skipped)} skipped, see above): name folders of finished runs")
    used = [run for study in studies for c in study.configurations for run in c.runs]
    name, number = Counter(run.folder.name for run in used).most_common(1)[0]
    if args.thin and number > 1:
        raise UserError(f"--thin: {number} folders of runs are called {name}, rename them")
    out, figures = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    frame = write_summary(out, studies, skipped, args.resamples)
    for study in studies:
        figures += draw(study, out, args.resamples)
        for run in itertools.chain(*(c.runs for c in study.configurations)) if args.thin else ():
            thin_run(run, Path(args.thin), study.window)
    say((out / "summary.md").read_text())
    if args.track:
        table = frame.astype(object).where(frame.notna(), None).to_dict("records")
        log_wandb(args, "analysis", out, {"summary": table}, figures)
    say(f"{count(len(runs) - len(replaced), 'run')}, {len(skipped)} skipped: figures and tables are in {out}")


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
            from_wandb = args.wandb_entity, args.wandb_project_name, Path(scratch)
            skipped = fetch_wandb(*from_wandb) if args.wandb_project_name else []
            analyse(args, find_folders(args.runs or (scratch,)), skipped)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}: make room or name other folders with --out and --thin", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
