"""The generator against the trainer's own forward: same log-probs, same tokens whatever the neighbours."""

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import ModelConfig, SamplingConfig
from athanor.generate import Generator, Request
from athanor.kernels import logprob
from athanor.model.transformer import Decoder, PackedAttention
from athanor.stages.training import completion_logprobs

EOS = 1


def make_model(architecture="qwen3", seed=0):
    config = ModelConfig(architecture=architecture, vocab_size=19, hidden_size=32, num_hidden_layers=2, intermediate_size=48, initializer_range=0.3)
    return Decoder(config).initialize_(seed)


def requests(num=5, samples=3, seed=0):
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(2, 19, size=rng.integers(1, 9)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


def teacher_forced(model, prompt, completion, temperature):
    tokens = torch.from_numpy(np.concatenate((prompt, completion)))
    n = len(tokens) - 1
    with torch.no_grad():
        hidden = model(tokens[:-1], torch.arange(n), PackedAttention(torch.tensor([0, n], dtype=torch.int32)))
        logits = hidden[len(prompt) - 1 :] @ model.lm_head_weight.T
    return logits, logprob(logits, tokens[len(prompt) :], temperature=temperature).logps.numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_the_training_forward(architecture, temperature):
    model = make_model(architecture)
    asked = requests()
    for request, group in zip(asked, Generator(model, {EOS}).generate(asked, SamplingConfig(temperature=temperature, max_tokens=20)), strict=True):
        for completion in group:
            _, wanted = teacher_forced(model, request.prompt_ids, completion.token_ids, temperature)
            np.testing.assert_allclose(completion.logps, wanted, atol=1e-5)


def test_greedy_takes_the_most_likely_token_of_the_training_forward():
    model, asked = make_model(), requests(samples=1)
    for request, (completion,) in zip(asked, Generator(model, {EOS}).generate(asked, SamplingConfig(temperature=0, max_tokens=12)), strict=True):
        logits, _ = teacher_forced(model, request.prompt_ids, completion.token_ids, 1.0)
        assert completion.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("max_rows", [3, 4, 7, 64])  # one group at a time, a spare row, two groups and a rest, all at once
def test_a_sample_does_not_depend_on_its_neighbours_or_on_refill(max_rows):
    model, asked = make_model(), requests(num=7)
    sampling = SamplingConfig(max_tokens=15)
    alone = [Generator(model, {EOS}).generate([request], sampling)[0] for request in asked]
    together = Generator(model, {EOS}, max_rows=max_rows).generate(asked, sampling)
    backwards = Generator(model, {EOS}, max_rows=max_rows).generate(asked[::-1], sampling)[::-1]
    for a, b, c in zip(alone, together, backwards, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert x.token_ids.tolist() == y.token_ids.tolist() == z.token_ids.tolist()
            np.testing.assert_allclose(x.logps, y.logps, atol=1e-5)


def test_a_sample_ends_with_the_end_token_or_at_the_limit():
    finishes = set()
    for group in Generator(make_model(), {EOS}).generate(requests(num=20, samples=4), SamplingConfig(max_tokens=10)):
        for completion in group:
            finishes.add(completion.finish)
            assert EOS not in completion.token_ids[:-1]
            assert (completion.finish == "stop") == (completion.token_ids[-1] == EOS)
            assert completion.finish == "stop" or len(completion.token_ids) == 10
            assert len(completion.logps) == len(completion.token_ids)
    assert finishes == {"stop", "length"}


def test_members_of_a_group_share_the_prompt_but_not_the_draws():
    (group,) = Generator(make_model(), {EOS}).generate([Request(np.array([3, 4]), np.arange(16))], SamplingConfig(max_tokens=12))
    assert len({tuple(c.token_ids) for c in group}) > 8


def test_one_token_limit_and_no_requests():
    assert Generator(make_model(), {EOS}).generate([], SamplingConfig()) == []
    for group in Generator(make_model(), {EOS}).generate(requests(), SamplingConfig(max_tokens=1)):
        assert all(len(c.token_ids) == 1 for c in group)


def test_progress_counts_every_sample():
    seen = []
    Generator(make_model(), {EOS}, max_rows=4).generate(requests(), SamplingConfig(max_tokens=8), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (15, 15) and seen == sorted(seen)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(np.zeros(0, np.int64), np.arange(2)), "empty prompt"),
        (Request(np.array([2]), np.arange(9)), "max_rows = 8"),
        (Request(np.full(4090, 2), np.arange(1)), "max_position_embeddings = 4096"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        Generator(make_model(), {EOS}, max_rows=8).generate([request_], SamplingConfig(max_tokens=10))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# 5 threads: uneven shares, as on machines with more cores than the one that runs this
@pytest.mark.parametrize("architecture, num_threads", [("llama", 1), ("llama", 2), ("llama", 5), ("qwen2", 2), ("qwen3", 1), ("qwen3", 2)])
def test_log_probs_equal_the_packed_training_forward_bit_for_bit(architecture, num_threads, threads):
    """The strict promise on a CPU: whatever the rollout's batches, the trainer's packing and the threads' shares were, the same bits."""
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs the fixed-order kernels")
    threads(num_threads)
    model, asked = make_model(architecture), requests(num=40, samples=4)
    groups = Generator(model, {EOS}, max_rows=32).generate(asked, SamplingConfig(max_tokens=40))
    prompts = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g]
    samples = [c for g in groups for c in g]
    for micro_batch_tokens in (64, 1000, 10**6):
        for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens):
            with torch.no_grad():
                logps = completion_logprobs(model, batch).logps
            assert np.array_equal(logps.numpy(), np.concatenate([samples[i].logps for i in batch.sequences]))


def test_the_gap_shows_when_a_weight_differs_by_one_ulp():
    """The negative control: the comparison above can fail."""
    model, asked = make_model(), requests(num=10, samples=4)
    groups = Generator(model, {EOS}).generate(asked, SamplingConfig(max_tokens=30))
    with torch.no_grad():
        weight = model.layers[0].o_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    prompts = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g]
    samples = [c for g in groups for c in g]
    (batch,) = pack(prompts, [c.token_ids for c in samples], 10**6)
    with torch.no_grad():
        logps = completion_logprobs(model, batch).logps
    assert not np.array_equal(logps.numpy(), np.concatenate([samples[i].logps for i in batch.sequences]))
