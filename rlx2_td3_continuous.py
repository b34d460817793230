"""RLx2 in one file: TD3 whose networks are sparse, without structure, and change their topology as they learn.

  Tan et al., "RLx2: Training a Sparse Deep Reinforcement Learning Model from Scratch", ICLR 2023, arXiv 2205.15043
  Evci et al., "Rigging the Lottery: Making All Tickets Winners" (RigL), ICML 2020, arXiv 1911.11134
  Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods" (TD3), arXiv 1802.09477

  Erdos-Renyi densities of the layers                            -> erdos_renyi, sparsify
  RigL and SET: drop small weights, grow others, every Delta     -> drop_fractions, dense_gradients, change_topology
  multi-step target after a delay                                -> ReplayBuffer.sample, update_agent
  dynamic-capacity buffer                                        -> shrink_replay
  TD3, Algorithm 1: smoothed, clipped double-Q target; delays    -> update_critics, update_actor, update_agent

Train with `python rlx2_td3_continuous.py --env-id Ant-v4 --actor-sparsity 0.96 --critic-sparsity 0.88`, go on with
--resume runs/<run_name>, measure a trained policy with --evaluate runs/<run_name>. Baselines, by further flags:
  RigL    --nstep 1 --no-dynamic-buffer
  SET     --nstep 1 --no-dynamic-buffer --topology set
  static  --nstep 1 --no-dynamic-buffer --topology static

Decisions, where the paper, its code (tyq1024/RLx2, commit 3f4898b) and good sense differ:
  R1  The first topology keeps the largest of the initial weights, as the code does; the paper says random.
  R2  Delta counts a network's own updates and zeta falls to 0 over them, as in the code: the actor changes every
      policy_frequency * Delta steps.
  R3  A change takes the place of that update's step of Adam, as in the code; the paper does not say so.
  R4  What was just dropped may grow again, then with its value and moments; all else grows from zero. As the code.
  R5  Adam forgets a dropped weight; its step count goes on, so that a grown weight moves by several learning rates at
      first. In the code moments fade for Delta updates: nearly the same when these are 10,000.
  R6  Growth goes by the loss that the network descends; in the code the actor's gradients can leak into the critics'.
  R7  Targets have the online topology from the start; in the code the first two targets come from dense networks.
  R8  A window of n steps ends where the episode does; only a termination cuts the bootstrap, also one at the time
      limit's step, unlike in the code. The switch to n steps counts updates, as there.
  R9  Policy distance as in the code, to which its threshold belongs: over the oldest 8 batches half the mean squared
      difference to the noise-free action at the time, in action scales; one shrink at most per check. The paper: an L2
      norm, until it is below.
  R10 Biases are dense and not counted, as in the code.
  R11 One random stream per purpose: all scripts' runs of a seed share warm-up data (D8 of rnm_td3_continuous.py).
"""

import ast
import contextlib
import copy
import csv
import ctypes
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zipfile
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, get_type_hints
from unittest import mock
from weakref import WeakKeyDictionary

SOURCE = Path(__file__).read_text()  # what runs: the file may be edited while the rest is imported

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

Natural = Annotated[int, 0, 2**62]  # a type with the smallest and the largest value that check_args lets pass
Positive = Annotated[int, 1, 2**31]
Share = Annotated[float, 0.0, 1.0]
Rate = Annotated[float, 1e-12, 1.0]
Noise = Annotated[float, 0.0, 1e6]


@dataclass(frozen=True)  # a schedule is no argument: docs/forking.md
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    seed: Natural = 1
    """seed of every random stream, integer >= 0"""
    env_id: str = "Hopper-v4"
    """gymnasium id of an environment with flat observations and bounded continuous actions"""
    total_timesteps: Positive = 3_000_000
    """environment steps, >= 1"""
    learning_rate: Rate = 3e-4
    """Adam's step size of actor and critics, in (0, 1]"""
    buffer_size: Positive = 1_000_000
    """capacity of the replay buffer in transitions, >= 1"""
    gamma: Share = 0.99
    """discount factor, in [0, 1]"""
    tau: Rate = 0.005
    """share of the online network in each Polyak average, in (0, 1]"""
    batch_size: Annotated[int, 1, 2**20] = 256
    """transitions per update, 1 to 1,048,576"""
    policy_noise: Noise = 0.2
    """standard deviation of the target policy's smoothing noise, in units of the action scale, >= 0"""
    exploration_noise: Noise = 0.1
    """standard deviation of the acting noise, in units of the action scale, >= 0"""
    noise_clip: Noise = 0.5
    """bound of the smoothing noise, in units of the action scale, >= 0"""
    learning_starts: Natural = 25_000
    """environment steps with uniform random actions and no updates before learning, >= 0"""
    policy_frequency: Positive = 2
    """critic updates per update of the actor and the targets (TD3's d), >= 1"""
    hidden_dim: Annotated[int, 1, 2**15] = 256
    """units in each of the two hidden layers, 1 to 32,768"""
    actor_sparsity: Share = 0.98
    """share of the actor's weights that are zero, in [0, 1); layers differ (Erdos-Renyi)"""
    critic_sparsity: Share = 0.95
    """share of the critics' weights that are zero, in [0, 1); both critics share one budget"""
    topology: Literal["rigl", "set", "static"] = "rigl"
    """where weights grow: at the largest gradients, anywhere, nowhere (the first topology stays)"""
    mask_update_interval: Annotated[int, 2, 2**31] = 10_000
    """updates of a network between changes of its topology (Delta), >= 2"""
    drop_fraction: Share = 0.5
    """share of a layer's weights that the first change drops (zeta_0), in [0, 1]; falls to 0 along a cosine"""
    nstep: Annotated[int, 1, 1000] = 3
    """steps of the multi-step target (n), 1 to 1,000, at most --buffer-size"""
    delay_nstep: Natural = 300_000
    """number of the first update with --nstep, >= 0"""
    dynamic_buffer: bool = True
    """let the replay buffer forget its oldest tenth when the policy has moved away from it"""
    buffer_min_size: Positive = 100_000
    """transitions at and below which the buffer does not shrink, >= 1"""
    buffer_check_interval: Positive = 10_000
    """environment steps between looks at the policy's distance, >= 1"""
    buffer_threshold: Noise = 0.2
    """distance of the policy (R9) above which the buffer shrinks, half a mean square in action scales, >= 0"""
    kernel: Literal["auto", "nm", "torch"] = "auto"
    """how the sparse layers are computed: nm is fast, on CPUs with a C compiler; torch runs anywhere; auto picks one"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    threads: Annotated[int, 1, 1024] = 1
    """CPU threads of torch, 1 to 1,024; one per run fills a machine best"""
    eval_interval: Positive = 10_000
    """environment steps between evaluations (also at 0 and at the end), >= 1"""
    eval_episodes: Positive = 10
    """episodes per evaluation, >= 1"""
    checkpoint_interval: Positive = 100_000
    """environment steps between checkpoints, taken at the next episode end, >= 1"""
    resume: str | None = None
    """folder of the run to continue, bit for bit; its arguments come from there"""
    evaluate: str | None = None
    """folder of the run whose saved policy to evaluate instead of training"""
    keep_replay: bool = False
    """keep the replay data of a finished run; if its masks never change, a larger --total-timesteps can resume it"""
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


class SparseLinear(nn.Module):
    """nn.Linear with `kept` weights that may be anywhere: x [B, in] -> x W~^T + bias [B, out].

    Only `active_weights` [kept], row after row, and `bias` are parameters. Every other weight is zero: it has no
    gradient, no place in the optimizer, no store.
    """

    def __init__(self, linear: nn.Linear, kept: int):
        super().__init__()
        weight = linear.weight.detach()
        self.shape = weight.shape  # [out, in]
        largest = weight.abs().flatten().argsort(descending=True, stable=True)[:kept]  # R1
        self.register_buffer("positions", largest.sort().values)  # [kept], place of each active weight
        self.active_weights = nn.Parameter(weight.take(self.positions), linear.weight.requires_grad)
        self.register_parameter("bias", linear.bias)

    @property
    def E(self) -> torch.Tensor:
        """The mask [out, in], bool."""
        E = self.positions.new_zeros(self.shape.numel(), dtype=torch.bool)
        return E.index_fill_(0, self.positions, True).view(self.shape)

    def reset_parameters(self) -> None:
        raise NotImplementedError("a SparseLinear is not reset as nn.Linear is: see docs/forking.md")

    def sparse_weight(self) -> torch.Tensor:
        """W~ [out, in], zero at the inactive positions; its gradient reaches the active weights alone."""
        return self.active_weights.new_zeros(self.shape).put(self.positions, self.active_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.sparse_weight(), self.bias)


def sparsify(networks: dict[str, nn.Module], args: Args) -> dict[str, nn.Module]:
    """Make every nn.Linear sparse: the actor by its budget, the critics by theirs. Dense layers stay nn.Linear."""
    modules = [module for net in networks.values() for _, module in net.named_modules(remove_duplicate=False)]
    uses = Counter(id(param) for module in modules for param in module._parameters.values())
    for name, sparsity in (("actor", args.actor_sparsity), ("critic", args.critic_sparsity)):
        nets = [net for key, net in networks.items() if key.startswith("actor") == (name == "actor")]
        linears = [(net, *item) for net in nets for item in net.named_modules() if isinstance(item[1], nn.Linear)]
        densities = erdos_renyi([linear.weight.shape for _, _, linear in linears], sparsity)
        for (net, path, linear), density in zip(linears, densities, strict=True):
            if not is_plain(linear, nn.Linear) or any(uses[id(param)] > 1 for param in linear.parameters()):
                raise ValueError(f"sparsify does not know {path}: a subclass, a hook, or weights that are used twice")
            if density * linear.weight.numel() < 1:
                raise UserError(f"--{name}-sparsity {sparsity} leaves {path.removeprefix('net.')} less than one weight")
            kept = linear.weight.numel() - int((1 - density) * linear.weight.numel())
            parent, _, child = path.rpartition(".")
            if kept < linear.weight.numel():
                setattr(net.get_submodule(parent), child, SparseLinear(linear, kept))
    return networks


def drop_fractions(args: Args, update: int, global_step: int) -> dict[str, float]:
    """zeta, the share of its weights that the topology of "critics" and "actor" drops at the critics' update number
    `update`, made in step global_step, by a cosine over steps from drop_fraction to 0; a network that does not change
    is not in it. The actor can change only at multiples of policy_frequency."""
    zeta, now, last = {}, global_step - args.learning_starts, args.total_timesteps - args.learning_starts
    for name, every in (("critics", 1), ("actor", args.policy_frequency)):  # updates between those of its own (R2)
        due, end = update % (every * args.mask_update_interval) == 0, last // every * every
        if due and now < end and args.topology != "static":
            zeta[name] = args.drop_fraction / 2 * (1 + math.cos(math.pi * (now / end)))
    return zeta


# --- shared: topology ---
def drop_and_grow(layer: SparseLinear, score: torch.Tensor, drop: float) -> torch.Tensor:
    """[kept]: the share `drop` of the active weights, the smallest, give way to the others of the best score [out, in];
    what was just dropped is one of the others."""
    grown = int(len(layer.positions) * drop)
    order = layer.active_weights.abs().argsort(descending=True, stable=True)
    survivors = layer.positions[order[: len(order) - grown]]
    others = torch.ones_like(score.flatten()).index_fill_(0, survivors, 0).nonzero()[:, 0]
    others = others[score.flatten()[others].argsort(descending=True, stable=True)]
    return torch.cat([survivors, others[:grown]]).sort().values


def erdos_renyi(shapes: list[torch.Size], sparsity: float) -> list[float]:
    """Densities of layers [out, in], in proportion to (in + out) / (in * out), at most 1, so that in all a share of
    1 - sparsity is active (Mocanu et al., arXiv 1707.04780; the densest in turn become dense, as in RigL)."""
    raw = [(rows + cols) / (rows * cols) for rows, cols in shapes]
    dense = set()
    while len(dense) < len(shapes):
        budget = (1 - sparsity) * sum(map(math.prod, shapes)) - sum(math.prod(shapes[i]) for i in dense)
        rest = [i for i in range(len(shapes)) if i not in dense]
        epsilon = budget / sum(raw[i] * math.prod(shapes[i]) for i in rest)
        if epsilon * (top := max(raw[i] for i in rest)) <= 1:
            break
        dense |= {i for i in rest if raw[i] == top}
    return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]


@contextlib.contextmanager
def dense_gradients(networks: list["Network"]):
    """Within, each layer that trains computes in torch with the W~ [out, in] that this yields for it; its .grad is that
    of all weights. The active weights get theirs as always. One backward pass for all that a layer computes in it."""
    layers = [layer for net in networks for layer in sparse_layers(net.online).values()]
    layers = [layer for layer in layers if layer.active_weights.requires_grad]
    weights = {layer: layer.sparse_weight().requires_grad_() for layer in layers}
    for layer, weight in weights.items():
        weight.retain_grad()
        layer.sparse_weight = lambda weight=weight: weight
    try:
        yield weights
    finally:
        for layer in layers:
            del layer.sparse_weight


@torch.no_grad()
def change_topology(agent: "Agent", networks: list["Network"], gradients: dict, drop: float, regime: str, rule) -> None:
    """In each layer that trains drop the share `drop` of the active weights and grow as many: where the loss has the
    largest gradients (rigl) or anywhere (set). The optimizer's moments and the target's weights go along."""
    optimizers = [part for part in vars(agent).values() if isinstance(part, optim.Optimizer)]
    trained = {id(x) for optimizer in optimizers for x in held(optimizer)}
    for net in networks:
        for name, layer in sparse_layers(net.online).items():
            target = sparse_layers(net.target)[name]
            if layer not in gradients:  # frozen
                continue
            if (gradient := gradients[layer].grad) is None:
                raise ValueError(f"{net.name}.{name} has no gradient: not in the loss, or sparse_weight() is hidden")
            if id(layer.active_weights) not in trained:
                raise ValueError(f"{net.name} is trained by no torch.optim.Optimizer that is an attribute of Agent")
            if regime not in ("rigl", "set"):
                raise ValueError(f"change_topology has no score for {regime}")
            score = gradient.abs() if regime == "rigl" else torch.rand(layer.shape).to(gradient)
            if score.isnan().any():
                raise FloatingPointError(f"{net.name}.{name}: the gradient or the score that growth goes by is NaN")
            places = rule(layer, score, drop)
            if len(places) != len(layer.positions) or (places.diff() <= 0).any():
                raise ValueError(f"{net.name}.{name}: a rule returns as many places as before, each once, ascending")
            start = layer.active_weights.new_zeros(layer.shape)  # what a grown weight has, in the target, too
            packed = dict.fromkeys([layer.active_weights, target.active_weights], start)  # one, if a fork has no target
            for state in (optimizer.state.get(layer.active_weights, {}) for optimizer in optimizers):
                moments = [x for x in leaves(state).values() if torch.is_tensor(x) and x.dim()]  # Adam's two
                packed |= {x: x.new_zeros(layer.shape) for x in moments}
            for values, old in packed.items():  # what returns has its value and moments
                values.copy_(old.to(values).put(layer.positions, values).take(places))
            layer.positions.copy_(places)
            target.positions.copy_(places)


def step_or_change(agent: "Agent", optimizer, networks, gradients: dict, drop, regime: str, rule=drop_and_grow) -> None:
    """The optimizer's step, or a change of the topology by a rule in its place, if there is one to change."""
    if drop is None or not gradients:
        optimizer.step()
    else:
        change_topology(agent, networks, gradients, drop, regime, rule)


