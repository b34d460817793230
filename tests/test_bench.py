"""nm_kernel_bench.py on small layers: what it times, checks, writes and says."""

import csv
import io
import itertools
import json
import os
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import nm_kernel_bench as bench


def run(monkeypatch, *argv):
    """The exit code of main() in this process."""
    track = [] if "--wandb-project-name" in argv else ["--no-track"]
    monkeypatch.setattr(sys, "argv", ["nm_kernel_bench.py", *map(str, argv), *track])
    try:
        return bench.main()
    except SystemExit as stop:
        return stop.code


SMALL = ("--widths", 40, "--patterns", "1:4", "--repetitions", 1)
BAD = [
    ("--steps", 1),
    ("--repetitions", 0),
    ("--end-to-end", "--env-id", "No-v0"),
    ("--end-to-end", "--env-id", "no_module:No-v0"),
    ("--end-to-end", "--env-id", "CartPole-v1"),
    ("--end-to-end", "--env-id", "FrozenLake-v1"),
    ("--widths", 0),
    ("--batch-sizes", 0),
    ("--patterns", "8:4"),
    ("--patterns",),
    ("--patterns", "two"),
    ("--patterns", "²:4"),
    ("--patterns", "0%"),
    ("--patterns", "100%"),
    ("--end-to-end", "--patterns", "95%"),
    ("--end-to-end", "--labels", "dense", "Dense"),
    ("--hidden-dims", 0),
    ("--device", "cuda"),
    ("--end-to-end", "--device", "cuda"),
    ("--out", "/dev/null/x"),
]


@pytest.mark.parametrize("argv", BAD)
def test_bad_flags(monkeypatch, capsys, argv):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_flags_are_completed(tmp_path):
    args = bench.Args(widths=(256, 64, 64), batch_sizes=(256, 1), patterns=("1:4", "1:4"), out=str(tmp_path))
    bench.check_args(args)
    assert (args.widths, args.batch_sizes, args.patterns) == ((64, 256), (1, 256), ("1:4",))
    args = bench.Args(end_to_end=True, out=str(tmp_path))
    bench.check_args(args)
    assert args.patterns == ("2:4", "1:4", "1:8")
    args = bench.Args(out=str(tmp_path))
    bench.check_args(args)
    assert args.patterns == ("2:4", "1:4", "1:8", "4:8", "2:8", "1:16", "85%", "90%", "95%", "98%")


