"""What a fork keeps in Agent, State, networks and replay comes back at a resume, or the run says that it can't."""

import copy
import io
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, SMALL, assert_same_run, load, read_rows, stop_at

import sad_analysis as sa


def finish(module, monkeypatch, folder, stop=300, **settings):
    """The folders of a whole run and of one that was stopped and resumed."""
    monkeypatch.setattr(module, "hardware_report", lambda *_: None)  # it updates, too
    settings = {name: x for name, x in SMALL.items() if hasattr(module.Args, name)} | settings
    whole = module.train(module.Args(**settings, runs_dir=str(folder / "whole")))
    with monkeypatch.context() as patch:
        stop_at(patch, module, stop)
        part = module.train(module.Args(**settings, runs_dir=str(folder / "part")))
    assert part["exit_reason"] == "sigterm"
    module.train(module.parse_args(["--resume", part["run_dir"]]))
    return whole["run_dir"], part["run_dir"]


def test_what_agent_and_state_hold_survives_a_resume(dense, tmp_path, monkeypatch):
    """Learned temperatures with optimizers, lists of parameters, numpy's kinds, networks, plain facts of a network."""
    made, last = [], []
    update_agent, make_agent, make_state = dense.update_agent, dense.Agent.__init__, dense.State.__init__
    make_replay = dense.ReplayBuffer.__init__

    def init(agent, *args, **options):
        make_agent(agent, *args, **options)
        agent.log_alpha, agent.alphas = nn.Parameter(torch.zeros(1)), [torch.zeros(1, requires_grad=True)]
        agent.optimizers = {"alpha": dense.make_adam([agent.log_alpha, *agent.alphas], lr=0.01)}
        agent.clipped = list(agent.qf1.parameters())
        agent.count, agent.history, agent.loss = 0, [0.0], torch.nn.functional.mse_loss

    def init_state(state):
        make_state(state)
        state.averages, state.sums, state.pair = [nn.Linear(2, 1)], np.zeros(2), (np.float32(0), 0)
        nn.init.zeros_(state.averages[0].weight)
        made.append(state)

    def init_replay(rb, *args):
        make_replay(rb, *args)
        rb.priorities = np.zeros(4)

    def update(agent, rb, *args):
        losses = update_agent(agent, rb, *args)
        with torch.no_grad():
            agent.clipped[0].mul_(0.999)  # reaches the critic
        agent.optimizers["alpha"].zero_grad()
        ((agent.log_alpha - 1) ** 2 + (agent.alphas[0] - 2) ** 2).sum().backward()
        agent.optimizers["alpha"].step()
        agent.count += 1
        agent.history = [*agent.history[-3:], agent.log_alpha.item(), agent.alphas[0].item()]
        rb.priorities[agent.count % 4] += 1
        agent.qf1.net.scale = getattr(agent.qf1.net, "scale", 1.0) * 0.999
        agent.qf2.net.scale = np.float32(getattr(agent.qf2.net, "scale", 1.0) * 0.999)
        own = args[1].setdefault("own", torch.Generator().manual_seed(7))  # made late
        agent.noise = torch.rand(1, generator=own).item(), agent.qf2.net.scale
        if agent.count == 100:
            agent.qf2.net.fc1.weight.requires_grad_(False)
        assert all(a is b for a, b in zip(agent.clipped, agent.qf1.parameters(), strict=True))
        state = made[-1]
        state.averages[0].weight.data += 1
        state.sums, state.pair = state.sums + 1, (state.pair[0] + 1, agent.count)
        found = agent.history, rb.priorities.tolist(), agent.qf1.net.scale, agent.qf2.net.fc1.weight.sum().item()
        last[:] = [agent.count, *found, state.averages[0].weight.sum().item(), state.sums.tolist(), state.pair]
        last.append(agent.noise)
        return losses

    monkeypatch.setattr(dense.Agent, "__init__", init)
    monkeypatch.setattr(dense.State, "__init__", init_state)
    monkeypatch.setattr(dense.ReplayBuffer, "__init__", init_replay)
    monkeypatch.setattr(dense, "update_agent", update)
    ends, train = [], dense.train
    monkeypatch.setattr(dense, "train", lambda args: (train(args), ends.append(list(last)))[0])
    assert_same_run(*finish(dense, monkeypatch, tmp_path))
    whole, part, resumed = ends
    assert resumed == whole and part[0] < whole[0] == 300 and part[0] > 100  # frozen before the stop
    assert whole[1][-1] > 0.5 and whole[2] == [75] * 4 and whole[3] == pytest.approx(0.999**300)
    assert whole[5:7] == [600, [300, 300]] and tuple(map(float, whole[7])) == (300, 300)


