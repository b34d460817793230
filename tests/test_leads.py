"""Leads from three seeds: the rule by hand, on runs that are not there yet."""

import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import leads


def study(**scores):
    """Of fake runs; {label: {seed: score}}."""
    configurations = [
        SimpleNamespace(
            label=label.replace("_", " "),
            runs=[SimpleNamespace(args={"seed": seed}) for seed in by_seed],
            scores=list(map(float, by_seed.values())),
        )
        for label, by_seed in scores.items()
    ]
    return SimpleNamespace(name="a study", setting={"env_id": "Hopper-v4"}, configurations=configurations)


KEY = "plasticity/{}/grown_norm"
THREE = {1: 100, 2: 200, 3: 300}


@pytest.mark.parametrize(
    ("other", "by_seed", "mean", "verdict"),
    [
        ({3: 290, 1: 90, 2: 150}, "10, 50, 10", "23", "more"),
        ({1: 110, 2: 260, 3: 310}, "-10, -60, -10", "-27", "less"),
        ({1: 110, 2: 150, 3: 290}, "-10, 50, 10", "17", "open"),
        ({1: 100, 2: 150, 3: 290}, "0, 50, 10", "20", "open"),  # not positive in all three
        ({1: 90, 3: 290, 4: 0}, "10, 10", "10", "open (2 of 3 seeds)"),  # only equal seeds count
    ],
)
def test_three_of_one_sign(other, by_seed, mean, verdict):
    both = study(RLx2_90=THREE, RigL_90=other, dense={1: 0})
    assert leads.compare(both, "RLx2 ", "RigL ") == ["Hopper-v4", "RLx2 90 minus RigL 90", by_seed, mean, verdict]


def test_dense_is_not_the_small_dense_network():
    both = study(MST=THREE, dense={1: 0, 2: 0, 3: 0}, **{"dense, width 46": {1: 500, 2: 500, 3: 500}})
    assert leads.compare(both, "MST", "dense")[-1] == "more" and leads.compare(both, "MST", "dense, ")[-1] == "less"
    assert leads.compare(both, "MST", "static ")[1:] == ["MST minus static", "", "", "open (0 of 3 seeds)"]


def test_runs_that_are_told_apart_are_an_error():
    with pytest.raises(SystemExit, match="RLx2 90, code a and RLx2 90, code b are told apart"):
        leads.find(study(**{"RLx2 90, code a": THREE, "RLx2 90, code b": THREE}), "RLx2 ")


def test_the_norm_outside_the_first_mask():
    """At the end, the mean of the seeds; neither dense networks nor masks that stay have a row."""

    def runs(*ends):
        return [SimpleNamespace(metrics=leads.sa.pd.DataFrame({KEY.format(net): x for net, x in end})) for end in ends]

    some = [("actor", [0.0, 0.5]), ("qf1", [0.3, 0.2]), ("qf2", [0.0, 0.0])]
    more = [("actor", [0.0, 0.1]), ("qf1", [0.3, 0.4]), ("qf2", [0.0, 0.0])]
    found = [("moves", runs(some, more)), ("dense", runs([])), ("stays", runs([(net, [0.0]) for net in leads.NETS]))]
    found = [SimpleNamespace(label=label, runs=own) for label, own in found]
    rows = leads.grown(SimpleNamespace(setting={"env_id": "Hopper-v4"}, configurations=found))
    assert rows == [["Hopper-v4", "moves", "2", "30 %", "30 %", "0 %"]]


def test_rank_and_norm_of_the_critics_features():
    """The last look and the first one, of both critics, by the critics' masks."""
    keys = [f"plasticity/{net}/{key}" for net in ("qf1", "qf2") for key in ("srank", "feature_norm")]

    def run(regime, *values):
        looks = {key: [None, x, None, y] for key, x, y in zip(keys, *values, strict=True)}
        return SimpleNamespace(metrics=leads.sa.pd.DataFrame(looks), args={"critic_regime": regime})

    rigl, more = run("rigl", (9, 1.0, 8, 2.0), (7, 3.0, 6, 4.0)), run("rigl", (9, 1.5, 9, 1.5), (5, 3.5, 6, 3.5))
    found = [("RigL/RigL 60/60", [rigl]), ("MST 60/60", [more]), ("dense", [run("dense", (9, 5.0) * 2, (3, 6.0) * 2)])]
    none = SimpleNamespace(metrics=leads.sa.pd.DataFrame({"x": [1]}), args={})
    found = [SimpleNamespace(label=label, runs=[*runs, none]) for label, runs in found]
    assert leads.features(SimpleNamespace(setting={"env_id": "Hopper-v4"}, configurations=found)) == [
        ["Hopper-v4", "rigl 60", "4", "5 to 7", "3 to 4", "8 to 9", "1 to 2"],
        ["Hopper-v4", "dense", "2", "3 to 3", "6 to 6", "9 to 9", "5 to 5"],
    ]


def test_the_pages_have_the_tables_of_their_runs(capsys):
    leads.main()
    tables = [part for part in capsys.readouterr().out.strip().split("\n\n") if part.startswith("|")]
    for folder, table in zip(("rlx2", "mst", "mst", "mst"), tables, strict=True):
        assert table.count("\n") == 1 or table in (ROOT / f"results/{folder}/README.md").read_text()


