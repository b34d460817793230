"""sad_analysis.py: what is drawn, times to a return, and the committed tables."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb
from test_analysis import load, make_run, run

import sad_analysis as sa


def test_what_is_drawn_by_hand(tmp_path):
    """Of four seeds the IQM is the mean of the middle two; a band holds it; minutes are the seeds' median."""
    for seed, score in enumerate((100.0, 200.0, 400.0, 1000.0), 1):
        make_run(tmp_path / str(seed), seed=seed, score=score, pace=(200, 100, 200, 50)[seed - 1])
        make_run(tmp_path / f"d{seed}", seed=seed, n=None, hardware="a CPU" if seed > 1 else "CPU 1")
        make_run(tmp_path / f"x{seed}", seed=seed, n=3, m=8)
    (study,), _, _ = load(tmp_path)
    figure = sa.draw_returns(study, 200)
    steps, minutes = figure.axes[2:4] if "1:4" in figure.axes[2].get_legend_handles_labels()[1][1] else figure.axes[:2]
    named = [[x for x in ax.lines if not x.get_label().startswith("_")] for ax in (steps, minutes)]  # others: seeds
    lines = {line.get_label().partition(" ")[0]: line for line in named[0]}
    assert list(lines) == ["dense", "1:4"]
    faint = [line.get_ydata()[-1] for line in steps.lines if line not in named[0] and line.get_color() != "#000000"]
    assert faint == [100, 200, 400, 1000]
    x, y = lines["1:4"].get_data()
    assert x.tolist() == [3.0 * i for i in range(11)] and y == pytest.approx(300 * x / 30)
    band = steps.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() <= 1000 and band[band[:, 0] == 30, 1].min() < 300 < band[band[:, 0] == 30, 1].max()
    assert [line.get_label() for line in named[1]] == ["dense (3 seeds)", "1:4 (4 seeds)"]  # one ran elsewhere
    assert len(steps.collections) == 2 and len(minutes.collections) == 1  # three seeds have no band
    x, y = named[1][1].get_data()
    assert x[-1] == pytest.approx(30_000 / 60 * (1 / 200 + 1 / 100) / 2) and y[-1] == pytest.approx(300)
    label = figure.axes[-1].get_xlabel().replace("\n", " ")
    assert label.endswith("a CPU, 1 thread; what is missing ran elsewhere") and steps.get_title(loc="left") == "1:4"
    colors = {c.first.pattern: c.look["color"] for c in study.configurations}
    assert len(set(colors.values())) == 3 and colors["1:4"] == sa.COLORS["1:4"].lower()
    for c in study.configurations[1:]:
        study.timed[c] = []
    assert len(sa.draw_returns(study, 200).axes) == 2  # two rows: dense's minutes alone are not drawn
    study.configurations = study.configurations[:1]
    assert len(sa.draw_returns(study, 200).axes) == 2  # but where it stands alone they are


def test_each_row_of_curves_has_its_pattern_s_first(tmp_path):
    make_run(tmp_path / "d", n=None)
    for K in (1000, 100, 200, 300):
        make_run(tmp_path / str(K), args={"mask_update_interval": K})
    (study,), _, _ = load(tmp_path)
    first, *others = [c.label for c in study.configurations[1:]]
    rows = [ax.get_legend_handles_labels()[1] for ax in sa.draw_returns(study, 200).axes[::2]]
    rows = [[label.partition(" (")[0] for label in row] for row in rows]
    assert first == "1:4" and rows == [["dense", first, *others[:2]], ["dense", first, *others[2:]]]