def bring_back(dense, then, now, **beside):
    """Through a file; returns what came back beside Agent and State."""
    things = {"agent": then, "state": {"form": dense.forms({"agent": then})}}
    torch.save(dense.pack(things) | beside, file := io.BytesIO())
    content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    dense.unpack(content, {"agent": now, "state": {}})
    return content


def test_values_come_back_as_they_were(dense):
    """What a network or an optimizer held has its other names again; all else is taken as it is, under its own name."""

    def make():
        net, alpha = nn.Linear(2, 1), torch.zeros(2, requires_grad=True)
        old = {"params": list(net.parameters()), "net": net, "first": net.weight, "alphas": (alpha, 1)}
        return old | {
            "adam": torch.optim.Adam([alpha], lr=0.1),
            "plain": torch.zeros(1),
            "fun": torch.relu,
            "ordered": OrderedDict(alpha=alpha),
        }

    then = make()
    then["first"] = then["first"].detach().clone() + 1  # an older copy now, no name of the weight any more
    then |= {"plain": torch.ones(3, dtype=torch.float64), "new": [{"b": 1}], "copy": then["alphas"][0]}
    then["loss"] = 2 * then["alphas"][0]  # not detached
    then["alphas"][0].data += 5
    then["alphas"][0].requires_grad_(False)
    then["net"].weight.grad, then["alphas"][0].grad = torch.full((1, 2), 3.0), torch.full((2,), 4.0)  # not stepped yet
    then["net"].scale = np.float32(0.5)
    held = {"step": torch.tensor(2.0), "wide": torch.full((2,), 0.1, dtype=torch.float64), "on": torch.ones(2) > 0}
    then["adam"].state[then["alphas"][0]] = held
    now = make()
    net, alpha = now["net"], now["alphas"][0]
    then["priorities"] = np.ones(3)
    replay = bring_back(dense, then, now, rb={"priorities": then["priorities"]})["rb"]
    assert now["priorities"] is replay["priorities"] and now["priorities"].sum() == 3
    assert now["net"] is net and torch.equal(net.weight, then["net"].weight)
    assert now["params"][0] is net.weight and now["params"][1] is net.bias
    assert torch.equal(now["first"], net.weight + 1) and net.scale == 0.5 and net.bias.grad is None
    assert net.weight.grad.tolist() == [[3, 3]] and alpha.grad.tolist() == [4, 4]
    assert now["alphas"][0] is now["copy"] is now["adam"].param_groups[0]["params"][0] is alpha
    assert torch.equal(alpha, torch.full((2,), 5.0)) and not alpha.requires_grad and now["alphas"][1] == 1
    state = now["adam"].state[alpha]  # torch's own load_state_dict makes float32 of these
    assert state.keys() == held.keys() and all(state[x].dtype is held[x].dtype for x in held)
    assert all(torch.equal(state[x], held[x]) for x in held)
    assert torch.equal(now["plain"], torch.ones(3, dtype=torch.float64)) and now["new"] == [{"b": 1}]
    assert now["fun"] is torch.relu and torch.equal(now["loss"], torch.zeros(2)) and not now["loss"].requires_grad
    assert type(now["ordered"]) is OrderedDict and now["ordered"]["alpha"] is alpha


def test_what_modules_hold_and_a_resume_forgets_is_said(dense, small, monkeypatch, capsys):
    """At each checkpoint that would need it; check_fork.py shows the line, too."""
    update_agent = dense.update_agent

    def update(agent, *args):
        agent.qf1.net.fc2.sums = getattr(agent.qf1.net.fc2, "sums", 0) + agent.qf1.net.fc2.weight.detach()
        agent.actor.seen, agent.actor.count = np.zeros(3), 1.0
        return update_agent(agent, *args)

    monkeypatch.setattr(dense, "update_agent", update)
    dense.train(small(dense, checkpoint_interval=150))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: a resume forgets ")]
    assert lines and set(lines) == {
        "warning: a resume forgets ['seen', 'sums'], tensors or arrays that modules hold: make them buffers"
    }


