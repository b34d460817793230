"""nm_kernel_bench.py on small layers, and --end-to-end on a task of seconds."""

import csv
import json
import statistics
import sys
from functools import partial
from types import SimpleNamespace

import pytest

import nm_kernel_bench as bench


def run(monkeypatch, *argv):
    track = [] if "--wandb-project-name" in argv else ["--no-track"]
    monkeypatch.setattr(sys, "argv", ["nm_kernel_bench.py", *map(str, argv), *track])
    try:
        return bench.main()
    except SystemExit as stop:
        return stop.code


@pytest.mark.slow
def test_end_to_end(monkeypatch, tmp_path, capsys):
    kept = {"dense", "1:8", "1:8, two runs at once"}
    configurations = bench.configurations
    monkeypatch.setattr(bench, "configurations", lambda *a: {k: v for k, v in configurations(*a).items() if k in kept})
    flags = ("--env-id", "Pendulum-v1", "--hidden-dims", 16, "--steps", 2000, "--repetitions", 1, "--out", tmp_path)
    assert run(monkeypatch, "--end-to-end", *flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rate_update_ms_peak_mib"]) >= kept - {"1:8, two runs at once"}
    assert results["conditions"]["versions"]["torch"]
    out = capsys.readouterr().out
    for label, ((rate, ms, mib),) in results["rate_update_ms_peak_mib"].items():
        assert 0 < ms < 1000 / rate * (1 + ("two" in label))  # an update is part of a step
        assert 100 < mib < 4000
        assert f"{rate:.0f}" in out and f"{ms:.2f}" in out and f"{mib:.0f}" in out


def test_ratios_and_failures(monkeypatch, tmp_path, capsys):
    rates = {"dense": iter([100.0, 300.0, 200.0]), "1:8": iter([800.0, 900.0, 1000.0])}
    rates |= {"dense, hidden 512": iter([50.0] * 3), "1:8, hidden 512": iter([350.0] * 3)}
    rates |= {"dense, 2 threads": iter([400.0] * 3), "1:8, two runs at once": iter([1600.0] * 3)}
    monkeypatch.setattr(bench, "configurations", lambda *_: {name: (name, 1, 1) for name in rates})
    monkeypatch.setattr(bench, "run_once", lambda command, *_: (next(rates[command]), 1.5, 321.0))
    assert run(monkeypatch, "--end-to-end", "--repetitions", 3, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("1:8"))
    assert line.split() == ["1:8", "900", "800-1000", "1.50", "321", f"{900 / statistics.median([100, 300, 200]):.2f}"]
    line = next(line for line in lines if line.startswith("1:8, hidden 512"))
    assert line.split()[-1] == "7.00"  # against dense of its own width
    line = next(line for line in lines if line.startswith("1:8, two runs"))
    assert line.split()[-1] == "4.00"  # against dense on as many cores
    out = (tmp_path / "end_to_end.svg").read_text()
    assert "1:8, hidden 512" in out
    monkeypatch.undo()
    command = ["-c", "import sys; sys.exit('no such luck')"]
    monkeypatch.setattr(bench, "configurations", lambda *_: {"dense": (command, 1, 1)})
    assert run(monkeypatch, "--end-to-end", "--repetitions", 1, "--out", tmp_path) == 1
    assert "no such luck" in capsys.readouterr().err
    runs = iter([(100.0, 1.5, 321.0), RuntimeError("the second run fails")])

    def fail_later(*_):
        if isinstance(found := next(runs), Exception):
            raise found
        return found

    monkeypatch.setattr(bench, "run_once", fail_later)
    assert run(monkeypatch, "--end-to-end", "--repetitions", 2, "--out", tmp_path / "kept") == 1
    content = json.loads((tmp_path / "kept/results.json").read_text())
    assert content["rate_update_ms_peak_mib"] == {"dense": [[100.0, 1.5, 321.0]]}  # what was finished is not lost


BAD = [("--steps", 1), ("--repetitions", 0), ("--threads", 999), ("--env-id", "No-v0"), ("--widths", 0),
       ("--batch-sizes", 0), ("--patterns", "8:4"), ("--patterns", "two"), ("--dtypes", "float16"),
       ("--hidden-dims", 0), ("--device", "cuda"), ("--end-to-end", "--device", "cuda"),
       ("--out", "/dev/null/x")]  # fmt: skip


@pytest.mark.parametrize("argv", BAD)
def test_bad_flags(monkeypatch, capsys, argv):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_kernels_are_measured(monkeypatch, tmp_path, capsys):
    flags = ("--widths", 40, "--patterns", "1:4", "2:8", "--repetitions", 2, "--threads", 1, "--out", tmp_path)
    assert run(monkeypatch, *flags) == 0
    out = capsys.readouterr().out
    assert "WRONG" not in out and "noise: dense against itself" in out
    content = json.loads((tmp_path / "results.json").read_text())
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    assert len(rows) == len(content["layers"]) == 2 * (1 * 8 + 4 * 8)  # two layers: batch 1 forward, batch 256 all
    for row in content["layers"]:
        assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"] and 0 < row["gflops"]
        kept = {"1:4": 1 / 4, "2:8": 1 / 4, "": 1}[row["pattern"]]
        work = 2 * row["batch"] * row["inputs"] * row["outputs"] * kept * (3 if row["product"] == "all three" else 1)
        assert row["gflops"] == pytest.approx(work / row["us"] / 1e3, rel=0.03)  # 113 inputs are ragged
        if row["implementation"] == "dense torch":
            assert row["x_torch_fp32"] == 1 and row["x_best_fp32"] <= 1
    assert (
        {row["pattern"] for row in content["actor"]}
        == {"", "1:4", "2:8"}
        == {*(r["pattern"] for r in content["masks"]), ""}
    )
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in content["actor"])
    assert content["actor"][0]["bytes"] == 4 * (105 * 256 + 256 + 256 * 256 + 256 + 256 * 8 + 8)
    assert 1 < content["conditions"]["peak_gflops"]["fp32"] < 1000 and (tmp_path / "speedup_1_threads.png").exists()


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path, capsys):
    errors = bench.Packed.errors
    monkeypatch.setattr(bench.Packed, "errors", lambda *a: errors(*a) | {"grad-input": 0.1})
    flags = (
        "--widths",
        40,
        "--batch-sizes",
        64,
        "--patterns",
        "1:4",
        "--repetitions",
        1,
        "--threads",
        1,
        "--out",
        tmp_path,
    )
    assert run(monkeypatch, *flags) == 1
    assert "WRONG, not timed: 1:4 grad-input of 40 to 40, batch 64: error 1.0e-01" in capsys.readouterr().out
    rows = [row for row in csv.DictReader(open(tmp_path / "results.csv")) if row["implementation"] == "N:M"]
    assert {row["product"] for row in rows} == {"forward", "grad-weight"}
    monkeypatch.setattr(bench.Packed, "errors", lambda *_: {"forward": float("nan")})
    flags = (
        "--widths",
        40,
        "--batch-sizes",
        1,
        "--patterns",
        "1:4",
        "--repetitions",
        1,
        "--threads",
        1,
        "--out",
        tmp_path,
    )
    assert (
        run(monkeypatch, *flags) == 1
        and "WRONG, not timed: 1:4 forward of 40 to 40, batch 1" in capsys.readouterr().out
    )


