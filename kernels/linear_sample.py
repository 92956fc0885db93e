"""Draw one token per row from hidden states and the lm_head, without storing logits: temperature only, no filters.

A categorical draw in two steps, exact as one: softmax over the vocabulary = (mass of a tile of TILE tokens) x (softmax within the tile).  Every tile
draws a candidate by inverse CDF with its own uniform number, Philox stream 1 keyed by (seed, position, tile), and keeps m = its largest logit,
S = sum exp((x - m) / temperature), U = sum (x - m) exp((x - m) / temperature).  Then one uniform number of stream 2 picks the tile by its share of
the mass, in ascending order of the tiles.  Tiles depend on V alone: the draw does not depend on the batch.  It is as exact as `sample`'s, but
another one: the same seed gives another token.
"""

import torch
from torch import Tensor

from ._dispatch import Backend, accumulation_dtype, check, late, register
from ._philox import philox_uniform
from .linear_logprob import why_not_product
from .sample import MAX_VOCAB, Sampled, check_draw, tempered

TILE = 128
CHUNK = 64 * TILE  # vocabulary whose logits the reference holds at once


def linear_sample(hidden: Tensor, weight: Tensor, *, temperature: float | Tensor = 1.0, seeds: Tensor, positions: Tensor,
                  backend: str | None = None) -> Sampled:  # fmt: skip
    """Sample one token per row from softmax(hidden @ weight.T / temperature).

    hidden: (B, D).  weight: (V, D), the same dtype for the Triton kernels.  temperature: a number or (B,), 0 = greedy, lowest index first.
    seeds, positions: (B,) int64.  Returns Sampled, without gradient; logps equal full_logps except in greedy rows, where they are 0.
    A row with a NaN or +inf among its logits gets NaN log-probs and some token within [0, V).
    Raises ValueError on a shape mismatch or a temperature below 0 (a tensor's values are looked at on CPU only).
    """
    check(hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and weight.shape[0] > 0,
          lambda: f"linear_sample: weight is {tuple(weight.shape)}, hidden is {tuple(hidden.shape)}; wanted (V, D) with V > 0 and (B, "
                  f"D)")  # fmt: skip
    check_draw("linear_sample", hidden.shape[0], temperature, seeds, positions)
    return Sampled(*op(backend, hidden=hidden.detach(), weight=weight.detach(), temperature=temperature, seeds=seeds, positions=positions))


@torch.no_grad()
def linear_sample_reference(hidden, weight, temperature, seeds, positions):
    wide, (B, _), V = accumulation_dtype(hidden.dtype), hidden.shape, weight.shape[0]
    hidden = hidden.to(wide)
    _, greedy = tempered(hidden[:, :1], temperature)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(wide).masked_fill(greedy, 1.0).unsqueeze(1)
    elif temperature == 0:
        temperature = 1.0
    found = []  # of each chunk: m, S, U, candidate and its logit, (B, tiles) each
    for start in range(0, V, CHUNK):
        x = hidden @ weight[start : start + CHUNK].to(wide).T
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE), value=-torch.inf)
        x = x.view(B, x.shape[1] // TILE, TILE)
        m = x.amax(2).clamp_min(torch.finfo(wide).min)
        d = x - m.unsqueeze(2)
        e = (d / (temperature.unsqueeze(2) if isinstance(temperature, Tensor) else temperature)).exp()
        tile = torch.arange(start // TILE, start // TILE + m.shape[1], device=x.device)
        u = philox_uniform(seeds.unsqueeze(1), positions.unsqueeze(1), tile=tile, stream=1)
        token = _pick(e, u)
        if greedy is not None:
            token = torch.where(greedy.unsqueeze(1), x.argmax(2), token)
        found.append((m, e.sum(2), torch.where(e == 0, 0.0, d * e).sum(2), token + tile * TILE, x.gather(2, token.unsqueeze(2)).squeeze(2)))
    ms, Ss, Us, candidates, logits = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    m = ms.amax(1, keepdim=True)
    shift = (ms - m).clamp_min(torch.finfo(wide).min)
    factor = (shift / temperature).exp()
    S, U = (Ss * factor).sum(1), (Us * factor + shift * factor * Ss).sum(1)
    tile = _pick(Ss * factor, philox_uniform(seeds, positions, stream=2))
    if greedy is not None:
        tile = torch.where(greedy, ms.argmax(1), tile)
    tokens, x = (t.gather(1, tile.unsqueeze(1)).squeeze(1) for t in (candidates, logits))
    tokens.clamp_(max=V - 1)
    t = temperature.squeeze(1) if isinstance(temperature, Tensor) else temperature
    full_logps, entropy = (x - m.squeeze(1)) / t - S.log(), S.log() - U / S / t
    thresholds, last_kept, logps = torch.full_like(x, -torch.inf), torch.full_like(tokens, V - 1), full_logps
    if greedy is not None:
        thresholds, last_kept = torch.where(greedy, x, thresholds), torch.where(greedy, tokens, last_kept)
        logps = torch.where(greedy, full_logps - full_logps, logps)  # 0, or NaN in a bad row
    bad = full_logps.isnan()
    return tokens, logps, full_logps, entropy, thresholds.masked_fill_(bad, torch.nan), last_kept.masked_fill_(bad, V - 1)


def _pick(masses: Tensor, u: Tensor) -> Tensor:
    """First index of the last axis whose running mass exceeds u of the total."""
    cdf = masses.double().cumsum(-1)
    total = cdf[..., -1:]
    threshold = torch.minimum(u.unsqueeze(-1) * total, total * (1 - 2.0**-52))
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp_max_(masses.shape[-1] - 1)


def _why_not(call: dict) -> str | None:
    if call["weight"].shape[0] > MAX_VOCAB:
        return f"V is {call['weight'].shape[0]}; at most {MAX_VOCAB}"
    return why_not_product({name: call[name] for name in ("hidden", "weight", "seeds", "positions")})


op = register("linear_sample", triton=Backend(late("linear_sample_triton.linear_sample_triton"), _why_not),
              reference=Backend(linear_sample_reference))  # fmt: skip
