import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from athanor.kernels import linear_logprob, logprob, sample
from athanor.kernels.linear_logprob import PLAIN_LOGITS, linear_op

SIZES = [(1, 7), (128, 96), (129, 257), (0, 64)]  # one row, aligned, both odd, empty
PATHS = ["plain", "tiles"]
inf, nan = torch.inf, torch.nan


@pytest.fixture
def path(request, monkeypatch):
    """Either autograd keeps all logits, or tiles of 10 x 24 are computed one after the other, the last ones smaller, the first three kept."""
    if request.param == "tiles":
        scope = linear_op.backends["reference"].run.__globals__
        monkeypatch.setitem(scope, "PLAIN_LOGITS", -1)
        monkeypatch.setitem(scope, "KEPT_LOGITS", 3 * 240)
        monkeypatch.setitem(scope, "TILE", (10, 24))
    return request.param


def oracle(logits, targets, temperature, keep=None):
    """Sum of exponentials by hand, in fp64, one row at a time, over the tokens of the mask `keep` and the target."""
    logps, entropies = [], []
    for t, (z, y) in enumerate(zip(logits / temperature, targets.tolist(), strict=True)):
        kept = [v for v in range(len(z)) if keep is None or keep[t, v] or v == y]
        e = torch.exp(z - z[kept].max())
        p = e[kept] / e[kept].sum()
        logps.append(torch.log(e[y] / e[kept].sum()) if y >= 0 else z.sum() * 0)
        entropies.append(-(p * torch.where(p > 0, p, 1.0).log()).sum())
    empty = logits.sum(1)
    return (torch.stack(logps), torch.stack(entropies)) if logps else (empty, empty.detach())


def inputs(T, V, generator, dtype=torch.float64, D=24):
    hidden, weight = (torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in ((T, D), (V, D)))
    targets = torch.randint(0, V, (T,), generator=generator)
    if T > 2:
        targets[::5] = -100
    return hidden, weight, targets, torch.randn(T, generator=generator)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 5.0])
@pytest.mark.parametrize("T, V", SIZES)
def test_matches_the_oracle_in_fp64_with_gradients(T, V, temperature, path, close64, generator):
    hidden, weight, targets, g = inputs(T, V, generator)
    logits = (hidden @ weight.T).detach().requires_grad_()
    want_logps, want_entropy = oracle(logits, targets, temperature)
    dz = torch.autograd.grad(want_logps, logits, g.double())[0]
    got = linear_logprob(hidden, weight, targets, temperature=temperature)
    assert got.argmax is None
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    dhidden, dweight = torch.autograd.grad(got.logps, (hidden, weight), g.double())
    close64(dhidden, dz @ weight.detach())
    close64(dweight, dz.T @ hidden.detach())