# --- end shared ---
# --- shared: networks ---
class Actor(nn.Module):
    """Deterministic policy pi(s): obs [B, obs_dim] -> action [B, action_dim], inside the action bounds."""

    def __init__(self, env: gym.Env, hidden_dim: int):
        super().__init__()
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        layers = {"fc1": nn.Linear(obs_dim, hidden_dim), "relu1": nn.ReLU()}
        layers |= {"fc2": nn.Linear(hidden_dim, hidden_dim), "relu2": nn.ReLU()}
        layers |= {"fc_mu": nn.Linear(hidden_dim, action_dim)}
        self.net = nn.Sequential(OrderedDict(layers))
        low, high = action_bounds(env)
        self.register_buffer("action_scale", (high - low) / 2)  # [action_dim], each dimension has its own
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(x)) * self.action_scale + self.action_bias


class QNetwork(nn.Module):
    """Critic Q(s, a): obs [B, obs_dim], action [B, action_dim] -> value [B, 1]."""

    def __init__(self, env: gym.Env, hidden_dim: int):
        super().__init__()
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        layers = {"fc1": nn.Linear(obs_dim + action_dim, hidden_dim), "relu1": nn.ReLU()}
        layers |= {"fc2": nn.Linear(hidden_dim, hidden_dim), "relu2": nn.ReLU()}
        layers |= {"fc3": nn.Linear(hidden_dim, 1)}
        self.net = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, a], dim=1))


def make_networks(args: Args, env: gym.Env) -> dict[str, nn.Module]:
    """The online networks, as nn.Linear initialises them from torch's global generator."""
    kinds = {"actor": Actor, "qf1": QNetwork, "qf2": QNetwork}
    return {name: kind(env, args.hidden_dim).to(args.device) for name, kind in kinds.items()}


# --- end shared ---
# --- shared: agent ---
Network = namedtuple("Network", "name online target")


class Agent:
    """TD3's networks (agent.qf1, agent.qf1_target, ..., agent.actor, agent.target_actor) and two optimizers."""

    def __init__(self, networks: dict[str, nn.Module], **adam):
        self.target_of = {name: "target_actor" if name == "actor" else f"{name}_target" for name in networks}
        for name, net in networks.items():  # targets start as copies
            vars(self).update({name: net, self.target_of[name]: copy.deepcopy(net).requires_grad_(False)})
        critics = [net for name, net in networks.items() if not name.startswith("actor")]  # all others
        self.q_optimizer = make_adam(nn.ModuleList(critics).parameters(), **adam)  # shared ones once
        self.actor_optimizer = make_adam(self.actor.parameters(), **adam)

    @property
    def networks(self) -> list[Network]:
        """Masks, Polyak averages, sizes, logged columns follow this list."""
        return [Network(name, getattr(self, name), getattr(self, target)) for name, target in self.target_of.items()]


@torch.no_grad()
def update_targets(agent: Agent, tau: float) -> None:
    """Polyak: target <- target + tau * (online - target)."""
    for net in agent.networks:
        for target, param in zip(net.target.parameters(), net.online.parameters(), strict=True):
            target.lerp_(param, tau)


class State:
    """What survives a resume beside Agent, replay and generators. What `train` must remember goes here: local variables
    start anew. Numbers, strings, tensors, arrays, networks, optimizers can be kept, also in lists, dicts and tuples."""

    def __init__(self):
        self.global_step, self.update = 0, 0  # environment steps taken, critic updates done
        self.losses = {}  # of the last updates
        self.form = None  # types, shapes of networks and optimizers at the first checkpoint
        self.evaluations = []  # [global_step, mean return], but for the one at step 0
        self.times, self.csv_bytes = [0.0, 0.0], 0  # training seconds by wall and CPU clock, length of metrics.csv


# --- end shared ---


def update_critics(agent: Agent, data, args: Args, generator: torch.Generator, drop: float | None = None) -> dict:
    """One step of both critics towards the clipped double-Q target, or a change of their topology (R3)."""
    with torch.no_grad():
        scale, bias = agent.actor.action_scale, agent.actor.action_bias  # [action_dim]
        noise = torch.empty_like(data.actions).normal_(0.0, args.policy_noise, generator=generator)  # [B, action_dim]
        noise = noise.clamp(-args.noise_clip, args.noise_clip) * scale
        next_state_actions = (agent.target_actor(data.next_observations) + noise).clamp(bias - scale, bias + scale)
        qf1_next_target = agent.qf1_target(data.next_observations, next_state_actions)
        qf2_next_target = agent.qf2_target(data.next_observations, next_state_actions)
        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
        next_q_value = data.rewards + (1 - data.dones) * data.discounts * min_qf_next_target  # [B, 1]

    critics = [net for net in agent.networks if not net.name.startswith("actor")]
    with dense_gradients(critics if drop is not None else []) as gradients:
        qf1_a_values = agent.qf1(data.observations, data.actions)
        qf2_a_values = agent.qf2(data.observations, data.actions)
        qf1_loss = F.mse_loss(qf1_a_values, next_q_value)
        qf2_loss = F.mse_loss(qf2_a_values, next_q_value)
        qf_loss = qf1_loss + qf2_loss
        agent.q_optimizer.zero_grad()
        qf_loss.backward()
    step_or_change(agent, agent.q_optimizer, critics, gradients, drop, args.topology)
    return {
        "losses/qf1_values": qf1_a_values.detach(),
        "losses/qf2_values": qf2_a_values.detach(),
        "losses/qf1_loss": qf1_loss.detach(),
        "losses/qf2_loss": qf2_loss.detach(),
        "losses/qf_loss": qf_loss.detach() / 2,  # as CleanRL logs it
    }


def update_actor(agent: Agent, data, args: Args, drop: float | None = None) -> dict[str, torch.Tensor]:
    """One step of the actor up the first critic's gradient, or a change of its topology (R3)."""
    critics = [param for group in agent.q_optimizer.param_groups for param in group["params"] if param.requires_grad]
    for param in critics:
        param.requires_grad_(False)  # the gradient passes through the critic, whose own weights need none here (R6)
    actors = [net for net in agent.networks if net.name.startswith("actor")]
    with dense_gradients(actors if drop is not None else []) as gradients:
        actor_loss = -agent.qf1(data.observations, agent.actor(data.observations)).mean()
        agent.actor_optimizer.zero_grad()
        actor_loss.backward()
    step_or_change(agent, agent.actor_optimizer, actors, gradients, drop, args.topology)
    for param in critics:
        param.requires_grad_(True)
    return {"losses/actor_loss": actor_loss.detach()}


def update_agent(agent: Agent, rb: "ReplayBuffer", args: Args, rng: dict, update: int, drops=None) -> dict:
    """Update number `update` (from 1) of TD3, Algorithm 1: critics; every d-th time actor, then targets. `drops`, from
    drop_fractions, says whose topology changes in it."""
    data = rb.sample(args.batch_size, rng["replay"], args.nstep if update >= args.delay_nstep else 1)  # R8
    drops = drops or {}
    losses = update_critics(agent, data, args, rng["smoothing"], drops.get("critics"))
    if update % args.policy_frequency == 0:
        losses |= update_actor(agent, data, args, drops.get("actor"))
        update_targets(agent, args.tau)
    return losses


