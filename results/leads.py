"""Whether RLx2's and MST's orders show in their runs: `python results/leads.py` prints the tables of their pages.

The rule is that of rlx2/README.md and mst/README.md: of final scores paired by seed, three differences of one sign are
a lead, anything else is open.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sad_analysis as sa  # noqa: E402

SEEDS = 3
NETS, GONE = ("actor", "qf1", "qf2"), sa.pd.Series([sa.math.nan])
SMALL = "dense, "  # labels are known by how they begin; "dense" alone is all of its label
RIVALS = "RigL ", "SET ", "static "
QUESTIONS = {  # folders, the page's first -> does the first of each pair return more?
    ("rlx2", "paper"): [("RLx2 ", name) for name in RIVALS] + [(name, SMALL) for name in ("RLx2 ", *RIVALS)],
    ("mst",): [("MST 60/60", name) for name in ("static/static ", "RigL/static ", "dense")]
    + [("static/static ", "dense"), ("RigL/static ", "static/static "), ("MST 2:4", "dense")],
}


def find(study, begin: str):
    """The one configuration with such a label, or None."""
    found = [c for c in study.configurations if c.label == begin or (begin != "dense" and c.label.startswith(begin))]
    if len(found) > 1 or any(", code " in c.label for c in study.configurations):
        sys.exit(f"error: {study.name}: {' and '.join(c.label for c in study.configurations)} are told apart")
    return found[0] if found else None


def compare(study, first: str, second: str) -> list[str]:
    """Cells: environment, the pair, its differences by seed and their mean, verdict."""
    pair = [find(study, begin) for begin in (first, second)]
    scores = [{run.args["seed"]: x for run, x in zip(c.runs, c.scores, strict=True)} if c else {} for c in pair]
    gains = [scores[0][seed] - scores[1][seed] for seed in sorted(scores[0].keys() & scores[1].keys())]
    verdict = f"open ({len(gains)} of {SEEDS} seeds)"
    if len(gains) >= SEEDS:
        verdict = "more" if min(gains) > 0 else "less" if max(gains) < 0 else "open"
    names = " minus ".join(c.label if c else begin.strip(", ") for c, begin in zip(pair, (first, second), strict=True))
    mean = f"{sum(gains) / len(gains):,.0f}" if gains else ""
    return [study.setting["env_id"], names, ", ".join(f"{gain:,.0f}" for gain in gains), mean, verdict]


def grown(study) -> list[list[str]]:
    """Cells: environment, configuration, its seeds, and of each network the mean share, at the end of the runs, of the
    active weights' squared norm that is outside the first mask; of configurations whose masks change."""
    rows = []
    for c in study.configurations:
        ends = [[run.metrics.get(f"plasticity/{net}/grown_norm", GONE).iloc[-1] for net in NETS] for run in c.runs]
        means = [sum(column) / len(column) for column in zip(*ends, strict=True)]
        if max(means) > 0:  # not if NaN, of dense ones
            rows.append([study.setting["env_id"], c.label, str(len(c.runs)), *(f"{100 * x:.3g} %" for x in means)])
    return rows


def features(study) -> list[list[str]]:
    """Cells: environment, the critics' masks, how many critics have such ones, and the least and the greatest srank and
    feature norm of these at the end of the runs and at the first look, before training."""
    groups = {}  # masks: rows [srank, feature norm, both at first] of each critic
    for c in study.configurations:
        for run in (run for run in c.runs if "plasticity/qf1/srank" in run.metrics):
            regime = run.args["critic_regime"]
            masks = regime if regime == "dense" else f"{regime} {c.label.rpartition('/')[2]}"
            for net in NETS[1:]:
                looks = run.metrics[[f"plasticity/{net}/{key}" for key in ("srank", "feature_norm")]].dropna()
                groups.setdefault(masks, []).append([*looks.iloc[-1], *looks.iloc[0]])
    rows = []
    for masks, critics in groups.items():
        cells = [f"{min(column):.3g} to {max(column):.3g}" for column in zip(*critics, strict=True)]
        rows.append([study.setting["env_id"], masks, str(len(critics)), *cells])
    return rows


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print()
    for cells in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    for folders, pairs in QUESTIONS.items():
        runs, bad = sa.load_all(sa.find_folders(tuple(str(HERE / folder) for folder in folders)))
        studies, replaced = sa.make_studies(runs)
        asked = [study for study in studies if find(study, pairs[0][0])]
        print(f"\nresults/{folders[0]}")
        rows = []
        for study in asked:  # what counts is a whole study
            found = [find(study, begin) for pair in pairs for begin in pair]
            early = "" if all(c and len(c.runs) >= SEEDS for c in found) else " so far"
            rows += [[*cells, verdict + early] for *cells, verdict in (compare(study, *pair) for pair in pairs)]
        print_table(["environment", "scores", "by seed", "mean", "lead"], rows)
        if rows := [row for study in asked for row in grown(study)]:
            print_table(["environment", "norm outside the first mask", "seeds", *NETS], rows)
        if rows := [row for study in asked for row in features(study)]:
            numbers = ["srank at the end", "feature norm at the end", "srank at first", "feature norm at first"]
            print_table(["environment", "critics' masks", "critics", *numbers], rows)
        for name, reason in bad + replaced:
            print(f"\nNot in the table: {name}: {reason}")


if __name__ == "__main__":
    main()
