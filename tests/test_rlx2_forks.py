"""Forks of rlx2_td3_continuous.py, made from its text: each computes what its text says, across changes of topology."""

import math
import textwrap

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, load, read_meta, read_rows, stop_at
from test_forks import EDITS
from test_rlx2 import make, step

OWN_EDITS = {
    "step and change": [
        (
            "    if drop is None or not gradients:\n        optimizer.step()\n    else:",
            "    optimizer.step()\n    if drop is not None:",
        )
    ],
    "dense gradients at each update": [("critics if drop is not None else []", "critics")],
    "log score": [("score = gradient.abs() if", "score = gradient.abs().log() if")],
    "signed score": [("score = gradient.abs() if", "score = -1e9 * gradient if")],
    "summed gradients": [
        (
            "            score = gradient.abs() if",
            "            layer.sum.add_(gradient.abs())\n            score = layer.sum if",
        ),
        (
            "        self.shape = weight.shape",
            "        self.register_buffer('sum', 0 * weight)\n        self.shape = weight.shape",
        ),
    ],
    "random start": [("start = layer.active_weights.new_zeros(", "start = 0.01 * torch.randn(")],
}


@pytest.fixture
def fork(tmp_path):
    """fork(name): this script with an edit of test_forks, imported."""

    def make_fork(name):
        text = (ROOT / "rlx2_td3_continuous.py").read_text()
        for old, new in (EDITS | OWN_EDITS)[name]:
            if old.startswith("    qf_loss"):  # here it stands one level deeper
                old, new = textwrap.indent(old, "    "), textwrap.indent(new, "    ")
            assert old in text, (name, old)
            text = text.replace(old, new)
        (tmp_path / "fork").mkdir()
        path = tmp_path / "fork" / "rlx2_td3_continuous.py"
        path.write_text(text)
        return load(path)

    return make_fork


NAMES = "tanh", "layer norm", "residual", "third critic", "critic's forward", "layer's forward", "layer's weight"


@pytest.mark.parametrize("name", NAMES)
def test_forks_are_computed_as_they_say(rlx2, fork, name, monkeypatch):
    """With every kernel, over changes of the topology, which see the dense gradient of the edited network."""
    module, results, calls = fork(name), {}, []
    for key, script, kernel in (("nm", module, "nm"), ("torch", module, "torch"), ("unedited", rlx2, "torch")):
        used = "torch" if name.startswith("layer's") else kernel  # the kernels don't know it
        args, _, agent, rb, rng = make(script, kernel, mask_update_interval=8, used=used)
        forward = script.chain_forward
        with monkeypatch.context() as patch:
            patch.setattr(script, "chain_forward", lambda *a, f=forward, k=key, **o: calls.append(k) or f(*a, **o))
            for update in range(1, 21):
                before = script.get_masks(agent)
                step(script, agent, rb, args, rng, update)
                same = [torch.equal(E, before[layer]) for layer, E in script.get_masks(agent).items()]
                assert all(same) if update % 8 else not all(same)
        nets = {net: part for net, part in vars(agent).items() if isinstance(part, nn.Module)}
        results[key] = {f"{net}.{k}": x for net, part in nets.items() for k, x in script.plain_state(part).items()}
    assert calls.count("torch") == calls.count("unedited") == 0
    assert not calls if name.startswith("layer's") else len(calls) > 80
    assert results["nm"].keys() == results["torch"].keys()
    for key, x in results["torch"].items():
        assert (results["nm"][key] - x).abs().max() <= 1e-3, key
    original = results["unedited"]
    shared = results["torch"].keys() & original.keys()
    assert any(
        results["torch"][k].shape != original[k].shape or not torch.equal(results["torch"][k], original[k])
        for k in shared
    )


@pytest.mark.parametrize("name", ["third critic", "summed gradients"])
def test_forks_resume(fork, small, cli, monkeypatch, name):
    module = fork(name)
    monkeypatch.setattr("conftest.rlx2_td3_continuous", module)  # it wants the same flags
    whole = module.train(small(module))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, module, 317)
        part = module.train(small(module))["run_dir"]
    assert cli(module, "--resume", part, small=False)[0] == 0
    assert read_rows(whole) == read_rows(part) and read_meta(whole)["final_score"] == read_meta(part)["final_score"]
    assert ("sad/qf3" in read_rows(whole)[0]) == (name == "third critic")


