"""sad_analysis.py: its numbers by hand, its files from made-up and from real runs, what it says of bad ones."""

import csv
import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

import sad_analysis as sa

SHAPES = {
    "actor.fc1": (6, 10),
    "actor.fc2": (6, 6),
    "qf1.fc1": (6, 12),
    "qf1.fc2": (6, 6),
    "qf2.fc1": (6, 12),
    "qf2.fc2": (6, 6),
}


def make_run(rnm, folder, *, seed=1, n=1, m=4, score=100.0, total=30_000, churn=0.2, **changes):
    """A finished run's folder as the training scripts leave it: evaluations at `score`, masks that drift."""
    args = {"seed": seed, "env_id": "Ant-v4", "total_timesteps": total} | changes.pop("args", {})
    args = dataclasses.asdict(rnm.Args(**args))
    args |= {"n": n, "m": m} if n else {}
    if not n:
        args = {k: v for k, v in args.items() if k not in ("n", "m", "mask_update_interval", "sparse_head")}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    rows = {step: {"global_step": step, "eval/episodic_return": score * step / total, "charts/wall_time_s": step / 100}
            for step in range(0, total + 1, 3000)}  # fmt: skip
    if n:
        W = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        masks = first = {name: rnm.project(w, n, m) for name, w in W.items()}
        history = rnm.add_masks([], first, 0, 0, 0)
        every = args["mask_update_interval"]
        for refresh in range(1, total // every + 1 if every else 1):  # an update at each step
            for w in W.values():
                w += churn * torch.randn(w.shape, generator=generator)
            new, step = {name: rnm.project(w, n, m) for name, w in W.items()}, refresh * every
            rows.setdefault(step, {"global_step": step}).update(rnm.sad_metrics(first, masks, new))
            history = rnm.add_masks(history, new, step, step, refresh)
            masks = new
        rnm.save_masks(folder / "masks.npz", history, masks)
    header = list(dict.fromkeys([*rnm.METRICS, *(key for row in rows.values() for key in row)]))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
    evaluations = [[step, row["eval/episodic_return"]] for step, row in rows.items() if step and not step % 3000]
    meta = {"run_name": folder.name, "n": n, "m": m if n else None, "args": args, "start": f"2026-01-0{seed}",
            "exit_reason": "finished", "final_score": rnm.final_score(evaluations), "params_active": 1000,
            "kernel": "nm", "flops_per_update": {"dense": 4e6, "sparse": 1e6}, "hardware": "a CPU", "threads": 1,
            "versions": {"mujoco": "3.4.0", "torch": "2.13.0"}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["sad_analysis.py", *map(str, argv)])
    try:
        code = sa.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_iqm_is_rliables():
    assert sa.iqm(np.array([[1, 2], [2, 2], [1, 1], [2, 1]])) == 1.5
    assert sa.iqm(np.array([0.0, 1.0, 2.0, 3.0, 100.0])) == 2.0  # of five runs the middle three
    assert np.array_equal(sa.iqm(np.array([[0, 5], [1, 6], [2, 7], [9, 90]]), axis=0), [1.5, 6.5])


def test_bootstrap_by_hand():
    low, high = sa.interval([np.array([0.0, 1.0])], lambda drawn: drawn.mean(axis=1), 4000)
    assert (low, high) == (0.0, 1.0)  # 0 and 1 have a quarter of the resamples each
    a = np.random.default_rng(1).normal(10, 1, 400)
    low, high = sa.interval([a], lambda drawn: drawn.mean(axis=1), 4000)
    assert low == pytest.approx(a.mean() - 1.96 * a.std() / 20, abs=0.02)
    assert high == pytest.approx(a.mean() + 1.96 * a.std() / 20, abs=0.02)
    assert np.isnan(sa.interval([np.array([3.0])], lambda drawn: drawn.mean(axis=1), 100)).all()
    groups = [np.zeros(5), np.ones(5)]  # strata stay apart: every resample has five of each
    assert (sa.interval(groups, lambda x, y: np.concatenate([x, y], axis=1).mean(axis=1), 100) == 0.5).all()


def test_probability_of_improvement_by_hand():
    assert sa.better(np.array([1, 2, 3]), np.array([0, 2])) == pytest.approx((1 + 1.5 + 2) / 6)


def test_correlation_by_hand():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 4, 2, 8, 16])
    rho, (low, high) = sa.correlation([np.stack([x, y], axis=1)], 500)  # of one group it is Spearman's
    assert rho == pytest.approx(1 - 6 * (0 + 1 + 1 + 0 + 0) / (5 * 24)) and low < rho <= high <= 1
    up = np.array([[1, 1], [2, 2], [3, 3]], float)  # falls within each group, rises from one to the other
    groups = [up * [1, -1], up * [1, -1] + [10, 10]]
    assert sa.correlation(groups, 100)[0] == pytest.approx(-1)
    assert sa.correlation([np.concatenate(groups)], 100)[0] > 0
    text = sa.correlation_text(groups, 100)
    assert text.startswith(
        "rank correlation -1.00 (too few runs to conclude, 10 needed), 6 runs, within 2 configurations;"
    )
    assert "over all runs +0." in text
    assert sa.correlation_text([np.array([[1, 2], [2, 3]])], 100) == "2 runs, too few to correlate"
    assert sa.correlation_text([np.array([[0, 2], [0, 3], [0, 4]])], 100) == "3 runs, too few to correlate"
    many = np.arange(20.0)
    assert (
        sa.correlation_text([np.stack([many, -many], axis=1)], 100) == "rank correlation -1.00 [-1.00, -1.00], 20 runs"
    )


