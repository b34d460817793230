"""MST: SimBa's networks, each regime's masks, swaps within N:M groups, diagnostics by hand, resume."""

import copy
import math
from collections import OrderedDict
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_same_run, checkpoint_step, drops_at, read_meta, read_rows, stop_at


def spaces(obs_dim, action_dim):
    box = gym.spaces.Box(-1, 1, (action_dim,))
    return SimpleNamespace(observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_dim,)), action_space=box)


def agent_of(mst, obs_dim=11, action_dim=3, seed=0, **options):
    args = mst.Args(**({"actor_hidden_dim": 8, "critic_hidden_dim": 16, "batch_size": 32} | options))
    torch.manual_seed(seed)
    env = spaces(obs_dim, action_dim)
    agent = mst.Agent(mst.sparsify(mst.make_networks(args, env), args), lr=args.learning_rate)
    for net in agent.networks:
        net.target.obs_norm = agent.actor.obs_norm
    return agent, args


def batch(obs_dim=11, action_dim=3, seed=1, rows=32):
    g = torch.Generator().manual_seed(seed)
    x = {"observations": torch.randn(rows, obs_dim, generator=g), "actions": torch.rand(rows, action_dim, generator=g)}
    x |= {"next_observations": torch.randn(rows, obs_dim, generator=g), "rewards": torch.randn(rows, 1, generator=g)}
    return SimpleNamespace(**x, dones=(torch.rand(rows, 1, generator=g) < 0.2).float())


def copy_generator(generator):
    return torch.Generator().set_state(generator.get_state())


def targets(agent, data, generator):
    """y [B, 1] with TD3's defaults, actions in -1..1."""
    with torch.no_grad():
        noise = torch.empty(data.actions.shape).normal_(0, 0.2, generator=generator).clamp(-0.5, 0.5)
        a = (agent.target_actor(data.next_observations) + noise).clamp(-1, 1)
        q = torch.min(*(net(data.next_observations, a) for net in (agent.qf1_target, agent.qf2_target)))
        return data.rewards + 0.99 * (1 - data.dones) * q


def plain_copy(mst, net):
    """The network with nn.Linear, zero where inactive, in place of its sparse layers."""
    twin = copy.deepcopy(net)
    for name, layer in mst.sparse_layers(twin).items():
        linear = nn.Linear(*reversed(layer.shape))
        linear.weight.data, linear.bias.data = layer.sparse_weight().detach().clone(), layer.bias.detach().clone()
        parent, _, child = f"net.{name}".rpartition(".")
        setattr(twin.get_submodule(parent), child, linear)
    return twin


def masks_of(mst, net):
    return {name: layer.E.clone() for name, layer in mst.sparse_layers(net).items()}


