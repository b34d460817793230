"""Whole runs: their files, the order of things, random streams, provenance."""

import ast
import itertools
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import (
    NETS,
    ROOT,
    assert_same_model,
    assert_same_run,
    draw_everywhere,
    load,
    read_meta,
    read_model,
    read_rows,
    steps_with,
)

COMPILER = shutil.which(os.environ.get("CC", "cc"))


@pytest.mark.parametrize("script", ["dense", "mst"], indirect=True)  # MST's also normalises
def test_an_environment_may_return_one_array(script, small):
    """Which its next step changes: what was stored of it before stays."""
    runs = [script.train(small(script, env_id=env_id))["run_dir"] for env_id in ("Reach-v0", "InPlace-v0")]
    assert_same_run(*runs)


def test_a_run_leaves_the_contract_behind(rnm, small, capsys):
    args = small(rnm, n=1, m=4, mask_update_interval=100, total_timesteps=2100, learning_starts=200)
    result = rnm.train(args)
    run = Path(result["run_dir"])
    assert result["exit_reason"] == "finished"
    share = (args.hidden_dim * (1 + args.hidden_dim / 4 + 2)) / (args.hidden_dim * (3 + args.hidden_dim + 2))
    said = f"started\nactive weights of actor: all {100 * share:.3g} %, fc1 33.3 %, fc2 25 %, fc_mu 100 %\n"
    assert said in capsys.readouterr().out  # of three and of five inputs one in each four
    assert re.fullmatch(r"Reach-v0__rnm_td3_continuous_1of4__s1__\d{8}-\d{6}-\d{6}", run.name)
    names = {"masks.npz", "meta.json", "metrics.csv", "model.pt", "rnm_td3_continuous.py"}
    assert {p.name for p in run.iterdir()} == names  # no checkpoint.pt without --keep-replay
    assert (run / "rnm_td3_continuous.py").read_bytes() == (ROOT / "rnm_td3_continuous.py").read_bytes()

    rows = {int(row["global_step"]): row for row in read_rows(run, clocks=True)}
    steps = list(rows)
    assert steps == sorted(steps) and next(iter(rows[0])) == "global_step"
    assert steps_with(run, "eval/episodic_return") == [0, *range(250, 2100, 250), 2100]
    assert steps_with(run, "sad/qf1/fc2") == [*range(300, 2100, 100)]  # none at the last step
    assert steps_with(run, "charts/SPS") == steps_with(run, "losses/actor_loss") == [1000, 2000]
    ends = steps_with(run)
    assert np.array_equal(np.diff([0, *ends]), [int(rows[s]["charts/episodic_length"]) for s in ends])
    assert float(rows[0]["sparsity/density/qf1"]) == pytest.approx((16 * 2 + 16 * 4 + 16) / (16 * 5 + 16 * 16 + 16))
    assert float(rows[1000]["charts/update_ms"]) > 0
    for clock in ("charts/wall_time_s", "charts/cpu_time_s"):
        times = [float(rows[s][clock]) for s in steps]
        assert 0 < times[0] and times == sorted(times) and times[-1] > 2 * times[1]

    meta = read_meta(run)
    assert meta["args"]["env_id"] == "Reach-v0" and (meta["n"], meta["m"]) == (1, 4)
    assert meta["kernel"] == ("nm" if COMPILER else "torch")
    assert set(meta["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy", "wandb"}
    assert meta["script"] == "rnm_td3_continuous.py" and meta["start"] <= meta["end"]
    assert len(meta["commit"] or "-" * 40) == 40 and meta["threads"] == 1
    cpu = r".+ \(family \d+, model \d+\)" if os.uname().machine == "x86_64" else ".+"
    assert re.fullmatch(cpu, meta["hardware"])
    assert meta["exit_reason"] == "finished" and 0 < meta["cpu_time_s"] and 0 < meta["wall_time_s"]
    evaluations = [float(rows[s]["eval/episodic_return"]) for s in steps if s and rows[s]["eval/episodic_return"]]
    assert meta["final_score"] == pytest.approx(np.mean(evaluations[-5:]))  # the last half of nine
    for key in ("actor_us", "critic_update_us", "update_us"):
        assert meta["hardware_report"][f"hardware/{key}"] > 0 and meta["hardware_report"][f"hardware/{key}_dense"] > 0

    masks = np.load(run / "masks.npz")
    assert masks["update"].tolist() == [0, *range(100, 1900, 100)]
    assert masks["global_step"].tolist() == [0, *range(300, 2100, 100)]
    model = read_model(run)
    for net, target in zip(NETS[:3], NETS[3:], strict=True):
        for layer in ("fc1", "fc2"):
            shape = masks[f"{net}.{layer}.shape"]
            E = np.unpackbits(masks[f"{net}.{layer}"], axis=1)[:, : shape.prod()].reshape(-1, *shape)
            assert len(E) == 19 and (E[-1] != E[0]).any()
            for weights in (model[net], model[target]):
                assert np.array_equal(weights[f"{layer}.weight"].numpy() != 0, E[-1] == 1)
            for key, first in (("sad", -2), ("sad_initial", 0)):
                differ = (E[-1] != E[first]).sum() / (2 * E[-1].sum())
                assert float(rows[2000][f"{key}/{net}/{layer}"]) == pytest.approx(differ)


@pytest.mark.parametrize("change", [{}, {"n": 1, "m": 4, "mask_update_interval": 50}], ids=["dense", "1:4"])
def test_model_fits_plain_layers_and_its_probe(dense, rnm, small, change):
    model = read_model((rnm if change else dense).train(small(rnm if change else dense, **change))["run_dir"])
    actor = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    names = {"0": "fc1", "2": "fc2", "4": "fc_mu"}
    actor.load_state_dict({k: model["actor"][f"{names[k[0]]}.{k[2:]}"] for k in actor.state_dict()})
    observations, actions = model["probe"]
    assert observations.shape == (16, 3) and len(observations.unique(dim=0)) == 16
    wanted = torch.tanh(actor(observations)) * model["actor"]["action_scale"] + model["actor"]["action_bias"]
    assert torch.allclose(wanted, actions, atol=1e-5) and actions.std(0).min() > 1e-4


def test_modules_and_sizes_by_hand(dense, rnm, small):
    runs = [dense.train(small(dense, hidden_dim=8)), rnm.train(small(rnm, hidden_dim=8, n=1, m=4))]
    for run, kind, active in zip(runs, ("Linear", "SparseLinear"), ([24, 64, 40, 64], [8, 16, 16, 16]), strict=True):
        meta = read_meta(run["run_dir"])
        (a1, a2, q1, q2), critic_density = active, (active[2] + active[3] + 8) / (40 + 64 + 8)
        relus = [{"name": f"relu{i}", "type": "ReLU"} for i in (1, 2)]

        def layer(name, type, rows, columns, active):
            return {"name": name, "type": type, "weight": [rows, columns], "active": active}

        critic = [layer("fc1", kind, 8, 5, q1), relus[0], layer("fc2", kind, 8, 8, q2), relus[1]]
        critic += [layer("fc3", "Linear", 1, 8, 8)]
        actor = [layer("fc1", kind, 8, 3, a1), relus[0], layer("fc2", kind, 8, 8, a2), relus[1]]
        actor += [layer("fc_mu", "Linear", 2, 8, 16)]
        assert meta["modules"] == {"actor": actor, "qf1": critic, "qf2": critic}
        assert meta["density"] == {"actor": (a1 + a2 + 16) / 104, "qf1": critic_density, "qf2": critic_density}
        assert meta["params_total"] == (104 + 18) + 2 * (112 + 17)
        assert meta["params_active"] == (a1 + a2 + 16 + 18) + 2 * (q1 + q2 + 8 + 17)
        assert float(read_rows(run["run_dir"])[0]["sparsity/density/qf2"]) == pytest.approx(critic_density)


def test_mask_history_stays_small_and_even(rnm):
    history, state, E = [], rnm.State(), {"actor.fc1": torch.ones(2, 4, dtype=torch.bool)}
    for refresh in range(1000):
        state.global_step, state.update = refresh + 5, refresh
        history = rnm.add_masks(history, E, state)
        kept = [snapshot["update"] for snapshot in history]
        assert kept[0] == 0 and kept[-1] == refresh and len(kept) <= 129
        assert [snapshot["global_step"] for snapshot in history] == [update + 5 for update in kept]
        assert len(set(np.diff(kept[:-1]))) <= 1
        assert refresh < 65 or len(kept) >= 65


def test_all_six_networks_are_nm_at_every_moment(rnm, small, monkeypatch):
    agents, masks = [], set()
    make_agent, add = rnm.Agent, rnm.ReplayBuffer.add
    monkeypatch.setattr(rnm, "Agent", lambda *a, **o: agents.append(make_agent(*a, **o)) or agents[-1])

    def look_and_add(rb, **transition):
        agent = agents[0]
        for online, target in zip(NETS[:3], NETS[3:], strict=True):
            for name in ("fc1", "fc2", "fc_mu" if online == "actor" else "fc3"):
                layers = [getattr(getattr(agent, net).net, name) for net in (online, target)]
                for layer in layers:
                    weight = nn.functional.pad(layer.sparse_weight(), (0, -layer.W.shape[1] % 4))
                    assert (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 1
                    assert torch.equal(layer.sparse_weight() != 0, layers[0].E)
        masks.add(agent.actor.net.fc2.E.numpy().tobytes())
        add(rb, **transition)

    monkeypatch.setattr(rnm.ReplayBuffer, "add", look_and_add)
    rnm.train(small(rnm, n=1, m=4, mask_update_interval=50, sparse_head=True, total_timesteps=600))
    assert len(masks) > 3


def test_a_refresh_comes_after_the_evaluation_and_never_at_the_end(rnm, small, monkeypatch):
    """By the numbers: until its first refresh a run is the run of static masks, evaluation of that step included."""
    calls = []
    for name in ("evaluate", "refresh_masks"):
        call = getattr(rnm, name)
        monkeypatch.setattr(rnm, name, lambda *a, call=call, name=name: calls.append(name) or call(*a))
    options = {"n": 1, "m": 4, "eval_interval": 150, "total_timesteps": 400}
    static = rnm.train(small(rnm, **options, mask_update_interval=0))["run_dir"]
    assert set(calls) == {"evaluate"} and not steps_with(static, "sad/actor")
    calls.clear()
    moving = rnm.train(small(rnm, **options, mask_update_interval=50))["run_dir"]
    e, r = "evaluate", "refresh_masks"  # steps 0; 150; 200, 250; 300; 350; 400 with update 300
    assert calls == [e, e, r, r, r, e, r, r, e]
    for run, updates in ((static, [0]), (moving, [0, 50, 100, 150, 200, 250])):
        masks = np.load(Path(run) / "masks.npz")
        assert masks["update"].tolist() == updates
        assert masks["global_step"].tolist() == [update and update + 100 for update in updates]
    assert steps_with(moving, "sad/actor") == [150, 200, 250, 300, 350]
    scores = [[x for row in read_rows(run) if (x := row["eval/episodic_return"])] for run in (static, moving)]
    assert scores[0][:2] == scores[1][:2] and scores[0][2] != scores[1][2]
    options["total_timesteps"] = 150  # update 50 is the last
    assert_same_run(*(rnm.train(small(rnm, **options, mask_update_interval=k))["run_dir"] for k in (0, 50)))


def test_n_equals_m_is_dense_bit_for_bit(rnm, dense, small):
    a = dense.train(small(dense, exp_name="twin"))["run_dir"]
    options = {"mask_update_interval": 60, "sparse_head": True, "kernel": "torch"}
    b = rnm.train(small(rnm, exp_name="twin", n=4, m=4, **options))["run_dir"]
    assert steps_with(b, "sad/actor") == [160, 220, 280, 340]  # the packed path, with refreshes
    columns = list(read_rows(a)[0])
    rows = [{k: row[k] for k in columns} for row in read_rows(b) if any(row[k] for k in columns[1:])]
    assert len(rows) > 10 and rows == read_rows(a)
    assert_same_model(a, b)


def test_same_seed_same_numbers_and_evaluation_is_free(script, small):
    changes = {"seed": 3}, {"seed": 3}, {"seed": 3, "eval_interval": 70, "eval_episodes": 1}, {"seed": 4}
    a, b, c, d = (script.train(small(script, **change))["run_dir"] for change in changes)
    assert_same_run(a, b)
    assert_same_model(a, c)
    assert steps_with(a, "eval/episodic_return") != steps_with(c, "eval/episodic_return")
    assert read_rows(a) != read_rows(d)
    first = [read_model(script.train(small(script, seed=seed, total_timesteps=1))["run_dir"]) for seed in (3, 4)]
    for net in NETS:  # as initialised
        (key,) = {"fc1.weight", "embedding.weight"} & first[0][net].keys()
        assert not torch.equal(*(model[net][key] for model in first))


def test_runs_that_start_within_a_second_have_folders_of_their_own(dense, small, tmp_path):
    """As when several settings of one seed are started at once; names don't show the settings."""
    options = {"runs_dir": str(tmp_path / "one"), "total_timesteps": 1}
    runs = {dense.train(small(dense, **options, tau=tau))["run_dir"] for tau in (0.005, 0.01)}
    assert len(runs) == 2 and all(read_meta(run)["exit_reason"] == "finished" for run in runs)


def test_a_name_is_one_folder_whatever_it_holds(dense, small, tmp_path):
    args = small(dense, exp_name="../a b/é*", total_timesteps=1, env_id="toy_envs:Reach-v0", runs_dir=str(tmp_path))
    name = Path(dense.train(args)["run_dir"]).name
    assert name.startswith("toy_envs-Reach-v0__..-a-b-é-__s1__") and [x.name for x in tmp_path.iterdir()] == [name]


def test_global_generators_are_seeded_and_evaluation_leaves_them_alone(script, small, monkeypatch):
    draws, modes = draw_everywhere(script, monkeypatch)

    def drawn(**changes):
        torch.manual_seed(len(modes)), np.random.seed(len(modes)), random.seed(len(modes))  # what a run finds
        draws.clear()
        script.train(small(script, **changes))
        return list(draws)

    wanted = drawn()
    assert len(wanted) == 300 and all(len(set(column)) == 300 for column in zip(*wanted, strict=True))
    assert drawn(eval_interval=70, eval_episodes=1) == wanted
    assert all(a != b for a, b in zip(wanted[0], drawn(seed=2, total_timesteps=101)[0], strict=True))
    assert set(modes) == {(False, True), (True, False), (False, False)}  # acting in train(), the rest in eval()
    assert drawn(checkpoint_interval=50) == wanted  # nor does a checkpoint, which asks the actor for its probe


def test_what_is_stored_and_how_it_was_chosen(dense, rnm, rlx2, small, monkeypatch):
    """Termination against truncation, actions by hand from the random streams, learning rates."""
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([0.5, 3.0])
    for module in (dense, rnm, rlx2):
        rows, policies, agents = [], [], []
        add, act, make_agent = module.ReplayBuffer.add, module.act, module.Agent

        def acting(actor, obs, act=act, policies=policies):
            action = act(actor, obs)
            policies += [action.clone()] if actor.training else []  # not evaluations and the probe
            return action

        def stored_too(rb, add=add, rows=rows, **row):
            rows.append(row)
            add(rb, **row)

        monkeypatch.setattr(module.ReplayBuffer, "add", stored_too)
        monkeypatch.setattr(module, "act", acting)
        monkeypatch.setattr(
            module, "Agent", lambda *a, make=make_agent, to=agents, **o: to.append(make(*a, **o)) or to[-1]
        )
        options = {"exploration_noise": 0.2, "learning_rate": 0.002, "env_id": "ReachShort-v0"}
        run = module.train(small(module, **options, total_timesteps=700, learning_starts=300))["run_dir"]
        ends = [r for r in read_rows(run) if r["charts/episodic_length"]]
        cut = {int(r["global_step"]) for r in ends if r["charts/episodic_length"] == "25"}  # by the time limit
        ended = {int(r["global_step"]) for r in ends if int(r["charts/episodic_length"]) < 25}
        stored = {step for step, row in enumerate(rows, 1) if row["dones"]}
        assert len(rows) == 700 and ended and ended <= stored <= ended | cut and cut - stored
        pairs = itertools.pairwise(rows)
        following = [np.array_equal(a["next_observations"], b["observations"]) for a, b in pairs]
        assert {step for step, same in enumerate(following, 1) if not same} == (ended | cut) - {700}
        for optimizer in (agents[0].q_optimizer, agents[0].actor_optimizer):
            assert optimizer.param_groups[0]["lr"] == 0.002

        rng = module.make_generators(1, "cpu")
        warm = [low + (high - low) * torch.rand(2, generator=rng["warmup"]) for _ in range(300)]
        noise = [0.2 * (high - low) / 2 * torch.randn(2, generator=rng["exploration"]) for _ in range(400)]
        chosen = [(p + e).clamp(low, high) for p, e in zip(policies[:400], noise, strict=True)]
        assert np.array_equal([row["actions"] for row in rows], torch.stack(warm + chosen).numpy())
        if module is rlx2:
            assert {step for step, row in enumerate(rows, 1) if row["truncations"]} == cut
            assert np.array_equal([row["policy_actions"] for row in rows], torch.stack(warm + policies[:400]).numpy())


def test_code_hash(dense):
    """Comments, docstrings and line breaks do not count; everything else does."""
    source = Path(dense.__file__).read_text()
    wanted = dense.code_hash(source)
    assert re.fullmatch("[0-9a-f]{16}", wanted)
    doc = dense.update_actor.__doc__
    same = {
        "comments and formatting": ast.unparse(ast.parse(source)),
        "a comment": source.replace("\ndef update_actor", "\n# the actor\ndef update_actor"),
        "a docstring": source.replace(doc, doc + " And more."),
        "a field's explanation": source.replace('"""discount factor, in [0, 1]"""', '"""gamma"""'),
    }
    other = {
        "a number": source.replace("gamma: Share = 0.99", "gamma: Share = 0.98"),
        "an operator": source.replace("torch.min(qf1_next_target", "torch.max(qf1_next_target"),
        "a string": source.replace('"losses/actor_loss"', '"losses/policy_loss"'),
    }
    assert all(text != source for text in (same | other).values())
    assert {name: dense.code_hash(text) for name, text in same.items()} == dict.fromkeys(same, wanted)
    assert len({wanted, *map(dense.code_hash, other.values())}) == 4


def test_a_fork_is_recorded_as_one(small, monkeypatch, tmp_path):
    """dirty says that the running script is not the commit's, also where git does not know it; a hash says which."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=T", "-c", "user.email=t@example.org"]
    for name in ("dense_td3_continuous.py", "fork.py"):
        text = (ROOT / "dense_td3_continuous.py").read_text()
        (tmp_path / name).write_text(text if name != "fork.py" else text.replace("Share = 0.99", "Share = 0.98"))
    for command in (["init", "-q"], ["add", "dense_td3_continuous.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    runs = []
    for name in ("dense_td3_continuous.py", "fork.py"):
        module = load(tmp_path / name)
        runs.append(Path(module.train(small(module, total_timesteps=1))["run_dir"]))
        assert (runs[-1] / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / name).write_text("edited meanwhile")  # what runs is the fork
    late = Path(module.train(small(module, total_timesteps=1))["run_dir"])
    assert (late / name).read_bytes() == (runs[-1] / name).read_bytes()
    assert read_meta(late)["code"] == read_meta(runs[-1])["code"]
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    alone = read_meta(module.train(small(module, total_timesteps=1))["run_dir"])
    assert alone["commit"] is None and alone["dirty"]  # nobody knows
    original, fork = map(read_meta, runs)
    assert (original["dirty"], fork["dirty"]) == (False, True) and fork["script"] == "fork.py"
    assert original["commit"] == fork["commit"] and original["code"] != fork["code"]


def test_a_finished_run_stays_finished(dense, small, monkeypatch, capsys):
    def broken(*_):
        raise FileNotFoundError("no such thing")

    monkeypatch.setattr(dense, "hardware_report", broken)
    result = dense.train(small(dense))
    assert result["exit_reason"] == "finished" and read_meta(result["run_dir"])["exit_reason"] == "finished"
    assert "warning: no hardware report: no such thing" in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns(script, small):
    """Reach from -1..1 to 1: an untrained policy runs away, a trained one stands still there."""
    options = {"learning_starts": 300, "batch_size": 64, "eval_episodes": 10, "buffer_size": 10_000}
    widths = {"hidden_dim", "actor_hidden_dim", "critic_hidden_dim"} & vars(small(script)).keys()
    options |= dict.fromkeys(widths, 64)
    run = script.train(small(script, total_timesteps=1250, eval_interval=1250, **options))["run_dir"]
    returns = [float(row["eval/episodic_return"]) for row in read_rows(run) if row["eval/episodic_return"]]
    assert returns[0] < -20 and returns[-1] > -8, returns
