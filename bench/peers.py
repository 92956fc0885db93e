"""What else computes the same thing: adapters to other packages, used only where they are installed.

One function per peer and operation, named by its arguments: each takes those inputs of the case that it names and returns what the case's `run`
returns, None in place of an output that the peer does not give.  Written from the packages' public sources (liger-kernel 0.8.2, cut-cross-entropy
d42911f, quack 0.6.4); liger's have run on an H200, at 0.8.5.  Whatever an adapter raises, its row says.

Not here: torchao, whose kernels for training are fp8 casts and matmuls, for which this repository has no operation yet.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable

import torch
from case import compiled, differentiated

PACKAGES = {"liger": ("liger_kernel", "liger-kernel"), "cce": ("cut_cross_entropy", "cut-cross-entropy"), "quack": ("quack", "quack-kernels")}


def liger_rmsnorm(x, w, dy):
    from liger_kernel.transformers.functional import liger_rms_norm

    # "gemma" rounds once at the end, as rmsnorm here does; in_place would overwrite dy, which the next repetition reads
    return differentiated(lambda x, w: liger_rms_norm(x, w, 1e-6, 0.0, "gemma", False), x, w, upstream=dy)


def quack_rmsnorm(x, w, dy):
    from quack import rmsnorm

    return differentiated(lambda x, w: rmsnorm(x, w, eps=1e-6), x, w, upstream=dy)


def quack_residual_rmsnorm(x, residual, w):
    from quack import rmsnorm

    return rmsnorm(x, w, residual=residual, eps=1e-6, prenorm=True)


def liger_rope(q, k, cos, sin, dq, dk):
    from liger_kernel.transformers.functional import liger_rope as rope

    wide = [torch.cat((a, a), -1)[None] for a in (cos, sin)]

    def rotate(q, k):  # (1, H, T, d) views of a (1, T, H, d) layout, which is what the kernel walks; it rotates in place
        a, b = rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
        return a[0].transpose(0, 1), b[0].transpose(0, 1)

    return differentiated(rotate, q, k, upstream=(dq, dk))


def quack_rope(q, k, cos, sin, dq, dk):
    from quack.rotary import apply_rotary_emb

    return differentiated(lambda q, k: tuple(apply_rotary_emb(x[None], cos, sin)[0] for x in (q, k)), q, k, upstream=(dq, dk))


def liger_swiglu(x, dy):
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return differentiated(lambda x: LigerFusedGateUpSiLUMulFunction.apply(x, False), x, upstream=dy)


def liger_linear_logprob(x, w, targets):
    """The fast path of its fused linear cross entropy: the sum alone, so no log-prob per token and no entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _, dx, dw = differentiated(
        lambda x, w: -liger_fused_linear_cross_entropy(x, w, targets, reduction="sum", accum_dtype=torch.float32), x, w
    )
    return None, None, dx, dw


def cce_linear_logprob(x, w, targets):
    from cut_cross_entropy import linear_cross_entropy

    logps, dx, dw = differentiated(lambda x, w: -linear_cross_entropy(x, w, targets, reduction="none"), x, w)
    return logps, None, dx, dw


