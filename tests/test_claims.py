"""Verdicts on the paper's claims: the rules by hand, and that the page says what its runs say."""

import functools
import re
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results/paper"))
import claims

DENSE = np.array([1000.0, 1100, 900, 1050, 950])
SOME = np.array([10, 20, 30, 20, 10])


def study(env="HalfCheetah-v5", drop=(), **scores):
    """Of fake runs, by label, but for `drop`, (label, seed); their settled SAD falls as the score rises."""
    named = {"1:8, K = 100": "often", "1:8, K = 10,000": "rarely", "2:4": "half", "1:4": "quarter", "1:8": "eighth"}
    found = []
    for label, key in {"dense": "dense", **named}.items():
        if key in scores:
            both = [(seed, x) for seed, x in enumerate(scores[key], 1) if (label, seed) not in drop]
            runs = [SimpleNamespace(args={"seed": seed}) for seed, _ in both]
            found.append(SimpleNamespace(label=label, scores=np.array([float(x) for _, x in both]), runs=runs))
    pairs = {c.label: np.stack([1 / (c.scores + 1e4), c.scores], axis=1) for c in found}
    return SimpleNamespace(name=env, setting={"env_id": env}, configurations=found, pairs=lambda c: pairs[c.label])


def verdicts(cheetah, ant=None):
    """First word of a claim -> in all, then of each of its parts."""
    found = {}
    for claim, *_, verdict in claims.claims({"HalfCheetah-v5": cheetah} | ({"Ant-v5": ant} if ant else {})):
        if claim:
            claim, _, whole = claim.partition("**: ")
            parts = found.setdefault(claim.strip("*").split()[0], [whole])
        parts.append(verdict)
    return found


def cells_of(measure, cheetah):
    """Measure and value, IQMs, pairs, verdict of a row of HalfCheetah-v5."""
    rows = (row[2:] for row in claims.claims({"HalfCheetah-v5": cheetah}) if row[1] == "HalfCheetah-v5")
    return next(cells for cells in rows if cells[0].startswith(measure))


NOTHING = "open (0 of 5 seeds)"


def test_what_the_intervals_exclude_decides():
    found = verdicts(study(dense=DENSE, half=DENSE + SOME, quarter=DENSE - SOME))
    assert found["2:4"] == ["open", "supported", NOTHING]  # in all only when all seeds are in
    assert found["1:4"] == ["open", "contradicted", NOTHING]
    assert found["1:8"] == found["rarer"] == found["a"] == ["open", NOTHING, NOTHING]


@pytest.mark.parametrize(("factor", "word"), [(1.2, "competitive"), (0.8, "not competitive"), (0.9, "open (")])
def test_competitive_is_nine_tenths(factor, word):
    found = verdicts(study(dense=DENSE, eighth=factor * DENSE))["1:8"][1]
    assert found.startswith(word) and ("over 1,000 seeds" in found) == (factor == 0.9)


def test_at_least_nine_tenths():
    assert verdicts(study(dense=[1000] * 5, eighth=[900] * 5))["1:8"][1] == "competitive"
    assert verdicts(study(dense=[1000] * 5, half=[1000] * 5))["2:4"][1].startswith("open")  # but more than 0


def test_a_dense_run_at_zero_leaves_the_ratio_open():
    cells = cells_of("1:8 over dense", study(dense=DENSE - 1000, eighth=DENSE))
    assert cells[0] == "1:8 over dense" and "a dense run at or below 0" in cells[1]
    assert cells[2:] == ["", "open (it has no value)"]


def test_values_and_pairs_by_hand():
    """Intervals of five seeds alone; of the pairs those above 0, or of at least 0.9."""
    even = study(
        dense=[1000] * 5, half=[1010] * 5, quarter=[990, 1000, 1001, 1000, 1000], eighth=[900, 899, 950, 0, 999]
    )
    mean, iqms, pairs, _ = cells_of("2:4 minus dense", even)
    assert (mean, pairs) == ("2:4 minus dense: 10 [10, 10]", "5 of 5")
    assert iqms == "1,010 [1,010, 1,010] against 1,000 [1,000, 1,000]"
    assert cells_of("1:4 minus dense", even)[2] == "1 of 5"
    assert cells_of("1:8 over dense", even)[2] == "3 of 5"


