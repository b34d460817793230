"""The method against brute force and hand computation."""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import NETS, ROOT, SMALL

PATTERNS = [(1, 4), (2, 4), (1, 8), (4, 8), (2, 8), (1, 16), (4, 4)]
WIDTHS = [11, 16, 17, 23, 105, 113]


def brute_force_mask(W, n, m):
    E = np.zeros(W.shape, bool)
    for row in range(W.shape[0]):
        for start in range(0, W.shape[1], m):
            group = range(start, min(start + m, W.shape[1]))
            for column in sorted(group, key=lambda c: (-abs(W[row, c]), c))[:n]:
                E[row, column] = True
    return E


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_projection_is_brute_force(rnm, n, m, width):
    W = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    W[0] = 0.5  # ties: the lower column stays
    W[1, ::2] = -W[1, ::2].abs().max()
    W[2, :4] = 0.0  # zeros win against the filling of a ragged group
    E = rnm.project(W, n, m)
    assert E.dtype == torch.bool and E.shape == W.shape
    assert np.array_equal(E.numpy(), brute_force_mask(W.numpy(), n, m))
    kept = n * (width // m) + min(n, width % m)
    assert E.sum(1).tolist() == [kept] * 9
    linear = nn.Linear(width, 9)
    linear.weight.data.copy_(W)
    layer = rnm.SparseLinear(linear, n, m)
    assert torch.equal(layer.E, E) and layer.active_weights.shape == (9 * kept,)
    assert torch.equal(layer.active_weights, W[E]) and torch.equal(layer.sparse_weight(), W * E)  # row after row


def test_layer_is_a_linear_layer_with_zeros(rnm):
    torch.manual_seed(0)
    dense = nn.Linear(23, 12).double()
    layer = rnm.SparseLinear(copy.deepcopy(dense), 1, 4)
    E = torch.from_numpy(brute_force_mask(dense.weight.detach().numpy(), 1, 4))
    W = (dense.weight.detach() * E).requires_grad_()
    x = torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ W.T + dense.bias
    assert torch.allclose(y, expected, rtol=0, atol=1e-14)
    assert {name for name, _ in layer.named_parameters()} == {"active_weights", "bias"}
    gy = torch.randn_like(y)
    gx, g_active, g_bias = torch.autograd.grad(y, [x, layer.active_weights, layer.bias], gy)
    ex, ew, eb = torch.autograd.grad(expected, [x, W, dense.bias], gy)
    for got, wanted in ((gx, ex), (g_active, ew[E]), (g_bias, eb)):
        assert got.shape == wanted.shape and torch.allclose(got, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x, v, b: torch.func.functional_call(layer, {"active_weights": v, "bias": b}, (x,)),
        (x, layer.active_weights.detach().requires_grad_(), layer.bias.detach().requires_grad_()),
    )


def test_masks_whose_rows_differ_in_length(rnm):
    """A mask with the same total works whatever its rows keep; another total or shape is an error with its cause."""
    layer = rnm.SparseLinear(nn.Linear(12, 5), 1, 4)  # keeps 3 in each of 5 rows
    W = torch.randn(5, 12)
    E = torch.zeros(5, 12, dtype=torch.bool)
    E[0], E[3, 2], E[4, [0, 11]] = True, True, True  # 12, 0, 0, 1 and 2
    layer.set_mask(E)
    with torch.no_grad():
        layer.active_weights.copy_(W[E])
    assert torch.equal(layer.E, E) and torch.equal(layer.sparse_weight(), W * E)
    x = torch.randn(7, 12)
    assert torch.allclose(layer(x), x @ (W * E).T + layer.bias, atol=1e-6)
    more, wide = E.clone(), torch.zeros(5, 13, dtype=torch.bool)
    more[1, 1] = True
    wide[:, :3] = True  # as many in all
    with pytest.raises(ValueError, match=r"must keep 15, not 16"):
        layer.set_mask(more)
    with pytest.raises(ValueError, match=r"mask.*5, 12"):
        layer.set_mask(wide)
    assert torch.equal(layer.E, E)  # what was refused changed nothing


def test_sad_by_hand(rnm):
    def masks(*rows):
        actor = torch.tensor([[1, 0, 0, 1], rows[0]], dtype=torch.bool)
        other = torch.tensor([rows[1]], dtype=torch.bool)
        return {"actor.fc1": actor, "actor.fc2": other, "qf1.fc1": other, "qf2.fc1": ~other}

    first, previous, current = masks([1, 0, 0, 1], [1, 1]), masks([0, 1, 0, 1], [1, 1]), masks([0, 1, 1, 0], [1, 0])
    row = rnm.sad_metrics(first, previous, current)
    assert row["sad_count/actor"] == 2 + 1
    assert row["sad/actor/fc1"] == 2 / (2 * 4)
    assert row["sad/actor/fc2"] == 1 / (2 * 1)
    assert row["sad/actor"] == 3 / (2 * 5)  # summed, then divided
    assert row["sad_initial/actor/fc1"] == 4 / 8
    assert row["sad_initial/actor"] == 5 / 10
    assert row["sad_count/qf1"] == 1 and row["sad/qf2"] == 1 / 2


@pytest.mark.parametrize("sparse_head", [False, True])
def test_which_layers_are_sparse(rnm, sparse_head):
    agent = make_agent(rnm, sparse_head=sparse_head)[2]
    for name in NETS:
        head = "fc_mu" if "actor" in name else "fc3"
        layers = dict(getattr(agent, name).net.named_children())
        sparse = [key for key, layer in layers.items() if isinstance(layer, rnm.SparseLinear)]
        assert sparse == ["fc1", "fc2", head][: 2 + sparse_head]
        assert type(layers[head]) is (rnm.SparseLinear if sparse_head else nn.Linear)


def make_agent(script, **changes):
    """(args, env, agent, replay with 500 random transitions, generators)"""
    args = script.Args(env_id="Reach-v0", hidden_dim=16, batch_size=16, track=False, **changes)
    env = script.make_env(args.env_id)
    torch.manual_seed(0)
    networks = script.make_networks(args, env)
    if hasattr(script, "sparsify"):
        networks = script.sparsify(networks, args)
    agent = script.Agent(networks, lr=args.learning_rate)
    rb = script.ReplayBuffer(1000, script.transition_columns(env), "cpu")
    rng = script.make_generators(0, "cpu")
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(500):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rb.add(observations=obs, actions=action, next_observations=next_obs, rewards=reward, dones=terminated)
        obs = env.reset()[0] if terminated or truncated else next_obs
    return args, env, agent, rb, rng


def sparse_layers(rnm, agent):
    """(name of the network, layer) of all N:M layers of the six networks."""
    modules = [(name, layer) for name in NETS for layer in getattr(agent, name).modules()]
    return [(name, layer) for name, layer in modules if isinstance(layer, rnm.SparseLinear)]


def scattered(layer, packed):
    return torch.zeros_like(layer.W).masked_scatter(layer.E, packed.detach())


def shrink_first_of_each_row(layer):
    """Push one active weight of each row out of its group; returns where they are."""
    victims = torch.zeros_like(layer.E)
    victims[torch.arange(len(victims)), layer.E.int().argmax(1)] = True
    with torch.no_grad():
        layer.active_weights[victims[layer.E]] = 0.0
    return victims


def test_inactive_weights_rest_for_1000_adam_steps(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    layers = [layer for _, layer in sparse_layers(rnm, agent)]
    before = [(layer, layer.W.clone(), layer.E, layer.active_weights.detach().clone()) for layer in layers]
    assert len(before) == 12  # two N:M layers in each of six networks
    for update in range(1, 1001):
        rnm.update_agent(agent, rb, args, rng, update)
    for layer, W, E, values in before:
        assert torch.equal(layer.W[~E], W[~E]) and torch.equal(layer.E, E)
        assert not torch.equal(layer.active_weights, values)  # while the active ones moved
        assert (layer.sparse_weight()[~E] == 0).all()
    rnm.refresh_masks(agent)
    changed = 0
    for layer, W, E, _ in before:
        resting, returned = ~E & ~layer.E, ~E & layer.E
        changed += int(returned.sum())
        assert torch.equal(layer.W[resting], W[resting])
        assert torch.equal(layer.sparse_weight()[returned], W[returned])  # comes back with the value it had
    assert changed > 0


def test_refreshes_by_hand(rnm):
    """The new mask is P_{N:M} of all a layer has learned, active or not; a target has a W of its own and that mask."""
    args, _, agent, rb, rng = make_agent(rnm, n=2, m=4, learning_rate=0.01, tau=0.05)
    layers = {name: [layer for net, layer in sparse_layers(rnm, agent) if net == name] for name in NETS}
    learned = {name: [layer.W.clone() for layer in layers[name]] for name in NETS}  # kept here, not read from W again
    returned = dict.fromkeys(NETS, 0)
    ever = {name: [layer.E for layer in layers[name]] for name in NETS}
    for update in range(1, 241):
        rnm.update_agent(agent, rb, args, rng, update)
        if update % 40:
            continue
        masks = {name: [layer.E for layer in layers[name]] for name in NETS}
        for name in NETS:
            for W, layer, E in zip(learned[name], layers[name], masks[name], strict=True):
                W[E] = layer.sparse_weight().detach()[E]
        rnm.refresh_masks(agent)
        for online, target in zip(NETS[:3], NETS[3:], strict=True):
            for i, W in enumerate(learned[online]):
                E = torch.from_numpy(brute_force_mask(W.numpy(), 2, 4))
                for name in (online, target):
                    assert torch.equal(layers[name][i].E, E)
                    assert torch.equal(layers[name][i].sparse_weight(), learned[name][i] * E)
                    returned[name] += int((E & ~masks[name][i] & ever[name][i]).sum())
                    ever[name][i] = ever[name][i] | E
                assert not torch.equal(layers[target][i].active_weights, layers[online][i].active_weights)
    assert all(returned[name] > 5 for name in NETS if "qf" in name)  # weights that had been active before came back


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_travel_with_their_weights(rnm, optimizer):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    if optimizer is not torch.optim.Adam:  # as a fork would
        agent.q_optimizer = optimizer([*agent.qf1.parameters(), *agent.qf2.parameters()], lr=3e-4, weight_decay=0.01)
    rnm.refresh_masks(agent)  # before Adam's first step: no state, no failure
    assert not agent.q_optimizer.state
    for update in range(1, 201):
        rnm.update_agent(agent, rb, args, rng, update)
    layer = agent.qf1.net.fc1
    state = agent.q_optimizer.state[layer.active_weights]
    old_E, step = layer.E, state["step"].item()
    old = {key: scattered(layer, state[key]) for key in ("exp_avg", "exp_avg_sq")}
    victims = shrink_first_of_each_row(layer)
    rnm.refresh_masks(agent)
    left, new = victims & ~layer.E, layer.E & ~old_E
    assert left.any() and int(new.sum()) == int((old_E & ~layer.E).sum())
    for key, moments in old.items():
        now = scattered(layer, state[key])
        assert torch.equal(now, moments * layer.E)  # the ones that stay keep theirs; newcomers never had any: zero
        assert (now[new] == 0).all() and (moments[left] != 0).any()
    assert state["step"].item() == step  # stays the tensor's
    with torch.no_grad():  # and back again: the stored moments return
        layer.W[left] = 9.0
    rnm.refresh_masks(agent)
    assert layer.E[left].all() and (layer.sparse_weight()[left] == 9).all()
    for key, moments in old.items():
        assert torch.equal(scattered(layer, state[key])[left], moments[left])


def test_an_optimizer_with_unknown_moments_is_refused_by_name(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    agent.q_optimizer = torch.optim.SGD([*agent.qf1.parameters(), *agent.qf2.parameters()], lr=1e-2, momentum=0.9)
    for update in range(1, 51):
        rnm.update_agent(agent, rb, args, rng, update)
    with pytest.raises(AttributeError, match="momentum_buffer"):
        rnm.refresh_masks(agent)
    for _, layer in sparse_layers(rnm, agent):  # what the error asks for
        layer.register_buffer("momentum_buffer", torch.zeros_like(layer.W))
    layer = agent.qf1.net.fc2
    state, old_E = agent.q_optimizer.state[layer.active_weights], layer.E
    momentum = scattered(layer, state["momentum_buffer"])
    shrink_first_of_each_row(layer)
    rnm.refresh_masks(agent)
    assert not torch.equal(old_E, layer.E)
    assert torch.equal(scattered(layer, state["momentum_buffer"]), momentum * layer.E)


def test_an_optimizer_with_moments_in_a_dict_is_refused(rnm):
    agent = make_agent(rnm, n=1, m=4)[2]
    weights = agent.qf1.net.fc2.active_weights
    agent.q_optimizer.state[weights] = {"step": 1, "momenta": [torch.zeros_like(weights)]}
    with pytest.raises(AttributeError, match="momenta"):
        rnm.refresh_masks(agent)


def numpy_forward(net, *inputs):
    """[fc1, relu, fc2, relu, head] in float64."""
    x = np.concatenate([np.asarray(i, np.float64) for i in inputs], axis=1)
    layers = [layer for layer in net.net if not isinstance(layer, nn.ReLU)]
    assert len(layers) == 3
    for i, layer in enumerate(layers):
        W = layer.weight if isinstance(layer, nn.Linear) else layer.sparse_weight()
        x = x @ W.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = np.maximum(x, 0) if i < 2 else x
    return x


def test_target_and_losses_by_hand(twin):
    """Per-dimension noise scale and bounds, clipping, min of the targets, termination against truncation."""
    args, _, agent, rb, rng = make_agent(twin, policy_noise=2.0, noise_clip=0.5)
    with torch.no_grad():  # targets that differ from the online networks
        for net in (agent.target_actor, agent.qf1_target, agent.qf2_target):
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    data = rb.sample(64, rng["replay"])
    data = data._replace(dones=(torch.arange(64) % 2).float().unsqueeze(1))
    noise = torch.empty(64, 2).normal_(0.0, 2.0, generator=copy_generator(rng["smoothing"])).double().numpy()

    low, high = np.array([-1.0, 0.5]), np.array([0.5, 3.0])
    scale, bias = (high - low) / 2, (high + low) / 2
    assert np.allclose(agent.actor.action_scale, scale) and np.allclose(agent.actor.action_bias, bias)
    assert (np.abs(noise) > 0.5).any()
    action = np.tanh(numpy_forward(agent.target_actor, data.next_observations)) * scale + bias
    action = np.clip(action + np.clip(noise, -0.5, 0.5) * scale, low, high)
    assert ((action == low) | (action == high)).any()
    q1, q2 = (numpy_forward(net, data.next_observations, action) for net in (agent.qf1_target, agent.qf2_target))
    with torch.no_grad():  # so that each is the smaller one somewhere
        agent.qf2_target.net.fc3.bias.add_(float(np.median(q1 - q2)))
    q2 = numpy_forward(agent.qf2_target, data.next_observations, action)
    assert (q1 < q2).any() and (q2 < q1).any()
    y = data.rewards.double().numpy() + 0.99 * (1 - data.dones.double().numpy()) * np.minimum(q1, q2)
    values = {name: numpy_forward(getattr(agent, name), data.observations, data.actions) for name in ("qf1", "qf2")}
    losses = twin.update_critics(agent, data, args, rng["smoothing"])
    losses = {key: value.mean().item() for key, value in losses.items()}
    for name, value in values.items():
        assert losses[f"losses/{name}_values"] == pytest.approx(value.mean(), rel=1e-5)
        assert losses[f"losses/{name}_loss"] == pytest.approx(((value - y) ** 2).mean(), rel=1e-5)
        assert numpy_forward(getattr(agent, name), data.observations, data.actions) != pytest.approx(value)  # a step
    assert losses["losses/qf_loss"] == pytest.approx((losses["losses/qf1_loss"] + losses["losses/qf2_loss"]) / 2)

    action = np.tanh(numpy_forward(agent.actor, data.observations)) * scale + bias
    value = numpy_forward(agent.qf1, data.observations, action)
    critic = [(p.detach().clone(), p.grad.clone()) for p in agent.qf1.parameters()]
    loss = twin.update_actor(agent, data)["losses/actor_loss"].item()
    assert loss == pytest.approx(-value.mean(), rel=1e-5)
    for p, (old, grad) in zip(agent.qf1.parameters(), critic, strict=True):  # the critic is untouched and still learns
        assert torch.equal(p, old) and torch.equal(p.grad, grad) and p.requires_grad
    action = np.tanh(numpy_forward(agent.actor, data.observations)) * scale + bias
    assert numpy_forward(agent.qf1, data.observations, action).mean() > value.mean()  # up the critic's gradient


def copy_generator(generator):
    return torch.Generator().manual_seed(0).set_state(generator.get_state())


def test_polyak_and_delay(twin):
    args, _, agent, rb, rng = make_agent(twin, policy_frequency=3, tau=0.25)
    for update in range(1, 7):
        before = {name: [p.detach().clone() for p in getattr(agent, name).parameters()] for name in NETS}
        losses = twin.update_agent(agent, rb, args, rng, update)
        delayed = update % 3 == 0
        assert ("losses/actor_loss" in losses) == delayed
        for online, target in zip(NETS[:3], NETS[3:], strict=True):
            still = all(map(torch.equal, getattr(agent, online).parameters(), before[online]))
            assert still == (online == "actor" and not delayed)
            parameters = getattr(agent, target).parameters(), before[target], getattr(agent, online).parameters()
            for p, old, new in zip(*parameters, strict=True):
                assert torch.allclose(p, 0.75 * old + 0.25 * new if delayed else old, rtol=0, atol=1e-7)


def test_twenty_updates_are_those_of_the_first_version(twin):
    """The dense twin, and N = M, from the weights, transitions and streams of commit b4ac3f7's stored results."""
    data = np.load(ROOT / "tests" / "data" / "dense_20_updates.npz")
    args = twin.Args(**SMALL, **({"n": 4, "m": 4} if hasattr(twin, "sparsify") else {}))
    env = twin.make_env(args.env_id)
    networks = twin.make_networks(args, env)
    for name, net in networks.items():
        parameters = dict(net.net.named_parameters())
        assert {f"before.{name}.{key}" for key in parameters} <= set(data.files) and len(parameters) == 6
        for key, param in parameters.items():
            param.data.copy_(torch.from_numpy(data[f"before.{name}.{key}"]))
    if hasattr(twin, "sparsify"):
        networks = twin.sparsify(networks, args)
    agent = twin.Agent(networks, lr=args.learning_rate)
    rb, random = twin.ReplayBuffer(400, twin.transition_columns(env), "cpu"), np.random.default_rng(0)
    for _ in range(400):
        obs, next_obs = random.normal(size=(2, 3))
        row = {"observations": obs, "next_observations": next_obs, "actions": random.uniform([-1, 0.5], [0.5, 3])}
        rb.add(**row, rewards=random.normal(), dones=random.random() < 0.1)
    rng = twin.make_generators(3, "cpu")
    for update in range(1, 21):
        twin.update_agent(agent, rb, args, rng, update)
    for name in NETS:
        state = twin.plain_state(getattr(agent, name))
        parameters = [key for key in state if not key.startswith("action_")]
        assert len(parameters) == 6
        for key in parameters:
            after, online = data[f"after.{name}.{key}"], name.replace("target_actor", "actor").removesuffix("_target")
            assert np.abs(after - data[f"before.{online}.{key}"]).max() > 5e-5  # it learned
            assert np.abs(state[key].numpy() - after).max() <= 1e-6, (name, key)


def test_layers_that_critics_share_are_trained_once(dense):
    """Adam has each parameter once, and it counts once."""
    args, env = dense.Args(hidden_dim=16), dense.make_env("Pendulum-v1")
    networks = dense.make_networks(args, env)
    sizes = [sum(x.numel() for x in net.parameters()) for net in networks.values()]
    networks["qf2"].net.fc1, networks["qf2"].net.fc2 = networks["qf1"].net.fc1, networks["qf1"].net.fc2
    agent = dense.Agent(networks, lr=args.learning_rate)
    trained = dense.held(agent.q_optimizer)
    assert len({id(x) for x in trained}) == len(trained) == 8  # two layers and two heads
    sum(net.net(torch.ones(1, 4)).sum() for net in (agent.qf1, agent.qf2)).backward()
    agent.q_optimizer.step()
    assert {int(state["step"]) for state in agent.q_optimizer.state.values()} == {1}
    shared = sum(x.numel() for x in networks["qf1"].parameters()) - 17
    assert dense.model_stats(agent)["params_active"] == sum(sizes) - shared


def test_arguments_hold_for_a_whole_run(script):
    """What an argument was folded into would not follow it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        script.Args().exploration_noise = 0.2


def test_density_counts_what_is_in_no_linear_layer(rnm):
    """An ensemble as one tensor and a convolution, both dense, beside 16 of 64 weights."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.many, self.scale = nn.Parameter(torch.ones(5, 4, 3)), nn.Parameter(torch.ones(9))
            self.net = nn.Sequential(nn.Conv1d(2, 3, 4), nn.Linear(8, 8), nn.Linear(8, 1))

    args, env = rnm.Args(n=1, m=4, hidden_dim=16), rnm.make_env("Pendulum-v1")
    agent = rnm.Agent(rnm.sparsify(rnm.make_networks(args, env) | {"odd": Odd()}, args), lr=args.learning_rate)
    stats = rnm.model_stats(agent)
    assert stats["density"]["odd"] == pytest.approx((60 + 24 + 16 + 8) / (60 + 24 + 64 + 8))
    actor = agent.actor.net
    wanted = [layer.E.float().mean().item() * layer.E.numel() for layer in (actor.fc1, actor.fc2)]
    assert stats["density"]["actor"] == pytest.approx((sum(wanted) + 16) / (3 * 16 + 256 + 16))


def test_replay_ring(twin):
    env = gym.make("Reach-v0")
    rb, other = (twin.ReplayBuffer(50, twin.transition_columns(env), "cpu") for _ in range(2))

    def add(buffer, count):
        for _ in range(count):
            i = buffer.added
            row = {"observations": [i, i, i], "next_observations": [i + 1] * 3, "actions": [i, -i]}
            buffer.add(**row, rewards=i * 10, dones=i % 2)

    def seen(buffer):
        return set(buffer.sample(2000, torch.Generator().manual_seed(0)).observations[:, 0].tolist())

    add(rb, 30)
    assert seen(rb) == set(range(30))  # never what is still empty
    other.load_state_dict(copy.deepcopy(rb.state_dict()))
    assert seen(other) == set(range(30)) and len(rb.state_dict()["rows"]) == 30  # nor is it saved
    add(rb, 45)
    other.load_state_dict(copy.deepcopy(rb.state_dict()))
    add(rb, 3)
    add(other, 3)  # goes on at the same place of the ring
    for buffer in (rb, other):
        batch = buffer.sample(4000, torch.Generator().manual_seed(0))
        i = batch.observations[:, 0]
        assert set(i.tolist()) == set(range(28, 78))
        assert torch.equal(batch.next_observations, (i + 1)[:, None].expand(-1, 3))
        assert torch.equal(batch.actions, torch.stack([i, -i], 1)) and torch.equal(batch.rewards, i[:, None] * 10)
        assert torch.equal(batch.dones, i[:, None] % 2)
        counts = torch.bincount(i.long(), minlength=78)[28:]
        assert counts.min() > 40 and counts.max() < 130  # 80 +- 9 each


def test_random_streams_are_separate(script):
    a, b, c = (script.make_generators(seed, "cpu") for seed in (3, 3, 4))
    draws = {name: torch.rand(4, generator=g).tolist() for name, g in a.items()}
    assert list(draws)[-1] == "globals" and len({tuple(d) for d in draws.values()}) == len(draws) == 8
    torch.rand(100, generator=b["evaluation"])
    assert torch.rand(4, generator=b["replay"]).tolist() == draws["replay"]
    assert torch.rand(4, generator=c["replay"]).tolist() != draws["replay"]
    few, many = (script.draw_seeds(script.make_generators(3, "cpu")["evaluation"], count) for count in (3, 10))
    assert few == many[:3] and len(set(many)) == 10


def test_final_score(script):
    evaluations = [[i, float(i)] for i in range(1, 31)]
    assert script.final_score(evaluations) == np.mean(range(21, 31))
    assert script.final_score(evaluations[:7]) == np.mean([4, 5, 6, 7])
    assert script.final_score(evaluations[:1]) == 1.0
