"""RNM-TD3 in one file: dense_td3_continuous.py with all six networks row-wise N:M sparse from scratch.

Papers: Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv 1802.09477.
  Vrce, Kassler, Aydos, "RNM-TD3: N:M Semi-structured Sparse Reinforcement Learning From Scratch", arXiv 2602.14578.

  projection P_{N:M}, mask E                                     -> project
  Figure 1, left: W and E give W~, active weights alone learn    -> NMLinear
  Figure 1, right: after K updates a new E is taken from W       -> refresh_masks
  SAD, Sparse Architecture Divergence (arXiv 2102.04010)         -> sad_metrics
  Algorithm 1: clipped double-Q target, target smoothing         -> update_critics
  Algorithm 1: delayed policy, Polyak-averaged targets           -> update_actor, update_targets
  the order of everything                                        -> update_agent, train

Train with `python rnm_td3_continuous.py --env-id Ant-v4 --n 1 --m 8`.
Go on with --resume runs/<run_name>, see what a policy returns with --evaluate runs/<run_name>.
Decisions where the paper's abstract and figure are silent:
  D1  Groups never straddle rows; a row's last group of r < M columns keeps min(N, r). Ties: the lower column stays.
  D2  Trained are the packed active weights; inactive ones and their Adam moments rest in dense stores, unchanged.
  D3  A target has its own W' and the online network's mask; its packed weights follow by Polyak.
  D4  K (--mask-update-interval) counts critic updates; all six networks change together; 0 means static masks.
  D5  Input and hidden layers are N:M; the output layer only with --sparse-head; biases never.
  D6  W starts as nn.Linear's default, the first mask is P_{N:M}(W).
  D7  N = M is the dense script bit for bit (with --kernel torch).
  D8  One random stream per purpose: dense and sparse runs of a seed share warm-up data and replay indices.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import fcntl
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    seed: int = 1
    """seed of every random stream, integer >= 0"""
    env_id: str = "Hopper-v4"
    """gymnasium id of an environment with flat observations and bounded continuous actions"""
    total_timesteps: int = 1_000_000
    """environment steps, >= 1"""
    learning_rate: float = 3e-4
    """Adam's step size of actor and critics, in (0, 1]"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer in transitions, >= 1"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    tau: float = 0.005
    """share of the online network in each Polyak average, in (0, 1]"""
    batch_size: int = 256
    """transitions per update, >= 1"""
    policy_noise: float = 0.2
    """standard deviation of the target policy's smoothing noise, in units of the action scale, >= 0"""
    exploration_noise: float = 0.1
    """standard deviation of the acting noise, in units of the action scale, >= 0"""
    noise_clip: float = 0.5
    """bound of the smoothing noise, in units of the action scale, >= 0"""
    learning_starts: int = 25_000
    """environment steps with uniform random actions and no updates before learning, >= 0"""
    policy_frequency: int = 2
    """critic updates per update of the actor and the targets (TD3's d), >= 1"""
    hidden_dim: int = 256
    """units in each of the two hidden layers, >= 1"""
    n: int = 2
    """weights kept of each group (N), 1 <= n <= m"""
    m: int = 4
    """consecutive weights of a row in a group (M), n <= m <= hidden-dim"""
    mask_update_interval: int = 1000
    """critic updates between mask refreshes (K), >= 0; 0 keeps the first masks"""
    sparse_head: bool = False
    """make the output layers N:M too"""
    kernel: Literal["auto", "nm", "torch"] = "auto"
    """product of the N:M layers: nm is fast, on CPUs with a C compiler; torch runs anywhere; auto picks one"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    threads: int = 1
    """CPU threads, >= 1; one per run fills a machine best"""
    eval_interval: int = 10_000
    """environment steps between evaluations (also at 0 and at the end), >= 1"""
    eval_episodes: int = 10
    """episodes per evaluation, >= 1"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints, taken at the next episode end, >= 1"""
    resume: str | None = None
    """folder of the run to continue, bit for bit; its arguments come from there"""
    evaluate: str | None = None
    """folder of the run whose saved policy to evaluate instead of training"""
    keep_replay: bool = False
    """keep the replay data of a finished run, so that it can be resumed with a larger --total-timesteps"""
    runs_dir: str = "runs"
    """folder under which each run makes its own"""
    track: bool = True
    """mirror the run to Weights & Biases (offline when not logged in)"""
    wandb_project_name: str = "nm-sparse-rl"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """user or team in Weights & Biases"""
    capture_video: bool = False
    """record one episode of the final policy as mp4"""

    def __post_init__(self) -> None:
        check_args(self)


