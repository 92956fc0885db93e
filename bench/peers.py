"""What else computes the same thing: adapters to other packages, used only where they are installed.

One function per peer and operation, named by its arguments: each takes those inputs of the case that it names and returns what the case's `run`
returns, None in place of an output that the peer does not give.  Written from the packages' public sources (liger-kernel 0.8.2, cut-cross-entropy
d42911f, quack 0.6.4); never run so far, because none of them is installed where this was written.  Whatever an adapter raises, its row says.

Not here: torchao, whose kernels for training are fp8 casts and matmuls, for which this repository has no operation yet.
"""

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


def liger_rope(q, k, cos, sin):
    from liger_kernel.transformers.functional import liger_rope as rope

    wide = [torch.cat((a, a), -1)[None] for a in (cos, sin)]

    def rotate(q, k):  # (1, H, T, d) views of a (1, T, H, d) layout, which is what the kernel walks; it rotates in place
        a, b = rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
        return torch.cat((a[0].transpose(0, 1), b[0].transpose(0, 1)), 1)

    return differentiated(rotate, q, k)


def quack_rope(q, k, cos, sin):
    from quack.rotary import apply_rotary_emb

    return differentiated(lambda q, k: torch.cat([apply_rotary_emb(x[None], cos, sin)[0] for x in (q, k)], 1), q, k)


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


PEERS: dict[str, dict[str, Callable]] = {
    "rmsnorm": {"liger": liger_rmsnorm, "quack": quack_rmsnorm},
    "rope": {"liger": liger_rope, "quack": quack_rope},
    "swiglu": {"liger": liger_swiglu},
    "linear_logprob": {"liger": liger_linear_logprob, "cce": cce_linear_logprob, "quack": quack_linear_logprob},
    "logprob": {"quack": quack_logprob},
}


def installed() -> dict[str, str]:
    """Version of each peer package that can be imported here."""
    found = {name: package for name, (module, package) in PACKAGES.items() if importlib.util.find_spec(module)}
    return {name: importlib.metadata.version(package) for name, package in found.items()}


def bind(adapter: Callable) -> Callable[..., tuple]:
    """The adapter as a function of all of the case's inputs."""
    wanted = list(inspect.signature(adapter).parameters)
    return lambda **inputs: adapter(**{name: inputs[name] for name in wanted})


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
        found |= {f"{name} {here[name]}": bind(f) for name, f in PEERS.get(case.op, {}).items() if name in here}
    return found
