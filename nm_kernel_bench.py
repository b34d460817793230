"""How fast row-wise N:M layers are on this machine, and how fast the scripts train with them, beside dense peers.

  python nm_kernel_bench.py                  one layer, a whole actor, new masks        -> benchmark/kernels/
  python nm_kernel_bench.py --device cuda    one layer on an NVIDIA GPU                 -> benchmark/kernels_cuda/
  python nm_kernel_bench.py --end-to-end     steps per second of whole training runs    -> benchmark/end_to_end/

Results: results.json (all numbers, written as they come), results.csv (the layers or the runs), summary.md (also
printed), a figure, and a Weights & Biases run. Exit codes: 0 done, 1 something was wrong or failed, 2 bad input, 130
Ctrl-C or SIGTERM. What was measured until then is kept.

Each product is compared with float64 before it is timed; a wrong one is reported instead. What is compared runs in
turns, repeated, so that slow changes of the machine meet all alike. The N:M kernels have one thread, so layers are
timed on one core, dense ones too. End to end, each configuration is a process pinned to cores of its own. Linux only.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's BLAS reads both when it is imported
if "avx512f" in open("/proc/cpuinfo").read():
    os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"  # the fastest dense product there is, whatever the environment says

import contextlib
import copy
import csv
import ctypes
import importlib.util
import itertools
import json
import math
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
GPU = "cuda"
CPUINFO = Path("/proc/cpuinfo").read_text()
HAS_BF16 = "bf16" in CPUINFO  # without, torch computes in bfloat16 slowly
CORES = len(os.sched_getaffinity(0))
PRODUCTS = ("forward", "grad-input", "grad-weight")
GRAPH_CALLS = 20  # of a function in one CUDA graph
INTERVALS = (100, 1000, 10_000)  # K, updates between two masks

# --- shared: colors ---
# Okabe and Ito's colours first, one for each pattern everywhere.
PATTERNS = "dense 2:4 1:4 1:8 1:16 4:8 2:8 1:2 3:4 1:32 2:16 4:16".split()
PATTERNS += "RLx2 RigL SET static MST".split()  # methods without structure, whatever their sparsity
CODES = "000000 0072B2 E69F00 009E73 CC79A7 56B4E9 D55E00 882255 AA8800 332288 6699CC 44AA99".split()
CODES += "D62728 9467BD 17BECF 8C564B E377C2".split()
COLORS = {pattern: f"#{code}" for pattern, code in zip(PATTERNS, CODES, strict=True)}


def pattern_color(pattern: str) -> str:
    """Of its letters where it is not in COLORS, so that it is the same everywhere."""
    found = COLORS.get(pattern) or COLORS.get(pattern.split()[0])
    return found or to_hex(colormaps["turbo"](sum(37**i * ord(x) for i, x in enumerate(pattern)) % 97 / 97))


# --- end shared ---


@dataclass
class Args:
    end_to_end: bool = False
    """time whole training runs instead of single layers"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where layers are timed; with --end-to-end, cuda adds runs of the scripts on the GPU"""
    patterns: tuple[str, ...] | None = None
    """N:M, 1 <= N < M <= 32768, or for layers on a CPU a sparsity without structure, such as 95%; unless named 2:4 1:4
    1:8, for layers also 4:8 2:8 1:16, on a CPU also 85% 90% 95% 98%"""
    repetitions: int = 5
    """timings of each product, or runs of each configuration, >= 1"""
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """square layers to time: number of inputs and of outputs, each from 1 to 4096"""
    batch_sizes: tuple[int, ...] = (1, 256)
    """observations in a batch, each from 1 to 65536; 1 is acting, others are training"""
    env_id: str = "Ant-v4"
    """with --end-to-end: gymnasium id of the environment"""
    hidden_dims: tuple[int, ...] = (256,)
    """with --end-to-end: units in both hidden layers, 1 to 4096; of further numbers only dense and N:M are timed"""
    labels: tuple[str, ...] | None = None
    """with --end-to-end: time only these of its configurations, as they stand in its table; unless named all"""
    steps: int = 3000
    """with --end-to-end: environment steps with updates in each run, >= 2000; the first 1000 are not counted"""
    out: str | None = None
    """folder without results yet; unless named benchmark/kernels, benchmark/kernels_cuda or benchmark/end_to_end"""
    track: bool = True
    """mirror tables and figures to Weights & Biases (offline when not logged in)"""
    wandb_project_name: str = "nm-sparse-rl"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """user or team in Weights & Biases"""


