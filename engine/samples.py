"""What tasks hand out and what generation gives back.  Plain text and numpy, no model: tasks, rewards and rollout share these two."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One prompt with what its verifier needs.  `id` is unique within (task, split) and keys the sampler's random numbers."""

    prompt: str  # the text that the model is conditioned on, template included
    answer: str | None  # gold answer for rule rewards; None = open-ended
    id: int
    task: str
    domain: str = "reasoning"  # "reasoning" (rules) or "general" (reward models)
    language: str = "en"  # target language of the chain of thought
    split: str = "train"
    metadata: dict = field(default_factory=dict)


@dataclass
class Sample:
    """One completion.  `text` is the decoded completion without the end token; log-probs are under the distribution that was sampled from."""

    problem: Problem
    text: str
    token_ids: np.ndarray  # (n,) int64, the end token included when the model wrote it
    logps: np.ndarray  # (n,) float32, one per token
    finish: str = "stop"  # "stop" (end token or stop string), "length", "repetition" or "abort"
    prompt_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
