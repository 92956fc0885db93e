"""What the kernel tests share: the tolerance rule of the design, as a fixture because tests/ is no package."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.kernels import _cuda

_emulators = tempfile.TemporaryDirectory()


def _within_rule(got, plain, oracle, what=""):
    """Error against fp64 <= 2 x the error of the textbook formula in the same dtype + 2 ulp of the largest value."""
    assert got.dtype == plain.dtype and got.shape == oracle.shape, what
    if oracle.numel() == 0:
        return
    oracle = oracle.double()
    ulp = torch.finfo(got.dtype).eps * oracle.abs().max()
    error, allowed = (got.double() - oracle).abs().max(), 2 * (plain.double() - oracle).abs().max() + 2 * ulp
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def _close64(got, oracle, what=""):
    """fp64 in, fp64 out: 1e-12 of the largest value."""
    assert got.dtype == torch.float64 and got.shape == oracle.shape, what
    if oracle.numel():
        error = (got - oracle).abs().max()
        assert error <= 1e-12 * max(1.0, oracle.abs().max()), f"{what}: {error:.3e}"


def _keep_largest(logits, counts):
    """The support that keeps the counts[t] largest logits of row t, of equal ones the lowest index first, and its mask (T, V): a sort."""
    thresholds, last_kept = torch.full_like(logits[:, 0], -torch.inf), torch.full((len(logits),), logits.shape[1] - 1)
    keep = torch.zeros(logits.shape, dtype=torch.bool)
    for t, (row, n) in enumerate(zip(logits.tolist(), counts, strict=True)):
        kept = sorted(range(len(row)), key=lambda v, row=row: (-row[v], v))[:n]
        keep[t, kept] = True
        if n < len(row):  # else not truncated
            lowest = min((row[v] for v in kept), default=torch.inf)
            thresholds[t], last_kept[t] = lowest, max((v for v in kept if row[v] == lowest), default=-1)
    return (thresholds, last_kept), keep


@pytest.fixture
def keep_largest():
    return _keep_largest


@pytest.fixture
def within_rule():
    return _within_rule


@pytest.fixture
def close64():
    return _close64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def poisoned():
    """Memory that a kernel allocates holds NaN, or the largest integer, until it writes there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def padded():
    """x (..., D) in place of which stands a slice of a larger tensor that is NaN everywhere else; its rows are not neighbours."""

    def place(x):
        buffer = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
        buffer[..., 2:-3] = x.detach()
        return buffer[..., 2:-3].requires_grad_(x.requires_grad)

    return place


@pytest.fixture
def with_threads():
    """Call a function under 1, 2, 3 and 7 threads and return the results."""
    before = torch.get_num_threads()

    def results(call):
        out = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out.append(call())
        return out

    yield results
    torch.set_num_threads(before)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request):
    """Device for a test of a Triton kernel: the GPU, or the CPU where this very process has the interpreter on (see test_interpreter.py)."""
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: test_interpreter.py runs it in a process of its own")
    return torch.device("cpu")


@cache
def _emulator(stem, kernel, options):
    """The kernel in host C++; the folder goes with the process."""
    folder = Path(_emulators.name, str(len(os.listdir(_emulators.name))))
    folder.mkdir()
    (folder / "kernel.cpp").write_text(f'#include "cuda_emulation.hpp"\n#include "{stem}.cu"\nEMULATE({kernel})\n')
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC", *options,
               f"-I{Path(__file__).parent}", f"-I{_cuda.FOLDER}", "kernel.cpp", "-o", "kernel.so"]  # fmt: skip
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "kernel.so")).emulate


@pytest.fixture
def emulated_cuda(monkeypatch):
    """Call it, and CUDA kernels run on CPU tensors, as host C++ (cuda_emulation.hpp), their copies as early or as late as they can be."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")

    def emulate(late: bool, multiprocessors: int, shared: int) -> None:
        monkeypatch.setattr(_cuda, "load", partial(load, late))
        monkeypatch.setattr(_cuda, "limits", lambda device: (multiprocessors, shared))

    def load(late, stem, kernel, options, shared, device):
        emulate = _emulator(stem, kernel, options)

        def launch(blocks, threads, arguments):
            places = [np.array(x) for x in arguments]
            pointers = (ctypes.c_void_p * len(places))(*(x.ctypes.data for x in places))
            assert emulate(blocks, threads, shared, int(late), pointers) == 0, "the threads wait for each other"

        return launch

    return emulate


@pytest.fixture
def rowwise_products(monkeypatch):
    """Give the interpreter's products what a GPU's have: a row's bits do not depend on its place or on the other rows, and sums are ascending.

    The interpreter hands tl.dot to numpy's BLAS, which rounds a row by its place in the matrix.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *options):
        total = d.data.copy()
        for column, row in zip(a.data.T.astype(total.dtype), b.data.astype(total.dtype), strict=True):
            total += column[:, None] * row
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@dataclass
class Launches:
    keys: set = field(default_factory=set)  # (kernel, specialisation, options): what Triton would compile
    grids: list = field(default_factory=list)