def fail(message: str, code: int = 2) -> NoReturn:
    """One line and an exit code: 2 for what the user typed, 1 for what is not the user's doing, such as a full disk."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args) -> None:
    """Fill in the defaults that depend on other flags; end the program at a bad value."""
    anywhere = args.device == "cpu" and not args.end_to_end  # what has no structure is timed there
    layers = () if args.end_to_end else ("4:8", "2:8", "1:16", *("85%", "90%", "95%", "98%") * anywhere)
    args.patterns = tuple(dict.fromkeys(("2:4", "1:4", "1:8", *layers) if args.patterns is None else args.patterns))
    args.widths, args.batch_sizes = tuple(sorted({*args.widths})), tuple(sorted({*args.batch_sizes}))
    kernels = "kernels_cuda" if args.device == "cuda" else "kernels"
    args.out = args.out or f"benchmark/{'end_to_end' if args.end_to_end else kernels}"
    for name, high in (("widths", 4096), ("hidden_dims", 4096), ("batch_sizes", 65_536)):
        values = getattr(args, name)
        if not values or not all(1 <= value <= high for value in values):
            fail(f"--{name.replace('_', '-')} takes numbers from 1 to {high}, not {values}")
    for pattern in args.patterns or ("",):
        match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", pattern)
        share = re.fullmatch(r"0*([0-9]{1,2}(\.[0-9]{1,4})?)%", pattern)
        if not (
            share and anywhere and float(share[1])
            if "%" in pattern
            else match and 1 <= int(match[1]) < int(match[2]) <= 32_768
        ):
            fail(
                f"--patterns takes N:M with 1 <= N < M <= 32768, for layers on a CPU also 95%, not {pattern or 'none'}"
            )
    if args.repetitions < 1 or args.steps < 2000:
        fail("--repetitions must be at least 1, --steps at least 2000")
    if args.end_to_end:
        try:
            spaces = (env := gym.make(args.env_id)).observation_space, env.action_space
        except Exception as error:  # gymnasium's own, or whatever it imports
            fail(f"--env-id {args.env_id}: {first_line(error)}")
        if not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
            fail(f"--env-id {args.env_id}: observations and actions must be vectors of real numbers")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no GPU here, use --device cpu")
    try:  # before hours of measuring
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        fail(f"--out {args.out} can't be written: {error}")
    if Path(args.out, "results.json").exists():
        fail(f"--out {args.out} holds results already: move them, or name another folder")


def parse(pattern: str) -> tuple[int, int]:
    """N and M of an N:M pattern; 1 and 1 of "", which is dense."""
    n, m = (pattern or "1:1").split(":")
    return int(n), int(m)


def count_kept(inputs: int, outputs: int, pattern: str) -> int:
    """Active weights of a layer. The last group of a row may be short."""
    if "%" in pattern:
        return inputs * outputs - int(float(pattern[:-1]) / 100 * inputs * outputs)
    n, m = parse(pattern)
    return outputs * (n * (inputs // m) + min(n, inputs % m))


def shorten(numbers: dict[str, float]) -> dict[str, float | None]:
    """Four digits each; None for what is not a number."""
    return {key: float(f"{value:.4g}") if math.isfinite(value) else None for key, value in numbers.items()}


# --- shared: projection ---
def project(W: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """P_{N:M}: the mask E [out, in] (bool) of the n largest magnitudes in each m consecutive weights of a row of W."""
    magnitude = F.pad(W.abs(), (0, -W.shape[1] % m), value=-1.0)  # fill a ragged last group with what never wins
    order = magnitude.view(len(W), -1, m).argsort(dim=2, descending=True, stable=True)  # [out, groups, m]
    E = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :n], True)
    return E.view(len(W), -1)[:, : W.shape[1]].contiguous()


# --- end shared ---


def make_mask(W: torch.Tensor, pattern: str) -> torch.Tensor:
    """E [out, in]: N:M, or of a sparsity such as 95% the largest weights of the layer, wherever they are."""
    if "%" not in pattern:
        return project(W, *parse(pattern))
    largest = W.abs().flatten().argsort(descending=True, stable=True)[: count_kept(*W.T.shape, pattern)]
    return torch.zeros(W.numel(), dtype=torch.bool).index_fill(0, largest, True).view_as(W)


# --- Products of one layer on the CPU -----------------------------------------------------------------------------


def exact_products(W, bias, x, dy, E=None) -> dict[str, torch.Tensor]:
    """The products of a dense layer, or of one with the mask E, in float64: y [B, out], dx [B, in], and dW [out, in].

    Of a mask, grad-weight is [nnz + out]: of the active weights, row after row, and of the biases (not from CSR).
    """
    W, bias, x, dy = (tensor.double() for tensor in (W, bias, x, dy))
    W, grad = (W, dy.T @ x) if E is None else (W * E, torch.cat([(dy.T @ x)[E], dy.sum(0)]))
    return {"forward": x @ W.T + bias, "grad-input": dy @ W, "grad-weight": grad}


def check(y, exact: torch.Tensor, implementation: str) -> str | None:
    """What is wrong with a product, by the largest error over the largest number; bfloat16 and TF32 have few bits."""
    y = torch.cat([part.flatten() for part in y]) if isinstance(y, list) else torch.as_tensor(y)
    error = float((y - exact[: len(y)]).abs().max() / exact.abs().max())
    return None if error <= (1e-5 if precision(implementation) == "fp32" else 1e-2) else f"error {error:.1e}"


def nm_products(E: torch.Tensor, W, bias, x, dy) -> dict[str, Callable]:
    """The kernels as a network of one layer calls them: into new memory, and with both ends' conversion of layout."""
    chain, params = ((Index(E), False),), [W[E], bias]
    _, activations = chain_forward(chain, x, params, keep=True)
    backward = partial(chain_backward, chain, params, activations, dy)
    return {
        "forward": lambda: chain_forward(chain, x, params, keep=False)[0],
        "grad-input": lambda: backward(need_dx=True, need_grads=False)[0],
        "grad-weight": lambda: backward(need_dx=False, need_grads=True)[1],
    }


def csr_products(E: torch.Tensor, W, bias, x, dy) -> dict[str, Callable]:
    """torch's sparse CSR, which anyone could use, with operands laid out as it likes them: [features, B]."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
    rows, columns, bias = (W * E).to_sparse_csr(), (W * E).T.contiguous().to_sparse_csr(), bias[:, None]
    x_columns, dy_columns = x.T.contiguous(), dy.T.contiguous()
    return {
        "forward": lambda: (torch.addmm(bias, rows, x_columns) if len(x) > 1 else rows @ x_columns + bias).T,
        "grad-input": lambda: (columns @ dy_columns).T,
        "grad-weight": lambda: torch.sparse.sampled_addmm(rows, dy_columns, x, beta=0.0).values(),
    }


def dense_products(linear: Callable, mm: Callable, W, bias, x, dy) -> dict[str, Callable]:
    return {"forward": lambda: linear(x, W, bias), "grad-input": lambda: mm(dy, W), "grad-weight": lambda: mm(dy.T, x)}


def onednn(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch calls oneDNN for bfloat16 alone. On AMD it is twice as fast in float32 as the MKL behind torch.mm."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


DENSE = {  # name -> x W^T + bias, a b; as in a network, all of them allocate what they return
    "dense torch": (F.linear, torch.mm),
    "dense numpy": (lambda x, W, bias: np.add(y := x @ W.T, bias, out=y), np.matmul),
    "dense oneDNN": (onednn, lambda a, b: onednn(a, b.T, None)),
}


def cpu_implementations(tensors: Sequence[torch.Tensor], patterns: Sequence[str]) -> Iterator[tuple]:
    """Implementation, pattern, function that makes its products, and what they return in float64."""
    exact = exact_products(*tensors)
    for name, functions in DENSE.items():
        operands = [tensor.numpy() for tensor in tensors] if name == "dense numpy" else tensors
        yield name, "", partial(dense_products, *functions, *operands), exact
    if HAS_BF16:
        rounded = [tensor.bfloat16() for tensor in tensors]
        yield "dense bf16", "", partial(dense_products, *DENSE["dense torch"], *rounded), exact_products(*rounded)
    for pattern in patterns:
        E = make_mask(tensors[0], pattern)
        exact_nm = exact_products(*tensors, E)
        yield "any" if "%" in pattern else "N:M", pattern, partial(nm_products, E, *tensors), exact_nm
        yield "torch CSR", pattern, partial(csr_products, E, *tensors), exact_nm
    yield "dense again", "", partial(dense_products, *DENSE["dense torch"], *tensors), exact  # shows noise


# --- Products of one layer on a GPU -------------------------------------------------------------------------------


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """GRAPH_CALLS calls in one CUDA graph: what the GPU does, without Python and launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # what is done once only, such as choosing a kernel, may not be captured
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            function()
    return graph.replay