def shrink_replay(rb: "ReplayBuffer", actor: Actor, args: Args) -> dict[str, float]:
    """Forget the oldest tenth of the replay data if the policy acts otherwise now than when they came in (R9)."""
    rows = rb.take(torch.arange(rb.oldest, min(rb.added, rb.oldest + 8 * args.batch_size)))
    with evaluating(actor):
        moved = (actor(rows.observations) - rows.policy_actions) / actor.action_scale  # [8 B, action_dim]
    distance = 0.5 * moved.square().mean().item()
    if distance > args.buffer_threshold and len(rb) > args.buffer_min_size:
        rb.oldest += int(0.1 * len(rb))
    return {"replay/policy_distance": distance, "replay/size": len(rb)}


def train(args: Args) -> dict:
    """Train; returns run_dir, exit_reason and final_score. docs/logging.md: its keys and files."""
    torch.set_num_threads(args.threads)
    env = make_env(args.env_id)
    rng = make_generators(args.seed, args.device)
    seed_globals(draw_seeds(rng["init"], 1)[0])
    agent = Agent(sparsify(make_networks(args, env), args), lr=args.learning_rate)
    width = equal_width(agent, args, env)
    stats = model_stats(agent) | {"kernel": use_kernel(args, agent, env), "pattern": pattern(args)}
    parts = transition_columns(env) | {"truncations": 1, "policy_actions": env.action_space.shape[0]}
    rb = ReplayBuffer(args.buffer_size, parts, args.device, args.gamma)
    eval_seeds = draw_seeds(rng["evaluation"], args.eval_episodes)
    low, high = action_bounds(env)  # [action_dim]
    exploration_scale = args.exploration_noise * (high - low) / 2
    env.reset(seed=draw_seeds(rng["env_reset"], 1)[0])  # once: later resets go on with the environment's own generator
    env.action_space.seed(args.seed)  # for forks that call env.action_space.sample()
    seed_globals(draw_seeds(rng["globals"], 1)[0])  # for what a fork draws with torch.rand, np.random or random

    state, first_masks = State(), get_masks(agent)
    state.masks = add_masks([], first_masks, state)  # what masks.npz will hold
    check_schedule(args)
    if args.resume:
        load_checkpoint(args, state, agent, rb, rng, env)
    columns = metric_columns(agent) + list(sad_metrics(first_masks, first_masks, first_masks))
    columns += ["replay/policy_distance", "replay/size"]
    with Run(args, columns, stats, state) as run:
        if width:
            run.say(f"as many weights have the same networks, dense, with --hidden-dim {width}")
        if not args.resume:
            run.log(0, run.density | run.evaluate(agent.actor, eval_seeds, 0))
            save_checkpoint(run, state, agent, rb, rng, env)
        obs, _ = env.reset()
        while state.global_step < args.total_timesteps:
            check_finite("observation", state.global_step, obs)
            if state.global_step < args.learning_starts:
                action = policy_action = low + (high - low) * torch.rand(low.shape, generator=rng["warmup"])
            else:
                noise = exploration_scale * torch.randn(low.shape, generator=rng["exploration"])
                policy_action = act(agent.actor, obs)
                action = (policy_action + noise).clamp(low, high)
            action = action.numpy()
            next_obs, reward, terminated, truncated, info = env.step(action)
            state.global_step = global_step = state.global_step + 1
            check_finite("observation or reward", global_step, next_obs, float(reward))
            # next_obs is the true successor, also where an episode is cut off: only termination cuts the bootstrap
            transition = {"observations": obs, "actions": action, "next_observations": next_obs, "rewards": reward}
            rb.add(**transition, dones=terminated, truncations=truncated, policy_actions=policy_action)
            obs = next_obs

            row, last = {}, global_step == args.total_timesteps
            if args.dynamic_buffer and global_step % args.buffer_check_interval == 0:
                with run.timed("updates"):
                    row |= shrink_replay(rb, agent.actor, args)
            if global_step > args.learning_starts:
                with run.timed("updates"):
                    state.update += 1
                    drops = drop_fractions(args, state.update, global_step)
                    masks = get_masks(agent) if drops else {}
                    state.losses |= update_agent(agent, rb, args, rng, state.update, drops)
                    check_finite("a loss", global_step, *(x.item() for x in state.losses.values() if not x.dim()))
                if masks:
                    now = get_masks(agent)
                    changed = {name: E for name, E in now.items() if "actor" in drops or not name.startswith("actor")}
                    row |= sad_metrics(first_masks, masks, changed)
                    state.masks = add_masks(state.masks, now, state)
            if terminated or truncated:
                row |= {"charts/episodic_return": info["episode"]["r"], "charts/episodic_length": info["episode"]["l"]}
            if global_step % 1000 == 0:
                row |= {key: (1.0 * x).mean().item() for key, x in state.losses.items()} | run.speed(state)  # ints, too
            if global_step % args.eval_interval == 0 or last:
                row |= run.evaluate(agent.actor, eval_seeds, global_step)
                state.evaluations.append([global_step, row["eval/episodic_return"]])
            run.bar.update()
            if row:
                run.log(global_step, row)

            if terminated or truncated:
                stop = run.stop_signal  # read once: a signal may come between the next lines
                if run.checkpoint_due(global_step, env, stop):
                    save_checkpoint(run, state, agent, rb, rng, env)
                if stop:
                    break
                obs, _ = env.reset()

        if state.global_step >= args.total_timesteps or not run.stop_signal:  # or a fork's own break
            write_files(run, state, agent, rb)
            run.finish(final_score(state.evaluations))
            if args.capture_video:
                run.attempt("video", lambda: evaluate(agent.actor, args.env_id, eval_seeds[:1], 0, run.dir / "videos"))
            run.attempt("hardware report", lambda: hardware_report(run, env, rb, agent))
    return {"run_dir": str(run.dir), "exit_reason": run.meta["exit_reason"], "final_score": run.meta["final_score"]}


# --- From here on: what a first reader may skip -------------------------------------------------------------------


def pattern(args: Args) -> str:
    """What runs are named and tagged by."""
    words = [args.topology] + [f"n{args.nstep}"] * (args.nstep > 1) + ["buffer"] * args.dynamic_buffer
    name = "rlx2" if words == ["rigl", "n3", "buffer"] else "-".join(words)
    return f"{name}_{100 * args.actor_sparsity:g}_{100 * args.critic_sparsity:g}"


def equal_width(agent: Agent, args: Args, env: gym.Env) -> int | None:
    """Hidden width at which dense networks have as many weights as these, biases aside; None if they don't go by it."""

    def count(networks) -> int:
        return sum(p.numel() for net in networks for name, p in net.named_parameters() if "bias" not in name)

    def dense(width: int) -> int:
        return count(make_networks(replace(args, hidden_dim=width), env).values())

    active = count(net.online for net in agent.networks)
    if dense(1) == dense(args.hidden_dim + 1):
        return None
    width = bisect_left(range(1, args.hidden_dim), active, key=dense) + 1
    return min((max(1, width - 1), width), key=lambda width: abs(dense(width) - active))


def check_schedule(args: Args) -> None:
    """Say what the flags ask for and this run will not come to. UserError for a later end: changes go by the end."""
    if args.nstep > args.buffer_size:
        raise UserError(f"--nstep {args.nstep} needs a --buffer-size of at least {args.nstep}")
    if args.resume and args.topology != "static" and args.total_timesteps != read_run(args.resume)[1].total_timesteps:
        raise UserError("--total-timesteps can't grow: this run's masks change by a schedule for its own length")
    for name in ("critics", "actor") if args.topology != "static" else ():
        updates = range(1, args.total_timesteps - args.learning_starts)
        if not any(drop_fractions(args, x, x + args.learning_starts).get(name) for x in updates):
            print(f"warning: the topology of {name} does not change in this run", file=sys.stderr)
    if args.nstep > 1 and args.delay_nstep > args.total_timesteps - args.learning_starts:
        print("warning: all targets have one step, --delay-nstep is beyond the run", file=sys.stderr)
    holds = min(args.buffer_size, args.total_timesteps)
    if args.dynamic_buffer and (args.buffer_min_size >= holds or args.buffer_check_interval > args.total_timesteps):
        print(
            "warning: the replay buffer never shrinks, see --buffer-min-size, --buffer-check-interval", file=sys.stderr
        )


# --- shared: sad ---
def sad_metrics(first: dict, previous: dict, current: dict) -> dict[str, float]:
    """SAD_{i:j} = |E_i - E_j|_0 (Zhou et al., SR-STE) over twice the active weights; masks by '<net>.<layer>'."""
    row = {}
    for key, reference in (("sad", previous), ("sad_initial", first)):
        for net in dict.fromkeys(name.split(".")[0] for name in current):
            layers = [name for name in current if name.split(".")[0] == net]
            count = {name: int((current[name] != reference[name]).sum()) for name in layers}
            active = {name: int(current[name].sum()) for name in layers}
            row[f"{key}/{net}"] = sum(count.values()) / (2 * sum(active.values()))
            row |= {f"{key}/{name.replace('.', '/')}": count[name] / (2 * active[name]) for name in layers}
            if key == "sad":
                row[f"sad_count/{net}"] = sum(count.values())
    return row


# --- end shared ---
# --- shared: masks ---
def sparse_layers(net: nn.Module) -> dict[str, SparseLinear]:
    found = [(name.removeprefix("net."), x) for name, x in net.named_modules() if isinstance(x, SparseLinear)]
    if len(dict(found)) < len(found):
        raise ValueError(f"two layers of one name: {[name for name, _ in found]}")
    return dict(found)


def get_masks(agent: "Agent") -> dict[str, torch.Tensor]:
    """E of each sparse layer on the CPU, by '<net>.<layer>'. Raises ValueError if a target has other masks."""
    nets = [[(net.name, net.online) for net in agent.networks], [(net.name, net.target) for net in agent.networks]]
    online, target = ({f"{a}.{b}": x.E.cpu() for a, net in own for b, x in sparse_layers(net).items()} for own in nets)
    for name, E in online.items():
        if name not in target or not torch.equal(E, target[name]):
            raise ValueError(f"{name}: its target has another mask")
    return online


