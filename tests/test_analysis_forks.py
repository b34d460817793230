"""sad_analysis.py: forks, several codes of a script: never mixed, and named."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_analysis import load, make_run, run

import sad_analysis as sa


def labels(study):
    return {c.label: [run.name for run in c.runs] for c in study.configurations}


def linear(outputs, inputs, active=None):
    return {"name": "fc", "type": "Linear", "weight": [outputs, inputs], "active": active or outputs * inputs}


def test_flops_by_hand():
    """Batch 2, policy_frequency 4; actor 3 -> 5 -> 1, critics 4 -> 5 -> 1, 8 weights active in their first layers."""
    norm = {"name": "norm", "type": "LayerNorm", "weight": [5], "active": 5}  # no product
    nets = {"actor": [linear(5, 3), {"name": "relu1", "type": "ReLU"}, linear(1, 5)]}
    nets |= {name: [linear(5, 4, 8), norm, linear(1, 5)] for name in ("qf1", "qf2")}
    meta = {"args": {"batch_size": 2, "policy_frequency": 4}, "modules": nets}
    targets, critics = 20 + 2 * 13, 2 * (2 * 8 + 3 * 5)
    actor = (2 * 15 + 3 * 5 + 2 * 13) / 4
    assert sa.flops_per_update(meta) == 2 * 2 * (targets + critics + actor)
    more = sa.flops_per_update(meta | {"modules": nets | {"qf3": nets["qf1"]}})
    assert more - sa.flops_per_update(meta) == 2 * 2 * (13 + 2 * 8 + 3 * 5)


def test_forks_are_configurations_of_their_own(tmp_path):
    make_run(tmp_path / "d", n=None)
    make_run(tmp_path / "a")
    make_run(tmp_path / "copy", script="my_fork.py", code="1" * 16, args={"exp_name": "my_fork"})
    make_run(tmp_path / "name", args={"exp_name": "tanh", "mask_update_interval": 100})
    make_run(tmp_path / "both", script="my_fork.py", code="1" * 16, args={"exp_name": "tanh"})
    make_run(tmp_path / "flag", script="my_fork.py", code="1" * 16, args={"exp_name": "my_fork", "growth": 0.3})
    make_run(tmp_path / "dense_fork", n=None, args={"exp_name": "norm"})
    (study,), replaced, skipped = load(tmp_path)
    assert not replaced and not skipped
    assert labels(study) == {
        "dense": ["d"],
        "dense, norm": ["dense_fork"],
        "1:4": ["a"],
        "1:4, K = 100, tanh": ["name"],
        "1:4, growth 0.3, my_fork.py": ["flag"],
        "1:4, my_fork.py": ["copy"],
        "1:4, my_fork.py, tanh": ["both"],
    }
    assert {study.dense(c).label for c in study.configurations} == {"dense"}
    assert study.plain("1:4", 256).label == "1:4"


def test_no_argument_of_a_fork_is_lost(tmp_path):
    """Also one that a rival's pattern would name, such as nstep, or that a dense rival has no use for."""
    for name, own in (("dense", {}), ("rnm", {"n": 1, "m": 8})):
        for nstep in (1, 3):
            args = {"exp_name": f"{name}_nstep", "nstep": nstep}
            options = {"n": None} | own
            make_run(tmp_path / f"{name}{nstep}", script=f"{name}_nstep.py", code=name * 4, args=args, **options)
    for share in (0.1, 0.5):
        args = {"exp_name": "prune", "drop_fraction": share, "actor_sparsity": 0.9}
        make_run(tmp_path / f"prune{share}", n=None, script="prune.py", code="b" * 16, args=args)
    for kind, K in (("ring", 2000), ("mlp", "auto")):  # a name of RLx2's for something else; K is a word
        args = {"exp_name": "graph", "topology": kind, "mask_update_interval": K}
        make_run(tmp_path / kind, n=None, script="graph.py", code="9" * 16, pattern="dense", args=args)
    for nstep in (1, 3):  # a rival's copy that has become dense
        args = dict.fromkeys(sa.IN_PATTERN["topology"], 2) | {"exp_name": "control", "nstep": nstep}
        make_run(tmp_path / f"control{nstep}", n=None, script="control.py", code="7" * 16, pattern="dense", args=args)
    for kind in ("rigl", "set"):  # a rival's copy that has become N:M
        args = dict.fromkeys(sa.IN_PATTERN["topology"], 1) | {"exp_name": "nm", "topology": kind}
        make_run(tmp_path / kind, m=8, script="nm.py", code="8" * 16, args=args)
    (study,), replaced, _ = load(tmp_path)
    ones = ", ".join(f"{name} 1" for name in sa.IN_PATTERN["topology"][1:])
    twos = "dense, topology 2, nstep {}, dynamic_buffer 2, actor_sparsity 2, critic_sparsity 2, control.py".format
    assert not replaced and labels(study) == {
        "dense, K = 2,000, topology ring, graph.py": ["ring"],
        "dense, K = auto, topology mlp, graph.py": ["mlp"],
        f"1:8, topology rigl, {ones}, nm.py": ["rigl"],
        f"1:8, topology set, {ones}, nm.py": ["set"],
        "dense, drop_fraction 0.1, actor_sparsity 0.9, prune.py": ["prune0.1"],
        "dense, drop_fraction 0.5, actor_sparsity 0.9, prune.py": ["prune0.5"],
        twos(1): ["control1"],
        twos(3): ["control3"],
        "dense, nstep 1, dense_nstep.py": ["dense1"],
        "dense, nstep 3, dense_nstep.py": ["dense3"],
        "1:8, nstep 1, rnm_nstep.py": ["rnm1"],
        "1:8, nstep 3, rnm_nstep.py": ["rnm3"],
    }