@pytest.mark.parametrize("view", [lambda w: w.data, lambda w: w[0], lambda w: w.detach().T])
def test_views_of_what_networks_hold_are_refused(dense, view):
    """After a resume they would be copies, which nothing trains."""
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"agent\.kept\.0\.w, a view of a network's tensor"):
        dense.pack({"agent": {"net": net, "kept": [{"w": view(net.weight)}]}})
    dense.pack({"agent": {"net": net, "kept": [{"w": view(net.weight).clone()}], "same": net.weight}})


def test_swapped_networks_are_refused(dense):
    """The optimizer trains tensors, whatever they are called: it can't be told which is whose."""
    things = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
    things["adam"] = torch.optim.Adam([*things["a"].parameters(), *things["b"].parameters()])
    fresh = copy.deepcopy(things)
    bring_back(dense, things, copy.deepcopy(things))
    things |= {"a": things["b"], "b": things["a"]}
    with pytest.raises(ValueError, match="begins with other networks"):
        bring_back(dense, things, fresh)


class Noise:
    def sample(self):
        return 0


@pytest.mark.parametrize(
    ("kept", "name"),
    [
        (Noise(), "Noise"),
        (deque(), r"collections\.deque"),
        (np.random.default_rng(1), "generator"),
        ([lambda: 0], r"agent\.kept\.0, a function or a class"),
        (np.random.default_rng(1).random, r"agent\.kept, a function"),  # its generator would begin anew
        (Noise().sample, r"agent\.kept, a function"),
        (np.array(["a"]), "numpy"),
        (torch.eye(2).to_sparse(), "storage"),
        ((i for i in range(3)), "generator"),
    ],
)
def test_what_a_resume_can_not_read_is_said_by_the_checkpoint(dense, kept, name, tmp_path, monkeypatch):
    """At the first one that holds it; the one before it stays."""
    update_agent = dense.update_agent

    def update(agent, *args):
        agent.kept = kept
        return update_agent(agent, *args)

    monkeypatch.setattr(dense, "update_agent", update)
    with pytest.raises(dense.UserError, match=f"what no checkpoint can: .*{name}"):
        dense.train(dense.Args(**SMALL | {"checkpoint_interval": 100}, runs_dir=str(tmp_path)))
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert dense.read_torch(path)["own"]["state"]["global_step"] == 0 and not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("place", ["best", "pool.0", "oldest"])
def test_a_network_that_comes_late_is_said_at_the_next_checkpoint(dense, place, tmp_path, monkeypatch):
    """No resume could make it, or it would make two of one; the checkpoint before it stays."""
    update_agent, make_agent = dense.update_agent, dense.Agent.__init__

    def init(agent, *args, **options):
        make_agent(agent, *args, **options)
        agent.pool, agent.oldest = [], agent.actor

    def update(agent, *args):
        if place != "pool.0":
            setattr(agent, place, copy.deepcopy(agent.actor))
        else:
            agent.pool[:] = [copy.deepcopy(agent.actor)]
        return update_agent(agent, *args)

    monkeypatch.setattr(dense.Agent, "__init__", init)
    monkeypatch.setattr(dense, "update_agent", update)
    with pytest.raises(dense.UserError, match=rf"'agent.{place}'\]: Agent and State must have the same"):
        dense.train(dense.Args(**SMALL | {"checkpoint_interval": 100}, runs_dir=str(tmp_path)))
    (path,) = tmp_path.glob("*/checkpoint.pt")
    content = dense.read_torch(path)
    assert content["own"]["state"]["global_step"] == 0
    with pytest.raises(ValueError, match="begins with other networks"):
        dense.unpack(content, {"agent": {}, "state": {}})