def plain_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state as plain layers hold it: of sparse layers weight [out, in], zero where inactive, and bias."""
    layers = sparse_layers(net)
    state = {name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}
    own = {name.removeprefix("net.") for name, _ in net.named_parameters() if not name.endswith(".active_weights")}
    state = {key: x for key, x in state.items() if key.rpartition(".")[0] not in layers or key in own}
    return state | {f"{name}.weight": layer.sparse_weight().detach() for name, layer in layers.items()}


def add_masks(history: list[dict], masks: dict, state: State) -> list[dict]:
    """Add a snapshot; the first, the last and every stride-th stay, 65 to 129 of them however long the run is."""
    refresh = history[-1]["refresh"] + 1 if history else 0
    stride = 2 ** (refresh // 128).bit_length()
    bits = {name: torch.from_numpy(np.packbits(E.numpy())) for name, E in masks.items()}
    kept = [snapshot for snapshot in history if snapshot["refresh"] % stride == 0]
    return [*kept, {"global_step": state.global_step, "update": state.update, "refresh": refresh, **bits}]


def write_files(run: "Run", state: State, agent: Agent, rb: "ReplayBuffer") -> None:
    """model.pt, and masks.npz: global_step [S], update [S]; each layer uint8 [S, bytes] (np.packbits of E), shape."""
    arrays = {key: np.stack([np.asarray(snapshot[key]) for snapshot in state.masks]) for key in state.masks[0]}
    arrays |= {f"{name}.shape": np.array(E.shape) for name, E in get_masks(agent).items()}
    write_atomic(run.dir / "masks.npz", lambda file: np.savez_compressed(file, **arrays))
    save_model(run.dir / "model.pt", agent, rb)


# --- end shared ---


class ReplayBuffer:
    """Ring of the environment's steps in their order, one float32 row each; the oldest can be forgotten.

    columns: the width of each part of a row; what `take` returns has them as attributes [count, width], in their order.
    `rows` and `parts` are one memory: change them in place.
    """

    def __init__(self, size: int, columns: dict[str, int], device: str, gamma: float):
        self.size, self.widths, self.device, self.gamma = size, list(columns.values()), device, gamma
        self.added = self.oldest = 0  # rows that ever came in, number of the oldest one that counts
        self.rows = torch.from_numpy(np.zeros((size, sum(self.widths)), np.float32))  # takes memory only as it fills
        self.Rows = namedtuple("Rows", columns)
        self.Batch = namedtuple("Batch", "observations actions next_observations rewards dones discounts")
        self.parts = self.Rows(*(part.numpy() for part in self.rows.split(self.widths, dim=1)))  # views of rows

    def __len__(self) -> int:
        return self.added - self.oldest

    def add(self, **transition) -> None:
        for part, value in zip(self.parts, self.Rows(**transition), strict=True):
            part[self.added % self.size] = value
        self.added += 1
        self.oldest = max(self.oldest, self.added - self.size)

    def take(self, numbers: torch.Tensor):
        """Rows by number [count], counted from the first that ever came in."""
        index = numbers % self.size
        return self.Rows(*self.rows.index_select(0, index).to(self.device).split(self.widths, dim=1))

    def sample(self, batch_size: int, generator: torch.Generator, nstep: int = 1):
        """Transitions of up to nstep steps, drawn with replacement; they end where the episode does (R8).

        rewards [B, 1]: sum over the steps k of gamma^k r_k; discounts: gamma^steps, for the value of next_observations.
        """
        n = min(nstep, len(self))
        start = self.oldest + torch.randint(len(self) - n + 1, (batch_size,), generator=generator)
        first = self.take(start)
        if n == 1:  # the same, faster
            whole = (getattr(first, name) for name in self.Batch._fields[:-1])
            return self.Batch(*whole, torch.full_like(first.rewards, self.gamma))
        index = (start.numpy()[:, None] + np.arange(n)) % self.size  # [B, n], never across the newest row
        parts = self.parts.rewards, self.parts.dones, self.parts.truncations
        rewards, dones, truncations = (part[index, 0] for part in parts)  # each [B, n]
        going = (1 - np.maximum(dones, truncations)[:, :-1]).cumprod(1)  # [B, n - 1]: 1, then 0
        length = 1 + going.sum(1, keepdims=True)  # [B, 1]
        discounts = self.gamma ** np.arange(1, n, dtype=np.float32)
        rewards = rewards[:, :1] + (going * rewards[:, 1:] * discounts).sum(1, keepdims=True)
        rewards, discounts = (torch.from_numpy(x).to(self.device) for x in (rewards, self.gamma**length))
        last = self.take(start + torch.from_numpy(length[:, 0]).long() - 1)
        return self.Batch(first.observations, first.actions, last.next_observations, rewards, last.dones, discounts)

    def state_dict(self) -> dict:
        mine = {name: x for name, x in vars(self).items() if name != "parts" and not isinstance(x, CODE)}
        return mine | {"rows": torch.from_numpy(self.rows.numpy()[: self.added])}  # without the empty part

    def load_state_dict(self, state: dict) -> None:
        rows = state.pop("rows")
        self.rows[: len(rows)] = rows
        vars(self).update(state)


# --- shared: score ---
def final_score(evaluations: list[list]) -> float:
    """Mean of the last 10 evaluations [step, return], of fewer than 20 the last half; none is from step 0."""
    last = min(10, (len(evaluations) + 1) // 2)
    return statistics.fmean(score for _, score in evaluations[-last:])


# --- end shared ---
# --- shared: run ---
class UserError(Exception):
    """What the user typed or pointed to is wrong: one line, exit code 2."""


def check_args(args: "Args") -> None:
    """Raise UserError for a number outside the range that its field names, and for what does not go together."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        low, high = getattr(hint, "__metadata__", (None, None))
        if low is not None and not low <= getattr(args, name) <= high:
            raise UserError(f"{flag(name)} must be at least {low} and at most {high}, not {getattr(args, name)}")
    if {"n", "m"} <= vars(args).keys() and not args.n <= args.m <= args.hidden_dim:
        raise UserError(f"--n <= --m <= --hidden-dim is needed, not {args.n}, {args.m}, {args.hidden_dim}")


def parse_args(argv: list[str] | None = None) -> "Args":
    """The command line; beside --resume or --evaluate the run's own arguments are the defaults."""
    args = tyro.cli(Args, description=__doc__, args=argv)
    folder = args.evaluate if args.resume is None else args.resume
    if folder is None:
        return args
    if args.resume and args.evaluate:
        raise UserError("--resume and --evaluate exclude each other")
    saved = read_run(folder)[1]
    args = tyro.cli(Args, description=__doc__, args=argv, default=replace(saved))
    free = "resume runs_dir total_timesteps checkpoint_interval keep_replay capture_video track".split()
    for name, old in vars(saved).items() if args.resume else ():
        if getattr(args, name) != old and not (name in free or name.startswith("wandb_")):
            raise UserError(f"{flag(name)} is {old} in {folder} and can't become {getattr(args, name)}")
    if args.total_timesteps < saved.total_timesteps:
        raise UserError(f"--total-timesteps is {saved.total_timesteps} in {folder} and can only grow")
    return args


def read_run(folder: str) -> tuple[dict, "Args"]:
    """meta.json and the arguments of a run of this script."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        if meta["script"] != Path(__file__).name:
            raise UserError(f"{folder} was made by {meta['script']}, go on with that script")
        return meta, Args(**meta["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no run of this version: {first_line(error)}") from None


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
            return evaluate_run(args)
        meta, saved = read_run(args.resume) if args.resume else ({"exit_reason": None}, args)
        if meta.get("exit_reason") == "finished" and args.total_timesteps == saved.total_timesteps:
            print(f"{args.resume} is finished (final score {meta['final_score']}), nothing to do")
            return 0
        return {"sigint": 130, "sigterm": 143}.get(train(args)["exit_reason"], 0)
    except (UserError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """A plain environment; raises UserError where this script can't run on it."""
    if not re.search(r"-v\d+$", env_id):
        raise UserError(f"--env-id {env_id} must name the version, as in Ant-v4")
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)  # v4 is what was published
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)  # the checker costs time each step
    except Exception as error:
        raise UserError(f"--env-id {env_id}: {first_line(error)}") from None
    obs, action = env.observation_space, env.action_space
    if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, action)):
        raise UserError(f"--env-id {env_id} must have flat observations and continuous actions, not {obs}, {action}")
    if not (np.isfinite([action.low, action.high]).all() and (action.low < action.high).all()):
        raise UserError(f"--env-id {env_id} must have bounded actions, not {action}")
    env = gym.wrappers.TransformObservation(env, np.copy, None)  # some return one array, which the next step changes
    return gym.wrappers.RecordEpisodeStatistics(env)  # info["episode"] at an episode's end


def action_bounds(env: gym.Env) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(bound, dtype=torch.float32) for bound in (env.action_space.low, env.action_space.high))


def transition_columns(env: gym.Env) -> dict[str, int]:
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    return {"observations": obs_dim, "actions": action_dim, "next_observations": obs_dim, "rewards": 1, "dones": 1}


def make_generators(seed: int, device: str) -> dict[str, torch.Generator]:
    """A random stream for each purpose, so that none shifts another. Add yours at the end."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, use --device cpu")
    names = ("init", "env_reset", "warmup", "exploration", "replay", "smoothing", "evaluation", "globals")
    generators = {name: torch.Generator(device if name == "smoothing" else "cpu") for name in names}
    for generator, child in zip(generators.values(), np.random.SeedSequence(seed).spawn(len(names)), strict=True):
        generator.manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))
    return generators


def draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**31, (count,), generator=generator).tolist()


def seed_globals(seed: int) -> None:
    """Seed what a fork may draw from without thinking: random, numpy.random, torch.rand."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_globals() -> list:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda]


def set_globals(python_state, numpy_state, torch_state, cuda_states) -> None:
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def evaluating(actor: nn.Module):
    """eval() mode; global generators come back as they were, so that training does not depend on evaluations."""
    states, modes = get_globals(), {module: module.training for module in actor.modules()}
    actor.eval()
    with torch.no_grad():
        yield
    for module, mode in modes.items():
        module.training = mode
    set_globals(*states)


def check_finite(what: str, step: int, *values) -> None:
    for value in values:
        if not (math.isfinite(value) if isinstance(value, float) else np.isfinite(value).all()):
            raise FloatingPointError(f"{what} at step {step} is NaN or infinite")


@torch.no_grad()
def act(actor: "Actor", obs: np.ndarray) -> torch.Tensor:
    """Noise-free action [action_dim] on the CPU. Copies obs: only torch's own memory is sure to be aligned."""
    return actor(torch.tensor(obs[None], dtype=torch.float32, device=actor.action_scale.device))[0].cpu()


def evaluate(actor: "Actor", env_id: str, seeds: list[int], step: int, videos: Path | None = None) -> dict[str, float]:
    """Return and length of the noise-free policy, an episode per seed, in an environment of its own."""
    env, episodes = make_env(env_id, "rgb_array" if videos else None), []
    if videos:
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")
        env = gym.wrappers.RecordVideo(env, str(videos), lambda _: True, disable_logger=True)
    with evaluating(actor):
        for seed in seeds:
            (obs, info), done = env.reset(seed=seed), False
            while not done:
                obs, reward, terminated, truncated, info = env.step(act(actor, obs).numpy())
                check_finite("observation or reward in the evaluation", step, obs, float(reward))
                done = terminated or truncated
            episodes.append((info["episode"]["r"], info["episode"]["l"]))
    env.close()
    (mean, length), (std, _) = np.mean(episodes, 0).tolist(), np.std(episodes, 0).tolist()
    return {"eval/episodic_return": mean, "eval/episodic_return_std": std, "eval/episodic_length": length}


