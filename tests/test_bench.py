"""nm_kernel_bench.py --end-to-end on a task of seconds."""

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
    monkeypatch.setattr(bench, "configurations", lambda a: {k: v for k, v in configurations(a).items() if k in kept})
    flags = ("--env-id", "Pendulum-v1", "--hidden-dim", 16, "--steps", 2000, "--repetitions", 1, "--out", tmp_path)
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
    monkeypatch.setattr(bench, "configurations", lambda _: {"dense": ("dense", 1, 1), "1:8": ("1:8", 1, 1)})
    monkeypatch.setattr(bench, "run_once", lambda command, *_: (next(rates[command]), 1.5, 321.0))
    assert run(monkeypatch, "--repetitions", 3, "--out", tmp_path) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("1:8"))
    assert line.split() == ["1:8", "900", "800-1000", "1.50", "321", f"{900 / statistics.median([100, 300, 200]):.2f}"]
    monkeypatch.undo()
    command = ["-c", "import sys; sys.exit('no such luck')"]
    monkeypatch.setattr(bench, "configurations", lambda _: {"dense": (command, 1, 1)})
    assert run(monkeypatch, "--repetitions", 1, "--out", tmp_path) == 1
    assert "no such luck" in capsys.readouterr().err


BAD = [("--steps", 1), ("--repetitions", 0), ("--threads", 99), ("--env-id", "No-v0"), ("--no-end-to-end",)]


@pytest.mark.parametrize("argv", BAD)
def test_bad_flags(monkeypatch, capsys, argv):
    assert run(monkeypatch, *argv) == 2
    assert capsys.readouterr().err.count("error: ") == 1
