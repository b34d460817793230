"""sad_analysis.py: its files from made-up runs, what it says of bad ones."""

import csv
import dataclasses
import io
import json
import os
import shutil
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

import sad_analysis as sa

SHAPES = {"fc1": (8, 10), "fc2": (8, 8)}
ARGS = {
    "env_id": "Ant-v4",
    "total_timesteps": 30_000,
    "learning_starts": 1000,
    "batch_size": 256,
    "policy_frequency": 2,
    "gamma": 0.99,
    "hidden_dim": 256,
    "eval_interval": 3000,
}


def make_run(folder, *, seed=1, n=1, m=4, score=100.0, args=None, nets=("actor", "qf1", "qf2"), pace=200, **changes):
    """A finished run's folder as the training scripts leave it: evaluations at `score`, masks that drift; `pace` in
    steps per second."""
    script = "rnm_td3_continuous" if n else "dense_td3_continuous"
    args = ARGS | {"exp_name": script, "seed": seed, "threads": 1} | (args or {})
    if n:
        args = {"n": n, "m": m, "mask_update_interval": 1000, "sparse_head": False} | args
    folder.mkdir(parents=True)
    total = args["total_timesteps"]
    rows = {
        step: {
            "eval/episodic_return": score * step / total,
            "charts/wall_time_s": step / 100,
            "charts/cpu_time_s": step / pace,
        }
        for step in range(0, total + 1, 3000)
    }
    evaluations = [[step, row["eval/episodic_return"]] for step, row in rows.items() if step]
    if n:
        write_masks(folder, rows, {f"{net}.{layer}": shape for net in nets for layer, shape in SHAPES.items()}, args)
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_index()
    frame.to_csv(folder / "metrics.csv", index_label="global_step")
    part = {"name": "fc1", "type": "Linear", "weight": [8, 10], "active": 20}
    meta = {
        "script": f"{script}.py",
        "code": "c0de" * 4,
        "run_name": folder.name,
        "n": n,
        "m": m if n else None,
        "args": args,
        "start": f"2026-01-0{seed}",
        "exit_reason": "finished",
        "final_score": sa.final_score(evaluations),
        "params_active": 1000,
        "modules": {net: [part] for net in nets},
        "kernel": "nm",
        "hardware": "a CPU",
        "threads": 1,
        "versions": {"mujoco": "3.4.0", "torch": "2.13.0"},
    }
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder


def write_masks(folder, rows, shapes, args):
    """masks.npz and the SAD in rows: after learning_starts at every multiple of K, but not at the last step."""
    generator = torch.Generator().manual_seed(args["seed"])
    W = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    E = first = {name: sa.project(w, args["n"], args["m"]) for name, w in W.items()}
    steps, history, K = [0], [E], args["mask_update_interval"]
    for step in range(args["learning_starts"] + K, args["total_timesteps"], K) if K else ():
        for w in W.values():
            w += 0.2 * torch.randn(w.shape, generator=generator)
        new = {name: sa.project(w, args["n"], args["m"]) for name, w in W.items()}
        rows.setdefault(step, {}).update(sa.sad_metrics(first, E, new))
        E = new
        steps.append(step)
        history.append(E)
    arrays = {name: np.stack([np.packbits(masks[name].numpy()) for masks in history]) for name in shapes}
    arrays |= {f"{name}.shape": np.array(shape) for name, shape in shapes.items()}
    np.savez_compressed(folder / "masks.npz", global_step=np.array(steps), update=np.array(steps), **arrays)


def load(folder):
    """Of all runs in a folder: (studies, replaced, skipped)."""
    runs, skipped = sa.load_all(sa.find_folders((str(folder),)))
    return *sa.make_studies(runs), skipped


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["sad_analysis.py", *map(str, argv)])
    try:
        code = sa.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("total", [400, 390])  # the last multiple of K is the last step, or is before it