def evaluate_run(args: "Args") -> int:
    """--evaluate: the run's own evaluation episodes (further ones come from the same stream), filmed if asked for."""
    torch.set_num_threads(args.threads)
    path, actor = Path(args.evaluate, "model.pt"), make_networks(args, make_env(args.env_id))["actor"]
    try:
        content = read_torch(path)
        actor.load_state_dict({name: content["actor"][name.removeprefix("net.")] for name in actor.state_dict()})
        observations, actions = content["probe"]
    except Exception as error:
        raise UserError(f"{path} is missing, damaged or foreign: {first_line(error)}") from None
    with evaluating(actor):
        own = torch.stack([act(actor, obs) for obs in observations.numpy()])
        if not torch.allclose(own, actions, rtol=1e-3, atol=1e-4):
            raise UserError(f"{path}: plain layers do not act as the run's own network did")
    seeds = draw_seeds(make_generators(args.seed, args.device)["evaluation"], args.eval_episodes)
    row = evaluate(actor, args.env_id, seeds, 0, path.parent / "videos" if args.capture_video else None)
    print("{}: return {:.1f} ± {:.1f} (mean ± std), length {:.0f}".format(path.parent.name, *row.values()))
    return 0


def make_adam(parameters, **options) -> optim.Adam:
    """Adam in one fused call, which does not tell autograd that it changed the parameters: the hook does."""
    optimizer = optim.Adam(parameters, fused=True, **options)
    optimizer.register_step_post_hook(lambda adam, *_: torch.autograd.graph.increment_version(held(adam)))
    return optimizer


def metric_columns(agent: "Agent") -> list[str]:
    """The columns of metrics.csv: add what you log."""
    names = [net.name for net in agent.networks]
    groups = {
        "charts": "episodic_return episodic_length SPS update_ms wall_time_s cpu_time_s".split(),
        "losses": [f"{name}_{kind}" for name in names[1:] for kind in ("values", "loss")] + ["qf_loss", "actor_loss"],
        "eval": "episodic_return episodic_return_std episodic_length".split(),
        "sparsity/density": names,
    }
    return ["global_step", *(f"{group}/{name}" for group, names in groups.items() for name in names)]


def model_stats(agent: "Agent") -> dict:
    """Modules of the online networks: name, type, weight's shape and active part; density of all matrices; sizes."""
    modules, density, inactive = {}, {}, 0
    for net in agent.networks:
        modules[net.name], rest = [], 0
        for name, part in net.online.named_modules():
            if not list(part.children()) or isinstance(part, nn.Linear):  # also one with a parametrization
                modules[net.name].append({"name": name.removeprefix("net."), "type": type(part).__name__})
                weight = part.sparse_weight() if hasattr(part, "sparse_weight") else getattr(part, "weight", None)
                if isinstance(weight, torch.Tensor):
                    modules[net.name][-1]["weight"] = list(weight.shape)
                    if weight.dim() == 2:
                        modules[net.name][-1]["active"] = own = getattr(part, "active_weights", weight).numel()
                        rest += weight.numel() - own
        kept = sum(x.numel() for k, x in net.online.named_parameters() if x.dim() > 1 or k.endswith("active_weights"))
        density[net.name], inactive = kept / max(1, kept + rest), inactive + rest
    active = sum(x.numel() for x in nn.ModuleList(net.online for net in agent.networks).parameters())
    return {"modules": modules, "density": density, "params_total": active + inactive, "params_active": active}


def save_model(path: Path, agent: "Agent", rb: "ReplayBuffer") -> None:
    """model.pt: each network as plain layers hold it; 16 observations (at first zeros) with the actor's actions."""
    networks = {name: part for name, part in vars(agent).items() if isinstance(part, nn.Module)}
    for name, net in networks.items():
        if len({key.removeprefix("net.") for key in net.state_dict()}) < len(net.state_dict()):
            raise ValueError(f"model.pt drops `net.`: {name} has tensors of one name then, inside and outside of it")
    content = {name: {key: x.cpu() for key, x in plain_state(net).items()} for name, net in networks.items()}
    observations = torch.from_numpy(rb.parts.observations[:16].copy())
    with evaluating(agent.actor):
        content["probe"] = [observations, torch.stack([act(agent.actor, obs) for obs in observations.numpy()])]
    write_atomic(path, lambda file: torch.save(content, file))


class Run:
    """What a run leaves behind (folder, W&B), its training clocks, progress bar and signals."""

    def __init__(self, args: "Args", columns: list[str], stats: dict, state: "State"):
        self.args, self.stop_signal, self.last_checkpoint = args, None, state.global_step if args.resume else None
        facts = machine_facts(args) | stats
        if args.resume:
            self.dir, self.meta = Path(args.resume), read_run(args.resume)[0]
            for key in ("code", "kernel", "threads", "hardware", "versions"):
                if facts[key] != self.meta.get(key):
                    print(f"warning: not bit for bit, {key} was {self.meta.get(key)}, is {facts[key]}", file=sys.stderr)
            facts = {"resumed": [*self.meta.get("resumed", []), {"global_step": state.global_step, **facts}]}
        else:
            method = f"{args.exp_name}_{stats['pattern']}".removesuffix("_dense")
            name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{method}__s{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}")
            self.dir = Path(args.runs_dir, name)
            try:
                self.dir.mkdir(parents=True)
                (self.dir / Path(__file__).name).write_text(SOURCE)
            except OSError as error:
                raise UserError(f"--runs-dir {args.runs_dir}: {error}") from None
            self.meta = {"script": Path(__file__).name, "run_name": name, "start": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self.meta["wandb_id"] = f"{name}-{os.urandom(2).hex()}"  # names are unique per folder
        self.density = {f"sparsity/density/{name}": value for name, value in stats["density"].items()}
        self.csv = open_metrics(self.dir / "metrics.csv", columns, state.csv_bytes)
        self.writer = csv.DictWriter(self.csv, columns, lineterminator="\n")
        self.meta |= facts | {"pattern": stats["pattern"], "args": vars(args) | {"resume": None}, "end": None}
        self.write_meta(exit_reason="running", final_score=None)
        self.wandb = start_wandb(args, self.meta)
        self.start, self.spent = clock() - np.array(state.times), {"updates": np.zeros(2), "pauses": np.zeros(2)}
        self.last = np.array([state.global_step, state.update, state.times[0], 0.0])
        self.terminal = sys.stderr.isatty()
        options = {"initial": state.global_step, "unit": "step", "dynamic_ncols": True, "mininterval": 0.5}
        self.bar = tqdm(total=args.total_timesteps, file=None if self.terminal else open(os.devnull, "w"), **options)

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.say(f"{self.dir}: {f'resumed at step {self.last_checkpoint}' if self.args.resume else 'started'}")
        for net, modules in self.meta["modules"].items() if self.meta["pattern"] != "dense" else ():
            shares = {"all": self.meta["density"][net]}
            shares |= {x["name"]: x["active"] / math.prod(x["weight"]) for x in modules if "active" in x}
            self.say(f"active weights of {net}: {', '.join(f'{x} {100 * share:.3g} %' for x, share in shares.items())}")
        return self

    def stop(self, number: int, _frame) -> None:
        if self.stop_signal:
            os._exit(128 + number)
        self.stop_signal = "sigint" if number == signal.SIGINT else "sigterm"
        with contextlib.suppress(OSError):  # the pipe's reader may have died of the same Ctrl-C
            os.write(2, b"\nstopping at the end of this episode; once more to leave at once\n")

    def __exit__(self, kind, error, _traceback) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        if stopped := self.meta["exit_reason"] == "running":
            self.meta["exit_reason"] = {None: self.stop_signal, FloatingPointError: "nan"}.get(kind, "error")
        with contextlib.suppress(OSError):  # on a full disk the first error is reported
            self.write_meta(end=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            self.csv.close()
        if stopped:
            self.say(f"stopped by {self.meta['exit_reason']}; last checkpoint: step {self.last_checkpoint}, {self.dir}")
        if self.wandb:
            self.attempt("upload to W&B", self.finish_wandb)

    def attempt(self, what: str, action) -> bool:
        """Do what a run must not fail for; False if it failed."""
        try:
            action()
            return True
        except Exception as error:
            self.say(f"warning: no {what}: {first_line(error)}")
            return False

    def say(self, message: str) -> None:
        try:
            self.bar.write(message)
            sys.stdout.flush()
        except OSError:  # the reader is gone, the run goes on
            sys.stdout = open(os.devnull, "w")

    def write_meta(self, **facts) -> None:
        self.meta |= facts
        write_atomic(self.dir / "meta.json", lambda file: file.write(json.dumps(self.meta, indent=2).encode() + b"\n"))

    def times(self) -> np.ndarray:
        """Training seconds by wall and CPU clock, summed over resumes, without evaluations and checkpoints."""
        return clock() - self.start - self.spent["pauses"]

    @contextlib.contextmanager
    def timed(self, what: str):
        """Count the time within as that of "updates", or of "pauses", which are no training time."""
        start = clock()
        yield
        self.spent[what] += clock() - start

    def speed(self, state: "State") -> dict[str, float]:
        """Environment steps per training second and milliseconds per update since the last call."""
        now = np.array([state.global_step, state.update, self.times()[0], self.spent["updates"][0]])
        (steps, updates, seconds, update_s), self.last = now - self.last, now
        return {"charts/SPS": steps / seconds} | ({"charts/update_ms": 1e3 * update_s / updates} if updates else {})

    def evaluate(self, actor: "Actor", seeds: list[int], global_step: int) -> dict[str, float]:
        with self.timed("pauses"):
            return evaluate(actor, self.args.env_id, seeds, global_step)

    def log(self, global_step: int, row: dict[str, float]) -> None:
        """Write a row of metrics.csv (a kill loses none that this wrote) and of W&B."""
        wall, cpu = self.times().tolist()
        row = {"global_step": global_step, "charts/wall_time_s": wall, "charts/cpu_time_s": cpu, **row}
        if unknown := row.keys() - set(self.writer.fieldnames):
            raise ValueError(f"metrics.csv has no column for {sorted(unknown)}: add it to metric_columns")
        self.writer.writerow(row)
        if self.wandb and not self.attempt("more rows in W&B", lambda: self.wandb.log(row)):
            self.wandb = None
        if "eval/episodic_return" in row:
            self.bar.set_postfix_str("eval {eval/episodic_return:.1f} ± {eval/episodic_return_std:.1f}".format(**row))
            if not self.terminal:
                self.say(str(self.bar))

    def checkpoint_due(self, global_step: int, env: gym.Env, stop: str | None) -> bool:
        """After an interval, on a stop signal and (--keep-replay) in the last episode, but never at the very end."""
        interval, left = self.args.checkpoint_interval, self.args.total_timesteps - global_step
        last = self.args.keep_replay and left <= (env.spec.max_episode_steps or 0)
        return left > 0 and (last or bool(stop) or global_step // interval > self.last_checkpoint // interval)

    def finish(self, score: float) -> None:
        """All training is done; drop what only a resume needs."""
        os.fsync(self.csv.fileno())
        wall, cpu = self.times().tolist()
        self.write_meta(exit_reason="finished", final_score=score, wall_time_s=wall, cpu_time_s=cpu)
        if not self.args.keep_replay:
            (self.dir / "checkpoint.pt").unlink(missing_ok=True)
        self.say(f"{self.dir}: finished, final score {score:.1f}")

    def finish_wandb(self) -> None:
        import wandb

        for path in (self.dir / "videos").glob("*.mp4"):
            self.wandb.log({"video": wandb.Video(str(path), format="mp4"), "global_step": self.args.total_timesteps})
        self.wandb.summary.update({"final_score": self.meta["final_score"], **self.meta.get("hardware_report", {})})
        for name in ("meta.json", "masks.npz", self.meta["script"]):  # copies outlive the run's folder
            if (self.dir / name).exists():
                self.wandb.save(shutil.copy(self.dir / name, self.wandb.dir), base_path=self.wandb.dir, policy="now")
        self.wandb.finish(exit_code=int(self.meta["exit_reason"] != "finished"))


def clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def open_metrics(path: Path, columns: list[str], size: int):
    """metrics.csv for appending, locked against a second process; of a resumed run its first `size` bytes are kept."""
    try:
        file = open(path, "r+" if size else "x+", newline="", buffering=1)  # row by row
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # of file systems that have no locks
            raise UserError(f"{path} is missing or being written by another process ({first_line(error)})") from None
        print(f"warning: {path.parent} can't be locked: don't resume a run twice at once", file=sys.stderr)
    if size and not path.with_name("checkpoint.pt").exists():
        raise UserError(f"{path.parent} has been finished by another process")
    header = ",".join(columns) + "\n"
    if size and (not (kept := file.read(size)).startswith(header) or len(kept) < size):
        raise UserError(f"{path} is damaged or was written by another version of this script")
    file.seek(size)
    file.truncate()
    file.write("" if size else header)
    return file


@mock.patch.dict(os.environ)  # what is changed there, for this run alone, comes back
def start_wandb(args: "Args", meta: dict):
    """A W&B run under the run's own name; offline, with a line that says so, without a login or a network."""
    wanted = os.environ.get("WANDB_MODE")
    if not args.track or wanted == "disabled":
        return None
    import wandb

    tags = [meta["pattern"], Path(__file__).stem]
    tags += [tag[:64] for tag in os.environ.pop("WANDB_TAGS", "").split(",") if tag]  # wandb refuses longer ones
    options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": meta["wandb_id"], "tags": tags}
    options |= {"name": meta["run_name"], "group": args.env_id, "resume": "allow" if args.resume else None}
    options |= {"config": meta["args"] | {"meta": {key: value for key, value in meta.items() if key != "args"}}}
    for mode in (wanted, "offline"):  # no network, a wrong key, project, mode: none may cost a run
        try:
            options["mode"] = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            os.environ["WANDB_MODE"] = options["mode"]  # a wrong word there is an error whatever `mode` says
            options["settings"] = wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=600)
            run = wandb.init(**options)
            run.define_metric("*", step_metric="global_step")
            folder = Path(run.dir).parent
            hint = f"W&B is offline: look with `wandb leet {folder.parent}`, upload with `wandb sync {folder}`"
            print(hint if run.offline else f"W&B: {run.url}")
            return run
        except Exception as error:
            print(f"warning: W&B: {first_line(error)}", file=sys.stderr)
            wandb.teardown()
    return None


def write_atomic(path: Path, write) -> None:
    """write(file) into a temporary file, then move it to `path`: the old or the new file is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # how torch.save says that the disk is full
        raise OSError(f"{path} can't be written: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


# What numpy's arrays and scalars are made of: torch.load may meet them in a checkpoint.
NUMPY = [np.ndarray, np.dtype, np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
torch.serialization.add_safe_globals([*NUMPY, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdFD")])


def read_torch(path: Path, map_location: str | None = "cpu") -> dict:
    if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch.load does not look at checksums
        raise ValueError(f"{broken} is not what was written")
    return torch.load(path, weights_only=True, map_location=map_location, mmap=True)


def save_checkpoint(run: Run, state: "State", agent: "Agent", rb: ReplayBuffer, rng: dict, env: gym.Env) -> None:
    """All that a resume needs at an episode's end, in one file."""

    def write(file) -> None:
        torch.save(content, file)
        file.flush()
        read_torch(file.name)

    with run.timed("pauses"):
        write_files(run, state, agent, rb)
        os.fsync(run.csv.fileno())
        state.times, state.csv_bytes = run.times().tolist(), os.fstat(run.csv.fileno()).st_size
        state.losses = {name: x.detach().clone() for name, x in state.losses.items()}  # may be views of networks
        content = {"rb": rb.state_dict(), "globals": get_globals()}
        content |= {"rng": {name: generator.get_state() for name, generator in rng.items()}}
        content |= {"env": [part.np_random.bit_generator.state for part in (env.unwrapped, env.action_space)]}
        things = {"agent": vars(agent), "state": vars(state)}
        modules = [module for net in parts(things).values() if isinstance(net, nn.Module) for module in net.modules()]
        if lost := {k for x in modules for k, v in vars(x).items() if isinstance(v, torch.Tensor | np.ndarray)}:
            run.say(f"warning: a resume forgets {sorted(lost)}, tensors or arrays that modules hold: make them buffers")
        try:
            form = forms(things)
            state.form = state.form or form
            if changed := sorted(key for key in form | state.form if form.get(key) != state.form.get(key)):
                raise UserError(f"{changed}: Agent and State must have the same networks and optimizers to the end")
            content |= pack(things)
            write_atomic(run.dir / "checkpoint.pt", write)
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError, ValueError) as error:
            kind = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error)) or ["", first_line(error)]
            raise UserError(f"Agent, State or replay holds what no checkpoint can: {kind[1]}") from None
        run.last_checkpoint = state.global_step


