"""On an NVIDIA GPU: training, resuming, evaluating elsewhere, and the benchmark. Skipped where there is none."""

import csv

import pytest
import torch
from conftest import NETS, assert_same_model, assert_same_run, drops_at, read_meta, read_model, read_rows, stop_at

import nm_kernel_bench as bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def sparse(script):
    return {"n": 1, "m": 4, "mask_update_interval": 30} if hasattr(script, "refresh_masks") else {}


def test_updates_are_those_of_the_cpu(script, small):
    """The same weights, batches and (without noise) targets: 20 updates; masks change at the tenth, MST's and RLx2's
    once more, and from the twelfth on RLx2's targets have three steps."""
    agents, masks = {}, {}
    changes = sparse(script) | {"batch_size": 16, "policy_noise": 0.0}
    if hasattr(script, "drop_fractions"):
        changes |= {"mask_update_interval": 10, "policy_frequency": 1, "learning_starts": 0}
    for device in ("cpu", "cuda"):
        args = small(script, device=device, **changes, **({"delay_nstep": 12} if script.__name__[:4] == "rlx2" else {}))
        env = script.make_env(args.env_id)
        torch.manual_seed(0)
        networks = script.make_networks(args, env)
        agents[device] = agent = script.Agent(getattr(script, "sparsify", lambda x, _: x)(networks, args), lr=1e-3)
        widths = script.transition_columns(env)
        if hasattr(script, "shrink_replay"):
            widths |= {"truncations": 1, "policy_actions": 2}
        rb = script.ReplayBuffer(400, widths, device, *[args.gamma] * hasattr(script, "shrink_replay"))
        rb.rows.normal_(generator=torch.Generator().manual_seed(1))
        ends = rb.rows[:, sum(list(widths.values())[:4]) :][:, : 1 + ("truncations" in widths)]  # dones, truncations
        ends.copy_(ends > 1)
        rb.added = 400
        rng = script.make_generators(3, device)
        for update in range(1, 21):
            drops = [drops_at(script, args, update)] if hasattr(script, "drop_fractions") else []
            losses = script.update_agent(agent, rb, args, rng, update, *drops)
            assert all(value.device.type == device for value in losses.values())
            if update == 10 and sparse(script):
                script.refresh_masks(agent)
            if update in (1, 20) and hasattr(script, "get_masks"):
                masks[device, update] = script.get_masks(agent)
    for name in NETS:
        cpu, cuda = (script.plain_state(getattr(agents[device], name)) for device in agents)
        assert cuda.keys() == cpu.keys() and len(cpu) >= 6
        for key in cpu:
            assert cuda[key].is_cuda and (cuda[key].cpu() - cpu[key]).abs().max() <= 1e-4, (name, key)
    for key in masks["cpu", 1] if masks else []:
        assert torch.equal(masks["cpu", 20][key].cpu(), masks["cuda", 20][key].cpu())
    moved = [key for key in masks["cpu", 1] if (masks["cpu", 1][key] != masks["cpu", 20][key]).any()] if masks else []
    assert bool(moved) == bool(masks)


def test_resume_is_bit_for_bit(script, small, monkeypatch, cli):
    whole = script.train(small(script, device="cuda", **sparse(script)))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, script, 317)
        part = script.train(small(script, device="cuda", **sparse(script)))
    assert part["exit_reason"] == "sigterm"
    code, _, err = cli(script, "--resume", part["run_dir"], small=False)
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
