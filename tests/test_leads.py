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
