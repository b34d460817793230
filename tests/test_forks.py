"""Forks made from the script's own text, as a user would: each must compute what its text says, with every kernel."""

import csv
import importlib.util
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

SOURCE = (ROOT / "rnm_td3_continuous.py").read_text()
CRITIC = '"fc1": nn.Linear(obs_dim + action_dim, hidden_dim), "relu1": nn.ReLU()}'
EDITS = {
    "unedited": [],
    "tanh": [("nn.ReLU()", "nn.Tanh()")],
    "layer norm": [
        (CRITIC, CRITIC.replace(', "relu1"', ', "norm1": nn.LayerNorm(hidden_dim), "relu1"')),
    ],
    "residual": [
        (
            "        return self.net(torch.cat([x, a], dim=1))",
            "        h = self.net.relu1(self.net.fc1(torch.cat([x, a], dim=1)))\n"
            "        return self.net.fc3(h + self.net.relu2(self.net.fc2(h)))",
        )
    ],
    "third hidden layer": [
        (
            '        layers |= {"fc3": nn.Linear(hidden_dim, 1)}',
            '        layers |= {"fc2b": nn.Linear(hidden_dim, hidden_dim), "relu2b": nn.ReLU()}\n'
            '        layers |= {"fc3": nn.Linear(hidden_dim, 1)}',
        )
    ],
    "third critic": [
        ('"qf2": QNetwork}', '"qf2": QNetwork, "qf3": QNetwork}'),
        (
            "        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)",
            "        qf3_next_target = agent.qf3_target(data.next_observations, next_state_actions)\n"
            "        min_qf_next_target = torch.min(torch.min(qf1_next_target, qf2_next_target), qf3_next_target)",
        ),
        (
            "    qf_loss = qf1_loss + qf2_loss\n",
            "    qf3_a_values = agent.qf3(data.observations, data.actions)\n"
            "    qf3_loss = F.mse_loss(qf3_a_values, next_q_value)\n"
            "    qf_loss = qf1_loss + qf2_loss + qf3_loss\n",
        ),
        (
            '        "losses/qf1_loss": qf1_loss.detach(),\n',
            '        "losses/qf1_loss": qf1_loss.detach(),\n'
            '        "losses/qf3_values": qf3_a_values.detach(),\n'
            '        "losses/qf3_loss": qf3_loss.detach(),\n',
        ),
    ],
    "growing K": [
        (
            "        self.losses = {}  # of the last update",
            "        self.next_refresh, self.K = 50, 50\n        self.losses = {}  # of the last update",
        ),
        ("state.update // K > before // K", "state.update == state.next_refresh"),
        (
            "                    refresh_masks(agent)\n",
            "                    refresh_masks(agent)\n"
            "                    state.K = int(1.5 * state.K)\n"
            "                    state.next_refresh += state.K\n",
        ),
    ],
    "column-wise groups": [
        (
            '        E = project(self.W, n, m)\n        self.register_buffer("positions"',
            '        E = project(self.W.T, n, m).T\n        self.register_buffer("positions"',
        ),
        (
            "            E = project(layer.W, layer.n, layer.m)",
            "            E = project(layer.W.T, layer.n, layer.m).T",
        ),
    ],
    "unequal rows": [
        (
            "    return E.view(len(W), -1)[:, : W.shape[1]].contiguous()",
            "    kept = n * (W.shape[1] // m) + min(n, W.shape[1] % m)\n"
            "    best = W.abs().flatten().argsort(descending=True)[: kept * len(W)]\n"
            "    return torch.zeros(W.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(W)",
        )
    ],
    "critic's forward": [
        (
            "        return self.net(torch.cat([x, a], dim=1))",
            "        return 2 * self.net(torch.cat([x, a], dim=1)) + 1",
        )
    ],
    "random masks": [
        ("    magnitude = F.pad(W.abs(), (0", "    magnitude = F.pad(W.abs() * torch.rand(W.shape), (0"),
    ],
    "layer's forward": [
        (
            "        return F.linear(x, self.sparse_weight(), self.bias)\n",
            "        return F.linear(x, 1.5 * self.sparse_weight(), self.bias)\n",
        )
    ],
    "layer's weight": [
        (
            "        return self.active_weights.new_zeros(self.shape).put(",
            "        return 1.5 * self.active_weights.new_zeros(self.shape).put(",
        )
    ],
    "dropout": [
        ('"relu1": nn.ReLU()}', '"relu1": nn.ReLU(), "drop1": nn.Dropout(0.1)}'),
    ],
}
SAME_NETWORKS = ("unedited", "growing K")  # these first differ in training


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """forks(name): the edited script, imported."""
    folder, made = tmp_path_factory.mktemp("forks"), {}

    def fork(name: str):
        if name not in made:
            text = SOURCE
            for old, new in EDITS[name]:
                assert old in text, (name, old)
                text = text.replace(old, new)
            path = folder / name.replace(" ", "_").replace("'", "") / "rnm_td3_continuous.py"
            path.parent.mkdir()
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(f"fork_{len(made)}", path)
            made[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(made[name])
            made[name].hardware_report = lambda *_: None
        return made[name]

    return fork


def updated(module, kernel: str, n=1, m=4, updates=20) -> dict[str, torch.Tensor]:
    """Every network's parameters after some updates on fixed batches, and how often the kernels were called."""
    args = module.Args(env_id="Reach-v0", n=n, m=m, hidden_dim=32, batch_size=48, kernel=kernel)
    env, rng = module.make_env(args.env_id), module.make_generators(3, "cpu")
    torch.manual_seed(1)
    networks = module.sparsify(module.make_networks(args, env), args)
    agent = module.Agent(networks, lr=args.learning_rate)
    used = module.use_kernel(args, agent, env)
    rb, data = module.ReplayBuffer(500, module.transition_columns(env), "cpu"), np.random.default_rng(0)
    for _ in range(500):
        row = {name: data.normal(size=width) for name, width in module.transition_columns(env).items()}
        rb.add(**row | {"dones": data.random() < 0.1})
    calls, chain_forward = [], module.chain_forward
    module.chain_forward = lambda chain, *rest, **keep: calls.append(len(chain)) or chain_forward(chain, *rest, **keep)
    torch.manual_seed(2)
    for update in range(1, updates + 1):
        module.update_agent(agent, rb, args, rng, update)
    module.chain_forward = chain_forward
    nets = {name: part for name, part in vars(agent).items() if isinstance(part, torch.nn.Module)}
    return {f"{net}.{key}": x for net in nets for key, x in module.plain_state(nets[net]).items()}, calls, used


@pytest.mark.parametrize("name", EDITS)
def test_kernels_and_torch_agree_and_the_edit_shows(forks, name, capsys):
    module = forks(name)
    (nm, calls, used), (reference, none, _) = updated(module, "nm"), updated(module, "torch")
    assert not none and used == ("torch" if name.startswith("layer's") else "nm")
    if name.startswith("layer's"):
        assert not calls and "the kernels don't know the edited SparseLinear" in capsys.readouterr().err
    else:  # 7 networks a pair of updates, and what remains fusible is fused
        assert len(calls) >= 20 * 5, name
        assert max(calls) == {"tanh": 1, "third hidden layer": 4, "dropout": 2}.get(name, 3)
    assert nm.keys() == reference.keys()
    for key, x in reference.items():
        assert (nm[key] - x).abs().max() <= 1e-3, key
    original = updated(forks("unedited"), "torch")[0]
    same = original.keys() == reference.keys() and all(torch.equal(x, original[key]) for key, x in reference.items())
    assert same == (name in SAME_NETWORKS)


def rows(run: Path) -> list[dict]:
    clocks = ("SPS", "time", "ms", "wall", "hardware")
    with open(run / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in csv.DictReader(file)]


def trained(module, folder: Path, kernel: str, stop_at: int | None = None) -> Path:
    """A run of 400 steps; with stop_at it is stopped by SIGTERM at that update and resumed."""
    flags = "--env-id Reach-v0 --hidden-dim 16 --batch-size 16 --learning-starts 100 --total-timesteps 400 --n 1 --m 4"
    flags += f" --mask-update-interval 60 --eval-interval 150 --eval-episodes 2 --no-track --kernel {kernel}"
    update_agent = module.update_agent

    def stopping(agent, rb, args, rng, update):
        if update == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_agent(agent, rb, args, rng, update)

    module.update_agent = stopping
    result = module.train(module.parse_args([*flags.split(), "--runs-dir", str(folder)]))
    module.update_agent = update_agent
    if stop_at:
        assert result["exit_reason"] == "sigterm"
        result = module.train(module.parse_args(["--resume", result["run_dir"]]))
    assert result["exit_reason"] == "finished"
    return Path(result["run_dir"])


IN_TORCH = "unedited", "third critic"  # the others' updates were compared with torch's above
RUNS = [("nm", name) for name in EDITS] + [("torch", name) for name in IN_TORCH]


@pytest.mark.parametrize("kernel, name", RUNS)
def test_forks_train_refresh_and_resume(forks, tmp_path, name, kernel):
    module = forks(name)
    whole = trained(module, tmp_path / "whole", kernel)
    resumed = trained(module, tmp_path / "resumed", kernel, stop_at=110)
    assert rows(whole) == rows(resumed)
    models = [torch.load(run / "model.pt", weights_only=True) for run in (whole, resumed)]
    for net, state in models[0].items():
        for key, x in state.items() if isinstance(state, dict) else enumerate(state):
            assert torch.equal(x, models[1][net][key]), (net, key)
    with np.load(whole / "masks.npz") as masks:
        layers = [key for key in masks if key + ".shape" in masks]
        nets = {key.split(".")[0] for key in layers}
        assert nets == {"actor", "qf1", "qf2"} | ({"qf3"} if name == "third critic" else set())
        updates = masks["update"].tolist()
        assert updates == ([0, 50, 125, 237] if name == "growing K" else [0, 60, 120, 180, 240])
        for net in nets:
            assert any((masks[key][0] != masks[key][-1]).any() for key in layers if key.startswith(net)), net
    evaluated = module.evaluate_run(module.parse_args(["--evaluate", str(whole)])) if name != "layer's forward" else 0
    assert evaluated == 0


def test_a_policy_that_plain_layers_do_not_give_is_refused(forks, tmp_path):
    module = forks("layer's forward")
    run = trained(module, tmp_path, "torch")
    with pytest.raises(module.UserError, match="plain layers do not act"):
        module.evaluate_run(module.parse_args(["--evaluate", str(run)]))


def test_an_edit_that_the_kernels_would_miss_is_an_error(forks, small):
    text = SOURCE.replace("a[i] += b[i];", "a[i] = 1.006f * (a[i] + b[i]);")  # in the C code: outputs 2 % off
    assert text != SOURCE
    EDITS["C code"] = [(SOURCE, text)]
    try:
        module = forks("C code")
    finally:
        del EDITS["C code"]
    with pytest.raises(module.UserError, match=r"actor.*--kernel torch"):
        module.train(small(module, n=1, m=4, hidden_dim=16, kernel="nm"))
    assert module.train(small(module, n=1, m=4, hidden_dim=16, kernel="torch"))["exit_reason"] == "finished"


def assert_same_under_hooks(net, plain, x):
    """Each kind of hook, and weights of its own, on a layer and where it can be on a ReLU."""
    kinds = {
        "register_forward_pre_hook": lambda _module, x: (3 * x[0],),
        "register_forward_hook": lambda _module, _x, y: 3 * y,
        "register_full_backward_pre_hook": lambda _module, dy: (3 * dy[0],),
        "register_full_backward_hook": lambda _module, dx, _dy: (3 * dx[0],),
    }
    for name, (kind, hook) in itertools.product(("fc2", "relu2"), kinds.items()):
        results, handles = [], [getattr(getattr(net, name), kind)(hook) for net in (net, plain)]
        for own in (net, plain):
            y = own(x)
            results.append([y, *torch.autograd.grad(y.sum(), [*own.parameters()][:2])])  # of the first layer
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-4), (name, kind)
        for handle in handles:
            handle.remove()
    for own in (net, plain):
        own.fc2.sparse_weight = lambda weight=own.fc2.sparse_weight: 2 * weight()
    assert torch.allclose(net(x), plain(x), atol=1e-5)
    del net.fc2.sparse_weight, plain.fc2.sparse_weight


