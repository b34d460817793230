"""Dense TD3 for continuous control in one file: what rnm_td3_continuous.py is compared with.

  Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods" (TD3), arXiv 1802.09477

  TD3, Algorithm 1: smoothed, clipped double-Q target; delays    -> update_critics, update_actor, update_agent

Train with `python dense_td3_continuous.py --env-id Ant-v4`, go on with --resume runs/<run_name>, measure a
trained policy with --evaluate runs/<run_name>.
"""

import ast
import contextlib
import copy
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, get_type_hints
from unittest import mock

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
    total_timesteps: Positive = 1_000_000
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
# --- shared: td3 ---
def update_critics(agent: Agent, data, args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One step of both critics to the clipped double-Q target; data: transitions, parts [B, width]."""
    with torch.no_grad():
        scale, bias = agent.actor.action_scale, agent.actor.action_bias  # [action_dim]
        noise = torch.empty_like(data.actions).normal_(0.0, args.policy_noise, generator=generator)  # [B, action_dim]
        noise = noise.clamp(-args.noise_clip, args.noise_clip) * scale
        next_state_actions = (agent.target_actor(data.next_observations) + noise).clamp(bias - scale, bias + scale)
        qf1_next_target = agent.qf1_target(data.next_observations, next_state_actions)
        qf2_next_target = agent.qf2_target(data.next_observations, next_state_actions)
        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
        next_q_value = data.rewards + (1 - data.dones) * args.gamma * min_qf_next_target  # [B, 1]

    qf1_a_values = agent.qf1(data.observations, data.actions)
    qf2_a_values = agent.qf2(data.observations, data.actions)
    qf1_loss = F.mse_loss(qf1_a_values, next_q_value)
    qf2_loss = F.mse_loss(qf2_a_values, next_q_value)
    qf_loss = qf1_loss + qf2_loss
    agent.q_optimizer.zero_grad()
    qf_loss.backward()
    agent.q_optimizer.step()
    return {
        "losses/qf1_values": qf1_a_values.detach(),
        "losses/qf2_values": qf2_a_values.detach(),
        "losses/qf1_loss": qf1_loss.detach(),
        "losses/qf2_loss": qf2_loss.detach(),
        "losses/qf_loss": qf_loss.detach() / 2,  # as CleanRL logs it
    }


def update_actor(agent: Agent, data) -> dict[str, torch.Tensor]:
    """One step of the actor up the first critic's gradient."""
    critics = [param for group in agent.q_optimizer.param_groups for param in group["params"] if param.requires_grad]
    for param in critics:
        param.requires_grad_(False)  # the gradient passes through the critic, whose own weights need none here
    actor_loss = -agent.qf1(data.observations, agent.actor(data.observations)).mean()
    agent.actor_optimizer.zero_grad()
    actor_loss.backward()
    agent.actor_optimizer.step()
    for param in critics:
        param.requires_grad_(True)
    return {"losses/actor_loss": actor_loss.detach()}


def update_agent(agent: Agent, rb: "ReplayBuffer", args: Args, rng: dict, update: int) -> dict[str, torch.Tensor]:
    """Update number `update` (from 1) of TD3, Algorithm 1: critics; every d-th time actor, then targets."""
    data = rb.sample(args.batch_size, rng["replay"])
    losses = update_critics(agent, data, args, rng["smoothing"])
    if update % args.policy_frequency == 0:
        losses |= update_actor(agent, data)
        update_targets(agent, args.tau)
    return losses


# --- end shared ---


def train(args: Args) -> dict:
    """Train; returns run_dir, exit_reason and final_score. docs/logging.md: its keys and files."""
    torch.set_num_threads(args.threads)
    env = make_env(args.env_id)
    rng = make_generators(args.seed, args.device)
    seed_globals(draw_seeds(rng["init"], 1)[0])
    agent = Agent(make_networks(args, env), lr=args.learning_rate)
    stats = model_stats(agent) | {"kernel": "torch", "pattern": "dense"}
    rb = ReplayBuffer(args.buffer_size, transition_columns(env), args.device)
    eval_seeds = draw_seeds(rng["evaluation"], args.eval_episodes)
    low, high = action_bounds(env)  # [action_dim]
    exploration_scale = args.exploration_noise * (high - low) / 2
    env.reset(seed=draw_seeds(rng["env_reset"], 1)[0])  # once: later resets go on with the environment's own generator
    env.action_space.seed(args.seed)  # for forks that call env.action_space.sample()
    seed_globals(draw_seeds(rng["globals"], 1)[0])  # for what a fork draws with torch.rand, np.random or random

    state = State()
    if args.resume:
        load_checkpoint(args, state, agent, rb, rng, env)
    with Run(args, metric_columns(agent), stats, state) as run:
        if not args.resume:
            run.log(0, run.density | run.evaluate(agent.actor, eval_seeds, 0))
            save_checkpoint(run, state, agent, rb, rng, env)
        obs, _ = env.reset()
        while state.global_step < args.total_timesteps:
            check_finite("observation", state.global_step, obs)
            if state.global_step < args.learning_starts:
                action = low + (high - low) * torch.rand(low.shape, generator=rng["warmup"])
            else:
                noise = exploration_scale * torch.randn(low.shape, generator=rng["exploration"])
                action = (act(agent.actor, obs) + noise).clamp(low, high)
            action = action.numpy()
            next_obs, reward, terminated, truncated, info = env.step(action)
            state.global_step = global_step = state.global_step + 1
            check_finite("observation or reward", global_step, next_obs, float(reward))
            # next_obs is the true successor, also where an episode is cut off: only termination cuts the bootstrap
            rb.add(observations=obs, actions=action, next_observations=next_obs, rewards=reward, dones=terminated)
            obs = next_obs

            row, last = {}, global_step == args.total_timesteps
            if global_step > args.learning_starts:
                with run.timed("updates"):
                    state.update += 1
                    state.losses |= update_agent(agent, rb, args, rng, state.update)
                    check_finite("a loss", global_step, *(x.item() for x in state.losses.values() if not x.dim()))
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


def plain_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in net.state_dict().items()}


