"""Write a trained policy as one C file that a robot can compile.

  python export_policy.py runs/<run_name>            writes policy.c beside model.pt
  python export_policy.py runs/<run_name> --check    compiles, compares and times it as well, also for small machines

policy.c is C99, needs no library but tanhf, allocates nothing, and holds

  void policy(const float observation[], float action[])

with tables of the active weights alone. Of N:M each has its place in its group (1, 2, 4 or 8 bits), of topologies
without structure its column (8 or 16 bits). Networks are chains of linear layers, ReLU and Tanh, as meta.json lists
them. The run's first 16 observations and its actions there, which model.pt holds, must agree with that chain; a fork
whose network does more, but not in these, is not found out.

Exit codes: 0 done, 1 the check or the disk failed, 2 bad input.
"""

import ctypes
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

TOLERANCE = 1e-5  # largest difference of an action, as a share of its range
FLASH = 256 * 1024  # bytes of the small machine
ROUNDS, CALLS = 200, 50  # of each implementation, in turns

Layer = namedtuple("Layer", "name weight bias mask activation")  # mask [out, in] or None; activation "relu", "tanh", ""
Policy = namedtuple("Policy", "folder meta layers scale middle")


@dataclass
class Args:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of a finished or stopped run, with model.pt"""
    check: bool = False
    """compile policy.c, compare 10,000 actions with torch's, print sizes and times"""
    force: bool = False
    """replace a policy.c that differs"""


class UserError(Exception):
    """What the user pointed to is wrong: one line, exit code 2."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- Reading a run ------------------------------------------------------------------------------------------------


def read_policy(folder: Path) -> Policy:
    """Raises UserError if the run is no chain that acts as its own network did, other errors if it is damaged."""
    meta = json.loads((folder / "meta.json").read_text())
    content = torch.load(folder / "model.pt", weights_only=True)
    state = {name: x.numpy() for name, x in content["actor"].items()}
    observations, actions = (x.numpy() for x in content["probe"])
    masks = read_masks(folder / "masks.npz") if (folder / "masks.npz").exists() else {}
    scale, middle, layers = state.pop("action_scale"), state.pop("action_bias"), []
    for part in meta["modules"]["actor"]:
        name, kind = part["name"], part["type"]
        if kind in ("Linear", "SparseLinear", "NMLinear"):
            weight, mask = state.pop(f"{name}.weight"), masks.get(name)
            kept = weight.size if mask is None else int(mask.sum())
            if kept != part["active"] or (mask is not None and (mask.shape != weight.shape or weight[~mask].any())):
                raise UserError(f"{folder}: masks.npz is missing or not of the same time as model.pt")
            bias = state.pop(f"{name}.bias", np.zeros(len(weight), np.float32))
            layers.append(Layer(name, weight, bias, None if kept == weight.size else mask, ""))
        elif kind in ("ReLU", "Tanh") and layers and not layers[-1].activation:
            layers[-1] = layers[-1]._replace(activation=kind.lower())
        elif kind not in ("Identity", "Dropout"):  # which do nothing in a policy that acts
            raise UserError(f"{folder}: {name} is a {kind}; only chains of Linear, ReLU and Tanh can be exported")
    if state:
        raise UserError(f"{folder}: a plain chain has no {min(state)}")
    if not observations.any():
        raise UserError(f"{folder} was stopped before its first checkpoint: no action shows what its network is")
    policy = Policy(folder, meta, layers, scale, middle)
    error = np.abs(numpy_policy(policy, observations) - actions).max() / scale.min()
    if not error <= 1e-4:
        raise UserError(f"{folder}: a plain chain of its layers does not act as its network did (off by {error:.1e})")
    return policy


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """The last mask [out, in] of each of the actor's sparse layers."""
    with np.load(path) as file:
        names = [name.removesuffix(".shape") for name in file if name.startswith("actor.") and name.endswith(".shape")]
        shapes = {name: tuple(file[f"{name}.shape"]) for name in names}
        bits = {name: np.unpackbits(file[name][-1])[: np.prod(shapes[name])] for name in names}
    return {name.removeprefix("actor."): bits[name].reshape(shapes[name]).astype(bool) for name in names}


