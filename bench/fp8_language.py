"""A language in which small models learn evenly, for `fp8_numerics`: of known entropy, and without anything that is learned all at once.

A document has a hidden topic z of `TOPICS`, and its token t is drawn from  softmax(A[token t - 1] + C[z])  with tables of normal numbers.  The topic
shows in an even mean over the tokens before, which is where attention begins; to look at a token two back instead, attention must find it, and runs
fall when they do, each at its own time (seen: docs/numerics.md).  A reader who knows the tables but not the topic is the best there can be:
`best_loss`, by Bayes' rule over the topics.
"""

import numpy as np
import torch

from athanor.batch import PackedBatch, pack

VOCABULARY, TOPICS, LENGTH = 64, 8, 64
SPREAD = 1.0  # standard deviation of the tables


class Language:
    """Documents by number, the same whoever asks; `seed` sets the tables and all documents."""

    vocab_size, num_layers, per_step, final_lr_ratio = VOCABULARY, 2, 16, 0.0  # a dense layer and one of experts; rates end at 0

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        rng = np.random.default_rng([seed, 0])
        self.pairs, self.tilts = rng.normal(0, SPREAD, (VOCABULARY, VOCABULARY)), rng.normal(0, SPREAD, (TOPICS, VOCABULARY))

    def documents(self, first: int, count: int) -> np.ndarray:
        """(count, LENGTH + 1) tokens; the first of each is given, not drawn from the tables."""
        drawn = [np.random.default_rng([self.seed, 1, first + i]) for i in range(count)]
        topics = np.array([rng.integers(TOPICS) for rng in drawn])
        ids = np.array([rng.integers(VOCABULARY, size=1) for rng in drawn])
        uniform = np.array([rng.random(LENGTH) for rng in drawn])
        for t in range(LENGTH):
            chances = _softmax(self.pairs[ids[:, -1]] + self.tilts[topics])
            above = chances.cumsum(1) < uniform[:, t : t + 1]
            ids = np.column_stack((ids, above.sum(1).clip(max=VOCABULARY - 1)))
        return ids

    def batches(self, first: int, count: int) -> list[PackedBatch]:
        ids = list(self.documents(first, count).astype(np.int64))
        return pack([row[:1] for row in ids], [row[1:] for row in ids], 4096, self.device)

    def best_loss(self, first: int, count: int) -> float:
        """Nats per token of the reader who knows the tables, on these documents."""
        ids, total, belief = self.documents(first, count), 0.0, np.full((count, TOPICS), 1 / TOPICS)
        for t in range(LENGTH):
            chances = [_softmax(self.pairs[ids[:, t]] + tilt) for tilt in self.tilts]
            joint = belief * np.stack([chance[np.arange(count), ids[:, t + 1]] for chance in chances], 1)
            total -= np.log(joint.sum(1)).sum()
            belief = joint / joint.sum(1, keepdims=True)
        return float(total / (count * LENGTH))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
