"""Leads from three seeds: the rule by hand, on runs that are not there yet."""

import sys
from types import SimpleNamespace

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


def test_the_pages_have_the_tables_of_their_runs(capsys):
    leads.main()
    tables = [part for part in capsys.readouterr().out.strip().split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for folder, table in zip(("rlx2", "mst"), tables, strict=True):
        assert table.count("\n") == 1 or table in (ROOT / f"results/{folder}/README.md").read_text()


def test_the_means_in_prose_are_those_of_the_runs():
    """Of README.md and of rlx2/README.md, where an environment is complete."""
    folders = [str(ROOT / "results" / name) for name in ("rlx2", "paper")]
    studies = leads.sa.make_studies(leads.sa.load_all(leads.sa.find_folders(tuple(folders)))[0])[0]
    (cheetah,) = [study for study in studies if study.setting["env_id"] == "HalfCheetah-v5"]
    means = {c.label.split(" 90/85")[0]: c.scores.mean() for c in cheetah.configurations}
    small = means.pop("dense, as many weights as 1:8")
    readme, page = ((ROOT / path).read_text() for path in ("README.md", "results/rlx2/README.md"))
    text = " ".join(readme[readme.index("In three seeds of 1,000,000 steps") :].split("\n\n")[0].split())
    for words, value in (
        ("RLx2 (mean score {})", means["RLx2"]),
        ("RigL ({})", means["RigL"]),
        ("static masks ({})", means["static"]),
        ("a dense network with about as many weights ({})", small),
        ("SET ({})", means["SET"]),
        ("1:8, with about as many weights, has {}", means["1:8"]),
        ("dense {}.", means["dense"]),
    ):
        assert words.format(f"{value:,.0f}") in text, words
    names = ("RLx2", means["RLx2"]), ("small dense", small), *((x, means[x]) for x in ("SET", "RigL", "static"))
    percents = ", ".join(f"{name} {100 * value / means['dense']:.1f}" for name, value in names)
    assert f"means are {percents};" in " ".join(page.split()) and f"1:8 N:M ({means['1:8']:,.0f} in" in page
