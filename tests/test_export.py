"""export_policy.py: the C policy against torch, its tables by hand, what it refuses."""

import ctypes
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import export_policy as ex


def export(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["export_policy.py", *map(str, argv)])
    capsys.readouterr()
    try:
        code = ex.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def compiled(folder, inputs, outputs, *flags):
    """actions of observations [B, inputs] by policy.c, compiled without warnings."""
    out = folder / "policy.so"
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", *flags]
    subprocess.run(["cc", *strict, "-shared", "-fPIC", str(folder / "policy.c"), "-o", str(out), "-lm"], check=True)
    policy = ctypes.CDLL(str(out)).policy

    def act(observations):
        actions = np.empty((len(observations), outputs), np.float32)
        for x, y in zip(np.ascontiguousarray(observations, np.float32), actions, strict=True):
            assert x.shape == (inputs,)
            policy(x.ctypes, y.ctypes)
        return actions

    return act


RUNS = {  # name: script, its arguments, what stands in policy.c
    "dense": ("dense", {}, ["static const float w1", "w2[c * 16 + r]"]),
    "2:4": ("rnm", {"n": 2, "m": 4}, ["uint8_t p2", ">> a % 4 * 2 & 3"]),
    "1:2": ("rnm", {"n": 1, "m": 2}, ["uint8_t p2", ">> a % 8 * 1 & 1"]),
    "1:8": (
        "rnm",
        {"n": 1, "m": 8, "hidden_dim": 20},
        ["uint8_t p2", ">> a % 2 * 4 & 15"],
    ),  # ragged: groups of 8, 8, 4
    "3:5": ("rnm", {"n": 3, "m": 5, "sparse_head": True}, ["uint8_t p3", "(j + a) / 3 * 5"]),
    "1:17": ("rnm", {"n": 1, "m": 17, "hidden_dim": 40}, ["uint8_t p2", "a / 1 * 17"]),
    "4:4": ("rnm", {"n": 4, "m": 4}, ["w2[c * 16 + r]"]),  # nothing is inactive: dense
    "RLx2": ("rlx2", {}, ["uint8_t c2", "uint8_t n2"]),
    "wide": ("rlx2", {"hidden_dim": 300, "total_timesteps": 130}, ["uint16_t c2", "uint8_t n2"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_c_policy_is_the_policy(name, dense, rnm, rlx2, small, monkeypatch, capsys):
    script, options, marks = RUNS[name]
    module = {"dense": dense, "rnm": rnm, "rlx2": rlx2}[script]
    folder = Path(module.train(small(module, **{"total_timesteps": 300} | options))["run_dir"])
    code, out, err = export(monkeypatch, capsys, folder)
    text = (folder / "policy.c").read_text()
    assert code == 0 and err == "" and all(mark in text for mark in marks), text[-3000:]
    meta = json.loads((folder / "meta.json").read_text())
    for fact in (
        meta["run_name"],
        "Reach-v0",
        str(meta["commit"]),
        f"{meta['final_score']:.1f}",
        "-1 to 0.5, 0.5 to 3",
    ):
        assert fact in text[:1000]
    model = torch.load(folder / "model.pt", weights_only=True)
    p = model["actor"]
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 3
    h = torch.relu(x @ p["fc1.weight"].T + p["fc1.bias"])
    h = torch.relu(h @ p["fc2.weight"].T + p["fc2.bias"])
    wanted = torch.tanh(h @ p["fc_mu.weight"].T + p["fc_mu.bias"]) * p["action_scale"] + p["action_bias"]
    for flags in (["-O0"], ["-O3", "-march=native"]):
        act = compiled(folder, 3, 2, *flags)
        assert np.abs(act(x) - wanted.numpy()).max() <= 1e-5 * 1.5
        assert np.abs(act(model["probe"][0]) - model["probe"][1].numpy()).max() <= 1e-5
        assert np.isnan(act(np.array([[np.nan, 0, 1]]))).all()  # here each action reads each observation
    tables = dict(re.findall(r"static const \w+ (\w+)\[\] = \{\n(.*?)\};", text, re.DOTALL))
    counts = {key: len(value.split(",")) for key, value in tables.items()}
    widths = {
        key: {"float": 4, "uint8_t": 1, "uint16_t": 2}[kind] for kind, key in re.findall(r"const (\w+) (\w+)\[", text)
    }
    size = sum(counts[key] * widths[key] for key in counts)
    hidden = 4 * 2 * meta["args"]["hidden_dim"]
    assert f"{hidden:,} bytes of stack for hidden layers, {size:,} of tables" in text and f"{size:,} bytes" in out
    active = [part.get("active") for part in meta["modules"]["actor"] if "active" in part]
    assert [counts[f"w{i}"] for i in (1, 2, 3)] == active  # no inactive weight is stored


def test_tables_by_hand():
    W = np.zeros((2, 5), np.float32)
    W[0, [1, 2, 4]], W[1, [0, 3, 4]] = [0.5, -2, 3], [1e-7, 4, 5]
    assert ex.place_in_groups(W, 2, 4).tolist() == [[1, 2, 0], [0, 3, 0]]
    assert ex.place_in_groups(W, 1, 4) is None
    layer = ex.Layer("fc", W, np.array([0.1, 0], np.float32), False, "ReLU")
    text, loops, size = ex.write_layer(1, layer, 2, 4, "x", "y")
    assert "static const uint8_t p1[] = {\n9,12};" in text  # 1 + 2 * 4 and 0 + 3 * 4; the third is 0
    assert "0.5f,-2.0f,3.0f,1e-07f,4.0f,5.0f" in text and "fc: 5 to 2, 6 weights" in text
    assert size == 4 * (6 + 2) + 2 and "y[r] < 0 ? 0" in loops
    text, _, size = ex.write_layer(1, layer, None, None, "x", "y")
    assert "c1[] = {\n1,2,4,0,3,4};" in text and "n1[] = {\n3,3};" in text and size == 4 * 8 + 6 + 2
    W[0, 2] = 0  # an active weight may be zero: any free place does
    assert ex.place_in_groups(W, 2, 4).tolist() == [[0, 1, 0], [0, 3, 0]]
    assert "0.0f,0.5f,3.0f,1e-07f,4.0f,5.0f" in ex.write_layer(1, layer, 2, 4, "x", "y")[0]
    values = (
        np.random.default_rng(0).normal(size=1000).astype(np.float32) * 10.0 ** np.arange(-30, 30).repeat(17)[:1000]
    )
    words = ex.table("t", values.astype(np.float32)).partition("{\n")[2].replace("};", "").replace("f", "").split(",")
    assert np.array_equal(np.array(words, np.float32), values.astype(np.float32))  # digits enough


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):  # noqa: ARG001
    import rnm_td3_continuous as rnm

    rnm_report, rnm.hardware_report = rnm.hardware_report, lambda *_: None
    options = {"total_timesteps": 150, "learning_starts": 100, "hidden_dim": 16, "batch_size": 16, "eval_episodes": 1}
    args = rnm.Args("rnm", env_id="Reach-v0", track=False, runs_dir=str(tmp_path_factory.mktemp("runs")), **options)
    folder = Path(rnm.train(args)["run_dir"])
    rnm.hardware_report = rnm_report
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def edit_model(folder, change):
    content = torch.load(folder / "model.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "model.pt")


FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "error: "),
    "no model": (lambda f: (f / "model.pt").unlink(), "error: "),
    "torn model": (lambda f: (f / "model.pt").write_bytes((f / "model.pt").read_bytes()[:5000]), "error: "),
    "torn meta": (lambda f: (f / "meta.json").write_text("{"), "error: "),
    "norm": (
        lambda f: edit_meta(f, lambda m: m["modules"]["actor"][1].update(type="LayerNorm")),
        "relu1 is a LayerNorm",
    ),
    "empty probe": (
        lambda f: (
            edit_model(f, lambda c: c["probe"][0].zero_()),
            edit_meta(f, lambda m: m.update(final_score=None)),
        ),
        "stopped before its first checkpoint",
    ),
    "extra parameter": (lambda f: edit_model(f, lambda c: c["actor"].update(gain=torch.ones(1))), "has no gain"),
    "no pattern": (lambda f: edit_meta(f, lambda m: m.pop("n")), "KeyError('n')"),
    "not finite": (lambda f: edit_model(f, lambda c: c["actor"]["fc1.bias"].fill_(-math.inf)), "not finite"),
    "two activations": (
        lambda f: edit_meta(f, lambda m: m["modules"]["actor"].insert(2, {"name": "act", "type": "Tanh"})),
        "act is a Tanh; only chains",
    ),
    "NaN in the probe": (lambda f: edit_model(f, lambda c: c["probe"][1][7].fill_(math.nan)), "does not act as"),
    "no score": (lambda f: edit_meta(f, lambda m: m.update(final_score="x")), "error: "),
    "residual": (lambda f: edit_model(f, lambda c: c["probe"][1].add_(0.3)), "does not act as its network did"),
    "no ReLU": (lambda f: edit_meta(f, lambda m: m["modules"]["actor"].pop(1)), "does not act as its network did"),
    "other weights": (lambda f: edit_model(f, lambda c: c["actor"]["fc2.weight"].add_(1.0)), "fc2 has more weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_chain_is_refused(run, fault, monkeypatch, capsys):
    change, reason = FAULTS[fault]
    change(run)
    code, out, err = export(monkeypatch, capsys, run)
    assert code == 2 and out == "" and err.startswith("error: ") and reason in err and err.count("\n") == 1
    assert not (run / "policy.c").exists()


@pytest.mark.parametrize("row", [0, 15])
@pytest.mark.parametrize("size, code", [(0.9e-4, 0), (1.1e-4, 2)])
def test_the_probe_must_agree_in_each_action(run, row, size, code, monkeypatch, capsys):
    """Of each action by its own scale: here of the wider one, 1.25."""
    edit_model(run, lambda c: c["probe"][1][row, 1].add_(size * 1.25))
    assert export(monkeypatch, capsys, run)[0] == code


def test_forks_that_are_chains(run, monkeypatch, capsys):
    """Tanh, no bias, what does nothing in a policy that acts: as their own run would have left them."""
    parts = {"Tanh": (1, "Tanh"), "Dropout": (3, "Dropout"), "Identity": (3, "Identity")}

    def change(meta):
        for i, kind in parts.values():
            meta["modules"]["actor"].insert(i, {"name": kind, "type": kind})
        del meta["modules"]["actor"][2]  # relu1, which Tanh replaces

    edit_meta(run, change)

    def forward(content):
        p, x = content["actor"], content["probe"][0]
        p["fc1.weight"] *= 5
        h = torch.tanh(x @ p["fc1.weight"].T + p["fc1.bias"])
        h = torch.relu(h @ p["fc2.weight"].T)
        del p["fc2.bias"]
        content["probe"][1][:] = torch.tanh(h @ p["fc_mu.weight"].T + p["fc_mu.bias"]) * p["action_scale"]
        content["probe"][1].add_(p["action_bias"])

    edit_model(run, forward)
    assert [part["type"] for part in json.loads((run / "meta.json").read_text())["modules"]["actor"]][:2] == [
        "SparseLinear",
        "Tanh",
    ]
    code, _, err = export(monkeypatch, capsys, run)
    assert code == 0, err
    model = torch.load(run / "model.pt", weights_only=True)
    act = compiled(run, 3, 2, "-O2")
    assert np.abs(act(model["probe"][0]) - model["probe"][1].numpy()).max() <= 1e-5


def test_what_is_no_folder_of_a_run(run, monkeypatch, capsys):
    for path in (run / "model.pt", run / "meta.json"):
        code, _, err = export(monkeypatch, capsys, path)
        assert code == 2 and err.count("\n") == 1 and "Not a directory" in err
    assert export(monkeypatch, capsys, run)[0] == 0
    text, before = (run / "policy.c").read_text(), (run / "policy.c").stat().st_mtime_ns
    assert export(monkeypatch, capsys, run)[0] == 0 and (run / "policy.c").stat().st_mtime_ns == before
    (run / "policy.c").write_text("mine")
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write(path, data[:9]) and 1 / 0)  # a full disk
    code, _, err = export(monkeypatch, capsys, run, "--force")
    assert code == 1 and err.count("\n") == 1 and (run / "policy.c").read_text() == "mine" != text
    assert not (run / "policy.c.tmp").exists()


def test_a_policy_that_differs_is_kept(run, monkeypatch, capsys):
    assert export(monkeypatch, capsys, run)[0] == 0 and export(monkeypatch, capsys, run)[0] == 0  # the same: fine
    text = (run / "policy.c").read_text()
    (run / "policy.c").write_text("mine")
    code, _, err = export(monkeypatch, capsys, run)
    assert code == 2 and "--force" in err and err.count("\n") == 1 and (run / "policy.c").read_text() == "mine"
    assert export(monkeypatch, capsys, run, "--force")[0] == 0 and (run / "policy.c").read_text() == text


def test_ctrl_c(run, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ex, "check", stop)
    code, _, err = export(monkeypatch, capsys, run, "--check")
    assert code == 130 and err == "" and (run / "policy.c").exists()


def test_check(run, monkeypatch, capsys):
    monkeypatch.setattr(ex, "ROUNDS", 2)
    monkeypatch.setattr(ex.os, "sched_setaffinity", lambda *_: None)
    code, out, err = export(monkeypatch, capsys, run, "--check")
    assert code == 0 and err == ""
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    assert {"policy.c", "torch eager", "torch.jit", "numpy"} <= set(rows)
    for name, (weights, code_bytes, median, p99) in rows.items():
        if name != "a call, one core":
            assert 0 < float(median) <= float(p99) and bool(code_bytes.strip()) == (name == "policy.c")
            assert int(weights.replace(",", "")) in (
                4 * (3 * 16 + 16 + 256 + 16 + 32 + 2),
                ex.write_c(ex.read_policy(run))[1],
            )
    differences = re.findall(r"Largest difference of 1,000 actions from torch, (.*): ([\d.e+-]+) of", out)
    assert differences[0][0] == "here" and all(float(error) <= 1e-5 for _, error in differences)
    monkeypatch.setattr(ex, "ARM", "no-such-gcc")
    monkeypatch.setattr(ex, "M4", "no-such-gcc -Os")
    out = export(monkeypatch, capsys, run, "--check")[1]
    assert "32-bit ARM (emulated): not checked" in out and "Cortex-M4: not compiled" in out
    monkeypatch.setattr(ex, "M4", "false -Os")  # there, but it fails
    code, _, err = export(monkeypatch, capsys, run, "--check")
    assert code == 1 and "false failed: no reason given" in err


def test_every_machine_must_agree_and_the_flash_must_suffice(run, monkeypatch, capsys):
    """The second machine is this one, too; its actions and the sizes of the sections are made up."""
    monkeypatch.setattr(ex, "ROUNDS", 1)
    monkeypatch.setattr(ex.os, "sched_setaffinity", lambda *_: None)
    compile_c, run_c = ex.compile_c, ex.run_c
    monkeypatch.setattr(
        ex, "compile_c", lambda text, out, words: compile_c(text, out, [x for x in words if x != "-static"])
    )
    monkeypatch.setattr(ex, "ARM", "cc")
    monkeypatch.setattr(ex, "ARM_RUN", "env")
    for off, flash, code, words in ((0.0, 2**18, 0, "which fits"), (1e-3, 2**18 + 1, 1, "which does not fit")):
        monkeypatch.setattr(ex, "run_c", lambda words, x, off=off: run_c(words, x) + off * (words[0] == "env"))
        monkeypatch.setattr(ex, "sections", lambda *_, flash=flash: {".text": flash - 900, ".data": 900, ".bss": 9000})
        wanted, out, _ = export(monkeypatch, capsys, run, "--check")
        assert wanted == code and words in out and out.count("Largest difference") == 2
        assert float(re.search(r"here: ([\d.e+-]+)", out)[1]) <= 1e-5


TOOLS = ex.ARM, ex.ARM_RUN, "arm-none-eabi-gcc"


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"not installed: one of {', '.join(TOOLS)}")
def test_small_machines(run, monkeypatch, capsys):
    monkeypatch.setattr(ex, "ROUNDS", 1)
    monkeypatch.setattr(ex.os, "sched_setaffinity", lambda *_: None)
    code, out, _ = export(monkeypatch, capsys, run, "--check")
    differences = re.findall(r"Largest difference of 500 actions from torch, (.*): ([\d.e+-]+) of", out)
    assert code == 0 and [where for where, _ in differences] == ["here", "32-bit ARM (emulated)"]
    assert all(float(error) <= 1e-5 for _, error in differences)
    sizes = re.search(r"\.text ([\d,]+), \.rodata ([\d,]+), \.data ([\d,]+) bytes, which fits into 256 KiB", out)
    text, rodata, _ = (int(size.replace(",", "")) for size in sizes.groups())
    assert 200 < text < 20_000 and 900 < rodata < 1500  # of 968 bytes of tables, some in the code


def test_a_check_that_fails(run, monkeypatch, capsys):
    monkeypatch.setattr(ex, "ROUNDS", 1)
    monkeypatch.setattr(ex.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setitem(ex.ACTIVATIONS, "ReLU", ex.ACTIVATIONS["ReLU"].replace("< 0", "< 0.01"))
    code, out, _ = export(monkeypatch, capsys, run, "--check")
    policy = ex.read_policy(run)
    with torch.inference_mode():
        x = ex.visited("Reach-v0", ex.Actor(policy), 500)
    wrong = x
    for layer in policy.layers:
        wrong = wrong @ layer.weight.T + layer.bias
        wrong = np.where((wrong < 0.01) & (layer.activation == "ReLU"), 0, wrong)
    wrong = np.tanh(wrong) * policy.scale + policy.middle
    error = np.abs((wrong - ex.numpy_policy(policy, x)) / [1.5, 2.5]).max()  # shares of the ranges
    assert code == 1 and 1e-5 < error == pytest.approx(float(re.search(r"here: ([\d.e+-]+)", out)[1]), rel=0.06)
    monkeypatch.setenv("CC", "no-such-compiler")
    code, _, err = export(monkeypatch, capsys, run, "--check")
    assert code == 1 and "no-such-compiler" in err and err.count("\n") == 1
    monkeypatch.setenv("CC", "cc -Dr=(")
    code, _, err = export(monkeypatch, capsys, run, "--check")
    assert code == 1 and "cc failed" in err and "error" in err.partition("failed")[2] and err.count("\n") == 1


def test_an_unfinished_run_tanh_and_no_bias(tmp_path):
    """What is no part of the scripts' own networks but of forks': by hand."""
    rng = np.random.default_rng(0)
    layers = [ex.Layer("a", rng.normal(size=(70, 3)).astype(np.float32), np.zeros(70, np.float32), True, "Tanh")]
    mask = np.zeros((2, 70), bool)
    mask[1, [1, 5, 20, 65, 69]] = True  # the other row is empty
    layers.append(
        ex.Layer("b", rng.normal(size=(2, 70)).astype(np.float32) * mask, np.ones(2, np.float32), False, "Identity")
    )
    meta = {"n": None, "m": None, "run_name": "a*/b", "args": {"env_id": "E"}, "script": "s.py", "final_score": None}
    policy = ex.Policy(tmp_path, meta, layers, np.full(2, 2, np.float32), np.full(2, 0.5, np.float32))
    text, size = ex.write_c(policy)
    (tmp_path / "policy.c").write_text(text)
    assert "the run was not finished" in text and "a* /b" in text and "commit None" in text
    assert size == 4 * (210 + 70 + 5 + 2 + 4) + 5 + 2 and "uint8_t c2" in text
    x = rng.normal(size=(50, 3)).astype(np.float32)
    assert np.abs(compiled(tmp_path, 3, 2, "-O2")(x) - ex.numpy_policy(policy, x)).max() < 1e-5
    wanted = np.tanh(np.tanh(x @ layers[0].weight.T) @ layers[1].weight.T + 1) * 2 + 0.5
    assert np.allclose(ex.numpy_policy(policy, x), wanted, atol=1e-6)
    symbols = subprocess.run(["nm", str(tmp_path / "policy.so")], capture_output=True, text=True, check=True).stdout
    assert " T policy" in symbols and not re.search(r" [bBdD] (w|b|c|n|p|y|z|scale|middle)\d*$", symbols, re.MULTILINE)
