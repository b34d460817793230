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
        assert f"{rate:.0f}" in out and f"{1000 * ms:,.0f}" in out and f"{mib:.0f}" in out


def test_ratios_and_failures(monkeypatch, tmp_path, capsys):
    rates = {"dense": iter([100.0, 300.0, 200.0]), "1:8": iter([800.0, 900.0, 1000.0])}
    rates |= {"dense, hidden 512": iter([50.0] * 3), "1:8, hidden 512": iter([350.0] * 3)}
    rates |= {"dense, two runs at once": iter([400.0] * 3), "1:8, two runs at once": iter([1600.0] * 3)}
    monkeypatch.setattr(bench, "configurations", lambda *_: {name: (name, 1, 1) for name in rates})
    monkeypatch.setattr(bench, "run_once", lambda command, *_: (next(rates[command]), 1.5, 321.0))
    assert run(monkeypatch, "--end-to-end", "--repetitions", 3, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("1:8"))
    assert line.split() == ["1:8", "900", "800-1000", "1,500", "321", f"{900 / statistics.median([100, 300, 200]):.2f}"]
    line = next(line for line in lines if line.startswith("1:8, hidden 512"))
    assert line.split()[-1] == "7.00"  # against dense of its own width
    line = next(line for line in lines if line.startswith("1:8, two runs"))
    assert line.split()[-1] == "4.00"  # against two dense runs
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
       ("--batch-sizes", 0), ("--patterns", "8:4"), ("--patterns",), ("--patterns", "two"), ("--patterns", "²:4"),
       ("--dtypes", "float16"), ("--hidden-dims", 0), ("--device", "cuda"), ("--end-to-end", "--device", "cuda"),
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
    assert "WRONG" not in out and "dense against itself, batch 1, 1 thread" in out.replace("\n", " ")
    assert max(len(line) for line in out.splitlines() if not line.startswith("written")) <= 100
    content = json.loads((tmp_path / "results.json").read_text())
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    dense = 4 + bench.has_bf16()
    assert len(rows) == len(content["layers"]) == 2 * (1 + 4) * (dense + 2 * 2)  # batch 1: forward, 256: all
    assert {(row["cpu"], row["date"]) for row in rows} == {(bench.cpu_name(), content["conditions"]["date"])}
    peak = content["conditions"]["peak_gflops"]["fp32"]["1"]
    assert 1 < peak < 1000
    for row in content["layers"]:
        assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"] and 0 < row["gflops"]
        kept = {"1:4": 1 / 4, "2:8": 1 / 4, "": 1}[row["pattern"]]
        work = 2 * row["batch"] * row["inputs"] * row["outputs"] * kept * (3 if row["product"] == "all three" else 1)
        assert row["gflops"] == pytest.approx(work / row["us"] / 1e3, rel=0.03)  # 113 inputs are ragged
        if row["implementation"] == "dense bf16":
            assert row["x_bf16"] == 1 and row["share_of_peak"] is None  # the peak is fp32's
        else:
            assert row["share_of_peak"] == pytest.approx(row["gflops"] / peak, rel=1e-3)
        if row["implementation"] == "dense torch":
            assert row["x_torch_fp32"] == 1 and row["x_best_fp32"] <= 1
    actor = {row["pattern"]: row for row in content["actor"]}
    assert [row["implementation"] for row in content["actor"]] == ["dense torch", "dense numpy", "N:M", "N:M"]
    assert list(actor) == ["", "1:4", "2:8"] and all(0 < row["p50_us"] <= row["p99_us"] for row in actor.values())
    assert actor[""]["bytes"] == 4 * (105 * 256 + 256 + 256 * 256 + 256 + 256 * 8 + 8)
    kept = 256 * (26 + 1) + 256 * 64 + 8 * 256  # of 105 inputs 26 groups and a single one
    assert actor["1:4"]["bytes"] == 4 * (kept + 256 + 256 + 8) + 2 * kept
    trained = {row["pattern"]: row["us"] for row in content["layers"]
               if row["product"] == "all three" and row["implementation"] == "N:M" and row["inputs"] == 40}  # fmt: skip
    assert [row["pattern"] for row in content["masks"]] == ["1:4", "2:8"]
    for row in content["masks"]:
        share = (row["project_us"] + row["index_us"]) / (1000 * trained[row["pattern"]])
        assert row["batch"] == 256 and row["share_at_K_1000"] == pytest.approx(share, rel=1e-2)
    assert (tmp_path / "speedup_1_threads.png").exists()


