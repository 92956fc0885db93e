"""Packing against the plain definition: every completion token is predicted from the row before it, in its own sequence."""

import numpy as np
import pytest
import torch

from athanor.batch import pack


def sequences(seed=0, n=23):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 99, size=rng.integers(1, 7)) for _ in range(n)], [rng.integers(0, 99, size=rng.integers(1, 12)) for _ in range(n)]


@pytest.mark.parametrize("capacity", [1, 17, 40, 10_000])  # every sequence alone, a few, several, all in one
def test_every_completion_token_is_a_target_once(capacity):
    prompts, completions = sequences()
    seen = {}
    for batch in pack(prompts, completions, capacity):
        assert len(batch.input_ids) <= max(capacity, 17)
        cu, loss_cu = batch.cu_seqlens.tolist(), batch.loss_cu_seqlens.tolist()
        assert batch.num_targets == loss_cu[-1] == len(batch.loss_rows)
        for j, s in enumerate(batch.sequences):
            tokens = np.concatenate((prompts[s], completions[s]))
            assert batch.input_ids[cu[j] : cu[j + 1]].tolist() == tokens[:-1].tolist()
            assert batch.positions[cu[j] : cu[j + 1]].tolist() == list(range(len(tokens) - 1))
            rows = batch.loss_rows[loss_cu[j] : loss_cu[j + 1]]
            assert (rows - cu[j]).tolist() == list(range(len(prompts[s]) - 1, len(tokens) - 1))
            seen[s] = batch.targets[loss_cu[j] : loss_cu[j + 1]].tolist()
    assert [seen[s] for s in range(len(prompts))] == [c.tolist() for c in completions]


def test_without_a_prompt_the_first_token_is_not_predicted():
    (batch,) = pack([np.zeros(0, np.int64)], [np.array([5, 6, 7])], 100)
    assert batch.input_ids.tolist() == [5, 6] and batch.targets.tolist() == [6, 7] and batch.loss_rows.dtype == torch.int64


def test_a_sequence_of_one_token_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        pack([np.array([1]), np.array([], np.int64)], [np.array([2]), np.array([3])], 100)