def test_hooks_and_other_inputs_are_honoured(forks):
    """What the kernels can't take runs in torch: hooks, float64, one-dimensional inputs, replaced forwards."""
    module = forks("unedited")
    args = module.Args(env_id="Reach-v0", n=1, m=4, hidden_dim=32, kernel="nm")
    env = module.make_env(args.env_id)
    net = module.sparsify(module.make_networks(args, env), args)["qf1"]
    plain = module.copy.deepcopy(net)
    module.fuse(net)
    x = torch.randn(7, 5)
    for case in (x, x[0], x.expand(3, 7, 5), x.T.contiguous().T):
        assert torch.allclose(net.net(case), plain.net(case), atol=1e-5)
    assert torch.allclose(module.copy.deepcopy(net).double().net(x.double()), plain.double().net(x.double()))
    plain.float()
    assert_same_under_hooks(net.net, plain.net, x)
    seen = []
    handle = net.net.relu1.register_forward_hook(lambda _module, _x, y: seen.append(y) or 2 * y)
    plain_handle = plain.net.relu1.register_forward_hook(lambda _module, _x, y: 2 * y)
    assert torch.allclose(net.net(x), plain.net(x), atol=1e-5) and len(seen) == 1
    handle.remove(), plain_handle.remove()
    net.net.fc2.forward = plain.net.fc2.forward = lambda x: x + 1
    assert torch.allclose(net.net(x), plain.net(x), atol=1e-5)
    with pytest.raises(RuntimeError):
        net.net(torch.randn(7, 6))


