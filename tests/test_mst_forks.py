"""Forks of mst_td3_continuous.py, made from its text: each computes what its text says, across changes of masks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, drops_at, load, read_meta, read_rows, stop_at
from test_mst import agent_of, batch, spaces

EDITS = {
    "tanh": [('"relu": nn.ReLU()}', '"relu": nn.Tanh()}')],
    "no norm": [('"norm": nn.LayerNorm(d, eps=1e-6), "fc1"', '"norm": nn.Identity(), "fc1"')],
    "no residual": [("return h + self.net(h)", "return self.net(h)")],
    "layer's forward": [
        (
            "return F.linear(x, self.sparse_weight(), self.bias)",
            "return F.linear(x, self.sparse_weight(), self.bias) / 2",
        )
    ],
    "layer's weight": [
        (".put(self.positions, self.active_weights)", ".put(self.positions, self.active_weights).tanh()")
    ],
    "third critic": [
        ("for _ in range(2)]", "for _ in range(3)]"),
        ('"qf2": critics[1]}', '"qf2": critics[1], "qf3": critics[2]}'),
        ("[qf1_a_values, qf2_a_values]", "[qf1_a_values, qf2_a_values, agent.qf3(data.observations, data.actions)]"),
    ],
    "step and change": [
        (
            "    if drop is None or not gradients:\n        optimizer.step()\n    else:",
            "    optimizer.step()\n    if drop is not None:",
        )
    ],
}
OPTIONS = {"actor_hidden_dim": 8, "critic_hidden_dim": 16, "batch_size": 32, "critic_nm": "2:4", "actor_regime": "rigl"}


@pytest.fixture
def fork(tmp_path):
    def make_fork(name):
        text = (ROOT / "mst_td3_continuous.py").read_text()
        for old, new in EDITS[name]:
            assert old in text, (name, old)
            text = text.replace(old, new)
        (tmp_path / "fork").mkdir()
        path = tmp_path / "fork" / "mst_td3_continuous.py"
        path.write_text(text)
        return load(path)

    return make_fork


def test_a_fork_that_kernels_would_miss_is_refused(fork):
    module = fork("layer's weight")
    args, env = module.Args(**OPTIONS), spaces(11, 3)
    agent = module.Agent(module.sparsify(module.make_networks(args, env), args), lr=args.learning_rate)
    with pytest.raises(module.UserError, match="use --kernel torch"):
        module.use_kernel(args, agent, env)


@pytest.mark.parametrize("name", [name for name in EDITS if name != "layer's weight"])
def test_forks_are_computed_as_they_say(mst, fork, name, monkeypatch):
    module, results, calls = fork(name), {}, []
    for key, script, kernel in (("nm", module, "nm"), ("torch", module, "torch"), ("unedited", mst, "torch")):
        args, env = script.Args(**OPTIONS, kernel=kernel, mask_update_interval=4, learning_rate=3e-3), spaces(11, 3)
        args = replace(args, total_timesteps=args.learning_starts + 1000)
        torch.manual_seed(0)
        agent = script.Agent(script.sparsify(script.make_networks(args, env), args), lr=args.learning_rate)
        script.use_kernel(args, agent, env)
        forward, generator = script.chain_forward, torch.Generator().manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(script, "chain_forward", lambda *a, f=forward, k=key, **o: calls.append(k) or f(*a, **o))
            for update in range(1, 13):
                drops, before = drops_at(script, args, update), script.get_masks(agent)
                data = batch(seed=update)
                script.update_critics(agent, data, args, generator, drops.get("critic"))
                if update % 2 == 0:
                    script.update_actor(agent, data, args, drops.get("actor"))
                    script.update_targets(agent, args.tau)
                moved = {layer for layer, E in script.get_masks(agent).items() if not torch.equal(E, before[layer])}
                assert bool(moved) == (update % 4 == 0)
                assert any(layer.startswith("actor") for layer in moved) == (update == 8)  # its own fourth update
        nets = {net.name: net.online for net in agent.networks} | {"target": agent.qf1_target}
        results[key] = {f"{net}.{k}": x for net, part in nets.items() for k, x in script.plain_state(part).items()}
    assert calls.count("torch") == calls.count("unedited") == 0
    assert not calls if name.startswith("layer's") else len(calls) > 80
    assert results["nm"].keys() == results["torch"].keys()
    for key, x in results["torch"].items():
        assert (results["nm"][key] - x).abs().max() <= 1e-3, key
    shared = results["torch"].keys() & results["unedited"].keys()
    same = [torch.equal(results["torch"][key], results["unedited"][key]) for key in shared]
    assert not all(same) or name == "third critic"


@pytest.mark.parametrize("name", ["third critic", "tanh"])
def test_forks_run_and_resume(fork, small, cli, monkeypatch, name):
    module = fork(name)
    monkeypatch.setattr("conftest.mst_td3_continuous", module)  # it wants the same flags
    options = {"total_timesteps": 400, "diagnostics_interval": 100}
    whole = module.train(small(module, **options))["run_dir"]
    with monkeypatch.context() as patch:
        stop_at(patch, module, 233)
        part = module.train(small(module, **options))["run_dir"]
    assert cli(module, "--resume", part, small=False)[0] == 0
    assert read_rows(whole) == read_rows(part) and read_meta(whole)["final_score"] == read_meta(part)["final_score"]
    last = read_rows(whole)[-1]
    nets = {"actor", "qf1", "qf2", "qf3"} if name == "third critic" else {"actor", "qf1", "qf2"}
    assert {key.split("/")[1] for key in last if key.startswith("plasticity/")} == nets
    for net in nets:
        assert 0 <= float(last[f"plasticity/{net}/dormant"]) <= 1 and float(last[f"plasticity/{net}/gradient_norm"]) > 0


def test_a_learned_normalisation_has_a_target_of_its_own(mst, monkeypatch, small):
    class Norm(torch.nn.LayerNorm):
        def update(self, _obs):
            pass

    def make_networks(args, env, make=mst.make_networks):
        nets = make(args, env)
        for net in nets.values():
            net.obs_norm = Norm(env.observation_space.shape)
        return nets

    monkeypatch.setattr(mst, "make_networks", make_networks)
    run = mst.train(small(mst, total_timesteps=200))["run_dir"]
    model = torch.load(Path(run, "model.pt"), weights_only=True)
    online, target = ((model[net]["obs_norm.weight"] - 1).abs().max() for net in ("qf1", "qf1_target"))
    assert 0 < target < 0.5 * online


def test_an_encoder_stays_dense_and_takes_nothing_from_the_critics(mst):
    args, env = mst.Args(**OPTIONS | {"critic_nm": None}), spaces(11, 3)
    encoder = torch.nn.Sequential(mst.Block(64), mst.Block(64))
    densities = []
    for more in ({}, {"encoder": encoder}):
        sparse = mst.sparsify(mst.make_networks(args, env) | more, args)
        densities.append([layer.E.double().mean() for layer in mst.sparse_layers(sparse["qf1"]).values()])
    assert densities[0] == densities[1] and len(densities[0]) == 4
    assert not mst.sparse_layers(encoder)


def test_a_critic_of_another_name_is_seen_to_be_dense(mst, monkeypatch, small, capsys):
    make_networks = mst.make_networks
    monkeypatch.setattr(mst, "make_networks", lambda *a: make_networks(*a) | {"critic3": make_networks(*a)["qf2"]})
    mst.train(small(mst, total_timesteps=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("active weights of ")]
    shares = "embedding 100 %, block1.net.fc1 40.2 %, block1.net.fc2 40.2 %, head 100 %"
    wanted = {net: shares for net in ("actor", "qf1", "qf2")} | {"critic3": shares.replace("40.2", "100")}
    lines = {line[18:].partition(": all ")[0]: line.partition(" %, ")[::2] for line in lines}
    assert {net: rest for net, (_, rest) in lines.items()} == wanted
    assert lines["critic3"][0].endswith(": all 100") and 40.2 < float(lines["qf1"][0].split()[-1]) < 100


def test_a_sparse_layer_is_not_reset_by_a_loop_over_all(mst, rlx2, rnm):
    linear = nn.Linear(4, 4)
    layers = (
        mst.SparseLinear(linear, torch.eye(4) > 0, None),
        rlx2.SparseLinear(linear, 8),
        rnm.SparseLinear(linear, 2, 4),
    )
    for layer in layers:
        with pytest.raises(NotImplementedError, match=r"docs/forking\.md"):
            layer.reset_parameters()


@pytest.mark.parametrize("name", ["n", "m"])
def test_a_field_n_or_m_alone_is_no_pattern(tmp_path, small, name):
    """Such as a fork's n of n-step returns."""
    path = tmp_path / "dense_td3_continuous.py"
    text = (ROOT / "dense_td3_continuous.py").read_text()
    path.write_text(text.replace("    hidden_dim: ", f'    {name}: Positive = 3\n    """steps"""\n    hidden_dim: ', 1))
    module = load(path)
    meta = read_meta(module.train(small(module, env_id="Reach-v0", total_timesteps=1))["run_dir"])
    assert (meta["args"][name], meta["n"], meta["m"], meta["pattern"]) == (3, None, None, "dense")