@pytest.mark.parametrize("name", OWN_EDITS)
@pytest.mark.parametrize("kernel", ["nm", "torch"])
def test_forks_of_the_rule(fork, name, kernel):
    """Another order of step and change still learns at every update; other scores keep the number of weights."""
    module = fork(name)
    args, _, agent, rb, rng = make(module, kernel, mask_update_interval=4, drop_fraction=0.3)
    counts = {key: int(E.sum()) for key, E in module.get_masks(agent).items()}
    for update in range(1, 17):
        before = {net.name: module.plain_state(net.online) for net in agent.networks}
        step(module, agent, rb, args, rng, update)
        learns = name.startswith(("step", "dense")) and (update % 4 or name.startswith("step"))
        for net in agent.networks[1:]:
            after, masks = module.plain_state(net.online), module.get_masks(agent)
            for layer in ("fc1", "fc2"):
                both = masks[f"{net.name}.{layer}"] & (before[net.name][f"{layer}.weight"] != 0)
                moved = (after[f"{layer}.weight"] != before[net.name][f"{layer}.weight"])[both]
                assert moved.float().mean() > 0.5 if learns else True, (update, layer)
                if update % 4 == 0 and not name.startswith("step"):  # a change in the place of the step
                    grown = masks[f"{net.name}.{layer}"] & (before[net.name][f"{layer}.weight"] == 0)
                    start = after[f"{layer}.weight"][grown]
                    assert len(start) and bool(start.all()) == bool(start.any()) == (name == "random start")
                    assert torch.equal(module.plain_state(net.target)[f"{layer}.weight"][grown], start)
        for net in agent.networks:
            for layer in (*module.sparse_layers(net.online).values(), *module.sparse_layers(net.target).values()):
                assert len(set(layer.positions.tolist())) == len(layer.positions)
        assert {key: int(E.sum()) for key, E in module.get_masks(agent).items()} == counts


def test_an_error_within_leaves_no_patch_behind(rlx2):
    _, _, agent, _, _ = make(rlx2)
    with pytest.raises(RuntimeError), rlx2.dense_gradients(agent.networks[1:]) as weights:
        assert all("sparse_weight" in vars(layer) for layer in weights) and len(weights) == 4
        raise RuntimeError
    assert not any("sparse_weight" in vars(module) for module in agent.qf1.modules())


@pytest.mark.parametrize("kernel", ["nm", "torch"])
def test_a_frozen_layer_stays_as_it_is(rlx2, kernel):
    args, _, agent, rb, rng = make(rlx2, kernel, mask_update_interval=4, drop_fraction=0.5)
    agent.qf1.net.fc2.requires_grad_(False)
    before = {key: x.clone() for key, x in rlx2.plain_state(agent.qf1).items()}
    masks = rlx2.get_masks(agent)
    for update in range(1, 9):
        step(rlx2, agent, rb, args, rng, update)
    moved = {key for key, x in rlx2.plain_state(agent.qf1).items() if not torch.equal(x, before[key])}
    assert moved == {"fc1.weight", "fc1.bias", "fc3.weight", "fc3.bias"}
    changed = {name for name, E in rlx2.get_masks(agent).items() if not torch.equal(E, masks[name])}
    assert changed == masks.keys() - {"qf1.fc2"}


def test_an_optimizer_with_numbers_of_its_own(rlx2, monkeypatch):
    """NAdam keeps a product of its rates, beside its step, others an int: no number for each weight."""
    monkeypatch.setattr(rlx2, "make_adam", torch.optim.NAdam)
    args, _, agent, rb, rng = make(rlx2, "nm", mask_update_interval=4)
    masks = rlx2.get_masks(agent)
    for update in range(1, 10):
        for state in agent.q_optimizer.state.values():
            state["calls"] = update
        step(rlx2, agent, rb, args, rng, update)
    state = agent.q_optimizer.state[agent.qf1.net.fc1.active_weights]
    assert state["mu_product"].dim() == 0 and state["step"] == 7  # two changes took the place of steps
    assert not any(torch.equal(E, masks[name]) for name, E in rlx2.get_masks(agent).items())


