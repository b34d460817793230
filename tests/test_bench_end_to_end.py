"""nm_kernel_bench.py --end-to-end on a task of seconds."""

import json
import signal
import statistics
import subprocess
import sys

import gymnasium as gym
import pytest
from test_bench import run

import nm_kernel_bench as bench


@pytest.mark.slow
def test_end_to_end(monkeypatch, tmp_path, capsys):
    nm = "1:8, two runs at once" if bench.CORES > 1 else "1:8"
    kept = {"dense, torch.compile", nm}
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes half a minute
    configurations = bench.configurations
    monkeypatch.setattr(bench, "configurations", lambda *a: {k: v for k, v in configurations(*a).items() if k in kept})
    flags = ("--env-id", "Pendulum-v1", "--hidden-dims", 16, "--steps", 2000, "--repetitions", 1, "--out", tmp_path)
    assert run(monkeypatch, "--end-to-end", *flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rate_update_ms_peak_mib"]) >= {nm} and results["conditions"]["versions"]["torch"]
    out = capsys.readouterr().out
    for label, ((rate, ms, mib),) in results["rate_update_ms_peak_mib"].items():
        assert 0 < ms < 1000 / rate * (4 if "two" in label else 1)  # an update is part of a step; one of two may lag
        assert 100 < mib < 4000
        assert f"{rate:,.0f}" in out and f"{ms:.2f}" in out and f"{mib:.0f}" in out


def test_ratios_and_failures(monkeypatch, tmp_path, capsys):
    rates = {"dense": [100.0, 300.0, 200.0], "dense, oneDNN": [300.0] * 3, "1:8": [800.0, 900.0, 1000.0]}
    rates |= {"dense, torch.compile": [400.0] * 3}
    rates |= {"RLx2 96/88": [1000.0] * 3, "RLx2 96/88, one-step targets": [1100.0] * 3}
    rates |= {"dense, hidden 512": [50.0] * 3, "1:8, hidden 512": [350.0] * 3, "SB3": [150.0] * 3}
    rates |= {"dense, two runs at once": [400.0] * 3, "1:8, two runs at once": [1600.0] * 3}
    left = {label: iter(values) for label, values in rates.items()}
    monkeypatch.setattr(bench, "configurations", lambda *_: dict(zip(rates, rates, strict=True)))
    monkeypatch.setattr(bench, "run_once", lambda label: (next(left[label]), None if label == "SB3" else 1.5, 321.0))
    assert run(monkeypatch, "--end-to-end", "--repetitions", 3, "--out", tmp_path) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["RLx2 96/88", "1,000", "5.00"] in lines and ["RLx2 96/88, one-step targets", "1,100", "5.50"] in lines
    assert ["1:8", "900", "4.50"] in lines and ["best dense fp32 (torch.compile)", "400", "2.00"] in lines
    assert (
        lines.index(["dense", "200", "1.00"])
        < lines.index(["SB3", "150", "0.75"])
        < lines.index(["1:8", "900", "4.50"])
    )
    ratio = f"{900 / statistics.median(rates['dense']):.2f}"
    assert ["1:8", "900", "800-1,000", "1.50", "321", ratio, "6.00", ""] in lines
    assert [
        "1:8, hidden 512",
        "350",
        "350-350",
        "1.50",
        "321",
        "7.00",
        "",
        "",
    ] in lines  # against dense of its own width
    assert [
        "1:8, two runs at once",
        "1,600",
        "1,600-1,600",
        "1.50",
        "321",
        "4.00",
        "",
        "",
    ] in lines  # against two dense
    assert ["SB3", "150", "150-150", "", "321", "0.75", "1.00", ""] in lines
    content = json.loads((tmp_path / "results.json").read_text())
    (ax,) = bench.draw_training(content).axes
    assert [bar.get_width() for bar in ax.patches] == [200, 400, 150, 900, 1000, 1100]
    assert ax.texts[-1].get_text() == "1,100 (5.5 times dense)" and (tmp_path / "end_to_end.png").exists()
    del content["rate_update_ms_peak_mib"]["dense, torch.compile"]
    assert (
        bench.first_rows(content)[1].items() >= {"name": "best dense fp32 (oneDNN)", "rate": 300, "dense": 1.5}.items()
    )


def test_a_failing_configuration_is_left_out(monkeypatch, tmp_path, capsys):
    commands = {"dense": bench.Run(["-c", "import sys; sys.exit('no such luck')"]), "1:8": bench.Run(["-c", "1"])}
    monkeypatch.setattr(bench, "configurations", lambda *_: dict(commands))
    once = bench.run_once
    path, kept = tmp_path / "results.json", []

    def run_once(configuration):
        kept.append(json.loads(path.read_text())["rate_update_ms_peak_mib"] if path.exists() else None)
        return once(configuration) if "luck" in configuration.command[1] else (100.0, 1.5, 321.0)

    monkeypatch.setattr(bench, "run_once", run_once)
    monkeypatch.setattr(bench.shutil, "which", lambda word: None if word == "git" else word)
    assert run(monkeypatch, "--end-to-end", "--repetitions", 2, "--out", tmp_path) == 1
    assert kept == [None, None, {"1:8": [[100.0, 1.5, 321.0]]}]  # what a kill would leave
    assert capsys.readouterr().err.count("no such luck") == 1  # it is not tried again
    content = json.loads(path.read_text())
    assert content["rate_update_ms_peak_mib"] == {"1:8": [[100.0, 1.5, 321.0]] * 2}
    assert content["conditions"]["commit"] is None  # there is no git


STAND_IN = """
import os, sys
folder = sys.argv[1].partition("=")[2]
(core,) = os.sched_getaffinity(0)
assert sys.argv[2] == "--threads=1" and os.environ["OMP_NUM_THREADS"] == "1"
os.mkdir(folder + "/run")
with open(folder + "/run/metrics.csv", "w") as file:
    file.write("global_step,charts/SPS,charts/update_ms\\n1000,9999,99\\n2000,9999,99\\n2500,,\\n")
    for step, speed in (3000, 100), (4000, 200), (5000, 900):
        file.write(f"{step},{speed + core},{speed / 100}\\n")
"""


@pytest.mark.skipif(bench.CORES < 2, reason="one core")
def test_a_run_is_timed_after_its_warm_up_and_copies_have_cores_of_their_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    *_, a, b = sorted(bench.os.sched_getaffinity(0))
    rate, ms, mib = bench.run_once(bench.Run(["-c", STAND_IN]))
    assert (rate, ms) == (200 + b, 2) and 1 < mib < 1000
    assert bench.run_once(bench.Run(["-c", STAND_IN], copies=2))[:2] == (400 + a + b, 2)


def test_an_interrupted_run_is_killed(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(bench, "wait_for", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run_once(bench.Run(["-c", "import time; time.sleep(600)"]))
    assert started[0].wait(10) == -signal.SIGKILL


def test_ctrl_c(monkeypatch, tmp_path):
    found = iter([(100.0, 1.5, 321.0)])

    def stop(*_):
        for timing in found:
            return timing
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_once", stop)
    assert run(monkeypatch, "--end-to-end", "--out", tmp_path) == 130
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rate_update_ms_peak_mib"] == {"dense": [[100.0, 1.5, 321.0]]}


def test_configurations(monkeypatch, tmp_path):
    args = bench.Args(end_to_end=True, hidden_dims=(256, 512), device="cuda", out=str(tmp_path))
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: True)
    bench.check_args(args)
    found = bench.configurations(args)
    wanted = {"dense", "dense, oneDNN", "dense, as many weights as 1:8", "2:4", "1:4", "1:8", "1:8, --kernel torch"}
    wanted |= {"SB3", "SBX (JAX)", "1:8, hidden 512", "1:8, GPU"}
    assert wanted <= set(found)
    assert ("dense, torch.compile" in found) == bool(bench.shutil.which("g++"))
    assert all("--device=cuda" in found[f"{name}, GPU"].command for name in ("dense", "2:4", "1:4", "1:8"))
    assert found["RLx2 96/88"].command[1:] == [*found["RLx2 96/88, one-step targets"].command[1:], "--delay-nstep=0"]
    assert {"--actor-sparsity=0.96", "--critic-sparsity=0.88"} <= {*found["RLx2 96/88"].command}
    assert found["SB3"].command[2:] == ["stable_baselines3", "Ant-v4", "256", "3000"]
    assert found["SBX (JAX)"].command[2:] == ["sbx", "Ant-v4", "256", "3000"]
    kernels = {label: [x for x in run.command if x.startswith("--kernel=")] for label, run in found.items()}
    sparse = {label for label in found if label.startswith(("1:", "2:", "RLx2"))}
    for label in found:  # the C kernels or an error, never torch for want of a compiler
        wanted = "--kernel=torch" if "torch" in label and label in sparse else "--kernel=nm"
        assert kernels[label] == ([wanted] if label in sparse and not label.endswith("GPU") else [])
    args.labels, args.env_id = ("dense", "RLx2 98/95"), "Hopper-v4"
    assert [*bench.configurations(args)] == ["dense", "RLx2 98/95"]
    narrow = bench.narrow_hidden_dim("Ant-v4", 256, "1:8")
    assert f"--hidden-dim={narrow}" in found["dense, as many weights as 1:8"].command
    if bench.CORES > 1:
        assert found["1:8, two runs at once"] == found["1:8"]._replace(copies=2)
        assert found[f"SB3, {bench.CORES} threads"].cores == bench.CORES


@pytest.mark.parametrize("pattern", ["1:8", "2:4"])
def test_the_narrow_network_has_as_many_parameters(dense, pattern):
    env, (n, m) = gym.make("Pendulum-v1"), map(int, pattern.split(":"))

    def parameters(units):
        nets = [dense.Actor(env, units), *(dense.QNetwork(env, units) for _ in range(2))]
        return [p for net in nets for p in net.parameters()]

    wide = parameters(64)
    hidden = [p for p in wide if p.dim() == 2 and len(p) == 64]
    left_out = sum(p.numel() - len(p) * (n * (p.shape[1] // m) + min(n, p.shape[1] % m)) for p in hidden)
    wanted = sum(p.numel() for p in wide) - left_out
    units = bench.narrow_hidden_dim("Pendulum-v1", 64, pattern)
    off = [abs(sum(p.numel() for p in parameters(units + by)) - wanted) for by in (-1, 0, 1)]
    assert min(off) == off[1]


CHECK = """
import sys, torch
torch.manual_seed(0)
x, layer = torch.randn(64, 40, requires_grad=True), torch.nn.Linear(40, 24)
y = layer(x)
y.float().square().sum().backward()
W, bias = layer.weight.detach().double(), layer.bias.detach().double()
exact = torch.einsum("bi,oi->bo", x.detach().double(), W) + bias
close = 1e-5 if sys.argv[1] == "oneDNN" else 2e-2
assert (y.dtype == torch.bfloat16) == (sys.argv[1] == "bf16")
assert (y - exact).abs().max() <= close * exact.abs().max()
products = ("bo,oi->bi", exact, W), ("bo,bi->oi", exact, x.detach().double())
for found, (names, *operands) in zip((x.grad, layer.weight.grad), products):
    wanted = 2 * torch.einsum(names, *operands)
    assert (found - wanted).abs().max() <= close * wanted.abs().max()
one = layer(x[:1])
assert (one - exact[:1]).abs().max() <= close * exact.abs().max()
"""


@pytest.mark.parametrize("name", ["oneDNN", "bf16"])
def test_changed_products_are_right_and_used(tmp_path, name):
    if name == "bf16" and not bench.HAS_BF16:
        pytest.skip("this CPU has no bfloat16")
    shown = bench.ONEDNN.replace("    return product(", "    print('product')\n    return product(")
    script = tmp_path / "script.py"
    script.write_text(CHECK)
    change = {"oneDNN": shown, "bf16": bench.BF16}[name]
    command = [sys.executable, "-c", bench.LAUNCH.format(change=change), str(script), name]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("product") == (3 if name == "oneDNN" else 0)  # forward and both gradients