def test_the_means_on_the_pages_are_those_of_the_runs():
    """Of README.md and of rlx2/README.md, both of seeds 1 to 3."""
    folders = [str(ROOT / "results" / name) for name in ("rlx2", "paper")]
    runs = leads.sa.load_all(leads.sa.find_folders(tuple(folders)))[0]
    studies = leads.sa.make_studies([run for run in runs if run.args["seed"] <= leads.SEEDS])[0]
    found = {study.setting["env_id"]: study.configurations for study in studies}
    readme, page = (" ".join((ROOT / path).read_text().split()) for path in ("README.md", "results/rlx2/README.md"))
    for env_id, sparse in (("HalfCheetah-v5", "90 %, 85 %"), ("Hopper-v4", "98 %, 95 %")):
        means = {re.sub(r" \d\d/\d\d$", "", c.label): c.scores.mean() for c in found[env_id]}
        small = means.pop(next(label for label in means if label.startswith("dense, as many weights")))
        values = {name: means[name] for name in ("RLx2", "RigL", "SET", "static")} | {"small dense": small}
        row = [means["dense"], small, *(means[name] for name in ("RLx2", "RigL", "SET", "static"))]
        last = f"{means['1:8']:,.0f} |" if "1:8" in means else "|"
        assert f"| {env_id}, {sparse} | {' | '.join(f'{score:,.0f}' for score in row)} | {last}" in readme
        percents = (
            f"{name} {100 * values[name] / means['dense']:.1f}" for name in sorted(values, key=values.get)[::-1]
        )
        assert f"means are {', '.join(percents)};" in page, env_id
    (scores,) = (c.scores for c in found["HalfCheetah-v5"] if c.label == "1:8")
    assert f"1:8 N:M ({scores.mean():,.0f} in" in page
    for c in found["Hopper-v4"]:
        if c.label in ("dense", "static 98/95", "RLx2 98/95"):
            scores = [f"{score:,.0f}" for score in c.scores]
            assert f"{scores[0]}, {scores[1]} and {scores[2]}" in page or f"({', '.join(scores)})" in page


def test_what_the_pages_say_of_mst():
    """Scores and critics of both environments."""
    studies = leads.sa.make_studies(leads.sa.load_all(leads.sa.find_folders((str(ROOT / "results/mst"),)))[0])[0]
    names = "dense", "static/static 60/60", "MST 60/60", "RigL/static 60/60", "MST 2:4/2:4"
    readme, page = (" ".join((ROOT / path).read_text().split()) for path in ("README.md", "results/mst/README.md"))
    spread, scores, cells, ahead = 0, {}, {}, Counter()

    def join(values):
        return ", ".join(f"{value:,.0f}" for value in values)

    for study in studies:
        found, env_id = {c.label: c for c in study.configurations}, study.setting["env_id"]
        assert set(found) == set(names)
        assert all([run.args["seed"] for run in c.runs] == [1, 2, 3] for c in found.values())
        assert f"| {env_id} | {' | '.join(f'{found[name].scores.mean():,.0f}' for name in names)} |" in readme
        scores[env_id] = [found[name].scores for name in names]
        spread = max(spread, *(np.ptp(by_seed) for by_seed in scores[env_id]))
        for name in names[1:]:
            for pair in zip(found[name].runs, found["dense"].runs, strict=True):
                end = min(run.minutes for run in pair)  # CPU time of the one that used less
                own, other = (leads.sa.score_within(run, end) for run in pair)
                ahead[env_id] += own > other
        rows = leads.features(study)
        cells[env_id] = {masks: [tuple(map(float, cell.split(" to "))) for cell in row] for _, masks, _, *row in rows}
    assert f"seeds of one configuration are up to {spread:,.0f} apart" in readme

    dense, control, mst, swapped, half = scores["Hopper-v5"]
    apart = f"{abs(mst - control).max():.0f}"
    assert f"within {apart} of it in every seed" in readme and f"are {apart} or less apart in every seed" in page
    assert f"differ by {mst.max() - mst.min():,.0f} between MST's own seeds" in page
    assert f"dense has {join(dense)}," in page
    assert (half > dense).all() and "more than dense in all three seeds" in page
    assert (swapped > dense).all() and "swapped is above dense in all three seeds, too" in page
    hopper = cells["Hopper-v5"]
    for low, high in (("dense", "rigl 60"), ("rigl 60", "static 60")):  # "without overlap at equal sparsity"
        assert hopper[low][0][1] < hopper[high][0][0] and hopper[high][1][1] < hopper[low][1][0]  # srank, norm
    for own in cells.values():  # "about twice that of the others before training, too"
        assert all(1.6 < own["dense"][3][0] / high < 2.6 for masks, (*_, (_, high)) in own.items() if masks != "dense")

    dense, control, mst, swapped, half = scores["HalfCheetah-v5"]
    assert f"MST minus static/static: {join(mst - control)})" in page
    assert f"above it in {('none', 'one', 'two', 'all')[(mst > control).sum()]} of three" in readme
    assert f"static/static minus dense: {join(control - dense)}; static/static alone has {join(control)})." in page
    assert (swapped < dense).all() and "swapped is below dense in all three seeds" in page
    own = cells["HalfCheetah-v5"]
    assert all(own["dense"][1][0] > high for masks, (_, (_, high), *_) in own.items() if masks != "dense")
    assert ahead["Hopper-v5"] == 12 and f"on HalfCheetah-v5 in {ahead['HalfCheetah-v5']} of 12 pairs" in page
