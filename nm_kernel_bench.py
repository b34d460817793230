"""Where N:M pays on this machine, and where it does not: kernels, the actor at batch 1, masks, whole training runs.

  python nm_kernel_bench.py                  the three products of a layer by width and pattern, dense beside them
  python nm_kernel_bench.py --device cuda    the same on an NVIDIA GPU, whose sparse tensor cores know 2:4
  python nm_kernel_bench.py --end-to-end     steps per second of the training scripts and of dense peers

Every product is first compared with float64; one that is wrong is reported and not timed. All implementations of a
layer are timed in turns, repeated; medians and quartiles. Useful GFLOP/s count the kept weights only, the share of peak
is against what is measured first: fused multiply-adds from registers on a CPU core, a product of 8192-wide matrices on
a GPU. N:M times of a layer include the conversion of its inputs and outputs, which a network pays at its ends only.
Results: results.csv, results.json, summary.md and figures in --out, and a Weights & Biases run.

End to end, each configuration runs as a process of its own, all in turns. The scripts report charts/SPS and
charts/update_ms in their metrics.csv; rows during warm-up and the first one after it don't count. stable-baselines3's
and sbx-rl's TD3 (JAX) are timed where they are installed, with the same networks, batch and one update per step.
"""

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")  # numpy's waiting threads would spin into the next timings
if os.path.exists("/proc/cpuinfo") and "avx512f" in open("/proc/cpuinfo").read():
    os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"  # whatever the environment says: the best dense there is

import contextlib
import csv
import ctypes
import importlib.util
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import threadpoolctl
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))

# --- shared: colors ---
# Okabe and Ito's colours first, one for each pattern everywhere.
COLORS = {"dense": "#000000", "2:4": "#0072B2", "1:4": "#E69F00", "1:8": "#009E73", "1:16": "#CC79A7", "4:8": "#56B4E9",
          "2:8": "#D55E00", "1:2": "#882255", "3:4": "#AA8800", "1:32": "#332288", "2:16": "#6699CC",
          "4:16": "#44AA99"}  # fmt: skip


def pattern_color(pattern: str) -> str:
    """Of its numbers where it is not in COLORS, so that it is the same everywhere."""
    n, _, m = pattern.partition(":")
    return COLORS.get(pattern) or to_hex(colormaps["turbo"]((37 * int(n) + 11 * int(m)) % 97 / 97))


# --- end shared ---


@dataclass
class Args:
    end_to_end: bool = False
    """time whole training runs instead of kernels"""
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """inputs and outputs of the square layers, each from 1 to 4096"""
    batch_sizes: tuple[int, ...] = (1, 256)
    """observations at a time, each from 1 to 65536; 1 is acting"""
    patterns: tuple[str, ...] | None = None
    """N:M patterns, N < M <= 32768: 2:4 1:4 1:8, and 4:8 2:8 1:16 for kernels, unless named"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16 or both, of the dense products; N:M is float32 on a CPU, bfloat16 (where named) on a GPU"""
    device: Literal["cpu", "cuda"] = "cpu"
    """of the products; end to end, cuda adds runs of the scripts on the GPU"""
    threads: tuple[int, ...] = (1, CORES)
    """threads, each from 1 to the number of cores; end to end, a run has the smallest, or if so labelled the largest
    of these numbers, and is pinned to as many cores"""
    repetitions: int = 5
    """timings of each function, or runs of each configuration, >= 1"""
    env_id: str = "Ant-v4"
    """gymnasium id of the environment (--end-to-end)"""
    hidden_dims: tuple[int, ...] = (256,)
    """units in each of the two hidden layers, each from 1 to 4096; of further widths only dense and N:M are timed, to
    see how the cost grows (--end-to-end)"""
    steps: int = 3000
    """environment steps with updates in each run, >= 2000; the first 1000 are not counted (--end-to-end)"""
    out: str | None = None
    """folder for tables and figures: benchmark/kernels, benchmark/kernels_cuda or benchmark/end_to_end, unless named"""
    track: bool = True
    """mirror tables and figures to Weights & Biases (offline when not logged in)"""
    wandb_project_name: str = "nm-sparse-rl"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B user or team"""

    def __post_init__(self) -> None:
        if self.patterns is None:
            self.patterns = ("2:4", "1:4", "1:8", *(() if self.end_to_end else ("4:8", "2:8", "1:16")))
        for name in ("widths", "batch_sizes", "threads"):
            setattr(self, name, tuple(sorted(set(getattr(self, name)))))
        self.patterns = tuple(dict.fromkeys(self.patterns))
        kernels = "benchmark/kernels" if self.device == "cpu" else "benchmark/kernels_cuda"
        self.out = self.out or ("benchmark/end_to_end" if self.end_to_end else kernels)


class UserError(Exception):
    """Something that the user typed is wrong: one line, exit code 2."""


class Fault(Exception):
    """Not the user's doing, such as a full disk: one line, exit code 1."""


def check_args(args: Args) -> None:
    for name, low, high in (
        ("widths", 1, 4096),
        ("hidden_dims", 1, 4096),
        ("batch_sizes", 1, 65_536),
        ("threads", 1, CORES),
    ):
        values = getattr(args, name)
        if not values or not all(low <= value <= high for value in values):
            raise UserError(f"--{name.replace('_', '-')} takes numbers from {low} to {high}, not {values}")
    for pattern in args.patterns or ("",):
        n, _, m = pattern.partition(":")
        if not (f"{n}{m}".isascii() and n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m) <= 32_768):
            raise UserError(f"--patterns takes N:M with 1 <= N < M <= 32768, not {pattern or 'none'}")
    if not args.dtypes or not {"float32", "bfloat16"}.issuperset(args.dtypes):
        raise UserError(f"--dtypes takes float32 and bfloat16, not {' '.join(args.dtypes)}")
    if args.repetitions < 1 or args.steps < 2000:
        raise UserError("--repetitions must be at least 1, --steps at least 2000")
    if args.env_id not in gym.registry:
        raise UserError(f"unknown --env-id {args.env_id}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here, use --device cpu")


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


# --- Products of one layer on the CPU -----------------------------------------------------------------------------

PRODUCTS = ("forward", "grad-input", "grad-weight")
INTERVALS = (100, 1000, 10_000)  # K

PEAK = r"""
#if defined(__AVX512F__)
enum { W = 16, CHAINS = 24 };  // floats in a vector; multiply-adds in flight
#elif defined(__AVX__)
enum { W = 8, CHAINS = 12 };
#else
enum { W = 4, CHAINS = 12 };
#endif
typedef float vec __attribute__((vector_size(4 * W)));
float multiply_add(long rounds) {  // 2 * W * CHAINS floating-point operations in a round
    vec a[CHAINS], b = {0.5f}, c = {1.0f};
    for (int i = 0; i < CHAINS; i++) a[i] = b;
    for (long k = 0; k < rounds; k++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * b + c;
    for (int i = 1; i < CHAINS; i++) a[0] += a[i];
    return a[0][0];
}
float read_all(const float *x, long n) {  // n floats, a multiple of 8 vectors
    vec a[8] = {{0}};
    for (long k = 0; k < n; k += 8 * W)
        for (int i = 0; i < 8; i++) a[i] += *(const vec *)(x + k + i * W);
    for (int i = 1; i < 8; i++) a[0] += a[i];
    return a[0][0];
}
int operations(void) { return 2 * W * CHAINS; }
"""