def odd_parameters():
    """Edits of a layer's parameters, each with what torch makes of it."""

    def shape_of_bias(net):
        net.net.fc1.bias = torch.nn.Parameter(torch.ones(1))  # broadcasts in torch

    def wrong_bias(net):
        net.net.fc2.bias = torch.nn.Parameter(torch.ones(3))

    def stride(net):
        net.net.fc2.active_weights.data = torch.arange(16.0 * 32)[::2] / 100

    def expanded(net):
        net.net.fc2.bias.data = torch.ones(1).expand(32)

    def transposed_head(net):
        net.net.fc3.weight = torch.nn.Parameter(torch.ones(32, 1).t())

    def double_bias(net):
        net.net.fc1.bias.data = net.net.fc1.bias.data.double()

    def other_number(net):
        net.net.fc1.active_weights = torch.nn.Parameter(torch.ones(3))

    def no_bias(net):
        net.net.fc1.bias = None

    def new_mask(net):
        net.net.fc2.set_mask(net.net.fc2.E.roll(1, 1))

    def other_positions(net):
        net.net.fc2.positions = net.net.fc2.E.roll(1, 1).flatten().nonzero()[:, 0]

    return [f for f in locals().values() if callable(f)]


@pytest.mark.parametrize("edit", odd_parameters(), ids=lambda edit: edit.__name__)
def test_odd_parameters_give_what_torch_gives(forks, edit):
    module = forks("unedited")
    args = module.Args(env_id="Reach-v0", n=1, m=4, hidden_dim=32, kernel="nm")
    net = module.sparsify(module.make_networks(args, module.make_env(args.env_id)), args)["qf1"]
    plain, x = module.copy.deepcopy(net), torch.randn(70, 5)
    module.fuse(net)
    net.net(x)  # so that the kernels have seen it as it was
    edit(net), edit(plain)
    try:
        wanted = plain.net(x)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            net.net(x)
    else:
        got = net.net(x)
        assert torch.allclose(got, wanted, atol=1e-4)
        got.sum().backward(), wanted.sum().backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-3), edit.__name__