def quack_linear_logprob(x, w, targets):
    """The sum alone, as for liger."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _, dx, dw = differentiated(lambda x, w: -chunked_linear_cross_entropy(x, w, targets, reduction="sum"), x, w)
    return None, None, dx, dw


def quack_logprob(z, targets):
    from quack import cross_entropy

    logps, dz = differentiated(lambda z: -cross_entropy(z, targets, reduction="none"), z)
    return logps, None, dz


def cce_scoring(x, w, targets):
    from cut_cross_entropy import linear_cross_entropy

    with torch.no_grad():
        return -linear_cross_entropy(x, w, targets, reduction="none"), None


def liger_scoring(x, w, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    with torch.no_grad():
        return -liger_fused_linear_cross_entropy(x, w, targets, reduction="none"), None


def cce_linear_grpo(x, w, targets, old, A, cu):
    """Its loss per token takes any upstream gradient, so the GRPO loss is put behind it."""
    from cases.linear_grpo import eager_loss
    from cut_cross_entropy import linear_cross_entropy

    return differentiated(lambda x, w: eager_loss(-linear_cross_entropy(x, w, targets, reduction="none"), old, A, cu), x, w)


def staged(prepare: Callable, call: Callable, finish: Callable) -> Callable[..., tuple]:
    """An adapter to a peer with a layout of its own: what `prepare` makes of the inputs and `finish` of the results is checked but not timed."""

    @functools.wraps(prepare)
    def run(**inputs):
        state = prepare(**inputs)
        return finish(call(state), state)

    def timed(**inputs):
        state = prepare(**inputs)
        return lambda: call(state)

    run.timed = timed
    return run


def padded(x: torch.Tensor, cu: torch.Tensor, extra: int = 0) -> torch.Tensor:
    """(T, ...) -> (S, L + extra, ...), L the longest sequence, zeros behind each."""
    lengths = cu.diff().tolist()
    out = x.new_zeros(len(lengths), max(lengths) + extra, *x.shape[1:])
    for row, part in zip(out, x.split(lengths), strict=True):
        row[: len(part)] = part
    return out


def unpadded(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(x, cu.diff().tolist(), strict=True)])


def _batches(targets, old, A, cu) -> dict:
    return {"ids": padded(targets, cu), "old": padded(old, cu), "mask": padded(torch.ones_like(old), cu), "A": A, "cu": cu}


def _logits_batch(z, targets, old, A, cu):
    return _batches(targets, old, A, cu) | {"logits": padded(z, cu, extra=1)}


def _liger_logits_grpo(s):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits):  # not in place, so that every repetition sees the same logits; it reads and writes as much either way
        return triton_grpo_loss(logits, s["old"], None, s["ids"], s["A"], s["mask"], temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2,
                                inplace=False, loss_type="bnpo", reduce=True)[0]  # fmt: skip

    return differentiated(loss, s["logits"])


def _hidden_batch(x, w, targets, old, A, cu):
    return _batches(targets, old, A, cu) | {"x": padded(x, cu), "w": w}


def _liger_linear_grpo(s):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo", temperature=1.0)
    return differentiated(lambda x, w: grpo(x, w, s["ids"], s["mask"], s["A"], old_per_token_logps=s["old"])[0], s["x"], s["w"])


liger_logits_grpo = staged(_logits_batch, _liger_logits_grpo, lambda got, s: (got[0], unpadded(got[1], s["cu"])))
liger_linear_grpo = staged(_hidden_batch, _liger_linear_grpo, lambda got, s: (got[0], unpadded(got[1], s["cu"]), got[2]))

SCORING = {"liger": liger_scoring, "cce": cce_scoring}  # linear_logprob without its backward; quack gives the sum alone
RESIDUAL = {"quack": quack_residual_rmsnorm}  # rmsnorm of x + residual, which is returned too
PEERS: dict[str, dict[str, Callable]] = {
    "rmsnorm": {"liger": liger_rmsnorm, "quack": quack_rmsnorm},
    "rope": {"liger": liger_rope, "quack": quack_rope},
    "swiglu": {"liger": liger_swiglu},
    "linear_logprob": {"liger": liger_linear_logprob, "cce": cce_linear_logprob, "quack": quack_linear_logprob},
    "logprob": {"quack": quack_logprob},
    "linear_grpo": {"liger": liger_linear_grpo, "cce": cce_linear_grpo},
    "logits_grpo": {"liger": liger_logits_grpo},
}


def installed() -> dict[str, str]:
    """Version of each peer package that can be imported here."""
    found = {name: package for name, (module, package) in PACKAGES.items() if importlib.util.find_spec(module)}
    return {name: importlib.metadata.version(package) for name, package in found.items()}


def bind(adapter: Callable) -> Callable[..., tuple]:
    """The adapter as a function of all of the case's inputs."""
    wanted = list(inspect.signature(adapter).parameters)

    def run(**inputs):
        return adapter(**{name: inputs[name] for name in wanted})

    if hasattr(adapter, "timed"):
        run.timed = lambda **inputs: adapter.timed(**{name: inputs[name] for name in wanted})
    return run


def adapters_of(case) -> dict[str, Callable]:
    if case.op == "linear_logprob" and case.sizes.get("backward") == 0:
        return SCORING
    if "residual" in case.sizes:
        return RESIDUAL
    return {} if "norm" in case.sizes else PEERS.get(case.op, {})  # no peer fuses QK norm into the rotation


def torch_compile(case) -> Callable[..., tuple]:
    """The eager rival with its forward and backward compiled."""

    def run(**inputs):
        with compiled():
            return case.eager(**inputs)

    return run


def peers_of(case, device: str) -> dict[str, Callable[..., tuple]]:
    """Contenders beside eager: the case's own rivals, torch.compile on a GPU, and the installed peers that run on this device."""
    found = dict(case.rivals)
    if device == "cuda":
        found["torch.compile"] = torch_compile(case)
        here = installed()
        found |= {f"{name} {here[name]}": bind(f) for name, f in adapters_of(case).items() if name in here}
    return found