def numpy_policy(policy: Policy, x: np.ndarray) -> np.ndarray:
    """observations [B, obs_dim] -> actions [B, action_dim]."""
    for layer in policy.layers:
        x = x @ layer.weight.T + layer.bias
        x = np.maximum(x, 0) if layer.activation == "relu" else np.tanh(x) if layer.activation else x
    return np.tanh(x) * policy.scale + policy.middle


# --- Writing C ----------------------------------------------------------------------------------------------------

LOOPS = {  # of a layer: y = W x + b
    "dense": """\
    for (int r = 0; r < {rows}; r++) {y}[r] = b{i}[r];
    for (int c = 0; c < {cols}; c++)  /* column by column, so that a compiler can use vectors */
        for (int r = 0; r < {rows}; r++) {y}[r] += w{i}[c * {rows} + r] * {x}[c];
""",
    "sparse": """\
    for (int r = 0, k = 0; r < {rows}; r++) {{
        float s0 = b{i}[r], s1 = 0, s2 = 0, s3 = 0;  /* four sums, since each addition waits for the one before */
        int j = 0;
        for (; j + {ahead} < {each}; j += {step}) {{
{terms}
        }}
        for (; j < {each}; j++) s0 += w{i}[k + j] * {x}[{column}];
        {y}[r] = (s0 + s1) + (s2 + s3);
        k += {each};
    }}
""",
    "": "",
    "relu": "    for (int r = 0; r < {rows}; r++) {y}[r] = {y}[r] < 0 ? 0 : {y}[r];\n",
    "tanh": "    for (int r = 0; r < {rows}; r++) {y}[r] = tanhf({y}[r]);\n",
}
BYTES = {"float": 4, "uint16_t": 2, "uint8_t": 1}


def table(kind: str, name: str, values: np.ndarray) -> str:
    """A constant array; floats in the fewest digits that give the same float back."""
    if kind == "float":
        words = [np.format_float_scientific(x, unique=True, trim="0") + "f" for x in values.ravel().astype(np.float32)]
    else:
        words = [str(x) for x in values.ravel().tolist()]
    lines = re.findall(r".{1,118}(?:,|$)", ",".join(words or ["0"]))
    return f"static const {kind} {name}[] = {{\n" + "\n".join(lines) + "};\n"


def place_in_groups(mask: np.ndarray, n: int, m: int) -> np.ndarray | None:
    """Place in its group of each active weight, row after row; None if some group of m has not n (or all it has)."""
    rows, cols = mask.shape
    padded = np.pad(mask, ((0, 0), (0, -cols % m))).reshape(rows, -1, m)
    wanted = [min(n, cols - group * m) for group in range(padded.shape[1])]
    return padded.nonzero()[2] if (padded.sum(axis=2) == wanted).all() else None