def test_what_sparsify_does_not_know_is_an_error(forks):
    module = forks("unedited")
    nn, args = torch.nn, module.Args(n=1, m=4, hidden_dim=16)

    class Noisy(nn.Linear):
        pass

    shared, hooked = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    for body in ([Noisy(8, 8)], [shared, shared], [hooked], [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))]):
        with pytest.raises(ValueError, match="sparsify does not know"):
            module.sparsify({"net": nn.Sequential(*body, nn.Linear(8, 1))}, args)
    two = {name: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)) for name in ("qf1", "qf2")}
    two["qf2"][0].weight = two["qf1"][0].weight  # shared by two networks
    with pytest.raises(ValueError, match="weights that are used twice"):
        module.sparsify(two, args)
    net = module.sparsify({"net": nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 1))}, args)["net"]
    plain = module.copy.deepcopy(net)
    module.fuse(net)
    assert torch.allclose(net(torch.eye(8)), plain(torch.eye(8)))
    assert module.plain_state(net).keys() == {"0.weight", "2.weight", "2.bias"}


@pytest.mark.parametrize("fault", ["target", "wrapped", "name"])
def test_masks_that_would_go_astray_are_an_error(forks, fault):
    """A target with another mask or with other names (as torch.compile(net) makes them), two layers of one name."""
    module = forks("unedited")
    args = module.Args(env_id="Reach-v0", n=1, m=4, hidden_dim=16, kernel="torch")
    networks = module.make_networks(args, module.make_env(args.env_id))
    agent = module.Agent(module.sparsify(networks, args), lr=args.learning_rate)
    module.refresh_masks(agent)
    if fault == "target":
        agent.qf1_target.net.fc2.set_mask(agent.qf1.net.fc2.E.roll(1, 1))
    elif fault == "wrapped":
        agent.qf1 = torch.nn.Sequential(agent.qf1)
    else:
        agent.qf1.fc1 = module.copy.deepcopy(agent.qf1.net.fc1)
    with pytest.raises(
        ValueError, match="two layers of one name" if fault == "name" else "its target has another mask"
    ):
        module.get_masks(agent)  # before each refresh