def test_an_interval_that_is_a_word(tmp_path):
    """Masks change, but nothing is known of when: SAD is there, no other run is lost."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", seed=seed)
        path = tmp_path / f"b{seed}/meta.json"
        path.write_text(path.read_text().replace('"mask_update_interval": 1000', '"mask_update_interval": "auto"'))
    (study,), _, skipped = load(tmp_path)
    assert labels(study) == {"1:4": ["a1", "a2", "a3"], "1:4, K = auto": ["b1", "b2", "b3"]} and not skipped
    assert study.pairs(study.configurations[1]) == pytest.approx(study.pairs(study.configurations[0]))
    assert study.window == 3000 and sa.draw_interval(study, 100) is None


def test_arguments_that_are_lists(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", seed=seed, args={"actor_hidden_dim": [64, 64], "layers": [1, 2]})
    make_run(tmp_path / "b", args={"actor_hidden_dim": [64, 64], "layers": [1]})
    (study,), _, skipped = load(tmp_path)
    assert labels(study) == {"1:4, layers [1]": ["b"], "1:4, layers [1, 2]": ["a1", "a2"]} and not skipped


def test_several_codes_are_all_marked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sa, "draw", lambda *_: [])
    for seed in (1, 2):
        make_run(tmp_path / f"runs/d{seed}", seed=seed, n=None, code="d" * 16, score=100.0)
        make_run(tmp_path / f"runs/a{seed}", seed=seed, code="a" * 16)
    make_run(tmp_path / "runs/e1", n=None, code="e" * 16, score=50.0)
    make_run(tmp_path / "runs/b1", code="b" * 16, start="2027-01-01")
    make_run(tmp_path / "runs/b3", code="b" * 16, seed=3, args={"mask_update_interval": 100})
    (study,), replaced, _ = load(tmp_path / "runs")
    assert labels(study) == {
        "dense, code dddddd": ["d1", "d2"],
        "dense, code eeeeee": ["e1"],
        "1:4, K = 100, code bbbbbb": ["b3"],
        "1:4, code aaaaaa": ["a1", "a2"],
        "1:4, code bbbbbb": ["b1"],
    }
    assert not replaced
    code, out, _ = run(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "a", "--no-track")
    assert code == 0 and "of several codes of those, with the one that has the most seeds" in out
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert {name.partition(" (")[0] for name in table.dense.dropna()} == {"dense, code dddddd"}
    assert table.default["1:4, K = 100, code bbbbbb"] == table.default["1:4, code bbbbbb"] == "1:4, code aaaaaa"
    assert "| 1:4, code bbbbbb | 1 | 80 | dense, code dddddd (seeds 1, 2) | " in out  # its own is 1
    argv = (tmp_path / "runs", "--out", tmp_path / "b", "--no-track", "--pool-code")
    code, out, err = run(monkeypatch, capsys, *argv)
    assert code == 0 and "skipped a1: same configuration and seed as the later b1" in err
    table = pd.read_csv(tmp_path / "b/summary.csv").set_index("configuration")
    assert table.seeds.to_dict() == {"dense": 2, "1:4": 2, "1:4, K = 100": 1}


def test_codes_are_not_pooled_over_environments(tmp_path):
    for env_id, code in (("Ant-v4", "a"), ("Hopper-v4", "a"), ("Walker2d-v4", "b")):
        make_run(tmp_path / f"{env_id}_d", n=None, args={"env_id": env_id})
        make_run(tmp_path / f"{env_id}_s", code=code * 16, args={"env_id": env_id})
    studies, _, _ = load(tmp_path)
    (row,) = sa.pooled_rows(studies, 100)
    assert row["setting"] == "Ant-v4 + Hopper-v4, 30,000 steps: relative to dense" and row["seeds"] == "1 + 1"
    make_run(tmp_path / "again", code="b" * 16, args={"env_id": "Ant-v4"}, seed=2)  # Ant's labels now have the code
    pairs = [(row["setting"][:20], row["seeds"]) for row in sa.pooled_rows(load(tmp_path)[0], 100)]
    assert pairs == [("Ant-v4 + Hopper-v4, ", "1 + 1"), ("Ant-v4 + Walker2d-v4", "1 + 1")]


def test_a_dense_network_with_as_many_weights(tmp_path):
    for width, weights in ((256, 200_000), (86, 28_818), (89, 30_900), (90, 31_300)):
        make_run(tmp_path / f"d{width}", n=None, params_active=weights, args={"hidden_dim": width})
    make_run(tmp_path / "s", m=8, params_active=30_472)
    make_run(tmp_path / "head", m=8, params_active=28_680, args={"sparse_head": True})
    make_run(tmp_path / "k", m=8, params_active=30_472, args={"mask_update_interval": 0})
    (study,), _, _ = load(tmp_path)
    assert labels(study) == {
        "dense": ["d256"],
        "dense, as many weights as 1:8": ["d89"],  # the nearest of two within 3 %
        "dense, width 86": ["d86"],
        "dense, width 90": ["d90"],
        "1:8": ["s"],
        "1:8, sparse head": ["head"],
        "1:8, static masks": ["k"],
    }
    assert {study.dense(c).label for c in study.configurations} == {"dense"}
    shutil.rmtree(tmp_path / "s")
    (study,), _, _ = load(tmp_path)  # static masks have as many
    assert "dense, as many weights as 1:8" in labels(study)


def test_no_two_widths_have_one_name():
    """Two methods of one sparsity keep a little more and a little less."""

    def network(pattern, width, active):
        meta = {"n": None, "modules": {"actor": [{"active": active}]}}
        return SimpleNamespace(fork="", args={}, pattern=pattern, width=width, meta=meta)

    sizes = ("RigL 90/85", 256, 30_900), ("SET 90/85", 256, 31_300), ("dense", 89, 30_900), ("dense", 90, 31_300)
    assert sa.dense_twins([network(*size) for size in sizes]) == {89: "as many weights as 90/85"}


def test_references_of_other_widths(tmp_path):
    """Dense of the same width is the reference, whatever width most runs have; a narrow dense run is none of 1:4's."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"narrow{seed}", seed=seed, n=None, params_active=300, args={"hidden_dim": 86})
        make_run(tmp_path / f"thin{seed}", seed=seed, args={"hidden_dim": 86, "mask_update_interval": 10_000})
    make_run(tmp_path / "wide", n=None)
    make_run(tmp_path / "sparse")
    (study,), _, _ = load(tmp_path)
    assert {c.label: study.dense(c).label for c in study.configurations} == {
        "dense": "dense",
        "dense, width 86": "dense",
        "1:4": "dense",
        "1:4, K = 10,000, width 86": "dense, width 86",
    }
    shutil.rmtree(tmp_path / "wide")
    (study,), _, _ = load(tmp_path)
    assert [c.label for c in study.configurations if not study.dense(c)] == ["dense, width 86", "1:4"]