def test_time_to_a_return_by_hand(monkeypatch, capsys, tmp_path):
    """Evaluations rise to a run's score linearly; of dense's the last five have the mean 80."""
    make_run(tmp_path / "d", n=0)
    for seed, score in enumerate((50, 100, 100), 1):
        make_run(tmp_path / f"three{seed}", seed=seed, m=8, score=score)
    for seed, score in enumerate((50, 100), 1):
        make_run(tmp_path / f"two{seed}", seed=seed, m=4, score=score, hardware="a CPU" if seed == 1 else "CPU 2")
    for seed, score in enumerate((50, 100, 100), 1):
        make_run(tmp_path / f"most{seed}", seed=seed, m=16, score=score, hardware="a CPU" if seed < 3 else "CPU 2")
    (study,), _, _ = load(tmp_path)
    minutes = sa.draw_returns(study, 200).axes[1::2]
    assert minutes[-1].get_xlabel().replace("\n", " ").endswith("on a CPU, 1 thread; what is missing ran elsewhere")
    drawn = {line.get_label().partition(" (")[0] for ax in minutes for line in ax.lines}
    assert {name for name in drawn if name[0] != "_"} == {"dense", "1:8", "1:16"}
    assert {c.label: len(runs) for c, runs in study.timed.items()} == {"dense": 1, "1:8": 3, "1:4": 0, "1:16": 2}
    monkeypatch.setattr(sa, "FIGURES", {})
    assert run(monkeypatch, capsys, tmp_path, "--out", tmp_path / "a", "--no-track")[0] == 0
    frame = pd.read_csv(tmp_path / "a" / "summary.csv").set_index("configuration")
    steps = frame[[f"steps_to_{percent}" for percent in (50, 75, 90)]]
    assert steps.loc["dense"].tolist() == steps.loc["1:8"].tolist() == [12_000, 18_000, 24_000]
    assert steps.loc["1:4"].tolist() == [24_000, math.inf, math.inf]  # half of the seeds never came to 60
    assert frame.loc["1:8", "core_minutes_to_75"] == pytest.approx(18_000 / 200 / 60)
    minutes = [f"core_minutes{suffix}" for suffix in ("", "_to_50", "_to_75")]
    assert frame.loc["1:16", minutes].tolist() == [2.5, 2, math.inf]  # of the two seeds that ran where dense did
    assert frame.loc["1:16", "steps_to_75"] == 18_000  # of all three
    assert frame.loc["1:4", [*minutes, "gain_at_equal_core_minutes"]].isna().all()  # one of two is not most
    gains = frame["gain_at_equal_core_minutes"]  # seed 1 alone is paired with dense, which takes as long and has 80
    assert gains["1:8"] == gains["1:16"] == pytest.approx(-40) and math.isnan(gains["dense"])
    text = (tmp_path / "a" / "summary.md").read_text()
    assert "| 1:8 | 3 | 12,000 | 1 | 18,000 | 1.5 | 24,000 | 2 | -40 | 1 |" in text and "| steps to 50 % |" in text


def test_what_is_not_drawn_is_named(monkeypatch, capsys, tmp_path):
    make_run(tmp_path / "runs/d", n=None)
    make_run(tmp_path / "runs/s", args={"mask_update_interval": 0})
    make_run(tmp_path / "runs/k", args={"mask_update_interval": 10**6})  # never refreshed either
    old, mine = (tmp_path / "a" / name for name in ("Ant-v4_30_000_steps_sad.png", "sad.png"))
    (tmp_path / "a").mkdir()
    old.touch()
    mine.touch()
    code, out, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "(interval: of several K): sad, sad_layers, ages, divergence, interval, sad_return\n" in err
    assert mine.exists() and not old.exists()  # it was of other runs
    mine.unlink()
    assert "Settled SAD (from" not in out
    assert len(list((tmp_path / "a").glob("*.png"))) == 2  # returns and scores


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in ROOT.glob("results/*/*/meta.json")}))
def test_committed_tables_are_what_the_committed_runs_give(monkeypatch, capsys, tmp_path, folder):
    drawn = {path.stem.partition("steps_")[2] for path in folder.glob("*steps_*.png")}
    assert drawn <= set(sa.FIGURES)
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    beside = sorted(ROOT.glob("results/paper/HalfCheetah-v5__dense*__s[123]__*")) if folder.name == "rlx2" else []
    code, _, err = run(monkeypatch, capsys, folder, *beside, "--no-track", "--out", tmp_path)
    assert code == 0 and not err
    assert (tmp_path / "summary.md").read_text() == (folder / "summary.md").read_text()


