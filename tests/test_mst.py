"""MST: SimBa's networks, each regime's masks, swaps within N:M groups, diagnostics by hand, resume."""

import copy
import math
from dataclasses import replace
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
    ends, save = [], mst.save_model
    monkeypatch.setattr(mst, "save_model", lambda path, agent, rb: (ends.append((agent, rb)), save(path, agent, rb)))
    mst.train(small(mst, total_timesteps=300, eval_interval=100))
    agent, rb = ends[-1]
    norms = {id(net.obs_norm) for part in agent.networks for net in (part.online, part.target)}
    assert len(seen) == 300 and len(norms) == 1  # evaluations add nothing
    taken = rb.sample(10**4, torch.Generator().manual_seed(0)).observations
    assert np.array_equal(np.unique(np.float32(seen), axis=0), np.unique(taken, axis=0))  # not the last one's successor
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


@pytest.mark.parametrize(
    ("dense", "sparse"), [("actor", {"qf1", "qf2"}), ("critic", {"actor"}), ("actor critic", set())]
)
def test_dense_modules_train_beside_sparse_ones_and_alone(mst, small, dense, sparse):
    options = {f"{name}_regime": "dense" for name in dense.split()}
    first, last = (mst.train(small(mst, total_timesteps=steps, **options))["run_dir"] for steps in (1, 150))
    parts = read_meta(last)["modules"].items()
    assert sparse == {net for net, own in parts if any(part.get("type") == "SparseLinear" for part in own)}
    before, after = (torch.load(f"{run}/model.pt", weights_only=True) for run in (first, last))
    weights = [(net, name) for net in ("actor", "qf1", "qf2") for name in before[net] if name.endswith("weight")]
    assert len(weights) == 6 + 2 * 6  # of one block each: embedding, norm, fc1, fc2, norm, head
    assert not [place for place in weights if torch.equal(before[place[0]][place[1]], after[place[0]][place[1]])]


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
    """Counts, groups and targets at every update of a run; the actor's own clock."""
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
                assert E.sum() == before[net.name][layer_name].sum() and torch.equal(E, target[layer_name])
                nm = mst.regimes(args)["actor" if net.name == "actor" else "critic"][2]
                assert nm is None or groups_have_n(E, *nm)
                if not torch.equal(E, before[net.name][layer_name]):
                    changes[net.name].add(update)
        return losses

    monkeypatch.setattr(mst, "update_agent", watched)
    result = mst.train(small(mst, total_timesteps=300, mask_update_interval=10, **options))
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
    args = replace(args, policy_frequency=3)
    own = {u: drops_at(mst, args, u) for u in range(1, 1001)}
    assert [u for u, drops in own.items() if "actor" in drops] == list(range(150, 799, 150))  # own 50th of 333
    assert own[300]["actor"] == pytest.approx(0.15 * (1 + math.cos(math.pi * 100 / (0.8 * 333))))


def test_swaps_by_brute_force(mst):
    """Groups one after another, in Python: the k with the smallest weights change that weight for the best place."""
    cases = [(2, 4, 12), (1, 4, 10), (3, 5, 13), (2, 4, 5), (4, 4, 8), (1, 8, 6)] * 5
    for seed, (n, m, cols) in enumerate(cases):
        torch.manual_seed(seed)
        layer = mst.SparseLinear(nn.Linear(cols, 6), mst.random_mask((6, cols), None, (n, m)), (n, m))
        score, drop = torch.rand(6, cols) * (torch.arange(6) % (1 + seed % 2) == 0)[:, None], 0.3  # dead units: all 0
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
            wanted[r, max((c for c in places if not wanted[r, c]), key=lambda c: (score[r, c], c == weakest))] = True
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
    """Twelve updates, two of them changes of the critics' masks, beside plain layers with masked weights and torch's
    AdamW, written apart: weights that are dropped, and all that weight decay and moments could bring back, are zero."""
    agent, args = agent_of(mst, kernel=kernel, weight_decay=0.1, learning_rate=3e-3)
    for optimizer in (agent.q_optimizer, agent.actor_optimizer):
        optimizer.param_groups[0].update(weight_decay=args.weight_decay, decoupled_weight_decay=True)
    twins, masks = {}, {}
    for part in agent.networks:
        for key, net in ((part.name, part.online), (f"{part.name}_target", part.target)):
            twins[key] = plain_copy(mst, net).requires_grad_("target" not in key)
            layers = mst.sparse_layers(net)
            masks[key] = {twins[key].get_submodule(f"net.{name}"): (layer.E, layer) for name, layer in layers.items()}
    mst.use_kernel(args, agent, spaces(11, 3))
    q_params = [p for key in ("qf1", "qf2") for p in twins[key].parameters()]
    q_optimizer = torch.optim.AdamW(q_params, lr=3e-3, weight_decay=0.1)
    actor_optimizer = torch.optim.AdamW(twins["actor"].parameters(), lr=3e-3, weight_decay=0.1)
    generator, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)

    def mask():
        for own in masks.values():
            for linear, (E, layer) in own.items():
                own[linear] = layer.E, layer
                linear.weight.data *= E & layer.E  # what grows starts from zero
                for moment in ("exp_avg", "exp_avg_sq") if not torch.equal(E, layer.E) else ():
                    q_optimizer.state.get(linear.weight, {moment: 0})[moment] *= E & layer.E

    for update in range(1, 13):
        data, drop = batch(seed=update), 0.3 if update in (4, 8) else None
        mst.update_critics(agent, data, args, generator, drop)
        y = targets(SimpleNamespace(**twins | {"target_actor": twins["actor_target"]}), data, other)
        if drop is None:
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


def test_resume_in_the_middle_of_everything(mst, small, monkeypatch):
    options = {"actor_regime": "rigl", "critic_nm": "2:4", "diagnostics_interval": 100, "total_timesteps": 450}
    whole = mst.train(small(mst, **options))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, mst, 233)
        part = mst.train(small(mst, **options))["run_dir"]
    assert 233 <= checkpoint_step(part) < 300 and read_meta(part)["exit_reason"] != "finished"
    mst.train(mst.Args(**(vars(mst.read_run(part)[1]) | {"resume": part})))
    assert_same_run(whole, part)
