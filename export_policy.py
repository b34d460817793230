"""Write a trained policy as one C file that a robot can compile.

  python export_policy.py runs/<run_name>            writes policy.c beside model.pt
  python export_policy.py runs/<run_name> --check    compiles, compares and times it as well, also for small machines

policy.c is C99, needs no library but tanhf, allocates nothing, and holds one function,
void policy(const float observation[], float action[]), with tables of the active weights alone: of N:M each with its
place in its group (1, 2, 4 or 8 bits), of other topologies with its column (8 or 16 bits). Networks are chains of
linear layers, ReLU and Tanh, as meta.json lists them, and must act as the run did at the 16 observations in model.pt;
a fork whose network does more, but not in these, is not found out.

Exit codes: 0 done, 1 check or disk, 2 bad input, 130 Ctrl-C.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

TOLERANCE = 1e-5  # largest difference of an action, as a share of its range
ROUNDS, CALLS = 20, 500  # of each implementation, in turns

Layer = namedtuple("Layer", "name weight bias dense activation")  # weight [out, in]; activation ReLU, Tanh or Identity
Policy = namedtuple("Policy", "folder meta layers scale middle")


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of a finished or stopped run, with model.pt"""
    check: bool = False
    """compile policy.c, compare 10,000 actions with torch's, print sizes and times"""
    force: bool = False
    """replace a policy.c that differs"""


def read_policy(folder: Path) -> Policy:
    """Raises ValueError if the run is no chain that acts as its own network did, other errors if it is damaged."""
    meta = json.loads((folder / "meta.json").read_bytes())
    content = torch.load(folder / "model.pt", weights_only=True)
    state = {name: x.numpy() for name, x in content["actor"].items()}
    observations, actions = (x.numpy() for x in content["probe"])
    if not all(np.isfinite(x).all() for x in state.values()):
        raise ValueError("model.pt holds a number that is not finite")
    scale, middle, layers = state.pop("action_scale"), state.pop("action_bias"), []
    for part in meta["modules"]["actor"]:
        name, kind = part["name"], part["type"]
        if kind in ("Linear", "SparseLinear"):
            weight = state.pop(f"{name}.weight")
            if np.count_nonzero(weight) > part["active"]:
                raise ValueError(f"{name} has more weights in model.pt than meta.json says")
            bias = state.pop(f"{name}.bias", np.zeros(len(weight), np.float32))
            layers.append(Layer(name, weight, bias, part["active"] == weight.size, "Identity"))
        elif kind in ("ReLU", "Tanh") and layers and layers[-1].activation == "Identity":
            layers[-1] = layers[-1]._replace(activation=kind)
        elif kind not in ("Identity", "Dropout"):  # which do nothing in a policy that acts
            raise ValueError(
                f"{name} is a {kind}; only chains of Linear, each with a ReLU, a Tanh or nothing after, will do"
            )
    if state:
        raise ValueError(f"a plain chain has no {min(state)}")
    if meta["final_score"] is None and not observations.any():
        raise ValueError("it was stopped before its first checkpoint: no action shows what its network is")
    policy = Policy(folder, meta, layers, scale, middle)
    error = np.abs((numpy_policy(policy, observations) - actions) / scale).max()
    if not error <= 1e-4:
        raise ValueError(f"a plain chain of its layers does not act as its network did (off by {error:.1e})")
    return policy


def numpy_policy(policy: Policy, x: np.ndarray) -> np.ndarray:
    """observations [B, obs_dim] -> actions [B, action_dim]."""
    for layer in policy.layers:
        x = x @ layer.weight.T + layer.bias
        x = np.maximum(x, 0) if layer.activation == "ReLU" else np.tanh(x) if layer.activation == "Tanh" else x
    return np.tanh(x) * policy.scale + policy.middle


# --- Writing C ----------------------------------------------------------------------------------------------------

DENSE = """\
    for (int r = 0; r < {rows}; r++) {y}[r] = b{i}[r];
    for (int c = 0; c < {cols}; c++)  /* column by column, so that a compiler can use vectors */
        for (int r = 0; r < {rows}; r++) {y}[r] += w{i}[c * {rows} + r] * {x}[c];
"""
SPARSE = """\
    for (int r = 0, k = 0, a, j; r < {rows}; k += {each}, r++) {{
        float s[4] = {{b{i}[r]}};  /* four sums, since each addition waits for the one before */
        for (j = 0; j + {step} <= {each}; j += {step})
            for (a = 0; a < {step}; a++) s[a % 4] += w{i}[k + j + a] * {x}[{column}];
        for (a = 0; j + a < {each}; a++) s[0] += w{i}[k + j + a] * {x}[{column}];
        {y}[r] = (s[0] + s[1]) + (s[2] + s[3]);
    }}
"""
ACTIVATIONS = {
    "ReLU": "    for (int r = 0; r < {rows}; r++) {y}[r] = {y}[r] < 0 ? 0 : {y}[r];\n",
    "Tanh": "    for (int r = 0; r < {rows}; r++) {y}[r] = tanhf({y}[r]);\n",
}