def test_settled_sad_has_one_window(rnm, tmp_path):
    """Runs with several K are compared from the same step on, at which each has a mask that is not old."""
    for k in (0, 100, 1000, 5000, 10_000):
        make_run(rnm, tmp_path / f"k{k}", args={"mask_update_interval": k})
    runs, _ = sa.load_all(sa.find_folders((str(tmp_path),)))
    (study,), _ = sa.make_studies(runs)
    assert study.window == 5000  # 10,000 is more than a quarter of 30,000
    by_k = {run.args["mask_update_interval"]: run for run in runs}
    assert np.isnan(by_k[10_000].settled_sad(study.window)) and by_k[0].settled_sad(study.window) == 0
    topology = by_k[1000].topology
    i = topology.steps.tolist().index(25_000)
    wanted = np.mean([topology.pairwise[net][i, -1] for net in sa.NETS])
    assert by_k[1000].settled_sad(study.window) == pytest.approx(wanted) and wanted > 0
    (study,), _ = sa.make_studies([run for run in runs if run.args["mask_update_interval"] in (0, 100, 1000)])
    assert study.window == 3000
    texts = sa.correlation_texts(study, 100)
    assert texts == ["1:4: 2 runs, too few to correlate"]  # one seed each; static masks are not in it at all


def test_sad_age_and_settling_by_hand():
    E = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]], np.uint8)  # 1:2 masks at four times
    pairwise = sa.pairwise_sad(E)
    assert np.array_equal(pairwise, np.array([[0, 2, 4, 2], [2, 0, 2, 4], [4, 2, 0, 2], [2, 4, 2, 0]]) / 4)
    steps = np.array([0, 100, 200, 300])
    share, age, least = sa.ever_and_age(E, steps)
    assert share.tolist() == [0.5, 0.75, 1.0, 1.0]
    # At 100: weight 0 since 0, weight 3 since after 0. At 200: 1 since after 100, 3 since 0. At 300: 1 (100), 2 (200).
    assert age.tolist() == [0.0, 100.0, 150.0, 150.0]
    assert least.tolist() == [0.0, 50.0, 50.0, 50.0]  # new ones count from when they are seen
    assert np.isnan(sa.settled_step(pairwise, steps))  # the last snapshot but one is still far from the last
    near = np.array([[0, 0.5, 0.5, 0.5], [0.5, 0, 0.2, 0.2], [0.5, 0.2, 0, 0.05], [0.5, 0.2, 0.05, 0]])
    assert sa.settled_step(near, steps) == 200.0
    assert sa.settled_step(np.zeros((4, 4)), steps) == 0.0


def test_sad_of_real_files_is_what_was_logged(rnm, small):
    folder = rnm.train(small(rnm, n=1, m=4, total_timesteps=400, mask_update_interval=20))["run_dir"]
    loaded = sa.load_run(sa.Path(folder))
    logged = loaded.metrics["sad_initial/qf1"].dropna()
    assert len(logged) > 5
    for i, step in enumerate(loaded.topology.steps[1:], 1):
        assert loaded.topology.pairwise["qf1"][0, i] == pytest.approx(logged[step], abs=1e-7)
    assert loaded.score == pytest.approx(loaded.meta["final_score"])


