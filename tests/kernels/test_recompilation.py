"""Lengths, sequence counts, bounds and temperatures vary from step to step: none of them may compile a kernel anew.

Counted without a GPU: the `launches` fixture records the cache key that every launch would have on an H100.
"""

import importlib
import itertools

import pytest
import torch

from athanor.kernels import LossVariant, group_advantage, grpo_loss, policy_loss

triton = pytest.importorskip("triton")
tl = triton.language


def batch(lengths, start, g):
    """A packed batch whose tensors are slices that begin at element `start` of a larger one, as micro-batches do."""
    N, S = sum(lengths), len(lengths)
    logps, old, ref, rollout = (torch.randn(start + N, generator=g)[start:] for _ in range(4))
    mask = (torch.rand(start + N, generator=g) < 0.8)[start:]
    cu = torch.tensor([0] * (start + 1) + list(itertools.accumulate(lengths)), dtype=torch.int32)[start:]
    rewards = torch.randn(start + S, generator=g)[start:]
    return logps.requires_grad_(), old, rewards, cu, {"ref_logps": ref, "rollout_logps": rollout, "mask": mask}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Nothing is run, so tensors on the CPU may reach the launches without the interpreter."""
    monkeypatch.setattr(importlib.import_module("athanor.kernels._triton"), "interpreting", lambda: True)


def names(launches):
    return sorted(name for name, *_ in launches.keys)


def test_policy_loss_compiles_once_per_variant(launches, generator):
    """50 lengths, counts and bounds, in both forms of denominators: one entry per kernel, and one more of the token kernel for another variant."""
    for n in range(50):
        lengths = torch.randint(0, 1 + 13 * n, (1 + n % 17,), generator=generator).tolist()
        lengths[0] += 1
        logps, old, rewards, cu, tensors = batch(lengths, n % 5, generator)
        bounds = {"clip_low": [0.1, 0.2, 1][n % 3], "clip_high": 0.1 + n / 100, "beta": [1, 0.04][n % 2], "correction_high": 1 + n}
        v = LossVariant(kl="k3", correction="tis", **bounds)
        counts = {"num_tokens": 16 * n + 1, "num_sequences": torch.tensor(n + 1)} if n % 2 else {}
        loss, _ = policy_loss(logps, old, rewards, cu, **tensors, variant=v, **counts, backend="triton")
        loss.backward()
    assert names(launches) == ["finish_kernel", "policy_loss_fwd_kernel", "sequence_fwd_kernel"], launches.keys
    policy_loss(logps, old, rewards, cu, **tensors, variant=LossVariant(surrogate="dual_clip", kl="k3", beta=0.1, correction="tis"), backend="triton")
    assert names(launches) == ["finish_kernel", "policy_loss_fwd_kernel", "policy_loss_fwd_kernel", "sequence_fwd_kernel"]


def test_group_advantage_and_grpo_loss_compile_once_per_option(launches, generator):
    for n in range(50):
        lengths = [1 + n] * (1 + n % 33)
        logps, old, rewards, cu, _ = batch(lengths, n % 5, generator)
        ids = torch.randint(0, 4, (n % 3 + len(lengths),), generator=generator)[n % 3 :]
        group_advantage(rewards, ids, eps=[1, 1e-6, 0.0][n % 3], backend="triton")
        grpo_loss(logps, old, rewards, ids, cu, eps=1e-6 * (n + 1), backend="triton")
    assert names(launches) == ["finish_kernel", "group_advantage_kernel", "policy_loss_fwd_kernel", "sequence_fwd_kernel"], launches.keys
    group_advantage(rewards, ids, scale="batch", backend="triton")
    assert names(launches).count("group_advantage_kernel") == 2


def test_the_count_sees_a_kernel_that_specialises(launches):
    """What the kernels above must not do: an integer whose value 1 or divisibility by 16 is compiled in, and a pointer whose alignment is."""
    x = torch.zeros(64)
    for S in (1, 16, 17):
        _specialised[(1,)](x, S, BLOCK=16)
    assert len(launches.keys) == 3
    _specialised[(1,)](x[1:], 17, BLOCK=16)
    assert len(launches.keys) == 4
    _specialised[(1,)](x, 17, BLOCK=32)  # a length as a compile-time value
    assert len(launches.keys) == 5


@triton.jit
def _specialised(x_ptr, S, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < S)