def test_figures_of_scores_and_of_settling_by_hand(tmp_path):
    scores = {1000: [100.0, 110.0, 180.0], 3000: [50.0, 70.0, 60.0], 0: [20.0, 10.0, 40.0]}
    for K, own in scores.items():
        for seed, score in enumerate(own, 1):
            make_run(tmp_path / f"{K}_{seed}", seed=seed, score=score, args={"mask_update_interval": K})
    (study,), _, _ = load(tmp_path)
    assert [c.label for c in study.configurations] == ["1:4", "1:4, K = 3,000", "1:4, static masks"]
    mean = {
        K: sa.final_score([[step, step / 30_000] for step in range(3000, 30_001, 3000)]) * sum(own) / 3
        for K, own in scores.items()
    }  # of three the IQM is the mean
    moved = {
        c.first.args["mask_update_interval"]: [sa.settled_sad(run, math.inf) for run in c.runs]
        for c in study.configurations
    }
    returns, sad = sa.draw_interval(study, 100).axes
    for ax, wanted in ((returns, mean), (sad, {K: sum(own) / 3 for K, own in moved.items()})):
        (line,) = (line for line in ax.lines if line.get_label() == "1:4")
        assert line.get_ydata() == pytest.approx([wanted[1000], wanted[3000]]) and list(line.get_xdata()) == [0, 1]
        points = [line for line in ax.lines if len(line.get_xdata()) == 1]
        assert [line.get_ydata()[0] for line in points] == pytest.approx([wanted[K] for K in (1000, 3000, 0)])
        assert [text.get_text() for text in ax.get_xticklabels()] == ["1,000", "3,000", "static"]
    assert "final score" in returns.get_ylabel() and "SAD" in sad.get_ylabel() and moved[1000] > moved[3000] > moved[0]
    (ax,) = sa.draw_scores(study, 100).axes
    assert [line.get_xdata()[0] for line in ax.lines[1::2]] == pytest.approx([mean[K] for K in (1000, 3000, 0)])
    dots = [sorted(points.get_offsets()[:, 0] / 100) for points in ax.collections]
    assert [len(own) for own in dots] == [3] * 3 and dots[0][2] / dots[0][0] == pytest.approx(1.8)
    (ax,) = sa.draw_sad_return(study, 100).axes
    assert len(ax.collections) == len(study.moving) == 2
    for points, c in zip(ax.collections, study.moving, strict=True):
        settled = [sa.settled_sad(run, study.window) for run in c.runs]
        assert np.asarray(points.get_offsets()) == pytest.approx(np.column_stack([settled, c.scores]))


def test_topologies_without_structure_beside_nm(dense, rnm, rlx2, small, monkeypatch, capsys, tmp_path):
    """Real runs of all three scripts: names, order, the equally small dense network, figures, thinning, damage."""
    plain = {"nstep": 1, "dynamic_buffer": False}
    runs = {"runs_dir": str(tmp_path / "runs"), "total_timesteps": 300}
    default = {"mask_update_interval": 10_000, "delay_nstep": 300_000, "buffer_min_size": 100_000}
    default |= {"buffer_check_interval": 10_000, "buffer_threshold": 0.2}
    done = {"RLx2": {}, "RigL": plain, "SET": {"topology": "set", **plain}, "static": {"topology": "static", **plain}}
    done |= {"RigL + n = 3": {"dynamic_buffer": False}, "RLx2, K = 20": {"mask_update_interval": 20}}
    for name, options in done.items():
        done[name] = Path(rlx2.train(small(rlx2, **runs | default | options))["run_dir"])
    rnm.train(small(rnm, **runs, n=1, m=8, mask_update_interval=100))
    width = 16 - 6  # what the RLx2 runs print is 9; 10 has too many weights
    for hidden_dim in (16, 9, width):
        dense.train(small(dense, **runs, hidden_dim=hidden_dim))
    monkeypatch.setattr(sa, "DEFAULTS", sa.DEFAULTS | {"hidden_dim": 16})
    monkeypatch.setattr(sa, "FIGURES", {"returns": sa.draw_returns, "sad": sa.draw_sad})
    code, out, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "skipped" not in err
    (study,), _, _ = load(tmp_path / "runs")
    labels = [c.label for c in study.configurations]
    assert labels[:4] == ["dense", "dense, as many weights as 70/60", "dense, width 10", "1:8, K = 100"]
    family = ["RLx2 70/60", "RLx2 70/60, K = 20", "RigL 70/60", "RigL + n = 3 70/60", "SET 70/60", "static 70/60"]
    assert labels[4:] == family and all(study.dense(c).label == "dense" for c in study.configurations)
    assert study.plain("RLx2 70/60", 16).label == "RLx2 70/60"
    looks = [(c.look["color"], str(c.look["linestyle"])) for c in study.configurations]
    assert len(set(looks)) == len(looks) and looks[:2] == [("#000000", "-"), ("#666666", "--")]
    assert looks[4][0] == sa.COLORS["RLx2"].lower() != looks[5][0]
    assert len(list((tmp_path / "a").glob("*.png"))) == 2 and out.count("| SET 70/60 | 1 |") == 2  # scores, times
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    argv = ("--no-track", "--out", tmp_path / "b", "--thin", tmp_path / "thin")
    assert run(monkeypatch, capsys, tmp_path / "runs", *argv)[0] == 0
    (thin,), _, skipped = load(tmp_path / "thin")
    assert [c.label for c in thin.configurations] == labels and not skipped
    with np.load(done["RLx2, K = 20"] / "masks.npz") as file:
        arrays = dict(file)
    arrays["qf1.fc2"][-1, 0] ^= 128  # one weight more or less
    np.savez_compressed(done["RLx2, K = 20"] / "masks.npz", **arrays)
    meta = json.loads((done["RigL"] / "meta.json").read_text())
    meta["modules"]["qf1"][0]["active"] += 1
    (done["RigL"] / "meta.json").write_text(json.dumps(meta))
    reasons = dict(load(tmp_path / "runs")[2])
    assert "damaged: the last sad_initial/qf1" in reasons[done["RLx2, K = 20"].name]
    assert "the number of active weights of qf1.fc1 changes" in reasons[done["RigL"].name] and len(reasons) == 2


