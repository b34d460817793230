"""The CPU kernels against float64, against torch's rules, and their compile cache under attack."""

import copy
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")


class Net(nn.Module):
    """Layers fc1, fc2, ... of the given widths."""

    def __init__(self, widths):
        super().__init__()
        for i, (a, b) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"fc{i}", nn.Linear(a, b))


def nm_net(rnm, widths, n, m, seed=0, head=False, threads=1):
    torch.manual_seed(seed)
    args = rnm.Args(n=n, m=m, kernel="nm", sparse_head=head, threads=threads)
    net = rnm.sparsify(Net(widths), args)
    assert net.kernel == "nm"
    return net


def reference(net, inputs, dtype):
    """The same network, dense in `dtype`: output as a function of leaves, which are returned with it."""
    x = [i.detach().to(dtype).requires_grad_() for i in inputs]
    weights = [layer.weight.detach().to(dtype).requires_grad_() for layer in net.children()]
    biases = [layer.bias.detach().to(dtype).requires_grad_() for layer in net.children()]
    y = torch.cat(x, 1)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        y = F.linear(y if i == 0 else F.relu(y), w, b)
    return y, x, weights, biases


def close(a, b):
    return (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


SHAPES = [
    ((17, 6), (256, 256, 1), 256),
    ((27,), (256, 256, 8), 256),
    ((105, 8), (256, 256, 1), 100),
    ((348, 17), (64, 64, 1), 65),
    ((11,), (70, 33, 3), 1),
    ((3, 1), (16, 16, 16, 2), 300),
    ((5,), (16, 1), 63),
    ((40, 2), (513, 300, 20), 129),
]


def flat_grad(net, weights, biases):
    """Dense gradients as those of net's flat parameter: each layer's active weights, then its bias."""
    layers = zip(net.children(), weights, biases, strict=True)
    return torch.cat([g for layer, dw, db in layers for g in (dw.gather(1, layer.index).flatten(), db)])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (4, 8), (1, 16), (3, 5), (7, 7)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_three_products_against_float64(rnm, shape, n, m):
    inputs, hidden, batch = shape
    count = 1 + batch % 3 if hidden[0] <= 70 else 1  # 65,536 units and more: one is near 0, where ReLU is a step
    nets = [nm_net(rnm, (sum(inputs), *hidden), n, m, seed, head=batch % 2 == 1) for seed in range(count)]
    generator = torch.Generator().manual_seed(batch)
    x = [torch.randn(batch, width + 3, generator=generator)[:, 1 : width + 1].requires_grad_() for width in inputs]
    y = rnm.mlp(nets, *x)
    dy = [torch.randn(out.shape, generator=generator) for out in y]
    flats = [net.fc1.flat for net in nets]
    grads = torch.autograd.grad(y, [*x, *flats], dy)
    dx64 = [0.0] * len(x)
    for net, out, dout, grad in zip(nets, y, dy, grads[len(x) :], strict=True):
        y64, x64, weights, biases = reference(net, x, torch.float64)
        expected = torch.autograd.grad(y64, [*x64, *weights, *biases], dout.double())
        dx64 = [a + b for a, b in zip(dx64, expected[: len(x)], strict=True)]
        assert close(out, y64)
        dw, db = expected[len(x) :][: len(weights)], expected[len(x) + len(weights) :]
        wanted, start = flat_grad(net, dw, db), 0
        for layer in net.children():
            for size in (layer.index.numel(), len(layer.bias)):  # each product by its own largest value
                assert close(grad[start : start + size], wanted[start : start + size])
                start += size
        assert start == len(grad)
    for grad, wanted in zip(grads[: len(x)], dx64, strict=True):
        assert grad.shape == wanted.shape and close(grad, wanted)
    with torch.no_grad():
        for out, alone, net in zip(rnm.mlp(nets, *x), rnm.mlp(nets, *(i[:1] for i in x)), nets, strict=True):
            y64 = reference(net, x, torch.float64)[0]
            assert close(out, y64) and close(alone, y64[:1])  # batch 1 has a path of its own


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_with_any_number_of_threads(rnm, threads):
    results = []
    for count in (1, threads, 1):
        net = nm_net(rnm, (23, 256, 256, 1), 1, 8, threads=count)
        x = torch.randn(300, 23, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(20):
            y = rnm.mlp([net], x)[0]
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_two_forwards_before_one_backward(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    a, b = (torch.randn(70, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    loss = rnm.mlp([net], a)[0].square().mean() + rnm.mlp([net], b)[0].mean()
    loss.backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.kernel = "torch"
    net.zero_grad()
    (rnm.mlp([net], a)[0].square().mean() + rnm.mlp([net], b)[0].mean()).backward()
    for p, grad in zip(net.parameters(), got, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_what_changes_between_forward_and_backward_raises(rnm):
    nets = [nm_net(rnm, (10, 64, 64, 1), 1, 4) for _ in range(3)]
    net, optimizer = nets[1], rnm.make_agent(*nets, 1e-3).q_optimizer
    x = torch.randn(70, 10)
    rnm.mlp([net], x)[0].sum().backward()
    y = rnm.mlp([net], x)[0].sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    y = rnm.mlp([net], x)[0].sum()
    net.fc1.index.copy_(net.fc1.index.clone())
    with pytest.raises(RuntimeError, match="mask was modified by an inplace operation"):
        y.backward()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="--kernel torch"):
        torch.autograd.grad(rnm.mlp([net], x)[0].sum(), x, create_graph=True)


def test_only_what_is_needed_gets_a_gradient(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    a, b = torch.randn(70, 7), torch.randn(70, 3, requires_grad=True)
    net.requires_grad_(False)
    rnm.mlp([net], a, b)[0].sum().backward()
    assert a.grad is None and all(p.grad is None for p in net.parameters())
    y64, x64, *_ = reference(net, (a, b), torch.float64)
    assert close(b.grad, torch.autograd.grad(y64.sum(), x64[1])[0])


def test_new_masks_and_copies_are_seen(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    x = torch.randn(70, 10)
    rnm.mlp([net], x)[0]
    twin = copy.deepcopy(net)
    for layer in rnm.nm_layers(net).values():
        E = rnm.project(torch.randn(layer.W.shape), 1, 4)
        layer.E.copy_(E)
        layer.index.copy_(E.nonzero()[:, 1].view_as(layer.index))
    for network in (net, twin):
        assert network.fc1.flat is network.fc3.flat
        network.fc1.flat.data = network.fc1.flat.data.clone()  # other memory, too
    for network in (net, twin):
        assert close(rnm.mlp([network], x)[0], reference(network, (x,), torch.float64)[0])


def test_nan_comes_through(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    x = torch.randn(70, 10)
    x[5, int(net.fc1.index[3, 0])] = torch.nan
    with torch.no_grad():
        net.fc1.bias[3] = 100.0  # the unit is on
        y, wanted = rnm.mlp([net], x)[0], reference(net, (x,), torch.float32)[0]
    assert wanted[5].isnan().all() and torch.equal(y.isnan(), wanted.isnan())


def test_wrong_inputs_are_refused(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    for inputs in (
        [torch.randn(70, 10).double()], [torch.randn(70, 9)], [torch.randn(70, 11)],
        [torch.zeros(70, 10, dtype=torch.long)], [torch.randn(70, 7), torch.randn(5, 3)], [torch.randn(7, 10, 10)],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="N:M kernels take float32"):
            rnm.mlp([net], *inputs)[0]
    with pytest.raises(ValueError, match="N:M kernels take float32"):
        rnm.mlp([net.double()], torch.randn(70, 10))


def test_replaced_buffers_are_seen(rnm):
    net, other = nm_net(rnm, (10, 64, 64, 1), 1, 4), nm_net(rnm, (10, 64, 64, 1), 1, 4, seed=1)
    x = torch.randn(70, 10)
    rnm.mlp([net], x)
    net.load_state_dict(other.state_dict())
    for layer, twin in zip(net.children(), other.children(), strict=True):
        layer.index = twin.index
    assert close(rnm.mlp([net], x)[0], reference(other, (x,), torch.float64)[0])


def test_memory_of_a_pass_is_its_own_while_its_graph_lives(rnm):
    nets = [nm_net(rnm, (10, 64, 64, 1), 1, 4, seed) for seed in (0, 1)]
    a, b = torch.randn(70, 10), torch.randn(70, 10)
    flats = [net.fc1.flat for net in nets]
    first = sum(y.square().sum() for y in rnm.mlp(nets, a))
    grads = torch.autograd.grad(first, flats, retain_graph=True)
    for _ in range(3):  # these may not take what the first pass still needs
        sum(y.square().sum() for y in rnm.mlp(nets, b)).backward()
    again = torch.autograd.grad(first, flats, retain_graph=True)
    assert all(torch.equal(g, h) for g, h in zip(grads, again, strict=True))
    plan = nets[0].plans[tuple(map(id, nets))]
    free = [memory.data_ptr() for memory in plan.free]
    assert len(free) == 1  # three passes, one after another, made do with one piece of memory
    del first
    assert len(plan.free) == 2  # and the first one's came back with its graph


def test_networks_that_come_and_go(rnm):
    """A plan must never be taken for other networks than those that it was made for."""
    x, first = torch.randn(70, 10), nm_net(rnm, (10, 64, 64, 1), 1, 4)
    for seed in range(30):  # one takes the memory, and so the id, of the one before
        other = nm_net(rnm, (10, 64, 64, 1), 1, 4, seed)
        got = rnm.mlp([first, other], x)
        assert close(got[0], reference(first, (x,), torch.float64)[0])
        assert close(got[1], reference(other, (x,), torch.float64)[0])
        del other, got
    assert len(first.plans) <= 8
    twin = nm_net(rnm, (10, 64, 64, 1), 1, 4, seed=99)
    for name, layer in twin.named_children():
        setattr(first, name, layer)
    assert close(rnm.mlp([first], x)[0], reference(twin, (x,), torch.float64)[0])


def test_networks_that_do_not_fit_are_refused(rnm):
    class TwoHeads(Net):
        def __init__(self):
            super().__init__((11, 64, 64, 3))
            self.fc_log_std = nn.Linear(64, 3)

    args = rnm.Args(n=1, m=4, kernel="nm")
    with pytest.raises(ValueError, match="chains of layers"):
        rnm.mlp([rnm.sparsify(TwoHeads(), args)], torch.randn(130, 11))
    with pytest.raises(ValueError, match="chains of layers"):
        rnm.mlp([nm_net(rnm, (10, 64, 1), 1, 4), nm_net(rnm, (14, 64, 1), 1, 4)], torch.randn(70, 10))
    with pytest.raises(ValueError, match="65,536"):
        rnm.mlp([nm_net(rnm, (4, 65_540), 1, 4)], torch.randn(70, 4))
    net = nm_net(rnm, (10, 64, 1), 1, 4)
    net.load_state_dict(net.state_dict(), assign=True)
    with pytest.raises(ValueError, match="share one flat parameter"):
        rnm.mlp([net], torch.randn(70, 10))


def test_networks_of_different_shapes_and_one_output_used(rnm):
    nets = [nm_net(rnm, (23, 64, 1), 1, 4), nm_net(rnm, (23, 33, 70, 5), 1, 8, seed=1), nm_net(rnm, (23, 16, 2), 2, 4)]
    x = torch.randn(130, 23, requires_grad=True)
    loss = rnm.mlp(nets, x)[1].square().sum()
    flats = [net.fc1.flat for net in nets]
    dx, *grads = torch.autograd.grad(loss, [x, *flats])
    y64, x64, weights, biases = reference(nets[1], (x,), torch.float64)
    dx64, *rest = torch.autograd.grad(y64.square().sum(), [*x64, *weights, *biases])
    assert close(dx, dx64) and close(grads[1], flat_grad(nets[1], rest[:3], rest[3:]))
    assert (grads[0] == 0).all() and (grads[2] == 0).all()


def test_three_inputs_and_none_at_all(rnm):
    net = nm_net(rnm, (10, 64, 64, 1), 1, 4)
    x = [torch.randn(70, width, requires_grad=True) for width in (4, 3, 3)]
    y = rnm.mlp([net], *x)[0]
    y64, x64, *_ = reference(net, x, torch.float64)
    assert close(y, y64)
    for got, wanted in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(y64.sum(), x64), strict=True):
        assert close(got, wanted)
    nothing = torch.empty(0, 10, requires_grad=True)
    _ = [torch.full((len(net.fc1.flat),), 7.0) for _ in range(9)]  # what is freed here must not be found again
    del _
    rnm.mlp([net], nothing)[0].sum().backward()
    assert (net.fc1.flat.grad == 0).all() and nothing.grad.shape == (0, 10)


def test_what_torch_allows(rnm):
    """An input changed after the forward pass, another default type, pickled networks."""
    net, x = nm_net(rnm, (10, 64, 64, 1), 1, 4), torch.randn(70, 10)
    (wanted,) = torch.autograd.grad(rnm.mlp([net], x)[0].sum(), [net.fc1.flat])
    y, old = rnm.mlp([net], x)[0].sum(), x.clone()
    x.add_(1.0)
    assert torch.equal(torch.autograd.grad(y, [net.fc1.flat])[0], wanted)
    torch.set_default_dtype(torch.float64)
    try:
        (again,) = torch.autograd.grad(rnm.mlp([net], old)[0].sum(), [net.fc1.flat])
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32 and torch.equal(again, wanted)
    net.__class__ = nn.Module  # Net is not importable by its name where it is loaded
    twin = pickle.loads(pickle.dumps(net))
    assert twin.plans and torch.equal(rnm.mlp([twin], old)[0], rnm.mlp([net], old)[0])


def test_auto_without_avx_keeps_torchs_threads(rnm, monkeypatch):
    class NoAvx:
        def nm_lanes(self):
            return 16

        def nm_threads(self, _):
            pytest.fail("the kernels are not used")

    monkeypatch.setattr(rnm, "load_kernels", NoAvx)
    torch.set_num_threads(2)
    assert rnm.pick_kernel(rnm.Args(n=2, m=4, threads=2)) == "torch" and torch.get_num_threads() == 2
    torch.set_num_threads(1)


THREADS = """
import os, sys, threading, torch
sys.path.insert(0, "tests")
import rnm_td3_continuous as rnm
from test_kernels import nm_net
x = torch.randn(300, 23)
for threads in (2, 3, 5, 8, 4, 9, 1, 2):
    net = nm_net(rnm, (23, 64, 64, 1), 1, 8, threads=threads)
    for _ in range(30):
        y = rnm.mlp([net], x)[0]
        y.sum().backward()
nets = [nm_net(rnm, (23, 64, 64, 1), 1, 8, threads=2) for _ in range(2)]
def work(net):
    for _ in range(200):
        assert torch.equal(rnm.mlp([net], x)[0], y)
crowd = [threading.Thread(target=work, args=(net,)) for net in nets]
[thread.start() for thread in crowd]
[thread.join() for thread in crowd]
alone = nm_net(rnm, (23, 64, 64, 1), 1, 8, threads=1)
stop = False
def forever():
    while not stop:
        rnm.mlp([alone], x)
busy = threading.Thread(target=forever)
busy.start()
for _ in range(5):  # while another thread is in a kernel
    child = os.fork()
    if child == 0:
        os._exit(0 if rnm.mlp([alone], x)[0].shape == (300, 1) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
busy.join()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(rnm.mlp([nets[0]], x)[0], y) else 1)
assert os.waitpid(child, 0)[1] == 0
print("well")
"""


def test_changing_threads_python_threads_and_fork():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "well\n", done.stderr


def test_as_near_to_torch_as_one_ulp(rnm):
    """Static masks: kernels leave torch's path no faster than torch itself does after a one-ulp change at the start."""

    def run(kernel, ulp=False):
        args = rnm.Args(env_id="Reach-v0", hidden_dim=64, batch_size=64, n=1, m=4, kernel=kernel, track=False)
        env = rnm.make_env(args.env_id)
        agent = rnm.make_agent(*rnm.make_networks(args, env, 0), args.learning_rate)
        if ulp:
            with torch.no_grad():
                for net in (agent.actor, agent.qf1, agent.qf2):
                    for p in net.parameters():
                        p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
        rb, rng = rnm.ReplayBuffer(500, env, "cpu"), rnm.make_generators(0, "cpu")
        rb.added, rb.array[:] = 500, torch.randn(rb.array.shape, generator=torch.Generator().manual_seed(1)).numpy()
        rb.array[:, -1] = 0
        found = []
        for update in range(1, 1001):
            rnm.update_agent(agent, rb, args, rng, update)
            if update in (10, 100, 1000):
                found.append(torch.cat([p.detach().flatten().clone() for p in agent.online_parameters]))
        return found

    torch_path, kernels, moved = run("torch"), run("nm"), run("torch", ulp=True)
    for a, b, c in zip(torch_path, kernels, moved, strict=True):
        assert 0 < (a - b).abs().mean() <= 5 * (a - c).abs().mean()


LOAD = "import rnm_td3_continuous as r; print(r.load_kernels().nm_lanes(), r.load_kernels()._name)"


def start(tmp_path, code=LOAD, **environ):
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | environ
    return subprocess.Popen([sys.executable, "-c", code], env=environ, text=True, stdout=-1, stderr=-1)


@pytest.mark.slow
def test_compile_cache_under_attack(tmp_path):
    folder = tmp_path / "cache" / "nm-sparse-rl"
    waiting = tmp_path / "slow-cc"  # a compiler that can be killed at work
    waiting.write_text('#!/bin/sh\ncase "$*" in *-dM*) exec cc "$@";; esac\ntouch "$0.started"\nsleep 60\n')
    waiting.chmod(0o755)
    killed = start(tmp_path, CC=str(waiting))
    for _ in range(3000):
        if (tmp_path / "slow-cc.started").exists():
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not list(folder.glob("*.so"))

    crowd = [start(tmp_path) for _ in range(4)]  # an empty cache, all at once
    outputs = [process.communicate() for process in crowd]
    assert all(process.returncode == 0 for process in crowd), outputs
    assert len(list(folder.iterdir())) == 1 and all(out.split()[0] in ("32", "64") for out, _ in outputs)

    library = next(folder.iterdir())
    stamp = library.stat().st_mtime_ns
    again = start(tmp_path).communicate()[0]
    assert str(library) in again and library.stat().st_mtime_ns == stamp  # taken, not compiled

    (tmp_path / "file").write_text("")  # where no folder can be made
    unwritable = start(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert unwritable.communicate()[0].split()[0] in ("32", "64") and unwritable.returncode == 0


def test_without_a_compiler(rnm, cli, monkeypatch, tmp_path):
    rnm.load_kernels.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for broken in ("/nowhere/cc", "false -m64"):
        monkeypatch.setenv("CC", broken)
        code, out, err = cli(rnm, "--no-track", "--total-timesteps", 150)
        assert code == 0 and "finished" in out
        assert err.count("warning: going on with --kernel torch") == 1 and err.count("\n") == 1
        code, _, err = cli(rnm, "--no-track", "--kernel", "nm")
        assert code == 2 and err.startswith("error: --kernel nm: ") and err.count("\n") == 1
    rnm.load_kernels.cache_clear()


def test_training_with_two_threads_is_training_with_one(rnm, small):
    runs = [rnm.train(small(rnm, n=1, m=4, kernel="nm", threads=threads)) for threads in (1, 2)]
    models = [torch.load(f"{run['run_dir']}/model.pt", weights_only=True) for run in runs]
    assert all(torch.equal(models[0][net][key], models[1][net][key]) for net in models[0] for key in models[0][net])