def measure_limits(threads: tuple[int, ...]) -> dict:
    """Fused multiply-adds from registers on so many cores at once, GFLOP/s; what one core reads from memory, GB/s."""
    library, rounds, memory = load_kernels(PEAK), 5_000_000, torch.ones(64 * 2**20)
    library.multiply_add.argtypes, library.read_all.argtypes = [ctypes.c_long], [ctypes.c_void_p, ctypes.c_long]
    peaks = {}
    for count in threads:
        with ThreadPoolExecutor(count) as pool:  # ctypes lets other threads run
            every = [rounds] * count
            times = [seconds(lambda: list(pool.map(library.multiply_add, every)), 1) for _ in range(9)]  # noqa: B023
        peaks[str(count)] = count * library.operations() * rounds / min(times) / 1e9
    read = min(seconds(lambda: library.read_all(memory.data_ptr(), memory.numel()), 1) for _ in range(5))
    return {"peak_gflops": {"fp32": peaks}, "read_gbs": 4 * memory.numel() / read / 1e9}


def seconds(function: Callable[[], object], loops: int) -> float:
    """Mean time of a call, until the GPU is done if one is in use."""
    gpu = torch.cuda.is_initialized()
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        function()
    if gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / loops


def exact_products(W, bias, x, dy, E=None) -> dict[str, torch.Tensor]:
    """The products in float64; grad-weight [out, in + 1], the last column for the bias, 0 where the mask E is False."""
    W, bias, x, dy = (tensor.double() for tensor in (W, bias, x, dy))
    W, mask = (W, 1) if E is None else (W * E, E)
    grads = torch.cat([dy.T @ x * mask, dy.sum(0)[:, None]], dim=1)
    return {"forward": x @ W.T + bias, "grad-input": dy @ W, "grad-weight": grads}


def check(y: torch.Tensor, exact: torch.Tensor, implementation: str) -> str | None:
    """What is wrong with a product, by the largest error over the largest number; bfloat16 and TF32 have few bits."""
    exact = exact[:, : y.shape[1]]  # dense products are without the bias' gradient
    error = float((y - exact).abs().max() / exact.abs().max())
    return None if error <= (1e-5 if precision(implementation) == "fp32" else 1e-2) else f"error {error:.1e}"