@pytest.mark.parametrize("name, kernel", [("rnm", "nm"), ("rnm", "torch"), ("mst", "nm")])
def test_a_network_that_is_replaced_is_the_network(name, kernel, tmp_path, monkeypatch, request):
    """Two resets of the critics as in docs/forking.md: masks, targets and a resume follow; each draws other weights."""
    script = request.getfixturevalue(name)
    update_agent, changes = script.update_agent, []

    def heads(agent):
        return [list(net.net)[-1].weight.clone() for net in (agent.qf1_target, agent.qf1)]

    def update(agent, rb, args, rng, update, *drops):
        if update in (100, 150):
            env = script.make_env(args.env_id)
            new = script.sparsify(script.make_networks(args, env), args)
            for qf in ("qf1", "qf2"):
                vars(agent).update({qf: new[qf], f"{qf}_target": copy.deepcopy(new[qf])})
            if name == "mst":
                agent.qf1.obs_norm = agent.qf1_target.obs_norm = agent.actor.obs_norm
                agent.qf2.obs_norm = agent.qf2_target.obs_norm = agent.actor.obs_norm
            agent.q_optimizer = script.make_adam([*agent.qf1.parameters(), *agent.qf2.parameters()], lr=3e-4)
            script.use_kernel(args, agent, env)
            changes.append([agent, *heads(agent)])
        losses = update_agent(agent, rb, args, rng, update, *drops)
        if update in (101, 151):
            changes[-1] += heads(agent)
        return losses

    monkeypatch.setattr(script, "update_agent", update)
    settings = {"n": 1, "m": 4} if name == "rnm" else {"actor_hidden_dim": 8, "critic_hidden_dim": 16}
    settings |= {"mask_update_interval": 40, "kernel": kernel}
    assert_same_run(*finish(script, monkeypatch, tmp_path, **settings))
    for _, target, critic, next_target, next_critic in changes[:2]:
        assert torch.equal(target, critic) and not torch.equal(critic, next_critic)
        assert not torch.equal(target, next_target)  # Polyak averages of the new ones
    agent = changes[1][0]
    assert [net.online for net in agent.networks][1:] == [agent.qf1, agent.qf2]
    assert not torch.equal(changes[0][2], changes[1][2])
    assert type(agent.qf1.net) is (script.FusedSequential if kernel == "nm" else nn.Sequential)


def test_a_run_that_leaves_its_loop_early_is_one_of_as_many_steps(twin, small, tmp_path):
    text, at = (ROOT / f"{twin.__name__}.py").read_text(), "                run.log(global_step, row)\n"
    assert text.count(at) == 1
    (tmp_path / "fork.py").write_text(
        text.replace(at, f"{at}            if global_step == 250:\n                break\n")
    )
    fork = load(tmp_path / "fork.py")
    early, whole = fork.train(small(fork)), twin.train(small(twin, total_timesteps=250))
    assert early["exit_reason"] == "finished" and early["final_score"] == whole["final_score"]
    assert_same_run(early["run_dir"], whole["run_dir"])
    with pytest.raises(sa.UserError, match=r"ends at step 250 of .* = 400: .*then write 250 into its meta\.json"):
        sa.load_run(Path(early["run_dir"]))
    meta = Path(early["run_dir"], "meta.json")
    meta.write_text(meta.read_text().replace('"total_timesteps": 400', '"total_timesteps": 250'))
    assert sa.load_run(meta.parent).metrics.index[-1] == 250


def test_numbers_of_any_type_are_logged(script, small, monkeypatch):
    update, columns = script.update_agent, script.metric_columns
    added = {"losses/zeros": torch.tensor([3, 4]), "losses/is_late": torch.tensor(True)}
    monkeypatch.setattr(script, "update_agent", lambda *a: update(*a) | added)
    monkeypatch.setattr(script, "metric_columns", lambda *a: [*columns(*a), *added])
    run = script.train(small(script, total_timesteps=1000, learning_starts=995, eval_interval=1000))["run_dir"]
    row = next(row for row in read_rows(run) if row["losses/zeros"])
    assert (row["global_step"], row["losses/zeros"], row["losses/is_late"]) == ("1000", "3.5", "1.0")


def test_sampled_actions_are_seeded_and_come_back(tmp_path, monkeypatch):
    """env.action_space.sample(), as CleanRL warms up."""
    text = (ROOT / "dense_td3_continuous.py").read_text()
    warmup = 'low + (high - low) * torch.rand(low.shape, generator=rng["warmup"])'
    noise = 'torch.randn(low.shape, generator=rng["exploration"])'
    assert text.count(warmup) == text.count(noise) == 1
    path = tmp_path / "dense_td3_continuous.py"
    path.write_text(
        text.replace(warmup, "torch.tensor(env.action_space.sample())").replace(
            noise, "torch.tensor(env.action_space.sample())"
        )
    )
    module = load(path)
    assert_same_run(*finish(module, monkeypatch, tmp_path))
    again = module.train(module.Args(**SMALL, runs_dir=str(tmp_path / "again")))
    assert_same_run(next((tmp_path / "whole").iterdir()), again["run_dir"])


