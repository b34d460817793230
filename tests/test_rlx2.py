"""RLx2 against brute force, hand computation and dense masked training."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    assert_same_model,
    assert_same_run,
    checkpoint_step,
    drops_at,
    read_meta,
    read_rows,
    steps_with,
    stop_at,
)

TABLE = {  # (obs, action, actor and critic sparsity): densities, kept of actor and of one critic, kept in all, width
    "HalfCheetah": (
        (17, 6, 0.90, 0.85),
        (0.4480, 0.0558, 1),
        (0.6288, 0.1037, 1),
        (1950, 3657, 1536),
        (3703, 6794, 256),
    ),
    "Hopper": ((11, 3, 0.98, 0.95), (0.1263, 0.0104, 0.4491), (0.3095, 0.0321, 1), (356, 682, 345), (1110, 2104, 256)),
    "Walker2d": (
        (17, 6, 0.97, 0.95),
        (0.1284, 0.0160, 0.3491),
        (0.1994, 0.0329, 1),
        (559, 1048, 537),
        (1174, 2155, 256),
    ),
    "Ant": ((111, 8, 0.96, 0.88), (0.0434, 0.0262, 0.4331), (0.1567, 0.0995, 1), (1233, 1721, 887), (4776, 6520, 256)),
}
TOTAL = {"HalfCheetah": (28_649, 87), "Hopper": (8_323, 46), "Walker2d": (9_314, 45), "Ant": (26_945, 52)}


def spaces(obs_dim, action_dim):
    box = gym.spaces.Box(-1, 1, (action_dim,))
    return SimpleNamespace(observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_dim,)), action_space=box)


@pytest.mark.parametrize("env_id", TABLE)
def test_densities_and_kept_counts_are_those_of_the_paper(rlx2, env_id):
    (obs_dim, action_dim, actor, critic), *densities, kept_actor, kept_critic = TABLE[env_id]
    args, env = rlx2.Args(actor_sparsity=actor, critic_sparsity=critic), spaces(obs_dim, action_dim)
    torch.manual_seed(0)
    plain = rlx2.make_networks(args, env)
    initial = {f"{net}.{key}": p.detach().clone() for net, part in plain.items() for key, p in part.named_parameters()}
    agent = rlx2.Agent(rlx2.sparsify(plain, args), lr=3e-4)
    for net, wanted, kept in (("actor", densities[0], kept_actor), ("qf1", densities[1], kept_critic)):
        shapes = [p.shape for key, p in initial.items() if key.startswith(net) and key.endswith("weight")]
        found = rlx2.erdos_renyi(shapes * (1 if net == "actor" else 2), actor if net == "actor" else critic)
        assert found[:3] == pytest.approx(wanted, abs=5.1e-5) and found[3:] == found[:3] * (net != "actor")
        assert sum(d * math.prod(shape) for d, shape in zip(found, shapes, strict=False)) == pytest.approx(
            (1 - (actor if net == "actor" else critic)) * sum(map(math.prod, shapes))
        )
        for i, name in enumerate(("fc1", "fc2", "fc_mu" if net == "actor" else "fc3")):
            layer, first = getattr(getattr(agent, net).net, name), initial[f"{net}.net.{name}.weight"]
            if kept[i] == first.numel():
                assert type(layer) is nn.Linear  # dense, and no part of any topology
                continue
            assert len(layer.active_weights) == len(layer.positions) == int(layer.E.sum()) == kept[i]
            assert torch.equal(layer.sparse_weight(), first * layer.E)
            assert first[layer.E].abs().min() > first[~layer.E].abs().max()  # the largest ones
    stats = rlx2.model_stats(agent)
    total, width = TOTAL[env_id]
    assert sum(part["active"] for parts in stats["modules"].values() for part in parts if "active" in part) == total
    assert rlx2.equal_width(agent, args, env) == width
    for net in agent.networks:
        for name, layer in rlx2.sparse_layers(net.online).items():
            assert torch.equal(layer.E, rlx2.sparse_layers(net.target)[name].E)


def test_schedule_of_the_changes(rlx2):
    for total, critics, actor in ((3_000_000, 297, 148), (1_000_000, 97, 48)):
        args = rlx2.Args(total_timesteps=total)
        drops = {u: drops_at(rlx2, args, u) for u in range(10_000, total - 25_000 + 1, 10_000)}
        assert [sum(name in d for d in drops.values()) for name in ("critics", "actor")] == [critics, actor]
        assert {u for u, d in drops.items() if "actor" in d} == set(range(20_000, actor * 20_000 + 1, 20_000))
    assert not drops_at(rlx2, args, 9_999) and not drops_at(rlx2, args, 975_000)
    args = rlx2.Args(total_timesteps=3_000_000)
    assert drops_at(rlx2, args, 10_000)["critics"] == pytest.approx(0.49999, abs=5e-6)
    last = args.total_timesteps - args.learning_starts
    middle = rlx2.Args(total_timesteps=25_000 + 2 * 1_000_000)
    assert drops_at(rlx2, middle, 1_000_000) == pytest.approx({"critics": 0.25, "actor": 0.25})
    assert 0 < drops_at(rlx2, args, last // 10_000 * 10_000)["critics"] < 1e-4
    assert not drops_at(rlx2, rlx2.Args(topology="static"), 10_000)
    odd = rlx2.Args(total_timesteps=400, learning_starts=0, mask_update_interval=7, policy_frequency=3)
    steps = [u for u in range(1, 401) if "actor" in drops_at(rlx2, odd, u)]
    assert steps == list(range(21, 399, 21))  # 399 is the last of 133 updates of its own
    twice = [rlx2.drop_fractions(args, 2 * u, 25_000 + u) for u in range(5_000, 2_975_000, 5_000)]  # in each step
    assert all(drops["critics"] > 0 for drops in twice) and twice[0]["critics"] > 0.49999 > 1e-4 > twice[-1]["critics"]


def make(rlx2, kernel="torch", rows=600, used=None, **changes):
    """(args, env, agent, replay with random transitions, generators)"""
    options = {"actor_sparsity": 0.7, "critic_sparsity": 0.6, "hidden_dim": 24, "batch_size": 32, "learning_starts": 0}
    torch.set_num_threads(1)
    options |= {"env_id": "Reach-v0", "total_timesteps": 1000, "track": False, "kernel": kernel}
    args = rlx2.Args(**options | changes)
    env, data = rlx2.make_env(args.env_id), np.random.default_rng(0)
    torch.manual_seed(0)
    agent = rlx2.Agent(rlx2.sparsify(rlx2.make_networks(args, env), args), lr=args.learning_rate)
    assert rlx2.use_kernel(args, agent, env) == (used or kernel)
    columns = rlx2.transition_columns(env) | {"truncations": 1, "policy_actions": 2}
    rb = rlx2.ReplayBuffer(1000, columns, "cpu", args.gamma)
    for _ in range(rows):
        row = {name: data.normal(size=width) for name, width in columns.items()}
        ends = data.random(2) < 0.15
        rb.add(**row | {"dones": ends[0], "truncations": ends[1]})
    return args, env, agent, rb, rlx2.make_generators(0, "cpu")


def step(script, agent, rb, args, rng, update):
    """An update as `train` makes it."""
    return script.update_agent(agent, rb, args, rng, update, drops_at(script, args, update))


class Masked:
    """The same training with plain dense networks: masks on gradients and weights, topologies by loops in numpy."""

    def __init__(self, rlx2, args, env, agent):
        self.rlx2, self.args, self.returned = rlx2, args, 0
        self.agent = rlx2.Agent(rlx2.make_networks(args, env), lr=args.learning_rate)
        for name, part in vars(self.agent).items():
            if isinstance(part, nn.Module):
                state = {f"net.{key}": x for key, x in rlx2.plain_state(getattr(agent, name)).items() if "." in key}
                part.load_state_dict(state, strict=False)
        self.masks = {}  # by the parameter
        for net, own in zip(agent.networks, self.agent.networks, strict=True):
            for name, layer in rlx2.sparse_layers(net.online).items():
                self.masks[getattr(own.online.net, name).weight] = layer.E

    def project(self):
        for net in self.agent.networks:
            for param, target in zip(net.online.parameters(), net.target.parameters(), strict=True):
                if param in self.masks:
                    param.data *= self.masks[param]
                    target.data *= self.masks[param]

    def change(self, optimizer, net, drop):
        for param in net.parameters():
            if param not in self.masks:
                continue
            W, G, E = (x.detach().numpy().ravel() for x in (param, param.grad, self.masks[param]))
            count = int(E.sum() * drop)
            active = sorted(np.flatnonzero(E), key=lambda i: -abs(W[i]))
            kept = set(active[: len(active) - count])
            score = abs(G) if self.args.topology == "rigl" else torch.rand(param.shape).numpy().ravel()
            others = sorted((i for i in range(len(W)) if i not in kept), key=lambda i: -score[i])
            new = np.zeros(len(W), bool)
            new[list(kept) + others[:count]] = True
            self.returned += len(set(others[:count]) & set(active))
            self.masks[param] = torch.from_numpy(new.reshape(param.shape))
            for value in (param.data, *(optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq"))):
                value *= torch.from_numpy(E.reshape(param.shape)) & self.masks[param]
        self.project()

    def step(self, optimizer, nets, loss, drop):
        optimizer.zero_grad()
        loss.backward()
        if drop is not None:
            for net in nets:
                self.change(optimizer, net, drop)
            return
        for param in (param for net in nets for param in net.parameters()):
            if param in self.masks:
                param.grad *= self.masks[param]
        optimizer.step()
        self.project()

    def update(self, data, generator, update):
        a, args, drops = self.agent, self.args, drops_at(self.rlx2, self.args, update)
        with torch.no_grad():
            scale, bias = a.actor.action_scale, a.actor.action_bias
            noise = torch.empty_like(data.actions).normal_(0.0, args.policy_noise, generator=generator)
            action = a.target_actor(data.next_observations) + noise.clamp(-args.noise_clip, args.noise_clip) * scale
            action = action.clamp(bias - scale, bias + scale)
            q = torch.min(*(net(data.next_observations, action) for net in (a.qf1_target, a.qf2_target)))
            y = data.rewards + (1 - data.dones) * data.discounts * q
        critics = a.qf1, a.qf2
        loss = sum(F.mse_loss(net(data.observations, data.actions), y) for net in critics)
        self.step(a.q_optimizer, critics, loss, drops.get("critics"))
        if update % args.policy_frequency == 0:
            loss = -a.qf1(data.observations, a.actor(data.observations)).mean()
            self.step(a.actor_optimizer, [a.actor], loss, drops.get("actor"))
            self.rlx2.update_targets(a, args.tau)
            self.project()


@pytest.mark.parametrize("topology", ["rigl", "set"])
@pytest.mark.parametrize("kernel", ["torch", "nm"])
def test_it_is_dense_masked_training(rlx2, topology, kernel):
    """Weights, targets, moments and topologies over four changes of the critics' and two of the actor's."""
    options = {"topology": topology, "mask_update_interval": 8, "nstep": 3, "delay_nstep": 10, "total_timesteps": 60}
    args, env, agent, rb, rng = make(rlx2, kernel, **options)
    masked, other = Masked(rlx2, args, env, agent), rlx2.make_generators(0, "cpu")
    for update in range(1, 37):
        torch.manual_seed(update)
        step(rlx2, agent, rb, args, rng, update)
        torch.manual_seed(update)
        data = rb.sample(args.batch_size, other["replay"], 3 if update >= 10 else 1)
        masked.update(data, other["smoothing"], update)
    assert masked.returned > 10  # dropped, and back in the same change
    for name in ("actor", "qf1", "qf2", "target_actor", "qf1_target", "qf2_target"):
        ours, theirs = rlx2.plain_state(getattr(agent, name)), rlx2.plain_state(getattr(masked.agent, name))
        assert ours.keys() == theirs.keys()
        for key, x in theirs.items():
            assert torch.allclose(ours[key], x, rtol=1e-4, atol=2e-6), (name, key)
    for net, own in zip(agent.networks, masked.agent.networks, strict=True):
        optimizers = (agent.actor_optimizer, masked.agent.actor_optimizer)
        optimizers = optimizers if net.name == "actor" else (agent.q_optimizer, masked.agent.q_optimizer)
        for name, layer in rlx2.sparse_layers(net.online).items():
            param = getattr(own.online.net, name).weight
            assert torch.equal(layer.E, masked.masks[param])
            mine, theirs = optimizers[0].state[layer.active_weights], optimizers[1].state[param]
            assert mine["step"] == theirs["step"] == (36 - 4 if net.name != "actor" else 18 - 2)  # no step at a change
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(mine[key], theirs[key][layer.E], rtol=1e-3, atol=1e-9), (name, key)
                assert (theirs[key][~layer.E] == 0).all()


@pytest.mark.parametrize("topology", ["rigl", "set", "static"])
def test_the_number_of_weights_never_changes(rlx2, topology):
    """Fifty changes of the critics', 25 of the actor's topology."""
    args, _, agent, rb, rng = make(rlx2, topology=topology, mask_update_interval=3, learning_rate=3e-3)
    first = rlx2.get_masks(agent)
    counts, changes = {name: int(E.sum()) for name, E in first.items()}, {"actor": 0, "qf1": 0, "qf2": 0}
    for update in range(1, 151):
        before = rlx2.get_masks(agent)
        step(rlx2, agent, rb, args, rng, update)
        after = rlx2.get_masks(agent)
        assert {name: int(E.sum()) for name, E in after.items()} == counts
        for net in agent.networks:
            moved = [not torch.equal(before[key], after[key]) for key in first if key.startswith(f"{net.name}.")]
            changes[net.name] += any(moved)
            assert any(moved) <= (update % (6 if net.name == "actor" else 3) == 0)
            for name, layer in rlx2.sparse_layers(net.target).items():
                assert torch.equal(layer.E, after[f"{net.name}.{name}"])
    assert changes == (
        {"actor": 0, "qf1": 0, "qf2": 0} if topology == "static" else {"actor": 25, "qf1": 50, "qf2": 50}
    )


def add_part(rb, **known):
    rb.add(**dict.fromkeys(rb.parts._fields, 0.0) | known)


def windows_by_hand(rb, start, n, gamma):
    rewards, k = 0.0, 0
    while True:
        row = {name: part[(start + k) % rb.size] for name, part in rb.parts._asdict().items()}
        rewards += gamma**k * float(row["rewards"][0])
        k += 1
        if row["dones"][0] or row["truncations"][0] or k == n:
            return rewards, gamma**k, row["next_observations"], float(row["dones"][0]), k


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("full", [False, True])
def test_multi_step_windows_against_a_loop(rlx2, n, full):
    """Over terminations, time limits, both at once, the ring's seam, its write head and its left end."""
    _, _, _, rb, _ = make(rlx2, rows=1700 if full else 700)
    rb.oldest += 100
    first, batch_size = max(0, rb.added - 1000) + 100, 3000
    assert len(rb) == rb.added - first == (900 if full else 600)
    data = rb.sample(batch_size, torch.Generator().manual_seed(5), n)
    starts = first + torch.randint(len(rb) - n + 1, (batch_size,), generator=torch.Generator().manual_seed(5))
    assert starts.min() == first and starts.max() == rb.added - n  # all places, none across the newest row
    lengths, kinds = set(), set()
    for i, start in enumerate(starts.tolist()):
        rewards, discount, next_observations, done, k = windows_by_hand(rb, start, n, 0.99)
        assert data.rewards[i].item() == pytest.approx(rewards, rel=1e-5, abs=1e-6)
        assert data.discounts[i].item() == pytest.approx(discount, rel=1e-6)
        assert torch.equal(data.next_observations[i], torch.from_numpy(next_observations)) and data.dones[i] == done
        for name in ("observations", "actions"):
            assert torch.equal(getattr(data, name)[i], torch.from_numpy(getattr(rb.parts, name)[start % rb.size]))
        last = (start + k - 1) % rb.size
        lengths.add(k)
        kinds.add((k, bool(rb.parts.dones[last]), bool(rb.parts.truncations[last])))
    assert lengths == set(range(1, n + 1)) and len(kinds) == 3 * n + 1  # each way to end
    if not full:  # fewer rows than steps: what is there
        short = rlx2.ReplayBuffer(10, {k: part.shape[1] for k, part in rb.parts._asdict().items()}, "cpu", 0.5)
        add_part(short, rewards=1), add_part(short, rewards=2)
        data = short.sample(4, torch.Generator(), 3)
        assert (data.rewards == 2).all() and (data.discounts == 0.25).all()