# --- shared: projection ---
def project(W: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """P_{N:M}: the mask E [out, in] (bool) of the n largest magnitudes in each m consecutive weights of a row of W."""
    magnitude = F.pad(W.abs(), (0, -W.shape[1] % m), value=-1.0)  # fill a ragged last group with what never wins (D1)
    order = magnitude.view(len(W), -1, m).argsort(dim=2, descending=True, stable=True)  # [out, groups, m]
    E = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
    return E.view(len(W), -1)[:, : W.shape[1]].contiguous()


# --- end shared ---


# --- shared: layer ---
class NMLinear(nn.Module):
    """nn.Linear made row-wise N:M: x [B, in] -> x W~^T + bias [B, out], W~ = W * E.

    Trained are the packed active weights `values` [out, kept] alone (D2) and the bias, as parts of `flat`, which holds
    those of all layers of a network: one parameter for Adam to step. `index` [out, kept]: the columns of `values`,
    ascending; kept = n * (in // m) + min(n, in % m). Between refreshes W is true only where E is False.
    """

    def __init__(self, dense: nn.Linear, n: int, m: int):
        super().__init__()
        self.n, self.m, self.start = n, m, 0  # start: this layer's first place in flat, set by sparsify
        self.register_buffer("W", dense.weight.detach())  # D6
        self.register_buffer("E", project(self.W, n, m))
        self.register_buffer("index", self.E.nonzero()[:, 1].reshape(dense.out_features, -1).clone())
        self.flat = nn.Parameter(torch.cat([self.W.gather(1, self.index).flatten(), dense.bias.detach()]))

    def packed(self, flat: torch.Tensor) -> torch.Tensor:
        """This layer's active weights [out, kept] in `flat`, or what belongs to them in one of Adam's moments of it."""
        return flat[self.start : self.start + self.index.numel()].view_as(self.index)

    values = property(lambda self: self.packed(self.flat))

    @property
    def bias(self) -> torch.Tensor:
        first = self.start + self.index.numel()
        return self.flat[first : first + len(self.index)]

    @property
    def weight(self) -> torch.Tensor:
        """W~ [out, in], zero at the inactive positions; its gradient reaches the active weights alone."""
        return torch.zeros_like(self.W).scatter_(1, self.index, self.values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


# --- end shared ---


def sparsify(net: nn.Module, args: Args) -> nn.Module:
    """Make the input and hidden layers of a network N:M, the output layer only with --sparse-head (D5)."""
    names = [name for name, _ in net.named_children()]
    net.nm_names = names if args.sparse_head else names[:-1]
    for name in names:
        n, m = (args.n, args.m) if name in net.nm_names else (1, 1)  # 1:1 keeps all
        setattr(net, name, NMLinear(getattr(net, name), n, m))
    flat, start = nn.Parameter(torch.cat([layer.flat.detach() for layer in net.children()])), 0
    for layer in net.children():
        layer.start, start = start, start + len(layer.flat)
        layer.flat = flat  # the network's only parameter
    net.kernel, net.plans = pick_kernel(args), {}
    return net


def nm_layers(net: nn.Module) -> dict[str, NMLinear]:
    return {name: getattr(net, name) for name in net.nm_names}


@torch.no_grad()
def refresh_masks(agent: "Agent") -> None:
    """Figure 1, right: write the active weights back to W, take the new mask from W, read at its positions (D2-D4)."""
    for online, target, optimizer in (
        (agent.actor, agent.target_actor, agent.actor_optimizer),
        (agent.qf1, agent.qf1_target, agent.q_optimizer),
        (agent.qf2, agent.qf2_target, agent.q_optimizer),
    ):
        for (name, layer), target_layer in zip(nm_layers(online).items(), nm_layers(target).values(), strict=True):
            stores = [(layer.W, layer.values), (target_layer.W, target_layer.values)]  # dense store, packed part
            state = optimizer.state.get(layer.flat, {})  # empty before Adam's first step
            for key, moment in list(state.items()):
                if moment.shape == layer.flat.shape:
                    store = state.setdefault(f"{key}_{name}", torch.zeros_like(layer.W))
                    stores.append((store, layer.packed(moment)))
            for store, packed in stores:
                store.scatter_(1, layer.index, packed)
            E = project(layer.W, layer.n, layer.m)
            for changed in (layer, target_layer):
                changed.E.copy_(E)
                changed.index.copy_(E.nonzero()[:, 1].view_as(layer.index))
            for store, packed in stores:
                packed.copy_(store.gather(1, layer.index))


def get_masks(agent: "Agent") -> dict[str, torch.Tensor]:
    """E of each N:M layer, by '<net>.<layer>'; the targets share them."""
    nets = {"actor": agent.actor, "qf1": agent.qf1, "qf2": agent.qf2}
    return {f"{net}.{name}": layer.E.cpu().clone() for net in nets for name, layer in nm_layers(nets[net]).items()}


# --- shared: sad ---
def sad_metrics(first: dict, previous: dict, current: dict) -> dict[str, float]:
    """SAD_{i:j} = |E_i - E_j|_0 (Zhou et al., SR-STE) over twice the active weights; masks by '<net>.<layer>'."""
    row = {}
    for key, reference in (("sad", previous), ("sad_initial", first)):
        for net in ("actor", "qf1", "qf2"):
            count = {name: int((E != reference[name]).sum()) for name, E in current.items() if name.startswith(net)}
            active = {name: int(current[name].sum()) for name in count}
            row[f"{key}/{net}"] = sum(count.values()) / (2 * sum(active.values()))
            row |= {f"{key}/{name.replace('.', '/')}": count[name] / (2 * active[name]) for name in count}
            if key == "sad":
                row[f"sad_count/{net}"] = sum(count.values())
    return row


# --- end shared ---


def mlp(nets: list[nn.Module], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Each network's layers with ReLU between them, on the same inputs side by side: [B, ...] -> [B, out] of each."""
    if getattr(nets[0], "kernel", "torch") == "nm":
        return nm_mlp(nets, *inputs)
    x, outputs = torch.cat(inputs, dim=1), []
    for net in nets:
        *hidden, head = net.children()
        y = x
        for layer in hidden:
            y = F.relu(layer(y))
        outputs.append(head(y))
    return outputs


# --- shared: td3 ---
class Actor(nn.Module):
    """Deterministic policy pi(s): obs [B, obs_dim] -> action [B, action_dim], inside the action bounds."""

    def __init__(self, env: gym.Env, hidden_dim: int):
        super().__init__()
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.fc1 = nn.Linear(obs_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc_mu = nn.Linear(hidden_dim, action_dim)
        low, high = action_bounds(env)
        self.register_buffer("action_scale", (high - low) / 2)  # [action_dim], each dimension has its own
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low, persistent=False)
        self.register_buffer("action_high", high, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.action_bias, torch.tanh(mlp([self], x)[0]), self.action_scale)  # bias + tanh * scale


class QNetwork(nn.Module):
    """Critic Q(s, a): obs [B, obs_dim], action [B, action_dim] -> value [B, 1]."""

    def __init__(self, env: gym.Env, hidden_dim: int):
        super().__init__()
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.fc1 = nn.Linear(obs_dim + action_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, 1)

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return mlp([self], x, a)[0]


@dataclass
class Agent:
    """The six networks of TD3 and the two optimizers."""

    actor: Actor
    qf1: QNetwork
    qf2: QNetwork
    target_actor: Actor
    qf1_target: QNetwork
    qf2_target: QNetwork
    q_optimizer: optim.Adam
    actor_optimizer: optim.Adam
    online_parameters: list[nn.Parameter]  # of actor, qf1, qf2, in one list
    target_parameters: list[nn.Parameter]  # of their targets, in the same order


def make_agent(actor: Actor, qf1: QNetwork, qf2: QNetwork, learning_rate: float) -> Agent:
    """Targets start as copies of the online networks; one Adam for the actor, one for both critics."""
    online = (actor, qf1, qf2)
    targets = [copy.deepcopy(net).requires_grad_(False) for net in online]
    q_optimizer = optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=learning_rate, fused=True)
    actor_optimizer = optim.Adam(actor.parameters(), lr=learning_rate, fused=True)
    for optimizer in (q_optimizer, actor_optimizer):  # tell autograd of the change, which a fused step does not
        changed = optimizer.param_groups[0]["params"]
        optimizer.register_step_post_hook(lambda *_, changed=changed: torch.autograd.graph.increment_version(changed))
    parameters = ([param for net in nets for param in net.parameters()] for nets in (online, targets))
    return Agent(*online, *targets, q_optimizer, actor_optimizer, *parameters)


def drop_gradients(optimizer: optim.Optimizer) -> None:
    """What optimizer.zero_grad() does, without its profiling: that takes longer than all the rest of it."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


def update_critics(agent: Agent, data: "Batch", args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One step of both critics towards the clipped double-Q target; returns what mean_losses() logs."""
    with torch.no_grad():
        noise = torch.empty_like(data.actions).normal_(0.0, args.policy_noise, generator=generator)
        noise = noise.clamp_(-args.noise_clip, args.noise_clip)  # [B, action_dim]
        next_state_actions = agent.target_actor(data.next_observations).addcmul_(noise, agent.actor.action_scale)
        next_state_actions = next_state_actions.clamp_(agent.actor.action_low, agent.actor.action_high)
        targets = (agent.qf1_target, agent.qf2_target)
        qf1_next_target, qf2_next_target = mlp(targets, data.next_observations, next_state_actions)
        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
        # rewards + gamma * (1 - dones) * min_qf_next_target, [B, 1]
        next_q_value = torch.addcmul(data.rewards, 1 - data.dones, min_qf_next_target, value=args.gamma)

    qf1_a_values, qf2_a_values = mlp((agent.qf1, agent.qf2), data.observations, data.actions)  # both in one pass
    qf1_loss = F.mse_loss(qf1_a_values, next_q_value)
    qf2_loss = F.mse_loss(qf2_a_values, next_q_value)
    qf_loss = qf1_loss + qf2_loss
    drop_gradients(agent.q_optimizer)
    qf_loss.backward()
    agent.q_optimizer.step()
    return {
        "losses/qf1_values": qf1_a_values.detach(),
        "losses/qf2_values": qf2_a_values.detach(),
        "losses/qf1_loss": qf1_loss.detach(),
        "losses/qf2_loss": qf2_loss.detach(),
    }


def update_actor(agent: Agent, data: "Batch") -> dict[str, torch.Tensor]:
    """One step of the actor up the first critic's gradient."""
    for param in agent.q_optimizer.param_groups[0]["params"]:
        param.requires_grad_(False)  # the critic's weights need no gradient here
    actor_loss = -agent.qf1(data.observations, agent.actor(data.observations)).mean()
    drop_gradients(agent.actor_optimizer)
    actor_loss.backward()
    agent.actor_optimizer.step()
    for param in agent.q_optimizer.param_groups[0]["params"]:
        param.requires_grad_(True)
    return {"losses/actor_loss": actor_loss.detach()}


@torch.no_grad()
def update_targets(agent: Agent, tau: float) -> None:
    """target <- tau * online + (1 - tau) * target, for all three in one pass."""
    torch._foreach_lerp_(agent.target_parameters, agent.online_parameters, tau)


def update_agent(agent: Agent, rb: "ReplayBuffer", args: Args, rng: dict, update: int) -> dict[str, torch.Tensor]:
    """Update number `update` (from 1) of TD3, Algorithm 1: critics; every d-th time actor, then targets."""
    data = rb.sample(args.batch_size, rng["replay"])
    losses = update_critics(agent, data, args, rng["smoothing"])
    if update % args.policy_frequency == 0:
        losses |= update_actor(agent, data)
        update_targets(agent, args.tau)
    return losses


def mean_losses(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """The logged numbers of an update, taken only when a row is written."""
    row = {key: value.mean().item() for key, value in losses.items()}
    if losses:
        row["losses/qf_loss"] = (row["losses/qf1_loss"] + row["losses/qf2_loss"]) / 2  # the mean, as CleanRL logs it
    return row


# --- end shared ---


def make_networks(args: Args, env: gym.Env, seed: int) -> tuple[Actor, QNetwork, QNetwork]:
    """Actor and both critics, initialised by nn.Linear from `seed`."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator: seeded here, restored after
        torch.manual_seed(seed)
        actor = Actor(env, args.hidden_dim)
        qf1, qf2 = QNetwork(env, args.hidden_dim), QNetwork(env, args.hidden_dim)
    return tuple(sparsify(net, args).to(args.device) for net in (actor, qf1, qf2))


def train(args: Args) -> dict:
    """Train; returns run_dir, exit_reason and final_score. README: what is logged, and the files of a run."""
    set_up_torch(args)
    video = args.capture_video and can_render(args.env_id)
    env = make_env(args.env_id)
    rng = make_generators(args.seed, args.device)
    agent = make_agent(*make_networks(args, env, *draw_seeds(rng["init"], 1)), args.learning_rate)
    rb = ReplayBuffer(args.buffer_size, env, args.device)
    eval_seeds = draw_seeds(rng["evaluation"], args.eval_episodes)
    low, high = action_bounds(env)  # [action_dim]
    exploration_scale = args.exploration_noise * (high - low) / 2
    env.reset(seed=draw_seeds(rng["env_reset"], 1)[0])  # once: later resets go on with the environment's own generator

    progress = {"global_step": 0, "update": 0, "wall_time_s": 0.0, "evaluations": [], "losses": {}}
    first_masks = get_masks(agent)
    progress["masks"] = add_masks([], first_masks, global_step=0, update=0, refresh=0)
    if args.resume:
        progress = load_checkpoint(args, agent, rb, rng, env)
    global_step, update = progress["global_step"], progress["update"]
    evaluations, losses, update_times = progress["evaluations"], progress["losses"], []

    metrics = METRICS + list(sad_metrics(first_masks, first_masks, first_masks))
    with Run(args, metrics, model_stats(args, layer_shapes(agent)), progress, pick_kernel(args)) as run:

        def save() -> None:
            progress.update(global_step=global_step, update=update, losses=losses, wall_time_s=run.wall_time_s())
            with run.paused():
                save_masks(run.dir / "masks.npz", progress["masks"], first_masks)
                save_checkpoint(run, progress, agent, rb, rng, env, dense_state(agent))

        if not args.resume:
            with run.paused():
                row = evaluate(agent.actor, args.env_id, eval_seeds, global_step)
            run.log(0, row | {f"sparsity/density/{net}": d for net, d in run.stats["density"].items()})
            save()

        obs, _ = env.reset()
        check_finite(f"reset after step {global_step}", obs)
        episodic_return, episodic_length = 0.0, 0
        while global_step < args.total_timesteps:
            if global_step < args.learning_starts:
                action = (low + (high - low) * torch.rand(low.shape, generator=rng["warmup"])).numpy()
            else:
                noise = torch.randn(low.shape, generator=rng["exploration"])
                action = act(agent.actor, obs).addcmul_(noise, exploration_scale).clamp_(low, high).numpy()

            next_obs, reward, terminated, truncated, _ = env.step(action)
            global_step += 1
            rb.add(obs, next_obs, action, reward, terminated)  # true successor; only termination cuts the bootstrap
            check_finite(f"observation or reward of step {global_step}", rb.last)
            obs = next_obs
            episodic_return += float(reward)
            episodic_length += 1

            row = {}
            if global_step > args.learning_starts:
                start = time.perf_counter()
                update += 1
                losses |= update_agent(agent, rb, args, rng, update)
                check_finite(f"a loss of step {global_step}", *(x.item() for x in losses.values() if not x.dim()))
                if (K := args.mask_update_interval) and update % K == 0:
                    masks = get_masks(agent)
                    refresh_masks(agent)
                    row |= sad_metrics(first_masks, masks, get_masks(agent))
                    progress["masks"] = add_masks(progress["masks"], get_masks(agent), global_step, update, update // K)
                update_times.append(time.perf_counter() - start)

            if terminated or truncated:
                row |= {"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length}
            if global_step % 1000 == 0:
                row |= mean_losses(losses)
                row["charts/SPS"] = run.steps_per_second(global_step)
                if update_times:
                    row["charts/update_ms"] = 1e3 * statistics.fmean(update_times)
                    update_times.clear()
            if global_step % args.eval_interval == 0 or global_step == args.total_timesteps:
                with run.paused():
                    row |= evaluate(agent.actor, args.env_id, eval_seeds, global_step)
                evaluations.append([global_step, row["eval/episodic_return"]])
            if row:
                run.log(global_step, row)
            run.bar.update()

            if terminated or truncated:
                stop = run.stop_signal  # read once: a signal may come between the next lines
                if run.checkpoint_due(global_step, env, stop):
                    save()
                if stop:
                    break
                obs, _ = env.reset()
                check_finite(f"reset after step {global_step}", obs)
                episodic_return, episodic_length = 0.0, 0

        if global_step >= args.total_timesteps:
            save_masks(run.dir / "masks.npz", progress["masks"], first_masks)
            run.finish(final_score(evaluations), dense_state(agent))
            run.attempt("hardware report", lambda: hardware_report(run, env, rb, make_networks(args, env, seed=0)))
            if video:
                run.attempt("video", lambda: run.film(agent.actor, eval_seeds[0]))
    return {"run_dir": str(run.dir), "exit_reason": run.meta["exit_reason"], "final_score": run.meta["final_score"]}


# --- From here on: what a first reader may skip -------------------------------------------------------------------


METRICS = (
    "global_step charts/episodic_return charts/episodic_length charts/SPS charts/update_ms charts/wall_time_s"
    " losses/qf1_values losses/qf2_values losses/qf1_loss losses/qf2_loss losses/qf_loss losses/actor_loss"
    " eval/episodic_return eval/episodic_return_std eval/episodic_length"
    " sparsity/density/actor sparsity/density/qf1 sparsity/density/qf2"
).split()


def layer_shapes(agent: Agent) -> dict[str, list[tuple[int, int, int]]]:
    """(outputs, inputs, weights kept per row) of every layer of the online networks."""
    nets = {"actor": agent.actor, "qf1": agent.qf1, "qf2": agent.qf2}
    return {
        name: [(*layer.weight.shape, getattr(layer, "index", layer.weight).shape[1]) for layer in net.children()]
        for name, net in nets.items()
    }


def add_masks(history: list[dict], masks: dict, global_step: int, update: int, refresh: int) -> list[dict]:
    """Add a snapshot; the first, the last and every stride-th stay, 65 to 129 of them however long the run is."""
    stride = 2 ** (refresh // 128).bit_length()
    bits = {name: torch.from_numpy(np.packbits(E.numpy())) for name, E in masks.items()}
    kept = [snapshot for snapshot in history if snapshot["refresh"] % stride == 0]
    return [*kept, {"global_step": global_step, "update": update, "refresh": refresh, **bits}]


def save_masks(path: Path, history: list[dict], masks: dict) -> None:
    """masks.npz: global_step [S], update [S]; for each layer uint8 [S, bytes] (np.packbits of E, row-major), shape."""
    arrays = {key: np.stack([np.asarray(snapshot[key]) for snapshot in history]) for key in history[0]}
    arrays |= {f"{name}.shape": np.array(E.shape) for name, E in masks.items()}
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


# --- shared: arguments ---
class UserError(Exception):
    """Something that the user typed or pointed to is wrong: one line, exit code 2."""


class NonFiniteError(Exception):
    """NaN or infinity in an observation, a reward or a loss: one line, exit code 1."""


def check_args(args: "Args") -> None:
    """Raise UserError for a number out of the range that its help names."""
    huge = 2**62
    limits = {
        (0, huge): "seed learning_starts mask_update_interval policy_noise exploration_noise noise_clip",
        (1, huge): "total_timesteps buffer_size policy_frequency eval_interval checkpoint_interval",
        (1, 2**20): "batch_size eval_episodes",
        (0, 1): "gamma tau learning_rate",
        (1, 2**15): "hidden_dim n m",
        (1, 1024): "threads",
    }
    for (low, high), names in limits.items():
        for name in names.split():
            value = getattr(args, name, low)
            above = name in ("tau", "learning_rate")  # these exclude their lower bound
            if not low <= value <= high or (above and value == low):
                most = f" and at most {high}" if high < huge else ""
                raise UserError(f"{flag(name)} must be {'more than' if above else 'at least'} {low}{most}, not {value}")
    if getattr(args, "n", 1) > getattr(args, "m", 1) or getattr(args, "m", 1) > args.hidden_dim:
        raise UserError(f"1 <= --n <= --m <= --hidden-dim is needed, not n {args.n}, m {args.m}, {args.hidden_dim}")


def set_up_torch(args: "Args") -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, use --device cpu")
    torch.set_num_threads(args.threads)


# What may be typed beside --resume and --evaluate and differ from the run.
MAY_CHANGE = "resume runs_dir total_timesteps checkpoint_interval track wandb_project_name wandb_entity capture_video"
EVALUATE_MAY_CHANGE = "evaluate runs_dir eval_episodes capture_video seed device threads"


def parse_args(argv: list[str] | None = None) -> "Args":
    """The command line; beside --resume or --evaluate the run's own arguments are the defaults and must be kept."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume")
    finder.add_argument("--evaluate")
    found = finder.parse_known_args(argv)[0]
    folder = found.evaluate if found.resume is None else found.resume
    if folder is None:
        return tyro.cli(Args, description=__doc__, args=argv)
    if None not in (found.resume, found.evaluate):
        raise UserError("--resume and --evaluate exclude each other")
    may_change = MAY_CHANGE if found.evaluate is None else EVALUATE_MAY_CHANGE
    try:
        saved = Args(**read_meta(folder)["args"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json does not fit this version of the script: {first_line(error)}") from None
    saved.resume = saved.evaluate = None
    args = tyro.cli(Args, description=__doc__, args=argv, default=dataclasses.replace(saved))
    for name, old in vars(saved).items():
        if getattr(args, name) != old and name not in may_change.split():
            raise UserError(f"{flag(name)} is {old} in {folder} and can't become {getattr(args, name)}")
    if args.total_timesteps < saved.total_timesteps:
        raise UserError(f"--total-timesteps is {saved.total_timesteps} in {folder} and can only grow")
    return args


def read_meta(folder: str) -> dict:
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
        script = meta["script"]
        for key in "run_name wandb_id args exit_reason final_score kernel threads hardware versions".split():
            _ = meta[key]  # all that is read later
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not the folder of a run: {path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    if script != Path(__file__).name:
        raise UserError(f"{folder} was made by {script}, go on with that script")
    return meta


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main() -> int:
    """Exit codes: 0 done, 1 fault, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    try:
        args = parse_args()
        if args.evaluate:
            evaluate_run(args)
            return 0
        meta = read_meta(args.resume) if args.resume else {"exit_reason": None}
        if meta["exit_reason"] == "finished" and args.total_timesteps == meta["args"]["total_timesteps"]:
            print(f"{args.resume} is finished (final score {meta['final_score']}), nothing to do")
            return 0
        return {"sigint": 130, "sigterm": 143}.get(train(args)["exit_reason"], 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# --- end shared ---


# --- shared: replay ---
class Batch(NamedTuple):
    observations: torch.Tensor  # [B, obs_dim]
    actions: torch.Tensor  # [B, action_dim]
    next_observations: torch.Tensor  # [B, obs_dim]
    rewards: torch.Tensor  # [B, 1]
    dones: torch.Tensor  # [B, 1], 1 where the episode terminated (not where it was cut off)


class ReplayBuffer:
    """Ring of transitions, one float32 row each, so that a batch is a single gather. Samples with replacement."""

    FILE_ROWS = 100_000

    def __init__(self, size: int, env: gym.Env, device: str):
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.size, self.device = size, device
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]  # obs | action | next obs | reward | done
        try:
            self.array = np.zeros((size, sum(self.widths)), np.float32)  # takes memory only as it fills
        except (MemoryError, ValueError):
            raise UserError(f"--buffer-size {size} needs {size * sum(self.widths) >> 28:,} GiB of memory") from None
        self.rows = torch.from_numpy(self.array)
        self.added = 0  # transitions ever added
        self.last = self.array[0]  # the row added last
        self.files: list[list[int]] = []  # [start, stop) of the transitions in each file on disk

    def add(self, obs, next_obs, action, reward, done) -> None:
        row, a, n = self.array[self.added % self.size], self.widths[0], self.widths[0] + self.widths[1]
        self.last = row
        row[:a], row[a:n], row[n:-2], row[-2], row[-1] = obs, action, next_obs, reward, done
        self.added += 1

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        index = torch.randint(min(self.added, self.size), (batch_size,), generator=generator)
        rows = self.rows.index_select(0, index).to(self.device)
        return Batch(*rows.split(self.widths, dim=1))

    def save(self, folder: Path) -> None:
        """Write the transitions since the last save to new files: those of older checkpoints are never touched."""
        oldest = max(0, self.added - self.size)
        start = max(oldest, self.files[-1][1] if self.files else 0)
        self.files = [file for file in self.files if file[1] > oldest]
        while start < self.added:
            stop = min(start + self.FILE_ROWS, self.added)
            rows = self.array[np.arange(start, stop) % self.size]
            write_atomic(folder / f"{start}-{stop}.npz", lambda file, rows=rows: np.savez(file, rows=rows))  # has CRCs
            self.files.append([start, stop])
            start = stop

    def load(self, folder: Path, files: list[list[int]], added: int) -> None:
        self.files, self.added = files, added
        for start, stop in files:
            first = max(start, added - self.size)
            with np.load(folder / f"{start}-{stop}.npz", allow_pickle=False) as file:
                rows = file["rows"]
            self.array[np.arange(first, stop) % self.size] = rows[first - start :]


# --- end shared ---


# --- shared: environment ---
def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """A plain environment; raises UserError where this script can't run on it."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)  # v4 is what was published
    if not re.search(r"-v\d+$", env_id):
        raise UserError(f"--env-id {env_id} must name the version, as in Ant-v4")
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)  # the checker takes time each step
    except Exception as error:
        near = [] if env_id in gym.registry else difflib.get_close_matches(env_id, gym.registry, cutoff=0.5)
        hint = f" (close to it: {', '.join(near)})" if near else ""
        raise UserError(f"--env-id {env_id}: {first_line(error)}{hint}") from None
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1 or not obs.shape[0]:
        raise UserError(f"--env-id {env_id} must have flat observations (a Box of one dimension), not {obs}")
    if not isinstance(action, gym.spaces.Box) or action.dtype.kind != "f" or action.shape[1:] or not action.low.size:
        raise UserError(f"--env-id {env_id} must have continuous actions (a Box of one dimension), not {action}")
    if not (np.isfinite([action.low, action.high]).all() and (action.low < action.high).all()):
        raise UserError(f"--env-id {env_id} must have bounded actions, not {action}")
    return env


def action_bounds(env: gym.Env) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(bound, dtype=torch.float32) for bound in (env.action_space.low, env.action_space.high))


def make_generators(seed: int, device: str) -> dict[str, torch.Generator]:
    """A random stream for each purpose, so that none shifts another (D8)."""
    names = ("init", "env_reset", "warmup", "exploration", "replay", "smoothing", "evaluation")
    generators = {name: torch.Generator(device if name == "smoothing" else "cpu") for name in names}
    for generator, child in zip(generators.values(), np.random.SeedSequence(seed).spawn(len(names)), strict=True):
        generator.manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
    return generators


def draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**31, (count,), generator=generator).tolist()


def check_finite(what: str, *values) -> None:
    for value in values:
        if not (math.isfinite(value) if isinstance(value, float) else np.isfinite(value).all()):
            raise NonFiniteError(f"{what} is NaN or infinite")


@torch.no_grad()
def act(actor: "Actor", obs: np.ndarray) -> torch.Tensor:
    """Noise-free action [action_dim] on the CPU. Copies obs: only torch's own memory is sure to be aligned."""
    x = torch.tensor(obs[None], dtype=torch.float32, device=actor.action_scale.device)
    return actor(x)[0].cpu()


def evaluate(actor: "Actor", env_id: str, seeds: list[int], step: int, video: Path | None = None) -> dict[str, float]:
    """Returns and lengths of the noise-free policy, an episode per seed, in an environment of its own."""
    env = make_env(env_id, render_mode="rgb_array" if video else None)
    if video:
        options = {"episode_trigger": lambda _: True, "name_prefix": video.name, "disable_logger": True}
        env = gym.wrappers.RecordVideo(env, str(video.parent), **options)
    returns, lengths = [0.0] * len(seeds), [0] * len(seeds)
    for episode, seed in enumerate(seeds):
        obs, _ = env.reset(seed=seed)
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(actor, obs).numpy())
            check_finite(f"observation or reward in the evaluation at step {step}", obs, reward)
            returns[episode] += float(reward)
            lengths[episode] += 1
            done = terminated or truncated
    env.close()
    return {
        "eval/episodic_return": float(np.mean(returns)),
        "eval/episodic_return_std": float(np.std(returns)),
        "eval/episodic_length": float(np.mean(lengths)),
    }


def evaluate_run(args: "Args") -> None:
    """--evaluate: the run's own evaluation episodes (further ones come from the same stream), filmed if asked for."""
    set_up_torch(args)
    folder, video = Path(args.evaluate), args.capture_video and can_render(args.env_id)
    actor = Actor(make_env(args.env_id), args.hidden_dim).to(args.device)  # plain nn.Linear layers
    try:
        actor.load_state_dict(read_torch(folder / "model.pt")["actor"])
    except Exception as error:
        raise UserError(f"{folder / 'model.pt'} is missing, damaged or foreign: {first_line(error)}") from None
    seeds = draw_seeds(make_generators(args.seed, args.device)["evaluation"], args.eval_episodes)
    film = folder / "videos" / time.strftime("evaluate-%Y%m%d-%H%M%S")
    row = evaluate(actor, args.env_id, seeds, 0, film if video else None)
    print(f"{folder.name}: return {row['eval/episodic_return']:.1f} ± {row['eval/episodic_return_std']:.1f}, mean ± std"
          f" of {len(seeds)} episodes{f', videos in {folder}/videos' if video else ''}")  # fmt: skip


def can_render(env_id: str) -> bool:
    """Try one frame, in a process of its own because a broken driver may kill it."""
    environ = dict(os.environ)
    if sys.platform == "linux" and "DISPLAY" not in environ:
        environ.setdefault("MUJOCO_GL", "egl")
    code = f"import gymnasium, moviepy; e = gymnasium.make({env_id!r}, render_mode='rgb_array'); e.reset(); e.render()"
    trial = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    if trial.returncode == 0:
        os.environ.update(environ)  # mujoco reads it when it is imported
    else:
        reason = (trial.stderr.strip() or f"exit code {trial.returncode}").splitlines()[-1]
        print(f"warning: going on without video, a trial frame failed: {reason}", file=sys.stderr)
    return trial.returncode == 0


# --- end shared ---


# --- shared: score ---
def final_score(evaluations: list[list]) -> float:
    """Mean of the last 10 evaluations [step, return], of fewer than 20 the last half; none is from step 0."""
    last = min(10, (len(evaluations) + 1) // 2)
    return statistics.fmean(score for _, score in evaluations[-last:])


# --- end shared ---


# --- shared: run ---
class Run:
    """What a run leaves behind (folder, W&B), its training clock, progress bar and signals."""

    def __init__(self, args: "Args", metrics: list[str], stats: dict, progress: dict, kernel: str = "torch"):
        self.args, self.stats, self.stop_signal = args, stats, None
        self.last_checkpoint = progress["global_step"] if args.resume else None
        facts = {
            "n": getattr(args, "n", None), "m": getattr(args, "m", None), "kernel": kernel, "threads": args.threads,
            "hardware": hardware_name(args), "cores": os.cpu_count(), **stats,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy", "wandb")},
        }  # fmt: skip
        facts["commit"], facts["dirty"] = git_state()
        if args.resume:
            self.dir, self.meta = Path(args.resume), read_meta(args.resume)
            new = [key for key in ("kernel", "threads", "hardware", "versions") if facts[key] != self.meta[key]]
            if new:
                changes = "; ".join(f"{key} was {self.meta[key]}, is {facts[key]}" for key in new)
                print(f"warning: not bit for bit: {changes}", file=sys.stderr)
            facts = {"resumed": [*self.meta.get("resumed", []), {"global_step": self.last_checkpoint, **facts}]}
        else:
            self.dir = new_run_dir(args)
            (self.dir / "replay").mkdir()
            self.meta = {"script": Path(__file__).name, "run_name": self.dir.name, "start": utc_now()}
            self.meta["wandb_id"] = f"{self.dir.name}-{os.urandom(2).hex()}"  # names are unique in a folder only
        self.csv = open_metrics(self.dir / "metrics.csv", metrics, progress.get("csv_bytes", 0))
        self.writer = csv.DictWriter(self.csv, metrics, lineterminator="\n")  # a key that is not in `metrics` raises
        self.meta |= facts | {"args": vars(args) | {"resume": None}, "end": None, "exit_reason": "running"}
        self.meta |= {"final_score": None}
        self.write_meta()
        self.wandb = start_wandb(args, self.meta)
        self.bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())  # fmt: skip
        self.clock = time.perf_counter() - progress["wall_time_s"]
        self.last_row = (progress["global_step"], progress["wall_time_s"])

    def __enter__(self) -> "Run":
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                    self.handlers[number] = signal.signal(number, self.stop)
        self.say(f"{self.dir}: {f'resumed at step {self.last_checkpoint}' if self.args.resume else 'started'}")
        return self

    def stop(self, number: int, _frame) -> None:
        if self.stop_signal and number != signal.SIGHUP:
            os._exit(128 + number)
        self.stop_signal = "sigint" if number == signal.SIGINT else "sigterm"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping at the end of this episode; once more to leave at once\n")

    def __exit__(self, kind, error, _traceback) -> None:
        self.restore_signals()
        self.bar.close()
        stopped = self.meta["exit_reason"] == "running"
        if stopped:
            reasons = {None: self.stop_signal, NonFiniteError: "nan"}
            self.meta["exit_reason"] = reasons.get(kind, "error")
        self.meta["end"] = utc_now()
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
            self.write_meta()
        with contextlib.suppress(OSError):
            self.csv.close()
        if self.wandb:
            self.attempt("upload to W&B", self.finish_wandb)
        if stopped:
            last = f"last checkpoint: {self.dir}/checkpoint.pt, step {self.last_checkpoint} (--resume {self.dir})"
            last = "no checkpoint yet" if self.last_checkpoint is None else last
            with contextlib.suppress(OSError):
                stream = sys.stderr if kind else sys.stdout
                print(f"stopped by {self.meta['exit_reason']}; {last}", file=stream, flush=True)

    def restore_signals(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def attempt(self, what: str, action) -> bool:
        """Do what a run must not fail for; False if it failed."""
        try:
            action()
            return True
        except Exception as error:
            self.say(f"warning: no {what}: {first_line(error)}")
            return False

    def say(self, message: str) -> None:
        with contextlib.suppress(OSError):  # whoever reads this may be gone; the run goes on
            print(message, flush=True) if self.bar.disable else self.bar.write(message)

    def write_meta(self) -> None:
        text = json.dumps(self.meta, indent=2) + "\n"
        write_atomic(self.dir / "meta.json", lambda file: file.write(text.encode()))

    @contextlib.contextmanager
    def paused(self):
        """Stop the training clock."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def wall_time_s(self) -> float:
        return time.perf_counter() - self.clock

    def steps_per_second(self, global_step: int) -> float:
        """Environment steps per training second since the last call."""
        (step, seconds), self.last_row = self.last_row, (global_step, self.wall_time_s())
        return (global_step - step) / (self.last_row[1] - seconds)

    def log(self, global_step: int, row: dict[str, float]) -> None:
        """Write a row of metrics.csv (on disk when this returns) and of W&B."""
        row = {"global_step": global_step, "charts/wall_time_s": self.wall_time_s(), **row}
        self.writer.writerow(row)
        self.csv.flush()
        if self.wandb and not self.attempt("more rows in W&B", lambda: self.wandb.log(row)):
            self.wandb = None
        if "eval/episodic_return" in row:
            result = f"eval {row['eval/episodic_return']:.1f} ± {row['eval/episodic_return_std']:.1f}"
            self.bar.set_postfix_str(result)
            if self.bar.disable:
                rate = row.get("charts/SPS") or global_step / row["charts/wall_time_s"]
                left = (self.args.total_timesteps - global_step) / 60 / rate if rate else 0
                self.say(f"step {global_step}: {result}" + f", {rate:.0f} steps/s, {left:.1f} min left" * (rate > 0))

    def checkpoint_due(self, global_step: int, env: gym.Env, stop: str | None) -> bool:
        """At an episode's end: after each interval, on a stop signal, and (--keep-replay) if it may be the last one.

        Never at the very end, whose extra evaluation a longer run would not have made.
        """
        interval, left = self.args.checkpoint_interval, self.args.total_timesteps - global_step
        last = self.args.keep_replay and left <= (env.spec.max_episode_steps or 0)
        passed = global_step // interval > self.last_checkpoint // interval
        return left > 0 and (passed or last or bool(stop))

    def finish(self, score: float, model: dict) -> None:
        """All training is done: write what remains to be written, drop what only a resume needs."""
        write_torch(self.dir / "model.pt", model)
        os.fsync(self.csv.fileno())
        self.meta |= {"exit_reason": "finished", "final_score": score, "wall_time_s": self.wall_time_s()}
        self.write_meta()
        if not self.args.keep_replay:
            shutil.rmtree(self.dir / "replay")
        self.say(f"{self.dir}: finished, final score {score:.1f}")
        self.restore_signals()

    def film(self, actor: "Actor", seed: int) -> None:
        evaluate(actor, self.args.env_id, [seed], self.args.total_timesteps, self.dir / "videos" / "final")
        path = max((self.dir / "videos").glob("*.mp4"), key=os.path.getmtime)
        self.say(f"video: {path}")
        if self.wandb:
            import wandb

            self.wandb.log({"video": wandb.Video(str(path), format="mp4"), "global_step": self.args.total_timesteps})

    def finish_wandb(self) -> None:
        self.wandb.summary.update({"final_score": self.meta["final_score"], **self.meta.get("hardware_report", {})})
        for path in (self.dir / "meta.json", self.dir / "masks.npz"):
            if path.exists():  # a copy: it stays when the run's folder goes
                self.wandb.save(shutil.copy(path, self.wandb.dir), base_path=self.wandb.dir, policy="now")
        self.wandb.finish(exit_code=int(self.meta["exit_reason"] != "finished"))


def new_run_dir(args: "Args") -> Path:
    pattern = f"_{args.n}of{args.m}" if hasattr(args, "n") else ""
    name = f"{args.env_id}__{args.exp_name}{pattern}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    name = re.sub(r"[^\w.-]", "-", name)
    try:
        Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                path = Path(args.runs_dir) / (name if number == 1 else f"{name}-{number}")
                path.mkdir()
                return path
    except OSError as error:
        raise UserError(f"--runs-dir {args.runs_dir} can't be written: {first_line(error)}") from None


def open_metrics(path: Path, metrics: list[str], size: int):
    """metrics.csv for appending, locked against a second process; of a resumed run its first `size` bytes are kept."""
    header = (",".join(metrics) + "\n").encode()
    try:
        file = open(path, "r+b" if size else "x+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path.parent} is being written by another process ({first_line(error)})") from None
    if size:
        kept = file.read(size)
        if len(kept) < size or not kept.startswith(header) or not kept.endswith(b"\n"):
            raise UserError(f"{path} is damaged or was written by another version of this script")
        file.truncate(size)
    else:
        file.write(header)
    return io.TextIOWrapper(file, newline="", write_through=True)


def start_wandb(args: "Args", meta: dict):
    """A W&B run under the run's own name; offline, with a line that says so, without a login or a network."""
    if not args.track:
        return None
    import wandb

    pattern = f"{args.n}of{args.m}" if hasattr(args, "n") else "dense"
    options = {
        "project": args.wandb_project_name, "entity": args.wandb_entity, "id": meta["wandb_id"],
        "name": meta["run_name"], "group": args.env_id, "tags": [pattern, Path(__file__).stem],
        "config": {**meta["args"], "meta": {key: value for key, value in meta.items() if key != "args"}},
        "resume": "allow" if args.resume else None,
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }  # fmt: skip
    try:
        offline = not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False, verify=False)
        run = wandb.init(mode="offline" if offline else os.environ.get("WANDB_MODE") or None, **options)
    except Exception as error:  # no network, a wrong key, project or mode: none of them may cost a run
        print(f"warning: W&B: {first_line(error)}", file=sys.stderr)
        wandb.teardown()
        os.environ["WANDB_MODE"] = "offline"
        try:
            run = wandb.init(**options)
        except Exception:
            print("warning: going on without W&B", file=sys.stderr)
            return None
    if run.disabled:
        return None
    run.define_metric("*", step_metric="global_step")
    folder = Path(run.dir).parent
    offline_line = f"W&B is offline: look with `wandb leet {folder.parent}`, upload with `wandb sync {folder}`"
    print(offline_line if run.offline else f"W&B: {run.url}")
    return run


def write_atomic(path: Path, write) -> None:
    """write(file) into a temporary file, then move it to `path`: the old or the new file is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_torch(path: Path, content: dict) -> None:
    buffer = io.BytesIO()  # torch.save itself doesn't report a full disk as an OSError
    torch.save(content, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def read_torch(path: Path) -> dict:
    if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch.load does not look at checksums
        raise ValueError(f"{broken} is not what was written")
    return torch.load(path, weights_only=True, map_location="cpu")


def save_checkpoint(run: Run, progress: dict, agent: "Agent", rb: ReplayBuffer, rng: dict, env: gym.Env, model) -> None:
    """All that a resume needs at an episode's end: tensors and plain values, so that it loads with weights_only."""
    run.csv.flush()
    os.fsync(run.csv.fileno())
    rb.save(run.dir / "replay")
    write_torch(run.dir / "model.pt", model)
    content = {
        "args": vars(run.args),
        "progress": progress | {"csv_bytes": os.fstat(run.csv.fileno()).st_size},
        "agent": {name: part.state_dict() for name, part in vars(agent).items() if hasattr(part, "state_dict")},
        "rng": {name: generator.get_state() for name, generator in rng.items()},
        "env_rng": env.unwrapped.np_random.bit_generator.state,
        "replay": {"files": rb.files, "added": rb.added},
    }
    write_torch(run.dir / "checkpoint.pt", content)
    run.last_checkpoint = progress["global_step"]
    needed = {f"{start}-{stop}.npz" for start, stop in rb.files}
    for path in (run.dir / "replay").iterdir():
        if path.name not in needed:
            path.unlink()


def load_checkpoint(args: "Args", agent: "Agent", rb: ReplayBuffer, rng: dict, env: gym.Env) -> dict:
    """Put the last checkpoint into freshly made objects (their memory stays theirs, so aligned); returns progress."""
    path = Path(args.resume) / "checkpoint.pt"
    if not (path.parent / "replay").is_dir():
        raise UserError(f"{args.resume} was finished without --keep-replay: its replay data is gone, it can't go on")
    try:
        content = read_torch(path)
        for name, value in content["args"].items():
            if value != getattr(args, name) and name not in MAY_CHANGE.split():
                raise ValueError(f"it was written with {flag(name)} {value}")
        for name, state in content["agent"].items():
            getattr(agent, name).load_state_dict(state)
        for name, generator in rng.items():
            generator.set_state(content["rng"][name])
        env.unwrapped.np_random.bit_generator.state = content["env_rng"]
        rb.load(path.parent / "replay", **content["replay"])
        return content["progress"]
    except FileNotFoundError as error:
        raise UserError(f"{args.resume} can't be resumed: {error.filename} is missing") from None
    except Exception as error:
        raise UserError(f"{path} or its replay data is damaged or foreign: {first_line(error)}") from None


def dense_state(agent: "Agent") -> dict[str, dict[str, torch.Tensor]]:
    """The six networks as model.pt holds them: weight (zeros where inactive) and bias of each layer, action scale."""
    states = {}
    for name, net in vars(agent).items():
        if isinstance(net, nn.Module):
            states[name] = {key: value for key, value in net.state_dict().items() if "." not in key}
            for layer_name, layer in net.named_children():
                states[name][f"{layer_name}.weight"] = layer.weight.detach()
                states[name][f"{layer_name}.bias"] = layer.bias.detach()
    return states


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git_state() -> tuple[str | None, bool | None]:
    """Commit of this script's checkout and whether tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        state = subprocess.check_output([*command, "--dirty"], stderr=subprocess.DEVNULL, text=True).strip()
        return state.removesuffix("-dirty"), state.endswith("-dirty")
    return None, None


def hardware_name(args: "Args") -> str:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line for line in open("/proc/cpuinfo") if line.startswith("model name")).split(": ")[1].strip()
    return cpu + (f", {torch.cuda.get_device_name()}" if args.device == "cuda" else "")


def model_stats(args: "Args", shapes: dict[str, list[tuple[int, int, int]]]) -> dict:
    """Size and work of the networks, dense and without the inactive weights.

    shapes: (outputs, inputs, weights kept per row) of each layer of actor, qf1 and qf2. Packed bytes: 4 for a kept
    value and 1 (2 if M > 256) for its place in the group. A product takes 2 * batch * weights FLOPs; an update has one
    for each target, 3 for each critic (2 in layer 1), and every policy_frequency-th time 3 for the actor, 2 for qf1.
    """
    layers = [layer for net in shapes.values() for layer in net]
    index_bytes = 1 if getattr(args, "m", 1) <= 256 else 2

    def flops(column: int) -> float:
        weights = {net: [layer[0] * layer[column] for layer in layers] for net, layers in shapes.items()}
        actor, critic, first = sum(weights["actor"]), sum(weights["qf1"]), weights["qf1"][0]
        products = actor + 2 * critic + 2 * (3 * critic - first) + (3 * actor + 2 * critic) / args.policy_frequency
        return 2 * args.batch_size * products

    return {
        "density": {net: sum(o * k for o, _, k in s) / sum(o * i for o, i, _ in s) for net, s in shapes.items()},
        "params_total": sum(o * i + o for o, i, _ in layers),
        "params_active": sum(o * k + o for o, _, k in layers),
        "bytes": {
            "dense": sum(4 * (o * i + o) for o, i, _ in layers),
            "packed": sum(4 * o + o * k * (4 + index_bytes * (k < i)) for o, i, k in layers),
        },
        "flops_per_update": {"dense": flops(1), "sparse": flops(2)},
    }


def hardware_report(run: Run, env: gym.Env, rb: ReplayBuffer, networks: tuple, seconds: float = 3) -> None:
    """Time acting, a critic update and a whole update with `networks` and, in turns, with plain nn.Linear ones."""
    args, dim = run.args, run.args.hidden_dim
    plain = [net.to(args.device) for net in (Actor(env, dim), QNetwork(env, dim), QNetwork(env, dim))]
    own = "dense" if isinstance(networks[0].fc1, nn.Linear) else "packed"
    agents = {name: make_agent(*nets, args.learning_rate) for name, nets in ((own, networks), ("dense", plain))}
    rng, every = make_generators(0, args.device), range(1, min(args.policy_frequency, 10) + 1)
    data = rb.sample(args.batch_size, rng["replay"])
    obs = data.observations[0].cpu().numpy()
    calls = {
        "actor_us": lambda agent: act(agent.actor, obs),
        "critic_update_us": lambda agent: update_critics(agent, data, args, rng["smoothing"]),
        "update_us": lambda agent: [update_agent(agent, rb, args, rng, update) for update in every],
    }
    times, stop = {(key, name): [] for key in calls for name in agents}, time.perf_counter() + seconds
    torch_threads = {"dense": args.threads, own: torch.get_num_threads()}
    while time.perf_counter() < stop:
        for (key, name), values in times.items():
            torch.set_num_threads(torch_threads[name])
            calls[key](agents[name])  # so that none finds the caches as another one left them
            start = time.perf_counter()
            calls[key](agents[name])
            if args.device == "cuda":
                torch.cuda.synchronize()
            values.append((time.perf_counter() - start) * 1e6 / (len(every) if key == "update_us" else 1))
    medians = {key: statistics.median(values[len(values) // 4 :]) for key, values in times.items()}  # less warm-up
    table = [["", *agents]]
    table += [[key.replace("_", " "), *(f"{medians[key, name]:,.0f}" for name in agents)] for key in calls]
    table.append(["actor + critics KiB", *(f"{run.stats['bytes'][name] / 1024:,.0f}" for name in agents)])
    run.say(f"{run.meta['hardware']}, {args.threads} threads, float32, batch {args.batch_size}; medians")
    for cells in table:
        run.say(f"{cells[0]:>20}" + "".join(f"{cell:>12}" for cell in cells[1:]))
    keys = {(key, name): f"hardware/{key}" + "_dense" * (name != own) for key, name in medians}
    run.meta["hardware_report"] = {keys[pair]: us for pair, us in medians.items()}
    run.write_meta()


# --- end shared ---


# --- kernels ---
# --- shared: kernels ---
# The same network function, several times faster on a CPU: packed row-wise N:M products that do N/M of the work.
#   forward      y[b, r]  = bias[r] + sum over k of values[r, k] x[b, index[r, k]]
#   grad-input   dx[b, c] = sum over all (r, k) with index[r, k] = c of values[r, k] dy[b, r]
#   grad-weight  dvalues[r, k] = sum over b of dy[b, r] x[b, index[r, k]],  dbias[r] = sum over b of dy[b, r]
KERNELS = r"""

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "little-endian");
#if defined(__AVX512F__)
enum { W = 16, TILES = 2 };  // floats in a vector; tiles at a time in grad_weight: as many as the registers hold
#elif defined(__AVX__)
enum { W = 8, TILES = 1 };
#else
enum { W = 4, TILES = 1 };
#endif
enum { V = 4, LANES = V * W };  // vectors and observations in a tile
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * W), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * W)));
static const vec zero;
#define AT(x, row) ((const vec *)((const char *)(x) + (size_t)(row) * LANES * sizeof(float)))
#ifdef __AVX512F__  // p[j] in every lane: four values share one load, and a shuffle is cheaper than a load
#include <immintrin.h>
#define SPREAD(p, j) ((vec)_mm512_permute_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), 0x55 * (j)))
#else
#define SPREAD(p, j) (zero + (p)[j])
#endif

