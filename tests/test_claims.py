"""Verdicts on the paper's claims: the rules by hand, and that the page says what its runs say."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results/paper"))
import claims

DENSE = np.array([1000.0, 1100, 900, 1050, 950])
SOME = np.array([10, 20, 30, 20, 10])


def study(**scores):
    """Of fake runs, by label; their settled SAD falls as the score rises."""
    named = {"1:8, K = 100": "often", "1:8, K = 10000": "rarely", "2:4": "half", "1:4": "quarter", "1:8": "eighth"}
    found = []
    for label, key in {"dense": "dense", **named}.items():
        if key in scores:
            runs = [SimpleNamespace(args={"seed": seed}) for seed in range(1, len(scores[key]) + 1)]
            found.append(SimpleNamespace(label=label, scores=np.asarray(scores[key], float), runs=runs))
    pairs = {c.label: np.stack([1 / (c.scores + 1e4), c.scores], axis=1) for c in found}
    moving = [c for c in found if c.label != "dense"]
    return SimpleNamespace(configurations=found, moving=moving, pairs=lambda c: pairs[c.label])


def verdicts(cheetah, ant=None):
    """First word of a claim -> in all, then of each of its parts."""
    found = {}
    for claim, *_, verdict in claims.claims({"HalfCheetah-v5": cheetah} | ({"Ant-v5": ant} if ant else {})):
        if claim:
            parts = found.setdefault(claim.strip("*").split()[0], [])
        parts.append(verdict.strip("*"))
    return found


def test_what_the_intervals_exclude_decides():
    found = verdicts(study(dense=DENSE, half=DENSE + SOME, quarter=DENSE - SOME))
    nothing = "open (0 of 5 seeds)"
    assert found["2:4"] == ["supported", "supported", nothing]
    assert found["1:4"] == ["contradicted", "contradicted", nothing]
    assert found["1:8"] == ["open", nothing, nothing]
    assert found["rarer"] == ["open", nothing, nothing]
    assert found["a"] == ["supported", "supported", nothing]  # its side is a negative correlation


@pytest.mark.parametrize(
    ("factor", "word"), [(1.2, "competitive"), (0.8, "not competitive"), (0.9, "open (over 1,000 seeds)")]
)
def test_competitive_is_nine_tenths(factor, word):
    assert verdicts(study(dense=DENSE, eighth=factor * DENSE))["1:8"][1] == word


def test_a_negative_dense_score_leaves_the_ratio_open():
    found = verdicts(study(dense=DENSE - 1000, eighth=DENSE))
    assert found["1:8"][:2] == ["open", "open (5 of 5 seeds)"]


def test_four_seeds_decide_nothing():
    found = verdicts(study(dense=DENSE[:4], half=DENSE[:4] + 500))
    assert found["2:4"][:2] == ["open", "open (4 of 5 seeds)"] and found["a"][1] == "open (0 of 5 seeds)"


def test_seeds_that_would_settle_it():
    """The interval's half width shrinks with the root of the number of seeds: by hand from an interval."""
    row = {"x": 100.0, "x_low": -100.0, "x_high": 300.0}
    assert claims.judge(row, 5, 0.0, "a", "b") == "open (about 20 seeds would settle it)"  # 5 * (200 / 100)^2
    assert claims.judge(row | {"x": 1.0}, 5, 0.0, "a", "b") == "open (over 1,000 seeds)"


def test_two_environments_or_differences_that_disagree():
    more, less = study(dense=DENSE, half=DENSE + SOME), study(dense=DENSE, half=DENSE - SOME)
    assert verdicts(more, less)["2:4"] == ["open (contradicted and supported)", "supported", "contradicted"]
    unsure = study(dense=DENSE, half=DENSE + np.array([-99, 100, 5, 50, -50]))
    assert verdicts(unsure, less)["2:4"][0] == "contradicted"
    found = verdicts(study(eighth=DENSE, often=DENSE + 10, rarely=DENSE + 10))["rarer"]
    assert found == ["open (contradicted and supported)", "supported", "contradicted"]


def test_the_page_has_the_table_of_its_runs(capsys):
    claims.main()
    table = capsys.readouterr().out
    assert table.count("\n") > 10 and table in (ROOT / "results/paper/README.md").read_text()