def test_end_to_end(rnm, monkeypatch, capsys, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2, 3):
        make_run(rnm, runs / f"dense_{seed}", seed=seed, n=None, score=100.0 + seed)
        make_run(rnm, runs / f"sparse_{seed}", seed=seed, score=110.0 + 2 * seed)
        make_run(rnm, runs / f"fast_{seed}", seed=seed, score=90.0, args={"mask_update_interval": 100})
        make_run(rnm, runs / f"head_{seed}", seed=seed, score=80.0, args={"sparse_head": True})
    make_run(rnm, runs / "static_1", seed=1, score=85.0, args={"mask_update_interval": 0}, churn=0.0)
    code, out, err = run(monkeypatch, capsys, runs, "--out", tmp_path / "a", "--no-track")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert list(table.index) == ["dense", "1:4", "1:4, K = 100", "1:4, sparse head", "1:4, static masks"]
    last_half = np.mean([0.6, 0.7, 0.8, 0.9, 1.0])
    scores, dense = last_half * np.array([112, 114, 116]), last_half * np.array([101, 102, 103])
    assert table.final_score_iqm["1:4"] == pytest.approx(scores.mean())  # of three runs none is trimmed
    assert table.of_dense["1:4"] == pytest.approx(scores.mean() / dense.mean())
    assert table.difference["1:4"] == pytest.approx((scores - dense).mean()) and table.pairs["1:4"] == 3
    assert table.difference_low["1:4"] == pytest.approx((scores - dense).min(), rel=0.05)
    gap = last_half * (np.array([90, 90, 90]) - np.array([112, 114, 116])).mean()
    assert f"- 1:4, K = 100: {gap:+,.0f} [" in out
    assert f"- 1:4, static masks: {last_half * (85 - 112):+,.0f}, 1 pair\n" in out
    assert table.p_better["1:4"] == 1.0 and table.p_better["1:4, K = 100"] == 0.0
    assert np.isnan(table.of_dense["dense"]) and np.isnan(table.settled_sad["dense"])
    assert table.settled_sad["1:4"] > 0 and table.settled_sad["1:4, static masks"] == 0
    assert np.isnan(table.low["1:4, static masks"])  # one seed has no interval
    names = {path.stem.split("steps_")[-1] for path in (tmp_path / "a").glob("*.png")}
    assert names == set(sa.FIGURES) == {path.stem.split("steps_")[-1] for path in (tmp_path / "a").glob("*.svg")}
    assert "1:4, K = 100" in out and (tmp_path / "a/summary.md").read_text() in out


def test_environments_are_pooled_relative_to_dense(rnm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "FIGURES", {})
    for env_id, scale in (("Ant-v4", 1.0), ("Hopper-v4", 10.0), ("Pendulum-v1", -1.0)):
        for seed in (1, 2, 3):
            options = {"seed": seed, "args": {"env_id": env_id}}
            make_run(rnm, tmp_path / f"runs/{env_id}_d{seed}", n=None, score=scale * 100.0, **options)
            make_run(rnm, tmp_path / f"runs/{env_id}_s{seed}", score=scale * (120.0 + 10 * seed), **options)
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "a/summary.csv")
    pooled = table[table.setting == "Ant-v4 + Hopper-v4, 30,000 steps: relative to dense"].iloc[0]
    assert pooled.of_dense == pytest.approx(1.4) and pooled.seeds == "3 + 3"  # (1.3, 1.4, 1.5) twice, trimmed
    assert 1.3 <= pooled.of_dense_low < 1.4 < pooled.of_dense_high <= 1.5
    for env_id in ("Ant-v4", "Hopper-v4"):  # another setting, which is pooled for itself and says what it is
        options = {"seed": 1, "args": {"env_id": env_id, "gamma": 0.9}}
        make_run(rnm, tmp_path / f"runs/{env_id}_gd", n=None, score=50.0, **options)
        make_run(rnm, tmp_path / f"runs/{env_id}_gs", score=100.0, **options)
    assert run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "b")[0] == 0
    both = pd.read_csv(tmp_path / "b/summary.csv").set_index("setting")
    assert both.of_dense["Ant-v4 + Hopper-v4, 30,000 steps, gamma 0.9: relative to dense"] == pytest.approx(2.0)
    assert both.of_dense["Ant-v4 + Hopper-v4, 30,000 steps, gamma 0.99: relative to dense"] == pytest.approx(1.4)
    row = table[table.setting.str.startswith("Pendulum") & (table.configuration == "1:4")].iloc[0]
    assert np.isnan(row.of_dense) and row.p_better == 0  # a share of a negative return means nothing