def test_copies_have_an_index_of_their_own(forks):
    """A deepcopy made after any refresh computes what it holds, also when the original has moved on."""
    module = forks("unedited")
    args = module.Args(env_id="Reach-v0", n=1, m=4, hidden_dim=32, kernel="nm")
    env = module.make_env(args.env_id)
    networks = module.sparsify(module.make_networks(args, env), args)
    agent = module.Agent(networks, lr=args.learning_rate)
    assert module.use_kernel(args, agent, env) == "nm"
    obs, copies = torch.randn(8, 3), []
    for _ in range(4):
        agent.actor(obs)
        with torch.no_grad():
            for param in agent.actor.parameters():
                param.normal_()
        masks = module.get_masks(agent)
        module.refresh_masks(agent)
        assert any((masks[key] != E).any() for key, E in module.get_masks(agent).items())
        copies.append(module.copy.deepcopy(agent.actor))
    for policy in copies:
        x = obs
        for name in ("fc1", "fc2", "fc_mu"):
            layer = getattr(policy.net, name)
            weight = layer.weight if name == "fc_mu" else layer.sparse_weight()
            x = torch.nn.functional.linear(x, weight, layer.bias)
            x = x if name == "fc_mu" else x.relu()
        x = torch.tanh(x) * policy.action_scale + policy.action_bias
        assert torch.allclose(policy(obs), x, atol=1e-5)


def test_the_comparison_at_the_start_changes_nothing(forks, capsys):
    """Batch norm keeps its statistics; a forward that can't be called with a batch is said and goes on."""
    module = forks("unedited")
    args = module.Args(env_id="Reach-v0", n=1, m=4, hidden_dim=32, kernel="nm")
    env = module.make_env(args.env_id)
    networks = module.make_networks(args, env)
    layers = [
        ("norm", nn.BatchNorm1d(32)) if name == "relu1" else (name, x)
        for name, x in networks["qf1"].net.named_children()
    ]
    networks["qf1"].net = nn.Sequential(module.OrderedDict(layers))

    class Told(module.Actor):
        def forward(self, x, deterministic=False):
            return super().forward(x) * (1 if deterministic else 0.5)

    class Three(module.QNetwork):
        def forward(self, x, a, taus):
            return super().forward(x, a) * taus

    networks |= {"actor": Told(env, 32), "qf2": Three(env, 32)}
    agent = module.Agent(module.sparsify(networks, args), lr=args.learning_rate)
    generator = torch.get_rng_state()
    assert module.use_kernel(args, agent, env) == "nm" and torch.equal(torch.get_rng_state(), generator)
    assert agent.qf1.net.norm.num_batches_tracked == 0 and not agent.qf1.net.norm.running_mean.any()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "qf2 was not compared with --kernel torch: " in err and "taus" in err


def test_which_kernel_auto_takes(forks, monkeypatch):
    """Without AVX 2:4 is slower than dense; N = M is dense. What is typed is done."""
    module = forks("unedited")
    lanes = module.load_kernels().nm_lanes
    wanted = {(2, 4, 64): "nm", (2, 4, 16): "torch", (1, 4, 16): "nm", (4, 4, 64): "torch"}
    for (n, m, found), kernel in wanted.items():
        for typed in ("auto", "nm", "torch"):
            args = module.Args(env_id="Reach-v0", n=n, m=m, hidden_dim=32, kernel=typed)
            env = module.make_env(args.env_id)
            agent = module.Agent(module.sparsify(module.make_networks(args, env), args), lr=args.learning_rate)
            first = iter([found])  # the question whether there is AVX
            monkeypatch.setattr(module.load_kernels(), "nm_lanes", lambda first=first: next(first, None) or lanes())
            assert module.use_kernel(args, agent, env) == (kernel if typed == "auto" else typed)