def test_sizes_are_simbas(mst):
    """Of Humanoid in the DeepMind control suite: 67 observations, 21 actions."""
    networks = mst.make_networks(mst.Args(), spaces(67, 21))
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}

    def simba(inputs, d, n, outputs):
        return (inputs + 1) * d + n * (8 * d**2 + 7 * d) + 2 * d + (d + 1) * outputs

    assert counts == {"actor": simba(67, 128, 1, 21), "qf1": simba(88, 512, 2, 1), "qf2": simba(88, 512, 2, 1)}
    assert counts["qf1"] == 4_248_577 and counts["actor"] == 143_637  # SAC's actor, with a second head: 0.146 M
    for net in networks.values():
        blocks = [module for name, module in net.net.named_children() if name.startswith("block")]
        assert len(blocks) == (1 if net is networks["actor"] else 2)
        for linear in (net.net.embedding, net.net.head):
            W = linear.weight.detach()
            small = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
            assert torch.allclose(small, torch.eye(len(small)), atol=1e-5) and not linear.bias.any()
        for block in blocks:
            for linear in (block.net.fc1, block.net.fc2):
                std = math.sqrt(2 / linear.weight.shape[1])
                assert linear.weight.std().item() == pytest.approx(std, rel=0.02) and not linear.bias.any()
                assert linear.weight.abs().max() > 3 * std  # normal, not uniform
        assert {module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def layer_norm(x, norm):
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def by_hand(net, x):
    """SimBa's trunk, block by block."""
    parts = dict(net.net.named_children())
    h = x @ parts["embedding"].weight.T + parts["embedding"].bias
    for name, block in parts.items():
        if name.startswith("block"):
            fc1, fc2 = block.net.fc1, block.net.fc2
            W1, W2 = (layer.sparse_weight() if hasattr(layer, "E") else layer.weight for layer in (fc1, fc2))
            h = h + torch.relu(layer_norm(h, block.net.norm) @ W1.T + fc1.bias) @ W2.T + fc2.bias
    return layer_norm(h, parts["norm"]) @ parts["head"].weight.T + parts["head"].bias


@pytest.mark.parametrize("kernel", ["nm", "torch"])
@pytest.mark.parametrize("options", [{}, {"critic_nm": "2:4", "actor_nm": "1:4"}, {"actor_regime": "dense"}])
def test_forward_by_hand(mst, options, kernel):
    agent, args = agent_of(mst, critic_blocks=3, kernel=kernel, actor_sparsity=None, **options)
    for p in (p for net in agent.networks for p in net.online.parameters()):
        p.data += 0.05 * torch.randn_like(p)  # norms and biases count, too
    for obs in np.random.default_rng(0).normal(3, 2, (40, 11)):
        agent.actor.obs_norm.update(obs)
    mst.use_kernel(args, agent, spaces(11, 3))
    data = batch()
    norm = agent.actor.obs_norm
    x = (data.observations - norm.mean.float()) / (norm.var.float() + 1e-8).sqrt()
    wanted = by_hand(agent.qf1, torch.cat([x, data.actions], 1))
    assert torch.allclose(agent.qf1(data.observations, data.actions), wanted, atol=2e-5)
    assert torch.allclose(agent.actor(data.observations), torch.tanh(by_hand(agent.actor, x)), atol=2e-5)


def test_statistics_are_numpys(mst):
    norm, x = mst.RunningNorm(4), np.random.default_rng(0).normal([0, 5, -1e4, 0], [1, 3, 0.1, 0], (500, 4))
    for obs in x:
        norm.update(obs)
    assert np.allclose(norm.mean, x.mean(0), rtol=1e-6, atol=1e-6)  # the start counts as 1e-4 of an observation
    assert np.allclose(norm.var[:2], x.var(0)[:2], rtol=1e-4)
    y = norm(torch.from_numpy(x).float()).numpy()
    assert np.allclose(y[:, :2].mean(0), 0, atol=1e-2) and np.allclose(y[:, :2].std(0), 1, atol=1e-2)
    assert norm(torch.ones(4))[3].item() == pytest.approx((1e-4 / 500 + 1e-8) ** -0.5, rel=1e-3)  # never varied


def test_one_set_of_statistics_takes_in_what_training_acts_on(mst, small, monkeypatch):
    seen, update = [], mst.RunningNorm.update
    monkeypatch.setattr(mst.RunningNorm, "update", lambda norm, obs: (seen.append(np.array(obs)), update(norm, obs)))
    agents, save = [], mst.save_model
    monkeypatch.setattr(mst, "save_model", lambda path, agent, rb: (agents.append(agent), save(path, agent, rb)))
    args = small(mst, total_timesteps=300, eval_interval=100)
    mst.train(args)
    agent = agents[-1]
    norms = {id(net.obs_norm) for part in agent.networks for net in (part.online, part.target)}
    assert len(seen) == 300 and len(norms) == 1  # evaluations add nothing
    assert np.allclose(agent.actor.obs_norm.mean, np.mean(seen, 0), atol=1e-4)
    assert agent.actor.obs_norm.count.item() == pytest.approx(300)
    for optimizer in (agent.q_optimizer, agent.actor_optimizer):  # AdamW
        (group,) = optimizer.param_groups
        assert group["weight_decay"] == 0.01 and group["decoupled_weight_decay"] is True


def test_sparsity_counts_the_blocks_alone_and_is_exact(mst):
    """Spec: Erdos-Renyi at 0.6 over SimBa's blocks, whose two kinds of layers are as large: 0.6 each."""
    agent, _ = agent_of(mst, obs_dim=67, action_dim=21, actor_hidden_dim=128, critic_hidden_dim=64, critic_blocks=2)
    for net in agent.networks:
        layers = mst.sparse_layers(net.online)
        assert set(layers) == {
            f"block{i}.net.{fc}" for i in (1, 2)[: 1 + (net.name != "actor")] for fc in ("fc1", "fc2")
        }
        for layer in layers.values():
            size = layer.shape.numel()
            assert len(layer.positions) == size - int(0.6 * size) and layer.E.sum() == len(layer.positions)
        assert type(net.online.net.embedding) is type(net.online.net.head) is nn.Linear
    assert not torch.equal(masks_of(mst, agent.qf1)["block1.net.fc1"], masks_of(mst, agent.qf2)["block1.net.fc1"])
    for nm in (None, (2, 4)):  # any place is as likely
        share = torch.stack([mst.random_mask((4, 8), 0.5, nm) for _ in range(400)]).double().mean(0)
        assert 0.4 < share.min() and share.max() < 0.6


@pytest.mark.parametrize("options", [{"actor_regime": "dense"}, {"critic_regime": "dense"}])
def test_one_module_alone_may_be_sparse(mst, small, options):
    run = mst.train(small(mst, total_timesteps=150, **options))["run_dir"]
    meta, (dense,) = read_meta(run), options
    sparse = {net for net, parts in meta["modules"].items() if any(p.get("type") == "SparseLinear" for p in parts)}
    assert sparse == ({"qf1", "qf2"} if dense == "actor_regime" else {"actor"})


def groups_have_n(E, n, m):
    rows, cols = E.shape
    counts = F.pad(E, (0, -cols % m)).view(rows, -1, m).sum(2)
    wanted = torch.tensor([min(n, cols - g * m) for g in range(counts.shape[1])])
    return bool((counts == wanted).all())


REGIMES = {  # options: whether actor and critics move
    "mst": ({}, False, True),
    "static": ({"critic_regime": "static"}, False, False),
    "swapped": ({"actor_regime": "rigl", "critic_regime": "static"}, True, False),
    "set": ({"actor_regime": "set", "critic_regime": "set"}, True, True),
    "2:4": ({"actor_nm": "2:4", "critic_nm": "2:4", "actor_regime": "rigl"}, True, True),
    "1:4 set": ({"critic_nm": "1:4", "critic_regime": "set"}, False, True),
    "3:5 ragged": ({"critic_nm": "3:5", "actor_nm": "3:5"}, False, True),
}


@pytest.mark.parametrize("name", REGIMES)
def test_masks_of_each_regime(mst, small, monkeypatch, name):
    """Counts, groups, targets, zeros under weight decay, at every update of a run; the actor's own clock."""
    options, *moves = REGIMES[name]
    agents, steps, update_agent = [], [], mst.update_agent
    changes = {"actor": set(), "qf1": set(), "qf2": set()}

    def watched(agent, rb, args, rng, update, drops=None):
        before = {net.name: masks_of(mst, net.online) for net in agent.networks}
        losses = update_agent(agent, rb, args, rng, update, drops)
        agents.append(agent)
        steps.append(update)
        for net in agent.networks:
            now, target = masks_of(mst, net.online), masks_of(mst, net.target)
            for layer_name, E in now.items():
                layer = mst.sparse_layers(net.online)[layer_name]
                assert E.sum() == before[net.name][layer_name].sum() and torch.equal(E, target[layer_name])
                assert not layer.sparse_weight()[~E].any()
                assert not mst.sparse_layers(net.target)[layer_name].sparse_weight()[~E].any()
                nm = mst.regimes(args)["actor" if net.name == "actor" else "critic"][2]
                assert nm is None or groups_have_n(E, *nm)
                if not torch.equal(E, before[net.name][layer_name]):
                    changes[net.name].add(update)
        return losses

    monkeypatch.setattr(mst, "update_agent", watched)
    result = mst.train(small(mst, weight_decay=0.5, total_timesteps=300, mask_update_interval=10, **options))
    assert steps[:200] == list(range(1, 201))  # then the hardware report's
    actor, critic = moves
    ends = 0.8 * 200
    assert changes["actor"] <= set(range(20, int(ends), 20)) and bool(changes["actor"]) == actor  # its own 10th updates
    for net in ("qf1", "qf2"):
        assert changes[net] <= set(range(10, int(ends), 10)) and (len(changes[net]) > 8) == critic
    with np.load(f"{result['run_dir']}/masks.npz") as file:
        last = {k: v for k, v in file.items() if not k.endswith(".shape")}
        for layer_name, E in masks_of(mst, agents[-1].qf1).items():
            assert np.array_equal(last[f"qf1.{layer_name}"][-1], np.packbits(E.numpy()))
    rows = read_rows(result["run_dir"])
    sad = [row["sad/qf1"] for row in rows if row["sad/qf1"]]
    assert bool(sad) == critic and all(0 <= float(x) <= 1 for x in sad)


def test_drop_fractions(mst):
    args = mst.Args(total_timesteps=1100, learning_starts=100, mask_update_interval=50, critic_regime="set")
    own = {u: drops_at(mst, args, u) for u in range(1, 1001)}
    assert all("actor" not in drops for drops in own.values())  # static
    assert [u for u, drops in own.items() if drops] == list(range(50, 800, 50))
    assert own[400]["critic"] == pytest.approx(0.15) and own[50]["critic"] == pytest.approx(
        0.15 * (1 + math.cos(math.pi / 16))
    )
    twice = [mst.drop_fractions(args, 2 * u, 100 + u) for u in range(25, 1000, 25)]  # two updates in each step
    assert [bool(drops) for drops in twice] == [u < 800 for u in range(25, 1000, 25)]
    args = mst.Args(total_timesteps=1100, learning_starts=100, mask_update_interval=50, actor_regime="rigl")
    own = {u: drops_at(mst, args, u) for u in range(1, 1001)}
    assert [u for u, drops in own.items() if "actor" in drops] == list(range(100, 800, 100))
    assert own[400]["actor"] == pytest.approx(0.15)
    args.policy_frequency = 3
    own = {u: drops_at(mst, args, u) for u in range(1, 1001)}
    assert [u for u, drops in own.items() if "actor" in drops] == list(range(150, 799, 150))  # own 50th of 333
    assert own[300]["actor"] == pytest.approx(0.15 * (1 + math.cos(math.pi * 100 / (0.8 * 333))))


def test_swaps_by_brute_force(mst):
    """Groups one after another, in Python: the k with the smallest weights change that weight for the best place."""
    cases = [(2, 4, 12), (1, 4, 10), (3, 5, 13), (2, 4, 5), (4, 4, 8), (1, 8, 6)] * 5
    for seed, (n, m, cols) in enumerate(cases):
        torch.manual_seed(seed)
        layer = mst.SparseLinear(nn.Linear(cols, 6), mst.random_mask((6, cols), None, (n, m)), (n, m))
        score, drop = torch.rand(6, cols), 0.3
        W, E = layer.sparse_weight().detach(), layer.E
        groups = []
        for r in range(6):
            for start in range(0, cols, m):
                places = range(start, min(start + m, cols))
                weakest = min((c for c in places if E[r, c]), key=lambda c: abs(W[r, c]))
                if not E[r, start : start + m].all():
                    groups.append((abs(W[r, weakest].item()), r, weakest, places))
        wanted = E.clone()
        for _, r, weakest, places in sorted(groups)[: int(drop * int(E.sum()))]:
            wanted[r, weakest] = False
            wanted[r, max((c for c in places if not wanted[r, c]), key=lambda c: score[r, c])] = True
        places = mst.new_positions(layer, score, drop)
        found = torch.zeros(6 * cols, dtype=torch.bool).index_fill(0, places, True).view(6, cols)
        assert torch.equal(found, wanted) and len(places) == len(layer.positions)
        assert groups_have_n(found, n, m) and torch.equal(places, places.sort().values)


@pytest.mark.parametrize("part, other, name", [("critic", "actor", "qf1"), ("actor", "critic", "actor")])
def test_a_change_takes_gradients_moments_and_targets_along(mst, part, other, name):
    """RigL at 2:4: what grows has the largest gradient and starts from zero, weight and moments; no step is taken."""
    options = {f"{part}_nm": "2:4", f"{part}_sparsity": None, f"{part}_regime": "rigl", f"{other}_regime": "set"}
    agent, args = agent_of(mst, learning_rate=1e-2, **options)
    net, target = getattr(agent, name), getattr(agent, agent.target_of[name])
    generator, data = torch.Generator().manual_seed(0), batch()
    for _ in range(5):
        mst.update_critics(agent, data, args, generator)
        mst.update_actor(agent, data, args)
        mst.update_targets(agent, 0.3)
    data = batch(seed=2)
    dense = plain_copy(mst, net)  # the same function with plain layers: its gradients are those of all weights
    layers = {name: dense.get_submodule(f"net.{name}") for name in mst.sparse_layers(net)}
    if part == "critic":
        y = targets(agent, data, copy_generator(generator))
        loss = F.mse_loss(dense(data.observations, data.actions), y)
    else:
        loss = -agent.qf1(data.observations, dense(data.observations)).mean()
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    wanted = {
        name: mst.new_positions(layer, grad.abs(), 0.2)
        for (name, layer), grad in zip(mst.sparse_layers(net).items(), gradients, strict=True)
    }
    before = {name: (layer.E, layer.sparse_weight().detach()) for name, layer in mst.sparse_layers(net).items()}
    others = [p.detach().clone() for name, p in net.named_parameters() if "active" not in name]
    if part == "critic":
        mst.update_critics(agent, data, args, generator, drop=0.2)
    else:
        mst.update_actor(agent, data, args, drop=0.2)
    assert all(map(torch.equal, others, [p for name, p in net.named_parameters() if "active" not in name]))
    optimizer, grown = agent.q_optimizer if part == "critic" else agent.actor_optimizer, 0
    for name, layer in mst.sparse_layers(net).items():
        E, W = before[name]
        new, goes_on = layer.E & ~E, layer.E & E
        assert torch.equal(layer.positions, wanted[name])
        grown += int(new.sum())
        assert torch.equal(layer.sparse_weight()[goes_on], W[goes_on]) and not layer.sparse_weight()[new].any()
        there = mst.sparse_layers(target)[name].sparse_weight()
        assert not there[new].any() and there[goes_on].all()
        state = optimizer.state[layer.active_weights]
        is_new = new.flatten()[layer.positions]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not state[moment][is_new].any() and state[moment][~is_new].any()
    assert grown > 20


@pytest.mark.parametrize("kernel", ["nm", "torch"])
def test_training_is_dense_masked_training(mst, kernel):
    """Ten updates beside plain layers with masked weights and torch's AdamW, written apart."""
    agent, args = agent_of(mst, kernel=kernel, weight_decay=0.1, learning_rate=3e-3)
    for optimizer in (agent.q_optimizer, agent.actor_optimizer):
        optimizer.param_groups[0].update(weight_decay=args.weight_decay, decoupled_weight_decay=True)
    twins, masks = {}, {}
    for part in agent.networks:
        for key, net in ((part.name, part.online), (f"{part.name}_target", part.target)):
            twins[key] = plain_copy(mst, net).requires_grad_("target" not in key)
            layers = mst.sparse_layers(net)
            masks[key] = {twins[key].get_submodule(f"net.{name}"): layer.E for name, layer in layers.items()}
    mst.use_kernel(args, agent, spaces(11, 3))
    q_params = [p for key in ("qf1", "qf2") for p in twins[key].parameters()]
    q_optimizer = torch.optim.AdamW(q_params, lr=3e-3, weight_decay=0.1)
    actor_optimizer = torch.optim.AdamW(twins["actor"].parameters(), lr=3e-3, weight_decay=0.1)
    generator, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)

    def mask():
        for own in masks.values():
            for linear, E in own.items():
                linear.weight.data *= E

    for update in range(1, 11):
        data = batch(seed=update)
        mst.update_critics(agent, data, args, generator)
        y = targets(SimpleNamespace(**twins | {"target_actor": twins["actor_target"]}), data, other)
        q_optimizer.zero_grad()
        sum(F.mse_loss(twins[key](data.observations, data.actions), y) for key in ("qf1", "qf2")).backward()
        q_optimizer.step()
        mask()
        if update % 2 == 0:
            mst.update_actor(agent, data, args)
            mst.update_targets(agent, args.tau)
            actor_optimizer.zero_grad()
            (-twins["qf1"](data.observations, twins["actor"](data.observations)).mean()).backward()
            actor_optimizer.step()
            mask()
            for key in ("actor", "qf1", "qf2"):
                for p, t in zip(twins[key].parameters(), twins[f"{key}_target"].parameters(), strict=True):
                    t.data.lerp_(p.data, args.tau)
    moved = 0
    for part in agent.networks:
        for key, net in ((part.name, part.online), (f"{part.name}_target", part.target)):
            plain = mst.plain_state(net)
            for name, x in twins[key].state_dict().items():
                assert torch.allclose(plain[name.removeprefix("net.")].float(), x.float(), atol=2e-5), (key, name)
                moved += 1
    assert moved > 60


# --- Diagnostics --------------------------------------------------------------------------------------------------


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


def test_resume_in_the_middle_of_everything(mst, small, monkeypatch):
    options = {"actor_regime": "rigl", "critic_nm": "2:4", "diagnostics_interval": 100, "total_timesteps": 450}
    whole = mst.train(small(mst, **options))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, mst, 233)
        part = mst.train(small(mst, **options))["run_dir"]
    assert 233 <= checkpoint_step(part) < 300 and read_meta(part)["exit_reason"] != "finished"
    mst.train(mst.Args(**(vars(mst.read_run(part)[1]) | {"resume": part})))
    assert_same_run(whole, part)