def test_what_does_not_match_is_listed_and_not_mixed(rnm, monkeypatch, capsys, tmp_path):
    runs = tmp_path / "runs"
    monkeypatch.setattr(sa, "FIGURES", {})
    make_run(rnm, runs / "dense_1", n=None)
    make_run(rnm, runs / "sparse_1", score=50.0)
    make_run(rnm, runs / "sparse_2", seed=2, score=60.0)
    make_run(rnm, runs / "again_2", seed=2, score=70.0, start="2026-02-02")
    make_run(rnm, runs / "other_physics", seed=3, versions={"mujoco": "3.5.0", "torch": "2.13.0"})
    make_run(rnm, runs / "other_gamma", seed=4, args={"gamma": 0.9})
    make_run(rnm, runs / "narrow", seed=5, args={"hidden_dim": 64})
    code, out, err = run(monkeypatch, capsys, runs / "*", "--out", tmp_path / "a", "--no-track")
    assert code == 0
    for name in ("other_physics", "other_gamma", "narrow"):
        assert err.count(f"not compared {name}: no dense run") == 1
    assert "skipped sparse_2: same configuration and seed as the later again_2" in err
    table = pd.read_csv(tmp_path / "a/summary.csv")
    row = table[(table.configuration == "1:4") & table.of_dense.notna()].iloc[0]
    assert row.seeds == 2 and row.pairs == 1  # dense has seed 1 only
    assert "mujoco 3.5" in out and "gamma 0.9" in out


def test_thinned_runs_tell_the_same(rnm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "FIGURES", {})
    for seed in (1, 2):
        make_run(rnm, tmp_path / f"runs/dense_{seed}", seed=seed, n=None)
        make_run(rnm, tmp_path / f"runs/sparse_{seed}", seed=seed, score=120.0 + seed)
    argv = ("--no-track", "--out", tmp_path / "a", "--thin", tmp_path / "thin")
    assert run(monkeypatch, capsys, tmp_path / "runs", *argv)[0] == 0
    assert run(monkeypatch, capsys, tmp_path / "thin", "--no-track", "--out", tmp_path / "b")[0] == 0
    a, b = (pd.read_csv(tmp_path / name / "summary.csv") for name in "ab")
    steps = [f"settled_step_{net}" for net in sa.NETS]  # coarser in time
    pd.testing.assert_frame_equal(a.drop(columns=steps), b.drop(columns=steps))
    with np.load(tmp_path / "thin/sparse_1/masks.npz") as file:
        assert file["global_step"].tolist() == [0, 6000, 12000, 18000, 24000, 27000, 30000]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def infinite(path):
    frame = pd.read_csv(path)
    frame.loc[1, "eval/episodic_return"] = np.inf
    frame.to_csv(path, index=False)


def fewer(folder):
    with np.load(folder / "masks.npz") as file:
        arrays = {key: value if key.endswith(".shape") else value[:-1] for key, value in file.items()}
    np.savez_compressed(folder / "masks.npz", **arrays)


def flip(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 100):  # whatever of the archive lies there
        data[i] ^= 1
    path.write_bytes(bytes(data))