#ifdef __x86_64__
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE
#endif
enum { FORWARD, BACK, GRAD };
typedef struct {
    int32_t rows, cols, kept, start, blocks[3], block[3];  // flat + start: val [rows][kept], then bias [rows]
    const int32_t *ends[3];       // [blocks][rows] first and then last + 1 of the entries in each block of columns ...
    const uint16_t *idx, *tidx;   // column of each value; BACK is by column, in blocks of rows: row of each value ...
    const int32_t *tpos;          // ... its place in val ...
    float *tval;                  // ... and val in this order
} layer;

#define TWO(m) { \
        const vec *p = AT(x, (uint16_t)(four >> 16 * (m))), *q = AT(x, (uint16_t)(four >> 16 * ((m) + 1))); \
        const vec v = SPREAD(val + k, m), w = SPREAD(val + k, (m) + 1); \
        for (int i = 0; i < V; i++) a[i] += v * p[i], b[i] += w * q[i]; }
// y[r] = sum over k of val[k] x[idx[k]] (+ bias[r]) on one tile; relu: max(y, 0); gate: 0 where gate <= 0.
INLINE void gather(const int transposed, const layer *l, const float *flat, int first, int count, const float *x,
                   float *y, int relu, const float *gate) {
    const int width = transposed ? l->cols : l->rows, blocks = l->blocks[transposed];
    const uint16_t *idx = transposed ? l->tidx : l->idx;
    const float *val = transposed ? l->tval : flat + l->start, *bias = val + l->rows * l->kept;
    const int32_t *start = l->ends[transposed], *end = start + blocks * width;
    for (int j = 0; j < blocks; j++)
        for (int r = first; r < first + count; r++) {
            vec a[V], b[V], *out = (vec *)y + (long)(r - first) * V;
            for (int i = 0; i < V; i++) {
                a[i] = zero + (transposed ? 0 : bias[r]), b[i] = zero;
                if (j) a[i] = out[i];
            }
            int k = start[j * width + r], stop = end[j * width + r];
            for (; k + 3 < stop; k += 4) {
                uint64_t four;  // one load for four indices
                memcpy(&four, idx + k, sizeof(four));
                TWO(0) TWO(2)
            }
            for (; k < stop; k++)
                for (int i = 0; i < V; i++) a[i] += val[k] * AT(x, idx[k])[i];
            for (int i = 0; i < V; i++) {
                a[i] += b[i];
                if (relu && j == blocks - 1) a[i] = (vec)((bits)a[i] & ~(a[i] <= zero));
                if (gate && j == blocks - 1) a[i] = (vec)((bits)a[i] & ~(((const vec *)gate)[r * V + i] <= zero));
                out[i] = a[i];
            }
        }
}