def test_kernels_are_measured(monkeypatch, tmp_path, capsys):
    patterns = ("--patterns", "1:4", "2:8", "95%")
    assert run(monkeypatch, "--widths", 40, *patterns, "--repetitions", 2, "--out", tmp_path) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "## Wrong" not in summary and "## Not supported" not in summary and "Noise is" in summary
    content = json.loads((tmp_path / "results.json").read_text())
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    dense = 4 + bench.HAS_BF16
    assert len(rows) == len(content["layers"]) == 2 * (1 + 4) * (dense + 2 * 3)  # batch 1: forward, 256: all
    conditions = content["conditions"]
    assert {(row["cpu"], row["date"]) for row in rows} == {(conditions["cpu"], conditions["date"])}
    peak = conditions["peak_gflops"]["fp32"]
    assert 1 < peak < 1000 and 1 < conditions["read_gbs"] < 1000
    for row in content["layers"]:
        assert 0 < row["us_q1"] <= row["us"] <= row["us_q3"] and 0 < row["gflops"]
        kept = {"1:4": 1 / 4, "2:8": 1 / 4, "95%": 1 / 20, "": 1}[row["pattern"]]
        work = 2 * row["batch"] * row["inputs"] * row["outputs"] * kept * (3 if row["product"] == "all three" else 1)
        assert row["gflops"] == pytest.approx(work / row["us"] / 1e3, rel=0.03)  # 113 inputs are ragged
        if row["implementation"] == "dense bf16":
            assert row["x_bf16"] == 1 and row["share_of_peak"] is None  # the peak is fp32's
        else:
            assert row["share_of_peak"] == pytest.approx(row["gflops"] / peak, rel=1e-3)
        if row["implementation"] == "dense torch":
            assert row["x_torch_fp32"] == 1 and row["x_best_fp32"] <= 1
    actor = {row["pattern"]: row for row in content["actor"]}
    assert [row["implementation"] for row in content["actor"]] == ["dense torch", "dense numpy", "N:M", "N:M", "any"]
    assert list(actor) == ["", "1:4", "2:8", "95%"] and all(
        0 < row["p50_us"] <= row["p99_us"] for row in actor.values()
    )
    assert actor[""]["bytes"] == 4 * (105 * 256 + 256 + 256 * 256 + 256 + 256 * 8 + 8)
    kept = 256 * (26 + 1) + 256 * 64 + 8 * 256  # of 105 inputs 26 groups and a single one; the output layer is dense
    assert actor["1:4"]["bytes"] == 4 * (kept + 256 + 256 + 8) + 2 * kept
    trained = {
        row["pattern"]: row["us"]
        for row in content["layers"]
        if row["product"] == "all three" and row["implementation"] in ("N:M", "any") and row["inputs"] == 40
    }
    assert [row["pattern"] for row in content["masks"]] == ["1:4", "2:8"] and trained.keys() == {"1:4", "2:8", "95%"}
    assert next(line for line in summary.splitlines() if line.startswith("| 40 to 40 ")).count("|") == 6
    for row in content["masks"]:
        share = (row["project_us"] + row["index_us"]) / (1000 * trained[row["pattern"]])
        assert row["batch"] == 256 and row["share_at_K_1000"] == pytest.approx(share, rel=1e-2)
    assert (tmp_path / "speedup.png").stat().st_size > 10_000


def test_a_mask_without_structure():
    W = torch.randn(30, 11, generator=torch.Generator().manual_seed(0))
    E = bench.make_mask(W, "95%")
    kept = 330 - int(0.95 * 330)
    assert E.sum() == kept == bench.count_kept(11, 30, "95%") == 17 and W[E].abs().min() > W[~E].abs().max()
    assert torch.equal(bench.make_mask(W, "1:4"), bench.project(W, 1, 4)) and bench.make_mask(W, "").all()


def test_rows_by_hand():
    place = {"inputs": 8, "outputs": 4, "batch": 10}
    times = {("dense torch", "", "forward"): [5e-6, 1e-6, 2e-6, 3e-6, 4e-6], ("dense numpy", "", "forward"): [2e-6] * 3}
    times |= {("N:M", "1:4", name): [1e-6, 1e-6, 2e-6] for name in bench.PRODUCTS}
    rows = {(row["implementation"], row["product"]): row for row in bench.layer_rows(times, place, {"fp32": 5.0})}
    dense = rows["dense torch", "forward"]
    assert (dense["us_q1"], dense["us"], dense["us_q3"]) == (2, 3, 4)
    assert dense["gflops"] == pytest.approx(2 * 10 * 8 * 4 / 3e-6 / 1e9, rel=1e-3) and dense["x_best_fp32"] == 0.6667
    sparse = rows["N:M", "all three"]
    assert sparse["us"] == 3 and sparse["gflops"] == pytest.approx(3 * 2 * 10 * 2 * 4 / 3e-6 / 1e9, rel=1e-3)
    assert sparse["share_of_peak"] == pytest.approx(sparse["gflops"] / 5, rel=1e-3) and sparse["x_torch_fp32"] is None
    assert rows["N:M", "forward"]["x_torch_fp32"] == 3 and rows["N:M", "forward"]["x_bf16"] is None
    assert bench.main_rows(list(rows.values())) == [sparse]
    forward = rows["N:M", "forward"]  # of a layer whose gradients were wrong
    assert bench.main_rows([forward]) == [] and len(bench.main_rows([forward | {"batch": 1}])) == 1


