"""sad_analysis.py: its numbers by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_analysis import load, make_run

import sad_analysis as sa


def test_iqm_is_rliables():
    assert sa.iqm(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == 2.0  # of five runs the middle three
    assert np.array_equal(sa.iqm(np.array([[0, 5], [1, 6], [2, 7], [9, 90]]), axis=0), [1.5, 6.5])


def test_bootstrap_by_hand():
    low, high = sa.interval([np.array([0.0, 1.0, 2.0])], lambda drawn: drawn.mean(axis=1), 4000)
    assert (low, high) == (0.0, 2.0)  # of three equal draws one is in 27 resamples
    a = np.random.default_rng(1).normal(10, 1, 400)
    low, high = sa.interval([a], lambda drawn: drawn.mean(axis=1), 4000)
    assert low == pytest.approx(a.mean() - 1.96 * a.std() / 20, abs=0.02)
    assert high == pytest.approx(a.mean() + 1.96 * a.std() / 20, abs=0.02)
    for few in ([3.0], [3.0, 4.0]):
        assert np.isnan(sa.interval([np.array(few)], lambda drawn: drawn.mean(axis=1), 100)).all()
    groups = [np.zeros(5), np.ones(5)]  # strata stay apart: every resample has five of each
    assert (sa.interval(groups, lambda x, y: np.concatenate([x, y], axis=1).mean(axis=1), 100) == 0.5).all()


def test_probability_of_improvement_by_hand():
    assert sa.better(np.array([1, 2, 3]), np.array([0, 2])) == pytest.approx((1 + 1.5 + 2) / 6)


def test_correlation_by_hand():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 4, 2, 8, 16])
    pairs = np.stack([x, y], axis=1)
    assert sa.correlation(pairs[None]) == pytest.approx(1 - 6 * (0 + 1 + 1 + 0 + 0) / (5 * 24))  # Spearman's
    up = np.array([[1, 1], [2, 2], [3, 3]], float)  # falls within each group, rises from one to the other
    groups = [up * [1, -1], up * [1, -1] + [10, 10]]
    assert sa.correlation(*(group[None] for group in groups)) == pytest.approx(-1)
    assert sa.correlation(np.concatenate(groups)[None]) > 0
    assert len(sa.correlation(np.stack([pairs, pairs * [0, 1]]))) == 1  # constant: none
    two = np.array([[1.0, 2], [2, 1]])  # of groups of unequal size ranks are shares of their runs
    three = np.array([[1.0, 1], [2, 2], [3, 3]])
    norm = 2 * 0.25**2 + 2 / 9
    assert sa.correlation(two[None], three[None]) == pytest.approx((2 / 9 - 2 * 0.25**2) / norm)


def test_scores_relative_to_dense_by_hand():
    dense = np.array([1.0, 2, 3, 100])  # IQM 2.5, mean 26.5
    assert sa.relative(np.array([[5.0, 10, 10, 100]]), dense[None]) == pytest.approx(4.0)
    other = np.array([[3.0, 5, 5, 40]]), np.array([[0.0, 1, 1, 100]])  # of another environment, whose dense has 1
    pooled = sa.relative(np.array([[5.0, 10, 10, 100]]), dense[None], *other)
    assert pooled == pytest.approx(4.5)  # the middle of 2 3 4 4 5 5 40 40


def test_time_to_a_score_by_hand(tmp_path):
    loaded = sa.load_run(make_run(tmp_path / "run", score=100.0))  # 10 more every 3,000 steps, each of 1/200 s
    assert sa.time_to(loaded, 50.0) == (15_000, 15_000 / 200 / 60)
    assert sa.time_to(loaded, 50.1) == (18_000, 18_000 / 200 / 60) and sa.time_to(loaded, 101.0) == (np.inf, np.inf)


def test_score_of_a_run_that_stops_early(tmp_path):
    """Evaluations of 10, 20, ... 100, of which the last half counts, at a stop, too: of four two, of five two."""
    loaded, fifth = sa.load_run(make_run(tmp_path / "run", score=100.0)), 15_000 / 200 / 60
    assert sa.score_within(loaded, fifth - 1e-6) == 35 and sa.score_within(loaded, fifth) == 45
    assert sa.score_within(loaded, 1e9) == loaded.meta["final_score"] == 80 and np.isnan(sa.score_within(loaded, 0.2))


def slow_run(folder, factor, **options):
    """A run that needs `factor` times as much CPU time."""
    run = sa.load_run(make_run(folder, **options))
    clock = run.metrics["charts/cpu_time_s"] * factor
    return replace(run, metrics=run.metrics.assign(**{"charts/cpu_time_s": clock}), minutes=clock.iloc[-1] / 60)


def test_gain_at_equal_core_minutes_stops_the_slower_run(tmp_path):
    """Of ten evaluations, 10 to 100, the slow run has five when the fast one ends, of which the last two count."""
    fast, slow = (sa.Configuration("x", [slow_run(tmp_path / f"{i}", i)], {}, "o") for i in (1, 2))
    slowest = sa.Configuration("x", [slow_run(tmp_path / "30", 30)], {}, "o")
    assert sa.paired_difference("x", fast, slowest, 100, stop=True) == {"x_pairs": 0}  # no evaluation until then
    for own, other, gain in ((fast, slow, 80 - 45), (slow, fast, 45 - 80), (fast, fast, 0)):
        assert sa.paired_difference("x", own, other, 100, stop=True)["x"] == gain
        assert sa.paired_difference("x", own, other, 100)["x"] == 0


def test_times_to_a_score_are_medians_of_their_own(tmp_path):
    """50 % of dense's 80 at steps 12,000, 12,000 and 24,000; core minutes 4, 1 and 6: not those of one seed."""
    dense = [slow_run(tmp_path / f"d{i}", 1, seed=i, n=None) for i in (1, 2, 3)]
    own = [slow_run(tmp_path / f"{i}", x, seed=i, score=y) for i, x, y in ((1, 4, 100), (2, 1, 100), (3, 3, 50))]
    (study,), _ = sa.make_studies(dense + own)
    row = sa.configuration_row(study, study.configurations[1], 100)
    assert (row["steps_to_50"], row["core_minutes_to_50"]) == (12_000, 4)