CODE = type, types.FunctionType, types.BuiltinFunctionType, types.MethodType  # is no state: the script makes it again
OWNERS = types.NoneType, types.ModuleType, type, nn.Module, optim.Optimizer  # of methods that are no state either


def held(x) -> list[torch.Tensor]:
    """The tensors of a network; those that an optimizer trains."""
    if isinstance(x, nn.Module):
        return [*x.parameters(), *x.buffers()]
    return [param for group in getattr(x, "param_groups", []) for param in group["params"]]


def leaves(x, place: str = "") -> dict:
    """What dicts, lists and tuples hold, by place."""
    if not isinstance(x, dict) and type(x) not in (list, tuple):
        return {place[1:]: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {key: leaf for name, value in items for key, leaf in leaves(value, f"{place}.{name}").items()}


def parts(things: dict) -> dict:
    """Networks and optimizers among them."""
    return {place: x for place, x in sorted(leaves(things).items()) if hasattr(type(x), "load_state_dict")}


def forms(things: dict) -> dict:
    """Of networks and optimizers the type, and of each tensor that one holds its first holder, shape and dtype."""
    first, found = {}, {}
    for place, x in parts(things).items():
        found[place] = [type(x).__name__]
        found[place] += [(first.setdefault(id(t), f"{place} {i}"), [*t.shape], t.dtype) for i, t in enumerate(held(x))]
    return found


def pack(things: dict[str, dict]) -> dict:
    """A copy of attributes for `unpack`. In place of a network or an optimizer stands what it holds: its state_dict,
    its tensors, their gradients, the modules' own numbers and strings. TypeError for views: they would be copies."""
    saved, memo, memory = {}, {}, set()  # memo: id of x -> what deepcopy takes for x
    for place, part in parts(things).items():
        modules = part.modules() if isinstance(part, nn.Module) else []
        values = bool | int | float | str | np.generic
        plain = [{name: x for name, x in vars(module).items() if isinstance(x, values)} for module in modules]
        saved[place] = memo[id(part)] = {"state_dict": part.state_dict(), "held": held(part), "plain": plain}
        saved[place]["grads"] = [tensor.grad for tensor in held(part)]
        memo |= {id(tensor): tensor for tensor in held(part)}
        memory |= {tensor.untyped_storage().data_ptr() for tensor in held(part) if tensor.numel()}
    for place, x in leaves(things).items():
        if isinstance(x, CODE) and (place.count(".") > 1 or not isinstance(getattr(x, "__self__", None), OWNERS)):
            raise TypeError(f"{place}, a function or a class: make it, or what it belongs to, an attribute of its own")
        if isinstance(x, torch.Tensor | np.ndarray) and id(x) not in memo:
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() in memory:
                raise TypeError(f"{place}, a view of a network's tensor: keep the tensor or a clone()")
            memo[id(x)] = x.detach() if getattr(x, "grad_fn", None) else x
    own = {name: {key: x for key, x in thing.items() if not isinstance(x, CODE)} for name, thing in things.items()}
    return {"parts": saved, "own": copy.deepcopy(own, memo)}


def unpack(packed: dict, things: dict[str, dict]) -> None:
    """Bring attributes back, into the networks and optimizers there; their tensors keep their other names."""
    if forms(things) != packed["own"]["state"]["form"]:
        raise ValueError("Agent or State begins with other networks, optimizers or tensors of theirs")
    memo = {id(x): x for x in leaves(packed["own"]).values() if isinstance(x, torch.Tensor | np.ndarray)}
    for place, part in parts(things).items():
        saved = packed["parts"][place]
        memo[id(saved)] = part
        part.load_state_dict(saved["state_dict"])
        if isinstance(part, optim.Optimizer):  # as it was: load_state_dict casts it to the dtype of the parameter
            state = saved["state_dict"]["state"]
            part.state.update({param: state[i] for i, param in enumerate(held(part)) if i in state})
        for module, plain in zip(part.modules() if saved["plain"] else [], saved["plain"], strict=True):
            vars(module).update(plain)
        for tensor, old, grad in zip(held(part), saved["held"], saved["grads"], strict=True):
            tensor.data.copy_(old)
            tensor.requires_grad_(old.requires_grad).grad = grad
            memo[id(old)] = tensor
    for name, own in copy.deepcopy(packed["own"], memo).items():
        things[name].update(own)


def load_checkpoint(args: "Args", state: "State", agent: "Agent", rb: ReplayBuffer, rng: dict, env: gym.Env) -> None:
    """Put the last checkpoint into freshly made objects (their memory stays theirs, so aligned)."""
    path = Path(args.resume, "checkpoint.pt")
    if not path.exists():
        raise UserError(f"{path} is missing: the run has not come to one, or it finished without --keep-replay")
    try:
        content = read_torch(path, map_location=None)
        rows = content["rb"].get("rows")  # a fork's replay may have none
        content = copy.deepcopy(content, {id(rows): rows})  # what stays must not be the file's memory
        unpack(content, {"agent": vars(agent), "state": vars(state)})
        rb.load_state_dict(content["rb"])
        for name, values in content["rng"].items():
            rng.setdefault(name, torch.Generator()).set_state(values)
        set_globals(*content["globals"])
        for part, values in zip((env.unwrapped, env.action_space), content["env"], strict=True):
            part.np_random.bit_generator.state = values
    except Exception as error:
        raise UserError(f"{path} is damaged or of another version: {first_line(error)}") from None


def code_hash(source: str) -> str:
    """Of the syntax tree without docstrings, alike in all versions of Python: comments and line breaks do not count."""

    def tree(node):
        if isinstance(node, list):
            return [tree(x) for x in node if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
        if isinstance(node, ast.AST):
            return type(node).__name__, [(key, tree(x)) for key, x in ast.iter_fields(node) if x not in (None, [])]
        return repr(node)

    return hashlib.sha256(repr(tree(ast.parse(source))).encode()).hexdigest()[:16]


def machine_facts(args: "Args") -> dict:
    """What runs and where. dirty: this script is not the commit's, or not in git at all."""

    def git(*words: str) -> str:
        command = [shutil.which("git") or "true", "-C", str(path.parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    path, cpuinfo = Path(__file__).resolve(), Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = re.search(r"cpu family\s*: (.*)\nmodel\s*: (.*)\nmodel name\s*: (.*)", cpuinfo)
    hardware = [f"{cpu[3]} (family {cpu[1]}, model {cpu[2]})" if cpu else os.uname().machine]
    hardware += [torch.cuda.get_device_name()] if args.device == "cuda" else []
    versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy", "wandb")}
    n, m = (args.n, args.m) if {"n", "m"} <= vars(args).keys() else (None, None)
    facts = {"n": n, "m": m, "threads": args.threads}
    facts |= {"hardware": ", ".join(hardware), "cores": os.cpu_count(), "code": code_hash(SOURCE)}
    facts |= {"versions": {"python": sys.version.split()[0], **versions}, "commit": git("rev-parse", "HEAD") or None}
    return facts | {"dirty": not facts["commit"] or bool(git("status", "--porcelain", "--ignored", "--", path.name))}


def hardware_report(run: Run, env: gym.Env, rb: ReplayBuffer, agent: "Agent", seconds: float = 0.2) -> None:
    """Microseconds of acting and updating with the run's networks and with plain nn.Linear ones, medians of calls."""
    args, rng, report = run.args, make_generators(0, run.args.device), {}
    data, every = rb.sample(args.batch_size, rng["replay"]), range(1, min(args.policy_frequency, 10) + 1)
    obs = data.observations[0].cpu().numpy()
    agents = {"": agent, "_dense": Agent(make_networks(args, env), lr=args.learning_rate)}
    for name, calls in (("actor", 1), ("critic_update", 1), ("update", len(every))):
        for suffix, agent in agents.items():
            call = {
                "actor": lambda agent=agent: act(agent.actor, obs),
                "critic_update": lambda agent=agent: update_critics(agent, data, args, rng["smoothing"]),
                "update": lambda agent=agent: [update_agent(agent, rb, args, rng, update) for update in every],
            }[name]
            timer = Timer("call()", globals={"call": call}, num_threads=args.threads)
            report[f"hardware/{name}_us{suffix}"] = timer.blocked_autorange(min_run_time=seconds).median * 1e6 / calls
    run.write_meta(hardware_report=report)
    for name, value in report.items():
        run.say(f"{name:>34} {value:9,.0f}")


# --- end shared ---


# --- kernels ---
# --- shared: kernels ---
# Linear layers that work on the active weights alone, on a CPU: packed rows of any length (N:M: of equal length).
#   forward      y[b, r]  = bias[r] + sum over the entries (r, c) of value[r, c] x[b, c]
#   grad-input   dx[b, c] = sum over the entries (r, c) of value[r, c] dy[b, r]
#   grad-weight  dvalue[r, c] = sum over b of dy[b, r] x[b, c] for each entry,  dbias[r] = sum over b of dy[b, r]
KERNELS = r"""
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#if defined(__AVX512F__)  // W floats in a vector
enum { W = 16 };
#elif defined(__AVX__)
enum { W = 8 };
#else
enum { W = 4 };
#endif
enum { V = 4, LANES = V * W };  // a tile is [feature][V vectors]
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))  // inlined, they are slower: too few registers
typedef float vec __attribute__((vector_size(4 * W), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * W)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
static const vec zero;
// Entries of row r in block j of columns: from ptr[r * row_step + j * block_step] to the next ptr.
typedef struct { int64_t rows, blocks, row_step, block_step; const int32_t *ptr; const uint16_t *col; } csr;
typedef struct { csr by_row, by_col; const int32_t *place; int64_t count; } entries;  // place in val of by_col's
typedef struct { const entries *m; int64_t relu; const float *val, *bias; float *dval, *dbias; } layer;
typedef struct {
    int64_t depth, batch, stride, width, widest, keep;  // width: of x and all outputs; keep: all tiles of acts
    const float *x;         // [batch], stride apart; backward: dy
    float *y;               // backward: dx, or 0
    float *acts, *scratch;  // [tile][width][LANES] of x and all outputs; backward: 2 [widest][LANES], values by column
    layer layers[];
} call;
#define AT(x, i) ((const vec *)(x) + (size_t)(i) * V)
#ifdef __AVX512F__  // p[j] in every lane: four values share one load
#define SPREAD(p, j) ((vec)_mm512_permute_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), 0x55 * (j)))
#else
#define SPREAD(p, j) (zero + (p)[j])
#endif
#define ADD(to, j) { \
        const vec *p = AT(x, (uint16_t)(four >> 16 * (j))), v = SPREAD(val + k, j); \
        for (int i = 0; i < V; i++) to[i] += v * p[i]; }
INLINE vec positive(vec a, vec y) { return (vec)((bits)a & ~(bits)(y <= zero)); }  // a, or 0 where y <= 0; NaN stays
// One tile of y = m x (+ bias), 0 where gate <= 0: relu if gate is y.
APART void product(csr m, const float *val, const float *bias, const float *x, float *y, const float *gate) {
    for (long j = 0; j < m.blocks; j++)
        for (long r = 0; r < m.rows; r++) {
            const int32_t *ptr = m.ptr + r * m.row_step + j * m.block_step;
            const vec start = zero + (bias ? bias[r] : 0);
            vec a[V], b[V], *out = (vec *)y + r * V;
            for (int i = 0; i < V; i++) a[i] = j ? out[i] : start, b[i] = zero;
            int k = ptr[0];
            for (const int end = ptr[1] - 3; k < end; k += 4) {
                uint64_t four;  // columns by one load
                memcpy(&four, m.col + k, sizeof(four));
                ADD(a, 0) ADD(b, 1) ADD(a, 2) ADD(b, 3)
            }
            for (; k < ptr[1]; k++)
                for (int i = 0; i < V; i++) a[i] += val[k] * AT(x, m.col[k])[i];
            for (int i = 0; i < V; i++) {
                a[i] += b[i];
                if (gate && j == m.blocks - 1) a[i] = positive(a[i], gate == y ? a[i] : AT(gate, r)[i]);
                out[i] = a[i];
            }
        }
}
INLINE vec dot(const vec *d, const vec *x) { return d[0] * x[0] + d[1] * x[1] + (d[2] * x[2] + d[3] * x[3]); }
INLINE void add_sums(float *to, vec a, vec b, vec c, vec d) {  // to[0] += the sum over the lanes of a, to[1] += ... b
#ifdef __AVX512F__
    a = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b), c = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d s = (__m512d)(_mm512_shuffle_ps(a, c, 0x44) + _mm512_shuffle_ps(a, c, 0xee));
    const __m256 t = (__m256)_mm512_castpd512_pd256(s) + (__m256)_mm512_extractf64x4_pd(s, 1);
#elif defined(__AVX__)
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
#ifdef __AVX__
    *(quad *)to += (quad)_mm256_castps256_ps128(t) + (quad)_mm256_extractf128_ps(t, 1);
#else
    for (int i = 0; i < W; i++) *(quad *)to += (quad){a[i], b[i], c[i], d[i]};
#endif
}
#define DOT(i) dot(d, AT(x, m.col[k + i]))
// dval += dy x and dbias += dy, summed over one tile.
APART void grad_weight(csr m, const float *dy, const float *x, float *dval, float *dbias) {
    for (long j = 0; j < m.blocks; j++)
        for (long r = 0; r < m.rows; r++) {
            const vec *p = AT(dy, r), d[V] = {p[0], p[1], p[2], p[3]};
            int k = m.ptr[r * m.row_step + j * m.block_step];
            const int end = m.ptr[r * m.row_step + j * m.block_step + 1];
            for (; k + 3 < end; k += 4) add_sums(dval + k, DOT(0), DOT(1), DOT(2), DOT(3));
            if (j && k == end) continue;
            float rest[4] = {0};  // of the bias and of up to three entries
            const vec s = d[0] + d[1] + (d[2] + d[3]), p0 = k < end ? DOT(0) : zero;
            add_sums(rest, s, p0, k + 1 < end ? DOT(1) : zero, k + 2 < end ? DOT(2) : zero);
            if (!j) dbias[r] += rest[0];
            for (int i = 0; k + i < end; i++) dval[k + i] += rest[i + 1];
        }
}
// b = a^T: a [rows], a_stride apart, and b [cols], b_stride apart.
static void transpose(const float *a, long a_stride, long rows, long cols, float *b, long b_stride) {
    for (long top = 0; top < rows; top += 16)  // a cache line of b at a time
        for (long j = 0; j < cols; j++)
            for (long i = top; i < top + 16 && i < rows; i++) b[j * b_stride + i] = a[i * a_stride + j];
}
static long pack(const call *c, long at, long cols, float *tile) {  // returns the observations in the tile from `at` on
    const long n = c->batch - at < LANES ? c->batch - at : LANES;
    if (n < LANES) memset(tile, 0, cols * LANES * sizeof(float));  // else what is there would be in grad-weight
    transpose(c->x + at * c->stride, c->stride, n, cols, tile, LANES);
    return n;
}
int nm_lanes(void) { return LANES; }
void nm_forward(const call *c) {
    for (long at = 0; at < c->batch; at += LANES) {
        long width = c->layers->m->by_col.rows;
        float *x = c->acts + (c->keep ? at * c->width : 0), *y = x + width * LANES;
        const long n = pack(c, at, width, x);
        for (const layer *l = c->layers; l < c->layers + c->depth; l++, x = y, y += width * LANES) {
            width = l->m->by_row.rows;
            product(l->m->by_row, l->val, l->bias, x, y, l->relu ? y : 0);
        }
        transpose(x, LANES, width, n, c->y + at * width, width);
    }
}
void nm_backward(const call *c) {
    const layer *first = c->layers, *last = first + c->depth - 1;
    const long rows = last->m->by_row.rows, cols = first->m->by_col.rows;
    float *end = c->scratch + 2 * c->widest * LANES;
    for (const layer *l = first + !c->y; l <= last; l++)
        for (long k = 0; k < l->m->count; k++) *end++ = l->val[l->m->place[k]];
    for (long at = (c->batch + LANES - 1) / LANES * LANES - LANES; at >= 0; at -= LANES) {  // the last is in the caches
        float *d = c->scratch, *dx = d + c->widest * LANES, *old, *val = end, *x;
        float *y = c->acts + (at + LANES) * c->width - rows * LANES;
        const long n = pack(c, at, rows, d);
        for (long i = 0; last->relu && i < rows; i++)
            for (int v = 0; v < V; v++) ((vec *)d)[i * V + v] = positive(AT(d, i)[v], AT(y, i)[v]);
        for (const layer *l = last; l >= first; l--, y = x, old = d, d = dx, dx = old) {
            x = y - l->m->by_col.rows * LANES;
            if (l->dbias) grad_weight(l->m->by_row, d, x, l->dval, l->dbias);
            if (l == first && !c->y) break;
            val -= l->m->count;
            product(l->m->by_col, val, 0, d, dx, l > first && l[-1].relu ? x : 0);
        }
        if (c->y) transpose(d, LANES, cols, n, c->y + at * cols, cols);
    }
}
"""


class Index:
    """Where the active weights of a mask E [out, in] are, by row and by column."""

    def __init__(self, E: torch.Tensor):
        self.rows, self.cols = E.shape
        row, col = E.nonzero(as_tuple=True)
        self.nnz = len(row)
        shift = 7 if 32 * self.nnz > E.numel() else 8  # blocks of 128 or 256: what they need fits the L1 cache
        blocks, row_blocks = (self.cols - 1 >> shift) + 1, (self.rows - 1 >> shift) + 1
        by_row, by_col = row * blocks + (col >> shift), (row >> shift) * self.cols + col
        order = by_col.argsort(stable=True)
        counts = by_row.bincount(minlength=self.rows * blocks), by_col.bincount(minlength=row_blocks * self.cols)
        ends = [F.pad(count.cumsum(0, dtype=torch.int32), (1, 0)) for count in counts]
        columns = col.to(torch.uint16), row[order].to(torch.uint16)
        self.tensors = ends[0], columns[0], ends[1], columns[1], order.to(torch.int32)
        p = [tensor.data_ptr() for tensor in self.tensors]
        steps = (self.rows, blocks, blocks, 1), (self.cols, row_blocks, 1, self.cols)
        self.fields = array("q", [*steps[0], *p[:2], *steps[1], *p[2:], self.nnz])
        self.address = self.fields.buffer_info()[0]


Layers = tuple[tuple[Index, bool], ...]  # a chain: where the active weights of each layer are, whether ReLU follows


@lru_cache(16)  # more would keep old masks in memory
def sizes(chain: Layers) -> tuple[int, int, int, int, int]:
    """Of x, of y, of x and all outputs, the largest of these; the number of active weights."""
    widths = [chain[0][0].cols, *(index.rows for index, _ in chain)]
    return widths[0], widths[-1], sum(widths), max(widths), sum(index.nnz for index, _ in chain)


def call(entry, chain: Layers, params, grads, numbers: tuple, *tensors) -> None:
    fields = [len(chain), *numbers, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors)]
    pointers = [tensor.data_ptr() for tensor in params]
    gradients = [tensor.data_ptr() for tensor in grads] if grads else [0] * len(params)
    for i, (index, relu) in enumerate(chain):
        fields += index.address, relu, *pointers[2 * i : 2 * i + 2], *gradients[2 * i : 2 * i + 2]
    entry(array("q", fields).tobytes())


def chain_forward(chain: Layers, x: torch.Tensor, params, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B, in] -> (y [B, out], the activations if `keep`).

    params: weights (packed [nnz]; with a full mask [out, in] will do), bias, weights, ...; contiguous float32 on the
    CPU, as is x. Nothing is checked here.
    """
    _, rows, width, _, _ = sizes(tuple(chain))
    x, batch, lanes = x if x.stride(1) == 1 else x.contiguous(), len(x), load_kernels().nm_lanes()
    acts = x.new_empty((-(-batch // lanes) if keep else 1) * width * lanes)
    y = x.new_empty(batch, rows)
    call(load_kernels().nm_forward, chain, params, None, (batch, x.stride(0), width, 0, keep), x, y, acts, None)
    return y, acts if keep else None


def chain_backward(chain: Layers, params, acts: torch.Tensor, dy: torch.Tensor, need_dx: bool, need_grads: bool):
    """dy [B, out] -> (dx or None, gradients of params or None)."""
    (cols, rows, width, widest, nnz), dy = sizes(tuple(chain)), dy.contiguous()
    scratch = dy.new_empty(2 * widest * load_kernels().nm_lanes() + nnz)
    dx = dy.new_empty(len(dy), cols) if need_dx else None
    grads = [torch.zeros_like(tensor) for tensor in params] if need_grads else None
    numbers = len(dy), rows, width, widest, True
    call(load_kernels().nm_backward, chain, params, grads, numbers, dy, dx, acts, scratch)
    return dx, grads


class Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain: Layers, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.chain, (y, ctx.acts) = chain, chain_forward(chain, x, params, any(ctx.needs_input_grad))
        ctx.save_for_backward(*params)  # changed in place before backward: torch raises
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("the kernels have no second derivative: use --kernel torch")
        _, need_dx, *needed = ctx.needs_input_grad
        dx, grads = chain_backward(ctx.chain, ctx.saved_tensors, ctx.acts, dy, need_dx, any(needed))
        return None, dx, *(grads or [None] * len(needed))


@cache
def load_kernels(source: str = KERNELS) -> ctypes.CDLL:
    """Compile `source` with the system's C compiler, in half a second. Raises OSError."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory() as folder:
        for native in ("-march=native", "-mcpu=native", "-O3"):  # x86, ARM, a compiler that knows neither
            command = [*compiler, "-O3", native, "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/kernels.so"]
            run = subprocess.run(command, input=source.encode(), capture_output=True)
            if run.returncode == 0:
                return ctypes.CDLL(f"{folder}/kernels.so")
    raise OSError(f"{compiler[0]} failed: {run.stderr.decode().strip().partition(chr(10))[0]}")


# --- end shared ---
# --- shared: chains ---
INDEXES = WeakKeyDictionary()  # layer -> its positions, their version, the Index made of them; no copy inherits it


class FusedLinear(SparseLinear):
    """SparseLinear on the kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, taken = run_chain([self], x)
        return y if taken else super().forward(x)


class FusedSequential(nn.Sequential):
    """nn.Sequential in which each run of SparseLinear and SparseLinear + nn.ReLU is one call of the kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = list(self._modules.values())
        while modules:
            y, taken = run_chain(modules, x)
            x, modules = (y, modules[taken:]) if taken else (modules[0](x), modules[1:])
        return x


def run_chain(modules: list[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As many of the first modules as the kernels know, on x; returns y and how many (0: the next one is torch's).

    A dense head rides along in a chain: torch needs longer to call it than the kernels to compute it.
    """
    chain, params, at, known = (), [], 0, x.dim() == 2 and x.dtype is torch.float32 and x.is_cpu
    known = known and not torch.is_autocast_enabled("cpu")
    while known and at < len(modules):
        layer, sparse = modules[at], is_plain(modules[at], FusedLinear)
        if not sparse and not (chain and is_plain(layer, nn.Linear) and layer.out_features <= 32):
            break
        weights, bias = layer._parameters["active_weights" if sparse else "weight"], layer._parameters["bias"]
        positions = layer._buffers["positions"] if sparse else weights
        made_for, version, index = INDEXES.get(layer, (None, None, None))
        if made_for is not positions or version != sparse * positions._version:
            if sparse and (positions.diff() <= 0).any():
                raise ValueError("positions must ascend, as active_weights are stored row after row")
            index = Index(layer.E if sparse else torch.ones_like(weights, dtype=torch.bool))
            INDEXES[layer] = positions, sparse * positions._version, index
        sizes_fit = bias is not None and (weights.numel(), bias.numel()) == (index.nnz, index.rows)
        width = chain[-1][0].rows if chain else x.shape[1]
        if not sizes_fit or width != index.cols or max(width, index.rows) > 65_536 or not readable(weights, bias):
            break
        relu = at + 1 < len(modules) and is_plain(modules[at + 1], nn.ReLU)
        chain, at = (*chain, (index, relu)), at + 1 + relu
        params += weights, bias
    if not chain:
        return x, 0
    if torch.is_grad_enabled():
        return Chain.apply(chain, x, *params), at
    return chain_forward(chain, x, params, keep=False)[0], at


def readable(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype is torch.float32 and a.is_cpu and b.is_cpu and a.is_contiguous() and b.is_contiguous()


def is_plain(module: nn.Module, kind: type) -> bool:
    """Exactly of this type, without hooks or a forward of its own."""
    own = module.__dict__  # quicker than attributes
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return type(module) is kind and not hooked and "forward" not in own and "sparse_weight" not in own


KNOWN = (  # what the kernels compute instead of SparseLinear's forward and sparse_weight
    lambda self, x: F.linear(x, self.sparse_weight(), self.bias),
    lambda self: self.active_weights.new_zeros(self.shape).put(self.positions, self.active_weights),
)


def fuse(net: nn.Module) -> None:
    """Let the kernels run what they know of a network."""
    fused = {nn.Sequential: FusedSequential, SparseLinear: FusedLinear}
    for module in net.modules():
        module.__class__ = fused.get(type(module), type(module))


def compare(net: Network, args: Args, env: gym.Env) -> None:
    """Raise UserError if the kernels and torch give other outputs or gradients on a random batch, for copies of it."""
    spaces, generator, results = (env.observation_space, env.action_space), torch.Generator().manual_seed(0), []
    batch = [torch.randn(args.batch_size, space.shape[0], generator=generator) for space in spaces]
    wanted = [x for x in inspect.signature(net.online.forward).parameters.values() if x.default is x.empty]
    try:
        for change in (fuse, lambda module: module):
            module = copy.deepcopy(net.online)
            change(module)
            torch.manual_seed(0)  # for dropout and the like
            outputs = module(*batch[: len(wanted)])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            params = [param for param in module.parameters() if param.requires_grad]
            grads = torch.autograd.grad(sum((y - 1).square().sum() for y in outputs), params, materialize_grads=True)
            results.append([*(y.detach() for y in outputs), *grads])
    except Exception as error:  # a forward that takes or returns other things
        print(f"warning: {net.name} was not compared with --kernel torch: {first_line(error)}", file=sys.stderr)
        return
    noise = 1e-4 * max(b.norm() for b in results[1])  # of a gradient that is zero, such as a bias's before a batch norm
    if not all((a - b).norm() <= 0.01 * b.norm() + noise for a, b in zip(*results, strict=True)):
        raise UserError(f"--kernel nm does not compute what {net.name} does in torch: use --kernel torch")


def use_kernel(args: Args, agent: Agent, env: gym.Env) -> str:
    """Make --kernel true for all networks; returns "nm" or "torch". auto: nm if sparse, on a CPU with a C compiler.

    Each network's outputs and gradients on a random batch are compared with torch's: UserError if they differ.
    """
    layers = [layer for net in agent.networks for layer in sparse_layers(net.online).values()]
    density = sum(len(layer.positions) for layer in layers) / max(1, sum(layer.shape.numel() for layer in layers))
    if args.kernel == "torch" or (args.kernel == "auto" and (args.device != "cpu" or density in (0, 1))):
        return "torch"
    if args.device != "cpu":
        raise UserError("--kernel nm needs --device cpu")
    codes = [function.__code__ for function in (*KNOWN, SparseLinear.forward, SparseLinear.sparse_weight)]
    codes = [(code.co_code, code.co_names) for code in codes]
    if codes[:2] != codes[2:]:
        print("warning: going on with --kernel torch: the kernels don't know the edited SparseLinear", file=sys.stderr)
        return "torch"
    try:
        if load_kernels().nm_lanes() < 32 and density > 0.3 and args.kernel == "auto":
            return "torch"  # without AVX 2:4 is slower than dense
    except (OSError, ValueError) as error:  # ValueError: an unclosed quote in CC
        if args.kernel == "nm":
            raise UserError(f"--kernel nm: {first_line(error)}") from None
        print(f"warning: going on with --kernel torch, several times slower: {first_line(error)}", file=sys.stderr)
        return "torch"
    with torch.random.fork_rng([]):  # `compare` seeds it
        for net in agent.networks:
            compare(net, args, env)
            fuse(net.online)
            fuse(net.target)
    return "nm"


# --- end shared ---
# --- end kernels ---


if __name__ == "__main__":
    sys.exit(main())
