"""Languages of known entropy for `fp8_numerics`: one in which small models learn evenly, and one with a steep fall.

A document has a hidden topic z of `TOPICS`, and its token t is drawn from  softmax(A[token t - 1] + B[token t - 2] + C[z])  with tables of normal
numbers; `Language` is without B.  The topic shows in an even mean over the tokens before, which is where attention begins; to look at the token two
back instead, attention must find it, and runs fall when they do, each at its own time.  In `Falling` most of what can be known hangs on that token.
A reader who knows the tables but not the topic is the best there can be: `best_loss`, by Bayes' rule over the topics.
"""

import functools

import numpy as np
import torch

from athanor.batch import PackedBatch, pack

VOCABULARY, TOPICS, LENGTH = 64, 8, 64


class Language:
    """Documents by number, the same whoever asks; `seed` sets the tables and all documents."""

    vocab_size, num_layers, per_step, final_lr_ratio = VOCABULARY, 2, 16, 0.0  # a dense layer and one of experts; rates end at 0
    spreads, spread_of_topics = (1.0,), 1.0  # standard deviations of the tables: of the token before, of the one before that, and of the topics

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        rng, V = np.random.default_rng([seed, 0]), self.vocab_size
        self.pairs = np.stack([rng.normal(0, spread, (V, V)) for spread in self.spreads])
        self.tilts = rng.normal(0, self.spread_of_topics, (TOPICS, V))
        self.documents = functools.cache(self._documents)  # all runs of a seed read the same ones

    def _documents(self, first: int, count: int) -> np.ndarray:
        """(count, len(spreads) + LENGTH) tokens; the first of each are given, not drawn from the tables."""
        drawn = [np.random.default_rng([self.seed, 1, first + i]) for i in range(count)]
        topics = np.array([rng.integers(TOPICS) for rng in drawn])
        ids = np.array([rng.integers(self.vocab_size, size=len(self.spreads)) for rng in drawn])
        uniform = np.array([rng.random(LENGTH) for rng in drawn])
        for t in range(LENGTH):
            above = self._chances(ids, topics).cumsum(1) < uniform[:, t : t + 1]
            ids = np.column_stack((ids, above.sum(1).clip(max=self.vocab_size - 1)))
        return ids

    def batches(self, first: int, count: int) -> list[PackedBatch]:
        ids, given = list(self.documents(first, count).astype(np.int64)), len(self.spreads)
        return pack([row[:given] for row in ids], [row[given:] for row in ids], 4096, self.device)

    def best_loss(self, first: int, count: int) -> float:
        """Nats per token of the reader who knows the tables, on these documents."""
        ids, total, belief = self.documents(first, count), 0.0, np.full((count, TOPICS), 1 / TOPICS)
        for t in range(len(self.spreads), ids.shape[1]):
            chances = [self._chances(ids[:, :t], np.full(count, z)) for z in range(TOPICS)]
            joint = belief * np.stack([chance[np.arange(count), ids[:, t]] for chance in chances], 1)
            total -= np.log(joint.sum(1)).sum()
            belief = joint / joint.sum(1, keepdims=True)
        return float(total / (count * LENGTH))

    def _chances(self, ids: np.ndarray, topics: np.ndarray) -> np.ndarray:
        """(count, V) of the token after ids (count, t)."""
        return _softmax(sum(table[ids[:, -1 - back]] for back, table in enumerate(self.pairs)) + self.tilts[topics])


class Falling(Language):
    """Most hangs on the token two back: models of `fp8_numerics` stand still for some 150 steps, then lose a fifth of their loss."""

    vocab_size, per_step, spreads, spread_of_topics = 32, 4, (0.7, 1.6), 0.5


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