def test_break_even():
    def row(width, pattern, ratio, batch=256):
        found = {"implementation": "N:M", "inputs": width, "outputs": width, "batch": batch, "threads": 1}
        return found | {"pattern": pattern, "x_bf16": ratio, "product": "forward" if batch == 1 else "all three"}

    ratios = {"2:4": (0.5, 1.5, 0.9), "1:4": (0.5, 1.1, 1.2), "1:8": (3.0, 4.0, 5.0), "4:8": (2.0, 0.7, 3.0)}
    rows = [row(w, p, r) for p, found in ratios.items() for w, r in zip((128, 256, 512), found, strict=True)]
    rows.append(row(128, "2:4", 1.5, batch=1) | {"product": "all three"})  # not what acting needs
    assert bench.break_even(rows, "x_bf16") == {(256, 1): {"2:4": None, "1:4": 256, "1:8": 128, "4:8": 512}}


def no_graph(_, function):
    def replay():
        for _ in range(bench.GRAPH_CALLS):
            function()

    return replay


def test_gpu_functions(monkeypatch):
    monkeypatch.setattr(bench, "graphed", no_graph)
    args = bench.Args(patterns=("2:4", "1:8", "4:8", "2:8"))
    found, wrong, unsupported = bench.gpu_functions(64, 32, 16, args, device="cpu")
    assert {key[0] for key in found if key[2] == "grad-weight"} == {
        name + mode for name in ("dense fp32", "dense again", "dense TF32", "dense bf16") for mode in ("", ", graph")
    }
    assert not wrong and "sparse bf16 4:8: not 2:4, which keeps at most two of four weights" in unsupported
    legal = [reason for reason in unsupported if "Only CUDA tensors are currently supported" in reason]
    assert [reason.split()[2].strip(":") for reason in legal] == ["2:4", "1:8", "2:8"]  # the own words of torch

    def products(W, bias, x, dy):  # one product right, one wrong, one missing
        return {"forward": lambda: x @ W.T + bias, "grad-input": lambda: dy @ W * 1.05}

    monkeypatch.setattr(bench, "sparse_products", products)
    found, wrong, unsupported = bench.gpu_functions(64, 32, 16, args, device="cpu")
    sparse = {key[1:] for key in found if key[0] == "sparse bf16, graph"}
    assert sparse == {(pattern, "forward") for pattern in ("2:4", "1:8", "2:8")}
    assert [reason.split()[2:4] for reason in wrong] == [[pattern, "grad-input"] for pattern in ("2:4", "1:8", "2:8")]
    assert all(0.045 < float(reason.split()[-1]) < 0.055 for reason in wrong)
    assert sum("grad-weight: no such product" in reason for reason in unsupported) == 3