def test_a_change_moves_each_number_once(rlx2):
    """Also if online and target network are one, and if an optimizer keeps its moments in dicts and lists."""
    _, _, agent, _, _ = make(rlx2)
    agent.qf1_target, (critic,) = agent.qf1, agent.networks[1:2]
    layers, old = rlx2.sparse_layers(critic.online).values(), {}
    for layer in layers:
        moments = [x * layer.active_weights.detach() for x in (2, 3)]
        agent.q_optimizer.state[layer.active_weights] = {"step": 7, "momenta": {0.9: moments[0], "more": [moments[1]]}}
        old[layer] = layer.sparse_weight().detach()
    with rlx2.dense_gradients([critic]) as gradients:
        sum(weight.sum() for weight in gradients.values()).backward()
    rlx2.change_topology(agent, [critic], gradients, 0.3, "set", rlx2.drop_and_grow)
    for layer in layers:
        state = agent.q_optimizer.state[layer.active_weights]
        stayed = layer.E & (old[layer] != 0)
        assert 0 < int(stayed.sum()) < len(layer.positions)
        assert torch.equal(layer.sparse_weight(), torch.where(stayed, old[layer], 0))
        for factor, x in ((2, state["momenta"][0.9]), (3, state["momenta"]["more"][0])):
            assert torch.equal(x, factor * layer.active_weights) and state["step"] == 7


def test_a_schedule_that_begins_late_gets_no_warning(rlx2, monkeypatch, capsys):
    args = make(rlx2)[0]
    for last in (999, 1000):  # updates are 1 to 999
        monkeypatch.setattr(rlx2, "drop_fractions", lambda _, x, __, last=last: {"actor": 0.1} if x == last else {})
        rlx2.check_schedule(args)
        warned = [line.split(" of ")[1].split()[0] for line in capsys.readouterr().err.splitlines() if " of " in line]
        assert warned == (["critics"] if last == 999 else ["critics", "actor"])


def test_a_rule_must_return_each_place_once(rlx2):
    _, _, agent, _, _ = make(rlx2)
    critics = agent.networks[1:]
    with rlx2.dense_gradients(critics) as gradients:
        sum(weight.square().sum() for weight in gradients.values()).backward()
    for change in (lambda places: places.clamp(min=7), lambda places: places.flip(0), lambda places: places[1:]):
        with pytest.raises(ValueError, match=r"qf1\.fc1: a rule returns as many places as before, each once"):
            rule = lambda layer, _score, _drop, change=change: change(layer.positions)  # noqa: E731
            rlx2.change_topology(agent, critics, gradients, 0.1, "rigl", rule)


def test_a_score_without_numbers_or_of_no_known_regime_is_refused(rlx2):
    _, _, agent, _, _ = make(rlx2)
    with rlx2.dense_gradients(agent.networks[1:]) as gradients:
        (math.nan * sum(weight.square().sum() for weight in gradients.values())).backward()
    with pytest.raises(FloatingPointError, match=r"qf1\.fc1: the gradient or the score"):
        rlx2.change_topology(agent, agent.networks[1:], gradients, 0.1, "rigl", rlx2.drop_and_grow)
    with pytest.raises(ValueError, match="no score for magnitude"):
        rlx2.change_topology(agent, agent.networks[1:], gradients, 0.1, "magnitude", rlx2.drop_and_grow)


def test_a_width_that_the_networks_do_not_have_is_not_named(rlx2, monkeypatch, small, capsys):
    make_networks = rlx2.make_networks
    monkeypatch.setattr(rlx2, "make_networks", lambda args, env: make_networks(rlx2.replace(args, hidden_dim=12), env))
    rlx2.train(small(rlx2, total_timesteps=120))
    assert "as many weights" not in capsys.readouterr().out


def test_a_second_actor_has_the_actors_sparsity_and_its_changes(rlx2, monkeypatch):
    make_networks = rlx2.make_networks
    monkeypatch.setattr(
        rlx2, "make_networks", lambda args, env: make_networks(args, env) | {"actor2": rlx2.Actor(env, args.hidden_dim)}
    )
    args, env, *_ = make(rlx2)
    networks = rlx2.sparsify(rlx2.make_networks(args, env), args)
    kept = {
        name: [len(layer.positions) for layer in rlx2.sparse_layers(net).values()] for name, net in networks.items()
    }
    assert kept["actor2"] == kept["actor"] and kept["qf1"] == kept["qf2"] and sum(kept["qf1"]) > sum(kept["actor"])

    class Agent(rlx2.Agent):  # both actors' mean is what acts in the loss
        def __init__(self, networks, **adam):
            super().__init__(networks, **adam)
            self.actor_optimizer.add_param_group({"params": [*self.actor2.parameters()]})
            self.actor.register_forward_hook(lambda _module, x, y: (y + self.actor2(*x)) / 2)

    monkeypatch.setattr(rlx2, "Agent", Agent)
    args, _, agent, rb, rng = make(rlx2, mask_update_interval=4)
    masks = rlx2.get_masks(agent)
    for update in range(1, 9):
        step(rlx2, agent, rb, args, rng, update)
    assert not any(torch.equal(E, masks[name]) for name, E in rlx2.get_masks(agent).items())