// Lane sums of 16 vectors and transposes of 16 x 16 floats: the same four rounds of shuffles.
#ifdef __AVX512F__
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bits){__VA_ARGS__})
#endif
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FOLD(s) INLINE vec fold_##s(vec a, vec b) { return SHUFFLE(a, b, LOW_##s) + SHUFFLE(a, b, HIGH_##s); }
FOLD(1) FOLD(2) FOLD(4) FOLD(8)
#define SWAP(s) for (int i = 0; i < 16; i++) if (!(i & s)) { \
        const vec low = SHUFFLE(p[i], p[i + s], LOW_##s); \
        p[i + s] = SHUFFLE(p[i], p[i + s], HIGH_##s), p[i] = low; }
static void transpose(const float *a, long a_stride, float *b, long b_stride) {
    vec p[16];
    for (int i = 0; i < 16; i++) memcpy(p + i, a + i * a_stride, sizeof(vec));
    SWAP(1) SWAP(2) SWAP(4) SWAP(8)
    for (int i = 0; i < 16; i++) memcpy(b + i * b_stride, p + i, sizeof(vec));
}
#else
static void transpose(const float *a, long a_stride, float *b, long b_stride) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) b[k * b_stride + i] = a[i * a_stride + k];
}
#endif

INLINE vec dot(const int tiles, const vec *d, const vec *x, long tile) {
    vec a = zero, b = zero;
    for (int i = 0; i < tiles * V; i += 2)
        a += d[i] * x[i / V * tile + i % V], b += d[i + 1] * x[i / V * tile + i % V + 1];
    return a + b;
}
// dval[k] += sum over b of dy[r][b] x[idx[k]][b] and dbias[r] += sum over b of dy[r][b], b in `tiles` tiles.
INLINE void grad_weight(const int tiles, const layer *l, float *dval, int r0, int r1, const float *dy, long dy_width,
                        const float *x, long x_width) {
    const int32_t *start = l->ends[GRAD], *stop = start + l->blocks[GRAD] * l->rows;
    float *dbias = dval + l->rows * l->kept;
    for (int j = 0; j < l->blocks[GRAD]; j++)
        for (int r = r0; r < r1; r++) {
            vec d[TILES * V];
            for (int i = 0; i < tiles * V; i++) d[i] = AT(dy, i / V * dy_width + r)[i % V];
            if (!j) {
                vec s = d[0];
                for (int i = 1; i < tiles * V; i++) s += d[i];
                for (int i = 0; i < W / 2; i++) s[i] += s[i + W / 2];
                for (int i = 0; i < W / 2; i++) dbias[r] += s[i];
            }
            const int end = stop[j * l->rows + r];
            for (int k = start[j * l->rows + r]; k < end; k += 16) {
#define DOT(m) (k + (m) < end ? dot(tiles, d, AT(x, l->idx[k + (m)]), x_width * V) : zero)
#ifdef __AVX512F__
#define DOTS_2(m) fold_1(DOT(m), DOT(m + 1))
#define DOTS_4(m) fold_2(DOTS_2(m), DOTS_2(m + 2))
#define DOTS_8(m) fold_4(DOTS_4(m), DOTS_4(m + 4))
                const vec sums = fold_8(DOTS_8(0), k + 8 < end ? DOTS_8(8) : zero);
                if (k + 16 <= end) for (int m = 0; m < 16; m++) dval[k + m] += sums[m];
                else for (int m = 0; k + m < end; m++) dval[k + m] += sums[m];
#else
                for (int m = 0; m < 16 && k + m < end; m++) {
                    const vec p = DOT(m);
                    for (int i = 0; i < W; i++) dval[k + m] += p[i];
                }
#endif
            }
        }
}