def test_when_targets_become_multi_step(rlx2, monkeypatch):
    args, _, agent, rb, rng = make(rlx2, nstep=4, delay_nstep=3)
    seen, sample = [], rb.sample
    monkeypatch.setattr(rb, "sample", lambda size, generator, n: seen.append(n) or sample(size, generator, n))
    for update in range(1, 6):
        step(rlx2, agent, rb, args, rng, update)
    assert seen == [1, 1, 4, 4, 4]


def test_policy_distance_and_shrinking_by_hand(rlx2):
    args, env, agent, _, _ = make(rlx2, batch_size=4, buffer_min_size=60, buffer_threshold=0.2)
    columns = rlx2.transition_columns(env) | {"truncations": 1, "policy_actions": 2}
    scale, bias = agent.actor.action_scale, agent.actor.action_bias
    assert scale.tolist() == [0.75, 1.25]

    def filled(rows, action):
        rb = rlx2.ReplayBuffer(80, columns, "cpu", 0.99)
        for i in range(rows):
            obs = np.array([0.01 * i, 1.0, -1.0], np.float32)
            add_part(rb, observations=obs, policy_actions=action(obs, i))
        return rb

    def now(obs, _):
        return rlx2.act(agent.actor, obs)

    assert rlx2.shrink_replay(rb := filled(75, now), agent.actor, args)["replay/policy_distance"] < 1e-12
    assert len(rb) == 75
    with torch.no_grad():
        agent.actor.net.fc_mu.bias.fill_(1e3)  # saturated: the upper bounds
    row = rlx2.shrink_replay(rb := filled(75, lambda *_: bias - scale), agent.actor, args)
    assert row == {"replay/policy_distance": pytest.approx(2.0), "replay/size": 68} and rb.oldest == 7  # int(7.5)
    # half the mean square of 0.5 and 1.0 action scales, in the oldest 32 rows alone
    rb = filled(80, lambda _, i: bias + scale * torch.tensor([0.5, 0.0]) if i < 32 else bias + scale)
    assert rlx2.shrink_replay(rb, agent.actor, args)["replay/policy_distance"] == pytest.approx(0.5 * 1.25 / 2)
    assert rb.oldest == 8
    add_part(rb), add_part(rb)  # rows 80 and 81 go to places 0 and 1; the left end is already past them
    assert rb.oldest == 8 and len(rb) == 74
    assert rlx2.shrink_replay(rb, agent.actor, args)["replay/policy_distance"] == pytest.approx(0.3125 * 24 / 32)
    assert rb.oldest == 8 + 7  # a tenth of what counts, not of all that came
    for rows, threshold, left in ((60, 0.2, 60), (61, 0.2, 55), (75, 0.3125, 75), (75, 0.3124, 68)):
        args = replace(args, buffer_threshold=threshold)
        rb = filled(rows, lambda *_: bias + scale * torch.tensor([0.5, 0.0]))
        assert rlx2.shrink_replay(rb, agent.actor, args)["replay/size"] == len(rb) == left