def quarters(*shape, generator, dtype=torch.float64):
    """Numbers whose products and sums are exact in every dtype, so that a logit has the same bits in any tile, and ties are ties."""
    return (torch.randint(-3, 4, shape, generator=generator) / 4).to(dtype).requires_grad_()


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("T, V", SIZES)
def test_a_support_restricts_the_softmax_and_its_gradients(T, V, temperature, path, close64, keep_largest, generator):
    """Rows that keep everything, one token, a few with ties at the threshold, and nothing but the target, which lies inside or outside."""
    hidden, weight = quarters(T, 24, generator=generator), quarters(V, 24, generator=generator)
    _, _, targets, g = inputs(T, V, generator)
    logits = (hidden @ weight.T).detach().requires_grad_()
    counts = [V, 1, 2, V // 2, 0, V - 1, 5]  # a skipped row keeps at least one token: of nothing there is no entropy
    support, keep = keep_largest(logits, [max(counts[t % 7], y < 0) for t, y in enumerate(targets.tolist())])
    if T > 1:
        ties, outside = (logits == support[0][:, None]) & ~keep, ~keep[torch.arange(T), targets.clamp(0)] & (targets >= 0)
        assert ties.any() and outside.any() and (~outside & (targets >= 0)).any()
    want_logps, want_entropy = oracle(logits, targets, temperature, keep)
    dz = torch.autograd.grad(want_logps, logits, g.double())[0]
    got = linear_logprob(hidden, weight, targets, temperature=temperature, support=support, return_argmax=True)
    close64(got.logps, want_logps)
    close64(got.entropy, want_entropy)
    assert torch.equal(got.argmax, logits.argmax(1))  # of all tokens
    dhidden, dweight = torch.autograd.grad(got.logps, (hidden, weight), g.double())
    close64(dhidden, dz @ weight.detach())
    close64(dweight, dz.T @ hidden.detach())
    same = logprob(logits, targets, temperature=temperature, support=support)
    close64(got.logps, same.logps)
    close64(got.entropy, same.entropy)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_what_the_sampler_drew(dtype, path, within_rule, generator):
    hidden, weight = quarters(60, 24, generator=generator, dtype=dtype), quarters(97, 24, generator=generator, dtype=dtype)
    logits, rows = hidden.detach().float() @ weight.detach().float().T, torch.arange(60)
    backend = "reference" if dtype == torch.bfloat16 or path == "tiled" else None  # what serves `hidden` by default must have drawn, too
    drawn = sample(logits, temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, seeds=rows, positions=rows, backend=backend)
    got = linear_logprob(hidden, weight, drawn.tokens, temperature=0.7, support=drawn.support, backend=backend).logps
    wide = logits.double()
    want, _ = oracle(wide, drawn.tokens, 0.7, (wide > drawn.thresholds[:, None]) | ((wide == drawn.thresholds[:, None]) & (
        torch.arange(97) <= drawn.last_kept[:, None])))  # fmt: skip
    assert (drawn.logps - drawn.full_logps > 0.05).all()  # the truncation matters
    assert torch.equal(got, drawn.logps) if path == "plain" else got.dtype == torch.float32
    within_rule(got, drawn.logps, want)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_probabilities_over_the_support_sum_to_one(path, keep_largest, generator):
    hidden, weight = quarters(1, 24, generator=generator), quarters(97, 24, generator=generator)
    support, keep = keep_largest((hidden @ weight.T).detach(), [31])
    tokens = keep[0].nonzero().squeeze(1)
    logps = linear_logprob(hidden.expand(31, -1), weight, tokens, temperature=1.3, support=[s.expand(31) for s in support]).logps
    assert len(tokens) == 31 and abs(logps.exp().sum() - 1) < 1e-12


def test_the_default_recipe_keeps_its_logits():
    assert PLAIN_LOGITS > 12000 * 100


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, V", SIZES)
def test_low_precision_is_accumulated_in_fp32(T, V, dtype, path, within_rule, generator):
    hidden, weight, targets, g = inputs(T, V, generator, dtype)
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want, want_entropy = oracle(x @ w.T, targets, 1.0)
    # the rival computes in fp32 from the same bf16 numbers: rounding the logits to bf16 would be off by 0.06
    x32, w32 = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    rival = -F.cross_entropy(x32 @ w32.T, targets, reduction="none")
    got = linear_logprob(hidden, weight, targets)
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    within_rule(got.logps, rival, want)
    p = (x32 @ w32.T).softmax(-1)
    within_rule(got.entropy, -(p * p.log()).sum(-1), want_entropy, "entropy")
    grads = torch.autograd.grad(got.logps, (hidden, weight), g)
    for a, b, c in zip(grads, torch.autograd.grad(rival, (x32, w32), g), torch.autograd.grad(want, (x, w), g.double()), strict=True):
        within_rule(a, b.to(dtype), c, "gradient")


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_argmax_takes_the_lowest_of_equal_indices(path, generator):
    weight = torch.randn(60, 8, generator=generator).double()
    hidden = torch.randn(25, 8, generator=generator).double()
    for first, second in ((3, 4), (5, 50), (26, 59)):  # in one tile, and in two
        weight[second] = weight[first] = 3 * torch.randn(8, generator=generator)
    out = linear_logprob(hidden, weight, torch.zeros(25, dtype=torch.int64), return_argmax=True)
    logits = (hidden @ weight.T).tolist()
    assert out.argmax.dtype == torch.int64 and out.argmax.tolist() == [row.index(max(row)) for row in logits]
    assert {3, 5, 26} & set(out.argmax.tolist())


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_forbidden_tokens_and_extreme_logits(path, generator):
    """hidden = (1, ...), so that the first column of weight is a bias: -inf, +-1e5, NaN."""
    hidden = torch.cat([torch.ones(3, 1), torch.randn(3, 4, generator=generator)], 1).requires_grad_()
    plain = torch.randn(60, 5, generator=generator)
    targets = torch.tensor([30, 7, 55])
    for bias in (1e5, -1e5):
        got = linear_logprob(hidden, torch.cat([plain[:, :1] + bias, plain[:, 1:]], 1), targets).logps
        want = oracle(hidden.detach().double() @ torch.cat([(plain[:, :1] + bias), plain[:, 1:]], 1).double().T, targets, 1.0)[0]
        assert torch.allclose(got.double(), want, atol=0.05)  # a logit of 1e5 is rounded to 0.008
    weight = plain.clone()
    weight[:24, 0] = weight[7, 0] = -inf  # the whole first tile, with row 1's target
    got = linear_logprob(hidden, weight, targets)
    want, want_entropy = oracle(hidden.detach() @ plain[24:].T, targets - torch.tensor([24, 0, 24]), 1.0)
    assert torch.allclose(got.logps[::2], want[::2], atol=1e-5) and got.logps[1] == -inf
    assert torch.allclose(got.entropy, want_entropy, atol=1e-5)
    weight[:, 0] = -inf  # nothing is left
    got = linear_logprob(hidden, weight, targets)
    assert (got.logps == -inf).all() and not got.entropy.any()


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("support", [None, (torch.full((25,), 0.5), torch.full((25,), 59))], ids=["all", "support"])
def test_nan_poisons_its_own_row_alone(support, path, generator):
    hidden, weight, _, _ = inputs(25, 60, generator)
    with torch.no_grad():
        hidden[13, 2] = nan
    out = linear_logprob(hidden, weight, torch.arange(25), support=support, return_argmax=True)
    dhidden = torch.autograd.grad(out.logps, hidden, torch.ones(25).double())[0]
    for x in (out.logps[:, None], out.entropy[:, None], dhidden):
        assert torch.isnan(x).any(1).nonzero().flatten().tolist() == [13]
    assert ((0 <= out.argmax) & (out.argmax < 60)).all()


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_upstream_gradient_scales_and_may_be_for_one_operand(path, generator):
    hidden, weight, targets, g = inputs(25, 60, generator)
    once = torch.autograd.grad(linear_logprob(hidden, weight, targets).logps, (hidden, weight), g.double())
    for i, leaves in enumerate(((hidden, weight.detach()), (hidden.detach(), weight))):
        logps = linear_logprob(*leaves, targets).logps
        assert torch.equal(torch.autograd.grad((4 * logps * g).sum(), leaves[i])[0], 4 * once[i])


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_skipped_targets_have_zero_gradient(path, generator):
    hidden, weight, _, _ = inputs(4, 9, generator)
    targets = torch.tensor([-100, 3, -100, 5])
    logps = linear_logprob(hidden, weight, targets).logps
    dhidden = torch.autograd.grad(logps.sum(), hidden)[0]
    assert torch.equal(logps[::2], torch.zeros(2).double()) and not dhidden[::2].any() and dhidden[1::2].all()


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_only_logps_carry_a_gradient(path, generator):
    hidden, weight, targets, _ = inputs(3, 5, generator)
    out = linear_logprob(hidden, weight, targets, return_argmax=True)
    assert out.logps.requires_grad and not out.entropy.requires_grad and not out.argmax.requires_grad


@pytest.mark.parametrize("bad", [9, -1, -99, -101])
def test_targets_out_of_range_are_refused(bad, generator):
    hidden, weight, _, _ = inputs(2, 9, generator)
    with pytest.raises(ValueError, match=r"linear_logprob: targets run from .*wanted \[0, 9\) or -100"):
        linear_logprob(hidden, weight, torch.tensor([1, bad]))


def test_wrong_shapes_and_temperature_are_refused():
    with pytest.raises(ValueError, match=r"linear_logprob: weight is \(9, 5\), hidden is \(2, 4\)"):
        linear_logprob(torch.ones(2, 4), torch.ones(9, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="linear_logprob: temperature is -1"):
        linear_logprob(torch.ones(2, 4), torch.ones(9, 4), torch.zeros(2, dtype=torch.int64), temperature=-1)
    with pytest.raises(ValueError, match=r"linear_logprob: support is \(2,\) torch.float32 and \(1,\) torch.int64; wanted \(2,\)"):
        linear_logprob(torch.ones(2, 4), torch.ones(9, 4), torch.zeros(2, dtype=torch.int64), support=(torch.ones(2), torch.zeros(1).long()))


MEASURE = """
import json, sys, time
import torch
from athanor.kernels import linear_logprob
which, T, V, D, repeats = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(n, D, generator=g).div_(D**0.25).requires_grad_() for n in (T, V))
targets, upstream = torch.randint(0, V, (T,), generator=g), torch.randn(T, generator=g)

def eager():
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)

def ours():
    return linear_logprob(hidden, weight, targets).logps

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.log_softmax(torch.randn(64, 64) @ torch.randn(64, 64), -1)  # the libraries' own buffers
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
times, before = [], kib("VmRSS:")
for _ in range(repeats):
    logps = grads = None
    start = time.process_time()
    logps = globals()[which]()
    grads = torch.autograd.grad(logps, (hidden, weight), upstream)
    times.append(time.process_time() - start)
peak = 1024 * (kib("VmHWM:") - before)
sums = [x.double().abs().sum().item() for x in (logps, *grads)]
print(json.dumps({"seconds": min(times), "peak": peak, "sums": sums}))
"""


def measured(which, T, V, D, repeats):
    """Best time and growth of the process in bytes, forward and backward, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, which, *map(str, (T, V, D, repeats))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(T, V, D, repeats):
    a, b = measured("ours", T, V, D, repeats), measured("eager", T, V, D, repeats)
    assert a["sums"] == pytest.approx(b["sums"], rel=1e-4)  # both did the work
    print(f"T={T} V={V} D={D}: {a['seconds']:.3f} s and {a['peak'] / 2**20:.0f} MiB; eager {b['seconds']:.3f} s and {b['peak'] / 2**20:.0f} MiB")
    return a, b


def test_peak_memory_is_an_eighth_of_the_eager_chain():
    if sys.platform != "linux":
        pytest.skip("the peak is read from /proc")
    ours, eager = compare(4096, 16384, 32, 1)
    assert eager["peak"] > 3 * 4 * 4096 * 16384  # it does hold three times the logits
    assert ours["peak"] < eager["peak"] / 8


@pytest.mark.slow
def test_no_slower_than_the_eager_chain_at_an_eighth_of_its_memory():
    """The goal's size: T=4096, V=32000."""
    ours, eager = compare(4096, 32000, 256, 3)
    assert ours["peak"] < eager["peak"] / 8 and ours["seconds"] <= eager["seconds"]