def test_only_equal_seeds_count():
    cheetah = study(drop=[("2:4", 2)], dense=[*DENSE, 5000], half=[*DENSE + 500, 0][:5])
    cells = cells_of("2:4 minus dense", cheetah)  # of seeds 1, 3, 4, 5
    assert cells == ["2:4 minus dense: 500", "1,475 against 975", "4 of 4", "open (4 of 5 seeds)"]
    assert verdicts(study(dense=DENSE[:2], half=DENSE[:1], drop=[("dense", 1)]))["2:4"][1] == NOTHING


def test_sad_needs_all_its_configurations():
    """Its side is a negative correlation; static masks and a sparse head are not among them."""
    of = {"half": DENSE, "quarter": DENSE, "eighth": DENSE, "often": DENSE, "rarely": DENSE}
    assert verdicts(study(**of))["a"][1] == "supported"
    assert verdicts(study(**of), study("Ant-v5", half=DENSE, quarter=DENSE, eighth=DENSE))["a"][0] == "supported"
    assert verdicts(study(**of, drop=[("1:8", 3)]))["a"][1] == "open (4 of 5 seeds)"
    assert verdicts(study(often=DENSE, rarely=DENSE))["a"][1] == NOTHING


def test_seeds_that_would_settle_it():
    """An interval shrinks with the root of the number of seeds, and at five is too small by that of 5/4."""
    row = {"x": 100.0, "x_low": -100.0, "x_high": 300.0}
    settle = "open ({} seeds would settle it in half of the cases)".format
    assert claims.judge(row, 5, 0.0, "a", "b") == settle("about 25")  # 5 * (200 / 100)^2 * 5 / 4
    assert claims.judge(row | {"x": 1.0}, 5, 0.0, "a", "b") == settle("over 1,000")
    assert claims.judge(row | {"x": 250.0}, 5, 0.0, "a", "b") == settle("about 6")  # five did not


def test_two_environments_or_differences_that_disagree():
    more, less = study(dense=DENSE, half=DENSE + SOME), study("Ant-v5", dense=DENSE, half=DENSE - SOME)
    assert verdicts(more, less)["2:4"] == ["open (contradicted and supported)", "supported", "contradicted"]
    unsure = study(dense=DENSE, half=DENSE + np.array([-99, 100, 5, 50, -50]))
    assert verdicts(unsure, less)["2:4"][0] == "contradicted"
    found = verdicts(study(eighth=DENSE, often=DENSE + 10, rarely=DENSE + 10))["rarer"]
    assert found == ["open (contradicted and supported)", "supported", "contradicted"]


def test_runs_that_are_kept_apart_are_an_error():
    assert list(claims.by_environment([study(), study("Ant-v5")])) == ["HalfCheetah-v5", "Ant-v5"]
    forked = study(dense=DENSE)
    forked.configurations[0].label = "dense, code 3fa9c1"
    for studies in ([study(), study()], [forked]):
        with pytest.raises(SystemExit, match="keeps apart"):
            claims.by_environment(studies)


def test_the_page_has_the_table_of_its_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py"])
    claims.main()
    table, *others = capsys.readouterr().out.strip().split("\n\n")
    page = (ROOT / "results/paper/README.md").read_text()
    assert table.count("\n") == 11 and others and all(part in page for part in (table, *others))