def test_replay_keeps_the_policy_s_own_action_and_how_an_episode_ended(rlx2, small, monkeypatch):
    rows, means, act, add = [], [], rlx2.act, rlx2.ReplayBuffer.add
    monkeypatch.setattr(rlx2, "act", lambda actor, obs: means.append(act(actor, obs)) or means[-1])
    monkeypatch.setattr(
        rlx2.ReplayBuffer, "add", lambda rb, **row: (rows.append(row | {"mean": means[-1]}), add(rb, **row))
    )
    args = small(rlx2, env_id="ReachShort-v0")
    rlx2.train(args)
    for row in rows[: args.learning_starts]:  # random actions: the distance of the first data is to these
        assert np.array_equal(row["policy_actions"], row["actions"])
    for row in rows[args.learning_starts :]:
        assert torch.equal(row["policy_actions"], row["mean"]) and not np.array_equal(row["mean"], row["actions"])
    assert len(rows) == args.total_timesteps > args.learning_starts > 0
    lengths = [0]
    for row in rows:
        lengths[-1] += 1
        assert row["dones"] == (abs(row["next_observations"][0]) > 4) and row["truncations"] == (lengths[-1] == 25)
        lengths += [0] * (row["dones"] or row["truncations"])
    assert 25 in lengths[:-1] and min(lengths[:-1]) < 25