def test_module_specific_training(mst, small, monkeypatch, capsys, tmp_path):
    """Real runs: SimBa's dense network is their dense one; names, colours, plasticity in a figure, thinning."""
    common = {"runs_dir": str(tmp_path / "runs"), "total_timesteps": 200, "eval_interval": 50}
    common |= {"diagnostics_interval": 70}  # at steps that have no other row
    options = [
        {"actor_regime": "dense", "critic_regime": "dense", "mask_update_interval": 30},
        {},
        {"critic_regime": "static"},
        {"mask_end": 0.9},
    ]
    options += [{"actor_nm": "2:4", "critic_nm": "2:4"}, {"actor_regime": "rigl", "critic_regime": "dense"}]
    for change in options:
        mst.train(small(mst, **common | change))
    monkeypatch.setattr(sa, "MST", sa.MST | {"mask_update_interval": 20})  # of no account for dense
    monkeypatch.setattr(sa, "FIGURES", {"plasticity": sa.draw_plasticity})
    argv = ("--no-track", "--out", tmp_path / "a", "--thin", tmp_path / "thin")
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", *argv)
    (study,), _, skipped = load(tmp_path / "runs")
    assert code == 0 and "plasticity" not in err.rpartition("): ")[2] and not skipped
    labels = [c.label for c in study.configurations]
    assert labels == [
        "dense",
        "MST 60/60",
        "MST 60/60, mask_end 0.9",
        "RigL/dense 60/0",
        "static/static 60/60",
        "MST 2:4/2:4",
    ]
    assert all(study.dense(c).label == "dense" for c in study.configurations)
    light, base = (to_rgb(study.configurations[i].look["color"]) for i in (2, 1))
    assert base == to_rgb(sa.COLORS["MST"]) and light == pytest.approx([0.6 * x + 0.4 for x in base], abs=1 / 255)
    figure = sa.draw_plasticity(study, 100)
    assert len(figure.axes) == 21 and [len(ax.lines) for ax in figure.axes[:3]] == [6, 6, 6]
    assert [ax.get_yscale() for ax in figure.axes[::3]] == ["linear"] * 4 + ["log"] + ["linear"] * 2
    assert len(list((tmp_path / "a").glob("*_plasticity.png"))) == 1
    (thin,), _, skipped = load(tmp_path / "thin")
    assert [c.label for c in thin.configurations] == labels and not skipped
    assert list(thin.configurations[1].first.curve("plasticity/qf1/srank").index) == [70, 140, 200]
