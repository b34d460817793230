"""Small environments for the tests; `--env-id toy_envs:<id>` reaches them from the command line too."""

import gymnasium as gym
import numpy as np


class Reach(gym.Env):
    """A point on a line is moved by the first action; reward -(x - 1)^2 / 10. Bounds and scale differ by dimension.

    Ends (terminated) beyond |x| > 4; `fault_at` makes a step of the environment's life return NaN.
    """

    action_space = gym.spaces.Box(np.array([-1.0, 0.5], np.float32), np.array([0.5, 3.0], np.float32))
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, fault: str = "", fault_at: int = 0, render_mode=None):
        self.fault, self.fault_at, self.steps, self.render_mode = fault, fault_at, 0, render_mode

    def reset(self, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return self.obs(), {}

    def obs(self):
        return np.array([self.x, self.x**2, 1.0])

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.x += 0.5 * float(action[0]) + 0.05 * self.np_random.normal()
        obs, reward = self.obs(), -((self.x - 1) ** 2) / 10
        if self.steps == self.fault_at:
            obs, reward = (obs * np.nan, reward) if self.fault == "observation" else (obs, np.inf)
        return obs, reward, bool(abs(self.x) > 4), False, {}


class Unbounded(Reach):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


class DictObs(Reach):
    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (1,))})


class InPlace(Reach):
    """Returns one array, which the next step changes."""

    def obs(self):
        self.buffer = getattr(self, "buffer", np.zeros(3))
        self.buffer[:] = super().obs()
        return self.buffer


gym.register("InPlace-v0", InPlace, max_episode_steps=50)
gym.register("Reach-v0", Reach, max_episode_steps=50)
gym.register("ReachShort-v0", Reach, max_episode_steps=25)
gym.register("ReachNaN-v0", Reach, max_episode_steps=50, kwargs={"fault": "observation", "fault_at": 150})
gym.register("ReachInf-v0", Reach, max_episode_steps=50, kwargs={"fault": "reward", "fault_at": 150})
gym.register("Unbounded-v0", Unbounded, max_episode_steps=50)
gym.register("DictObs-v0", DictObs, max_episode_steps=50)


class Huge(Reach):
    """Rewards near float32's limit: the squared error overflows."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 1e30, terminated, truncated, info


gym.register("Huge-v0", Huge, max_episode_steps=50)


class Float64(Reach):
    action_space = gym.spaces.Box(np.array([-1.0, 0.5]), np.array([0.5, 3.0]), dtype=np.float64)

    def step(self, action):
        return super().step(action.astype(np.float64))


class ResetNaN(Reach):
    resets = 0

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.resets += 1
        return obs * (np.nan if self.resets == 5 and seed is None else 1), info


gym.register("Float64-v0", Float64, max_episode_steps=50)
gym.register("ResetNaN-v0", ResetNaN, max_episode_steps=50)