@pytest.mark.parametrize("kernel", ["torch", "nm"])
def test_resume_in_the_middle_of_everything(rlx2, small, monkeypatch, cli, kernel):
    options = {"kernel": kernel, "buffer_size": 250}
    whole = rlx2.train(small(rlx2, **options))["run_dir"]
    sizes = {int(row["global_step"]): float(row["replay/size"]) for row in read_rows(whole) if row["replay/size"]}
    assert list(sizes) == list(range(50, 401, 50)) and sizes[50] == 50  # also before learning starts
    assert sizes[100] == 90 and sizes[300] < 250 < 300  # it had shrunk when the run is stopped, and the ring gone round
    for stop, limit in ((180, 250), (317, 400)):  # before and after the targets become multi-step
        with monkeypatch.context() as patch:
            stop_at(patch, rlx2, stop)
            part = rlx2.train(small(rlx2, **options))
        end = checkpoint_step(part["run_dir"])
        assert stop <= end < limit
        saved = torch.load(Path(part["run_dir"], "checkpoint.pt"), weights_only=True)["rb"]
        assert saved["oldest"] > 0
        code, _, err = cli(rlx2, "--resume", part["run_dir"], small=False)
        assert code == 0 and err == ""
        assert_same_run(whole, part["run_dir"])
    for key, interval in (("sad/qf1", 20), ("sad/actor", 40)):
        assert steps_with(whole, key) == list(range(100 + interval, 400, interval))
    masks = np.load(Path(whole) / "masks.npz")
    assert masks["global_step"].tolist() == [0, *range(120, 400, 20)]
    last = np.unpackbits(masks["qf1.fc2"][-1])[:256].reshape(16, 16)
    weight = torch.load(Path(whole, "model.pt"), weights_only=True)["qf1"]["fc2.weight"]
    assert not weight[torch.from_numpy(last == 0)].any() and (masks["qf1.fc2"][1:] != masks["qf1.fc2"][:-1]).any()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--actor-sparsity", "1"], "--actor-sparsity 1.0 leaves fc1 less than one weight"),
        (["--critic-sparsity", "0.999", "--actor-sparsity", "0.5"], "--critic-sparsity 0.999 leaves fc"),
        (["--critic-sparsity", "-0.1"], "--critic-sparsity must be at least 0.0 and at most 1.0, not -0.1"),
        (["--actor-sparsity", "1.5"], "--actor-sparsity must be at least 0.0 and at most 1.0, not 1.5"),
        (["--nstep", "0"], "--nstep must be at least 1"),
        (["--nstep", "1001"], "--nstep must be at least 1 and at most 1000"),
        (["--nstep", "9", "--buffer-size", "8"], "--nstep 9 needs a --buffer-size of at least 9"),
        (["--mask-update-interval", "1"], "--mask-update-interval must be at least 2"),
    ],
)
def test_bad_input_is_one_line(rlx2, cli, tmp_path, flags, line):
    code, out, err = cli(rlx2, "--no-track", "--runs-dir", tmp_path / "runs", *flags)
    assert code == 2 and out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_a_run_does_not_come_to_is_a_warning(rlx2, cli, tmp_path):
    runs = ["--no-track", "--runs-dir", tmp_path, "--mask-update-interval", 100, "--delay-nstep", 101]
    runs += ["--buffer-min-size", 200]
    code, out, err = cli(rlx2, *runs, "--total-timesteps", "200")
    warnings = (
        "the topology of critics does not change in this run",
        "the topology of actor does not change in this run",
    )
    warnings += "all targets have one step", "the replay buffer never shrinks"
    assert code == 0 and [line.split(": ")[1].split(",")[0] for line in err.splitlines()] == [*warnings]
    assert (
        "as many weights have the same networks, dense, with --hidden-dim 9\n" in out
    )  # 3 H^2 + 17 H is nearest to 383
    quiet = ["--topology", "static", "--nstep", "1", "--no-dynamic-buffer"]
    code, _, err = cli(rlx2, *runs, *quiet, "--total-timesteps", "200")
    assert code == 0 and err == ""
    almost = ["--mask-update-interval", 50, "--delay-nstep", 100, "--buffer-min-size", 199, "--total-timesteps", "200"]
    code, _, err = cli(rlx2, *runs, *almost)
    assert (
        code == 0 and err == "warning: the topology of actor does not change in this run\n"
    )  # 50 updates, none at the last
    late = ["--topology", "static", "--nstep", "1", "--buffer-check-interval", 201, "--buffer-min-size", 100]
    assert cli(rlx2, *runs, *late, "--total-timesteps", 200)[2].startswith("warning: the replay buffer never shrinks")
    (folder,) = tmp_path.glob("*rlx2_td3_continuous_static_70_60__s1__*")
    assert not any(row["replay/size"] or row["sad/qf1"] for row in read_rows(folder))
    assert len(np.load(folder / "masks.npz")["global_step"]) == 1