def test_a_real_run(rnm, dense, small, total):
    changes = {"total_timesteps": total, "mask_update_interval": 20}
    folder = rnm.train(small(rnm, n=1, m=4, **changes))["run_dir"]
    loaded = sa.load_run(sa.Path(folder))
    logged = loaded.curve("sad_initial/qf1")
    assert len(logged) > 5 and logged.index[-1] == 380  # no refresh at the very last step
    pairwise = loaded.masks["qf1"]
    assert pairwise.index[1:].tolist() == logged.index.tolist()
    assert pairwise.iloc[0, 1:].to_numpy() == pytest.approx(logged.to_numpy(), abs=1e-7)
    other = sa.load_run(sa.Path(dense.train(small(dense, total_timesteps=total))["run_dir"]))
    assert loaded.fork == other.fork == "" and loaded.setting == other.setting
    assert loaded.code.startswith("code ") and loaded.code != other.code
    assert 0 < sa.flops_per_update(loaded.meta) < sa.flops_per_update(other.meta)


def test_arguments_are_sorted(rnm, dense, rlx2, mst):
    """Whoever adds an argument says whether it must agree, is of no consequence, or tells configurations apart."""
    known, own = {*sa.SETTING, *sa.NEUTRAL}, {field.name for field in dataclasses.fields(mst.Args)}
    assert known < own and own - known == {*sa.MST, *sa.IN_PATTERN["critic_regime"]}
    assert sa.MST == {name: getattr(mst.Args(), name) for name in sa.MST}
    known -= own - {field.name for field in dataclasses.fields(rnm.Args)}
    assert {field.name for field in dataclasses.fields(dense.Args)} == known - {"kernel"} | {"hidden_dim"}
    assert {field.name for field in dataclasses.fields(rnm.Args)} == known | {"n", "m", *sa.DEFAULTS}
    assert {field.name for field in dataclasses.fields(rlx2.Args)} == known | {
        "hidden_dim",
        *sa.RLX2,
        *sa.IN_PATTERN["topology"],
    }
    assert sa.RLX2 == {name: getattr(rlx2.Args(), name) for name in sa.RLX2}
    assert sa.DEFAULTS == {name: getattr(rnm.Args(), name) for name in sa.DEFAULTS}


def test_end_to_end(monkeypatch, capsys, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2, 3):
        make_run(runs / f"dense_{seed}", seed=seed, n=None, score=100.0 + seed)
        make_run(runs / f"sparse_{seed}", seed=seed, score=110.0 + 2 * seed)
        make_run(runs / f"fast_{seed}", seed=seed, score=90.0, args={"mask_update_interval": 100})
        make_run(runs / f"head_{seed}", seed=seed, score=80.0, args={"sparse_head": True})
    make_run(runs / "static_1", seed=1, score=85.0, args={"mask_update_interval": 0})
    code, out, err = run(monkeypatch, capsys, runs, "--out", tmp_path / "a", "--no-track")
    assert code == 0 and not err, err
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert list(table.index) == ["dense", "1:4", "1:4, K = 100", "1:4, sparse head", "1:4, static masks"]
    last_half = np.mean([0.6, 0.7, 0.8, 0.9, 1.0])
    scores, dense = last_half * np.array([112, 114, 116]), last_half * np.array([101, 102, 103])
    assert table.final_score_iqm["1:4"] == pytest.approx(scores.mean())  # of three runs none is trimmed
    assert table.of_dense["1:4"] == pytest.approx(scores.mean() / dense.mean())
    assert table.gain["1:4"] == pytest.approx((scores - dense).mean()) and table.gain_pairs["1:4"] == 3
    assert table.gain_low["1:4"] == pytest.approx((scores - dense).min(), rel=0.05)
    assert table.default_gain["1:4, K = 100"] == pytest.approx(last_half * (90 - np.mean([112, 114, 116])))
    assert table.default_gain["1:4, static masks"] == pytest.approx(last_half * (85 - 112))
    assert table.default_gain_pairs["1:4, static masks"] == 1 and np.isnan(table.default_gain["1:4"])
    assert table.p_better["1:4"] == 1.0 and table.p_better["1:4, K = 100"] == 0.0
    assert np.isnan(table.of_dense["dense"]) and np.isnan(table.settled_sad["dense"])
    assert table.settled_sad["1:4"] > 0 and table.settled_sad["1:4, static masks"] == 0
    assert np.isnan(table.final_score_iqm_low["1:4, static masks"])  # one seed has no interval
    names = {path.stem.split("steps_")[-1] for path in (tmp_path / "a").glob("*.png")}
    assert (
        names
        == set(sa.FIGURES) - {"plasticity"}
        == {path.stem.split("steps_")[-1] for path in (tmp_path / "a").glob("*.svg")}
    )
    assert len(names) == 8
    assert "1:4, K = 100" in out and (tmp_path / "a/summary.md").read_text() in out
    assert f"| 1:4, static masks | 1 | {last_half * 85:.0f} | dense (seeds 1, 2, 3) | " in out