def test_the_mask_in_use_before_the_end_by_hand():
    steps = np.array([0, 100, 200, 300])
    assert [sa.before_end(steps, window) for window in (0, 50, 100, 150, 300, 400)] == [3, 2, 2, 1, 0, 0]


def test_settled_sad_has_one_window(tmp_path):
    """Runs with several K are compared over equally long spans, in which each mask was taken anew."""
    for k in (0, 100, 1000, 5000, 10_000):
        make_run(tmp_path / f"k{k}", args={"mask_update_interval": k})
    (study,), _, _ = load(tmp_path)
    assert study.window == 5000  # 10,000 is more than a quarter of 30,000
    by_k = {c.first.args["mask_update_interval"]: c.first for c in study.configurations}
    assert np.isnan(sa.settled_sad(by_k[10_000], study.window)) and sa.settled_sad(by_k[0], study.window) == 0
    for k, last in ((1000, 29_000), (5000, 26_000)):  # no refresh at the last step: back from the last mask
        masks = by_k[k].masks
        assert masks["qf1"].index[-1] == last
        wanted = np.mean([E.loc[last - 5000, last] for E in masks.values()])
        assert sa.settled_sad(by_k[k], study.window) == pytest.approx(wanted) and wanted > 0
    assert sa.correlation_texts(study, 100) == ["1:4: too few runs of a configuration to correlate"]  # one seed each


def test_correlation_texts(tmp_path):
    for seed in range(1, 7):
        make_run(tmp_path / f"a{seed}", seed=seed, score=100.0 * seed)
        make_run(tmp_path / f"b{seed}", seed=seed, score=90.0 * seed, n=2, args={"mask_update_interval": 500})
        make_run(tmp_path / f"c{seed}", seed=seed, score=80.0 * seed, n=2)
    (study,), _, _ = load(tmp_path)
    two, one, every = sa.correlation_texts(study, 100)
    assert (
        two.startswith("2:4: rank correlation within each configuration ") and "], 12 runs of 2 configurations" in two
    )
    assert one.startswith("1:4: rank correlation ") and "(too few runs to conclude), 6 runs of 1 configuration" in one
    assert every.startswith("all: rank correlation ") and every.endswith("18 runs of 3 configurations")