@pytest.fixture
def launches(monkeypatch):
    """Records every launch with the cache key that it has on an H100, and runs nothing.  Needs no GPU; outputs keep what their memory held."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler in this process")
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, recorded = make_backend(GPUTarget("cuda", 90, 32)), Launches()
    binders = {}

    def run(self, *args, grid, warmup, **kwargs):
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = binders[self](*args, **kwargs)
        recorded.keys.add((self.__name__, str(specialisation), str(sorted(options.items()))))
        recorded.grids.append(grid)

    monkeypatch.setattr(JITFunction, "run", run)
    return recorded


class GrpoOracle:
    """Batches for logits_grpo and linear_grpo, and their loss written out over autograd, one sequence at a time (kernels.md appendix B)."""

    EXTRA = {"two_sided": {"delta": 1.7}, "dual_clip": {"dual_clip": 2}, "constant": {"max_tokens": 20}}
    BOUNDS = {
        "tis": {"correction_high": 1.3},
        "token_mask": {"correction_low": 0.7, "correction_high": 1.4},
        "sequence_mask": {"correction_high": 1.5},
    }

    def variant(self, ratio="token", surrogate="clip", aggregation="token_mean", kl="none", correction="none"):
        from athanor.kernels import LossVariant

        more = self.EXTRA.get(surrogate, {}) | self.EXTRA.get(aggregation, {}) | self.BOUNDS.get(correction, {})
        return LossVariant(ratio=ratio, surrogate=surrogate, aggregation=aggregation, kl=kl, correction=correction, beta=0.05 * (kl != "none"),
                           clip_high=0.3, **more)  # fmt: skip

    def batch(self, lengths=(5, 0, 9, 1, 8), V=37, D=11, seed=0):
        """Inputs in fp64.  The old policy is near enough that some tokens clip and some do not; sequence 2 has advantage 0; some targets are -100."""
        g = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        T, S = sum(lengths), len(lengths)
        hidden, weight, targets = randn(T, D), randn(V, D) / D**0.5, torch.randint(0, V, (T,), generator=g)
        logps = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        old, ref = logps + 0.3 * randn(T), logps + 0.4 * randn(T)
        advantages = randn(S)
        advantages[2:3] = 0.0
        tokens = dict(ref_logps=ref, rollout_logps=old + 0.2 * randn(T), mask=torch.rand(T, generator=g) < 0.8)
        cu = torch.cat([torch.zeros(1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)])
        targets[torch.rand(T, generator=g) < 0.1] = -100
        return hidden, weight, (targets, old, advantages, cu), tokens

    def loss(self, logits, targets, old, advantages, cu, ref_logps, rollout_logps, mask, v, temperature=1.0, num_tokens=None, num_sequences=None):
        """The loss in logits' dtype, differentiable, and the entropy sum."""
        log_p = (logits / temperature).log_softmax(-1)
        keep = mask & (targets >= 0)
        rows = [torch.tensor([t for t in range(a, b) if keep[t]], dtype=torch.long) for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
        num_tokens = max(int(keep.sum()), 1) if num_tokens is None else num_tokens
        num_sequences = max(sum(len(r) > 0 for r in rows), 1) if num_sequences is None else num_sequences
        lo, hi = 1 - v.clip_low, 1 + v.clip_high
        total = logits.sum() * 0 if logits.isfinite().all() else logits.new_zeros(())
        for s, row in enumerate(rows):
            if not len(row):
                continue
            a, lp = advantages[s], log_p[row, targets[row]]
            o = lp.detach() if old is None else old[row]
            d = lp - o
            if v.ratio == "sequence":
                d = d.mean().expand(len(row))
            if v.ratio == "sequence_token":
                d = lp - lp.detach() + d.mean().detach()
            r = d.exp()
            clipped = -torch.min(r * a, r.clamp(lo, hi) * a)
            tau = v.tau_positive if a > 0 else v.tau_negative
            term = {
                "clip": lambda x=clipped: x,
                "dual_clip": lambda x=clipped, a=a: torch.min(x, -v.dual_clip * a) if a < 0 else x,
                "two_sided": lambda r=r, a=a: -torch.min(r.clamp(max=v.delta) * a, r.clamp(lo, hi) * a),
                "cispo": lambda r=r, a=a, lp=lp: -r.detach().clamp(lo, hi) * a * lp,
                "sapo": lambda r=r, a=a, tau=tau: -(4 / tau) * torch.sigmoid(tau * (r - 1)) * a,
                "reinforce": lambda a=a, lp=lp: -a * lp,
            }[v.surrogate]()
            if v.correction != "none":
                log_rho = o - rollout_logps[row]
                rho = (log_rho.sum().expand(len(row)) if v.correction == "sequence_mask" else log_rho).exp()
                inside = (rho >= v.correction_low) & (rho <= v.correction_high)
                term = term * (rho.clamp(max=v.correction_high) if v.correction == "tis" else rho * inside)
            if v.kl != "none":
                e = ref_logps[row] - lp
                term = term + v.beta * {"k1": -e, "k2": e.square() / 2, "k3": e.exp() - e - 1}[v.kl]
            denominator = {"token_mean": num_tokens, "sequence_mean": num_sequences * len(row)}.get(v.aggregation) or num_sequences * v.max_tokens
            total = total + term.sum() / denominator
        kept = log_p.detach()[keep]
        return total, -(kept.exp() * kept.clamp_min(torch.finfo(kept.dtype).min)).sum()


@pytest.fixture
def grpo():
    return GrpoOracle()