def test_rows_by_hand():
    place = {"inputs": 8, "outputs": 4, "batch": 10, "threads": 2}
    times = {("dense torch", "", "forward"): [5e-6, 1e-6, 2e-6, 3e-6, 4e-6], ("dense numpy", "", "forward"): [2e-6] * 3}
    times |= {("N:M", "1:4", name): [1e-6, 1e-6, 2e-6] for name in bench.PRODUCTS}
    found = bench.layer_rows(times, place, {"fp32": {"1": 1.0, "2": 5.0}})
    rows = {(row["implementation"], row["product"]): row for row in found}
    dense = rows["dense torch", "forward"]
    assert (dense["us_q1"], dense["us"], dense["us_q3"]) == (2, 3, 4)
    assert dense["gflops"] == pytest.approx(2 * 10 * 8 * 4 / 3e-6 / 1e9, rel=1e-3) and dense["x_best_fp32"] == 0.6667
    sparse = rows["N:M", "all three"]
    assert sparse["us"] == 3 and sparse["gflops"] == pytest.approx(3 * 2 * 10 * 2 * 4 / 3e-6 / 1e9, rel=1e-3)
    assert sparse["share_of_peak"] == pytest.approx(sparse["gflops"] / 5, rel=1e-3) and sparse["x_torch_fp32"] is None
    assert rows["N:M", "forward"]["x_torch_fp32"] == 3 and rows["N:M", "forward"]["x_bf16"] is None


SMALL = ("--widths", 40, "--patterns", "1:4", "--repetitions", 1, "--threads", 1)


@pytest.mark.parametrize("name", ["dense_products", "numpy_products", "onednn_products", "csr_products", "Packed"])
@pytest.mark.parametrize("batch", [1, 64])
def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path, capsys, name, batch):
    """A weight that is off makes each implementation wrong: it is named and not in the table; the exit code is 1."""
    make = getattr(bench, name)

    def broken(W, *rest):
        if name == "csr_products":
            flat = W.layer.flat.data
            flat[3] += 1
            found = make(W, *rest)
            flat[3] -= 1
            return found
        W = W.clone()
        W[0, W[0].abs().argmax()] *= 1.1  # active, whatever the mask
        return make(W, *rest)

    monkeypatch.setattr(bench, name, broken)
    assert run(monkeypatch, *SMALL, "--batch-sizes", batch, "--out", tmp_path) == 1
    out = capsys.readouterr().out
    label = {"dense_products": "dense torch", "numpy_products": "dense numpy", "onednn_products": "dense oneDNN"}
    label["csr_products"] = "torch CSR 1:4"
    label = label.get(name, "N:M 1:4")
    assert f"WRONG, not timed: {label}" in out and f"forward of 40 to 40, batch {batch}: error" in out
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    place = {"inputs": "40", "product": "forward"}
    timed = {f"{row['implementation']} {row['pattern']}".strip() for row in rows if place.items() <= row.items()}
    assert len(timed) > 2 and label not in timed


def test_each_product_is_checked(monkeypatch):
    result = bench.Packed.result
    for name in bench.PRODUCTS:
        monkeypatch.setattr(bench.Packed, "result", lambda *a, name=name: result(*a) * (1.001 if a[1] == name else 1))
        found, wrong, _ = bench.layer_functions(40, 24, 64, bench.Args(patterns=("1:4",)))
        assert [complaint.split(" of ")[0] for complaint in wrong] == [f"N:M 1:4 {name}"]
        assert {key[2] for key in found if key[0] == "N:M"} == set(bench.PRODUCTS) - {name}
    monkeypatch.setattr(bench.Packed, "result", lambda *a: result(*a) * float("nan"))
    assert len(bench.layer_functions(40, 24, 64, bench.Args(patterns=("1:4",)))[1]) == 3


@pytest.mark.parametrize("stage", ["measure_limits", "time_in_turns", "measure_actor", "measure_masks"])
def test_ctrl_c_keeps_what_is_measured(monkeypatch, tmp_path, stage):
    function, calls = getattr(bench, stage), []

    def stop(*args, **kwargs):
        calls.append(0)
        if stage == "time_in_turns" and len(calls) < 3:  # two places are finished
            return function(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, stage, stop)
    (tmp_path / "results.json").write_text("of an earlier run")
    assert run(monkeypatch, *SMALL, "--batch-sizes", 1, 64, "--out", tmp_path) == 130
    text = (tmp_path / "results.json").read_text()
    if stage == "measure_limits":
        assert text == "of an earlier run"  # nothing new: nothing is lost
        return
    content = json.loads(text)
    assert len({(row["inputs"], row["batch"]) for row in content["layers"]}) == (2 if stage == "time_in_turns" else 4)
    assert bool(content["actor"]) == (stage == "measure_masks")


