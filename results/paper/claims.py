"""Where the paper's claims stand, from the runs here: `python results/paper/claims.py` prints it for README.md;
`python results/paper/claims.py results/paper/curves.png` also draws the first figure of the main README.md.

The rules are those of rules.md: a claim is judged when all its seeds are in, by 95 % bootstrap intervals over them.
"""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sad_analysis as sa  # noqa: E402

SEEDS, RESAMPLES = 5, 50_000
ENVIRONMENTS = "HalfCheetah-v5", "Ant-v5"
MOVING = {"HalfCheetah-v5": ("2:4", "1:4", "1:8", "1:8, K = 100", "1:8, K = 10,000"), "Ant-v5": ("2:4", "1:4", "1:8")}
COMPETITIVE = 0.9
NOTHING = {}, 0, "", ""  # an estimate of sa.estimate("x", ...), its number of seeds, what it was made of, pairs


def with_interval(row: dict, seeds: int) -> str:
    """A value; of few seeds without its interval."""
    return sa.span(row if seeds >= SEEDS else {"x": row["x"]}, "x") if row else ""


def difference(study, label: str, other: str, as_ratio: bool = False) -> tuple[dict, int, str, str]:
    """Mean difference of the scores of equal seeds, or the ratio of their IQMs; these IQMs; how many of the pairs are
    above 0, or have a ratio of at least 0.9."""
    found = {c.label: c for c in study.configurations} if study else {}
    if not {label, other} <= found.keys():
        return NOTHING
    seeds = ([run.args["seed"] for run in found[name].runs] for name in (label, other))
    both, *places = np.intersect1d(*seeds, return_indices=True)
    if not len(both):
        return NOTHING
    own, others = (found[name].scores[place] for name, place in zip((label, other), places, strict=True))
    iqms = (sa.estimate("x", [scores], sa.iqm, RESAMPLES) for scores in (own, others))
    iqms = " against ".join(with_interval(row, len(both)) for row in iqms)
    above = own >= COMPETITIVE * others if as_ratio else own > others
    if as_ratio and not (others > 0).all():
        return {}, len(both), f"{iqms}, and a dense run at or below 0", ""
    if as_ratio:
        row = sa.estimate("x", [own, others], sa.relative, RESAMPLES)
    else:
        row = sa.estimate("x", [own - others], lambda drawn: drawn.mean(axis=1), RESAMPLES)
    return row, len(both), iqms, f"{above.sum()} of {len(both)}"


def correlation(study, labels: tuple[str, ...]) -> tuple[dict, int, str, str]:
    """Of the ranks of settled SAD and score, within each of the configurations whose masks change."""
    found = {c.label: study.pairs(c) for c in study.configurations if c.label in labels} if study else {}
    seeds = min((len(found.get(label, ())) for label in labels), default=0)
    if seeds < SEEDS:
        return {}, seeds, "", ""
    groups = [pairs for pairs in found.values() if (np.ptp(pairs, axis=0) > 0).all()]
    row = sa.estimate("x", groups, sa.correlation, RESAMPLES) if groups else {}
    return row, seeds, sa.count(sum(map(len, groups)), "run"), ""


def judge(row: dict, seeds: int, target: float, above: str, below: str) -> str:
    """`above` or `below`, where the interval is on that side of the target; otherwise open, with the seeds it needs."""
    if seeds < SEEDS or not row:
        return "open (it has no value)" if seeds >= SEEDS else f"open ({seeds} of {SEEDS} seeds)"
    low, high = row["x_low"], row["x_high"]
    if low > target or low == target != 0:  # at least 0.9, but more than 0
        return above
    if high < target:
        return below
    off = max(abs(row["x"] - target), 1e-9)
    more = seeds / (seeds - 1)  # drawn from few, the spread is too small
    needed = math.ceil(more * seeds * ((high - low) / 2 / off) ** 2)  # an interval shrinks with their root
    needed = max(seeds + 1, needed)
    return f"open ({f'about {needed}' if needed < 1000 else 'over 1,000'} seeds would settle it in half of the cases)"


def in_all(verdicts: list[str], seeds: list[int]) -> str:
    """What decides somewhere and is decided otherwise nowhere; else open, also while seeds are missing anywhere."""
    decided = sorted({verdict for verdict in verdicts if not verdict.startswith("open")})
    if min(seeds) < SEEDS or not decided:
        return "open"
    return decided[0] if len(decided) == 1 else f"open ({' and '.join(decided)})"


