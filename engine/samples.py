"""What tasks hand out, what generation is asked for and what it gives back.  Plain text and numpy, no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # rewards and tasks see samples, and need nothing of the recipe schema
    from athanor.config import SamplingConfig


# what a problem is about -> the family that rewards may name instead; "reasoning" and "general" are domains of their own too
FAMILIES = {"math": "reasoning", "code": "reasoning", "stem": "reasoning", "logic": "reasoning"}
DOMAINS = (*FAMILIES, "reasoning", "general", "safety")
SPLITS = ("train", "validation", "test")


def in_domain(domain: str, wanted: str) -> bool:
    """Does a problem of `domain` belong to `wanted`: the same domain, its family, or "any"?"""
    return wanted in ("any", domain, FAMILIES.get(domain))


@dataclass(frozen=True)
class Problem:
    """One prompt with what its verifier needs.  `id` is unique within (task, split) and keys the sampler's random numbers."""

    prompt: str  # the text that the model is conditioned on, template included
    answer: str | None  # gold answer for rule rewards; None = open-ended
    id: int
    task: str
    domain: str = "reasoning"  # one of DOMAINS: rules judge the reasoning family, reward models general and safety
    language: str = "en"  # target language of the chain of thought
    split: str = "train"
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What the generator returns for one sample.  Arrays have one entry per token."""

    token_ids: np.ndarray  # (c,) int64, the end token or stop string included when the model wrote it
    logps: np.ndarray  # (c,) float32 under the distribution that was sampled from: temperature and truncation included
    finish: str  # "stop" (end token or stop string), "length", "repetition", "abort", or "error": the next token's logits were NaN
    versions: np.ndarray  # (c,) int32: how often the weights had changed when the token was drawn, by the generator's count
    full_logps: np.ndarray | None = None  # (c,) float32 without truncation; where asked for
    support: tuple[np.ndarray, np.ndarray] | None = None  # (c,) float32, (c,) int64: `Sampled.support` where sampling is truncated or greedy
    routes: tuple[np.ndarray, np.ndarray] | None = None  # (p, L, k), (c, L, k) int16, where asked for: which experts the prompt's tokens went to
    # in the L sparse layers, and for each drawn token those of the token before it (of the first: of the prompt's last)
    streak: int = 0  # last tokens in a row above the repetition stop's probability: where it goes on when an aborted sample does


@dataclass(frozen=True)
class Request:
    """One prompt and its samples."""

    prompt_ids: np.ndarray  # (p,) int64
    seeds: np.ndarray  # (n,) int64, one sample each
    sampling: "SamplingConfig | None" = None  # this request's own; None = that of the call
    eos_ids: frozenset[int] | None = None  # None = the generator's
    partial: Sequence[Completion | None] | None = None  # (n,): aborted samples to go on with; their tokens count into max_tokens
    expected_tokens: int | None = None  # length of its samples, where known: longer ones go first
    priority: int = 0  # tokens added to that


class Finished(NamedTuple):
    """One sample of a running generation."""

    request: int  # index into the requests
    member: int  # index into its seeds
    completion: Completion


@dataclass
class Sample:
    """One completion of a problem.  `text` is the decoded completion without the end token."""

    problem: Problem
    text: str
    token_ids: np.ndarray  # (n,) int64, the end token included when the model wrote it
    logps: np.ndarray  # (n,) float32, one per token, under the distribution that was sampled from
    finish: str = "stop"  # as in Completion
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    support: tuple[np.ndarray, np.ndarray] | None = None  # as in Completion
    routes: tuple[np.ndarray, np.ndarray] | None = None  # as in Completion

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