def make_agent(script, **settings):
    args = script.Args(**{"env_id": "Reach-v0", "kernel": "nm"} | settings)
    env = script.make_env(args.env_id)
    agent = script.Agent(script.sparsify(script.make_networks(args, env), args), lr=1e-3)
    assert script.use_kernel(args, agent, env) == "nm"
    return agent, torch.randn(8, env.observation_space.shape[0])


def test_a_second_actor_is_not_trained_with_the_critics(dense):
    args = dense.Args(env_id="Reach-v0", hidden_dim=8)
    networks = dense.make_networks(args, dense.make_env(args.env_id))
    networks["actor2"] = copy.deepcopy(networks["actor"])
    agent = dense.Agent(networks, lr=1e-3)
    trained = {id(x) for x in dense.held(agent.q_optimizer)}
    assert trained == {id(x) for net in (agent.qf1, agent.qf2) for x in net.parameters()}
    assert agent.actor2_target is not agent.actor2 and [net.name for net in agent.networks][-1] == "actor2"


def test_positions_that_do_not_ascend_are_an_error(rnm):
    agent, obs = make_agent(rnm, n=1, m=4, hidden_dim=16)
    positions = agent.actor.net.fc2.positions
    positions.copy_(positions.roll(1))
    with pytest.raises(ValueError, match="positions must ascend"):
        agent.actor(obs)


