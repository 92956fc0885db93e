"""Packing against the plain definition: every completion token is predicted from the row before it, in its own sequence."""

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import ModelConfig
from athanor.model.transformer import Decoder
from athanor.stages.training import completion_logprobs


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


@pytest.mark.parametrize("capacity", [1, 25, 60, 10_000])
def test_a_shared_prompt_is_there_once_and_seen_by_each_of_its_completions(capacity):
    prompts, completions = sequences(n=30)
    prompts = [prompts[i // 5] if i < 20 else prompts[i] for i in range(30)]  # four groups of five
    prompts[3], prompts[21] = prompts[3].copy(), prompts[21][:1]
    seen, rows = {}, 0
    for batch in pack(prompts, completions, capacity, share_prompts=True):
        assert len(batch.input_ids) <= max(capacity, 17)
        rows += len(batch.input_ids)
        cu, loss_cu = batch.cu_seqlens.tolist(), batch.loss_cu_seqlens.tolist()
        keys = torch.arange(len(batch.input_ids)) if batch.shared is None else batch.shared.rows
        cu_k = cu if batch.shared is None else batch.shared.cu_seqlens.tolist()
        assert cu_k[-1] == len(keys) and cu[-1] == len(batch.input_ids) and batch.num_targets == loss_cu[-1]
        for j, s in enumerate(batch.sequences):
            tokens = np.concatenate((prompts[s], completions[s]))
            loss_rows = batch.loss_rows[loss_cu[j] : loss_cu[j + 1]]
            part = int(np.searchsorted(cu, int(loss_rows[0]), side="right")) - 1
            own = keys[cu_k[part] : cu_k[part + 1]]  # in the order of positions, and the last ones are the part's own rows
            assert batch.input_ids[own].tolist() == tokens[:-1].tolist() and batch.positions[own].tolist() == list(range(len(tokens) - 1))
            assert own[len(own) - (cu[part + 1] - cu[part]) :].tolist() == list(range(cu[part], cu[part + 1]))
            assert loss_rows.tolist() == own[len(prompts[s]) - 1 :].tolist()
            seen[s] = batch.targets[loss_cu[j] : loss_cu[j + 1]].tolist()
    assert [seen[s] for s in range(30)] == [c.tolist() for c in completions]
    unshared = sum(len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True))
    saved = sum(4 * (len(prompts[i]) - 1) for i in range(0, 20, 5))
    assert rows == unshared - saved if capacity == 10_000 else rows <= unshared


def test_shared_rows_have_the_bits_and_gradients_of_copies():
    prompts, completions = sequences(n=12)
    prompts = [np.concatenate([prompts[i // 4]] * 5) for i in range(12)]
    model = Decoder(ModelConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, initializer_range=0.2)).initialize_(3)

    def scored(model, capacity, **options):
        model.zero_grad()
        values, advantages = torch.zeros(12, dtype=model.norm.weight.dtype), torch.linspace(-1, 1, 12, dtype=model.norm.weight.dtype)
        bits = {}
        for batch in pack(prompts, completions, capacity, **options):
            logps = completion_logprobs(model, batch).logps
            parts = logps.split(batch.loss_cu_seqlens.diff().tolist())
            bits |= {int(s): part.detach() for s, part in zip(batch.sequences, parts, strict=True)}
            torch.stack([advantages[s] * part.sum() for s, part in zip(batch.sequences, parts, strict=True)]).sum().backward()
        return [bits[s] for s in range(len(values))], [p.grad.clone() for p in model.parameters()]

    (alone, _), (shared, _) = scored(model, 10_000), scored(model, 10_000, share_prompts=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    model.double()
    alone, shared, split = (scored(model, n, share_prompts=share)[1] for n, share in ((10_000, False), (10_000, True), (60, True)))
    for a, b, c in zip(alone, shared, split, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(c, a, rtol=1e-9, atol=1e-12)


def test_without_a_prompt_the_first_token_is_not_predicted():
    (batch,) = pack([np.zeros(0, np.int64)], [np.array([5, 6, 7])], 100)
    assert batch.input_ids.tolist() == [5, 6] and batch.targets.tolist() == [6, 7] and batch.loss_rows.dtype == torch.int64


def test_a_sequence_of_one_token_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        pack([np.array([1]), np.array([], np.int64)], [np.array([2]), np.array([3])], 100)