def test_labels_sort_by_number(tmp_path):
    for K in (10_000, 500, 1000, 0, 100):
        make_run(tmp_path / f"every{K}", args={"mask_update_interval": K})
    (study,), _, _ = load(tmp_path)
    names = ["1:4", "1:4, K = 100", "1:4, K = 500", "1:4, K = 10,000", "1:4, static masks"]  # 1,000 is the default
    assert [c.label for c in study.configurations] == names
    names = ["a", "a, x 0.05", "a, x 0.25", "a, x 0.3", "a, x 0.5", "b", "1:4"]
    assert sorted(names[::-1], key=sa.in_words_and_numbers) == ["1:4", *names[:-1]]


def test_a_third_critic_has_panels_and_columns(monkeypatch, capsys, tmp_path):
    make_run(tmp_path / "runs/a")
    make_run(
        tmp_path / "runs/b", script="my_fork.py", args={"exp_name": "my_fork"}, nets=("actor", "qf1", "qf2", "qf3")
    )
    (study,), _, _ = load(tmp_path / "runs")
    assert study.nets == ["actor", "qf1", "qf2", "qf3"]
    for name in ("sad", "sad_layers", "ages"):
        figure = sa.FIGURES[name](study, 100)
        curves = {ax.get_title(): len(ax.lines) for ax in figure.axes}
        layers = [f"{net}, {layer}" for layer in ("fc1", "fc2") for net in study.nets]
        titles = layers if name == "sad_layers" else study.nets
        assert curves == {title: 1 if title.startswith("qf3") else 2 for title in titles}
    shown = [ax.get_visible() for ax in sa.draw_divergence(study, 100).axes[:8]]
    assert shown == [True, True, True, False, True, True, True, True]
    code, out, _ = run(monkeypatch, capsys, tmp_path / "runs", "--out", tmp_path / "a", "--no-track")
    table = pd.read_csv(tmp_path / "a/summary.csv").set_index("configuration")
    assert code == 0 and np.isnan(table["settled_step/qf3"]["1:4"]) and table["settled_step/qf3"]["1:4, my_fork.py"] > 0
    assert "| settled step/qf2 | settled step/qf3 |" in out