def test_environments_are_pooled_relative_to_dense(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    for env_id, scale in (("Ant-v4", 1.0), ("Hopper-v4", 10.0), ("Pendulum-v1", -1.0)):
        for seed in (1, 2, 3):
            options = {"seed": seed, "args": {"env_id": env_id}}
            make_run(tmp_path / f"runs/{env_id}_d{seed}", n=None, score=scale * 100.0, **options)
            make_run(tmp_path / f"runs/{env_id}_s{seed}", score=scale * (120.0 + 10 * seed), **options)
    code, out, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "a/summary.csv")
    pooled = table[table.setting == "Ant-v4 + Hopper-v4, 30,000 steps: relative to dense"].iloc[0]
    assert pooled.of_dense == pytest.approx(1.4) and pooled.seeds == "3 + 3"  # (1.3, 1.4, 1.5) twice, trimmed
    assert 1.3 <= pooled.of_dense_low < 1.4 < pooled.of_dense_high <= 1.5
    assert "| 1:4 | 3 + 3 | 1.4 [" in out
    for env_id in ("Ant-v4", "Hopper-v4"):  # another setting, which is pooled for itself and says what it is
        options = {"seed": 1, "args": {"env_id": env_id, "gamma": 0.9}}
        make_run(tmp_path / f"runs/{env_id}_gd", n=None, score=50.0, **options)
        make_run(tmp_path / f"runs/{env_id}_gs", score=100.0, **options)
    assert run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "b")[0] == 0
    both = pd.read_csv(tmp_path / "b/summary.csv").set_index("setting")
    assert both.of_dense["Ant-v4 + Hopper-v4, 30,000 steps, gamma 0.9: relative to dense"] == pytest.approx(2.0)
    assert both.of_dense["Ant-v4 + Hopper-v4, 30,000 steps, gamma 0.99: relative to dense"] == pytest.approx(1.4)
    row = table[table.setting.str.startswith("Pendulum") & (table.configuration == "1:4")].iloc[0]
    assert np.isnan(row.of_dense) and row.p_better == 0  # a share of a negative return means nothing


def test_what_does_not_match_is_listed_and_not_mixed(monkeypatch, capsys, tmp_path):
    runs = tmp_path / "runs"
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    make_run(runs / "dense_1", n=None)
    make_run(runs / "sparse_1", score=50.0)
    make_run(runs / "sparse_2", seed=2, score=60.0)
    make_run(runs / "again_2", seed=2, score=70.0, start="2026-02-02")
    other = {"mujoco": "3.5.0", "torch": "2.13.0"}
    make_run(runs / "other_physics", seed=3, versions=other)
    make_run(runs / "changed_physics", seed=3, resumed=[{"versions": other}])
    make_run(runs / "other_gamma", seed=4, args={"gamma": 0.9})
    make_run(runs / "narrow", seed=5, args={"hidden_dim": 64})
    code, out, err = run(monkeypatch, capsys, runs / "*", "--out", tmp_path / "a", "--no-track")
    assert code == 0 and err == "skipped sparse_2: same configuration and seed as the later again_2\n"
    assert out.count("Not compared with dense, for want of dense runs of the same setting and width:\n\n- 1:4") == 4
    table = pd.read_csv(tmp_path / "a/summary.csv")
    row = table[(table.configuration == "1:4") & table.of_dense.notna()].iloc[0]
    assert row.seeds == 2 and row.gain_pairs == 1  # dense has seed 1 only
    for name in ("mujoco 3.5\n", "mujoco 3.4 then 3.5\n", "gamma 0.9, mujoco 3.4\n"):
        assert name in out