@pytest.mark.parametrize("label", [*bench.DENSE, "N:M 1:4", "torch CSR 1:4"])
@pytest.mark.parametrize("batch", [1, 64])
def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path, label, batch):
    """An output that is off makes each implementation wrong: it is named and not in the table; the exit code is 1."""
    if label in bench.DENSE:
        linear, mm = bench.DENSE[label]
        monkeypatch.setitem(bench.DENSE, label, (lambda x, W, bias: linear(x, W, bias) * 1.001, mm))
    else:
        name = "nm_products" if label.startswith("N:M") else "csr_products"
        make = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda E, W, bias, *rest: make(E, W, bias + 0.01, *rest))
    assert run(monkeypatch, *SMALL, "--batch-sizes", batch, "--out", tmp_path) == 1
    wrong = json.loads((tmp_path / "results.json").read_text())["wrong"]
    assert any(f"{label} forward of 40 to 40, batch {batch}: error" in complaint for complaint in wrong)
    assert f"- {wrong[0]}" in (tmp_path / "summary.md").read_text()
    rows = list(csv.DictReader(open(tmp_path / "results.csv")))
    place = {"inputs": "40", "product": "forward"}
    timed = {f"{row['implementation']} {row['pattern']}".strip() for row in rows if place.items() <= row.items()}
    assert len(timed) > 2 and label not in timed


@pytest.mark.parametrize("batch", [3, 64])
def test_each_product_is_checked(monkeypatch, batch):
    make, args = bench.nm_products, bench.Args(patterns=("1:4",))

    def off(wanted, factor, *operands):
        products = make(*operands)
        right = products[wanted]
        products[wanted] = lambda: [part * factor for part in y] if isinstance(y := right(), list) else y * factor
        return products

    for name, factor in itertools.product(bench.PRODUCTS, (1.001, float("nan"))):
        monkeypatch.setattr(bench, "nm_products", partial(off, name, factor))
        content = {"wrong": [], "unsupported": []}
        found = bench.layer_functions(40, 24, batch, args, content)
        assert [complaint.split(" of ")[0] for complaint in content["wrong"]] == [f"N:M 1:4 {name}"]
        assert {key[2] for key in found if key[0] == "N:M"} == set(bench.PRODUCTS) - {name}
        assert not content["unsupported"]
    exact = torch.arange(10.0).double()
    assert bench.check([exact[:8], exact[8:]], exact, "N:M") is None
    assert bench.check([exact[:8], exact[8:] + 0.001], exact, "N:M") == "error 1.1e-04"  # the biases' gradient


def test_a_wrong_actor_is_named(monkeypatch):
    forward, content = bench.chain_forward, {"actor": [], "wrong": []}
    monkeypatch.setattr(bench, "chain_forward", lambda *a, **k: [forward(*a, **k)[0] * 1.001])
    bench.measure_actor(bench.Args(patterns=("1:4",), repetitions=1), content)
    assert content["wrong"][0].startswith("actor with 1:4: error") and len(content["actor"]) == 2
    monkeypatch.setattr(bench.np, "maximum", lambda x, _: x)
    bench.measure_actor(bench.Args(patterns=("1:4",), repetitions=1), content)
    assert content["wrong"][1].startswith("actor in numpy: error")


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("cpu_limits", KeyboardInterrupt),
        ("time_once", signal.SIGTERM),
        ("layer_rows", MemoryError),
        ("measure_actor", KeyboardInterrupt),
        ("measure_masks", MemoryError),
    ],
)
def test_what_stops_it_keeps_what_is_measured(monkeypatch, capsys, tmp_path, stage, fault):
    function, calls = getattr(bench, stage), []

    def stop(*args, **kwargs):
        calls.append(0)
        if len(calls) < {"time_once": 3, "layer_rows": 11}.get(stage, 0):  # two of four places are finished
            return function(*args, **kwargs)
        if fault == signal.SIGTERM:
            signal.raise_signal(fault)
        raise fault("no more\nof it")

    monkeypatch.setattr(bench, stage, stop)
    assert run(monkeypatch, *SMALL, "--batch-sizes", 1, 64, "--out", tmp_path) == (1 if fault is MemoryError else 130)
    assert ("error: MemoryError: no more\n" in capsys.readouterr().err) == (fault is MemoryError)
    if stage == "cpu_limits":
        assert not any(tmp_path.iterdir())
        return
    content = json.loads((tmp_path / "results.json").read_text())
    assert len({(row["inputs"], row["batch"]) for row in content["layers"]}) == (4 if "measure" in stage else 2)
    assert bool(content["actor"]) == (stage == "measure_masks")