def test_the_first_figure():
    """Ends at the median core minutes of each configuration, as the tables do."""
    panels = claims.draw(paper()[1]).axes
    assert [ax.get_title() for ax in panels] == list(claims.ENVIRONMENTS)
    for ax, env in zip(panels, claims.ENVIRONMENTS, strict=True):
        lines = {line.get_label().partition(" (")[0]: line for line in ax.lines if line.get_label()[0] != "_"}
        assert list(lines) == ["dense", SMALL, *NM]
        for label, line in lines.items():
            end = np.median([run.minutes for run in by_seed(env, label).values()])
            assert line.get_xdata()[-1] == pytest.approx(end, rel=0.001)


@functools.cache
def paper():
    """Runs of results/paper, and studies by environment."""
    runs = claims.sa.load_all(claims.sa.find_folders((str(ROOT / "results/paper"),)))[0]
    return runs, claims.by_environment(claims.sa.make_studies(runs)[0])


def by_seed(env, label):
    """Seed -> run."""
    (found,) = (c for c in paper()[1][env].configurations if c.label == label)
    return {run.args["seed"]: run for run in found.runs}


def gains(env, label, factor=1.0, gain=None):
    """[seeds]: scores minus those of dense, stopped after `factor` times as many minutes, or at its end over `gain`."""
    dense, own = by_seed(env, "dense"), by_seed(env, label)
    seeds = sorted(dense.keys() & own.keys())
    ends = [dense[seed].minutes / gain if gain else factor * own[seed].minutes for seed in seeds]
    stopped = [claims.sa.score_within(dense[seed], end) for seed, end in zip(seeds, ends, strict=True)]
    return np.array([own[seed].meta["final_score"] for seed in seeds]) - stopped


NUMBERS = "none one two three four five".split()
NM = "2:4", "1:4", "1:8"
SMALL = "dense, as many weights as 1:8"


def pages():
    return (" ".join((ROOT / path / "README.md").read_text().split()) for path in ("results/paper", "."))


def test_the_readme_on_acting():
    """An action over dense's, of N:M runs on the Zen 4."""
    times = [run.meta["hardware_report"] for run in paper()[0] if run.meta["n"] and "AMD" in run.machine]
    times = [row["hardware/actor_us"] / row["hardware/actor_us_dense"] for row in times]
    said = f"takes {min(times):.1f} to {max(times):.1f} times as long as dense's"
    assert len(times) >= 18 and said in list(pages())[1]


def test_the_readme_on_pairs():
    """2:4 over dense; the small dense network against N:M."""
    _, readme = pages()
    scores = {
        (env, label): {i: run.meta["final_score"] for i, run in by_seed(env, label).items()}
        for env in paper()[1]
        for label in ("dense", SMALL, *NM)
    }
    shares = [half / scores[env, "dense"][i] for env in paper()[1] for i, half in scores[env, "2:4"].items()]
    assert f"and returns {min(shares):.2f} to {max(shares):.2f} of its score" in readme
    assert "more than 1:8 and 1:4 in every seed on HalfCheetah, and less than all N:M runs on Ant" in readme
    small, *others = (scores["HalfCheetah-v5", label] for label in (SMALL, "1:8", "1:4"))
    assert all(small[seed] > other[seed] for other in others for seed in small)
    small, *others = (scores["Ant-v5", label].values() for label in (SMALL, *NM))
    assert all(max(small) < min(other) for other in others)