class Packed:
    """One N:M layer and what its kernels write, with a callable for each product."""

    def __init__(self, W: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, n: int, m: int):
        dense = nn.Linear(W.shape[1], W.shape[0])
        dense.weight.data, dense.bias.data = W.clone(), bias.clone()
        self.net = nn.Module()
        self.net.fc1, self.net.plans = NMLinear(dense, n, m), {}
        self.layer, batch = self.net.fc1, len(x)
        self.plan, flat = Plan([self.net]), [self.layer.flat.detach()]
        lanes = self.plan.lanes
        self.y, self.dx, self.grad = torch.empty(batch, len(W)), torch.empty_like(x), torch.empty_like(flat[0])
        self.acts = torch.empty(-(-batch // lanes) * lanes * self.plan.width)
        record = {"acts": self.acts.data_ptr()}
        calls = {
            "forward": self.plan.call([x], flat, outs=[self.y], record=True, **record),
            "grad-input": self.plan.call([x], flat, douts=[dy], dx=(self.dx.data_ptr(), None), **record),
            "grad-weight": self.plan.call([x], flat, douts=[dy], grads=[self.grad], **record),
        }
        for call in calls.values():
            call.owner = self  # what the pointers lead to lives as long as the call
        lib = self.plan.lib
        self.products = {
            name: partial(lib.nm_forward if name == "forward" else lib.nm_backward, ctypes.byref(call))
            for name, call in calls.items()
        }
        if batch == 1:  # acting, as the training script calls it
            self.products = {"forward": lambda: self.keep(nm_mlp([self.net], x)[0])}

    def keep(self, y: torch.Tensor) -> None:
        self.y = y

    def result(self, name: str) -> torch.Tensor:
        """What the call before has written."""
        if name != "grad-weight":
            return self.y if name == "forward" else self.dx
        grad = torch.zeros(self.layer.W.shape).scatter(1, self.layer.index, self.layer.packed(self.grad))
        return torch.cat([grad, self.grad[-len(grad) :, None]], dim=1)


def csr_products(packed: Packed, x: torch.Tensor, dy: torch.Tensor) -> dict[str, Callable]:
    """torch's sparse CSR, which anyone could use, with operands laid out as it likes them: [features, B]."""
    W = packed.layer.weight.detach()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
    rows, columns, bias = W.to_sparse_csr(), W.T.contiguous().to_sparse_csr(), packed.layer.bias.detach()[:, None]
    x_columns, dy_columns, x_rows = x.T.contiguous(), dy.T.contiguous(), x.contiguous()
    return {
        "forward": lambda: torch.addmm(bias, rows, x_columns) if len(x) > 1 else rows @ x_columns + bias,
        "grad-input": lambda: columns @ dy_columns,
        "grad-weight": lambda: torch.sparse.sampled_addmm(rows, dy_columns, x_rows, beta=0.0),
    }


def dense_products(W, bias, x, dy) -> dict[str, Callable]:
    """Into memory that is there already, as the kernels'; of one observation as acting calls it."""
    if len(x) == 1:
        return {"forward": lambda: F.linear(x, W, bias)}
    y, dx, grad = (torch.empty_like(tensor) for tensor in (dy, x, W))
    return {
        "forward": lambda: torch.addmm(bias, x, W.T, out=y),
        "grad-input": lambda: torch.mm(dy, W, out=dx),
        "grad-weight": lambda: torch.mm(dy.T, x, out=grad),
    }


def onednn_products(W, bias, x, dy) -> dict[str, Callable]:
    """oneDNN, which torch calls for bfloat16 alone: on AMD twice as fast in float32 as the MKL behind torch.mm.

    It allocates its results, the only one to do so.
    """
    linear = partial(torch.ops.mkldnn._linear_pointwise, attr="none", scalars=[], algorithm="")
    return {
        "forward": lambda: linear(x, W, bias),
        "grad-input": lambda: linear(dy, W.T, None),
        "grad-weight": lambda: linear(dy.T, x.T, None),
    }


def numpy_products(W, bias, x, dy) -> dict[str, Callable]:
    W, bias, x, dy = (tensor.numpy() for tensor in (W, bias, x, dy))
    y, dx, grad = (np.empty_like(array) for array in (dy, x, W))
    return {
        "forward": lambda: np.add(np.matmul(x, W.T, out=y), bias, out=y),
        "grad-input": lambda: np.matmul(dy, W, out=dx),
        "grad-weight": lambda: np.matmul(dy.T, x, out=grad),
    }


def layer_tensors(inputs: int, outputs: int, batch: int) -> list[torch.Tensor]:
    """W [out, in], bias [out], x [B, in], dy [B, out], float32."""
    generator = torch.Generator().manual_seed(0)
    sizes = (outputs, inputs), (outputs,), (batch, inputs), (batch, outputs)
    return [torch.randn(size, generator=generator) for size in sizes]


def layer_functions(inputs: int, outputs: int, batch: int, args: Args) -> tuple[dict, list[str], list[str]]:
    """(implementation, pattern, product) -> callable, products that are wrong, and what is not supported."""
    W, bias, x, dy = tensors = layer_tensors(inputs, outputs, batch)
    found, wrong, unsupported = {}, [], []

    def add(implementation: str, pattern: str, products: dict, exact: dict, result=lambda _, y: torch.as_tensor(y)):
        for name in PRODUCTS if batch > 1 else ("forward",):  # acting needs no gradients
            if complaint := check(result(name, products[name]()), exact[name], implementation):
                wrong.append(f"{implementation} {pattern} {name} of {inputs} to {outputs}, batch {batch}: {complaint}")
            else:
                found[implementation, pattern, name] = products[name]

    exact = exact_products(*tensors)
    if "float32" in args.dtypes:
        add("dense torch", "", dense_products(*tensors), exact)
        add("dense numpy", "", numpy_products(*tensors), exact)
        try:
            add("dense oneDNN", "", onednn_products(*tensors), exact)
        except (AttributeError, RuntimeError) as error:
            unsupported.append(f"dense oneDNN: {first_line(error)}")
    if "bfloat16" in args.dtypes and has_bf16():
        rounded = [tensor.bfloat16() for tensor in tensors]
        add("dense bf16", "", dense_products(*rounded), exact_products(*rounded))
    elif "bfloat16" in args.dtypes:
        unsupported.append("dense bf16: this CPU has no instructions for it")
    for pattern in args.patterns:
        n, m = map(int, pattern.split(":"))
        if m > inputs:
            unsupported.append(f"{pattern} of {inputs} inputs: fewer than a group")
            continue
        packed = Packed(W, bias, x, dy, n, m)
        exact = exact_products(*tensors, packed.layer.E)
        add("N:M", pattern, packed.products, exact, lambda name, _, packed=packed: packed.result(name))
        products = csr_products(packed, x, dy)
        add("torch CSR", pattern, products, exact, lambda name, y: y.to_dense() if name == "grad-weight" else y.T)
    if "float32" in args.dtypes:
        add("dense again", "", dense_products(*tensors), exact_products(*tensors))  # the machine's noise, last of all
    return found, wrong, unsupported


def has_bf16() -> bool:
    """Whether the CPU computes in bfloat16; without, torch does so slowly."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() == "arm64"  # Apple's, from M2 on


def time_in_turns(functions: dict, repetitions: int, warm_up: float = 0.003) -> dict[tuple, list[float]]:
    """Seconds per call of each function, one value for each repetition; all are timed in turns."""
    times = {key: [] for key in functions}
    for _ in range(repetitions):
        for key, function in functions.items():
            time.sleep(0.005)  # waiting threads of the one before give up their cores
            set_precision(key[0])
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < warm_up or not calls:  # its own threads wake and find a core each
                function()
                calls += 1
            times[key].append(seconds(function, max(1, round(calls * 0.003 / warm_up))))
    return times


def precision(implementation: str) -> str:
    return next((kind for kind in ("bf16", "TF32") if kind in implementation), "fp32")


def set_precision(implementation: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision(implementation) == "TF32" else "ieee"


# What a time is divided by: the fastest of these, in a CUDA graph if the time is.
BASES = {"x_torch_fp32": ("dense torch", "dense fp32"), "x_best_fp32": ("dense torch", "dense numpy", "dense oneDNN"),
         "x_tf32": ("dense TF32",), "x_bf16": ("dense bf16",)}  # fmt: skip


@torch.no_grad()
def measure_layers(args: Args, content: dict, threads: int, bar: tqdm) -> None:
    """Add rows of results for every layer and batch size to `content`, and what is wrong or not supported."""
    make_functions = layer_functions
    if args.device == "cuda":
        make_functions = gpu_functions
    else:
        torch.set_num_threads(threads)
        load_kernels().nm_threads(threads)
        threadpoolctl.threadpool_limits(threads, user_api="blas")  # numpy's
    layers = [(113, 256), *((width, width) for width in args.widths)]  # the first: a critic's on Ant-v5
    functions, times = {}, {}
    for (inputs, outputs), batch in itertools.product(layers, args.batch_sizes):
        functions[inputs, outputs, batch], wrong, unsupported = make_functions(inputs, outputs, batch, args)
        content["wrong"] += wrong
        content["unsupported"] += unsupported
    try:
        for repetition in range(args.repetitions):  # all layers in each: what drifts in minutes is in the quartiles
            for place, own in functions.items():
                found = time_in_turns(own, 1, 0.003 if threads == 1 else 0.015)
                times[place] = {key: times.get(place, {}).get(key, []) + found[key] for key in found}
                bar.update()
            if bar.disable:
                done = f"repetition {repetition + 1} of {args.repetitions}"
                print(f"{count_threads(threads)}: {done}", file=sys.stderr)
    finally:
        for (inputs, outputs, batch), found in times.items():
            place = {"inputs": inputs, "outputs": outputs, "batch": batch, "threads": threads}
            content["layers"] += layer_rows(found, place, content["conditions"]["peak_gflops"])


def layer_rows(times: dict[tuple, list[float]], place: dict, peaks: dict) -> list[dict]:
    """Medians, quartiles and ratios of what time_in_turns measured for one layer."""
    rows, (inputs, outputs, batch, threads) = [], place.values()
    for implementation, pattern in dict.fromkeys(key[:2] for key in times):
        keys = {name: (implementation, pattern, name) for name in PRODUCTS}
        own = {name: times[key] for name, key in keys.items() if key in times}
        if len(own) == len(PRODUCTS):
            own["all three"] = [sum(values) for values in zip(*own.values(), strict=True)]
        n, m = map(int, pattern.split(":")) if pattern else (1, 1)
        kept = outputs * (n * (inputs // m) + min(n, inputs % m))
        calls = GRAPH_CALLS if implementation.endswith(", graph") else 1
        peak = peaks.get(precision(implementation), {}).get(str(threads), math.nan)
        for product, values in own.items():
            low, middle, high = np.percentile(values, [25, 50, 75]) / calls
            gflops = 2 * batch * kept * (3 if product == "all three" else 1) / middle / 1e9
            row = place | {"product": product, "implementation": implementation, "pattern": pattern}
            numbers = {"us": middle * 1e6, "us_q1": low * 1e6, "us_q3": high * 1e6, "gflops": gflops}
            rows.append(row | shorten(numbers | {"share_of_peak": gflops / peak}))
    dense = {(row["implementation"], row["product"]): row["us"] for row in rows if not row["pattern"]}
    for row in rows:
        mode = "".join(row["implementation"].partition(",")[1:])
        for name, bases in BASES.items():
            found = [dense[base + mode, row["product"]] for base in bases if (base + mode, row["product"]) in dense]
            row |= shorten({name: min(found, default=math.nan) / row["us"]})
    return rows


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def shorten(numbers: dict[str, float]) -> dict[str, float | None]:
    """Four digits each; None for what is not a number."""
    return {key: float(f"{value:.4g}") if math.isfinite(value) else None for key, value in numbers.items()}


def measure_actor(args: Args, content: dict) -> None:
    """A whole policy as a robot would run it, one observation at a time: 105 inputs, two layers of 256, 8 outputs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, x = [(105, 256), (256, 256), (256, 8)], torch.randn(1, 105)
    dense = nn.Sequential(*itertools.chain(*((nn.Linear(a, b), nn.ReLU()) for a, b in sizes)))[:-1]
    calls = {("dense torch", ""): (lambda: dense(x), sum(4 * p.numel() for p in dense.parameters()))}
    linear = [layer for layer in dense if isinstance(layer, nn.Linear)]
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]

    def numpy_actor():
        y = x[0].numpy()
        for i, (W, bias) in enumerate(weights):
            y = W @ (np.maximum(y, 0) if i else y) + bias
        return y

    calls["dense numpy", ""] = (numpy_actor, calls["dense torch", ""][1])
    for pattern in args.patterns:
        n, m = map(int, pattern.split(":"))
        net = nn.Module()
        if m > 105:
            continue
        for i, layer in enumerate(linear, 1):
            copy = nn.Linear(layer.in_features, layer.out_features)
            copy.load_state_dict(layer.state_dict())
            setattr(net, f"fc{i}", NMLinear(copy, *((n, m) if i < 3 else (1, 1))))
        flat, start = nn.Parameter(torch.cat([layer.flat.detach() for layer in net.children()])), 0
        for layer in net.children():  # as sparsify does it
            layer.start, start = start, start + len(layer.flat)
            layer.flat = flat
        net.plans, y = {}, x.double()
        for i, layer in enumerate(net.children()):
            y = F.linear(y.relu() if i else y, layer.weight.double(), layer.bias.double())
        size = 4 * len(flat) + 2 * sum(layer.index.numel() for layer in net.children())  # indices are uint16
        with torch.no_grad():
            complaint = check(nm_mlp([net], x)[0], y, "N:M")
        if complaint:
            content["wrong"].append(f"{pattern} actor: {complaint}")
        else:
            calls["N:M", pattern] = (lambda net=net: nm_mlp([net], x), size)
    times = {key: [] for key in calls}
    with torch.no_grad():
        for _ in range(300 * args.repetitions):
            for key, (call, _) in calls.items():
                call()
                times[key].append(seconds(call, 1) * 1e6)
    for (implementation, pattern), values in times.items():
        p50, p99 = np.percentile(values, [50, 99])
        row = {"implementation": implementation, "pattern": pattern} | shorten({"p50_us": p50, "p99_us": p99})
        content["actor"].append(row | {"bytes": calls[implementation, pattern][1]})


def measure_masks(args: Args, content: dict) -> None:
    """Cost of a new mask of a square layer, and its share of training that layer at several K."""
    torch.set_num_threads(1)
    wanted = {"implementation": "N:M", "product": "all three", "threads": args.threads[0]}
    wanted["batch"] = args.batch_sizes[-1]
    found = [row for row in content["layers"] if wanted.items() <= row.items() and row["inputs"] == row["outputs"]]
    for trained in found:
        width, pattern, batch = (trained[key] for key in ("inputs", "pattern", "batch"))
        net = nn.Module()
        net.fc1, net.plans = NMLinear(nn.Linear(width, width), *map(int, pattern.split(":"))), {}

        def rebuild(net=net, layer=net.fc1):  # the index, also by columns
            layer.index.copy_(layer.E.nonzero()[:, 1].view_as(layer.index))
            Plan([net])

        calls = {"project_us": lambda layer=net.fc1: project(layer.W, layer.n, layer.m), "index_us": rebuild}
        times = {key: statistics.median(values) * 1e6 for key, values in time_in_turns(calls, args.repetitions).items()}
        shares = {f"share_at_K_{k}": sum(times.values()) / (k * trained["us"]) for k in INTERVALS}
        content["masks"].append({"width": width, "pattern": pattern, "batch": batch} | shorten(times | shares))


# --- Products of one layer on a GPU -------------------------------------------------------------------------------

GRAPH_CALLS = 20  # in one CUDA graph


def gpu_limits() -> dict:
    """GFLOP/s of dense products of 8192-wide matrices in each precision; GB/s of a copy, read and written."""
    peaks, memory = {}, torch.ones(2**28, device="cuda")
    for name, kind in (("fp32", torch.float32), ("TF32", torch.float32), ("bf16", torch.bfloat16)):
        W = torch.randn(8192, 8192, device="cuda").to(kind)
        set_precision(name)
        W @ W
        peaks[name] = {"1": 2 * 8192**3 / min(seconds(lambda W=W: W @ W, 3) for _ in range(3)) / 1e9}
    copy = min(seconds(lambda: memory.clone(), 3) for _ in range(3))
    return {"peak_gflops": peaks, "read_gbs": 2 * 4 * memory.numel() / copy / 1e9}


def graphed(implementation: str, function: Callable[[], object]) -> Callable[[], None]:
    """GRAPH_CALLS calls in one CUDA graph: what the GPU does, without Python and launches."""
    set_precision(implementation)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # what is done once only, such as choosing a kernel, may not be captured
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            function()
    return graph.replay


def sparse_products(W, bias, x, dy) -> dict[str, Callable]:
    """Products with W on sparse tensor cores through cuSPARSELt, default algorithm; CUTLASS's refuse Hopper."""
    sparse = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(W)
    return {"forward": lambda: F.linear(x, sparse, bias), "grad-input": lambda: torch.mm(dy, sparse)}


def gpu_functions(inputs: int, outputs: int, batch: int, args: Args, device: str = "cuda"):
    """layer_functions for a GPU, each callable also in a CUDA graph. A 1:4 or 1:8 mask is a legal 2:4 mask."""
    tensors = [tensor.to(device) for tensor in layer_tensors(inputs, outputs, batch)]
    found, wrong, unsupported = {}, [], []

    def add(implementation: str, pattern: str, products: dict[str, Callable], exact: dict) -> None:
        for product in PRODUCTS if batch > 1 else ("forward",):
            name = f"{implementation} {pattern} {product}"
            if product not in products:
                unsupported.append(f"{name}: no such product in the library")
                continue
            set_precision(implementation)
            try:
                complaint = check(products[product](), exact[product], implementation)
                if complaint:
                    wrong.append(f"{name} of {inputs} to {outputs}, batch {batch}: {complaint}")
                    continue
                found[implementation, pattern, product] = products[product]
                found[f"{implementation}, graph", pattern, product] = graphed(implementation, products[product])
            except (RuntimeError, ValueError) as error:
                unsupported.append(f"{name}: {first_line(error.__context__ or error)}")

    if "float32" in args.dtypes:
        for name in ("dense fp32", "dense TF32", "dense again"):
            add(name, "", dense_products(*tensors), exact_products(*tensors))
    if "bfloat16" not in args.dtypes:
        return found, wrong, unsupported
    W, bias, x, dy = rounded = [tensor.bfloat16() for tensor in tensors]
    add("dense bf16", "", dense_products(*rounded), exact_products(*rounded))
    for pattern in args.patterns:
        n, m = map(int, pattern.split(":"))
        E = project(W, n, m)
        if (E & ~project(W * E, 2, 4)).any():
            unsupported.append(f"sparse bf16 {pattern}: not 2:4, which keeps at most two of four weights")
            continue
        try:
            products = sparse_products(W * E, bias, x, dy)
        except (RuntimeError, ValueError) as error:
            unsupported.append(f"sparse bf16 {pattern}: {first_line(error)}")
            continue
        add("sparse bf16", pattern, products, exact_products(*rounded, E))
    return found, wrong, unsupported


# --- Report -------------------------------------------------------------------------------------------------------


def print_layers(rows: list[dict], device: str) -> None:
    """A table for each layer, 100 columns wide."""
    best = "best: as the best fp32" if device == "cpu" else "TF32: as torch in TF32"
    print(f"x: times as fast as torch's dense fp32; {best}; bf16: as torch in bf16.")
    print("GFLOP/s: of the weights kept. peak: share of the limit above in the same precision.")
    print("Batch 1 is acting, forward as called from Python. Other batches: bare products, memory at hand.")
    others = ("x_best_fp32", "x_bf16") if device == "cpu" else ("x_tf32", "x_bf16")
    places = itertools.groupby(rows, key=lambda row: (row["inputs"], row["outputs"], row["batch"], row["threads"]))
    for (inputs, outputs, batch, threads), group in places:
        group = list(group)
        products = list(dict.fromkeys(row["product"] for row in group))
        cores = f", {count_threads(threads)}" if device == "cpu" else ""
        print(f"\n{inputs} inputs, {outputs} outputs, batch {batch}{cores}: microseconds")
        last = "  best  bf16" if device == "cpu" else "  TF32  bf16"
        print(f"{'':22}" + "".join(f"{product:>13}" for product in products) + f"{last} GFLOP/s  peak")
        lines = itertools.groupby(group, key=lambda row: (row["implementation"], row["pattern"]))
        for (implementation, pattern), cells in lines:
            cells = {row["product"]: row for row in cells}
            name, _, mode = implementation.partition(",")
            line = f"{' '.join(f'{name} {pattern}{mode}'.split()):22}"
            for row in map(cells.get, products):
                line += f"{row['us']:>7,.{int(row['us'] < 100)}f}{factor(row['x_torch_fp32'])}" if row else " " * 13
            if row := cells.get(products[-1]):
                share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
                line += f"{factor(row[others[0]])}{factor(row[others[1]])}{row['gflops']:8,.0f}{share:>6}"
            print(line.rstrip())


def factor(ratio: float | None) -> str:
    return " " * 6 if ratio is None else f"{ratio:5.1f}x" if ratio >= 0.1 else f"{ratio:5.2f}x"


def where_faster(rows: list[dict], base: str) -> dict[tuple[int, int], dict[str, str]]:
    """(batch, threads) -> pattern -> widths of square layers at which N:M is faster than `base`, in words."""
    won = {}
    for row in sorted(rows, key=lambda row: row["inputs"]):
        square = row["inputs"] == row["outputs"] and row["product"] == main_product(row)
        if square and row["implementation"] in ("N:M", "sparse bf16, graph") and row[base]:
            key = (row["batch"], row["threads"])
            won.setdefault(key, {}).setdefault(row["pattern"], []).append((row["inputs"], row[base] > 1))
    return {key: {pattern: describe_widths(found) for pattern, found in kinds.items()} for key, kinds in won.items()}


def describe_widths(found: list[tuple[int, bool]]) -> str:
    """[(width, faster)], narrowest first -> nowhere; from W on, if at all wider ones too; or the widths."""
    faster = [width for width, won in found if won]
    if not faster:
        return "nowhere"
    last = [width for width, _ in found[-len(faster) :]]
    return f"from {faster[0]}" if faster == last else "at " + " ".join(map(str, faster))


def main_product(row: dict) -> str:
    """Acting needs the forward product alone; the sparse tensor cores have no other for a row-wise mask."""
    return "forward" if row["batch"] == 1 or row["implementation"].startswith("sparse") else "all three"


def draw_speedup(rows: list[dict], args: Args, threads: int) -> Figure | None:
    """Speed-up over dense against width at the largest batch, a line for each pattern with its ideal M/N.

    On a CPU over the best fp32; on a GPU in CUDA graphs over torch's bf16, where 2:4's is the ideal of all.
    """
    batch, gpu = max(args.batch_sizes), args.device == "cuda"
    implementation, base = ("sparse bf16, graph", "x_bf16") if gpu else ("N:M", "x_best_fp32")
    wanted = [row for row in rows if row["implementation"] == implementation and row["inputs"] == row["outputs"]
              and row["batch"] == batch and row["threads"] == threads]  # fmt: skip
    products = [product for product in (*PRODUCTS, "all three") if any(row["product"] == product for row in wanted)]
    if not wanted:
        return None
    figure = Figure(figsize=(7, 2.9 * -(-len(products) // 2) + 0.6), layout="constrained")
    axes = figure.subplots(-(-len(products) // 2), min(2, len(products)), squeeze=False, sharex=True, sharey=True).flat
    for ax, product in zip(axes, products, strict=False):
        for pattern in args.patterns:
            line = [row for row in wanted if row["product"] == product and row["pattern"] == pattern]
            points = [(row["inputs"], row[base]) for row in line if row[base]]
            if points:
                color = pattern_color(pattern)
                n, m = map(int, pattern.split(":"))
                ax.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1.2, label=pattern)
                ax.axhline(min(m / n, 2) if gpu else m / n, color=color, linestyle=":", linewidth=0.8)
        ax.axhline(1, color="black", linewidth=0.8, label=f"break-even (dense {NAMES[base]})")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(args.widths, [str(width) for width in args.widths])
        ax.set_yticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
        ax.set_title(product, fontsize=9)
        ax.set_xlabel("width of a square layer", fontsize=8)
        ax.set_ylabel("times as fast as dense", fontsize=8)
        ax.label_outer()
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3, linewidth=0.5)
    where = "on the GPU, in CUDA graphs" if gpu else count_threads(threads)
    ideal = "M/N, at most 2" if gpu else "M/N"
    figure.suptitle(f"N:M against dense, batch {batch}, {where}; dotted: ideal {ideal}", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def benchmark_kernels(args: Args) -> int:
    """Measure, print and write everything but whole training runs. Ctrl-C keeps what is measured."""
    out, gpu = make_folder(args.out), args.device == "cuda"
    threads, code = (1,) if gpu else args.threads, 0
    try:
        _ = gpu or load_kernels()
    except OSError as error:
        raise UserError(f"the N:M kernels need a C compiler: {first_line(error)}") from None
    content = {"conditions": conditions(args), "layers": [], "actor": [], "masks": [], "wrong": [], "unsupported": []}
    try:
        content["conditions"] |= gpu_limits() if gpu else measure_limits(threads)
        print("\n".join(textwrap.wrap(describe(content["conditions"]), 100)))
        count = len(threads) * (1 + len(args.widths)) * len(args.batch_sizes) * args.repetitions
        with tqdm(total=count, unit="layer", disable=not sys.stderr.isatty()) as bar:
            for number in threads:
                measure_layers(args, content, number, bar)
            if not gpu:
                bar.set_description("actor and masks")
                measure_actor(args, content)
                measure_masks(args, content)
    except KeyboardInterrupt:
        code = 130
        if not content["layers"]:
            return code
    content["noise"] = measure_noise(content["layers"])
    report_kernels(args, content, out)
    return 1 if content["wrong"] else code


def describe(conditions: dict) -> str:
    """Machine, limits, versions and date in one sentence."""
    peaks = [f"{peak:,.0f} GFLOP/s {kind}{f' on {count} cores' * (count != '1')}"
             for kind, found in conditions["peak_gflops"].items() for count, peak in found.items()]  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items() if number)
    cpu = f"one of {conditions['cores']} cores of {conditions['cpu']} ({conditions['capability']})"
    machine = f"{conditions['gpu'] or cpu}: {', '.join(peaks)}, {conditions['read_gbs']:.0f} GB/s"
    machine += "" if conditions["gpu"] else " read by one core"
    return f"{machine}; {versions}; {conditions['date']}, commit {conditions['commit']}"


def report_kernels(args: Args, content: dict, out: Path) -> None:
    """Print everything; write results.json, results.csv, summary.md, figures and a W&B run."""
    rows = content["layers"]
    print_layers(rows, args.device)
    if content["actor"]:
        print("\nThe actor of Ant-v5 at batch 1 (105-256-256-8, head dense), one thread, from Python: microseconds")
        for row in content["actor"]:
            name = f"{row['implementation']} {row['pattern']}"
            print(f"{name:16} p50 {row['p50_us']:6.1f}  p99 {row['p99_us']:6.1f}  {row['bytes'] / 1024:6.0f} KiB")
    if content["masks"]:
        batch = content["masks"][0]["batch"]
        print(f"\nA new mask of a square layer, and its share of that layer's three products at batch {batch} at K")
        for row in content["masks"]:
            shares = "  ".join(f"K {k:,}: {row[f'share_at_K_{k}']:6.2%}" for k in INTERVALS)
            costs = f"project {row['project_us']:8,.0f} us  index {row['index_us']:7,.0f} us"
            print(f"{row['width']:5} {row['pattern']:5} {costs}  {shares}")
    print("\nWidths at which N:M is faster (batch 1: forward; from: there and at all wider ones)")
    for base in BASES:
        for (batch, threads), widths in where_faster(rows, base).items():
            found = "; ".join(f"{pattern} {width}" for pattern, width in widths.items())
            text = f"than dense {NAMES[base]}, batch {batch}, {count_threads(threads)}: {found}"
            print("\n".join(textwrap.wrap(text, 100, subsequent_indent="  ")))
    if content["noise"]:
        noise = f"noise: {describe_noise(content['noise'])}"
        print("\n" + "\n".join(textwrap.wrap(noise, 100)))
        if (median := max(noise["median"] for noise in content["noise"].values())) > 0.1:
            print(f"warning: too noisy to conclude from less than {2 * median:.0%}; run on an idle machine")
    for title, complaints in (("WRONG, not timed", content["wrong"]), ("not supported", content["unsupported"])):
        for complaint in dict.fromkeys(complaints):
            print(f"{title}: {complaint}")
    figures = {}
    for threads in dict.fromkeys(row["threads"] for row in rows):
        if figure := draw_speedup(rows, args, threads):
            figures[f"speedup_{threads}_threads" if args.device == "cpu" else "speedup"] = figure
    tables = {name: content[name] for name in ("layers", "actor", "masks")}
    write_report(args, content, out, summarize_kernels(content), figures, tables)


NAMES = {"x_torch_fp32": "torch fp32", "x_best_fp32": "best fp32", "x_tf32": "TF32", "x_bf16": "bf16"}


def summarize_kernels(content: dict) -> str:
    """The hardware section of the README, from results.json alone."""
    rows, conditions = content["layers"], content["conditions"]
    cpu = conditions["gpu"] is None
    bases = ("x_best_fp32", "x_bf16") if cpu else ("x_torch_fp32", "x_tf32", "x_bf16")
    bases = [base for base in bases if any(row[base] for row in rows)]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"]))
    lines = [f"{describe(conditions)}.", ""]
    if content["noise"]:
        lines += [f"Noise: {describe_noise(content['noise'])}.", ""]
    if bases:
        versus = " / ".join(f"dense {NAMES[base]}" for base in bases)
        lines += [f"Times as fast as {versus}: all three products of a layer (batch 1: forward).", ""]
    lines.append(f"| layer | batch | {'threads | ' * cpu}{' | '.join(patterns)} |")
    lines.append("| --- " * (2 + cpu + len(patterns)) + "|")
    wanted = [row for row in rows if row["implementation"] in ("N:M", "sparse bf16, graph")]
    cells = {(row["inputs"], row["outputs"], row["batch"], row["threads"], row["pattern"]): row
             for row in wanted if row["product"] == main_product(row)}  # fmt: skip
    for threads, batch, (inputs, outputs) in sorted(dict.fromkeys((c[3], -c[2], c[:2]) for c in cells)):
        found = [cells.get((inputs, outputs, -batch, threads, pattern)) for pattern in patterns]
        text = [" / ".join(factor(row[base]).strip(" x") for base in bases) if row else "" for row in found]
        number = f"{threads} | " if cpu else ""
        lines.append(f"| {inputs} to {outputs} | {-batch} | {number}{' | '.join(text)} |")
    lines += ["", "Widths at which N:M is faster (from: there and at all wider ones):", ""]
    for base in bases:
        for (batch, threads), widths in where_faster(rows, base).items():
            found = ", ".join(f"{pattern} {width}" for pattern, width in widths.items())
            number = f", {count_threads(threads)}" if cpu else ""
            lines.append(f"- than dense {NAMES[base]}, batch {batch}{number}: {found}")
    if content["actor"]:
        lines += ["", "The actor of Ant-v5 (105-256-256-8) at batch 1, one thread, called from Python:", ""]
        lines += ["| | p50 | p99 | size |", "| --- | --- | --- | --- |"]
        for row in content["actor"]:
            name, size = f"{row['implementation']} {row['pattern']}".strip(), f"{row['bytes'] / 1024:.0f} KiB"
            lines.append(f"| {name} | {row['p50_us']:.1f} us | {row['p99_us']:.1f} us | {size} |")
    if masks := [row for row in content["masks"] if row["width"] == 256]:
        lines += ["", "A new mask of a 256 to 256 layer, and its share of that layer's training at K:", ""]
        lines += [f"| | project | index | {' | '.join(f'K = {k:,}' for k in INTERVALS)} |", "| --- " * 6 + "|"]
        for row in masks:
            shares = " | ".join(f"{row[f'share_at_K_{k}']:.2%}" for k in INTERVALS)
            lines.append(f"| {row['pattern']} | {row['project_us']:,.0f} us | {row['index_us']:,.0f} us | {shares} |")
    return "\n".join(lines) + "\n"


def measure_noise(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Median and worst of how much dense differs from itself, and of the middle half of N:M's timings."""
    noise = {}
    for row in rows:
        if row["implementation"] == "dense again" and row["x_torch_fp32"]:
            key = f"dense against itself, batch {row['batch']}, {count_threads(row['threads'])}"
            noise.setdefault(key, []).append(math.expm1(abs(math.log(row["x_torch_fp32"]))))
        elif row["implementation"] in ("N:M", "sparse bf16, graph"):
            key = f"middle half of N:M, batch {row['batch']}, {count_threads(row['threads'])}"
            noise.setdefault(key, []).append((row["us_q3"] - row["us_q1"]) / row["us"])
    return {key: shorten({"median": statistics.median(found), "worst": max(found)}) for key, found in noise.items()}


def describe_noise(noise: dict[str, dict[str, float]]) -> str:
    return "; ".join(f"{key} {found['median']:.1%} (at most {found['worst']:.1%})" for key, found in noise.items())


def write_report(args: Args, content: dict, out: Path, summary: str, figures: dict, tables: dict) -> None:
    """results.json, results.csv (the first table), summary.md, figures; a full disk leaves what was printed."""
    facts = {key: content["conditions"][key] for key in ("cpu", "gpu", "date", "commit")}
    rows = [row | facts | {"torch": content["conditions"]["versions"]["torch"]} for row in next(iter(tables.values()))]
    try:
        (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        with open(out / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ())
            writer.writeheader()
            writer.writerows(rows)
        (out / "summary.md").write_text(summary)
        for name, figure in figures.items():
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=200)
    except OSError as error:
        raise Fault(f"{out} can't be written: {error}") from None
    if args.track:
        log_wandb(args, "benchmark", out, tables, [out / f"{name}.png" for name in figures])
    print(f"written: results.json, results.csv, summary.md and figures in {out}")


# --- Whole training runs ------------------------------------------------------------------------------------------

# Trains a peer and prints [environment step, seconds] every 1000 steps as json.
PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
name, env_id, hidden, steps, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
import gymnasium as gym, torch
torch.set_num_threads(threads)
from stable_baselines3.common.callbacks import BaseCallback
if name == "sb3":
    from stable_baselines3 import TD3
else:
    from sbx import TD3
marks = []
class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps % 1000 == 0:
            marks.append([self.num_timesteps, time.perf_counter()])
        return True
TD3("MlpPolicy", gym.make(env_id, disable_env_checker=True), learning_rate=3e-4, batch_size=256, learning_starts=1000,
    train_freq=1, gradient_steps=1, policy_delay=2, buffer_size=100_000, policy_kwargs={"net_arch": [hidden, hidden]},
    ).learn(1000 + steps, callback=Clock())
print(json.dumps(marks))
"""


BF16 = """
import runpy, sys, torch
torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()  # a cache would keep the first weights for ever
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


ONEDNN = """
import runpy, sys, torch
linear = torch.ops.mkldnn._linear_pointwise
class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(x, W)
        return linear(x, W, bias, "none", [], "")
    @staticmethod
    def backward(ctx, dy):
        (x, W), (dx, dW, dbias) = ctx.saved_tensors, ctx.needs_input_grad
        return (linear(dy, W.T, None, "none", [], "") if dx else None,
                linear(dy.T, x.T, None, "none", [], "") if dW else None, dy.sum(0) if dbias else None)
torch.nn.functional.linear = lambda x, W, bias: Linear.apply(x, W, bias)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def configurations(args: Args) -> dict[str, tuple[list[str], int, int]]:
    """Label -> (command, threads of a run, runs at once). 86 units have as many weights as 1:8 keeps of 256."""
    common = [
        f"--env-id={args.env_id}", f"--total-timesteps={1000 + args.steps}", "--learning-starts=1000", "--no-track",
        "--eval-interval=1000000000", "--eval-episodes=1", "--buffer-size=100000",
    ]  # fmt: skip
    few, most, hidden = min(args.threads), max(args.threads), args.hidden_dims[0]
    scripts = {name: [str(HERE / f"{name}_td3_continuous.py"), *common] for name in ("rnm", "dense")}

    def train(pattern: str, hidden: int = hidden, *extra: str) -> list[str]:
        n, _, m = pattern.partition(":")
        script = [*scripts["rnm"], f"--n={n}", f"--m={m}"] if n else scripts["dense"]
        return [*script, f"--hidden-dim={hidden}", *extra]

    patterns = {"dense": ""} | {pattern: pattern for pattern in args.patterns}
    last = args.patterns[-1]
    found = {label: (train(pattern), few, 1) for label, pattern in patterns.items()}
    found[f"{last}, --kernel torch"] = (train(last, hidden, "--kernel=torch"), few, 1)
    if platform.machine() == "x86_64":
        found["dense, oneDNN"] = (["-c", ONEDNN, *train("")], few, 1)
    if has_bf16():
        found["dense, bf16 autocast"] = (["-c", BF16, *train("")], few, 1)
    if (hidden, last) == (256, "1:8"):
        found["dense, width 86"] = (train("", 86), few, 1)
    peers = {"SB3": ("sb3", "stable_baselines3"), "SBX (JAX)": ("sbx", "sbx")}
    peers = {label: name for label, (name, module) in peers.items() if importlib.util.find_spec(module)}
    for label, name in peers.items():
        found[label] = (["-c", PEER, name, args.env_id, str(hidden), str(args.steps), str(few)], few, 1)
    if most > few:
        for label, name in peers.items():
            peer = ["-c", PEER, name, args.env_id, str(hidden), str(args.steps), str(most)]
            found[f"{label}, {most} threads"] = (peer, most, 1)
        for label in ("dense", last):
            found[f"{label}, {most} threads"] = (train(patterns[label]), most, 1)
    if CORES >= 2 * few:
        for label in ("dense", last):
            found[f"{label}, two runs at once"] = (train(patterns[label]), few, 2)
    for wide in args.hidden_dims[1:]:
        for label, pattern in patterns.items():
            found[f"{label}, hidden {wide}"] = (train(pattern, wide), few, 1)
    if args.device == "cuda":
        for label, pattern in patterns.items():
            found[f"{label}, GPU"] = (train(pattern, hidden, "--device=cuda"), few, 1)
    return found


def run_once(command: list[str], threads: int, copies: int) -> tuple[float, float | None, float]:
    """Environment steps per second of all copies together, milliseconds per update or None, peak memory in MiB of one.

    Each copy has cores of its own. Raises RuntimeError if one fails.
    """
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "XLA_FLAGS": flags}
    cores = sorted(os.sched_getaffinity(0), reverse=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs = []
        for copy in range(copies):
            folder, own = Path(scratch, str(copy)), cores[copy * threads :][:threads]
            folder.mkdir()
            output, errors = (stack.enter_context(open(folder / name, "w+")) for name in ("stdout", "stderr"))
            extra = [] if PEER in command else [f"--runs-dir={folder}", f"--threads={threads}"]
            process = subprocess.Popen(
                [sys.executable, *command, *extra], env=environment, stdout=output, stderr=errors,
                preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
            )  # fmt: skip
            stack.callback(process.kill)
            runs.append((process, folder, output, errors))
        rates, update_ms, memory = [], None, 0
        for process, folder, output, errors in runs:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)[-300:]} failed:\n{errors.read()[-2000:]}")
            memory = max(memory, usage.ru_maxrss / 1024)
            if PEER in command:
                output.seek(0)
                marks = json.loads(output.read().splitlines()[-1])
                found = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(marks) if b[0] > 2000]
            else:
                with open(next(folder.glob("*/metrics.csv"))) as file:
                    rows = [r for r in csv.DictReader(file) if r["charts/SPS"] and int(r["global_step"]) > 2000]
                found = [float(row["charts/SPS"]) for row in rows]
                update_ms = statistics.median(float(row["charts/update_ms"]) for row in rows)
            rates.append(statistics.median(found))
    return sum(rates), update_ms, memory


def benchmark_training(args: Args) -> int:
    """Time the training scripts and their peers, in turns. A failure or Ctrl-C keeps what is measured."""
    out, commands = make_folder(args.out), configurations(args)
    results = {label: [] for label in commands}
    bar, code = tqdm(total=args.repetitions * len(commands), unit="run", disable=not sys.stderr.isatty()), 0
    try:
        for _ in range(args.repetitions):
            for label, command in commands.items():
                bar.set_postfix_str(label)
                results[label].append(run_once(*command))
                bar.update()
                if bar.disable:
                    print(f"{label}: {results[label][-1][0]:.0f} steps/s", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except RuntimeError as error:
        code = 1
        print(f"error: {error}", file=sys.stderr)
    bar.close()
    results = {label: runs for label, runs in results.items() if runs}
    if results:
        report_training(args, results, out)
    return code


def report_training(args: Args, results: dict[str, list[tuple]], out: Path) -> None:
    """Print medians, ranges and ratios; write results.json, summary.md, a figure and a W&B run."""
    content = {"conditions": conditions(args), "rate_update_ms_peak_mib": results}
    table = tabulate_training(content)
    width, threads = args.hidden_dims[0], count_threads(min(args.threads))
    print(f"{args.env_id}, batch 256, hidden {width} and {threads} unless named, {cpu_name()}")
    print(f"medians and ranges of {min(map(len, results.values()))} runs each, in turns")
    for row in table:
        print(f"{row[0]:26}" + "".join(f"{cell:>10}" for cell in row[1:]))
    figures = {"end_to_end": draw_training(args, {label: [run[0] for run in runs] for label, runs in results.items()})}
    names = ("steps_per_second", "ms_per_update", "peak_mib")
    tables = {"runs": [{"configuration": label, "repetition": i} | dict(zip(names, run, strict=True))
                       for label, runs in results.items() for i, run in enumerate(runs)]}  # fmt: skip
    write_report(args, content, out, summarize_training(content), figures, tables)


def tabulate_training(content: dict) -> list[list[str]]:
    """Header and rows of text, one for each configuration; ratios of medians, to twins of its width and device."""
    results = content["rate_update_ms_peak_mib"]
    median = {label: statistics.median(rate for rate, *_ in runs) for label, runs in results.items()}
    others = [label for label in ("dense", "SB3", "SBX (JAX)") if label in median]
    table = [["", "steps/s", "range", "us/update", "MiB", *(f"x {label}" for label in others)]]
    for label, runs in results.items():
        rates, update = [rate for rate, *_ in runs], [ms for _, ms, _ in runs if ms is not None]
        memory = statistics.median(mib for *_, mib in runs)
        kind = label.partition(", ")[2]  # against what has the same width, as many cores, or is on the GPU too
        alike = kind.startswith("hidden") or kind.endswith("threads") or kind in ("GPU", "two runs at once")
        twins = [f"{other}, {kind}" if alike else other for other in others]
        ratios = [f"{median[label] / median[twin]:.2f}" if twin in median else "" for twin in twins]
        us = f"{1000 * statistics.median(update):,.0f}" if update else ""
        table.append(
            [label, f"{median[label]:.0f}", f"{min(rates):.0f}-{max(rates):.0f}", us, f"{memory:.0f}", *ratios]
        )
    return table


def summarize_training(content: dict) -> str:
    """The table of the README, from results.json alone."""
    found, args = content["conditions"], content["conditions"]["args"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    runs = min(map(len, content["rate_update_ms_peak_mib"].values()))
    table = tabulate_training(content)
    lines = [f"| {' | '.join(row)} |" for row in table]
    lines.insert(1, "| --- " * len(table[0]) + "|")
    task = f"{args['env_id']}, hidden {args['hidden_dims'][0]} unless named, batch 256, {args['steps']} steps"
    where = f"{min(args['threads'])} of {found['cores']} cores of {found['cpu']} ({found['capability']})"
    where += f"; {found['gpu']}" if found["gpu"] else ""
    where += f"; {versions}; {found['date']}, commit {found['commit']}"
    lines += ["", f"{task}, medians of {runs} runs in turns; {where}."]
    return "\n".join(lines) + "\n"


def draw_training(args: Args, rates: dict[str, list[float]]) -> Figure:
    """A bar for each configuration: median steps per second, a line from the slowest to the fastest run."""
    figure = Figure(figsize=(7, 1.3 + 0.3 * len(rates)), layout="constrained")
    ax = figure.subplots()
    for place, (label, values) in enumerate(rates.items()):
        color = "#7f7f7f" if label.startswith("S") else pattern_color(label.partition(",")[0])
        ax.barh(place, statistics.median(values), color=color, height=0.7)
        for line, width in (("white", 3), ("black", 1)):  # seen on every colour
            ax.plot([min(values), max(values)], [place, place], color=line, linewidth=width)
        ax.annotate(f"{statistics.median(values):,.0f}", (max(values), place), (4, 0), textcoords="offset points",
                    va="center", fontsize=8)  # fmt: skip
    ax.set_yticks(range(len(rates)), list(rates), fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set_xlabel("environment steps per second (median; line: slowest to fastest run)", fontsize=8)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.suptitle(f"Training TD3 on {args.env_id}: hidden {args.hidden_dims[0]} unless named, batch 256", fontsize=10)
    return figure


# --- Common -------------------------------------------------------------------------------------------------------


def make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UserError(f"--out {path} can't be written: {error}") from None
    return Path(path)


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        return next(line for line in open("/proc/cpuinfo") if line.startswith("model name")).split(": ")[1].strip()
    return platform.machine()


def conditions(args: Args) -> dict:
    versions = {"python": platform.python_version(), "cuda": None, "cusparselt": None}
    if args.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()}
    for name in ("torch", "gymnasium", "mujoco", "numpy", "stable_baselines3", "sbx-rl", "jax"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    for pool in threadpoolctl.threadpool_info():
        if pool["user_api"] == "blas":
            versions["numpy's BLAS"] = f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}"
    git = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return {
        "args": {name: value for name, value in asdict(args).items() if name != "out"},
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "cores": CORES,
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


# --- shared: wandb ---
def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_wandb(args: Args, job: str, out: Path, tables: dict[str, list[dict]], figures: list[Path]) -> None:
    """A W&B run with the same figures and tables; offline without a login."""
    import wandb

    try:
        online = os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=args.wandb_project_name or "nm-sparse-rl",
            entity=args.wandb_entity,
            job_type=job,
            name=f"{job}_{out.resolve().name}",
            config=vars(args),
            mode=None if online else "offline",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        for name, rows in tables.items():
            if rows:
                run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})
        run.log({path.stem: wandb.Image(str(path)) for path in figures})
        summary = wandb.Artifact(f"{job}_summary", type=job)
        for path in sorted(out.glob("summary.*")):
            summary.add_file(str(path))
        run.log_artifact(summary)
        run.finish()
    except Exception as error:
        print(f"warning: not in W&B: {first_line(error)}", file=sys.stderr)


# --- end shared ---


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


def main() -> int:
    try:
        args = tyro.cli(Args, description=__doc__)
        check_args(args)
        return benchmark_training(args) if args.end_to_end else benchmark_kernels(args)
    except (UserError, Fault) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