def test_ctrl_c_end_to_end(monkeypatch, tmp_path):
    found = iter([(100.0, 1.5, 321.0)])

    def stop(*_):
        for timing in found:
            return timing
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_once", stop)
    assert run(monkeypatch, "--end-to-end", "--out", tmp_path) == 130
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rate_update_ms_peak_mib"] == {"dense": [[100.0, 1.5, 321.0]]}


def test_noise_and_a_full_disk(monkeypatch, tmp_path, capsys):
    turns = bench.time_in_turns

    def noisy(functions, *rest):
        times = turns(functions, *rest)
        return {key: [3 * v for v in values] if key[0] == "dense again" else values for key, values in times.items()}

    monkeypatch.setattr(bench, "time_in_turns", noisy)
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 0
    assert "warning: too noisy to conclude" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / "results.json").unlink()
    (tmp_path / "results.json").symlink_to("/dev/full")
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("error: ") and shown.err.count("No space left") == 1
    assert "40 inputs, 40 outputs" in shown.out  # what was measured is on the screen at least


def test_flags_are_put_in_order():
    args = bench.Args(widths=(256, 64, 64), batch_sizes=(256, 1), threads=(1, 1), patterns=("1:4", "1:4"))
    assert (args.widths, args.batch_sizes, args.threads, args.patterns) == ((64, 256), (1, 256), (1,), ("1:4",))
    labels = bench.configurations(bench.Args(end_to_end=True, patterns=("4:8",), hidden_dims=(2, 512)))
    assert {"dense", "4:8", "4:8, --kernel torch", "4:8, hidden 512"} <= set(labels)
    assert "dense, width 86" not in labels and "dense, width 86" in bench.configurations(bench.Args(end_to_end=True))
    assert not any(label.startswith(("2:4", "1:8")) for label in labels)


def test_where_faster():
    def row(width, pattern, ratio, batch=256):
        found = {"implementation": "N:M", "inputs": width, "outputs": width, "batch": batch, "threads": 1}
        return found | {"pattern": pattern, "x_bf16": ratio, "product": "forward" if batch == 1 else "all three"}

    ratios = {"2:4": (0.5, 1.5, 0.9), "1:4": (0.5, 1.1, 1.2), "1:8": (3.0, 4.0, 5.0), "4:8": (2.0, 0.7, 3.0)}
    rows = [row(w, p, r) for p, found in ratios.items() for w, r in zip((128, 256, 512), found, strict=True)]
    rows.append(row(128, "2:4", 1.5, batch=1) | {"product": "all three"})  # not what acting needs
    found = {"2:4": "at 256", "1:4": "from 256", "1:8": "from 128", "4:8": "at 128 512"}
    assert bench.where_faster(rows, "x_bf16") == {(256, 1): found}
    assert bench.describe_widths([(1, False), (2, False)]) == "nowhere"


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

    def no_capture(*_):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(bench, "graphed", no_capture)
    found, _, unsupported = bench.gpu_functions(64, 32, 16, args, device="cpu")
    assert ("dense bf16", "", "forward") in found and not any("graph" in key[0] for key in found)
    assert "dense bf16  forward: not permitted when stream is capturing" in unsupported
    monkeypatch.setattr(bench, "graphed", no_graph)

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
    limits = {"peak_gflops": {"fp32": {"1": 1e3}, "TF32": {"1": 2e3}, "bf16": {"1": 4e3}}, "read_gbs": 100.0}
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
    assert "Some GPU" in out and "sparse bf16 1:4 graph" in out and "not supported: sparse bf16 4:8" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("written")) <= 100
    assert "| 64 to 64 | 32 |" in (tmp_path / "summary.md").read_text() and (tmp_path / "speedup.png").exists()
    labels = bench.configurations(bench.Args(device="cuda", end_to_end=True))
    assert all("--device=cuda" in labels[f"{name}, GPU"][0] for name in ("dense", "2:4", "1:4", "1:8"))
    runs = {"dense": 50.0, "dense, GPU": 300.0, "1:8, GPU": 200.0}
    content = {"rate_update_ms_peak_mib": {label: [(rate, 1.0, 1.0)] for label, rate in runs.items()}}
    table = bench.tabulate_training(content | {"conditions": {"args": {"threads": (1,)}}})
    assert table[-1][-1] == "0.67"  # a loss against dense on the GPU