def test_the_readme_on_equal_cpu_time():
    """Which are ahead of dense in every seed; had the CPU time been as on the Xeon; signs that hang on the minutes."""
    page, readme = pages()
    ahead = {(env, label) for env in paper()[1] for label in (SMALL, *NM) if (gains(env, label) > 0).all()}
    assert ahead == {("HalfCheetah-v5", SMALL), *(("Ant-v5", label) for label in NM)}
    assert "all N:M are ahead of it on Ant in every seed" in readme
    assert "all N:M return more on Ant in every seed, on HalfCheetah none of them does in every seed" in page
    assert "on HalfCheetah the small dense network is in every seed, 2:4 only in the mean" in readme
    half = gains("HalfCheetah-v5", "2:4")
    assert half.mean() > 0 > half.min()
    xeon = (ROOT / "results/end_to_end_xeon/summary.md").read_text()
    xeon = float(re.search(r"\| 1:8 +\|.* ([\d.]+) \|", xeon)[1])
    cheetah, ant = (gains(env, "1:8", gain=xeon) for env in ("HalfCheetah-v5", "Ant-v5"))
    assert (cheetah < 0).all() and f"some {round(-cheetah.mean(), -2):,.0f} below dense on HalfCheetah" in page
    assert f"and ahead on Ant in {NUMBERS[(ant > 0).sum()]} of {NUMBERS[len(ant)]} seeds" in page
    now, more = gains("Ant-v5", "2:4"), gains("Ant-v5", "2:4", 1.05)
    assert now.min() > 0 and (more < 0).sum() == 1
    less = gains("HalfCheetah-v5", "1:8", 0.9)
    assert gains("HalfCheetah-v5", "1:8").min() < 0 < less.min()
    assert f"in one seed (by {-more.min():.0f}, not ahead by {now.min():.0f})" in page
    assert f"ahead on HalfCheetah in all (by {less.min():.0f} to {less.max():.0f})" in page


def test_the_readme_on_the_defaults():
    """1:8 of HalfCheetah-v5: K = 1,000 minus variants, by seeds that both have."""
    _, readme = pages()
    plain, said = by_seed("HalfCheetah-v5", "1:8"), []
    for name in ("sparse head", "static masks", "K = 100", "K = 10,000"):
        found = by_seed("HalfCheetah-v5", f"1:8, {name}")
        less = [plain[i].meta["final_score"] - found[i].meta["final_score"] for i in plain.keys() & found.keys()]
        assert np.mean(less) > 0
        said.append((f"{np.mean(less):,.0f}", f"{NUMBERS[sum(x > 0 for x in less)]} of {NUMBERS[len(less)]}"))
    (head, all_heads), *others = said
    text = f"a sparse output layer scores less by {head} (in {all_heads} seeds), "
    text += "static masks by {} ({}), K = 100 by {} ({}), K = 10,000 by {} ({})."
    assert text.format(*(x for pair in others for x in pair)) in readme


def test_what_the_pages_say_of_all_seeds():
    """How many there are; what settles most does not return most."""
    page, readme = pages()
    (seeds,) = {len(by_seed(env, label)) for env in paper()[1] for label in ("dense", SMALL, *NM)}
    assert f"(IQM of {NUMBERS[seeds]} seeds)" in readme
    assert (
        (f"[{NUMBERS[seeds]} seeds of five]" in readme)
        == (f"With {NUMBERS[seeds]} seeds of five" in page)
        == (seeds < 5)
    )
    study = paper()[1]["HalfCheetah-v5"]
    found = {c.label: c for c in study.configurations}
    plain, head, still = (found[label] for label in ("1:8", "1:8, sparse head", "1:8, static masks"))
    for c in (head, still):
        assert study.pairs(c)[:, 0].max() < study.pairs(plain)[:, 0].min()
        assert claims.sa.iqm(c.scores) < claims.sa.iqm(plain.scores)
    assert "return less than 1:8 as it is" in page and "1:8 returns a third less" in page
    assert claims.sa.iqm(head.scores) / claims.sa.iqm(plain.scores) == pytest.approx(2 / 3, abs=0.02)


def test_halfcheetah_v4_and_v5_are_one_task():
    """So the dense runs here serve results/rlx2, and 60,000 steps of v4 can be set beside 1,000,000 of v5."""
    envs = [gym.make(f"HalfCheetah-v{version}") for version in (4, 5)]
    first = [env.reset(seed=1)[0] for env in envs]
    assert np.array_equal(*first) and first[0].any()
    for action in np.random.default_rng(1).uniform(-1, 1, (300, 6)).astype(np.float32):
        (obs, reward, *ended, _), (obs_5, reward_5, *ended_5, _) = (env.step(action) for env in envs)
        assert np.array_equal(obs, obs_5) and (reward, ended) == (reward_5, ended_5)
