"""The method against brute force and hand computation."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

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
    E = rnm.project(W, n, m)
    assert E.dtype == torch.bool and E.shape == W.shape
    assert np.array_equal(E.numpy(), brute_force_mask(W.numpy(), n, m))
    kept = n * (width // m) + min(n, width % m)
    assert E.sum(1).tolist() == [kept] * 9
    layer = rnm.NMLinear(nn.Linear(width, 9), n, m)
    assert layer.index.shape == layer.values.shape == (9, kept) and (layer.index.diff(dim=1) > 0).all()
    assert torch.equal(layer.E, torch.zeros_like(layer.E).scatter(1, layer.index, True))


def test_layer_is_a_linear_layer_with_zeros(rnm):
    torch.manual_seed(0)
    dense = nn.Linear(23, 12).double()
    layer = rnm.NMLinear(copy.deepcopy(dense), 1, 4)
    E = torch.from_numpy(brute_force_mask(dense.weight.detach().numpy(), 1, 4))
    W = (dense.weight.detach() * E).requires_grad_()
    x = torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ W.T + dense.bias
    assert torch.allclose(y, expected, rtol=0, atol=1e-14)
    gy = torch.randn_like(y)
    gx, gflat = torch.autograd.grad(y, [x, layer.flat], gy)
    ex, ew = torch.autograd.grad(expected, [x, W], gy)
    expected = torch.cat([ew.gather(1, layer.index).flatten(), gy.sum(0)])
    assert torch.allclose(gx, ex, atol=1e-14) and torch.allclose(gflat, expected, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x, v: torch.func.functional_call(layer, {"flat": v}, (x,)), (x, layer.flat.detach().requires_grad_())
    )


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


def make_agent(rnm, **changes):
    args = rnm.Args(env_id="Reach-v0", hidden_dim=16, batch_size=16, track=False, **changes)
    env = rnm.make_env(args.env_id)
    agent = rnm.make_agent(*rnm.make_networks(args, env, 0), args.learning_rate)
    rb = rnm.ReplayBuffer(1000, env, "cpu")
    rng = rnm.make_generators(0, "cpu")
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(500):
        action = env.action_space.sample()
        next_obs, reward, terminated, *_ = env.step(action)
        rb.add(obs, next_obs, action, reward, terminated)
        obs = next_obs
    return args, env, agent, rb, rng


def stores(rnm, agent):
    nets = [net for net in vars(agent).values() if isinstance(net, nn.Module)]
    return [(layer, layer.W.clone(), layer.E.clone()) for net in nets for layer in rnm.nm_layers(net).values()]


def test_inactive_weights_rest_for_1000_adam_steps(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    before = stores(rnm, agent)
    assert len(before) == 12  # two N:M layers in each of six networks
    start = [layer.values.detach().clone() for layer, _, _ in before]
    for update in range(1, 1001):
        rnm.update_agent(agent, rb, args, rng, update)
    for (layer, W, E), values in zip(before, start, strict=True):
        assert torch.equal(layer.W[~E], W[~E]) and torch.equal(layer.E, E)
        assert not torch.equal(layer.values, values)  # while the active ones moved
        assert (layer.weight[~E] == 0).all()
    rnm.refresh_masks(agent)
    changed = 0
    for layer, W, E in before:
        resting, returned = ~E & ~layer.E, ~E & layer.E
        changed += int(returned.sum())
        assert torch.equal(layer.W[resting], W[resting])
        assert torch.equal(layer.weight[returned], W[returned])  # comes back with the value it had
    assert changed > 0


def test_moments_travel_with_their_weights(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    rnm.refresh_masks(agent)  # before Adam's first step: no state, no failure
    assert not agent.q_optimizer.state
    for update in range(1, 201):
        rnm.update_agent(agent, rb, args, rng, update)
    layer, state = agent.qf1.fc1, agent.q_optimizer.state[agent.qf1.fc1.flat]
    old_index, old = layer.index.clone(), {k: layer.packed(state[k]).clone() for k in ("exp_avg", "exp_avg_sq")}
    with torch.no_grad():  # push one active weight of each row out of its group
        layer.values[:, 0] = 0.0
    rnm.refresh_masks(agent)
    left = layer.index[:, 0] != old_index[:, 0]
    assert left.any()
    for key, moments in old.items():
        dense = torch.zeros_like(layer.W).scatter(1, old_index, moments)
        assert torch.equal(layer.packed(state[key]), dense.gather(1, layer.index))  # newcomers were never active: zero
        assert (layer.packed(state[key])[left, 0] == 0).all()
    with torch.no_grad():  # and back again: the stored moments return
        layer.values[left, 0] = 0.0
        layer.W.scatter_(1, old_index[:, :1], torch.full_like(layer.W[:, :1], 9.0))
    rnm.refresh_masks(agent)
    assert torch.equal(layer.index[left, 0], old_index[left, 0])
    assert torch.equal(layer.packed(state["exp_avg"])[left, 0], old["exp_avg"][left, 0])


def test_a_refresh_moves_the_state_of_any_optimizer(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    parameters = [*agent.qf1.parameters(), *agent.qf2.parameters()]
    agent.q_optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    for update in range(1, 51):
        rnm.update_agent(agent, rb, args, rng, update)
    layer, state = agent.qf1.fc2, agent.q_optimizer.state[agent.qf1.fc2.flat]
    dense = torch.zeros_like(layer.W).scatter(1, layer.index, layer.packed(state["momentum_buffer"]))
    with torch.no_grad():
        layer.values[:, 0] = 0.0
    old = layer.index.clone()
    rnm.refresh_masks(agent)
    assert not torch.equal(old, layer.index)
    assert torch.equal(layer.packed(state["momentum_buffer"]), dense.gather(1, layer.index))


def test_targets_have_own_weights_and_the_online_mask(rnm):
    args, _, agent, rb, rng = make_agent(rnm, n=1, m=4)
    for update in range(1, 101):
        rnm.update_agent(agent, rb, args, rng, update)
    target, online = agent.qf1_target.fc2, agent.qf1.fc2
    before = torch.zeros_like(target.W).scatter(1, target.index, target.values) + target.W * ~target.E
    rnm.refresh_masks(agent)
    assert torch.equal(target.E, online.E) and torch.equal(target.index, online.index)
    assert torch.equal(target.values, before.gather(1, online.index))
    assert not torch.equal(target.values, online.values)


def numpy_forward(state, *inputs, head):
    x = np.concatenate([np.asarray(i, np.float64) for i in inputs], axis=1)
    for name in ("fc1", "fc2", head):
        x = x @ state[f"{name}.weight"].double().numpy().T + state[f"{name}.bias"].double().numpy()
        x = x if name == head else np.maximum(x, 0)
    return x


def test_target_and_losses_by_hand(script):
    """Per-dimension noise scale and bounds, clipping, min of the targets, termination against truncation."""
    args, _, agent, rb, rng = make_agent(script, policy_noise=2.0, noise_clip=0.5)
    with torch.no_grad():  # targets that differ from the online networks
        for net in (agent.target_actor, agent.qf1_target, agent.qf2_target):
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    data = rb.sample(64, rng["replay"])
    data = data._replace(dones=(torch.arange(64) % 2).float().unsqueeze(1))
    state = {k: {n: t.clone() for n, t in s.items()} for k, s in script.dense_state(agent).items()}
    noise = torch.empty(64, 2).normal_(0.0, 2.0, generator=copy_generator(rng["smoothing"])).double().numpy()

    low, high = np.array([-1.0, 0.5]), np.array([0.5, 2.0])
    scale, bias = (high - low) / 2, (high + low) / 2
    assert np.allclose(agent.actor.action_scale, scale) and np.allclose(agent.actor.action_bias, bias)
    assert (np.abs(noise) > 0.5).any()
    action = np.tanh(numpy_forward(state["target_actor"], data.next_observations, head="fc_mu")) * scale + bias
    action = np.clip(action + np.clip(noise, -0.5, 0.5) * scale, low, high)
    assert ((action == low) | (action == high)).any()
    q1, q2 = (numpy_forward(state[f"qf{i}_target"], data.next_observations, action, head="fc3") for i in (1, 2))
    y = data.rewards.double().numpy() + 0.99 * (1 - data.dones.double().numpy()) * np.minimum(q1, q2)
    losses = script.mean_losses(script.update_critics(agent, data, args, rng["smoothing"]))
    for i in (1, 2):
        values = numpy_forward(state[f"qf{i}"], data.observations, data.actions, head="fc3")
        assert losses[f"losses/qf{i}_values"] == pytest.approx(values.mean(), rel=1e-5)
        assert losses[f"losses/qf{i}_loss"] == pytest.approx(((values - y) ** 2).mean(), rel=1e-5)
    assert losses["losses/qf_loss"] == pytest.approx((losses["losses/qf1_loss"] + losses["losses/qf2_loss"]) / 2)

    state = script.dense_state(agent)
    action = np.tanh(numpy_forward(state["actor"], data.observations, head="fc_mu")) * scale + bias
    value = numpy_forward(state["qf1"], data.observations, action, head="fc3")
    grads = [p.grad.clone() for p in agent.qf1.parameters()]
    loss = script.update_actor(agent, data)["losses/actor_loss"].item()
    assert loss == pytest.approx(-value.mean(), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.qf1.parameters(), grads, strict=True))  # critic untouched


def copy_generator(generator):
    return torch.Generator().manual_seed(0).set_state(generator.get_state())


def test_polyak_and_delay(script):
    args, _, agent, rb, rng = make_agent(script, policy_frequency=3, tau=0.25)
    for update in range(1, 7):
        nets = {name: net for name, net in vars(agent).items() if isinstance(net, nn.Module)}
        before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
        losses = script.update_agent(agent, rb, args, rng, update)
        delayed = update % 3 == 0
        assert ("losses/actor_loss" in losses) == delayed
        for online, target in (("actor", "target_actor"), ("qf1", "qf1_target"), ("qf2", "qf2_target")):
            still = all(map(torch.equal, nets[online].parameters(), before[online]))
            assert still == (online == "actor" and not delayed)
            for p, old, new in zip(nets[target].parameters(), before[target], nets[online].parameters(), strict=True):
                assert torch.allclose(p, 0.75 * old + 0.25 * new if delayed else old, rtol=0, atol=1e-7)


def test_replay_ring_and_its_files(script, tmp_path):
    env = gym.make("Reach-v0")
    rb = script.ReplayBuffer(50, env, "cpu")
    rb.FILE_ROWS = 16

    def add(count):
        for _ in range(count):
            i = rb.added
            rb.add([i, i, i], [i + 1] * 3, [i, -i], i * 10, i % 2)

    add(30)
    rb.save(tmp_path)
    add(45)
    rb.save(tmp_path)
    add(5)  # unsaved rows of a killed run
    saved = [file for file in rb.files]
    other = script.ReplayBuffer(50, env, "cpu")
    other.load(tmp_path, saved, 75)
    assert sorted(other.array[:, 0]) == list(range(25, 75))
    batch = other.sample(4000, torch.Generator().manual_seed(0))
    i = batch.observations[:, 0]
    assert set(i.tolist()) == set(range(25, 75))
    assert torch.equal(batch.next_observations, (i + 1)[:, None].expand(-1, 3))
    assert torch.equal(batch.actions, torch.stack([i, -i], 1)) and torch.equal(batch.rewards, i[:, None] * 10)
    assert torch.equal(batch.dones, i[:, None] % 2)
    counts = torch.bincount(i.long(), minlength=75)[25:]
    assert counts.min() > 40 and counts.max() < 130  # 80 +- 9 each


def test_random_streams_are_separate(script):
    a, b, c = (script.make_generators(seed, "cpu") for seed in (3, 3, 4))
    draws = {name: torch.rand(4, generator=g).tolist() for name, g in a.items()}
    assert len({tuple(d) for d in draws.values()}) == 7
    torch.rand(100, generator=b["evaluation"])
    assert torch.rand(4, generator=b["replay"]).tolist() == draws["replay"]
    assert torch.rand(4, generator=c["replay"]).tolist() != draws["replay"]
    assert script.draw_seeds(script.make_generators(3, "cpu")["evaluation"], 3) == script.draw_seeds(
        script.make_generators(3, "cpu")["evaluation"], 10
    )[:3]


def test_final_score(script):
    evaluations = [[i, float(i)] for i in range(1, 31)]
    assert script.final_score(evaluations) == np.mean(range(21, 31))
    assert script.final_score(evaluations[:7]) == np.mean([4, 5, 6, 7])
    assert script.final_score(evaluations[:1]) == 1.0


def test_sizes_and_flops_by_hand(rnm):
    args = rnm.Args(batch_size=10, n=1, m=4, hidden_dim=8, policy_frequency=2)
    actor, critic = [(8, 3, 1), (8, 8, 2), (2, 8, 8)], [(8, 5, 2), (8, 8, 2), (1, 8, 8)]
    stats = rnm.model_stats(args, {"actor": actor, "qf1": critic, "qf2": critic})
    assert stats["density"]["actor"] == (8 + 16 + 16) / (24 + 64 + 16)
    assert stats["params_total"] == (104 + 18) + 2 * (112 + 17)
    assert stats["params_active"] == (40 + 18) + 2 * (40 + 17)
    assert stats["bytes"]["dense"] == 4 * stats["params_total"]
    assert stats["bytes"]["packed"] == 4 * stats["params_active"] + (24 + 2 * 32)  # one index byte per kept weight
    assert stats["flops_per_update"]["dense"] == 20 * (104 + 2 * 112 + 2 * (3 * 112 - 40) + (3 * 104 + 2 * 112) / 2)
    assert stats["flops_per_update"]["sparse"] == 20 * (40 + 2 * 40 + 2 * (3 * 40 - 16) + (3 * 40 + 2 * 40) / 2)