def test_autocast_counts_with_the_kernels(rnm):
    agent, obs = make_agent(rnm, n=1, m=4, hidden_dim=16)
    plain = copy.deepcopy(agent.actor)
    for module in plain.modules():
        module.__class__ = {rnm.FusedSequential: nn.Sequential, rnm.FusedLinear: rnm.SparseLinear}.get(
            type(module), type(module)
        )
    exact = agent.actor(obs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(agent.actor(obs), plain(obs)) and not torch.allclose(
            agent.actor(obs).float(), exact, atol=1e-6
        )


def test_an_optimizer_out_of_sight_is_an_error(rnm):
    """Its moments would stay behind at a refresh, those of two would share a store."""
    agent, _ = make_agent(rnm, n=1, m=4, hidden_dim=16)
    rnm.refresh_masks(agent)
    agent.second = rnm.make_adam(agent.actor.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"actor needs one torch\.optim\.Optimizer"):
        rnm.refresh_masks(agent)
    del agent.second
    agent.hidden = [agent.q_optimizer]
    del agent.q_optimizer
    with pytest.raises(ValueError, match=r"qf1 needs one torch\.optim\.Optimizer, an attribute of Agent, to train it"):
        rnm.refresh_masks(agent)


def test_a_target_with_other_masks_is_an_error_at_the_next_checkpoint(rnm, tmp_path, monkeypatch):
    """Also where masks never change."""
    update_agent = rnm.update_agent

    def update(agent, rb, args, rng, update):
        if update == 50:
            new = rnm.sparsify(rnm.make_networks(args, rnm.make_env(args.env_id)), args)
            agent.qf1.load_state_dict(new["qf1"].state_dict())
        return update_agent(agent, rb, args, rng, update)

    monkeypatch.setattr(rnm, "update_agent", update)
    with pytest.raises(ValueError, match=r"qf1\.fc1: its target has another mask"):
        rnm.train(rnm.Args(**SMALL, n=1, m=4, mask_update_interval=0, kernel="torch", runs_dir=str(tmp_path)))


def test_weight_decay_of_a_fork_counts(mst, monkeypatch):
    """MST's flag is what make_adam is given, and no more."""
    seen = []
    monkeypatch.setattr(
        mst, "make_adam", lambda params, **options: seen.append(options) or torch.optim.AdamW(params, weight_decay=0.5)
    )
    args = mst.Args(env_id="Reach-v0", actor_hidden_dim=8, critic_hidden_dim=8, weight_decay=0.03)
    monkeypatch.setattr(mst, "Run", lambda *_: seen.append("run") or 1 / 0)
    agents, make = [], mst.Agent.__init__
    monkeypatch.setattr(mst.Agent, "__init__", lambda agent, *a, **o: agents.append(agent) or make(agent, *a, **o))
    with pytest.raises(ZeroDivisionError):
        mst.train(args)
    assert seen[:2] == [{"lr": 1e-4, "weight_decay": 0.03, "decoupled_weight_decay": True}] * 2 and seen[2] == "run"
    assert agents[0].q_optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_critic_without_the_norm_has_such_a_target(mst, monkeypatch):
    class Raw(mst.QNetwork):
        def __init__(self, *args):
            super().__init__(*args)
            self.obs_norm = nn.Identity()

    monkeypatch.setattr(mst, "QNetwork", Raw)
    monkeypatch.setattr(mst, "Run", lambda *_: 1 / 0)
    agents, make = [], mst.Agent.__init__
    monkeypatch.setattr(mst.Agent, "__init__", lambda agent, *a, **o: agents.append(agent) or make(agent, *a, **o))
    with pytest.raises(ZeroDivisionError):
        mst.train(mst.Args(env_id="Reach-v0", actor_hidden_dim=8, critic_hidden_dim=8))
    (agent,) = agents
    assert agent.qf1_target.obs_norm is agent.qf1.obs_norm and agent.target_actor.obs_norm is agent.actor.obs_norm
    assert type(agent.qf1.obs_norm) is nn.Identity and type(agent.actor.obs_norm) is mst.RunningNorm


def test_blocks_that_are_no_block_are_an_error(mst, monkeypatch):
    """They would stay dense."""

    class Wide(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

        def forward(self, h):
            return h + self.net(h)

    block = mst.Block
    monkeypatch.setattr(mst, "make_trunk", lambda i, d, _, o: nn.Sequential(nn.Linear(i, d), Wide(d), nn.Linear(d, o)))
    args = mst.Args(env_id="Reach-v0", actor_hidden_dim=8, critic_hidden_dim=8)
    networks = mst.make_networks(args, mst.make_env(args.env_id))
    with pytest.raises(ValueError, match="in a Block of the actor: make your blocks subclasses of Block"):
        mst.sparsify(networks, args)
    Wide.__bases__ = (block,)
    assert len(mst.sparse_layers(mst.sparsify(networks, args)["qf1"])) == 2


@pytest.mark.parametrize("nstep", [1, 2])
def test_a_column_more_in_the_middle_shifts_none(rlx2, nstep):
    columns = {"observations": 2, "actions": 1, "costs": 1, "next_observations": 2, "rewards": 1, "dones": 1}
    rb = rlx2.ReplayBuffer(10, columns | {"truncations": 1, "policy_actions": 1}, "cpu", 0.9)
    row = {"rewards": 1, "dones": 0, "truncations": 0, "policy_actions": 0}
    for i in range(6):
        row |= {"observations": [i, i], "next_observations": [i + 1, i + 1], "actions": i}
        with pytest.raises(TypeError, match="'costs'"):
            rb.add(**row)  # else it would keep what was there
        rb.add(**row, costs=7)
    with pytest.raises(AttributeError):
        rb.parts.costs = rb.parts.costs / 7  # else this would be no part of the rows any more
    assert rb.added == 6
    data = rb.sample(20, torch.Generator().manual_seed(1), nstep)
    assert not data.dones.any() and torch.equal(data.next_observations, data.observations + nstep)
    assert torch.allclose(data.rewards, torch.full((20, 1), sum(0.9**k for k in range(nstep))))
    assert torch.allclose(data.discounts, torch.full((20, 1), 0.9**nstep))


def test_model_pt_holds_all_of_a_network_or_there_is_none(rnm, tmp_path):
    args = rnm.Args(**SMALL, n=1, m=4)
    env = rnm.make_env(args.env_id)
    agent = rnm.Agent(rnm.sparsify(rnm.make_networks(args, env), args), lr=1e-3)
    rb = rnm.ReplayBuffer(20, rnm.transition_columns(env), "cpu")
    agent.qf1.net.fc1.gain = nn.Parameter(torch.arange(16.0))
    rnm.save_model(tmp_path / "model.pt", agent, rb)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["qf1"].keys() == saved["qf2"].keys() | {"fc1.gain"} and saved["qf1"]["fc1.gain"][5] == 5
    agent.qf1.fc3 = nn.Linear(2, 2)  # beside net.fc3
    with pytest.raises(ValueError, match="qf1 has tensors of one name"):
        rnm.save_model(tmp_path / "model.pt", agent, rb)
    assert torch.equal(
        torch.load(tmp_path / "model.pt", weights_only=True)["qf1"]["fc3.bias"], saved["qf1"]["fc3.bias"]
    )
