"""The CPU kernels against float64, against torch's rules, and without a compiler."""

import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")


def nm_mask(rows, cols, n, m, generator):
    scores = torch.rand(rows, -(-cols // m), m, generator=generator)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, scores.topk(n).indices, True)
    return mask.flatten(1)[:, :cols].contiguous()


def ragged_mask(rows, cols, sparsity, generator):
    """Rows of any length, among them an empty and a full one; an empty column, too, but for the full row."""
    mask = torch.rand(rows, cols, generator=generator) >= sparsity
    mask[:, cols // 2] = False
    mask[rows // 2] = False
    mask[-1] = True
    return mask


def make_chain(rnm, masks, relu=None, seed=0, requires_grad=True):
    """(chain, params) with a ReLU after each layer but the last, or after each whose `relu` is true."""
    generator = torch.Generator().manual_seed(seed)
    relu = [True] * (len(masks) - 1) + [False] if relu is None else relu
    params = []
    for E in masks:
        scale = max(1, int(E.sum()) / len(E)) ** -0.5
        shape = E.shape if E.all() else (int(E.sum()),)  # a dense layer's weight is its own packed form
        params += torch.randn(shape, generator=generator) * scale, torch.randn(len(E), generator=generator)
    params = [p.requires_grad_(requires_grad) for p in params]
    chain = [(rnm.Index(E), r) for E, r in zip(masks, relu, strict=True)]
    for (index, _), E in zip(chain, masks, strict=True):
        index.E = E  # for `reference`
    return chain, params


def simple_chain(rnm, widths=(10, 64, 64, 1), n=1, m=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return make_chain(rnm, [nm_mask(b, a, n, m, generator) for a, b in itertools.pairwise(widths)], seed=seed)


def reference(chain, x, params, dtype=torch.float64):
    """(y, leaves): the same by dense layers in `dtype`; leaves: x, then params."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *params)]
    y, packed = leaves[0], leaves[1:]
    for (index, relu), weights, bias in zip(chain, packed[::2], packed[1::2], strict=True):
        weight = torch.zeros(index.E.shape, dtype=dtype).masked_scatter(index.E, weights)
        y = F.linear(y, weight, bias)
        y = F.relu(y) if relu else y
    return y, leaves


def close(got, wanted):
    assert got.shape == wanted.shape and got.dtype == torch.float32
    return got.numel() == 0 or (got.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def check(rnm, chain, params, x, seed=0):
    """Output and all gradients of Chain, chain_forward and chain_backward against float64."""
    y64, leaves = reference(chain, x, params)
    dy = torch.randn(y64.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    wanted = torch.autograd.grad(y64, leaves, dy.double())
    leaf = x.detach().clone().requires_grad_()
    y = rnm.Chain.apply(chain, leaf, *params)
    got = torch.autograd.grad(y, [leaf, *params], dy)
    assert close(y, y64) and all(map(close, got, wanted))
    with torch.no_grad():
        alone, nothing = rnm.chain_forward(chain, x, params, False)
        assert nothing is None and close(alone, y64)
        y, acts = rnm.chain_forward(chain, x, params, True)
        for need_dx, need_grads in itertools.product((True, False), repeat=2):
            dx, grads = rnm.chain_backward(chain, params, acts, dy, need_dx, need_grads)
            assert torch.equal(dx, got[0]) if need_dx else dx is None
            assert all(map(torch.equal, grads, got[1:])) if need_grads else grads is None  # and the same bits


SHAPES = [(1, 17), (8, 256), (256, 113), (3, 129), (70, 33), (256, 256), (300, 513), (130, 1030)]  # out, in
PATTERNS = [(2, 4), (1, 4), (1, 8), (4, 8), (1, 16), (3, 5), (7, 7), 0.85, 0.9, 0.95, 0.98]
BATCHES = [1, 5, 16, 17, 63, 64, 65, 100, 128, 200, 256]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_three_products_against_float64(rnm, shape, pattern):
    generator = torch.Generator().manual_seed(sum(shape))
    ragged = isinstance(pattern, float)
    E = ragged_mask(*shape, pattern, generator) if ragged else nm_mask(*shape, *pattern, generator)
    chain, params = make_chain(rnm, [E])
    assert (chain[0][0].rows, chain[0][0].cols, chain[0][0].nnz) == (*shape, int(E.sum()))
    at = SHAPES.index(shape) + PATTERNS.index(pattern)
    for batch in {BATCHES[at % len(BATCHES)], 64, 65, 256}:
        check(rnm, chain, params, torch.randn(batch, shape[1], generator=generator))


@pytest.mark.parametrize("batch", [1, 65, 256])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("relu", ["all", "none", "hidden", "alternating"])
def test_chains_against_float64(rnm, depth, relu, batch):
    generator = torch.Generator().manual_seed(depth)
    widths = (19, 70, 257, 33, 6)[-depth - 1 :]
    masks = [ragged_mask(b, a, 0.9, generator) for a, b in itertools.pairwise(widths)]
    masks[-1] |= True  # a dense head
    on = [{"all": True, "none": False, "hidden": i < depth - 1, "alternating": i % 2 == 0}[relu] for i in range(depth)]
    chain, params = make_chain(rnm, masks, on)
    check(rnm, chain, params, torch.randn(batch, widths[0], generator=generator))


def test_empty_mask_and_widest_layers(rnm):
    for E in (torch.zeros(5, 7), torch.zeros(1, 1), torch.ones(1, 1)):
        chain, params = make_chain(rnm, [E.bool()])
        check(rnm, chain, params, torch.ones(3, E.shape[1]))
    for shape in ((65_536, 2), (2, 65_536)):
        chain, params = make_chain(rnm, [ragged_mask(*shape, 0.9, torch.Generator().manual_seed(0))])
        check(rnm, chain, params, torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0)))
    layer = rnm.SparseLinear(torch.nn.Linear(65_537, 1), 1, 4)  # one wider: torch runs it
    layer.__class__ = rnm.FusedLinear
    assert rnm.run_chain([layer], torch.zeros(1, 65_537))[1] == 0


@pytest.mark.parametrize("batch", [0, 1, 65])
def test_strided_inputs_and_gradients(rnm, batch):
    chain, params = simple_chain(rnm, (10, 64, 64, 3))
    wide = torch.randn(batch, 14, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for x in (wide[:, 3:13], wide.t().contiguous().t()[:, :10], wide[:1, :10].expand(batch, 10)):
        y = rnm.Chain.apply(chain, x, *params)
        got = torch.autograd.grad(y.sum(), [wide, *params])  # the gradient of a sum has stride 0
        y64, leaves = reference(chain, x, params)
        dx, *wanted = torch.autograd.grad(y64.sum(), leaves)
        assert close(y, y64) and all(map(close, got[1:], wanted)) and got[0].shape == wide.shape
        assert close(got[0], torch.autograd.grad(x, wide, dx.float())[0].double())
    if batch == 0:
        assert all((grad == 0).all() for grad in got)


def test_same_bits_each_time(rnm):
    chain, params = simple_chain(rnm, (23, 256, 256, 1), 1, 8)
    x, results = torch.randn(300, 23, requires_grad=True), []
    for _ in range(5):
        y = rnm.Chain.apply(chain, x, *params)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *params])])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_nan_comes_through_relu_as_in_torch(rnm):
    generator = torch.Generator().manual_seed(0)
    sparse, dense = simple_chain(rnm), make_chain(rnm, [torch.ones(64, 10) > 0, torch.ones(64, 64) > 0])
    for chain, params in (sparse, dense):
        x = torch.randn(70, 10, generator=generator)
        x[5, int(chain[0][0].E[3].nonzero()[0, 0])] = torch.nan
        y = rnm.Chain.apply(chain, x.requires_grad_(), *params)
        wanted, leaves = reference(chain, x, params, torch.float32)
        assert wanted[5].isnan().all() and torch.equal(y.isnan(), wanted.isnan())
    got = torch.autograd.grad(y.sum(), [x, *params])  # dense: torch's zeros spread NaN, too
    for a, b in zip(got, torch.autograd.grad(wanted.sum(), leaves), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_two_forwards_before_one_backward_and_retained_graphs(rnm):
    chain, params = simple_chain(rnm)
    a, b = (torch.randn(70, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    loss = rnm.Chain.apply(chain, a, *params).square().mean() + rnm.Chain.apply(chain, b, *params).mean()
    got = torch.autograd.grad(loss, params, retain_graph=True)
    for _ in range(3):  # these may not take what the first passes still need
        rnm.Chain.apply(chain, b, *params).square().sum().backward()
    again = torch.autograd.grad(loss, params)
    y, leaves = reference(chain, a, params)
    wanted = torch.autograd.grad(y.square().mean(), leaves)[1:]
    y, leaves = reference(chain, b, params)
    wanted = [p + q for p, q in zip(wanted, torch.autograd.grad(y.mean(), leaves)[1:], strict=True)]
    assert all(map(close, got, wanted)) and all(map(torch.equal, got, again))


def test_what_changes_between_forward_and_backward_raises(rnm):
    chain, params = simple_chain(rnm)
    x = torch.randn(70, 10)
    for change in params:
        y = rnm.Chain.apply(chain, x, *params).sum()
        with torch.no_grad():
            change.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    y, old = rnm.Chain.apply(chain, x, *params).sum(), x.clone()
    x.add_(1.0)  # the kernels hold their own copy
    got = torch.autograd.grad(y, params)
    assert all(map(torch.equal, got, torch.autograd.grad(rnm.Chain.apply(chain, old, *params).sum(), params)))


def test_an_optimizer_step_between_forward_and_backward_raises(rnm):
    """As with any in-place change; torch's fused Adam does not say by itself that it made one."""
    layer, x = torch.nn.Linear(3, 2), torch.randn(5, 3, requires_grad=True)
    optimizer = rnm.make_adam(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    y = layer(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_no_second_derivative(rnm):
    chain, params = simple_chain(rnm)
    x = torch.randn(70, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="--kernel torch"):
        torch.autograd.grad(rnm.Chain.apply(chain, x, *params).sum(), x, create_graph=True)


def test_only_what_is_needed_gets_a_gradient(rnm, monkeypatch):
    chain, params = simple_chain(rnm)
    asked, backward = [], rnm.chain_backward
    monkeypatch.setattr(rnm, "chain_backward", lambda *args: asked.append(args[-2:]) or backward(*args))
    x = torch.randn(70, 10)
    rnm.Chain.apply(chain, x, *params).sum().backward()
    frozen = [p.detach() for p in params]
    x.requires_grad_()
    rnm.Chain.apply(chain, x, *frozen).sum().backward()
    assert asked == [(False, True), (True, False)]
    y64, leaves = reference(chain, x, params)
    dx, *grads = torch.autograd.grad(y64.sum(), leaves)
    assert close(x.grad, dx) and all(close(p.grad, grad) for p, grad in zip(params, grads, strict=True))


def test_another_default_type(rnm):
    chain, params = simple_chain(rnm)
    torch.set_default_dtype(torch.float64)
    try:
        check(rnm, chain, params, torch.randn(70, 10, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


def test_python_threads_at_once(rnm):
    chain, params = simple_chain(rnm, (23, 64, 64, 1))
    x = torch.randn(300, 23, generator=torch.Generator().manual_seed(0))

    def work(_):
        return torch.autograd.grad(rnm.Chain.apply(chain, x, *params).square().sum(), params)

    with ThreadPoolExecutor(4) as pool:
        for grads in pool.map(work, range(200)):
            assert all(map(torch.equal, grads, work(0)))


def test_without_a_compiler(rnm, cli, monkeypatch):
    rnm.load_kernels.cache_clear()
    for broken in ("/nowhere/cc", "false -m64", "cc '"):
        monkeypatch.setenv("CC", broken)
        with pytest.raises((OSError, ValueError)) as error:
            rnm.load_kernels()
        assert str(error.value).count("\n") == 0
        code, out, err = cli(rnm, "--no-track", "--total-timesteps", 150)
        assert code == 0 and "finished" in out
        assert err.count("warning: going on with --kernel torch") == 1 and err.count("\n") == 1
        code, _, err = cli(rnm, "--no-track", "--kernel", "nm")
        assert code == 2 and err.startswith("error: --kernel nm: ") and err.count("\n") == 1
    rnm.load_kernels.cache_clear()
