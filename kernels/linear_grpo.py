"""GRPO loss and its gradients straight from hidden states and the lm_head: 3 GEMMs, and logits never exist beyond one chunk.

z = hidden weight^T / temperature; loss and d loss / d z = coef / temperature (onehot - softmax(z)) as in logits_grpo.py; then
    dhidden = dz weight,   dweight = dz^T hidden.
A chunk of tokens goes through: GEMM to fp32 logits (a bf16 logit near 30 is off by 0.06, 6 % of the ratio), one read of them for log-prob, entropy
and coef, one more that turns them into dz (bf16 where the inputs are), and the two gradient GEMMs; dweight is accumulated in fp32 over the chunks.
The chunk's length comes from shapes only, so equal calls give equal bits whatever memory is free.  Loss and statistics are policy_loss's on the
log-probs of all tokens.

Rows without gradient are left out of the gradient GEMMs (compact=True):
  masked rows are left out of everything: their hidden states may be garbage;
  rows with advantage 0 and no KL are known before the forward.  They go through the first GEMM only, in chunks of their own, because the statistics
  (ratio, KL to the old policy, entropy) are over all unmasked tokens;
  rows found dead by their ratio (clipped, masked by the correction) are dropped once the chunk's coefficients are known.
On a GPU the host must learn each count to shape the GEMMs: it waits twice before the loop and once per chunk, for the row kernel.  The chunk is
thousands of rows, so this leaves the GPU idle for the launch of a GEMM (some 10 us, not measured) against milliseconds per chunk; a CUDA graph, which
allows no waiting, needs compact=False.  Rounding the counts up to bucket sizes would spare nothing: the count itself is what the host lacks.

When the coefficient needs the new log-probs of the whole sequence (see logits_grpo.py) a first pass computes those and a second one recomputes the
logits of the rows with gradient: 1 + 3 GEMMs.  Not here: an entropy bonus, logit soft-capping, a bias.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, register
from ._triton import why_not_triton
from .logits_grpo import REFERENCE, HandOverFunction, Steps, Tokens, check_batch, loss_and_statistics, loss_tokens, token_level
from .logprob import check_targets
from .policy_loss import LossVariant

# Logits in a chunk.  cuda: 4096 rows of V = 131072, 2 GiB in fp32 (not measured on a GPU yet); every further chunk reads and writes dweight once
# more.  cpu: 32 MiB in fp32, 256 rows of V = 32000: half as many cost 5 % more time at D = 1024 (2-core x86, one thread).
CHUNK_LOGITS = {"cuda": 1 << 29, "cpu": 1 << 23}


def linear_grpo(hidden: Tensor, weight: Tensor, targets: Tensor, old_logps: Tensor | None, advantages: Tensor | None, cu_seqlens: Tensor, *,
                rewards: Tensor | None = None, group_ids: Tensor | None = None, scale: str = "std", baseline: str = "mean", eps: float = 1e-6,
                ref_logps: Tensor | None = None, rollout_logps: Tensor | None = None, mask: Tensor | None = None,
                variant: LossVariant = LossVariant(), temperature: float = 1.0, num_tokens: int | Tensor | None = None,
                num_sequences: int | Tensor | None = None, chunk_tokens: int | None = None, compact: bool = True,
                backend: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute the loss of `variant` and its gradients by hidden and weight, in one call.

    hidden: (T, D).  weight: (V, D), of the same dtype.  targets: (T,) int64, -100 = as if mask were False there.  Advantages (S,), or rewards (S,)
    with group_ids (S,) and the options of group_advantage.  All else as in policy_loss.
    chunk_tokens: rows whose logits exist at once, None = CHUNK_LOGITS / V.  compact: leave rows without gradient out (module docstring); False never
    waits for the device on the Triton backend.
    Returns the loss, 0-d, and policy_loss's statistics plus entropy_sum (nats, over the unmasked tokens) and, given rewards, num_nan_rewards
    (sequences without a verdict).  Without a gradient to compute it stops after the first GEMM; a frozen hidden or weight saves its GEMM.
    backward hands the stored gradients out, multiplied by the upstream gradient
    where they lie: a second backward (retain_graph=True) raises RuntimeError.  Extra memory: a chunk of logits in fp32 and in the inputs' dtype, and
    dweight in fp32 if there are several chunks.  fp16 is computed in fp32 (a gradient made before loss scaling would underflow), and so is any half
    precision on a CPU.
    A NaN in a row of hidden makes the loss and dweight NaN, and of dhidden that row only; in a masked row it does nothing.
    Raises ValueError on a shape or dtype mismatch, both or neither of advantages and rewards, a target outside [0, V) (checked on CPU; on a GPU
    such a row counts as masked).
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and weight.shape[0] > 0,
          f"linear_grpo: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V, D) and (T, D)")  # fmt: skip
    check(hidden.dtype == weight.dtype and hidden.is_floating_point(),
          f"linear_grpo: hidden is {hidden.dtype}, weight is {weight.dtype}; wanted one floating dtype")  # fmt: skip
    check_targets("linear_grpo", targets, hidden.shape[0], weight.shape[0], temperature)
    check_batch("linear_grpo", targets, old_logps, advantages, rewards, group_ids, scale, baseline, eps, ref_logps, rollout_logps, mask, cu_seqlens,
                variant)  # fmt: skip
    check(chunk_tokens is None or chunk_tokens > 0, f"linear_grpo: chunk_tokens is {chunk_tokens}; wanted > 0")
    return op(backend, hidden=hidden, weight=weight, targets=targets, old_logps=old_logps, advantages=advantages, cu_seqlens=cu_seqlens,
              rewards=rewards, group_ids=group_ids, scale=scale, baseline=baseline, eps=float(eps), ref_logps=ref_logps, rollout_logps=rollout_logps,
              mask=mask, variant=variant, temperature=float(temperature), num_tokens=num_tokens, num_sequences=num_sequences,
              chunk_tokens=chunk_tokens, compact=compact)  # fmt: skip


def chunk_length(vocab: int, device: torch.device) -> int:
    rows = max(1, CHUNK_LOGITS["cuda" if device.type == "cuda" else "cpu"] // vocab)
    return rows // 128 * 128 if rows >= 128 else rows


def linear_loss(steps: Steps, hidden, weight, targets, old_logps, advantages, cu_seqlens, rewards, group_ids, scale, baseline, eps, ref_logps,
                rollout_logps, mask, variant, temperature, num_tokens, num_sequences, chunk_tokens, compact):  # fmt: skip
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    want = any(wanted)
    direct = want and token_level(variant, old_logps)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if advantages is None:
            advantages = steps.advantage(rewards.detach(), group_ids, scale, baseline, eps)
        call = dict(old_logps=old_logps, advantages=advantages.detach(), cu_seqlens=cu_seqlens, ref_logps=ref_logps, rollout_logps=rollout_logps,
                    variant=variant, num_tokens=num_tokens, num_sequences=num_sequences)  # fmt: skip
        keep, tokens = loss_tokens(targets, weight.shape[0], mask=mask, dtype=accumulation_dtype(hidden.dtype), **call)
        pass_ = Chunks(steps, hidden.detach(), weight.detach(), tokens, temperature, chunk_tokens, compact, wanted)
        live = keep if variant.kl != "none" else keep & (tokens.advantages != 0)
        for rows in pass_.gradient_chunks(live) if direct else ():
            pass_.forward(rows, variant)
        for rows in pass_.chunks(keep & ~live if direct else keep) if compact or not direct else ():
            pass_.forward(rows, None)
    loss, stats, coefs = loss_and_statistics(steps, pass_.logps, pass_.entropy, want and not direct, mask=keep, **call)
    if rewards is not None:
        stats |= {"num_nan_rewards": rewards.isnan().sum().float()}
    if want and not direct:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            coefs.masked_fill_(pass_.m == -torch.inf, 0.0)
            for rows in pass_.gradient_chunks(coefs != 0):
                pass_.recompute(rows, coefs)
    if not want:
        return loss, stats
    gradients = pass_.dhidden, pass_.finished_dweight()
    return HandOverFunction.apply("linear_grpo", loss, steps.scale, gradients, hidden, weight), stats


class Chunks:
    """The walk over chunks of rows: a buffer for their logits, the per-row results, and the gradients as they accumulate."""

    def __init__(self, steps: Steps, hidden: Tensor, weight: Tensor, tokens: Tokens, temperature: float, length: int | None, compact: bool, wanted):
        (T, D), V = hidden.shape, weight.shape[0]
        wide = accumulation_dtype(hidden.dtype)
        # tensor cores take bf16; elsewhere the products are formed in the accumulation dtype
        self.dtype = hidden.dtype if hidden.is_cuda and hidden.dtype == torch.bfloat16 else wide
        self.steps, self.hidden, self.weight, self.tokens, self.temperature = steps, hidden, weight.to(self.dtype), tokens, temperature
        self.compact, self.wanted = compact, wanted
        self.length = min(length or chunk_length(V, hidden.device), max(T, 1))
        self.logits = torch.empty(self.length, V, dtype=wide, device=hidden.device)
        self.logps, self.entropy, self.m, self.S = (torch.zeros(T, dtype=wide, device=hidden.device) for _ in range(4))
        self.dhidden = torch.zeros(T, D, dtype=self.dtype, device=hidden.device) if wanted[0] else None
        self.dweight, self.dweight_dtype = None, wide

    def chunks(self, live: Tensor):
        """Slices of all rows, or pieces of the index list of the live ones (this waits for their number)."""
        T = live.numel()
        index = live.nonzero().squeeze(1) if self.compact else None
        if index is None or index.numel() == T:
            return [slice(i, min(i + self.length, T)) for i in range(0, T, self.length)]
        return index.split(self.length) if index.numel() else []

    def gradient_chunks(self, live: Tensor):
        chunks = self.chunks(live)
        if len(chunks) == 1:  # nothing to accumulate: dweight is rounded to the inputs' dtype as the GEMM stores it, which saves a pass over it
            self.dweight_dtype = self.dtype
        return chunks

    def compute_logits(self, rows) -> tuple[Tensor, Tensor]:
        x = self.hidden[rows].to(self.dtype)
        if not self.compact:  # a masked row is multiplied like any other here: NaN * 0 would reach dweight
            x = torch.where((self.tokens.scale[rows] != 0).unsqueeze(1), x, 0.0)
        logits = self.logits[: x.shape[0]]
        if logits.dtype == x.dtype:
            torch.mm(x, self.weight.T, out=logits)
        else:
            torch.mm(x, self.weight.T, out_dtype=logits.dtype, out=logits)
        return x, logits

    def forward(self, rows, variant: LossVariant | None) -> None:
        """Log-probs of some rows; given a (token-level) variant their gradients too."""
        x, logits = self.compute_logits(rows)
        tokens = self.tokens.at(rows)
        result = self.steps.rows(logits, tokens, variant, self.temperature, None)
        self.logps[rows], self.entropy[rows], self.m[rows], self.S[rows] = result[:4]
        if variant is not None:
            self.backward(rows, x, logits, tokens.targets, result.m, result.S, result.coefs)

    def recompute(self, rows, coefs: Tensor) -> None:
        x, logits = self.compute_logits(rows)
        self.backward(rows, x, logits, self.tokens.targets[rows], self.m[rows], self.S[rows], coefs[rows])

    def backward(self, rows, x, logits, targets, m, S, coefs) -> None:
        live = None
        if self.compact:
            live = coefs.nonzero().squeeze(1)  # waits for the row kernel
            if live.numel() == 0:
                return
            live = None if live.numel() == coefs.numel() else live
        if live is not None:
            rows, x = (live + rows.start if isinstance(rows, slice) else rows[live]), x[live]
        # in place where nothing moves and the dtype stays
        dz = logits if live is None and logits.dtype == self.dtype else logits.new_empty(x.shape[0], logits.shape[1], dtype=self.dtype)
        self.steps.dlogits(logits, targets, m, S, coefs, self.temperature, dz, live)
        if self.dhidden is not None:
            if isinstance(rows, slice):
                torch.mm(dz, self.weight, out=self.dhidden[rows])
            else:
                self.dhidden[rows] = torch.mm(dz, self.weight)
        if self.wanted[1]:
            self.accumulate(dz.T, x)

    def accumulate(self, dz: Tensor, x: Tensor) -> None:
        """dweight += dz x; over several chunks in the accumulation dtype, whatever the inputs' is."""
        options = {} if self.dtype == self.dweight_dtype else {"out_dtype": self.dweight_dtype}
        if self.dweight is None:
            self.dweight = torch.mm(dz, x, **options)
        else:
            torch.addmm(self.dweight, dz, x, **options, out=self.dweight)

    def finished_dweight(self) -> Tensor | None:
        if self.wanted[1] and self.dweight is None:
            return torch.zeros(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        return self.dweight


def linear_grpo_reference(**call) -> tuple[Tensor, dict[str, Tensor]]:
    return linear_loss(REFERENCE, **call)


def _triton(**call) -> tuple[Tensor, dict[str, Tensor]]:
    from .logits_grpo_triton import TRITON

    return linear_loss(TRITON, **call)


op = register("linear_grpo", triton=Backend(_triton, why_not_triton), reference=Backend(linear_grpo_reference))