def write_files(run: "Run", _state: State, agent: Agent, rb: "ReplayBuffer") -> None:
    save_model(run.dir / "model.pt", agent, rb)


# --- shared: replay ---
class ReplayBuffer:
    """Ring of transitions, one float32 row each, so that a batch is a single gather; sampled with replacement.

    columns: the width of each part of a row; a batch has them as attributes [B, width], in their order. `rows` and
    `parts` are one memory: change them in place.
    """

    def __init__(self, size: int, columns: dict[str, int], device: str):
        self.size, self.widths, self.device, self.added = size, list(columns.values()), device, 0
        self.rows = torch.from_numpy(np.zeros((size, sum(self.widths)), np.float32))  # takes memory only as it fills
        self.Batch = namedtuple("Batch", columns)
        self.parts = self.Batch(*(part.numpy() for part in self.rows.split(self.widths, dim=1)))  # views of rows

    def add(self, **transition) -> None:
        for part, value in zip(self.parts, self.Batch(**transition), strict=True):
            part[self.added % self.size] = value
        self.added += 1

    def sample(self, batch_size: int, generator: torch.Generator):
        index = torch.randint(min(self.added, self.size), (batch_size,), generator=generator)
        return self.Batch(*self.rows.index_select(0, index).to(self.device).split(self.widths, dim=1))

    def state_dict(self) -> dict:
        mine = {name: x for name, x in vars(self).items() if name != "parts" and not isinstance(x, CODE)}
        return mine | {"rows": torch.from_numpy(self.rows.numpy()[: self.added])}  # without the empty part

    def load_state_dict(self, state: dict) -> None:
        rows = state.pop("rows")
        self.rows[: len(rows)] = rows
        vars(self).update(state)


# --- end shared ---
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


if __name__ == "__main__":
    sys.exit(main())