def test_masks_that_are_not_along_rows_are_named(tmp_path):
    folder = make_run(tmp_path / "a")
    with np.load(folder / "masks.npz") as file:
        arrays = {key: value for key, value in file.items()}
    for key in list(arrays):
        if f"{key}.shape" in arrays:
            arrays[key] = arrays[key][:, ::-1].copy()  # keeps SAD and how many are active
    np.savez_compressed(folder / "masks.npz", **arrays)
    (study,), _, _ = load(tmp_path)
    assert [*labels(study)] == ["1:4, masks not 1:4 along rows"]
    assert study.plain("1:4", 256) is None
    for place, rowwise in ((0, False), (7, True), (-1, False)):  # of the first and the last mask this is asked
        folder = make_run(tmp_path / f"at {place}" / "a")
        with np.load(folder / "masks.npz") as file:
            arrays = dict(file)
        for name in ("qf1.fc1", "qf1.fc2"):
            arrays[name][place] = arrays[name][place, ::-1]
        np.savez_compressed(folder / "masks.npz", **arrays)
        frame = pd.read_csv(folder / "metrics.csv")
        if place in (0, -1):  # the distance that is checked, too, is another one
            frame.loc[:, frame.columns.str.startswith("sad_initial/qf1")] = np.nan
        frame.to_csv(folder / "metrics.csv", index=False)
        assert sa.load_run(folder).rowwise is rowwise, place


def test_the_plain_configuration_has_all_at_its_default(tmp_path):
    """However many seeds the others have."""
    make_run(tmp_path / "plain")
    for seed in (1, 2):
        make_run(tmp_path / f"fast_{seed}", seed=seed, args={"mask_update_interval": 100})
        make_run(tmp_path / f"head_{seed}", seed=seed, args={"sparse_head": True})
    (study,), _, _ = load(tmp_path)
    assert study.plain("1:4", 256).label == "1:4" and len(study.configurations) == 3


def test_what_is_no_rlx2_is_not_named_so():
    names = {(3, True): "RLx2", (2, True): "RigL + n = 2 + dynamic buffer", (1, True): "RigL + dynamic buffer"}
    names |= {(3, False): "RigL + n = 3", (1, False): "RigL"}
    for (nstep, dynamic), name in names.items():
        args = {"topology": "rigl", "nstep": nstep, "dynamic_buffer": dynamic}
        meta = {"n": None, "pattern": "rigl_90_85", "args": args | {"actor_sparsity": 0.9, "critic_sparsity": 0.85}}
        assert sa.find_pattern(meta) == f"{name} 90/85"