// Rows of the batch [batch][stride] to and from one tile [cols][LANES]; lanes past the batch are zero.
static void pack(const float *src, long stride, int batch, int tile, int cols, float *dst) {
    const int n = batch - tile * LANES < LANES ? batch - tile * LANES : LANES;
    src += (long)tile * LANES * stride;
    for (int i = 0; i < LANES; i += 16)
        for (int c = 0; c < cols; c += 16)
            if (i + 16 <= n && c + 16 <= cols) transpose(src + i * stride + c, stride, dst + c * LANES + i, LANES);
            else for (int m = i; m < i + 16; m++)
                for (int k = c; k < c + 16 && k < cols; k++) dst[k * LANES + m] = m < n ? src[m * stride + k] : 0;
}
static void unpack(const float *src, long stride, int batch, int tile, int cols, float *dst) {
    const int n = batch - tile * LANES < LANES ? batch - tile * LANES : LANES;
    dst += (long)tile * LANES * stride;
    for (int i = 0; i < n; i += 16)
        for (int c = 0; c < cols; c += 16)
            if (i + 16 <= n && c + 16 <= cols) transpose(src + c * LANES + i, LANES, dst + i * stride + c, stride);
            else for (int m = i; m < i + 16 && m < n; m++)
                for (int k = c; k < c + 16 && k < cols; k++) dst[m * stride + k] = src[k * LANES + m];
}