def test_wandb_gets_tables_and_figures(monkeypatch, tmp_path):
    """Checked against a stub: the run has each table with its columns, and the figure."""
    logged, opened = {}, {}

    class Run:
        def log(self, values):
            logged.update(values)

        def log_artifact(self, artifact):
            opened["files"] = artifact.files

        def finish(self):
            opened["finished"] = True

    class Artifact:
        def __init__(self, name, type):
            assert (name, type) == ("benchmark_summary", "benchmark")
            self.files = []

        def add_file(self, path):
            self.files.append(path)

    stub = SimpleNamespace(login=lambda **_: False, init=lambda **kw: opened.update(kw) or Run(), Settings=dict,
                           Table=lambda columns, data: (columns, data), Image=str, Artifact=Artifact)  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = ("--widths", 40, "--patterns", "1:4", "--repetitions", 1, "--threads", 1, "--out", tmp_path)
    assert run(monkeypatch, *flags, "--wandb-project-name", "mine") == 0
    assert (opened["project"], opened["mode"], opened["finished"]) == ("mine", "offline", True)
    assert opened["files"] == [str(tmp_path / "summary.md")]
    columns, rows = logged["layers"]
    header = csv.DictReader(open(tmp_path / "results.csv")).fieldnames
    assert header == [*columns, "cpu", "gpu", "date", "commit", "torch"]
    assert len(rows) == len(json.loads((tmp_path / "results.json").read_text())["layers"])
    assert logged["actor"][0][0] == "implementation" and logged["speedup_1_threads"].endswith("speedup_1_threads.png")


@pytest.mark.parametrize("name", ["kernels", "end_to_end", "end_to_end_wide"])
def test_the_readme_shows_what_was_measured(name):
    folder = bench.HERE / "results" / name
    content = json.loads((folder / "results.json").read_text())
    summarize = bench.summarize_kernels if name == "kernels" else bench.summarize_training
    assert summarize(content) == (folder / "summary.md").read_text()
    assert summarize(content).strip() in (bench.HERE / "README.md").read_text()


def test_the_actor_and_the_figure_by_hand(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "seconds", lambda *_: next(clock) // 2 * 1e-6)  # torch and numpy in turns: 0, 1, 2, ...
    content = {"actor": [], "wrong": []}
    bench.measure_actor(bench.Args(patterns=("1:128",), repetitions=1), content)  # a group wider than the layer
    assert [row["p50_us"] for row in content["actor"]] == [149.5, 149.5]  # of 0 to 299
    assert [row["p99_us"] for row in content["actor"]] == [296.0, 296.0]
    rows = [{"implementation": "N:M", "pattern": p, "inputs": w, "outputs": w, "batch": 256, "threads": 1,
             "product": "forward", "x_best_fp32": w / 64} for p in ("2:4", "1:16") for w in (128, 256)]  # fmt: skip
    args = bench.Args(patterns=("2:4", "1:16"), widths=(128, 256))
    (ax,) = bench.draw_speedup(rows, args, 1).axes
    levels = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"}
    assert levels == {2, 16} and [2.0, 4.0] in [list(line.get_ydata()) for line in ax.lines]


def test_the_warning_of_noise(monkeypatch, tmp_path, capsys):
    for factor, warned in ((1.05, False), (1.2, True)):
        turns = bench.time_in_turns
        monkeypatch.setattr(bench, "time_in_turns", lambda functions, *_, factor=factor: {
            key: [1e-3 * (factor if key[0] == "dense again" else 1)] * 4 for key in functions})  # fmt: skip
        assert run(monkeypatch, *SMALL, "--batch-sizes", 64, "--out", tmp_path) == 0
        assert ("too noisy" in capsys.readouterr().out) is warned
        monkeypatch.setattr(bench, "time_in_turns", turns)


def test_no_compiler(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(bench, "load_kernels", fail)
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 2
    assert capsys.readouterr().err == "error: the N:M kernels need a C compiler: no compiler\n"


def test_noise_is_of_dense_and_of_nm():
    row = {"batch": 256, "threads": 1, "us": 10.0, "us_q1": 9.0, "us_q3": 11.0, "x_torch_fp32": 1.0}
    rows = [row | {"implementation": "dense again", "x_torch_fp32": x} for x in (1.25, 0.8, 1.0)]
    rows += [row | {"implementation": "N:M"}, row | {"implementation": "torch CSR", "us_q3": 99.0}]
    found = bench.measure_noise(rows)
    assert found["dense against itself, batch 256, 1 thread"] == {"median": 0.25, "worst": 0.25}
    assert found["middle half of N:M, batch 256, 1 thread"] == {"median": 0.2, "worst": 0.2}