def test_one_relu_for_all_blocks_counts_in_each(mst):
    """Dormant units are told by what a loss computes, whichever module does it."""
    rows = []
    for shared in (False, True):
        agent, args = agent_of(mst, critic_blocks=2)
        rb = mst.ReplayBuffer(50, mst.transition_columns(spaces(11, 3)), "cpu")
        for seed in range(40):
            rb.add(**{key: x[0].numpy() for key, x in vars(batch(seed=seed, rows=1)).items()})
        agent.qf1.net.block2.net.fc1.bias.data[:20] = -9
        if shared:
            agent.qf1.net.block2.net.relu = agent.qf1.net.block1.net.relu
        state = mst.State()
        state.ever = mst.get_masks(agent)
        rows.append(mst.diagnose(agent, rb, args, state, state.ever))
    assert rows[0] == rows[1] and rows[0]["plasticity/qf1/dormant"] > rows[0]["plasticity/qf2/dormant"]


def test_diagnostics_leave_a_replay_that_counts_its_batches_alone(mst, monkeypatch):
    agent, args = agent_of(mst)
    rb, sample = mst.ReplayBuffer(50, mst.transition_columns(spaces(11, 3)), "cpu"), mst.ReplayBuffer.sample
    rb.add(**{key: x[0].numpy() for key, x in vars(batch(rows=1)).items()})
    rb.beta, called = 0.4, []

    def prioritized(rb, *args):
        rb.beta += 0.1
        called.append(rb)
        return sample(rb, *args)

    monkeypatch.setattr(mst.ReplayBuffer, "sample", prioritized)
    state = mst.State()
    state.ever = mst.get_masks(agent)
    assert mst.diagnose(agent, rb, args, state, state.ever) and len(called) == 1 and rb.beta == 0.4


def test_a_parametrized_layer_is_counted(mst):
    agent, _ = agent_of(mst)
    before = mst.model_stats(agent)
    torch.nn.utils.parametrizations.spectral_norm(agent.qf1.net.embedding)
    after = mst.model_stats(agent)
    assert after["density"] == before["density"] and 0 < after["density"]["qf1"] < 1
    assert {"name": "embedding", "type": "ParametrizedLinear"}.items() <= after["modules"]["qf1"][1].items()