typedef struct {
    const layer *l;
    int64_t depth, width;  // width: outputs of all layers
} net;
typedef struct {  // a pass of networks over the same inputs, a and b [batch][...] side by side; ReLU between the layers
    const net *nets;
    const float *const *flat, *const *dout;  // of each net
    float *const *grad, *const *out;
    int32_t count, width, batch, tiles, a_cols, b_cols, record, weights;
    int64_t a_stride, b_stride;
    const float *a, *b;
    float *acts, *da, *db;     // acts [tile][inputs, then the outputs of each layer of each net][LANES]; da, db [net]
    int32_t first, chunk, at;  // backward is at net `at`, at `chunk` tiles from `first` on: scratch has room for them
} call;
typedef void task(const call *c, int part, int parts);
static struct { float *memory; size_t size; } scratch;

static void forward(const call *c, int part, int parts) {
    const int cols = c->a_cols + c->b_cols;
    for (int t = c->tiles * part / parts; t < c->tiles * (part + 1) / parts; t++) {
        float *input = (c->record ? c->acts : scratch.memory) + (long)(c->record ? t : part) * c->width * LANES;
        float *y = input + cols * LANES;
        pack(c->a, c->a_stride, c->batch, t, c->a_cols, input);
        pack(c->b, c->b_stride, c->batch, t, c->b_cols, input + c->a_cols * LANES);
        for (int i = 0; i < c->count; i++) {
            const layer *last = c->nets[i].l + c->nets[i].depth - 1;
            const float *x = input;
            for (const layer *l = c->nets[i].l; l <= last; l++) {
                gather(0, l, c->flat[i], 0, l->rows, x, y, l < last, 0);
                x = y, y += l->rows * LANES;
            }
            unpack(x, last->rows, c->batch, t, last->rows, c->out[i]);
        }
    }
}
static void values_by_column(const call *c, int part, int parts) {
    const net *n = c->nets + c->at;
    for (const layer *l = n->l + !(c->da || c->db); l < n->l + n->depth; l++)
        for (long k = (long)l->rows * l->kept * part / parts; k < (long)l->rows * l->kept * (part + 1) / parts; k++)
            l->tval[k] = c->flat[c->at][l->start + l->tpos[k]];
}
// Gradients of a layer's outputs stand in scratch [tile of the chunk][as in acts, of one net][LANES].
static void backward_inputs(const call *c, int part, int parts) {
    const net *n = c->nets + c->at;
    const layer *last = n->l + n->depth - 1;
    const int cols = c->a_cols + c->b_cols;
    long at = cols;
    for (int i = 0; i < c->at; i++) at += c->nets[i].width;
    for (int t = c->chunk * part / parts; t < c->chunk * (part + 1) / parts; t++) {
        const float *y = c->acts + ((long)(c->first + t) * c->width + at + n->width - last->rows) * LANES;
        float *d = scratch.memory + ((long)t * (cols + n->width) + cols + n->width - last->rows) * LANES;
        pack(c->dout[c->at], last->rows, c->batch, c->first + t, last->rows, d);
        for (const layer *l = last; l > n->l; l--) {
            y -= l->cols * LANES, d -= l->cols * LANES;
            gather(1, l, 0, 0, l->cols, d + l->cols * LANES, d, 0, y);
        }
        float *dx = d - cols * LANES;
        if (c->da) {
            gather(1, n->l, 0, 0, c->a_cols, d, dx, 0, 0);
            unpack(dx, c->a_cols, c->batch, c->first + t, c->a_cols, c->da + (long)c->at * c->batch * c->a_cols);
        }
        if (c->db) {
            gather(1, n->l, 0, c->a_cols, c->b_cols, d, dx, 0, 0);
            unpack(dx, c->b_cols, c->batch, c->first + t, c->b_cols, c->db + (long)c->at * c->batch * c->b_cols);
        }
    }
}
// A thread takes a share of each layer's rows, never of the batch: bits don't depend on the number of threads.
static void backward_weights(const call *c, int part, int parts) {
    const net *n = c->nets + c->at;
    const int cols = c->a_cols + c->b_cols;
    const float *input = c->acts + (long)c->first * c->width * LANES, *x = input, *dy = scratch.memory + cols * LANES;
    const float *y = input + cols * LANES;
    for (int i = 0; i < c->at; i++) y += c->nets[i].width * LANES;
    for (const layer *l = n->l; l < n->l + n->depth; l++) {
        const int from = l->rows * part / parts, to = l->rows * (part + 1) / parts;
        const long dy_width = cols + n->width;
        float *dval = c->grad[c->at] + l->start;
        if (!c->first) {
            memset(dval + (long)from * l->kept, 0, (long)(to - from) * l->kept * sizeof(float));
            memset(dval + (long)l->rows * l->kept + from, 0, (to - from) * sizeof(float));
        }
        for (int t = 0; t < c->chunk; t += c->chunk - t < TILES ? 1 : TILES)
            for (int r = from; r < to; r += 256) {
                const int end = r + 256 < to ? r + 256 : to;
                const float *dt = dy + t * dy_width * LANES, *xt = x + (long)t * c->width * LANES;
                if (c->chunk - t < TILES) grad_weight(1, l, dval, r, end, dt, dy_width, xt, c->width);
                else grad_weight(TILES, l, dval, r, end, dt, dy_width, xt, c->width);
            }
        x = y, y += l->rows * LANES, dy += l->rows * LANES;
    }
}
// One observation: plain dot products.
static void single(const call *c) {
    for (int i = 0; i < c->count; i++) {
        const net *n = c->nets + i;
        float *x = scratch.memory, *y;
        memcpy(x, c->a, c->a_cols * sizeof(float));
        if (c->b_cols) memcpy(x + c->a_cols, c->b, c->b_cols * sizeof(float));
        for (const layer *l = n->l; l < n->l + n->depth; l++, x = y) {
            const float *bias = c->flat[i] + l->start + l->rows * l->kept;
            y = l == n->l + n->depth - 1 ? c->out[i] : x + l->cols;
            for (int r = 0; r < l->rows; r++) {
                const uint16_t *idx = l->idx + (long)r * l->kept;
                const float *val = c->flat[i] + l->start + (long)r * l->kept;
                float s[8] = {bias[r]};
                int k = 0;
                for (; k + 7 < l->kept; k += 8)
                    for (int m = 0; m < 8; m++) s[m] += val[k + m] * x[idx[k + m]];
                for (; k < l->kept; k++) s[0] += val[k] * x[idx[k]];
                const float sum = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
                y[r] = y != c->out[i] && sum <= 0 ? 0 : sum;
            }
        }
    }
}

