"""A language in which small models learn evenly, for `fp8_numerics`: smooth to learn, without end of documents, of known entropy.

A document has a hidden topic z of `TOPICS`, and its token t is drawn from  softmax(A[token t - 1] + B[token t - 2] + C[z])  with tables of normal
numbers.  A reader who knows the tables but not the topic is the best there can be: `best_loss`, by Bayes' rule over the topics.
"""

import numpy as np
import torch

from athanor.batch import PackedBatch, pack

VOCABULARY, TOPICS, LENGTH = 32, 8, 64
SPREAD = 1.0  # standard deviation of the tables


class Language:
    """Documents by number, the same whoever asks; `seed` sets the tables and all documents."""

    vocab_size, per_step, final_lr_ratio = VOCABULARY, 16, 0.0

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        rng = np.random.default_rng([seed, 0])
        self.pairs, self.tilts = rng.normal(0, SPREAD, (2, VOCABULARY, VOCABULARY)), rng.normal(0, SPREAD, (TOPICS, VOCABULARY))

    def documents(self, first: int, count: int) -> np.ndarray:
        """(count, LENGTH + 1) tokens; the first of each is given, not drawn from the tables."""
        drawn = [np.random.default_rng([self.seed, 1, first + i]) for i in range(count)]
        topics = np.array([rng.integers(TOPICS) for rng in drawn])
        ids = np.array([rng.integers(VOCABULARY, size=2) for rng in drawn])
        uniform = np.array([rng.random(LENGTH) for rng in drawn])
        for t in range(LENGTH):
            chances = _softmax(self._logits(topics, ids))
            above = chances.cumsum(1) < uniform[:, t : t + 1]
            ids = np.column_stack((ids, above.sum(1).clip(max=VOCABULARY - 1)))
        return ids[:, 1:]

    def batches(self, first: int, count: int) -> list[PackedBatch]:
        ids = list(self.documents(first, count).astype(np.int64))
        return pack([row[:1] for row in ids], [row[1:] for row in ids], 4096, self.device)

    def best_loss(self, first: int, count: int) -> float:
        """Nats per token of the reader who knows the tables, on these documents.

        He does not see the token before the first either, so the first that is drawn counts as the mean over it.
        """
        ids = self.documents(first, count)
        total, belief = 0.0, np.full((count, TOPICS), 1 / TOPICS)
        every = np.arange(VOCABULARY)
        for t in range(LENGTH):
            likelihood = np.empty((count, TOPICS))
            for z in range(TOPICS):
                if t:
                    chances = _softmax(self._logits(np.full(count, z), ids[:, t - 1 : t + 1]))
                else:
                    pairs = np.stack(np.broadcast_arrays(every[None], ids[:, :1]), -1).reshape(-1, 2)
                    chances = _softmax(self._logits(np.full(len(pairs), z), pairs)).reshape(count, VOCABULARY, -1).mean(1)
                likelihood[:, z] = np.take_along_axis(chances, ids[:, t + 1 : t + 2], 1)[:, 0]
            joint = belief * likelihood
            total -= np.log(joint.sum(1)).sum()
            belief = joint / joint.sum(1, keepdims=True)
        return total / (count * LENGTH)

    def _logits(self, topics: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return self.pairs[0, ids[:, -1]] + self.pairs[1, ids[:, -2]] + self.tilts[topics]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
