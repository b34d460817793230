"""On an NVIDIA GPU: training, resuming, evaluating elsewhere, and the benchmark. Skipped where there is none."""

import csv

import pytest
import torch
from conftest import NETS, SMALL, assert_same_model, assert_same_run, read_meta, read_model, read_rows, stop_at

import nm_kernel_bench as bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def sparse(script):
    return {"n": 1, "m": 4, "mask_update_interval": 30} if hasattr(script, "refresh_masks") else {}


def test_updates_are_those_of_the_cpu(twin):
    """The same weights, batches and (without noise) targets: 20 updates and a refresh after the tenth."""
    agents = {}
    for device in ("cpu", "cuda"):
        args = twin.Args(**SMALL | sparse(twin), device=device, policy_noise=0.0)
        env = twin.make_env(args.env_id)
        torch.manual_seed(0)
        networks = twin.make_networks(args, env)
        if sparse(twin):
            networks = twin.sparsify(networks, args)
        agents[device] = agent = twin.Agent(networks, args.learning_rate)
        rb = twin.ReplayBuffer(400, twin.transition_columns(env), device)
        generator = torch.Generator().manual_seed(1)
        rb.rows.normal_(generator=generator)
        rb.added = 400
        rng = twin.make_generators(3, device)
        for update in range(1, 21):
            losses = twin.update_agent(agent, rb, args, rng, update)
            assert all(value.device.type == device for value in losses.values())
            if update == 10 and sparse(twin):
                twin.refresh_masks(agent)
    for name in NETS:
        cpu, cuda = (twin.plain_state(getattr(agents[device], name)) for device in agents)
        assert cuda.keys() == cpu.keys() and len(cpu) >= 6
        for key in cpu:
            assert cuda[key].is_cuda and (cuda[key].cpu() - cpu[key]).abs().max() <= 1e-4, (name, key)


def test_resume_is_bit_for_bit(twin, small, monkeypatch, cli):
    whole = twin.train(small(twin, device="cuda", **sparse(twin)))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, twin, 317)
        part = twin.train(small(twin, device="cuda", **sparse(twin)))
    assert part["exit_reason"] == "sigterm"
    code, _, err = cli(twin, "--resume", part["run_dir"], small=False)
    assert code == 0 and err == ""
    assert_same_run(whole, part["run_dir"])
    meta = read_meta(whole)
    assert torch.cuda.get_device_name() in meta["hardware"] and meta["hardware_report"]["hardware/update_us"] > 0
    assert meta["kernel"] == "torch"


def test_n_equal_to_m_is_dense(dense, rnm, small):
    changes = {"device": "cuda", "total_timesteps": 1100}  # metrics.csv has losses at every 1,000th step
    runs = [dense.train(small(dense, **changes)), rnm.train(small(rnm, n=4, m=4, **changes))]
    runs = [run["run_dir"] for run in runs]
    assert_same_model(*runs)
    rows = [[row["losses/qf_loss"] for row in read_rows(run)] for run in runs]
    assert rows[0] == rows[1] and any(rows[0])


def test_a_gpu_policy_is_evaluated_on_the_cpu(rnm, small, cli):
    run = rnm.train(small(rnm, device="cuda", n=1, m=4))["run_dir"]
    assert all(not tensor.is_cuda for tensor in read_model(run)["actor"].values())
    code, on_cpu, err = cli(rnm, "--evaluate", run, "--device", "cpu", small=False)
    assert code == 0 and err == ""
    code, on_gpu, _ = cli(rnm, "--evaluate", run, small=False)
    assert code == 0 and on_cpu.split("return")[1] == on_gpu.split("return")[1]  # to a digit behind the point


def test_benchmark_of_layers(monkeypatch, tmp_path, capsys):
    argv = ["nm_kernel_bench.py", "--device", "cuda", "--no-track", "--widths", "256", "--batch-sizes", "256"]
    argv += ["--patterns", "2:4", "4:8", "--repetitions", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    assert bench.main() == 0, capsys.readouterr().out
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    timed = {(row["implementation"], row["product"]) for row in rows}
    assert {("dense torch", "grad-weight"), ("dense bf16, graph", "forward"), ("sparse bf16", "forward")} <= timed
    assert all(float(row["us"]) > 0 for row in rows)
    summary = (tmp_path / "summary.md").read_text()
    assert torch.cuda.get_device_name() in summary and "keeps at most two" in summary