def test_thinned_runs_tell_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    for seed in (1, 2):
        make_run(tmp_path / f"runs/dense_{seed}", seed=seed, n=None, args={"total_timesteps": 60_000})
        options = {"total_timesteps": 60_000, "runs_dir": "/home/me"}
        make_run(tmp_path / f"runs/sparse_{seed}", seed=seed, score=120.123456 + seed, args=options)
    argv = ("--no-track", "--out", tmp_path / "a", "--thin", tmp_path / "thin")
    assert run(monkeypatch, capsys, tmp_path / "runs", *argv)[0] == 0
    assert run(monkeypatch, capsys, tmp_path / "thin", "--no-track", "--out", tmp_path / "b")[0] == 0
    a, b = (pd.read_csv(tmp_path / name / "summary.csv") for name in "ab")
    assert (a["settled_step/qf1"].dropna() > 0).any()
    pd.testing.assert_frame_equal(a, b)
    assert {path.name for path in (tmp_path / "thin/sparse_1").iterdir()} == {"meta.json", "metrics.csv", "sad.npz"}
    whole, thin = (sa.load_run(tmp_path / name / "sparse_1") for name in ("runs", "thin"))
    kept = thin.curves.index
    assert kept[0] == whole.curves.index[0] and kept[-1] == whole.curves.index[-1]
    assert 40 <= len(kept) <= 48 < len(whole.curves)
    pd.testing.assert_frame_equal(thin.curves, whole.curves.loc[kept])
    for net, E in whole.masks.items():
        pd.testing.assert_frame_equal(thin.masks[net], E.loc[kept, kept])
    refreshes = {name: x.curve("sad/qf1") for name, x in (("whole", whole), ("thin", thin))}
    assert len(refreshes["whole"]) == 58 > len(refreshes["thin"]) >= 40
    assert np.allclose(refreshes["thin"], refreshes["whole"][refreshes["thin"].index], rtol=1e-11)
    assert thin.args == whole.args | {"runs_dir": "runs"} and thin.meta["final_score"] == whole.meta["final_score"]
    for window in range(6000, 30_000, 1000):  # whatever K and steps of other runs make of it
        sa.thin_run(whole, tmp_path / str(window), window)
        own = sa.load_run(tmp_path / str(window) / "sparse_1")
        assert [sa.settled_sad(own, x) for x in (window, 6000)] == [sa.settled_sad(whole, x) for x in (window, 6000)]
    before = (tmp_path / "thin/sparse_1/sad.npz").read_bytes()
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--thin", tmp_path / "thin")
    assert code == 2 and "exists already" in err and (tmp_path / "thin/sparse_1/sad.npz").read_bytes() == before


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def fewer(folder):
    with np.load(folder / "masks.npz") as file:
        arrays = {key: value if key.endswith(".shape") else value[:-1] for key, value in file.items()}
    np.savez_compressed(folder / "masks.npz", **arrays)


def flip(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 100):  # whatever of the archive lies there
        data[i] ^= 1
    path.write_bytes(bytes(data))


def edit(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, key):
    meta = json.loads((folder / "meta.json").read_text())
    del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))