def sparse_products(E: torch.Tensor, W, bias, x, dy) -> dict[str, Callable]:
    """W on sparse tensor cores through cuSPARSELt, default algorithm; the CUTLASS ones refuse Hopper."""

    def grad_weight() -> NoReturn:
        raise RuntimeError("the library has no such product")

    if (E & ~project(W * E, 2, 4)).any():
        raise ValueError("not 2:4, which keeps at most two of four weights")
    sparse = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(W * E)
    grad_input = partial(torch.mm, dy, sparse)
    return {"forward": lambda: F.linear(x, sparse, bias), "grad-input": grad_input, "grad-weight": grad_weight}


def gpu_implementations(tensors: Sequence[torch.Tensor], patterns: Sequence[str]) -> Iterator[tuple]:
    """A 1:4 or 1:8 mask is a legal 2:4 mask, the only one that sparse tensor cores know, and in bfloat16 alone."""
    tensors = [tensor.to(GPU) for tensor in tensors]
    rounded = [tensor.bfloat16() for tensor in tensors]
    for name in ("dense torch", "dense TF32", "dense again"):
        yield name, "", partial(dense_products, *DENSE["dense torch"], *tensors), exact_products(*tensors)
    yield "dense bf16", "", partial(dense_products, *DENSE["dense torch"], *rounded), exact_products(*rounded)
    for pattern in patterns:
        E = project(rounded[0], *parse(pattern))
        yield "sparse bf16", pattern, partial(sparse_products, E, *rounded), exact_products(*rounded, E)


# --- Timing layers ------------------------------------------------------------------------------------------------

PEAK = r"""
enum { CHAINS = W == 16 ? 24 : 12 };  // multiply-adds in flight; W floats in a vector
typedef float vec __attribute__((vector_size(4 * W)));
float multiply_add(int rounds) {
    vec a[CHAINS], b = {0.5f}, c = {1.0f};
    for (int i = 0; i < CHAINS; i++) a[i] = b;
    for (int k = 0; k < rounds; k++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * b + c;
    for (int i = 1; i < CHAINS; i++) a[0] += a[i];
    return a[0][0];
}
int operations(void) { return 2 * W * CHAINS; }  // in a round
"""


def cpu_limits() -> dict:
    """What one core reaches: multiply-adds from registers in GFLOP/s, torch's sum of 256 MiB of memory in GB/s."""
    try:
        width = f"enum {{ W = {load_kernels().nm_lanes() // 4} }};"
        library, rounds, memory = load_kernels(width + PEAK), 5_000_000, torch.ones(2**26)
    except OSError as error:
        fail(f"the N:M kernels need a C compiler: {first_line(error)}")
    add = min(seconds(partial(library.multiply_add, rounds), 1) for _ in range(9))
    read = min(seconds(memory.sum, 1) for _ in range(9))
    return {"peak_gflops": {"fp32": library.operations() * rounds / add / 1e9}, "read_gbs": 4 * 2**26 / read / 1e9}


def gpu_limits() -> dict:
    """What the GPU reaches: dense products of 8192-wide matrices in GFLOP/s, a copy (read and written) in GB/s."""
    peaks, memory = {}, torch.ones(2**28, device=GPU)
    for name, kind in (("fp32", torch.float32), ("TF32", torch.float32), ("bf16", torch.bfloat16)):
        W = torch.randn(8192, 8192, device=GPU).to(kind)
        set_precision(name)
        peaks[name] = 2 * 8192**3 / min(seconds(lambda W=W: W @ W, 3) for _ in range(4)) / 1e9
    clone = min(seconds(memory.clone, 3) for _ in range(4))
    return {"peak_gflops": peaks, "read_gbs": 2 * 4 * 2**28 / clone / 1e9}


def precision(implementation: str) -> str:
    return next((kind for kind in ("bf16", "TF32") if kind in implementation), "fp32")