def table(name: str, values: np.ndarray) -> str:
    """A constant array; floats in the fewest digits that give the same float back."""
    kind, end = ("float", "f") if values.dtype == np.float32 else (f"{values.dtype}_t", "")
    words = [str(x) + end for x in values.ravel()] or ["0"]
    lines = re.findall(r".{1,118}(?:,|$)", ",".join(words))
    return f"static const {kind} {name}[] = {{\n" + "\n".join(lines) + "};\n"


def place_in_groups(weight: np.ndarray, n: int, m: int) -> np.ndarray | None:
    """Place in its group of m of each of a row's weights [out, each row's]; None if some group has more than n."""
    rows, cols = weight.shape
    active = np.pad(weight != 0, ((0, 0), (0, -cols % m))).reshape(rows, -1, m)
    if active.sum(axis=2).max() > n:
        return None
    places = np.sort(np.argsort(~active, axis=2, kind="stable")[:, :, :n], axis=2)  # zeros fill up to n
    return places.reshape(rows, -1)[:, : cols // m * n + min(cols % m, n)]


def write_layer(i: int, layer: Layer, n: int | None, m: int | None, x: str, y: str) -> tuple[str, str, int]:
    """Tables, loops, and the bytes of the tables, of layer number i, which takes x and makes y."""
    weight, (rows, cols), loops, step = layer.weight, layer.weight.shape, SPARSE, 4
    each, column = f"n{i}[r]", f"c{i}[k + j + a]"  # how many weights a row has, column of number j + a of them
    tables = {"b": layer.bias}
    if layer.dense:
        tables["w"], loops = weight.T, DENSE
    elif n and m <= 256 and (places := place_in_groups(weight, n, m)) is not None:
        each, bits = places.shape[1], next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)
        slots = np.pad(places, ((0, 0), (0, -each * bits % 8 // bits)))  # a row begins with a byte of its own
        packed = (slots.reshape(rows, -1, 8 // bits) << np.arange(0, 8, bits)).sum(axis=2)  # the first in the low bits
        tables |= {"w": np.take_along_axis(weight, np.arange(each) // n * m + places, axis=1), "p": packed}
        per_byte, step = 8 // bits, max(4, 8 // bits)
        group = f"j / {n} * {m} + a / {n} * {m}" if step % n == 0 else f"(j + a) / {n} * {m}"
        byte = f"p{i}[r * {packed.shape[1]} + j / {per_byte} + a / {per_byte}]"
        column = f"{group} + ({byte} >> a % {per_byte} * {bits} & {2**bits - 1})"
    else:
        tables |= {"w": weight[weight != 0], "c": weight.nonzero()[1], "n": (weight != 0).sum(axis=1)}
    tables |= {name: x.astype(np.min_scalar_type(x.max(initial=0))) for name, x in tables.items() if name in "pcn"}
    text = f"/* {layer.name}: {cols} to {rows}, {tables['w'].size} weights */\n"
    text += "".join(table(f"{name}{i}", values) for name, values in tables.items())
    loops = (loops + ACTIVATIONS.get(layer.activation, "")).format(**locals())
    return text, loops, sum(values.nbytes for values in tables.values())


def write_c(policy: Policy) -> tuple[str, int]:
    """policy.c, and how many bytes its tables have."""
    (_, meta, layers, scale, middle), texts, loops, size, x = policy, "", "", 8 * len(policy.scale), "observation"
    for i, layer in enumerate(layers, 1):
        y = "action" if i == len(layers) else f"y{i}"
        text, own, count = write_layer(i, layer, meta["n"], meta["m"], x, y)
        array = f"    float {y}[{len(layer.weight)}];\n" * (y != "action")
        texts, loops, size, x = texts + text, loops + array + own, size + count, y
    bounds = ", ".join(f"{a:g} to {b:g}" for a, b in zip(middle - scale, middle + scale, strict=True))
    score = "none, the run was not finished" if meta["final_score"] is None else f"{meta['final_score']:.1f}"
    text = f"""\
/* The policy of {meta["run_name"].replace("*/", "* /")},
   trained on {meta["args"]["env_id"]} by {meta["script"]},
   commit {meta.get("commit")}{" with changes" * bool(meta.get("dirty"))}. Final score: {score}.
   {layers[0].weight.shape[1]} observations -> {len(scale)} actions in {bounds},
   in that environment's order and units. C99, int of 32 bits, tanhf (-lm); the two arrays must not overlap;
   {4 * sum(len(layer.weight) for layer in layers[:-1]):,} bytes of stack for hidden layers, {size:,} of tables:
   w, weights, of dense layers column after column, else the active ones row after row; b, biases; p, place of each
   active weight in its group, the first in the lowest bits; c, column of each active weight; n, how many a row has. */
#include <math.h>
#include <stdint.h>
enum {{ POLICY_OBSERVATIONS = {layers[0].weight.shape[1]}, POLICY_ACTIONS = {len(scale)} }};

{texts}/* half the range of each action, and its middle */
{table("scale", scale)}{table("middle", middle)}
void policy(const float observation[], float action[]) {{
{loops}    for (int i = 0; i < {len(scale)}; i++) action[i] = tanhf(action[i]) * scale[i] + middle[i];
}}
"""
    return text, size


# --- The check ----------------------------------------------------------------------------------------------------

MAIN = """
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <time.h>
#include "policy.c"
int main(void) {  /* observations in; actions, and the microseconds of each call, out */
    struct timespec a, b;
    float x[POLICY_OBSERVATIONS], y[POLICY_ACTIONS + 1];
    while (fread(x, sizeof x, 1, stdin) == 1) {
        clock_gettime(CLOCK_MONOTONIC, &a);
        policy(x, y);
        clock_gettime(CLOCK_MONOTONIC, &b);
        y[POLICY_ACTIONS] = (b.tv_sec - a.tv_sec) * 1e6f + (b.tv_nsec - a.tv_nsec) * 1e-3f;
        fwrite(y, sizeof y, 1, stdout);
    }
}
"""
ARM, ARM_RUN = "arm-linux-gnueabihf-gcc", "qemu-arm"
M4 = "arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfpu=fpv4-sp-d16 -mfloat-abi=hard -Os -ffunction-sections"
M4 += " -nostartfiles --specs=nosys.specs -Wl,--gc-sections,-e,policy,-u,policy"


def compile_c(source: str, out: Path, command: list[str]) -> None:
    """Raises OSError with the compiler's first error."""
    command = [*command, "-std=c99", "-x", "c", "-", "-o", str(out), "-lm"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        raise OSError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")


def sections(size: str, out: Path, command: list[str]) -> dict[str, int]:
    """Bytes of each section of the compiled policy.c, by GNU size."""
    compile_c('#include "policy.c"', out, command)
    text = subprocess.run([size, "-A", str(out)], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"^(\.\S+)\s+(\d+)", text, re.MULTILINE)}


class Actor(torch.nn.Sequential):
    """The policy in torch, to compare with."""

    def __init__(self, policy: Policy):
        super().__init__()
        for layer in policy.layers:
            self.extend([torch.nn.Linear(*layer.weight.T.shape), getattr(torch.nn, layer.activation)()])
            self[-2].weight.data, self[-2].bias.data = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
        self.scale, self.middle = torch.from_numpy(policy.scale), torch.from_numpy(policy.middle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x)) * self.scale + self.middle


def visited(env_id: str, actor: Actor, count: int) -> np.ndarray:
    """Observations [count, obs_dim] that the policy meets in its environment."""
    envs = gym.make_vec(env_id, num_envs=1, vectorization_mode="sync")
    found = [envs.reset(seed=0)[0]]
    while len(found) < count:
        found += [envs.step(actor(torch.from_numpy(found[-1]).float()).numpy())[0]]
    return np.concatenate(found).astype(np.float32)


def run_c(command: list[str], x: np.ndarray) -> np.ndarray:
    """Actions of the compiled policy at observations [B, obs_dim], and microseconds of a call: [B, action_dim + 1]."""
    done = subprocess.run(command, input=x.tobytes(), capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), -1)


def times(policy: Policy, actor: Actor, host: Path, x: np.ndarray) -> dict[str, list[float]]:
    """Microseconds of single calls of each implementation, which take turns."""
    tensors = torch.from_numpy(x)[:, None]
    calls = {  # name: function, its inputs
        "torch eager": (actor, tensors),
        "torch.jit": (torch.jit.trace(actor, tensors[0]), tensors),
        "numpy": (lambda x: numpy_policy(policy, x), x),
    }
    try:
        import onnx  # noqa: F401 (torch's exporter needs it)
        import onnxruntime as ort

        torch.onnx.export(actor, (tensors[0],), f"{host}.onnx", dynamo=False, input_names=["x"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(f"{host}.onnx", options)
        calls["ONNX Runtime"] = (lambda x: session.run(None, {"x": x})), x[:, None]
    except Exception as error:  # it may not be installed
        print(f"ONNX Runtime: not timed ({error})")
    us = {name: [] for name in ("policy.c", *calls)}
    for turn in np.split(np.arange(len(x)), ROUNDS):
        us["policy.c"] += run_c([str(host)], x[turn])[:, -1].tolist()
        for name, (call, inputs) in calls.items():
            for row in inputs[turn]:
                start = time.perf_counter()
                call(row)
                us[name].append((time.perf_counter() - start) * 1e6)
    return us


@torch.inference_mode()
def check(policy: Policy, size: int) -> bool:
    """Compile policy.c here and for ARM, compare with torch, print sizes and times; False if an action is off."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore")  # of exporters and of environments, about themselves
    actor, include, errors = Actor(policy), f"-I{policy.folder.resolve()}", []
    x = visited(policy.meta["args"]["env_id"], actor, ROUNDS * CALLS)
    wanted = actor(torch.from_numpy(x)).numpy()
    native = [*(shlex.split(os.environ.get("CC", "")) or ["cc"]), "-O3", "-march=native", include]
    machines = {"here": (native, []), "32-bit ARM (emulated)": ([ARM, "-O2", "-static", include], [ARM_RUN])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "policy")
        code = sum(count for name, count in sections("size", out, [*native, "-c"]).items() if ".text" in name)
        dense = 4 * sum(layer.weight.size + layer.bias.size for layer in policy.layers)
        print("| a call, one core | weights, bytes | code, bytes | median, us | 99 %, us |\n|---|--:|--:|--:|--:|")
        compile_c(MAIN, out, native)
        for name, us in times(policy, actor, out, x).items():
            sizes = f"{size:,} | {code:,}" if name == "policy.c" else f"{dense:,} | "
            print(f"| {name} | {sizes} | {np.median(us):.2f} | {np.percentile(us, 99):.2f} |")
        for where, (compiler, runner) in machines.items():
            try:
                compile_c(MAIN, out, compiler)
                actions = run_c([*runner, str(out)], x)[:, :-1]
                errors += [np.abs((actions - wanted) / (2 * policy.scale)).max()]
                print(f"Largest difference of {len(x):,} actions from torch, {where}: {errors[-1]:.1e} of the range")
            except FileNotFoundError as error:  # not installed
                print(f"{where}: not checked ({error})")
        try:
            found = sections("arm-none-eabi-size", out, [*M4.split(), include])
            sizes = {name: found.get(name, 0) for name in (".text", ".rodata", ".data")}
            words = ", ".join(f"{name} {number:,}" for name, number in sizes.items())
            fits = "fits" if sum(sizes.values()) <= 2**18 else "does not fit"
            print(f"Cortex-M4, with tanhf and newlib: {words} bytes, which {fits} into 256 KiB of flash")
        except FileNotFoundError as error:  # not installed
            print(f"Cortex-M4: not compiled ({error})")
    return all(error <= TOLERANCE for error in errors)


def main() -> int:
    args, code = tyro.cli(Args, description=__doc__), 2
    path, temporary = Path(args.run, "policy.c"), Path(args.run, "policy.c.tmp")
    try:
        policy = read_policy(Path(args.run))
        text, size = write_c(policy)
        old, new = path.read_bytes() if path.exists() else None, text.encode()
        if old not in (None, new) and not args.force:
            raise ValueError("policy.c exists and differs: move it away, or replace it with --force")
        code = 1
        if old != new:
            temporary.write_bytes(new)
            temporary.replace(path)
        print(f"{path}: {size:,} bytes of tables")
        return 0 if not args.check or check(policy, size) else 1
    except Exception as error:
        if code == 1 and temporary.is_file():
            temporary.unlink()
        reason = (str(error) if " " in str(error) else repr(error)).strip().splitlines()[0]
        print(f"error: {args.run}: {reason}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
