"""Where the paper's claims stand: `python results/paper/claims.py` prints the table of README.md, from the runs here.

The rules are those of README.md: a claim is judged when all its seeds are in, by 95 % bootstrap intervals over them.
"""

import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sad_analysis as sa  # noqa: E402

SEEDS, RESAMPLES = 5, 50_000
ENVIRONMENTS = "HalfCheetah-v5", "Ant-v5"
MOVING = {"HalfCheetah-v5": ("2:4", "1:4", "1:8", "1:8, K = 100", "1:8, K = 10,000"), "Ant-v5": ("2:4", "1:4", "1:8")}
NOTHING = {}, 0, ""  # an estimate of sa.estimate("x", ...), its number of seeds, what it was made of


def difference(study, label: str, other: str, as_ratio: bool = False) -> tuple[dict, int, str]:
    """Of the scores of equal seeds, or the ratio of their IQMs; made of these IQMs."""
    found = {c.label: c for c in study.configurations} if study else {}
    if not {label, other} <= found.keys():
        return NOTHING
    seeds = ([run.args["seed"] for run in found[name].runs] for name in (label, other))
    both, *places = np.intersect1d(*seeds, return_indices=True)
    if not len(both):
        return NOTHING
    own, others = (found[name].scores[place] for name, place in zip((label, other), places, strict=True))
    iqms = f"{sa.iqm(own):,.0f} against {sa.iqm(others):,.0f}"
    if as_ratio and not (others > 0).all():
        return {}, len(both), f"{iqms}, and a dense run at or below 0"
    if as_ratio:
        return sa.estimate("x", [own, others], sa.relative, RESAMPLES), len(both), iqms
    return sa.estimate("x", [own - others], lambda drawn: drawn.mean(axis=1), RESAMPLES), len(both), iqms


def correlation(study, labels: tuple[str, ...]) -> tuple[dict, int, str]:
    """Of the ranks of settled SAD and score, within each of the configurations whose masks change."""
    found = {c.label: study.pairs(c) for c in study.configurations if c.label in labels} if study else {}
    seeds = min((len(found.get(label, ())) for label in labels), default=0)
    if seeds < SEEDS:
        return {}, seeds, ""
    groups = [pairs for pairs in found.values() if (np.ptp(pairs, axis=0) > 0).all()]
    row = sa.estimate("x", groups, sa.correlation, RESAMPLES) if groups else {}
    return row, seeds, sa.count(sum(map(len, groups)), "run")


def judge(row: dict, seeds: int, target: float, above: str, below: str) -> str:
    """`above` or `below`, where the interval is on that side of the target; otherwise open, with the seeds it needs."""
    if seeds < SEEDS or not row:
        return f"open ({seeds} of {SEEDS} seeds)"
    low, high = row["x_low"], row["x_high"]
    if low > target or low == target != 0:  # at least 0.9, but more than 0
        return above
    if high < target:
        return below
    off = max(abs(row["x"] - target), 1e-9)
    needed = max(seeds + 1, math.ceil(seeds * ((high - low) / 2 / off) ** 2))  # an interval shrinks with their root
    return f"open (as things stand, {f'about {needed}' if needed < 1000 else 'over 1,000'} seeds would settle it)"


def in_all(verdicts: list[str], seeds: list[int]) -> str:
    """What decides somewhere and is decided otherwise nowhere; else open, also while seeds are missing anywhere."""
    decided = sorted({verdict for verdict in verdicts if not verdict.startswith("open")})
    if min(seeds) < SEEDS or not decided:
        return "open"
    return decided[0] if len(decided) == 1 else f"open ({' and '.join(decided)})"


def claims(studies: dict) -> list[list[str]]:
    """Rows: claim, environment, measure, its value, what it was made of, verdict. `studies`: by environment."""
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
        ("1:8 stays competitive", share, 0.9, "competitive", "not competitive"),
        ("rarer mask updates help", rarer, 0.0, "supported", "contradicted"),
        ("a stable SAD goes with better return", stable, 0.0, "contradicted", "supported"),
    ):
        verdicts = [judge(row, seeds, target, above, below) for _, _, (row, seeds, _) in parts]
        verdict = in_all(verdicts, [seeds for _, _, (_, seeds, _) in parts])
        rows.append([f"**{claim}**", "", "", "", "", f"**{verdict}**"])
        for (env, measure, (row, seeds, source)), verdict in zip(parts, verdicts, strict=True):
            shown = row if seeds >= SEEDS else {"x": row.get("x", "")}  # of few seeds without an interval
            rows.append(["", env, measure, sa.span(shown, "x") if row else "", source, verdict])
    return rows


def by_environment(studies: list) -> dict:
    """Raises SystemExit where sad_analysis.py would keep the runs of an environment apart."""
    names = [study.setting["env_id"] for study in studies]
    labels = [c.label for study in studies for c in study.configurations]
    if len(set(names)) < len(names) or any("code " in label for label in labels):
        sys.exit(f"error: runs that sad_analysis.py keeps apart: {[study.name for study in studies]}, {labels}")
    return dict(zip(names, studies, strict=True))


def main() -> None:
    runs, bad = sa.load_all(sa.find_folders((str(HERE),)))
    studies, replaced = sa.make_studies(runs)
    header = ["claim", "environment", "measure", "value", "IQMs, runs", "verdict"]
    for cells in [header, ["---"] * len(header), *claims(by_environment(studies))]:
        print(f"| {' | '.join(cells)} |")
    for name, reason in bad + replaced:
        print(f"\nNot in the table: {name}: {reason}")


if __name__ == "__main__":
    main()