def test_noise(monkeypatch, tmp_path, capsys):
    for factor, warned in ((1.05, False), (1.2, True)):
        monkeypatch.setattr(
            bench,
            "time_once",
            lambda functions, factor=factor: {
                key: 1e-3 * (factor if key[0] == "dense again" else 1) for key in functions
            },
        )
        assert run(monkeypatch, *SMALL, "--batch-sizes", 64, "--out", tmp_path / str(factor)) == 0
        out = capsys.readouterr().out
        assert ("too noisy" in out) is warned and ("differs from itself by 4.8%" in out) is not warned
    row = {"inputs": 8, "outputs": 8, "batch": 256, "us": 10.0, "us_q1": 9.0, "us_q3": 11.0, "pattern": "1:4"}
    rows = [row | {"implementation": "dense again", "product": "forward", "x_torch_fp32": x} for x in (1.25, 0.8, 1.0)]
    rows += [row | {"implementation": "N:M", "product": "all three"}]
    assert "by 20.0% (median; at most\n25.0%)" in (text := bench.describe_noise(rows))
    assert "spreads over 20.0% of their time\n(median; at most 20.0%)" in text
    calm = [row | {"x_torch_fp32": 1.0} for row in rows]
    assert "too noisy: conclude nothing from differences below 40%" in bench.describe_noise(calm)  # by N:M's spread


def test_a_full_disk(monkeypatch, tmp_path, capsys):
    (tmp_path / "results.json.tmp").symlink_to("/dev/full")
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("error: ") and shown.err.count("No space left") == 1
    assert "40 to 40" in shown.out  # what was measured is on the screen at least


def test_a_kill_keeps_what_is_measured(monkeypatch, tmp_path):
    """results.json is whole after each turn, and not replaced by a later benchmark."""
    path, found, once = tmp_path / "results.json", [], bench.time_once

    def look(functions):
        found.append(len(json.loads(path.read_text())["layers"]) if path.exists() else 0)
        return once(functions)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "time_once", look)
    assert run(monkeypatch, *SMALL, "--batch-sizes", 1, 64, "--out", tmp_path) == 0
    assert found[0] == 0 < found[1] < found[2] < found[3]  # two layers, two batch sizes
    text = path.read_text()
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 2 and path.read_text() == text
    monkeypatch.setattr(bench, "log_wandb", stop)
    assert run(monkeypatch, *SMALL, "--wandb-project-name", "p", "--out", tmp_path / "b") == 130
    assert (tmp_path / "b" / "summary.md").exists()