def claims(studies: dict) -> list[list[str]]:
    """Rows: claim and the verdict on it, environment, measure and its value, what it was made of, pairs for the claim,
    verdict. `studies`: by environment."""
    two, one = [(env, studies.get(env)) for env in ENVIRONMENTS], studies.get(ENVIRONMENTS[0])
    half = [(env, "2:4 minus dense", difference(study, "2:4", "dense")) for env, study in two]
    quarter = [(env, "1:4 minus dense", difference(study, "1:4", "dense")) for env, study in two]
    share = [(env, "1:8 over dense", difference(study, "1:8", "dense", as_ratio=True)) for env, study in two]
    rarer = [("10,000", "1:8, K = 10,000", "1,000", "1:8"), ("1,000", "1:8", "100", "1:8, K = 100")]
    rarer = [(ENVIRONMENTS[0], f"K = {K} minus K = {k}", difference(one, a, b)) for K, a, k, b in rarer]
    stable = [(env, "rank correlation of settled SAD and score", correlation(x, MOVING[env])) for env, x in two]
    rows = []
    for claim, parts, target, above, below in (
        ("2:4 returns more than dense", half, 0.0, "supported", "contradicted"),
        ("1:4 returns more than dense", quarter, 0.0, "supported", "contradicted"),
        ("1:8 stays competitive", share, COMPETITIVE, "competitive", "not competitive"),
        ("rarer mask updates help", rarer, 0.0, "supported", "contradicted"),
        ("a stable SAD goes with better return", stable, 0.0, "contradicted", "supported"),
    ):
        verdicts = [judge(row, seeds, target, above, below) for _, _, (row, seeds, *_) in parts]
        heads = [f"**{claim}**: {in_all(verdicts, [seeds for *_, (_, seeds, *_) in parts])}"] + [""] * (len(parts) - 1)
        for head, (env, measure, (row, seeds, source, pairs)), verdict in zip(heads, parts, verdicts, strict=True):
            value = with_interval(row, seeds)
            rows.append([head, env, f"{measure}: {value}" if value else measure, source, pairs, verdict])
    return rows


def by_environment(studies: list) -> dict:
    """Raises SystemExit where sad_analysis.py would keep the runs of an environment apart."""
    names = [study.setting["env_id"] for study in studies]
    labels = [c.label for study in studies for c in study.configurations]
    if len(set(names)) < len(names) or any("code " in label for label in labels):
        sys.exit(f"error: runs that sad_analysis.py keeps apart: {[study.name for study in studies]}, {labels}")
    return dict(zip(names, studies, strict=True))


def used(runs: list) -> str:
    """Core hours of training, by the kind of CPU, and versions."""
    number, hours = Counter(run.meta["hardware"] for run in runs), Counter()
    for run in runs:
        hours[run.meta["hardware"]] += run.minutes / 60
    parts = ", ".join(f"{number[name]} on {name} ({hours[name]:.1f} core hours of training)" for name in number)
    versions = {name: {run.meta["versions"][name] for run in runs} for name in runs[0].meta["versions"]}
    versions = ", ".join(f"{name} {' and '.join(sorted(versions[name]))}" for name in versions if name != "wandb")
    return f"{len(runs)} runs: {parts}. {versions[0].upper()}{versions[1:]}."


def draw(studies: dict) -> "sa.Figure":
    """Of the patterns and of both dense networks: returns over core minutes."""
    figure, (axes,) = sa.new_figure("Return of the noise-free policy, 1,000,000 steps", 1, 2, 3.3)
    for ax, env in zip(axes, ENVIRONMENTS, strict=True):
        for c in studies[env].configurations:
            if c.label == c.first.pattern or c.first.pattern == "dense":
                sa.draw_minutes(ax, studies[env], c, RESAMPLES, shaded=False)
        ax.set(title=env, xlabel=f"core minutes of training, {studies[env].machine}")
    axes[0].set_ylabel("evaluation return\n(IQM; faint: seeds)")
    return sa.add_legend(figure)


def main() -> None:
    runs, bad = sa.load_all(sa.find_folders((str(HERE),)))
    studies, replaced = sa.make_studies(runs)
    found = by_environment(studies)
    header = ["claim: in all", "environment", "measure: value", "IQMs, or runs", "pairs for it", "verdict"]
    for cells in [header, ["---"] * len(header), *claims(found)]:
        print(f"| {' | '.join(cells)} |")
    print(f"\n{used(runs)}" + " All have finished." * (not bad and not replaced))
    for name, reason in bad + replaced:
        print(f"\nNot in the table: {name}: {reason}")
    for path in sys.argv[1:]:
        draw(found).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