def test_a_dense_part_and_a_dense_whole(rlx2, small):
    """Sparsity 0: nothing to mask; the actor alone; both."""
    for actor, critic, kernel in ((0.0, 0.6, "nm"), (0.7, 0.0, "nm"), (0.0, 0.0, "torch")):
        run = rlx2.train(small(rlx2, actor_sparsity=actor, critic_sparsity=critic))["run_dir"]
        meta, columns = read_meta(run), read_rows(run)[0].keys()
        assert meta["kernel"] == kernel and (meta["density"]["actor"] == 1) == (actor == 0)
        assert ("sad/actor" in columns, "sad/qf2" in columns) == (actor > 0, critic > 0)


def test_a_layer_that_hides_its_weight_is_an_error(rlx2, monkeypatch):
    args, _, agent, rb, rng = make(rlx2, mask_update_interval=2)
    weight = copy.deepcopy(agent.qf1.net.fc2.sparse_weight().detach())
    monkeypatch.setattr(agent.qf1.net.fc2, "forward", lambda x: F.linear(x, weight))
    step(rlx2, agent, rb, args, rng, 1)
    with pytest.raises(ValueError, match=r"qf1\.fc2 has no gradient"):
        step(rlx2, agent, rb, args, rng, 2)


def test_the_width_is_right_whatever_the_sizes(rlx2):
    """Also where an input is as wide as a hidden layer; against all widths."""
    for (obs_dim, action_dim), hidden_dim in (((17, 6), 17), ((17, 6), 23), ((122, 6), 128), ((3, 1), 2), ((3, 1), 1)):
        some = hidden_dim > 1
        args = rlx2.Args(actor_sparsity=0.5 * some, critic_sparsity=0.6 * some, hidden_dim=hidden_dim)
        env = spaces(obs_dim, action_dim)
        agent = rlx2.Agent(rlx2.sparsify(rlx2.make_networks(args, env), args), lr=3e-4)
        stats = rlx2.model_stats(agent)["modules"]
        active = sum(part["active"] for parts in stats.values() for part in parts if "active" in part)
        sizes = {}
        for H in range(1, hidden_dim + 1):
            inputs = obs_dim + 2 * (obs_dim + action_dim)
            sizes[H] = abs(3 * H * H + H * (inputs + action_dim + 2) - active)
        assert rlx2.equal_width(agent, args, env) == min(sizes, key=sizes.get)


def test_names_of_runs(rlx2):
    plain = {"nstep": 1, "dynamic_buffer": False, "actor_sparsity": 0.96, "critic_sparsity": 0.885}
    full = {"actor_sparsity": 0.96, "critic_sparsity": 0.885}
    named = {"rlx2": full, "rigl": plain, "set": plain | {"topology": "set"}, "static": plain | {"topology": "static"}}
    named |= {
        "rigl-n3": plain | {"nstep": 3},
        "rigl-buffer": full | {"nstep": 1},
        "set-n3-buffer": full | {"topology": "set"},
    }
    assert [rlx2.pattern(rlx2.Args(**options)) for options in named.values()] == [f"{name}_96_88.5" for name in named]


def test_without_sparsity_it_is_the_dense_script(rlx2, dense, small):
    """Also at the updates at which topologies would change."""
    options = {"actor_sparsity": 0.0, "critic_sparsity": 0.0, "nstep": 1, "dynamic_buffer": False}
    own, other = rlx2.train(small(rlx2, **options))["run_dir"], dense.train(small(dense))["run_dir"]
    assert_same_model(own, other)
    assert len(np.load(Path(own) / "masks.npz")["global_step"]) == 1