def test_sad_age_and_settling_by_hand():
    E = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]], np.uint8)  # 1:2 masks at four times
    pairwise = sa.pairwise_sad(E)
    assert np.array_equal(pairwise, np.array([[0, 2, 4, 2], [2, 0, 2, 4], [4, 2, 0, 2], [2, 4, 2, 0]]) / 4)
    steps = np.array([0, 100, 200, 300])
    share, most, least = sa.ever_and_age(E, steps)
    assert share.tolist() == [0.5, 0.75, 1.0, 1.0]
    # At 100: weight 0 since 0, weight 3 since after 0. At 200: 1 since after 100, 3 since 0. At 300: 1 (100), 2 (200).
    assert most.tolist() == [0.0, 100.0, 150.0, 150.0]
    assert least.tolist() == [0.0, 50.0, 50.0, 50.0]  # new ones count from when they are seen
    assert sa.settled_step(pd.DataFrame(pairwise, steps, steps)) == np.inf  # the last but one is still far from it
    near = [[0, 0.5, 0.5, 0.5], [0.5, 0, 0.2, 0.2], [0.5, 0.2, 0, 0.05], [0.5, 0.2, 0.05, 0]]
    assert sa.settled_step(pd.DataFrame(near, steps, steps)) == 200.0
    assert sa.settled_step(pd.DataFrame(np.zeros((4, 4)), steps, steps)) == 0.0
    assert sa.settled_step(pd.DataFrame([[0.0]], [0], [0])) == 0.0
    near[2][3] = near[3][2] = 0.1  # no less than the threshold
    assert sa.settled_step(pd.DataFrame(near, steps, steps)) == np.inf


def test_minutes_compare_where_all_seeds_have_them(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"cpu_{seed}", seed=seed)
        make_run(tmp_path / f"one_{seed}", seed=seed, n=2, args={"device": "cuda"} if seed == 2 else {})
    (study,), _, _ = load(tmp_path)
    assert {c.label: bool(runs) for c, runs in study.timed.items()} == {"1:4": True, "2:4": False}


def test_figures_show_the_seeds_means_and_intervals(tmp_path):
    """Of eight seeds the IQM is another number than the mean."""
    for seed in range(1, 9):
        make_run(tmp_path / f"a{seed}", seed=seed, score=100.0 * seed**2)
    (study,), _, _ = load(tmp_path)
    (c,) = study.configurations
    panels = sa.draw_divergence(study, 0).axes
    wanted = np.mean([run.masks["actor"] for run in c.runs], axis=0)
    assert np.allclose(panels[0].collections[0].get_array(), wanted) and panels[0].get_title() == "actor (8 seeds)"
    one = c.runs[3].masks
    one |= {net: E.drop(index=E.index[1], columns=E.index[1]) for net, E in one.items()}
    fewer = sa.draw_divergence(study, 0).axes[0]  # what all seeds have
    wanted = np.delete(np.delete(wanted, 1, axis=0), 1, axis=1)
    assert np.allclose(fewer.collections[0].get_array(), wanted) and fewer.get_title() == "actor (8 seeds)"
    ax = sa.Figure().subplots()
    sa.band(ax, c, [run.curve("eval/episodic_return") for run in c.runs], 500)
    scores = np.array([[100.0 * seed**2 for seed in range(1, 9)]])
    assert ax.lines[0].get_ydata()[-1] == pytest.approx(sa.iqm(scores)[0]) and len(ax.lines) == 9
    ends = ax.collections[0].get_paths()[0].vertices
    low, high = sa.interval(list(scores), lambda drawn: sa.iqm(drawn, axis=1), 500)
    assert {low, high} <= {float(y) for x, y in ends if x == 30}
