"""The vocabulary in pieces on two and four ranks against sums of exponentials in fp64 over the whole of it, and the calls that are refused."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from athanor.kernels import linear_logprob_parallel, sample

WORKER = Path(__file__).with_name("linear_logprob_parallel_worker.py")
inf, nan = torch.inf, torch.nan


def oracle(hidden, weight, targets, support, temperature):
    """Log-probs, entropies and what they are differentiated by, in fp64, one softmax over all that was kept."""
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    z = exact[0] @ exact[1].T / temperature
    if support is not None:
        # Logits in their own type, as the sampler saw them; a piece's may round differently, which must not decide on the token at the threshold.
        seen, threshold = hidden @ weight.T, support[0][:, None]
        seen = torch.where((seen - threshold).abs() < 1e-5, threshold, seen)
        index = torch.arange(len(weight))
        z = z.masked_fill(~((seen > threshold) | ((seen == threshold) & (index <= support[1][:, None])) | (index == targets[:, None])), -inf)
    e = (z - z.detach().amax(1, keepdim=True)).exp()
    p = e / e.sum(1, keepdim=True)
    picked = torch.where(targets >= 0, p.gather(1, targets.clamp_min(0)[:, None])[:, 0], 1.0).log()
    return picked, -torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0).sum(1).detach(), exact


def bounds_of(V: int, world: int, empty: bool) -> list[int]:
    """Pieces of different sizes; with `empty` the first rank has none."""
    inner = [V * (r + 1) // world - (r % 2) for r in range(world - 1)]
    return [0, *([0] + inner[1:] if empty else inner), V]


def case(T: int, V: int, world: int, dtype=torch.float64, temperature: float = 1.0, truncated: bool = False, empty: bool = False,
         chunk: int = 1 << 20):  # fmt: skip
    g = torch.Generator().manual_seed(T + V)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype) for shape in ((T, 24), (V, 24)))
    targets, support = torch.randint(0, V, (T,), generator=g), None
    if truncated:
        drawn = sample((hidden @ weight.T).float(), temperature=temperature, top_k=5, top_p=1.0, min_p=0.0, seeds=torch.arange(T),
                       positions=torch.zeros(T, dtype=torch.int64))  # fmt: skip
        targets, support = drawn.tokens, tuple(drawn.support)
    if T > 2:
        targets[::5] = -100
    dlogps = torch.randn(T, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, targets, support, temperature, dlogps, bounds_of(V, world, empty), chunk


def cases(world: int) -> dict[str, tuple]:
    found = {
        "one row": case(1, 7, world),
        "odd": case(129, 257, world, temperature=0.6),
        "nothing": case(0, 64, world),
        "a rank without rows": case(33, 65, world, empty=True),
        "fp32": case(64, 96, world, torch.float32),
        "truncated": case(64, 96, world, torch.float32, temperature=0.8, truncated=True),
        "chunks": case(64, 97, world, temperature=0.6, chunk=1000),  # of 20 or 40 rows, the last one smaller: logits are computed again
    }
    hidden, *rest = case(16, 40, world)
    hidden[3, 1], hidden[4, 2] = nan, inf
    return found | {"a NaN and an infinity": (hidden, *rest)}


def check(world: int, folder: Path) -> None:
    given = cases(world)
    torch.save(list(given.values()), folder / "cases.pt")
    command = [sys.executable, WORKER, folder / "cases.pt", folder / "found.pt", folder / "store", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, str(r)], env=environment, stderr=subprocess.PIPE, text=True) for r in range(world)]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), errors
    ranks = torch.load(folder / "found.pt")
    for i, (name, (hidden, weight, targets, support, temperature, dlogps, bounds, _)) in enumerate(given.items()):
        parts = [found[i] for found in ranks]
        for part in parts[1:]:  # to the bit, NaN where they are NaN
            assert all(torch.equal(part[k].nan_to_num(7.0), parts[0][k].nan_to_num(7.0)) for k in ("logps", "entropy", "dhidden")), name
        assert [len(part["dweight"]) for part in parts] == [end - first for first, end in pairwise(bounds)]
        dweight = torch.cat([part["dweight"] for part in parts])
        logps, entropy, exact = oracle(hidden, weight, targets, support, temperature)
        trained, finite = targets >= 0, torch.isfinite(hidden).all(1)
        sound = trained & finite
        gradients = torch.autograd.grad(logps[sound], exact, dlogps[sound].double())
        tolerance = 1e-12 if hidden.dtype == torch.float64 else 1e-5

        def close(x, wanted, what, name=name, tolerance=tolerance):
            torch.testing.assert_close(x.double(), wanted.detach(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}, {what}: {m}")

        found = parts[0]
        assert found["logps"].dtype == found["entropy"].dtype == hidden.dtype
        close(found["logps"][sound], logps[sound], "logps")
        close(found["entropy"][sound], entropy[sound], "entropy")
        close(found["dhidden"][sound], gradients[0][sound], "dhidden")
        assert not found["logps"][~trained].any() and not found["dhidden"][~trained].any()
        assert found["logps"][trained & ~finite].isnan().all() and found["dhidden"][trained & ~finite].isnan().all()
        if finite.all():
            close(dweight, gradients[1], "dweight")


@pytest.mark.multiproc
def test_two_ranks_match_the_oracle_with_gradients(tmp_path):
    check(2, tmp_path)


@pytest.mark.slow
@pytest.mark.multiproc
def test_four_ranks_match_the_oracle_with_gradients(tmp_path):
    check(4, tmp_path)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_calls_that_make_no_sense_are_refused(alone):
    hidden, weight, targets = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 5, -100, 9])
    call = dict(first=4, vocab_size=12)
    with pytest.raises(ValueError, match=r"weight is \(6, 7\), hidden is \(4, 8\)"):
        linear_logprob_parallel(hidden, weight[:, :7], targets, **call)
    with pytest.raises(ValueError, match=r"rows 4 to 10 of weight; wanted them in \[0, 9\]"):
        linear_logprob_parallel(hidden, weight, targets, first=4, vocab_size=9)
    with pytest.raises(ValueError, match=r"targets run from -100 to 12; wanted \[0, 12\)"):
        linear_logprob_parallel(hidden, weight, torch.tensor([0, 5, -100, 12]), **call)
    with pytest.raises(ValueError, match="hidden is torch.float32, weight is torch.float64; wanted one dtype"):
        linear_logprob_parallel(hidden, weight.double(), targets, **call)
    with pytest.raises(ValueError, match="temperature is 0; wanted > 0"):
        linear_logprob_parallel(hidden, weight, targets, temperature=0, **call)