def swap(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


OTHER = "damaged, or of another version"
DAMAGE = {
    "running": ("not finished (exit reason: running)", lambda d: edit(d, exit_reason="running")),
    "stopped": ("not finished (exit reason: sigterm)", lambda d: edit(d, exit_reason="sigterm")),
    "half a meta.json": (OTHER, lambda d: cut(d / "meta.json", 30)),
    "no metrics.csv": (OTHER, lambda d: (d / "metrics.csv").unlink()),
    "no masks.npz": (OTHER, lambda d: (d / "masks.npz").unlink()),
    "a row less": ("metrics.csv ends at step", lambda d: swap(d / "metrics.csv", "\n30000,", "\n29999,")),
    "a hole": ("no evaluation at step 9000", lambda d: swap(d / "metrics.csv", "\n9000,30.0,", "\n9000,,")),
    "another score": ("damaged: final score", lambda d: edit(d, final_score=80.00001)),
    "flipped bits": (OTHER, lambda d: flip(d / "masks.npz")),
    "masks that end early": ("damaged: the last sad_initial/actor", lambda d: fewer(d)),
    "no start": (OTHER, lambda d: edit(d, start=None)),
    "no arguments": (OTHER, lambda d: edit(d, args={})),
    "no seed": (OTHER, lambda d: edit(d, args={key: value for key, value in ARGS.items()})),
    "no count": (OTHER, lambda d: drop(d, "params_active")),
    "garbage": (OTHER, lambda d: swap(d / "metrics.csv", ",0.", ",zero.")),
    "other masks": ("damaged: the last sad_initial/actor", lambda d: shutil.copy(d.parent / "good/masks.npz", d)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_runs_that_cant_be_used_are_named(tmp_path, damage):
    make_run(tmp_path / "runs/good")
    reason, act = DAMAGE[damage]
    act(make_run(tmp_path / "runs/bad", seed=2))
    runs, skipped = sa.load_all(sa.find_folders((str(tmp_path / "runs"),)))
    assert [run.name for run in runs] == ["good"]
    assert [name for name, _ in skipped] == ["bad"] and reason in skipped[0][1]


def test_names_without_a_run_are_told(monkeypatch, capsys, tmp_path):
    """Beside good ones, that count."""
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    make_run(tmp_path / "good")
    (make_run(tmp_path / "headless", seed=2) / "meta.json").unlink()
    (tmp_path / "file").touch()
    names = [tmp_path / name for name in ("good", "headless", "file")]
    code, out, err = run(monkeypatch, capsys, *names, "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "1 run, 0 skipped" in out
    notes = [f"note: no run in {tmp_path}/{name}: it has no meta.json" for name in ("headless", "file")]
    notes.insert(1, f"note: {tmp_path}/file is not read: Not a directory")
    assert [line for line in err.splitlines() if "not drawn" not in line] == notes


def test_doubled_rows_are_merged(tmp_path):
    path = make_run(tmp_path / "a") / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    earlier = lines[2].rpartition(",")[0] + ",99.0\n"  # by another clock
    path.write_text("".join([*lines[:2], earlier, *lines[2:]]))
    metrics = sa.load_run(tmp_path / "a").metrics
    assert metrics.index.is_unique and 99.0 not in metrics.to_numpy()


def test_bad_input(monkeypatch, capsys, tmp_path):
    edit(make_run(tmp_path / "runs/a"), exit_reason="nan")
    (tmp_path / "file").write_text("")
    for argv in (
        [],
        [tmp_path / "file"],
        [tmp_path / "nowhere"],
        [tmp_path, "--resamples", 5],
        ["--wandb-entity", "e"],
        ["--wandb-project-name", "p"],
        [tmp_path, "--wandb-entity", "e", "--wandb-project-name", "p"],
        [tmp_path / "runs"],
    ):
        code, _, err = run(monkeypatch, capsys, *argv, "--no-track", "--out", tmp_path / "out")
        assert code == 2 and err.splitlines()[-1].startswith("error: "), argv
    make_run(tmp_path / "runs/b")
    code, _, err = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "file")
    assert code == 2 and "--out" in err.splitlines()[-1]
    make_run(tmp_path / "runs/deeper/b", seed=2)
    argv = tmp_path / "runs", "--no-track", "--out", tmp_path / "out", "--thin", tmp_path / "thin"
    code, _, err = run(monkeypatch, capsys, *argv)
    assert code == 2 and err.endswith("error: --thin: 2 folders of runs are called b, rename them\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_and_a_reader_that_is_gone(monkeypatch, capsys, tmp_path):
    make_run(tmp_path / "a", n=None)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(gone, write_through=True))
        patch.setattr(sys, "argv", ["sad_analysis.py", str(tmp_path / "a"), "--no-track", f"--out={tmp_path / 'out'}"])
        assert sa.main() == 0
    assert (tmp_path / "out/summary.md").exists() and capsys.readouterr().err.count("\n") == 1  # what is not drawn

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sa, "analyse", stop)
    assert run(monkeypatch, capsys, tmp_path / "a") == (130, "", "")


def test_links_are_followed_once(tmp_path):
    make_run(tmp_path / "runs/a")
    make_run(tmp_path / "elsewhere/b")
    (tmp_path / "runs/b").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "runs/again").symlink_to(tmp_path / "runs")
    (tmp_path / "elsewhere/b/round").symlink_to(tmp_path)
    for patterns in ([str(tmp_path / "runs")], [f"{tmp_path}/runs/*", str(tmp_path)]):
        assert sa.find_folders(tuple(patterns)) == [tmp_path / "elsewhere/b", tmp_path / "runs/a"]


def test_runs_from_wandb(monkeypatch, capsys, tmp_path):
    """The cloud through a stub: rows come as dicts, those since a checkpoint twice; the rest are files."""
    import wandb

    folders = [make_run(tmp_path / "cloud/dense", n=None, score=80.0), make_run(tmp_path / "cloud/sparse")]

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
            file = csv.DictReader((self.folder / "metrics.csv").read_text().splitlines())
            rows = [{k: float(v) for k, v in row.items() if v} for row in file]
            video = {"global_step": rows[-1]["global_step"], "video": {"_type": "video-file"}}
            return [{**row, "_step": i} for i, row in enumerate([*rows[:5], *rows[3:], video])]

        def files(self):
            return [types.SimpleNamespace(name=path.name) for path in self.folder.iterdir()]

        def file(self, name):
            if name == "masks.npz" and self.folder.name == "torn":
                raise TimeoutError("the line is down")
            return CloudFile(self.folder / name)

    class Api:
        def runs(self, path):
            if path != "me/mine":
                raise ValueError("no such project")
            others = [types.SimpleNamespace(job_type=job) for job in ("analysis", "benchmark")]
            return [*map(CloudRun, folders), *others]

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    argv = ("--wandb-entity", "me", "--wandb-project-name", "mine", "--no-track")
    code, _, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 0, err
    assert run(monkeypatch, capsys, tmp_path / "cloud", "--no-track", "--out", tmp_path / "b")[0] == 0
    a, b = (pd.read_csv(tmp_path / name / "summary.csv") for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    running, torn = (make_run(tmp_path / f"new/{name}", seed=3) for name in ("running", "torn"))
    (running / "meta.json").unlink()
    folders += [running, torn]
    code, out, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 0 and "skipped running: not read from W&B: it has no meta.json, so it has not ended" in err
    assert "skipped torn: not read from W&B: the line is down" in err and "2 runs, 2 skipped" in out
    folders[:] = [running]
    code, _, err = run(monkeypatch, capsys, *argv, "--out", tmp_path / "a")
    assert code == 2 and "error: no usable run (1 skipped" in err
    code, _, err = run(monkeypatch, capsys, *argv[:2], "--wandb-project-name", "other", "--no-track")
    assert code == 2 and "no such project" in err and "wandb login" in err


def test_offline_wandb_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/a")
    code, _, err = run(monkeypatch, capsys, "runs", "--resamples", 100)
    assert code == 0 and "warning" not in err
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


def test_other_machines_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    for seed in (1, 2):
        make_run(tmp_path / f"runs/d{seed}", seed=seed, n=None, kernel="torch", pace=100 * seed)
        make_run(tmp_path / f"runs/s{seed}", seed=seed, hardware=f"CPU {seed}", commit="abc", dirty=True)
    code, out, _ = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    common = f"code {'c0de' * 4}, torch 2.13.0, gymnasium None, mujoco 3.4.0, numpy None"
    assert code == 0 and f"- commit None, {common}, kernel torch, on a CPU, 1 thread: dense\n" in out
    for seed in (1, 2):
        assert f"- commit abc and changes, {common}, kernel nm, on CPU {seed}, 1 thread: 1:4\n" in out
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert np.isnan(table.core_minutes["1:4"])
    assert table.loc["dense", ["core_minutes", "fastest_seed", "slowest_seed"]].tolist() == [3.75, 2.5, 5]


def test_a_resume_elsewhere_counts(monkeypatch, capsys, tmp_path):
    """Half of the seeds elsewhere, two kernels, a GPU: no minutes. Another code: a configuration of its own."""
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    for name, m, resumed in (("a", 4, {"kernel": "torch"}), ("b", 8, {"threads": 8}), ("c", 16, {"code": "beef" * 4})):
        for seed in (1, 2):
            make_run(tmp_path / f"runs/{name}{seed}", seed=seed, m=m, resumed=[resumed] * (seed == 2))
    make_run(tmp_path / "runs/gpu", args={"device": "cuda"}, m=5)
    code, out, _ = run(monkeypatch, capsys, tmp_path / "runs", "--no-track", "--out", tmp_path / "a")
    assert code == 0 and "kernel nm, on a CPU, 1 thread then commit None" in out and "a CPU, 8 threads: 1:8" in out
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert table.core_minutes.dropna().to_dict() == {
        "1:16, code c0dec0": 2.5,
        "1:16, code c0dec0 then code beefbe": 2.5,
    }
    assert table.kernel["1:4, code c0dec0"] == "nm, nm then torch" and table.seeds["1:8, code c0dec0"] == 2