def write_layer(i: int, layer: Layer, n: int | None, m: int | None, x: str, y: str) -> tuple[str, str, int]:
    """Tables, loops, and the bytes of the tables, of layer number i, which takes x and makes y."""
    (rows, cols), mask, each, step = layer.weight.shape, layer.mask, f"n{i}[r]", 4
    column, unrolled = f"c{i}[k + j]", "c{i}[k + j + {a}]"  # of weight number j, j + a of row r
    tables = {
        f"b{i}": ("float", layer.bias),
        f"w{i}": ("float", layer.weight.T if mask is None else layer.weight[mask]),
    }
    places = place_in_groups(mask, n, m) if mask is not None and n and m <= 256 else None
    if places is not None:
        bits = next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)
        each, per_byte = len(places) // rows, 8 // bits
        width = -(-each // per_byte)  # a row begins with a byte of its own
        slots = np.pad(places.reshape(rows, each), ((0, 0), (0, width * per_byte - each)))
        packed = slots.reshape(rows, width, per_byte) << np.arange(0, 8, bits)  # the first in the low bits
        tables[f"p{i}"] = "uint8_t", packed.sum(axis=2)
        step, mask_bits = math.lcm(4, per_byte, n) if n <= 4 else max(4, per_byte), 2**bits - 1
        column = f"j / {n} * {m} + (p{i}[r * {width} + j / {per_byte}] >> j % {per_byte} * {bits} & {mask_bits})"
        unrolled = f"j / {n} * {m} + {{g}} + (p{i}[r * {width} + j / {per_byte} + {{b}}] >> {{s}} & {mask_bits})"
        if step % n:
            unrolled = column.replace("j", "(j + {a})")
    elif mask is not None:
        tables |= {f"c{i}": ("uint8_t" if cols <= 256 else "uint16_t", mask.nonzero()[1])}
        each_row = mask.sum(axis=1)
        tables |= {f"n{i}": ("uint8_t" if each_row.max() < 256 else "uint16_t", each_row)}
    text = f"/* {layer.name}: {cols} to {rows}, {tables[f'w{i}'][1].size} weights */\n"
    text += "".join(table(kind, name, values) for name, (kind, values) in tables.items())
    terms = []
    for a in range(step):
        numbers = {"i": i, "a": a, "g": a // (n or 1) * (m or 1)}
        if places is not None:
            numbers |= {"b": a // per_byte, "s": a % per_byte * bits}
        terms += [f"            s{a % 4} += w{i}[k + j + {a}] * {x}[{unrolled.format(**numbers)}];"]
    loops = LOOPS["dense" if mask is None else "sparse"] + LOOPS[layer.activation]
    names = {"rows": rows, "cols": cols, "i": i, "x": x, "y": y, "each": each, "step": step, "ahead": step - 1}
    loops = loops.format(**names, column=column, terms="\n".join(terms))
    return text, loops, sum(BYTES[kind] * values.size for kind, values in tables.values())


def write_c(policy: Policy) -> tuple[str, int]:
    """policy.c, and how many bytes its tables have."""
    (_, meta, layers, scale, middle), texts, loops, size, x = policy, "", "", 8 * len(policy.scale), "observation"
    for i, layer in enumerate(layers, 1):
        y = "action" if i == len(layers) else "zy"[i % 2]
        text, own, count = write_layer(i, layer, meta["n"], meta["m"], x, y)
        texts, loops, size, x = texts + text, loops + own, size + count, y
    hidden = [len(layer.weight) for layer in layers[:-1]]
    stack = {name: max(hidden[k::2]) for k, name in enumerate("yz") if hidden[k::2]}
    arrays = "".join(f"    float {name}[{length}];\n" for name, length in stack.items())
    bounds = ", ".join(f"{a:g} to {b:g}" for a, b in zip(middle - scale, middle + scale, strict=True))
    score = "none, the run was not finished" if meta["final_score"] is None else f"{meta['final_score']:.1f}"
    commit = f"commit {meta.get('commit')}{' with changes' * bool(meta.get('dirty'))}"
    facts = f"""{meta["run_name"]},
   trained on {meta["args"]["env_id"]} by {meta["script"]}, {commit}.
   Final score: {score}.""".replace("*/", "* /")
    stack_bytes = 4 * sum(stack.values())
    text = f"""\
/* The policy of {facts}
   {layers[0].weight.shape[1]} observations -> {len(scale)} actions in {bounds}, in that environment's order and units.
   A NaN among the observations gives NaN.
   {size:,} bytes of tables, {stack_bytes:,} bytes of stack for hidden layers; C99, needs tanhf (-lm), allocates
   nothing, can run in several threads at once. Tables: w, weights, of dense layers column after column, else the active
   ones row after row; b, biases; p, place of each active weight in its group, the first in the lowest bits; c, column
   of each active weight; n, how many a row has. */
#include <math.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {{
#endif
enum {{ POLICY_OBSERVATIONS = {layers[0].weight.shape[1]}, POLICY_ACTIONS = {len(scale)} }};
void policy(const float observation[], float action[]);
#ifdef __cplusplus
}}
#endif

{texts}/* half the range of each action, and its middle */
{table("float", "scale", scale)}{table("float", "middle", middle)}
void policy(const float observation[], float action[]) {{
{arrays}{loops}    for (int i = 0; i < {len(scale)}; i++) action[i] = tanhf(action[i]) * scale[i] + middle[i];
}}
"""
    return text, size


# --- The check ----------------------------------------------------------------------------------------------------

HOST = """
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <time.h>
#include "policy.c"
void measure(int count, const float *x, double *us) {
    struct timespec a, b;
    float y[POLICY_ACTIONS];
    for (int i = 0; i < count; i++) {
        clock_gettime(CLOCK_MONOTONIC, &a);
        policy(x + i * POLICY_OBSERVATIONS, y);
        clock_gettime(CLOCK_MONOTONIC, &b);
        us[i] = (b.tv_sec - a.tv_sec) * 1e6 + (b.tv_nsec - a.tv_nsec) * 1e-3;
    }
}
int main(void) {
    float x[POLICY_OBSERVATIONS], y[POLICY_ACTIONS];
    while (fread(x, sizeof x, 1, stdin) == 1) policy(x, y), fwrite(y, sizeof y, 1, stdout);
    return 0;
}
"""
ARM, ARM_RUN = "arm-linux-gnueabihf-gcc", "qemu-arm"
M4 = "arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb -mfpu=fpv4-sp-d16 -mfloat-abi=hard -Os -ffunction-sections"
M4 += " -nostartfiles --specs=nosys.specs -Wl,--gc-sections,-e,policy,-u,policy"


def compile_c(source: str, out: Path, *command: str) -> None:
    """Raises OSError with the compiler's first line."""
    (out.parent / f"{out.name}.c").write_text(source)
    command = [*command, "-std=c99", str(out.parent / f"{out.name}.c"), "-o", str(out), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip().partition(chr(10))[0]}")


def section_sizes(tool: str, path: Path) -> dict[str, int]:
    """Bytes of each section, by GNU size."""
    text = subprocess.run([tool, "-A", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"^(\.\S+)\s+(\d+)", text, re.MULTILINE)}


class Actor(nn.Module):
    """The policy in torch, to compare with."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.net, kinds = nn.Sequential(), {"relu": nn.ReLU, "tanh": nn.Tanh}
        for layer in policy.layers:
            linear = nn.Linear(*layer.weight.T.shape)
            linear.load_state_dict({"weight": torch.from_numpy(layer.weight), "bias": torch.from_numpy(layer.bias)})
            self.net.extend([linear, kinds[layer.activation]()] if layer.activation else [linear])
        self.register_buffer("scale", torch.from_numpy(policy.scale))
        self.register_buffer("middle", torch.from_numpy(policy.middle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(x)) * self.scale + self.middle


def visited(policy: Policy, actor: Actor, count: int) -> np.ndarray:
    """Observations [count, obs_dim] that the policy meets in its environment."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    env, found = gym.make(policy.meta["args"]["env_id"], disable_env_checker=True), []
    obs, _ = env.reset(seed=0)
    while len(found) < count:
        found.append(np.asarray(obs, np.float32))
        obs, _, terminated, truncated, _ = env.step(actor(torch.from_numpy(found[-1])[None])[0].numpy())
        obs = env.reset()[0] if terminated or truncated else obs
    return np.stack(found)


def onnx_actor(actor: Actor, x: np.ndarray, folder: Path) -> Callable | None:
    """None where ONNX Runtime is not installed."""
    try:
        import onnx  # noqa: F401 (torch's exporter needs it)
        import onnxruntime

        torch.onnx.export(actor, (torch.from_numpy(x),), folder / "policy.onnx", dynamo=False, input_names=["x"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return partial(onnxruntime.InferenceSession(folder / "policy.onnx", options).run, None)
    except ImportError:
        return None


def measure(policy: Policy, library: ctypes.CDLL, actor: Actor, x: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Microseconds of single calls of each implementation, which take turns on one core."""
    batches, us = x[: ROUNDS * CALLS].reshape(ROUNDS, CALLS, -1), np.empty(CALLS)
    tensors = torch.from_numpy(batches)[:, :, None]
    jit = torch.jit.trace(actor, tensors[0, 0])
    calls = {
        "torch eager": lambda i, j: actor(tensors[i, j]),
        "torch.jit": lambda i, j: jit(tensors[i, j]),
        "numpy": lambda i, j: numpy_policy(policy, batches[i, j]),
    }
    if onnx := onnx_actor(actor, x[:1], folder):
        calls["ONNX Runtime"] = lambda i, j: onnx({"x": batches[i, j][None]})
    times = {name: [] for name in ("policy.c", *calls)}
    for i in range(ROUNDS):
        library.measure(CALLS, np.ascontiguousarray(batches[i]).ctypes, us.ctypes)
        times["policy.c"] += us.tolist()
        for name, call in calls.items():
            for j in range(CALLS):
                start = time.perf_counter()
                call(i, j)
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: np.array(values) for name, values in times.items()}


def compare(command: list[str], x: np.ndarray, wanted: np.ndarray, ranges: np.ndarray) -> float:
    """Largest difference of the compiled policy's actions, as a share of the range."""
    done = subprocess.run(command, input=x.tobytes(), capture_output=True, check=True)
    return float(np.abs((np.frombuffer(done.stdout, np.float32).reshape(wanted.shape) - wanted) / ranges).max())


@torch.inference_mode()
def check(policy: Policy, size: int) -> bool:
    """Compile policy.c here and for ARM, compare with torch, print sizes and times; False if an action is off."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    actor, ranges, errors = Actor(policy), 2 * policy.scale, {}
    x = visited(policy, actor, ROUNDS * CALLS)
    wanted = actor(torch.from_numpy(x)).numpy()
    include = f"-I{policy.folder.resolve()}"
    native = [*shlex.split(os.environ.get("CC") or "cc"), "-O3", "-march=native", include]
    with tempfile.TemporaryDirectory() as folder:
        host, arm, m4, part = (Path(folder, name) for name in ("host", "arm", "m4", "part.o"))
        compile_c(HOST, host, *native)
        errors["here"] = compare([str(host)], x, wanted, ranges)
        compile_c(HOST, host, *native, "-shared", "-fPIC")
        times = measure(policy, ctypes.CDLL(str(host)), actor, x, Path(folder))
        compile_c('#include "policy.c"', part, *native, "-c")
        code = sum(n for name, n in section_sizes("size", part).items() if name.startswith(".text"))
        dense = 4 * sum(layer.weight.size + layer.bias.size for layer in policy.layers)
        print("| a call, one core | weights, bytes | code, bytes | median, us | 99 %, us |\n|---|--:|--:|--:|--:|")
        for name, us in times.items():
            sizes = f"{size:,} | {code:,}" if name == "policy.c" else f"{dense:,} | "
            print(f"| {name} | {sizes} | {np.median(us):.2f} | {np.percentile(us, 99):.2f} |")
        try:
            compile_c(HOST, arm, ARM, "-O2", "-static", include)
            errors["32-bit ARM (emulated)"] = compare([ARM_RUN, str(arm)], x, wanted, ranges)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"32-bit ARM: not checked ({first_line(error)})")
        try:
            compile_c('#include "policy.c"', m4, *M4.split(), include)
            found = section_sizes("arm-none-eabi-size", m4)
            sizes = {name: found.get(name, 0) for name in (".text", ".rodata", ".data")}
            fits = "fits" if sum(sizes.values()) <= FLASH else "does not fit"
            words = ", ".join(f"{name} {number:,}" for name, number in sizes.items())
            print(f"Cortex-M4, with tanhf and newlib: {words} bytes, which {fits} into {FLASH // 1024} KiB of flash")
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"Cortex-M4: not compiled ({first_line(error)})")
    for where, error in errors.items():
        print(f"Largest difference of {len(x):,} actions from torch, {where}: {error:.1e} of the range")
    return all(error <= TOLERANCE for error in errors.values())


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    folder = Path(args.run)
    path, temporary = folder / "policy.c", folder / "policy.c.tmp"
    try:
        try:
            policy = read_policy(folder)
            text, size = write_c(policy)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{folder} holds no policy to export ({type(error).__name__}: {first_line(error)})"
            ) from None
        if path.exists() and path.read_bytes() != text.encode() and not args.force:
            raise UserError(f"{path} exists and differs: move it away, or replace it with --force")
        try:
            temporary.write_bytes(text.encode())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{path}: {size:,} bytes of tables")
        return 0 if not args.check or check(policy, size) else 1
    except Exception as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