def test_gpu_report(monkeypatch, tmp_path, capsys):
    """All of --device cuda but the GPU itself: functions run on the CPU, and a graph is a loop."""
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "Some GPU")
    limits = {"peak_gflops": {"fp32": 1e3, "TF32": 2e3, "bf16": 4e3}, "read_gbs": 100.0}
    monkeypatch.setattr(bench, "gpu_limits", lambda: limits)
    monkeypatch.setattr(bench, "graphed", no_graph)
    monkeypatch.setattr(bench, "gpu_functions", partial(bench.gpu_functions, device="cpu"))
    monkeypatch.setattr(bench, "sparse_products", lambda W, bias, x, _: {"forward": lambda: x @ W.T + bias})
    flags = ("--widths", 64, "--batch-sizes", 32, "--patterns", "1:4", "4:8", "--repetitions", 2)
    assert run(monkeypatch, "--device", "cuda", *flags, "--out", tmp_path) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    for row in content["layers"]:
        twin = "dense TF32" + ", graph" * row["implementation"].endswith(
            ", graph"
        )  # eager with eager, graph with graph
        wanted = {"inputs": row["inputs"], "product": row["product"], "implementation": twin}
        us = next(other["us"] for other in content["layers"] if wanted.items() <= other.items())
        assert row["x_tf32"] == pytest.approx(us / row["us"], rel=1e-2)
        peak = 4e3 if "bf16" in row["implementation"] else 2e3 if "TF32" in row["implementation"] else 1e3
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / peak, rel=1e-2)
    eager, graph = (next(r["us"] for r in content["layers"] if r["implementation"] == f"dense fp32{mode}"
                         and r["inputs"] == 64 and r["product"] == "forward") for mode in ("", ", graph"))  # fmt: skip
    assert 0.2 < graph / eager < 5  # per call, not per graph
    out = capsys.readouterr().out
    assert "Some GPU" in out and "sparse bf16 1:4, graph" in out and "not supported: sparse bf16 4:8" in out
    assert max(map(len, out.splitlines())) <= 100 or "written" in max(out.splitlines(), key=len)
    assert "| 64 to 64 | 32 |" in (tmp_path / "summary.md").read_text() and (tmp_path / "speedup.png").exists()
    labels = bench.configurations(bench.Args(device="cuda", end_to_end=True))
    assert all("--device=cuda" in labels[f"{name}, GPU"][0] for name in ("dense", "2:4", "1:4", "1:8"))


def test_wandb_gets_tables_and_figures(monkeypatch, tmp_path):
    """Checked against a stub: the run has each table with its columns, and the figure."""
    logged, opened = {}, {}

    class Run:
        def log(self, values):
            logged.update(values)

        def save(self, *_, **__):
            pass

        def finish(self):
            opened["finished"] = True

    stub = SimpleNamespace(login=lambda **_: False, init=lambda **kw: opened.update(kw) or Run(), Settings=dict,
                           Table=lambda columns, data: (columns, data), Image=lambda path: path)  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = ("--widths", 40, "--patterns", "1:4", "--repetitions", 1, "--threads", 1, "--out", tmp_path)
    assert run(monkeypatch, *flags, "--wandb-project-name", "mine") == 0
    assert (opened["project"], opened["mode"], opened["finished"]) == ("mine", "offline", True)
    columns, rows = logged["layers"]
    assert columns == list(csv.DictReader(open(tmp_path / "results.csv")).fieldnames)
    assert len(rows) == len(json.loads((tmp_path / "results.json").read_text())["layers"])
    assert logged["actor"][0][0] == "implementation" and logged["speedup_1_threads"].endswith("speedup_1_threads.png")