OTHER = "damaged, or of another version"
DAMAGE = {
    "running": ("not finished (exit reason: running)", lambda d: edit(d, exit_reason="running")),
    "stopped": ("not finished (exit reason: sigterm)", lambda d: edit(d, exit_reason="sigterm")),
    "half a meta.json": (OTHER, lambda d: cut(d / "meta.json", 30)),
    "no meta.json": ("meta.json is missing", lambda d: (d / "meta.json").unlink()),
    "no metrics.csv": ("metrics.csv is missing", lambda d: (d / "metrics.csv").unlink()),
    "empty metrics.csv": (OTHER, lambda d: cut(d / "metrics.csv", 0)),
    "a row less": ("metrics.csv ends at step", lambda d: cut(d / "metrics.csv", -3)),
    "another score": ("damaged: final score", lambda d: edit(d, final_score=1e9)),
    "other versions": ("mixed versions", lambda d: edit(d, resumed=[{"versions": {"mujoco": "3.3.0"}}])),
    "flipped bits": ("damaged: masks.npz: ", lambda d: flip(d / "masks.npz")),
    "no masks in it": ("damaged: masks.npz: ", lambda d: np.savez(d / "masks.npz", global_step=np.zeros(0, int))),
    "masks that end early": ("its last mask is of step 29000, the last refresh of step 30000", lambda d: fewer(d)),
    "no arguments": (OTHER, lambda d: edit(d, args={})),
    "another pattern": ("mask that is not 2:4", lambda d: edit(d, n=2, m=4)),
    "garbage": (None, lambda d: swap(d / "metrics.csv", ",0.", ",zero.")),
    "no clock": (OTHER, lambda d: swap(d / "metrics.csv", "wall_time_s", "wall_time")),
    "infinite": ("damaged: final score", lambda d: infinite(d / "metrics.csv")),
} | {
    f"{key} {value}": (None, lambda d, key=key, value=value: edit(d, **{key: value}))
    for key, value in {"start": None, "final_score": "much", "versions": 3, "m": None, "kernel": None, "threads": None,
                       "flops_per_update": {}, "params_active": "many", "hardware": []}.items()
} | {
    f"argument {key} {value}": (None, lambda d, key=key, value=value: edit(d, args=args_of(d) | {key: value}))
    for key, value in {"seed": None, "env_id": None, "mask_update_interval": None, "gamma": [1]}.items()
}  # fmt: skip


def args_of(folder):
    return json.loads((folder / "meta.json").read_text())["args"]


def swap(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGE)
def test_runs_that_cant_be_used_are_named(rnm, tmp_path, damage):
    make_run(rnm, tmp_path / "runs/good")
    reason, act = DAMAGE[damage]
    act(make_run(rnm, tmp_path / "runs/bad", seed=2))
    runs, skipped = sa.load_all(sa.find_folders((str(tmp_path / "runs"),)))
    assert [run.name for run in runs] == ["good"]
    assert [name for name, _ in skipped] == ["bad"] and (reason or "damaged") in skipped[0][1]


def test_other_masks_than_logged_are_found(rnm, tmp_path):
    a, b = make_run(rnm, tmp_path / "a", seed=1), make_run(rnm, tmp_path / "b", seed=2)
    shutil.copy(a / "masks.npz", b / "masks.npz")
    with pytest.raises(sa.BadRun, match="sad_initial/actor"):
        sa.load_run(b)


def test_a_torn_line_and_a_doubled_row(rnm, tmp_path):
    folder = make_run(rnm, tmp_path / "a")
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[2:], "33000,1"]))
    loaded = sa.load_run(folder)
    assert loaded.metrics.index.is_unique and loaded.metrics.index[-1] == 30_000


def test_without_masks_and_without_sparse_runs(rnm, monkeypatch, capsys, tmp_path):
    (make_run(rnm, tmp_path / "runs/sparse") / "masks.npz").unlink()
    make_run(rnm, tmp_path / "runs/dense", n=None)
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "a", "--no-track")
    assert code == 0 and "without masks.npz" in err
    assert not list((tmp_path / "a").glob("*divergence*")) and list((tmp_path / "a").glob("*_sad.png"))
    shutil.rmtree(tmp_path / "runs/sparse")
    code, _, _ = run(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "b", "--no-track")
    assert code == 0 and len(list((tmp_path / "b").glob("*.png"))) == 2  # returns and scores


def test_bad_input(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for argv in ([], [tmp_path], [tmp_path / "nowhere"], [tmp_path, "--resamples", 5], ["--wandb-project-name", "p"],
                 [tmp_path, "--wandb-entity", "e", "--wandb-project-name", "p"]):  # fmt: skip
        code, _, err = run(monkeypatch, capsys, *argv, "--no-track")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, argv


def test_only_unusable_runs_is_an_error(rnm, monkeypatch, capsys, tmp_path):
    edit(make_run(rnm, tmp_path / "runs/a"), exit_reason="nan")
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "a", "--no-track")
    assert code == 2 and "error: no finished runs" in err


