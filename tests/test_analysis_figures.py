"""sad_analysis.py: what is drawn, and the committed tables."""

import pytest
from conftest import ROOT
from test_analysis import load, make_run, run

import sad_analysis as sa


def test_what_is_drawn_by_hand(tmp_path):
    """Of four seeds the IQM is the mean of the middle two; a band holds it; minutes end with the first seed's."""
    for seed, score in enumerate((100.0, 200.0, 400.0, 1000.0), 1):
        make_run(tmp_path / str(seed), seed=seed, score=score)
        make_run(tmp_path / f"d{seed}", seed=seed, n=None, hardware=f"CPU {seed}")
        make_run(tmp_path / f"x{seed}", seed=seed, n=3, m=8)
    (study,), _, _ = load(tmp_path)
    figure = sa.draw_returns(study, 200)
    steps, minutes = figure.axes[2:4] if "1:4" in figure.axes[2].get_legend_handles_labels()[1][1] else figure.axes[:2]
    lines = {line.get_label().partition(" ")[0]: line for line in steps.lines}
    assert list(lines) == ["dense", "1:4"]
    x, y = lines["1:4"].get_data()
    assert x.tolist() == [3.0 * i for i in range(11)] and y == pytest.approx(300 * x / 30)
    band = steps.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() <= 1000 and band[band[:, 0] == 30, 1].min() < 300 < band[band[:, 0] == 30, 1].max()
    assert [line.get_label().partition(" ")[0] for line in minutes.lines] == ["1:4"]  # dense ran on several machines
    colors = {c.first.pattern: c.look["color"] for c in study.configurations}
    assert len(set(colors.values())) == 3 and colors["1:4"] == sa.COLORS["1:4"]


def test_what_is_not_drawn_is_named(monkeypatch, capsys, tmp_path):
    make_run(tmp_path / "runs/d", n=None)
    make_run(tmp_path / "runs/s", args={"mask_update_interval": 0})
    make_run(tmp_path / "runs/k", args={"mask_update_interval": 10**6})  # never refreshed either
    code, out, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "(interval: of several K): sad, sad_layers, ages, divergence, interval, sad_return\n" in err
    assert "Settled SAD (from" not in out
    assert len(list((tmp_path / "a").glob("*.png"))) == 2  # returns and scores


@pytest.mark.parametrize("folder", sorted({path.parents[1] for path in ROOT.glob("results/*/*/meta.json")}))
def test_committed_tables_are_what_the_committed_runs_give(monkeypatch, capsys, tmp_path, folder):
    drawn = {path.stem.partition("steps_")[2] for path in folder.glob("*.png")}
    assert drawn in (set(), set(sa.FIGURES))
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    code, _, err = run(monkeypatch, capsys, folder, "--no-track", "--out", tmp_path)
    assert code == 0 and not err
    assert (tmp_path / "summary.md").read_text() == (folder / "summary.md").read_text()