def set_precision(implementation: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision(implementation) == "TF32" else "ieee"


def seconds(function: Callable[[], object], loops: int) -> float:
    """Mean time of a call, until the GPU is done if one is in use."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        function()
    synchronize()
    return (time.perf_counter() - start) / loops


def time_once(functions: dict[tuple, Callable]) -> dict[tuple, float]:
    """Seconds per call of each function, one after the other; 3 ms of warm-up and 3 ms of timing each."""
    times = {}
    for key, function in functions.items():
        set_precision(key[0])
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < 0.003 or not calls:
            seconds(function, 1)  # a GPU is waited for, or it would have to catch up with thousands of calls
            calls += 1
        times[key] = seconds(function, calls)
    return times


def layer_functions(inputs: int, outputs: int, batch: int, args: Args, content: dict) -> dict[tuple, Callable]:
    """(implementation, pattern, product) -> function that computes it; `content` gets what is wrong or not there."""
    generator, found = torch.Generator().manual_seed(0), {}
    sizes = (outputs, inputs), (outputs,), (batch, inputs), (batch, outputs)  # W, bias, x, dy
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    implementations = gpu_implementations if args.device == "cuda" else cpu_implementations
    for implementation, pattern, make, exact in implementations(tensors, args.patterns):
        make_once = cache(make)
        set_precision(implementation)
        for product in PRODUCTS[: 1 if batch == 1 else 3]:  # acting needs no gradients
            name = f"{implementation} {pattern}".strip() + f" {product}"
            try:
                function = make_once()[product]
                if complaint := check(function(), exact[product], implementation):
                    content["wrong"].append(f"{name} of {inputs} to {outputs}, batch {batch}: {complaint}")
                    continue
                found[implementation, pattern, product] = function
                if args.device == "cuda":
                    found[f"{implementation}, graph", pattern, product] = graphed(function)
            except (AttributeError, RuntimeError, ValueError) as error:
                content["unsupported"].append(f"{name}: {first_line(error.__context__ or error)}")
    return found


@torch.no_grad()
def measure_layers(args: Args, content: dict) -> None:
    """Add rows of results for every layer and batch size to `content`, also of an interrupted measurement."""
    layers = [(113, 256), *((width, width) for width in args.widths)]  # the first: a critic's on Ant-v5
    places = [(*layer, batch) for layer, batch in itertools.product(layers, args.batch_sizes)]
    functions = {place: layer_functions(*place, args, content) for place in places}
    times = {place: {key: [] for key in own} for place, own in functions.items()}
    for place, own in tqdm(list(functions.items()) * args.repetitions, unit="layer", disable=None):  # all in each turn
        for key, value in time_once(own).items():
            times[place][key].append(value)
        rows = []
        for (inputs, outputs, batch), found in times.items():
            found = {key: values for key, values in found.items() if values}
            place = {"inputs": inputs, "outputs": outputs, "batch": batch}
            rows += layer_rows(found, place, content["conditions"]["peak_gflops"])
        content["layers"] = rows
        with contextlib.suppress(OSError):  # the report will tell
            save(args, content)


# What a time is divided by: the fastest of these. Column -> (its name, implementations).
BASES = {
    "x_torch_fp32": ("torch's dense fp32", ("dense torch",)),
    "x_best_fp32": ("the best dense fp32", ("dense torch", "dense numpy", "dense oneDNN")),
    "x_tf32": ("dense TF32", ("dense TF32",)),
    "x_bf16": ("dense bf16", ("dense bf16",)),
}


def layer_rows(times: dict[tuple, list[float]], place: dict[str, int], peaks: dict[str, float]) -> list[dict]:
    """Medians, quartiles and ratios of the timings of one layer."""
    rows, (inputs, outputs, batch) = [], place.values()
    for implementation, pattern in dict.fromkeys(key[:2] for key in times):
        own = {key[2]: values for key, values in times.items() if key[:2] == (implementation, pattern)}
        if len(own) == len(PRODUCTS):
            own["all three"] = [sum(values) for values in zip(*own.values(), strict=True)]
        calls = GRAPH_CALLS if "graph" in implementation else 1
        for product, values in own.items():
            low, us, high = np.percentile(values, [25, 50, 75]) * 1e6 / calls
            work = (3 if product == "all three" else 1) * 2 * batch * count_kept(inputs, outputs, pattern)
            gflops = work / us / 1e3  # of the weights kept
            share = gflops / peaks.get(precision(implementation), math.nan)
            numbers = {"us": us, "us_q1": low, "us_q3": high, "gflops": gflops, "share_of_peak": share}
            names = {"product": product, "implementation": implementation, "pattern": pattern}
            rows.append(place | names | shorten(numbers))
    dense = {(row["implementation"], row["product"]): row["us"] for row in rows if not row["pattern"]}
    for row in rows:
        mode = ", graph" if "graph" in row["implementation"] else ""  # graphs are compared with graphs
        for column, (_, bases) in BASES.items():
            found = [dense.get((base + mode, row["product"]), math.inf) for base in bases]
            row |= shorten({column: min(found) / row["us"]})
    return rows


@torch.no_grad()
def measure_actor(args: Args, content: dict) -> None:
    """A whole policy as a robot would run it, one observation at a time: 105 inputs, two layers of 256, 8 outputs.

    The output layer is dense in all of them. Sizes: 4 bytes for a number, 2 for the column of an active weight.
    """
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(105, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    x, arrays = torch.randn(1, 105), [param.numpy() for param in dense.parameters()]

    def numpy_actor():
        y = np.maximum(arrays[0] @ x[0].numpy() + arrays[1], 0)
        return arrays[4] @ np.maximum(arrays[2] @ y + arrays[3], 0) + arrays[5]

    if complaint := check(numpy_actor()[None], copy.deepcopy(dense).double()(x.double()), "dense numpy"):
        content["wrong"].append(f"actor in numpy: {complaint}")
    size = sum(array.nbytes for array in arrays)
    actors = {("dense torch", ""): (partial(dense, x), size), ("dense numpy", ""): (numpy_actor, size)}
    for pattern in args.patterns:
        net, chain, params = copy.deepcopy(dense), (), []
        for layer, own in ((net[0], pattern), (net[2], pattern), (net[4], "")):
            E = make_mask(layer.weight, own)
            layer.weight *= E
            chain += ((Index(E), layer is not net[4]),)
            params += layer.weight[E], layer.bias
        function = partial(chain_forward, chain, x, params, keep=False)
        if complaint := check(function()[0], copy.deepcopy(net).double()(x.double()), "N:M"):
            content["wrong"].append(f"actor with {pattern}: {complaint}")
        else:
            actors["any" if "%" in pattern else "N:M", pattern] = (
                function,
                sum(6 * index.nnz + 4 * index.rows for index, _ in chain),
            )
    times = {key: [] for key in actors}
    for key, (function, _) in list(actors.items()) * 300 * args.repetitions:
        function()
        times[key].append(seconds(function, 1) * 1e6)
    for (implementation, pattern), values in times.items():
        p50, p99 = np.percentile(values, [50, 99])
        row = {"implementation": implementation, "pattern": pattern} | shorten({"p50_us": p50, "p99_us": p99})
        content["actor"].append(row | {"bytes": actors[implementation, pattern][1]})


def measure_masks(args: Args, content: dict) -> None:
    """Cost of a new mask of a square layer, and its share of training that layer at several K."""
    for trained in (row for row in main_rows(content["layers"]) if row["batch"] == max(args.batch_sizes)):
        if trained["inputs"] == trained["outputs"] and trained["product"] == "all three" and ":" in trained["pattern"]:
            W, (n, m) = torch.randn(trained["inputs"], trained["inputs"]), parse(trained["pattern"])
            E = project(W, n, m)
            steps = {("project_us",): partial(project, W, n, m), ("index_us",): lambda W=W, E=E: (Index(E), W[E])}
            turns = [time_once(steps) for _ in range(args.repetitions)]
            times = {key[0]: statistics.median(turn[key] for turn in turns) * 1e6 for key in steps}
            shares = {f"share_at_K_{k}": sum(times.values()) / (k * trained["us"]) for k in INTERVALS}
            place = {"width": len(W), "pattern": trained["pattern"], "batch": trained["batch"]}
            content["masks"].append(place | shorten(times | shares))


def benchmark_kernels(args: Args) -> int:
    """Measure, print and write everything but whole training runs. A fault or Ctrl-C keeps what is measured."""
    code, limits = 0, gpu_limits if args.device == "cuda" else cpu_limits
    torch.set_num_threads(1)
    content = {"conditions": conditions(args), "layers": [], "actor": [], "masks": [], "wrong": [], "unsupported": []}
    try:
        content["conditions"] |= limits()
        measure_layers(args, content)
        if args.device == "cpu":
            measure_actor(args, content)
            measure_masks(args, content)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # such as a GPU's memory that others fill
        code = 1
        print(f"error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    if content["layers"]:
        tables = {name: content[name] for name in ("layers", "actor", "masks")}
        write_report(args, content, summarize_kernels(content), {"speedup": draw_speedup(content)}, tables)
    return 1 if content["wrong"] else code


# --- Report of the kernels ----------------------------------------------------------------------------------------


def align(rows: list[list[str]]) -> str:
    """A Markdown table that reads well in a terminal too: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate(rows: list[dict], header: str, line: str) -> str:
    """A table of `header` and of `line`, formatted with each row; | ends a cell. A missing number leaves it empty."""
    lines = [line.format_map({k: math.nan if v is None else v for k, v in row.items()}) for row in rows]
    cells = [[cell.strip() for cell in text.split("|")] for text in (header, *lines)]
    return align([["" if "nan" in cell else cell for cell in row] for row in cells])


def how_measured(found: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    return f"Measured on {found['date']} with {versions}; commit {found['commit']}."


def main_rows(rows: list[dict]) -> list[dict]:
    """What counts of N:M: all three products; forward at batch 1 and on a GPU, whose library lacks grad-weight."""
    own = [row for row in rows if row["implementation"] in ("N:M", "any", "sparse bf16, graph")]
    wanted = {True: "forward", False: "all three"}
    return [row for row in own if row["product"] == wanted[row["batch"] == 1 or "graph" in row["implementation"]]]


def describe_noise(rows: list[dict]) -> str:
    """How much dense differs from itself, and how far the middle half of N:M's timings spreads."""
    text = "Noise is what timings of the same thing differ by."
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        again = [abs(row["x_torch_fp32"] - 1) for row in own if row["implementation"] == "dense again"]
        spread = [(row["us_q3"] - row["us_q1"]) / row["us"] for row in main_rows(own)]
        if again and spread:
            typical, noise = statistics.median(again), max(statistics.median(again), statistics.median(spread))
            text += f"""
At batch {batch}, a dense product timed under two names differs from itself by {typical:.1%} (median; at most
{max(again):.1%}). The middle half of the repetitions of N:M spreads over {statistics.median(spread):.1%} of their time
(median; at most {max(spread):.1%})."""
            if noise > 0.1:
                text += f" **This is too noisy: conclude nothing from differences below {2 * noise:.0%}.**"
    return text


def tabulate_ratios(rows: list[dict], bases: list[str]) -> str:
    """A line for each layer and batch size, largest batch first, and a column for each pattern."""
    rows, cells = sorted(main_rows(rows), key=lambda row: (-row["batch"], row["inputs"])), {}
    for row in rows:
        line = cells.setdefault((f"{row['inputs']} to {row['outputs']}", str(row["batch"])), {})
        line[row["pattern"]] = " / ".join(f"{row[base] or math.nan:.1f}" for base in bases)
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = [[*names, *(line.get(pattern, "") for pattern in patterns)] for names, line in cells.items()]
    return align([["layer", "batch", *patterns], *lines])


BEST_FP32 = """\
"The best dense fp32" is the fastest float32 product that we know on this CPU: that of torch (as in nn.Linear), of
numpy's BLAS or of oneDNN (which torch calls for bfloat16 only). bf16 is torch's product of bfloat16 numbers, which have
half the bits."""
ON_A_GPU = """\
"The best dense fp32" is torch's float32 product, TF32 the same with inputs rounded to 10 bits, bf16 that of bfloat16
numbers. N:M runs in bfloat16 on the sparse tensor cores, which know 2:4 alone (1:4 and 1:8 masks are legal 2:4 masks)
and lack grad-weight for it: forward only. All run in CUDA graphs, without the time that Python needs to launch them."""


PRODUCT_TABLE = (
    "|product|us|quartiles|times torch's fp32|GFLOP/s|of peak",
    "{implementation} {pattern}|{product}|{us:,.0f}|{us_q1:,.0f}-{us_q3:,.0f}|{x_torch_fp32:.1f}|{gflops:,.0f}|"
    "{share_of_peak:.0%}",
)
ACTOR_TABLE = "|median, us|99 %, us|bytes", "{implementation} {pattern}|{p50_us:.1f}|{p99_us:.1f}|{bytes:,}"
MASK_TABLE = (
    "|project, us|index, us|K = 100|K = 1,000|K = 10,000",
    "{pattern}|{project_us:,.0f}|{index_us:,.0f}|{share_at_K_100:.2%}|{share_at_K_1000:.2%}|{share_at_K_10000:.2%}",
)


def summarize_kernels(content: dict) -> str:
    """summary.md, from results.json alone."""
    rows, found = content["layers"], content["conditions"]
    bases = [base for base in ("x_best_fp32", "x_tf32", "x_bf16") if any(row[base] for row in main_rows(rows))]
    batch, shown = max(row["batch"] for row in rows), min(found["args"]["widths"], key=lambda width: abs(width - 256))
    place = {"inputs": shown, "outputs": shown, "batch": batch}
    peaks = ", ".join(f"{peak:,.0f} GFLOP/s in {kind}" for kind, peak in found["peak_gflops"].items())
    source = "dense matrices, 8192 wide" if found["gpu"] else "multiply-adds from registers"
    text = f"""\
# How fast N:M layers are on {found["gpu"] or f"one core of {found['cpu']} ({found['capability']})"}

The peak is {peaks} ({source}). The memory moves {found["read_gbs"]:.0f} GB/s. {how_measured(found)}

{describe_noise(rows)}

## How many times as fast as dense

In training a layer needs three products: forward, grad-input (the gradient of its inputs) and grad-weight (that of its
weights and biases; of sparse layers the active weights' alone). 95% is a layer that keeps 5 % of its weights, wherever
they are; the kernels are the same. A cell says how many times as fast they are, at batch 1
(acting) forward alone, as {" / as ".join(BASES[base][0] for base in bases)}. N:M pays where it is above 1.

{ON_A_GPU if found["gpu"] else BEST_FP32}

{tabulate_ratios(rows, bases)}

## One layer: {shown} inputs, {shown} outputs, batch {batch}

Medians of {found["args"]["repetitions"]} repetitions. GFLOP/s and the share of the peak in the same precision count the
kept weights only. The time of N:M includes the conversion of inputs and outputs to the kernels' layout, which a network
pays at its ends only, but not the making of the index. "dense again" is "dense torch", timed a second time. results.csv
has every layer and batch.

{tabulate([row for row in rows if place.items() <= row.items()], *PRODUCT_TABLE)}
"""
    if content["actor"]:
        text += f"""
## A whole actor, one observation at a time

The actor of Ant-v5 (105 inputs, two layers of 256, 8 outputs; the output layer is dense) is called from Python. 99 % of
the calls take less than the second number. The size is that of its numbers and indices.

{tabulate(content["actor"], *ACTOR_TABLE)}
"""
    if masks := [row for row in content["masks"] if row["width"] == shown]:
        text += f"""
## A new mask

A new mask of a {shown} to {shown} layer takes the projection and a new index for the kernels. If it changes every K
updates, this adds so much to the time of the layer's three products. A refresh in training costs more: it also makes
the target network's index, moves weights and moments to their new places, and counts SAD.

{tabulate(masks, *MASK_TABLE)}
"""
    return text + list_complaints(content)


def list_complaints(content: dict) -> str:
    """What was wrong, and what is not supported, by reason."""
    text, names = "", {}
    for name, _, reason in (line.partition(": ") for line in dict.fromkeys(content["unsupported"])):
        names.setdefault(reason, []).append(name)
    unsupported = [f"{', '.join(own)}: {reason}" for reason, own in names.items()]
    for title, complaints in (("Wrong, not timed", content["wrong"]), ("Not supported", unsupported)):
        if complaints:
            text += "\n".join([f"\n## {title}\n", *(f"- {complaint}" for complaint in complaints), ""])
    return text


def draw_speedup(content: dict) -> Figure:
    """Speed-up over dense against width at the largest batch, a line for each pattern with its ideal M/N.

    On a CPU over the best fp32; on a GPU over torch's bf16, where the ideal of all is that of 2:4.
    """
    gpu, batch = content["conditions"]["gpu"], max(row["batch"] for row in content["layers"])
    base, ideal = ("x_bf16", "M/N, at most 2") if gpu else ("x_best_fp32", "M/N")
    rows = [row for row in main_rows(content["layers"]) if row["inputs"] == row["outputs"] and row["batch"] == batch]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax, widths = figure.subplots(), sorted({row["inputs"] for row in rows})
    for i, pattern in enumerate(dict.fromkeys(row["pattern"] for row in rows)):  # 2:4 is seen beneath 4:8
        points = [(row["inputs"], row[base] or math.nan) for row in rows if row["pattern"] == pattern]
        color, ideal_ratio = pattern_color(pattern), 2**20 / count_kept(1024, 1024, pattern)
        ax.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            markersize=3 + 6 / (i + 1),
            linewidth=1 + 3 / (i + 1),
            linestyle="--" if "%" in pattern else "-",
            label=pattern.replace("%", " % zero, anywhere"),
        )
        ax.axhline(min(ideal_ratio, 2) if gpu else ideal_ratio, color=color, linestyle=":", linewidth=0.8)
    ax.axhline(1, color="black", linewidth=0.8, label=f"as fast as {BASES[base][0]}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(widths, map(str, widths))
    ticks = {0.25: "¼", 0.5: "½"} | {2**i: str(2**i) for i in range(10)}
    low, high = ax.get_ylim()
    ax.set_yticks(*zip(*((x, text) for x, text in ticks.items() if low <= x <= high), strict=True))
    ax.set_xlabel("inputs and outputs of the layer")
    ax.set_ylabel(f"times as fast as {BASES[base][0]} (dotted: {ideal})")
    ax.grid(alpha=0.3, linewidth=0.5)
    products = "forward" if gpu or batch == 1 else "the three products"
    ax.set_title(f"N:M against dense on {gpu or 'one core'}: {products} of a layer, batch {batch}", fontsize=10)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


# --- Whole training runs ------------------------------------------------------------------------------------------

# Trains a peer and writes metrics.csv as the scripts do; it is given their last two flags.
PEER = """
import csv, importlib, sys, time, warnings
warnings.simplefilter("ignore")
module, env_id, hidden, steps = sys.argv[1:5]
folder, threads = (flag.partition("=")[2] for flag in sys.argv[5:])
import gymnasium as gym, torch
torch.set_num_threads(int(threads))
from stable_baselines3.common.callbacks import BaseCallback
class Clock(BaseCallback):
    last = None
    def _on_step(self):
        if self.num_timesteps % 1000 == 0:
            now = time.perf_counter()
            if self.last:
                rows.writerow([self.num_timesteps, 1000 / (now - self.last), ""])
            self.last = now
        return True
with open(folder + "/metrics.csv", "w") as file:
    rows = csv.writer(file)
    rows.writerow(["global_step", "charts/SPS", "charts/update_ms"])
    importlib.import_module(module).TD3(
        "MlpPolicy", gym.make(env_id, disable_env_checker=True), learning_rate=3e-4, batch_size=256,
        learning_starts=1000, train_freq=1, gradient_steps=1, policy_delay=2, buffer_size=100_000,
        policy_kwargs={"net_arch": [int(hidden)] * 2}).learn(1000 + int(steps), callback=Clock())
"""
PEERS = {"SB3": "stable_baselines3", "SBX (JAX)": "sbx"}

# Run a script, given with its flags, after a change of how torch computes.
LAUNCH = """
import runpy, sys, torch
{change}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BF16 = """
torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()  # a cache would keep the first weights for ever
"""
ONEDNN = """
product, library = torch.ops.mkldnn._linear_pointwise.default, torch.library.Library("aten", "IMPL")
def dense(a):  # oneDNN takes 45 ms for the gradient of a layer whose inputs are slices of longer rows
    return a if a.is_contiguous() or a.T.is_contiguous() else a.contiguous()
def mm(a, b, bias=None):
    return product(dense(a), dense(b).T, bias, "none", [], "")
def addmm(bias, a, b, *, beta=1, alpha=1):  # one observation is faster with torch
    return torch.addmv(bias, b.T, a[0])[None] if len(a) == 1 else mm(a, b, bias)
library.impl("mm", mm, "CPU")  # every linear layer and its gradients end in these two
library.impl("addmm", addmm, "CPU")
"""
COMPILED = """
import importlib, pathlib, sys, torch
path = pathlib.Path(sys.argv[1])
sys.argv, sys.path = sys.argv[1:], [str(path.parent), *sys.path]
script = importlib.import_module(path.stem)
script.update_critics, script.update_actor = map(torch.compile, (script.update_critics, script.update_actor))
sys.exit(script.main())
"""


# Sparsities of actor and critics, in percent, at which RLx2 was published (arXiv 2205.15043, Table 2).
RLX2 = {"HalfCheetah": (90, 85), "Hopper": (98, 95), "Walker2d": (97, 95), "Ant": (96, 88)}


class Run(NamedTuple):
    command: list[str]
    cores: int = 1
    copies: int = 1


def narrow_hidden_dim(env_id: str, hidden_dim: int, pattern: str) -> int:
    """Units of dense networks (actor and two critics) with as many parameters as are active with N:M, or nearly."""
    env = gym.make(env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]

    def count(units: int, own: str = "") -> int:  # output layers are dense
        first = count_kept(obs_dim, units, own) + 2 * count_kept(obs_dim + action_dim, units, own)
        return first + 3 * count_kept(units, units, own) + (action_dim + 2) * units + 6 * units  # the last: biases

    return min(range(1, hidden_dim + 1), key=lambda units: abs(count(units) - count(hidden_dim, pattern)))


def configurations(args: Args) -> dict[str, Run]:
    """Label -> run. A label reads "network, how it is run"; SETTINGS finds the dense run to compare it with."""
    flags = f"--env-id={args.env_id} --total-timesteps={1000 + args.steps} --learning-starts=1000 --buffer-size=100000 "
    flags = (flags + "--eval-interval=1000000000 --eval-episodes=1 --no-track").split()
    hidden, last = args.hidden_dims[0], args.patterns[-1]

    def train(pattern: str, units: int, *extra: str) -> list[str]:
        (n, m), script = parse(pattern), "rnm" if pattern else "dense"
        own = [f"--n={n}", f"--m={m}", *(() if extra else ("--kernel=nm",))] if pattern else []  # or it fails
        return [str(HERE / f"{script}_td3_continuous.py"), *flags, *own, f"--hidden-dim={units}", *extra]

    narrow = narrow_hidden_dim(args.env_id, hidden, last)
    patterns = {"dense": ""} | {pattern: pattern for pattern in args.patterns}
    found = {"dense": Run(train("", hidden))}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["dense, oneDNN"] = Run(["-c", LAUNCH.format(change=ONEDNN), *train("", hidden)])
    if HAS_BF16:
        found["dense, bf16 autocast"] = Run(["-c", LAUNCH.format(change=BF16), *train("", hidden)])
    if shutil.which("g++"):
        found["dense, torch.compile"] = Run(["-c", COMPILED, *train("", hidden)])
    found[f"dense, as many weights as {last}"] = Run(train("", narrow))
    found |= {pattern: Run(train(pattern, hidden)) for pattern in args.patterns}
    found[f"{last}, --kernel torch"] = Run(train(last, hidden, "--kernel=torch"))
    actor, critic = RLX2.get(args.env_id.partition("-")[0], RLX2["Ant"])
    rlx2 = [str(HERE / "rlx2_td3_continuous.py"), *flags, f"--hidden-dim={hidden}", "--kernel=nm"]
    rlx2 += [f"--actor-sparsity={actor / 100}", f"--critic-sparsity={critic / 100}"]
    found[f"RLx2 {actor}/{critic}"] = Run([*rlx2, "--delay-nstep=0"])
    found[f"RLx2 {actor}/{critic}, one-step targets"] = Run(rlx2)
    peers = {label: module for label, module in PEERS.items() if importlib.util.find_spec(module)}
    if missing := [label for label in PEERS if label not in peers]:
        say(f"without {' and '.join(missing)}: pip install stable-baselines3 sbx-rl")
    for label, module in peers.items():
        found[label] = Run(["-c", PEER, module, args.env_id, str(hidden), str(args.steps)])
    if CORES > 1:
        found |= {f"{label}, {CORES} threads": Run(found[label].command, CORES) for label in ("dense", *peers)}
        found |= {f"{label}, two runs at once": Run(found[label].command, 1, 2) for label in ("dense", last)}
    for units in args.hidden_dims[1:]:
        found |= {f"{label}, hidden {units}": Run(train(pattern, units)) for label, pattern in patterns.items()}
    if args.device == "cuda":
        found |= {f"{label}, GPU": Run(train(p, hidden, "--device=cuda")) for label, p in patterns.items()}
    if unknown := set(args.labels or ()) - found.keys():
        fail(f"--labels takes {', '.join(map(repr, found))}, not {unknown.pop()!r}")
    return {label: run for label, run in found.items() if args.labels is None or label in args.labels}


def run_once(run: Run) -> tuple[float, float | None, float]:
    """Environment steps per second of all copies together, milliseconds per update or None, peak memory of one in MiB.

    Each copy has cores of its own. Raises RuntimeError if one fails.
    """
    flags = f"--xla_cpu_multi_thread_eigen={str(run.cores > 1).lower()} intra_op_parallelism_threads={run.cores}"
    environment = os.environ | {"OMP_NUM_THREADS": str(run.cores), "XLA_FLAGS": flags}
    cores, copies = sorted(os.sched_getaffinity(0), reverse=True), []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for i in range(run.copies):
                folder, own = Path(scratch, str(i)), cores[i * run.cores :][: run.cores]
                folder.mkdir()
                command = [sys.executable, *run.command, f"--runs-dir={folder}", f"--threads={run.cores}"]
                pin = partial(os.sched_setaffinity, 0, own)
                with open(folder / "output", "w") as output:
                    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, preexec_fn=pin)
                copies.append((process, folder))
            found = [wait_for(*copy) for copy in copies]
        finally:
            for process, _ in copies:
                process.kill()
    rates, update_ms, memory = zip(*found, strict=True)
    return sum(rates), update_ms[0], max(memory)


def wait_for(process: subprocess.Popen, folder: Path) -> tuple[float, float | None, float]:
    """Steps per second, milliseconds per update and peak MiB of one process, from 2000 steps on (1000 are warm-up)."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {(folder / 'output').read_text()[-2000:]}")
    with open(next(folder.rglob("metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row["charts/SPS"] and int(row["global_step"]) > 2000]
    updates = [float(row["charts/update_ms"]) for row in rows if row["charts/update_ms"]]
    rate = statistics.median(float(row["charts/SPS"]) for row in rows)
    return rate, statistics.median(updates) if updates else None, usage.ru_maxrss / 1024


def benchmark_training(args: Args) -> int:
    """Time the training scripts and their peers, in turns. A failing one is left out; Ctrl-C keeps what is measured."""
    runs, code, found = configurations(args), 0, {}
    narrow = narrow_hidden_dim(args.env_id, args.hidden_dims[0], args.patterns[-1])
    content = {"conditions": conditions(args), "narrow_hidden_dim": narrow, "rate_update_ms_peak_mib": found}
    try:
        for label in tqdm(list(runs) * args.repetitions, unit="run", disable=None):
            if label not in runs:
                continue
            try:
                result = run_once(runs[label])
                found.setdefault(label, []).append(result)
                message = f"{label}: {result[0]:.0f} steps/s"
            except Exception as error:  # whatever it is, it must not cost what is measured
                code = 1
                del runs[label]
                message = f"error: {label}: {error}"
            if found:
                with contextlib.suppress(OSError):  # the report will tell
                    save(args, content)
            with contextlib.suppress(OSError):  # nobody reads
                tqdm.write(message, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    if found:
        rows = [
            {"configuration": label, "steps_per_second": rate, "ms_per_update": ms, "peak_mib": mib}
            for label, results in found.items()
            for rate, ms, mib in results
        ]
        write_report(args, content, summarize_training(content), {"end_to_end": draw_training(content)}, {"runs": rows})
    return code


# How a configuration is run, where dense and the peers were run so too: they are compared with their like.
SETTINGS = re.compile(r", (hidden \d+|\d+ threads|two runs at once|GPU)$")


def training_rows(content: dict) -> list[dict]:
    """Medians, extremes and ratios of every configuration."""
    results, rows = content["rate_update_ms_peak_mib"], []
    median = {label: statistics.median(rate for rate, *_ in runs) for label, runs in results.items()}
    for label, runs in results.items():
        (rates, updates, mib), setting = zip(*runs, strict=True), SETTINGS.search(label)
        ms = None if None in updates else statistics.median(updates)
        row = {"label": label, "rate": median[label], "low": min(rates), "high": max(rates), "ms": ms}
        twins = {other: median.get(other + (setting[0] if setting else "")) for other in ("dense", *PEERS)}
        ratios = {other: median[label] / rate if rate else None for other, rate in twins.items()}
        rows.append(row | {"mib": statistics.median(mib)} | ratios)
    return rows


def first_rows(content: dict) -> list[dict]:
    """What a reader wants to know first, all on one core."""
    rows = {row["label"]: row for row in training_rows(content)}
    dense = [label for label in ("dense", "dense, oneDNN", "dense, torch.compile") if label in rows]
    best = max(dense, key=lambda label: rows[label]["rate"], default="")
    names = {"dense": "dense", f"best dense fp32 ({best.partition(', ')[2] or 'torch'})": best}
    names |= {label: label for label in (*PEERS, *content["conditions"]["args"]["patterns"])}
    names |= {label: label for label in rows if label.startswith("RLx2")}
    return [rows[label] | {"name": name} for name, label in names.items() if label in rows]


FIRST_TABLE = "|steps per second|times dense", "{name}|{rate:,.0f}|{dense:.2f}"
ALL_TABLE = (
    "|steps/s|slowest-fastest|ms per update|MiB|times dense|times SB3|times SBX (JAX)",
    "{label}|{rate:,.0f}|{low:,.0f}-{high:,.0f}|{ms:.2f}|{mib:.0f}|{dense:.2f}|{SB3:.2f}|{SBX (JAX):.2f}",
)


def summarize_training(content: dict) -> str:
    """summary.md, from results.json alone."""
    found = content["conditions"]
    return f"""\
# How fast TD3 trains on {found["args"]["env_id"]}

Every run in the first table had one core of {found["cpu"]} ({found["capability"]}). The networks have two
hidden layers of {found["args"]["hidden_dims"][0]} units, and a batch has 256 observations. A step of the environment
includes acting, sampling from replay and one update, but no evaluation. "Best dense fp32" is the fastest way that
we know to train the same dense networks in float32.

{tabulate(first_rows(content), *FIRST_TABLE)}

All configurations ran in turns, each with {found["args"]["steps"]} training steps, of which the first 1000 do not
count. Numbers are medians of {min(map(len, content["rate_update_ms_peak_mib"].values()))} runs. {how_measured(found)}

## All configurations

{tabulate(training_rows(content), *ALL_TABLE)}

- times X: how many times as fast as X with as many cores, of the same width, on the same device
- ms per update: the part of a step that is the update, in milliseconds; MiB: peak memory of a process
- oneDNN: the dense script with the matrix products of oneDNN in place of torch's
- bf16 autocast: the dense script in torch's autocast, whose layers compute in bfloat16
- torch.compile: the dense script, its two update functions compiled by torch.compile (before what is counted)
- as many weights as: dense with hidden layers of {content["narrow_hidden_dim"]} units, which make as many
  parameters as are active with that pattern, or nearly
- RLx2 A/C: rlx2_td3_continuous.py with A % of the actor's and C % of the critics' weights zero, three-step targets
- --kernel torch: the N:M script without the kernels, with products of the masked dense matrix
- SB3, SBX: the TD3 of stable-baselines3 and of sbx-rl, which runs on JAX, with the same networks, batch and updates
- 2 threads: on as many cores, where all others have one; two runs at once: each on a core, their steps/s added up
- hidden 512: 512 units in both hidden layers; GPU: the networks are on the GPU
"""


def draw_training(content: dict) -> Figure:
    """A bar for each line of the first table: median steps per second, a line from the slowest to the fastest run."""
    rows, args = first_rows(content), content["conditions"]["args"]
    figure = Figure(figsize=(7, 1.3 + 0.35 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for place, row in enumerate(rows):
        color = "#7f7f7f" if row["label"] in PEERS else pattern_color(row["label"].partition(",")[0])
        ax.barh(place, row["rate"], color=color, height=0.7)
        ax.plot([row["low"], row["high"]], [place, place], color="#bbbbbb", linewidth=2)  # seen on every colour
        text = f"{row['rate']:,.0f} ({row['dense'] or math.nan:.1f} times dense)"
        ax.annotate(text, (row["high"], place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.4)
    ax.set_xlabel("environment steps per second (bar: median, line: slowest to fastest run)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    units = args["hidden_dims"][0]
    figure.suptitle(f"Training TD3 on {args['env_id']} on one core: hidden layers of {units}, batch 256", fontsize=10)
    return figure


# --- Common -------------------------------------------------------------------------------------------------------


def conditions(args: Args) -> dict:
    """What was measured, where and with what."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "gymnasium", "mujoco", "numpy", "stable_baselines3", "sbx-rl", "jax"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    versions["numpy's BLAS"] = f"{blas['name']} {blas['version']} {os.environ.get('OPENBLAS_CORETYPE', '')}".strip()
    if args.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()}
    cpu = re.search(r"cpu family\s*: (.*)\nmodel\s*: (.*)\nmodel name\s*: (.*)", CPUINFO)
    git = shutil.which("git") or "true", "-C", str(HERE), *"describe --always --dirty --abbrev=40 --exclude=*".split()
    return {
        "args": {name: value for name, value in asdict(args).items() if name != "out"},
        "cpu": f"{cpu[3]} (family {cpu[1]}, model {cpu[2]})" if cpu else platform.machine(),
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "cores": CORES,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(args: Args, content: dict) -> None:
    """results.json: the old or the new one is there, whole."""
    temporary = Path(args.out, "results.json.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(temporary.with_suffix(""))


def write_report(args: Args, content: dict, summary: str, figures: dict[str, Figure], tables: dict) -> None:
    """Write results.json, results.csv (the first table), summary.md, figures and a W&B run; print the summary."""
    out, facts = Path(args.out), {key: content["conditions"][key] for key in ("cpu", "gpu", "date", "commit")}
    rows = [row | facts | {"torch": content["conditions"]["versions"]["torch"]} for row in next(iter(tables.values()))]
    try:
        save(args, content)
        (out / "summary.md").write_text(summary)
        with open(out / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=200)
    except OSError as error:
        say(summary)
        fail(f"{out} can't be written: {error}", 1)
    say(summary)
    if args.track:
        log_wandb(args, "benchmark", out, tables, [out / f"{name}.png" for name in figures])
    say(f"Written: results.json, results.csv, summary.md and a figure in {out}")


# --- shared: wandb ---
def say(text: str) -> None:
    """Print, whether or not somebody still reads (`| head`): what is left unwritten would change the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_wandb(args: Args, job: str, out: Path, tables: dict[str, list[dict]], figures: list[Path]) -> None:
    """A W&B run with the same figures and tables; offline without a login."""
    try:
        import wandb

        online = os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False)
        run = wandb.init(
            project=args.wandb_project_name or "nm-sparse-rl",
            entity=args.wandb_entity,
            job_type=job,
            name=f"{job}_{out.resolve().name}",
            config=vars(args),
            mode=None if online else "offline",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=600),
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


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    check_args(args)
    try:
        return benchmark_training(args) if args.end_to_end else benchmark_kernels(args)
    except KeyboardInterrupt:  # in what comes before measuring or after
        return 130


if __name__ == "__main__":
    sys.exit(main())