def test_runs_from_wandb(rnm, monkeypatch, capsys, tmp_path):
    """The cloud through a stub: rows come as dicts, those since a checkpoint twice; the rest are files."""
    import wandb

    folders = [make_run(rnm, tmp_path / "cloud/dense", n=None, score=80.0), make_run(rnm, tmp_path / "cloud/sparse")]

    class CloudFile:
        def __init__(self, path):
            self.path = path

        def download(self, root, replace):
            assert replace
            shutil.copy(self.path, root)

    class CloudRun:
        job_type = None

        def __init__(self, folder):
            self.id, self.name, self.folder = f"{folder.name}-1a2b", folder.name, folder

        def scan_history(self):
            rows = [
                {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(open(self.folder / "metrics.csv"))
            ]
            return [{**row, "_step": i} for i, row in enumerate(rows[:5] + rows[3:])]

        def files(self):
            return [types.SimpleNamespace(name=path.name) for path in self.folder.iterdir()]

        def file(self, name):
            if name == "masks.npz" and self.folder.name == "torn":
                raise TimeoutError("the line is down")
            return CloudFile(self.folder / name)

    class Api:
        def runs(self, path):
            assert path == "me/mine"
            others = [types.SimpleNamespace(job_type=job) for job in ("analysis", "benchmark")]
            return [*map(CloudRun, folders), *others]

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(sa, "FIGURES", {})
    argv = ("--wandb-entity", "me", "--wandb-project-name", "mine", "--no-track")
    code, _, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 0, err
    code, *_ = run(monkeypatch, capsys, tmp_path / "cloud", "--no-track", "--out", tmp_path / "b")
    a, b = (pd.read_csv(tmp_path / name / "summary.csv") for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    running, torn = (make_run(rnm, tmp_path / f"new/{name}", seed=3) for name in ("running", "torn"))
    (running / "meta.json").unlink()
    folders += [running, torn]
    code, out, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 0 and "skipped running: it has no meta.json, so it has not ended" in err
    assert "skipped torn: can't be downloaded: the line is down" in err and "2 runs, 2 skipped" in out
    folders[:] = [running]
    code, _, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 2 and "error: no finished runs among 1 in mine" in err


def test_offline_wandb_run(rnm, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    make_run(rnm, tmp_path / "runs/a")
    code, _, err = run(monkeypatch, capsys, "runs", "--resamples", 100)
    assert code == 0 and "warning" not in err
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_defaults_are_the_training_scripts(rnm):
    assert sa.DEFAULTS == {name: getattr(rnm.Args(), name) for name in sa.DEFAULTS}


def test_references_and_labels(rnm, tmp_path):
    """Dense of the same width is the reference, whatever width most runs have; a narrow dense run is none of 1:4's."""
    for seed in (1, 2, 3):
        make_run(rnm, tmp_path / f"narrow{seed}", seed=seed, n=None, args={"hidden_dim": 86})
        make_run(rnm, tmp_path / f"thin{seed}", seed=seed, args={"hidden_dim": 86, "mask_update_interval": 10_000})
    make_run(rnm, tmp_path / "wide", n=None)
    make_run(rnm, tmp_path / "sparse")
    runs, _ = sa.load_all(sa.find_folders((str(tmp_path),)))
    (study,), unmatched = sa.make_studies(runs)
    assert not unmatched
    assert study.reference == {
        "dense": "dense",
        "dense, width 86": "dense",
        "1:4": "dense",
        "1:4, K = 10000, width 86": "dense, width 86",
    }
    (study,), unmatched = sa.make_studies([run for run in runs if run.name != "wide"])
    assert [name for name, _ in unmatched] == ["sparse"] and "dense, width 86" not in study.reference


def test_other_machines_are_named(rnm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "FIGURES", {})
    for seed in (1, 2):
        make_run(rnm, tmp_path / f"runs/d{seed}", seed=seed, n=None, kernel="torch")
        make_run(rnm, tmp_path / f"runs/s{seed}", seed=seed, hardware=f"CPU {seed}")
    code, out, _ = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "- commit None, torch 2.13.0, gymnasium None, mujoco 3.4.0, numpy None\n" in out
    assert "- kernel nm, on CPU 1, threads 1 or CPU 2, threads 1: 1:4\n" in out
    assert "- kernel torch, on a CPU, threads 1: dense\n" in out
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert table.training_minutes["dense"] == 5 and np.isnan(table.training_minutes["1:4"])


def test_figures_of_long_names_stay_apart(rnm, tmp_path):
    changes = {"buffer_size": (10**5, 10**6), "exploration_noise": (0.1, 0.2), "learning_starts": (1000, 2000),
               "policy_noise": (0.2, 0.3), "tau": (0.005, 0.006)}  # fmt: skip
    for i in range(4):
        args = {name: values[i % 2] for name, values in changes.items()} | {"tau": 0.005 + i / 1000}
        make_run(rnm, tmp_path / str(i), args=args)
    studies, _ = sa.make_studies(sa.load_all(sa.find_folders((str(tmp_path),)))[0])
    assert len({study.file for study in studies}) == 4


def test_a_glob_that_hits_other_files(rnm, monkeypatch, capsys, tmp_path):
    make_run(rnm, tmp_path / "below/a")
    (tmp_path / "notes.txt").write_text("")
    assert run(monkeypatch, capsys, tmp_path / "n*", "--no-track")[0] == 2
    assert sa.find_folders((str(tmp_path / "below/a/metrics.csv"),)) == [(tmp_path / "below/a").resolve()]


def test_what_is_drawn_by_hand(rnm, tmp_path):
    """Of four seeds the IQM is the mean of the middle two; a band holds it; minutes end with the first seed's."""
    for seed, score in enumerate((100.0, 200.0, 400.0, 1000.0), 1):
        make_run(rnm, tmp_path / str(seed), seed=seed, score=score)
        make_run(rnm, tmp_path / f"d{seed}", seed=seed, n=None, hardware=f"CPU {seed}")
        make_run(rnm, tmp_path / f"x{seed}", seed=seed, n=3, m=8)
    runs, _ = sa.load_all(sa.find_folders((str(tmp_path),)))
    (study,), _ = sa.make_studies(runs)
    figure = sa.draw_returns(study, 200)
    steps, minutes = figure.axes[2:4] if "1:4" in figure.axes[2].get_legend_handles_labels()[1][1] else figure.axes[:2]
    lines = {line.get_label().partition(" ")[0]: line for line in steps.lines}
    assert list(lines) == ["dense", "1:4"]
    x, y = lines["1:4"].get_data()
    assert x.tolist() == [3.0 * i for i in range(11)] and y == pytest.approx(300 * x / 30)
    band = steps.collections[1].get_paths()[0].vertices
    assert band[:, 1].max() <= 1000 and band[band[:, 0] == 30, 1].min() < 300 < band[band[:, 0] == 30, 1].max()
    assert [line.get_label().partition(" ")[0] for line in minutes.lines] == ["1:4"]  # dense ran on several machines
    colors = {label: sa.style(study, label)[0] for label in study.configurations}
    assert len(set(colors.values())) == 3 and colors["1:4"] == sa.COLORS["1:4"]


def test_what_is_not_drawn_is_named(rnm, monkeypatch, capsys, tmp_path):
    make_run(rnm, tmp_path / "runs/d", n=None)
    make_run(rnm, tmp_path / "runs/s", args={"mask_update_interval": 0})
    make_run(rnm, tmp_path / "runs/k", args={"mask_update_interval": 10**6})  # never refreshed either
    code, out, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "(interval: of several K): sad, sad_layers, divergence, ages, sad_return\n" in err
    assert "Settled SAD (from" not in out


def test_thin_never_overwrites(rnm, monkeypatch, capsys, tmp_path):
    make_run(rnm, tmp_path / "runs/a")
    before = (tmp_path / "runs/a/masks.npz").read_bytes()
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--thin", tmp_path / "runs")
    assert code == 2 and "exists already" in err and (tmp_path / "runs/a/masks.npz").read_bytes() == before


@pytest.mark.parametrize(("name", "runs"), [("halfcheetah_60k", 45), ("halfcheetah_300k", 6)])
def test_the_readme_shows_what_the_committed_runs_give(monkeypatch, capsys, tmp_path, name, runs):
    root = sa.Path(__file__).parent.parent
    folder, drawn = root / "results" / name, list(sa.FIGURES)
    monkeypatch.setattr(sa, "FIGURES", {})
    code, out, _ = run(monkeypatch, capsys, folder, "--no-track", "--out", tmp_path)
    assert code == 0 and f"{runs} runs, 0 skipped" in out
    text = (tmp_path / "summary.md").read_text()
    assert text == (folder / "summary.md").read_text()
    text = text.partition("\n## ")[2].partition("\n")[2].partition("\n## Not compared")[0].strip()
    assert text in (root / "README.md").read_text()
    figures = {path.stem.partition("steps_")[2] for path in folder.glob("*.png")}
    assert figures == (set(drawn) if runs == 45 else set())