// Threads that wait for work: they spin for about as long as a training step takes, then sleep. ticket is
// serial * 65536 + threads wanted.
static struct {
    pthread_mutex_t busy, lock; pthread_cond_t wake; atomic_ullong ticket; atomic_int ready, done; int wanted;
    task *run; const call *c;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 1, 0, 1, 0, 0};
static void *worker(void *number) {
    unsigned long long seen = pool.ticket;
    pool.ready++;
    for (int spins = 0;; spins++) {
        if (spins > 40000) {
            pthread_mutex_lock(&pool.lock);
            while (pool.ticket == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
        const unsigned long long now = pool.ticket;
        if (now == seen) { PAUSE; continue; }
        seen = now, spins = 0;
        if ((intptr_t)number < (int)(now & 65535)) pool.run(pool.c, (intptr_t)number, now & 65535), pool.done++;
    }
    return 0;
}
static void split(task *run, const call *c) {
    if (pool.wanted == 1) { run(c, 0, 1); return; }
    pool.run = run, pool.c = c, pool.done = 0;
    pthread_mutex_lock(&pool.lock);
    pool.ticket = ((pool.ticket >> 16) + 1) << 16 | pool.wanted;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run(c, 0, pool.wanted);
    for (int spins = 0; pool.done < pool.wanted - 1; spins++) if (spins > 20000) sched_yield();
}
static void forked(void) {  // a child process has none of the threads, and nobody who would unlock
    pthread_mutex_init(&pool.busy, 0), pthread_mutex_init(&pool.lock, 0), pthread_cond_init(&pool.wake, 0);
    pool.ready = pool.wanted = 1;
    scratch.memory = 0;
    scratch.size = 0;
}
__attribute__((constructor)) static void loaded(void) { pthread_atfork(0, 0, forked); }
void nm_threads(int wanted) {
    pthread_t thread;
    pthread_mutex_lock(&pool.busy);
    for (int made = pool.ready; made < wanted; made++) {
        if (pthread_create(&thread, 0, worker, (void *)(intptr_t)made)) break;
        while (pool.ready == made) sched_yield();
    }
    pool.wanted = wanted < pool.ready ? wanted : pool.ready;
    pthread_mutex_unlock(&pool.busy);
}
int nm_lanes(void) { return LANES; }
static int reserve(size_t tiles, size_t width) {
    const size_t size = tiles * width * LANES * sizeof(float);
    if (size <= scratch.size) return 1;
    free(scratch.memory);
    scratch.memory = aligned_alloc(LANES * sizeof(float), size), scratch.size = scratch.memory ? size : 0;
    return scratch.size > 0;
}
int nm_forward(const call *c) {  // returns 0 if there is no memory
    pthread_mutex_lock(&pool.busy);
    const int single_path = c->batch == 1 && !c->record, done = c->record || reserve(pool.wanted, c->width);
    if (done && single_path) single(c);
    else if (done) split(forward, c);
    pthread_mutex_unlock(&pool.busy);
    return done;
}
int nm_backward(call *c) {
    int chunk, done = 1;
    pthread_mutex_lock(&pool.busy);
    chunk = pool.wanted * TILES;
    for (c->at = 0; c->at < c->count && (done = reserve(chunk, c->width)); c->at++) {
        split(values_by_column, c);
        for (c->first = 0; c->first < c->tiles; c->first += chunk) {
            c->chunk = c->tiles - c->first < chunk ? c->tiles - c->first : chunk;
            split(backward_inputs, c);
            if (c->weights) split(backward_weights, c);
        }
    }
    pthread_mutex_unlock(&pool.busy);
    return done;
}

// Fill ends[which] from idx; for BACK also tidx and tpos, by counting sort.
void nm_index(const layer *l, int which) {
    const int block = l->block[which], n = l->rows * l->kept;
    int32_t *start = (int32_t *)l->ends[which], *stop = start + l->blocks[which] * (which == BACK ? l->cols : l->rows);
    if (which != BACK) {
        for (int r = 0; r < l->rows; r++)
            for (int j = 0, k = r * l->kept; j < l->blocks[which]; j++) {
                start[j * l->rows + r] = k;
                while (k < (r + 1) * l->kept && l->idx[k] < (j + 1) * block) k++;
                stop[j * l->rows + r] = k;
            }
        return;
    }
    for (int j = 0, at = 0; j < l->blocks[BACK]; j++, start += l->cols, stop += l->cols) {
        const int from = j * block * l->kept, to = from + block * l->kept < n ? from + block * l->kept : n;
        memset(stop, 0, l->cols * sizeof(int32_t));
        for (int k = from; k < to; k++) stop[l->idx[k]]++;
        for (int c = 0; c < l->cols; c++) start[c] = at, at += stop[c], stop[c] = start[c];
        for (int k = from; k < to; k++) {
            const int at = stop[l->idx[k]]++;
            ((uint16_t *)l->tidx)[at] = k / l->kept, ((int32_t *)l->tpos)[at] = k;
        }
    }
}
"""


def structure(name: str, **fields) -> type[ctypes.Structure]:
    kinds = {"i": ctypes.c_int32, "l": ctypes.c_int64, "p": ctypes.c_void_p}
    return type(name, (ctypes.Structure,), {"_fields_": [(key, kinds.get(kind, kind)) for key, kind in fields.items()]})


THREE = ctypes.c_int32 * 3
Layer = structure("Layer", rows="i", cols="i", kept="i", start="i", blocks=THREE, block=THREE, ends=ctypes.c_void_p * 3,
                  idx="p", tidx="p", tpos="p", tval="p")  # fmt: skip
Net = structure("Net", l="p", depth="l", width="l")
Call = structure("Call", nets="p", flat="p", dout="p", grad="p", out="p", count="i", width="i", batch="i", tiles="i",
                 a_cols="i", b_cols="i", record="i", weights="i", a_stride="l", b_stride="l", a="p", b="p", acts="p",
                 da="p", db="p", first="i", chunk="i", at="i")  # fmt: skip


class Plan:
    """Networks on the same inputs as the kernels see them, with each index by columns too; made anew for new masks."""

    def __init__(self, nets: list[nn.Module]):
        self.lib, self.memory, self.free, self.networks = load_kernels(), [], [], nets
        self.lanes, self.state = self.lib.nm_lanes(), index_state(nets)
        self.indices = [layer.index for net in nets for layer in net.children()]  # held, so that their ids are theirs
        networks = [list(net.children()) for net in nets]
        for layers in networks:
            widths = [layers[0].W.shape[1], *(layer.W.shape[0] for layer in layers)]
            chain = [layer.W.shape[1] for layer in layers] == widths[:-1] and widths[0] == networks[0][0].W.shape[1]
            if not chain or max(widths) > 65_536:
                raise ValueError("the N:M kernels need chains of layers up to 65,536 wide: use --kernel torch")
            if any(layer.flat is not layers[0].flat for layer in layers):
                raise ValueError("layers of a network must share one flat parameter: load a state without assign=True")
        self.layers = [self.make_layers(layers) for layers in networks]
        sizes = [(ctypes.addressof(x), len(x), sum(layer.rows for layer in x)) for x in self.layers]
        self.nets, self.cols = (Net * len(sizes))(*sizes), self.layers[0][0].cols
        self.width = self.cols + sum(width for *_, width in sizes)
        self.sizes = [layers[-1].start + layers[-1].rows * (layers[-1].kept + 1) for layers in self.layers]

    def __reduce__(self):
        return type(None), ()  # addresses are those of the original: a copied or loaded network makes its own plan

    def make_layers(self, modules: list[nn.Module]) -> ctypes.Array:
        layers = (Layer * len(modules))()
        for layer, module in zip(layers, modules, strict=True):
            (layer.rows, layer.kept), layer.cols, layer.start = module.index.shape, module.W.shape[1], module.start
            count = module.index.numel()
            layer.idx = self.hold(module.index.to(torch.uint16).contiguous())
            layer.tidx = self.hold(torch.empty(count, dtype=torch.uint16))
            layer.tpos, layer.tval = (self.hold(torch.empty(count, dtype=kind)) for kind in (torch.int32, torch.float))
            blocks = (layer.cols, 128), (layer.rows, 128), (layer.cols, max(64, 8 * layer.cols // layer.kept))
            for which, (length, block) in enumerate(blocks):  # what a block of x takes stays in the L1 cache
                layer.block[which], layer.blocks[which] = block, -(-length // block)
                size = 2 * layer.blocks[which] * (layer.rows + layer.cols - length)
                layer.ends[which] = self.hold(torch.empty(size, dtype=torch.int32))
                self.lib.nm_index(ctypes.byref(layer), which)
        return layers

    def hold(self, tensor: torch.Tensor) -> int:
        self.memory.append(tensor)
        return tensor.data_ptr()

    def call(self, inputs, flats, douts=(), grads=(), outs=(), record=False, acts=None, dx=(None, None)) -> Call:
        pointers = [tensor.data_ptr() for tensors in (flats, douts, grads, outs) for tensor in tensors]
        pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        flat, size = ctypes.addressof(pointers), 8 * len(flats)
        dout = flat + size  # forward: no douts and grads, so that outs stand here
        (batch, a_cols), a_stride, a = inputs[0].shape, inputs[0].stride(0), inputs[0].data_ptr()
        b_cols, b_stride, b = 0, 0, None
        if len(inputs) == 2:
            b_cols, b_stride, b = inputs[1].shape[1], inputs[1].stride(0), inputs[1].data_ptr()
        call = Call(ctypes.addressof(self.nets), flat, dout, dout + size, dout, len(flats), self.width, batch,
                    -(-batch // self.lanes), a_cols, b_cols, record, bool(grads), a_stride, b_stride, a, b, acts,
                    *dx)  # fmt: skip
        call.pointers = pointers  # live as long as the call
        return call

    def run(self, entry, *args, **options) -> None:
        if not entry(ctypes.byref(self.call(*args, **options))):
            raise MemoryError("no memory for the N:M kernels")

    def forward(self, inputs, flats, lease=None) -> list[torch.Tensor]:
        outs = [torch.empty(len(inputs[0]), layers[-1].rows, dtype=torch.float32) for layers in self.layers]
        self.run(self.lib.nm_forward, inputs, flats, outs=outs, record=lease is not None, acts=lease and lease.address)
        return outs


class Lease:
    """Memory for the activations of a forward pass: its own until its graph is gone, then that of a later pass."""

    def __init__(self, free: list[torch.Tensor], size: int):
        self.free, self.memory = free, None
        with contextlib.suppress(IndexError):
            self.memory = free.pop()
        if self.memory is None or self.memory.numel() != size:
            self.memory = torch.empty(size, dtype=torch.float32)
        self.address = self.memory.data_ptr()

    def __del__(self):
        self.free.append(self.memory)


class KernelMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, flats = tensors[: -len(plan.layers)], tensors[-len(plan.layers) :]
        lanes = plan.lanes
        ctx.plan, ctx.lease = plan, Lease(plan.free, -(-len(inputs[0]) // lanes) * lanes * plan.width)
        ctx.inputs = inputs
        ctx.save_for_backward(*flats)  # changed in place before backward: torch raises
        return tuple(plan.forward(inputs, flats, ctx.lease))

    @staticmethod
    def backward(ctx, *douts: torch.Tensor):
        plan, inputs, flats, needed = ctx.plan, ctx.inputs, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            raise RuntimeError("the N:M kernels have no second derivative: use --kernel torch")
        if plan.state != index_state(plan.networks):
            raise RuntimeError("a mask was modified by an inplace operation between forward and backward")
        empty = torch.empty if len(inputs[0]) else torch.zeros  # the kernels fill them, tile by tile
        dx = [empty(len(flats), *x.shape, dtype=x.dtype) if n else None for x, n in zip(inputs, needed, strict=False)]
        grads = [empty(len(flat), dtype=flat.dtype) for flat in flats] if any(needed[len(inputs) :]) else ()
        pointers = [d if d is None else d.data_ptr() for d in (*dx, None)[:2]]
        douts = [dout.contiguous() for dout in douts]
        plan.run(plan.lib.nm_backward, inputs, flats, douts, grads, acts=ctx.lease.address, dx=pointers)
        return None, *(d if d is None else d.sum(0) for d in dx), *(grads or [None] * len(flats))


def index_state(nets: list[nn.Module]) -> list[tuple[int, int]]:
    """Changes whenever the index of an N:M layer does, while a plan holds the old one."""
    indices = [layer._buffers["index"] for net in nets for layer in net._modules.values()]
    return [(id(index), index._version) for index in indices]


def nm_mlp(nets: list[nn.Module], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """mlp() by the kernels, a whole pass per call: inputs [B, ...] (float32, on the CPU) -> [B, out] of each."""
    plans, key = nets[0].plans, tuple(map(id, nets))
    plan = plans.get(key)
    if plan is None or plan.state != index_state(nets):
        if len(plans) == 8:  # networks come and go: don't hold them all
            plans.clear()
        plan = plans[key] = Plan(nets)
    if len(inputs) > 2:
        inputs = inputs[0], torch.cat(inputs[1:], dim=1)
    flats = [next(iter(net._modules.values()))._parameters["flat"] for net in nets]
    batch, widths, fits = len(inputs[0]), 0, True
    for x in inputs:
        fits = fits and x.dim() == 2 and len(x) == batch and x.dtype is torch.float32 and not x.is_cuda
        widths += x.shape[-1]
    for flat, size in zip(flats, plan.sizes, strict=True):
        fits = fits and flat.dtype is torch.float32 and len(flat) == size and flat.is_contiguous() and not flat.is_cuda
    if not fits or widths != plan.cols:
        shapes = [(tuple(x.shape), x.dtype) for x in inputs]
        raise ValueError(f"the N:M kernels take float32 [B, {plan.cols}] in all on the CPU, not {shapes}")
    inputs = [x if x.stride(1) == 1 else x.contiguous() for x in inputs]
    if torch.is_grad_enabled():
        return list(KernelMLP.apply(plan, *inputs, *flats))
    return plan.forward(inputs, flats)


@cache
def load_kernels(source: str = KERNELS) -> ctypes.CDLL:
    """Compile `source` with the system's C compiler, or take what was compiled before. Raises OSError.

    The file's name is a hash of source, flags and what the compiler says of itself and of this CPU. It is written
    elsewhere and moved into place, so that many processes may do so at once and a killed one leaves nothing half done.
    """
    import hashlib
    import shlex
    import tempfile

    compiler = shlex.split(os.environ.get("CC") or "cc")
    for native in ("-march=native", "-mcpu=native", "-O3"):
        probe = subprocess.run([*compiler, native, "-dM", "-E", "-x", "c", os.devnull], capture_output=True)
        if probe.returncode == 0:
            break
    flags = ["-O3", native, "-shared", "-fPIC", "-pthread"]
    key = hashlib.sha256(repr((source, compiler, flags, probe.stdout)).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(os.devnull if home.startswith("~") else home, "nm-sparse-rl", f"{key}.so")  # no home: nothing is kept
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "kernels.so"
        command = [*compiler, *flags, "-x", "c", "-", "-o", built]
        run = subprocess.run(command, input=source.encode(), capture_output=True)
        if run.returncode:
            raise OSError(f"{compiler[0]} failed: {run.stderr.decode().strip().partition(chr(10))[0]}")
        with contextlib.suppress(OSError):  # a cache that can't be written: compile at each start
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_name(f"{key}-{os.getpid()}.so")  # so that nobody else writes it
            with open(own, "wb") as file:
                file.write(built.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(own, path)
        return ctypes.CDLL(str(built))


# --- end shared ---


def pick_kernel(args: Args) -> str:
    """What --kernel means here: "nm" or "torch". auto: nm on a CPU with a C compiler, if n < m and if it is faster."""
    if args.kernel == "torch" or args.device != "cpu" or (args.kernel == "auto" and args.n == args.m):
        return "torch"
    try:
        library = load_kernels()
        if args.kernel == "auto" and library.nm_lanes() < 32 and 4 * args.n > args.m:
            return "torch"  # without AVX 2:4 was slower than dense, 1:4 1.3 times as fast
        library.nm_threads(args.threads)
        torch.set_num_threads(1)  # the rest is small, and torch's waiting threads would take the kernels' cores
        return "nm"
    except (OSError, ValueError) as error:  # ValueError: an unclosed quote in CC
        if args.kernel == "nm":
            raise UserError(f"--kernel nm: {first_line(error)}") from None
        warn_once(f"going on with --kernel torch, several times slower: {first_line(error)}")
        return "torch"


@cache
def warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# --- end kernels ---


if __name__ == "__main__":
    sys.exit(main())