def test_without_a_reader_nothing_is_lost(monkeypatch, tmp_path):
    """A Ctrl-C ends the `tee` that reads, too."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(gone, write_through=True))
        assert run(monkeypatch, *SMALL, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["layers"] and (tmp_path / "speedup.png").exists()


def test_no_compiler(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(bench, "load_kernels", fail)
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 2
    assert capsys.readouterr().err == "error: the N:M kernels need a C compiler: no compiler\n"


def on_the_cpu(monkeypatch):
    """All of --device cuda but the GPU itself: functions run on the CPU, and a graph is a loop."""

    def graphed(function):
        def replay():
            for _ in range(bench.GRAPH_CALLS):
                function()

        return replay

    monkeypatch.setattr(bench, "graphed", graphed)
    monkeypatch.setattr(bench, "GPU", "cpu")


def test_gpu_functions(monkeypatch):
    on_the_cpu(monkeypatch)
    args = bench.Args(patterns=("2:4", "1:8", "4:8", "2:8"), device="cuda")

    def functions():
        content = {"wrong": [], "unsupported": []}
        return bench.layer_functions(64, 32, 16, args, content), content["wrong"], content["unsupported"]

    found, wrong, unsupported = functions()
    assert {key[0] for key in found if key[2] == "grad-weight"} == {
        name + mode for name in ("dense torch", "dense again", "dense TF32", "dense bf16") for mode in ("", ", graph")
    }
    assert not wrong and any("4:8" in reason and "not 2:4, which keeps at most two" in reason for reason in unsupported)
    legal = {reason.split()[2] for reason in unsupported if "Only CUDA tensors are currently supported" in reason}
    assert legal == {"2:4", "1:8", "2:8"}  # the own words of torch

    def products(E, W, bias, x, dy):  # one product right, one wrong, one missing
        def missing():
            raise RuntimeError("no such product")

        return {
            "forward": lambda: x @ (W * E).T + bias,
            "grad-input": lambda: dy @ (W * E) * 1.05,
            "grad-weight": missing,
        }

    monkeypatch.setattr(bench, "sparse_products", products)
    found, wrong, unsupported = functions()
    sparse = {key[1:] for key in found if key[0] == "sparse bf16, graph"}
    assert sparse == {(pattern, "forward") for pattern in args.patterns}
    assert [reason.split()[2:4] for reason in wrong] == [[pattern, "grad-input"] for pattern in args.patterns]
    assert all(0.04 < float(reason.split()[-1]) < 0.06 for reason in wrong)
    assert sum("grad-weight" in reason and "no such product" in reason for reason in unsupported) == 4

    def no_capture(*_):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(bench, "graphed", no_capture)
    found, _, unsupported = functions()
    assert ("dense bf16", "", "forward") in found and not any("graph" in key[0] for key in found)
    assert any("dense bf16" in reason and "not permitted when" in reason for reason in unsupported)


def test_gpu_report(monkeypatch, tmp_path, capsys):
    on_the_cpu(monkeypatch)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "Some GPU")
    limits = {"peak_gflops": {"fp32": 1e3, "TF32": 2e3, "bf16": 4e3}, "read_gbs": 100.0}
    monkeypatch.setattr(bench, "gpu_limits", lambda: limits)
    monkeypatch.setattr(bench, "sparse_products", lambda E, W, b, x, _: {"forward": lambda: x @ (W * E).T + b})
    flags = ("--widths", 64, "--batch-sizes", 1, 32, "--patterns", "1:4", "4:8", "--repetitions", 2)
    monkeypatch.setattr(bench, "PRODUCTS", ("forward",))
    assert run(monkeypatch, "--device", "cuda", *flags, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["layers"]
    for row in rows:
        twin = "dense TF32" + ", graph" * row["implementation"].endswith("graph")  # eager with eager, graph with graph
        wanted = {key: row[key] for key in ("inputs", "batch", "product")} | {"implementation": twin}
        us = next(other["us"] for other in rows if wanted.items() <= other.items())
        assert row["x_tf32"] == pytest.approx(us / row["us"], rel=1e-2)
        peak = 4e3 if "bf16" in row["implementation"] else 2e3 if "TF32" in row["implementation"] else 1e3
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / peak, rel=1e-2, abs=1e-6)
    place = {"inputs": 64, "batch": 32, "product": "forward"}
    found = {row["implementation"]: row["us"] for row in rows if place.items() <= row.items()}
    eager, graph = found["dense torch"], found["dense torch, graph"]
    assert 0.2 < graph / eager < 5  # per call, not per graph
    out = capsys.readouterr().out
    assert "Some GPU" in out and "sparse bf16, graph 1:4" in out and "2,000 GFLOP/s in TF32" in out
    assert "the best dense fp32 / as dense TF32 / as dense bf16" in out and (tmp_path / "speedup.png").exists()


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

    stub = SimpleNamespace(
        login=lambda **_: False,
        init=lambda **kw: opened.update(kw) or Run(),
        Settings=dict,
        Table=lambda columns, data: (columns, data),
        Image=str,
        Artifact=Artifact,
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run(monkeypatch, *SMALL, "--out", tmp_path, "--wandb-project-name", "mine") == 0
    assert (opened["project"], opened["mode"], opened["finished"]) == ("mine", "offline", True)
    assert opened["files"] == [str(tmp_path / "summary.md")]
    columns, rows = logged["layers"]
    header = csv.DictReader(open(tmp_path / "results.csv")).fieldnames
    assert header == [*columns, "cpu", "gpu", "date", "commit", "torch"]
    assert len(rows) == len(json.loads((tmp_path / "results.json").read_text())["layers"])
    assert logged["actor"][0][0] == "implementation" and logged["speedup"].endswith("speedup.png")


def test_the_actor_and_the_figure_by_hand(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "seconds", lambda *_: next(clock) // 2 * 1e-6)  # torch and numpy in turns: 0, 1, 2, ...
    content = {"actor": [], "wrong": []}
    bench.measure_actor(bench.Args(patterns=(), repetitions=1), content)
    assert [row["p50_us"] for row in content["actor"]] == [149.5, 149.5]  # of 0 to 299
    assert [row["p99_us"] for row in content["actor"]] == [296.0, 296.0]
    rows = [
        {
            "implementation": "N:M",
            "pattern": p,
            "inputs": w,
            "outputs": w,
            "batch": 256,
            "product": "all three",
            "x_best_fp32": w / 64,
        }
        for p in ("2:4", "1:16")
        for w in (128, 256)
    ]
    (ax,) = bench.draw_speedup({"layers": rows, "conditions": {"gpu": None}}).axes
    levels = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"}
    assert levels == {2, 16} and [2.0, 4.0] in [list(line.get_ydata()) for line in ax.lines]


def test_the_cost_of_a_mask_by_hand(monkeypatch):
    monkeypatch.setattr(bench, "time_once", lambda steps: dict(zip(steps, (30e-6, 10e-6), strict=True)))
    row = {"inputs": 8, "outputs": 8, "batch": 256, "implementation": "N:M", "product": "all three", "us": 20.0}
    rows = [row | {"pattern": "1:4"}, row | {"pattern": "1:4", "batch": 1}, row | {"pattern": "1:4", "outputs": 4}]
    content = {"layers": [*rows, row | {"pattern": "90%", "implementation": "any"}], "masks": []}
    bench.measure_masks(bench.Args(patterns=("1:4", "90%")), content)
    shares = {"share_at_K_100": 0.02, "share_at_K_1000": 0.002, "share_at_K_10000": 0.0002}
    place = {"width": 8, "pattern": "1:4", "batch": 256}
    assert content["masks"] == [place | {"project_us": 30.0, "index_us": 10.0} | shares]


def test_tables():
    rows = [{"name": "a", "x": 1.234}, {"name": "bbbb", "x": None}]
    lines = bench.tabulate(rows, "|x", "{name}|{x:.1f}").splitlines()
    assert lines == ["|      |   x |", "| ---- | --: |", "| a    | 1.2 |", "| bbbb |     |"]


FOLDERS = sorted(path.parent for path in (bench.HERE / "results").glob("*/results.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_committed_summaries_are_those_of_the_results(folder):
    content = json.loads((folder / "results.json").read_text())
    summarize = bench.summarize_kernels if "layers" in content else bench.summarize_training
    assert summarize(content) == (folder / "summary.md").read_text()
    header = next(csv.reader(open(folder / "results.csv")))
    assert ("implementation" if "layers" in content else "steps_per_second") in header


def test_masks_of_any_shape():
    """Rows of different lengths, also an empty one."""
    torch.manual_seed(0)
    E, tensors = torch.rand(24, 40) < 0.1, [torch.randn(size) for size in ((24, 40), (24,), (5, 40), (5, 24))]
    E[3] = False
    exact, products = bench.exact_products(*tensors, E), bench.nm_products(E, *tensors)
    assert not any(bench.check(products[name](), exact[name], "N:M") for name in bench.PRODUCTS)
    csr = bench.csr_products(E, *tensors)
    assert not any(bench.check(csr[name](), exact[name], "torch CSR") for name in bench.PRODUCTS)
