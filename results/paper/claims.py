"""Where the paper's claims stand: `python results/paper/claims.py` prints the table of README.md, from the runs here.

The rules are those of README.md: a claim is judged from five seeds on, by a 95 % bootstrap interval over them.
"""

import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import sad_analysis as sa  # noqa: E402

SEEDS, RESAMPLES = 5, 2000
ENVIRONMENTS = "HalfCheetah-v5", "Ant-v5"
NOTHING = {}, 0, ""


def difference(study, label: str, other: str, as_ratio: bool = False) -> tuple[dict, int, str]:
    """Of scores paired by seed, or ratio of IQMs: the estimate x of sa.estimate, pairs, the IQMs behind it."""
    found = {c.label: c for c in study.configurations} if study else {}
    if not {label, other} <= found.keys():
        return NOTHING
    two = [found[label], found[other]]
    row = sa.paired_difference("x", *two, RESAMPLES)
    pairs = row["x_pairs"]
    if as_ratio:  # of a negative return it means nothing
        scores = [c.scores for c in two]
        row = sa.estimate("x", scores, sa.relative, RESAMPLES) if (scores[1] > 0).all() else {}
    iqms = [sa.span(sa.estimate("iqm", [c.scores], sa.iqm, RESAMPLES), "iqm") for c in two]
    return row, pairs, " against ".join(iqms)


def correlation(study) -> tuple[dict, int, str]:
    """Of settled SAD and score, within the configurations that have five seeds and masks that change."""
    groups = [study.pairs(c) for c in study.moving if len(c.runs) >= SEEDS] if study else []
    groups = [group for group in groups if (np.ptp(group, axis=0) > 0).all()]
    if not groups:
        return NOTHING
    row = sa.estimate("x", groups, sa.correlation, RESAMPLES)
    return row, min(map(len, groups)), sa.count(sum(map(len, groups)), "run")


def judge(row: dict, pairs: int, target: float, above: str, below: str) -> str:
    """`above` or `below`, where the interval is on that side of the target; otherwise open, with the seeds it needs."""
    if pairs < SEEDS or not row:
        return f"open ({pairs} of {SEEDS} seeds)"
    low, high = row["x_low"], row["x_high"]
    if low > target or high < target:
        return above if low > target else below
    needed = pairs * ((high - low) / 2 / max(abs(row["x"] - target), 1e-9)) ** 2  # an interval shrinks with its root
    return f"open (about {math.ceil(needed):,} seeds would settle it)" if needed < 1000 else "open (over 1,000 seeds)"


def in_all(verdicts: list[str]) -> str:
    """What decides somewhere and is decided otherwise nowhere; else open."""
    decided = sorted({verdict for verdict in verdicts if not verdict.startswith("open")})
    return decided[0] if len(decided) == 1 else f"open ({' and '.join(decided)})" if decided else "open"


def claims(studies: dict) -> list[list[str]]:
    """Rows: claim, environment, measure, its value, IQMs, verdict. `studies`: by environment."""
    two, one = [(env, studies.get(env)) for env in ENVIRONMENTS], studies.get(ENVIRONMENTS[0])
    half = [(env, "2:4 minus dense", difference(study, "2:4", "dense")) for env, study in two]
    quarter = [(env, "1:4 minus dense", difference(study, "1:4", "dense")) for env, study in two]
    share = [(env, "1:8 over dense", difference(study, "1:8", "dense", as_ratio=True)) for env, study in two]
    rarer = [("10,000", "1:8, K = 10000", "1,000", "1:8"), ("1,000", "1:8", "100", "1:8, K = 100")]
    rarer = [(ENVIRONMENTS[0], f"K = {K} minus K = {k}", difference(one, a, b)) for K, a, k, b in rarer]
    stable = [(env, "rank correlation of settled SAD and score", correlation(study)) for env, study in two]
    rows = []
    for claim, parts, target, above, below in (
        ("2:4 returns more than dense", half, 0.0, "supported", "contradicted"),
        ("1:4 returns more than dense", quarter, 0.0, "supported", "contradicted"),
        ("1:8 stays competitive", share, 0.9, "competitive", "not competitive"),
        ("rarer mask updates help", rarer, 0.0, "supported", "contradicted"),
        ("a stable SAD goes with better return", stable, 0.0, "contradicted", "supported"),
    ):
        verdicts = [judge(row, pairs, target, above, below) for _, _, (row, pairs, _) in parts]
        rows.append([f"**{claim}**", "", "", "", "", f"**{in_all(verdicts)}**"])
        for (env, measure, (row, _, iqms)), verdict in zip(parts, verdicts, strict=True):
            rows.append(["", env, measure, sa.span(row, "x") if row else "", iqms, verdict])
    return rows


def main() -> None:
    runs, bad = sa.load_all(sa.find_folders((str(HERE),)))
    if bad:
        sys.exit(f"error: not readable: {bad}")
    studies = {study.setting["env_id"]: study for study in sa.make_studies(runs)[0]}
    header = ["claim", "environment", "measure", "value", "IQMs", "verdict"]
    for cells in [header, ["---"] * len(header), *claims(studies)]:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
