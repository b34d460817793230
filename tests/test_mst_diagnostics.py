"""MST's diagnostics: by hand on small matrices, of networks and forks, and that they change nothing."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import read_rows
from test_mst import agent_of, spaces


def test_dormant_share_and_srank_by_hand(mst):
    h = torch.tensor([[1.0, 0.0, 0.1, 2.0], [1.0, 0.0, 0.0, 2.0]])  # means 1, 0, 0.05, 2; mean of all 0.7625
    assert mst.dormant_share([h]) == 0.5  # at most 0.07625
    assert mst.dormant_share([h], threshold=0.05) == 0.25
    assert mst.dormant_share([h, torch.ones(2, 2)]) == pytest.approx(2 / 6) and mst.dormant_share([h * 0]) == 1
    assert mst.srank(torch.diag(torch.tensor([100.0, 50.0, 1.0, 0.1]))) == 2  # 150 of 151.1 are 99.3 %
    assert mst.srank(torch.diag(torch.tensor([100.0, 50.0, 2.0, 0.0]))) == 3 and mst.srank(torch.eye(5)) == 5


def test_diagnostics_of_a_network(mst):
    agent, args = agent_of(mst, critic_blocks=2)
    rb = mst.ReplayBuffer(100, mst.transition_columns(spaces(11, 3)), "cpu")
    rng = np.random.default_rng(0)
    for _ in range(60):
        obs, action, after = rng.normal(size=11), rng.uniform(-1, 1, 3), rng.normal(size=11)
        rb.add(observations=obs, actions=action, next_observations=after, rewards=rng.normal(), dones=False)
    agent.qf1.net.embedding.weight.data[:, 11:] *= 10  # which units sleep depends on the actions
    agent.qf1.net.block1.net.fc1.bias.data.fill_(-2)
    before = torch.get_rng_state(), {n: p.clone() for n, p in agent.qf1.named_parameters()}
    hook = agent.qf1.net.block1.net.relu.register_forward_hook(lambda *_: torch.rand(1) and None)  # a fork that draws
    state, first = mst.State(), mst.get_masks(agent)
    state.ever = {name: E | (name.startswith("qf1") and "fc2" in name) for name, E in first.items()}
    layer = mst.sparse_layers(agent.qf1)["block2.net.fc1"]
    first["qf1.block2.net.fc1"].view(-1)[layer.positions[:40]] = False

    def diagnose(step: int) -> dict[str, float]:
        state.global_step = step
        return mst.diagnose(agent, rb, args, state, first)

    row = diagnose(7)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(p, before[1][n]) and p.grad is None for n, p in agent.qf1.named_parameters())
    assert row == diagnose(7) and row != diagnose(8)
    hook.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in agent.qf1.modules())
    data = rb.sample(args.batch_size, torch.Generator().manual_seed(7))
    shares, parts = [], agent.qf1.net
    for actions in (agent.actor(data.observations).detach(), data.actions):  # the critic's loss has the latter
        h, hidden = parts.embedding(torch.cat([agent.qf1.obs_norm(data.observations), actions], 1)), []
        for block in (parts.block1, parts.block2):
            hidden.append(torch.relu(block.net.fc1(block.net.norm(h))).detach())
            h = h + block.net.fc2(hidden[-1])
        features = parts.norm(h).detach()
        shares.append(mst.dormant_share(hidden))
    assert row["plasticity/qf1/dormant"] == pytest.approx(shares[1]) != pytest.approx(shares[0])
    assert row["plasticity/qf1/srank"] == mst.srank(features)
    assert row["plasticity/qf1/feature_norm"] == pytest.approx(h.detach().norm(dim=1).mean().item(), rel=1e-5)
    weights = torch.cat([p.flatten() for p in agent.qf1.parameters()])
    assert row["plasticity/qf1/weight_norm"] == pytest.approx(weights.norm().item(), rel=1e-5)
    loss = mst.critic_losses(agent, data, args, torch.Generator().manual_seed(7))
    sum(loss[1]).backward()
    grad = torch.cat([p.grad.flatten() for p in agent.qf1.parameters()])
    assert row["plasticity/qf1/gradient_norm"] == pytest.approx(grad.norm().item(), rel=1e-4)
    parts = agent.actor.net
    h = parts.embedding(agent.actor.obs_norm(data.observations))
    inner = torch.relu(parts.block1.net.fc1(parts.block1.net.norm(h)))
    assert row["plasticity/actor/dormant"] == pytest.approx(mst.dormant_share([inner.detach()]))
    actor_loss = -agent.qf1(data.observations, agent.actor(data.observations)).mean()
    grads = torch.autograd.grad(actor_loss, list(agent.actor.parameters()))
    wanted = torch.cat([g.flatten() for g in grads]).norm().item()
    assert row["plasticity/actor/gradient_norm"] == pytest.approx(wanted, rel=1e-4)
    ever, grown = (
        {net: row[f"plasticity/{net}/{key}"] for net in ("actor", "qf1", "qf2")}
        for key in ("ever_active", "grown_norm")
    )
    assert ever == pytest.approx({"actor": 0.4, "qf1": 0.7, "qf2": 0.4}, abs=5e-3)  # fc2 is as large as fc1
    kept = torch.cat([x.active_weights.detach() for x in mst.sparse_layers(agent.qf1).values()])
    outside = layer.active_weights.detach()[:40].square().sum() / kept.square().sum()
    assert grown == {"actor": 0, "qf1": pytest.approx(outside.item(), rel=1e-5), "qf2": 0}
    agent.qf1.spare = torch.nn.Parameter(torch.zeros(2))  # of a fork: no loss uses it
    agent.extra, agent.target_of["extra"] = copy.deepcopy(agent.qf1), "qf1_target"  # no loss calls it
    assert diagnose(7) == pytest.approx(row)
    agent.qf1.net.embedding.weight.requires_grad_(False)  # frozen by a fork
    assert 0 < diagnose(7)["plasticity/qf1/gradient_norm"] < row["plasticity/qf1/gradient_norm"]
    agent.qf2.requires_grad_(False)
    assert diagnose(7)["plasticity/qf2/gradient_norm"] == 0 < row["plasticity/qf2/gradient_norm"]
    for block in (agent.qf2.net.block1, agent.qf2.net.block2):
        block.net.relu = type("Own", (nn.ReLU,), {"__module__": "fork"})()
    layers = [(name.replace("head", "last"), x) for name, x in agent.qf2.net.named_children()]
    agent.qf2.net = nn.Sequential(OrderedDict(layers))
    lacks = {key for key in row if key not in diagnose(7)}
    assert lacks == {"plasticity/qf2/dormant", "plasticity/qf2/srank"}
    torch.nn.utils.parametrizations.spectral_norm(agent.qf2.net.embedding)  # each pass in training moves its buffers
    buffers = [x.clone() for x in agent.qf2.buffers()]
    diagnose(7)
    assert all(map(torch.equal, buffers, agent.qf2.buffers()))
    agent.qf2(data.observations, data.actions)
    assert not all(map(torch.equal, buffers, agent.qf2.buffers()))
    agent.actor.net.embedding.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="at step 9"):
        diagnose(9)


def test_diagnostics_change_nothing_but_their_rows(mst, small):
    options = {"total_timesteps": 300, "eval_interval": 100, "learning_starts": 100, "mask_update_interval": 25}
    a, b, c = (mst.train(small(mst, diagnostics_interval=x, **options))["run_dir"] for x in (0, 50, 125))
    assert [float(row["global_step"]) for row in read_rows(c) if row["plasticity/qf1/srank"]] == [125, 250, 300]
    assert next(float(row["global_step"]) for row in read_rows(b) if row["plasticity/qf1/srank"]) == 50  # untrained
    plain = [{k: v for k, v in row.items() if "plasticity" not in k} for row in read_rows(a)]
    rows = {row["global_step"]: {k: v for k, v in row.items() if "plasticity" not in k} for row in read_rows(b)}
    assert plain == [rows[row["global_step"]] for row in plain] and len(rows) > len(plain) - 1
    for net, grows in (("qf1", True), ("actor", False)):
        ever = [float(x) for row in read_rows(c) if (x := row[f"plasticity/{net}/ever_active"])]
        assert ever[0] == pytest.approx(0.4, abs=0.005) and (ever[1] > ever[0]) == grows  # before step 125's change
