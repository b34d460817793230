"""nm_kernel_bench.py on small layers, and --end-to-end on a task of seconds."""

import csv
import json
import statistics
import sys

import pytest

import nm_kernel_bench as bench


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["nm_kernel_bench.py", *map(str, argv)])
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
    monkeypatch.setattr(bench, "configurations", lambda *_: {name: (name, 1, 1) for name in rates})
    monkeypatch.setattr(bench, "run_once", lambda command, *_: (next(rates[command]), 1.5, 321.0))
    assert run(monkeypatch, "--end-to-end", "--repetitions", 3, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("1:8"))
    assert line.split() == ["1:8", "900", "800-1000", "1.50", "321", f"{900 / statistics.median([100, 300, 200]):.2f}"]
    line = next(line for line in lines if line.startswith("1:8, hidden 512"))
    assert line.split()[-1] == "7.00"  # against dense of its own width
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
       ("--batch-sizes", 0),
       ("--patterns", "8:4"), ("--patterns", "two"), ("--hidden-dims", 0), ("--out", "/dev/null/x")]  # fmt: skip


@pytest.mark.parametrize("argv", BAD)
def test_bad_flags(monkeypatch, capsys, argv):
    assert run(monkeypatch, *argv) == 2
    assert capsys.readouterr().err.count("error: ") == 1


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
    assert 1 < content["conditions"]["peak_gflops"] < 1000 and (tmp_path / "speedup_1_threads.png").exists()


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
