"""The generator against the trainer's own forward: same log-probs, same tokens whatever the neighbours."""

import gc
import weakref

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import ModelConfig, SamplingConfig
from athanor.cpu_steps import shares_of
from athanor.generator import Generator
from athanor.kernels import logprob
from athanor.model.transformer import Decoder, PackedAttention
from athanor.samples import Request
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
        (Request(np.array([2, 19]), np.arange(1)), r"from 2 to 19, wanted \[0, 19\)"),
        (Request(np.array([2]), np.arange(1), SamplingConfig(stop=["x"])), "request 0 has stop strings"),
        (Request(np.array([2]), np.arange(1), eos_ids=frozenset()), "request 0 has empty eos_ids"),
        (Request(np.array([2]), np.arange(2), partial=[None]), "1 partial samples and 2 seeds"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        Generator(make_model(), {EOS}, max_rows=8).generate([request_], SamplingConfig(max_tokens=10))


def scored(model, batch, temperature=1.0, samples=None):
    """The trainer's log-probs of a packed batch, with the supports of the samples where they have any."""
    support = None
    if samples is not None and samples[0].support is not None:
        support = tuple(torch.from_numpy(np.concatenate([samples[i].support[j] for i in batch.sequences])) for j in (0, 1))
    with torch.no_grad():
        return completion_logprobs(model, batch, temperature, support).logps.numpy()


def flat(asked, groups):
    return [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]


# 5 threads: uneven shares, as on machines with more cores than the one that runs this
@pytest.mark.parametrize("architecture, num_threads", [("llama", 1), ("llama", 2), ("llama", 5), ("qwen2", 2), ("qwen3", 1), ("qwen3", 2)])
def test_log_probs_equal_the_packed_training_forward_bit_for_bit(architecture, num_threads, threads):
    """The strict promise on a CPU: whatever the rollout's batches, the trainer's packing and the threads' shares were, the same bits."""
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs strict mode")
    threads(num_threads)
    model, asked = make_model(architecture), requests(num=128, samples=4)  # 512 sequences of 1 to 40 tokens
    prompts, samples = flat(asked, Generator(model, {EOS}, max_rows=96).generate(asked, SamplingConfig(max_tokens=40)))
    for micro_batch_tokens in (64, 1000, 10**6):
        for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens):
            assert np.array_equal(scored(model, batch), np.concatenate([samples[i].logps for i in batch.sequences]))


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.6, "top_p": 0.95},
     {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.05}],  # fmt: skip
    ids=lambda s: " ".join(s),
)
def test_truncated_log_probs_are_rebuilt_by_the_trainer_bit_for_bit(sampling):
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs strict mode")
    model, asked = make_model(), requests(num=20, samples=4)
    prompts, samples = flat(asked, Generator(model, {EOS}).generate(asked, SamplingConfig(max_tokens=30, **sampling), full_logps=True))
    (batch,) = pack(prompts, [c.token_ids for c in samples], 10**6)
    temperature = sampling.get("temperature", 1.0)
    assert np.array_equal(scored(model, batch, temperature, samples), np.concatenate([samples[i].logps for i in batch.sequences]))
    full = np.concatenate([samples[i].full_logps for i in batch.sequences])
    assert np.array_equal(scored(model, batch, temperature), full)
    assert (np.concatenate([c.logps for c in samples]) >= np.concatenate([c.full_logps for c in samples]) - 1e-6).all()


def test_parameters_are_those_of_the_request_whatever_the_others_want():
    model = make_model()
    kinds = [SamplingConfig(max_tokens=12), SamplingConfig(temperature=0.5, top_p=0.9, max_tokens=9), SamplingConfig(temperature=0, max_tokens=15),
             SamplingConfig(top_k=2, max_tokens=7), SamplingConfig(min_p=0.3, temperature=2.0, max_tokens=20)]  # fmt: skip
    asked = [Request(r.prompt_ids, r.seeds, kinds[i]) for i, r in enumerate(requests(num=5, samples=3))]
    together = Generator(model, {EOS}).generate(asked)
    for request, kind, group in zip(asked, kinds, together, strict=True):
        (alone,) = Generator(model, {EOS}).generate([Request(request.prompt_ids, request.seeds)], kind)
        for a, b in zip(alone, group, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logps, b.logps) and a.finish == b.finish
            assert (a.support is None) == (b.support is None) == (not kind.truncated)
    assert max(len(c.token_ids) for c in together[3]) <= 7


def test_each_request_may_have_its_own_end_tokens():
    model, asked = make_model(), requests(num=6, samples=6)
    ends = [frozenset({EOS}), frozenset({2, 3, 4}), frozenset({18})] * 2
    groups = Generator(model, {EOS}).generate([Request(r.prompt_ids, r.seeds, eos_ids=e) for r, e in zip(asked, ends, strict=True)])
    for end, group in zip(ends, groups, strict=True):
        for c in group:
            assert not end & set(c.token_ids[:-1].tolist()) and (c.finish == "stop") == (int(c.token_ids[-1]) in end)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_a_prompt_gives_the_same_bits_alone_and_in_any_company(rows):
    model = make_model()
    (mine,) = requests(num=1, samples=1, seed=5)
    others = requests(num=63, samples=1, seed=6)
    sampling = SamplingConfig(max_tokens=30)
    ((alone,),) = Generator(model, {EOS}).generate([mine], sampling)
    company = others[: rows - 1]
    for place in {0, len(company) // 2, len(company)}:
        asked = [*company[:place], mine, *company[place:]]
        ((same,),) = Generator(model, {EOS}).generate(asked, sampling)[place : place + 1]
        assert same.token_ids.tolist() == alone.token_ids.tolist() and np.array_equal(same.logps, alone.logps)


def test_the_gap_shows_when_a_weight_differs_by_one_ulp():
    """The negative control: the comparisons above can fail."""
    model, asked = make_model(), requests(num=10, samples=4)
    prompts, samples = flat(asked, Generator(model, {EOS}).generate(asked, SamplingConfig(max_tokens=30)))
    with torch.no_grad():
        weight = model.layers[0].o_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    (batch,) = pack(prompts, [c.token_ids for c in samples], 10**6)
    assert not np.array_equal(scored(model, batch), np.concatenate([samples[i].logps for i in batch.sequences]))


def test_tokens_go_in_and_out_over_five_tool_turns():
    """No text in between: what the trainer sees is the concatenation of sampled and injected ids, with the log-probs of each turn."""
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs strict mode")
    model, rng = make_model(), np.random.default_rng(3)
    generator = Generator(model, {EOS})
    context, sampled, logps = np.array([3, 5, 7]), [], []
    for turn in range(5):
        ((completion,),) = generator.generate([Request(context, np.array([100 + turn]))], SamplingConfig(max_tokens=9))
        sampled += range(len(context), len(context) + len(completion.token_ids))
        logps.append(completion.logps)
        injected = rng.integers(2, 19, size=4)
        context = np.concatenate((context, completion.token_ids, injected))
    (batch,) = pack([context[:1]], [context[1:]], 10**6)
    assert np.array_equal(scored(model, batch)[np.array(sampled) - 1], np.concatenate(logps))


def test_a_row_of_nan_ends_that_sample_and_no_other():
    """A poisoned embedding: whoever draws token 7 gets NaN logits next."""
    model, asked = make_model(), requests(num=8, samples=4)
    sampling = SamplingConfig(max_tokens=25)
    asked = [Request(np.where(r.prompt_ids == 7, 8, r.prompt_ids), r.seeds) for r in asked]
    sound = Generator(model, {EOS}).generate(asked, sampling)
    model.config = model.config.model_copy(update={"tie_word_embeddings": False})
    model.lm_head = torch.nn.Linear(32, 19, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed.weight)
        model.embed.weight[7] = torch.nan
    poisoned = Generator(model, {EOS}, max_rows=8).generate(asked, sampling)
    finishes = set()
    for a, b in zip(sum(sound, []), sum(poisoned, []), strict=True):
        tokens = a.token_ids.tolist()
        cut = tokens.index(7) + 1 if 7 in tokens else len(tokens)
        finishes.add(b.finish)
        assert b.token_ids.tolist() == tokens[:cut] and np.array_equal(b.logps, a.logps[:cut])
        assert (b.finish == "error") == (cut < len(tokens) or (7 in tokens and a.finish == "length" and cut < 25))
    assert "error" in finishes and len(finishes) > 1


def test_a_nan_prompt_gives_empty_samples():
    model = make_model()
    with torch.no_grad():
        model.embed.weight[4] = torch.nan
    (bad,) = Generator(model, {EOS}).generate([Request(np.array([4, 5]), np.arange(3))], SamplingConfig(max_tokens=5))
    assert all(c.finish == "error" and len(c.token_ids) == len(c.logps) == 0 for c in bad)


@pytest.mark.parametrize("limit", [1, 3])
def test_tokens_in_a_row_that_are_nearly_certain_end_a_sample(limit):
    model, asked = make_model(), requests(num=20, samples=4)
    sampling = SamplingConfig(max_tokens=25, temperature=0.3, repetition_tokens=limit, repetition_probability=0.7)
    free = Generator(model, {EOS}).generate(asked, sampling.model_copy(update={"repetition_tokens": 0}), full_logps=True)
    stopped = Generator(model, {EOS}, max_rows=12).generate(asked, sampling)
    finishes = set()
    for a, b in zip(sum(free, []), sum(stopped, []), strict=True):
        run, cut = 0, len(a.token_ids)
        for n, logp in enumerate(a.full_logps):
            run = run + 1 if logp > np.log(np.float32(0.7)) else 0
            if run == limit:
                cut = n + 1
                break
        finishes.add(b.finish)
        assert b.token_ids.tolist() == a.token_ids[:cut].tolist()
        if cut < len(a.token_ids):
            assert b.finish == "repetition"
    assert "repetition" in finishes and len(finishes) > 1


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_captured_steps_draw_what_plain_steps_draw(budget, monkeypatch):
    """Rows come and go, so that several buckets are captured and replayed; with a budget of 0 none is."""
    monkeypatch.setattr("athanor.cpu_steps.CAPTURED_BYTES", budget)
    model, asked = make_model(), requests(num=30, samples=4)
    generator = Generator(model, {EOS}, max_rows=64)
    groups = generator.generate(asked, SamplingConfig(max_tokens=20)), generator.generate(asked, SamplingConfig(max_tokens=20))
    captured = [step.forward.valid and step.append.valid for step in generator.rows.cpu.steps.values()]
    assert len(captured) >= 4 and set(captured) == {budget > 0}
    assert (generator.rows.cpu.captured_bytes > 0) == (budget > 0)
    alone = [Generator(model, {EOS}).generate([request], SamplingConfig(max_tokens=20))[0] for request in asked]
    for group in groups:
        for a, b in zip(sum(group, []), sum(alone, []), strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logps, b.logps)


@pytest.mark.parametrize("sampling", [SamplingConfig(max_tokens=20), SamplingConfig(max_tokens=20, top_k=5)])
def test_threads_take_shares_of_the_rows(sampling):
    """As many as there are blocks of 16 rows; of a truncated draw more is kept than kernels write, and threads go through a step together."""
    model, asked, results, threads = make_model(), requests(num=20, samples=4), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            generator = Generator(model, {EOS}, max_rows=64)
            results.append(sum(generator.generate(asked, sampling), []))
            assert torch.get_num_threads() == count
            split = {(step.rows.start, step.rows.stop) for step in generator.rows.cpu.steps.values() if step.rows.start}
            assert bool(split) == (count > 1 and sampling.top_k == 0), split
            assert generator.timings["forward_s"] > 0 and generator.timings["sample_s"] > 0
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logps, b.logps)


def test_a_step_without_memory_leaves_the_others_split(monkeypatch):
    """A budget for some of the buckets: their threads still take shares, those of the others go together, and the samples are the same."""
    model, asked, threads = make_model(), requests(num=30, samples=4), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        plenty = Generator(model, {EOS}, max_rows=64)
        want = sum(plenty.generate(asked, SamplingConfig(max_tokens=20)), [])
        assert len(plenty.rows.cpu.steps) > 2 and not plenty.rows.cpu.together
        monkeypatch.setattr("athanor.cpu_steps.CAPTURED_BYTES", plenty.rows.cpu.captured_bytes // 2)
        generator = Generator(model, {EOS}, max_rows=64)
        for _ in range(2):
            got = sum(generator.generate(asked, SamplingConfig(max_tokens=20)), [])
            assert all(a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logps, b.logps) for a, b in zip(want, got, strict=True))
        steps = generator.rows.cpu
        assert steps.together and any(step.rows.start and step.calls for step in steps.steps.values())
        assert 0 < steps.captured_bytes <= plenty.rows.cpu.captured_bytes // 2
    finally:
        torch.set_num_threads(threads)


def test_a_generator_is_freed_at_once():
    """With its cache and all that captured steps keep: a stage makes several, and Python's collector comes late."""
    generator = Generator(make_model(), {EOS}, max_rows=64)
    generator.generate(requests(num=10, samples=4), SamplingConfig(max_tokens=20))
    assert generator.rows.cpu.steps
    kept = [weakref.ref(generator.rows), weakref.ref(generator.cache), *(weakref.ref(step) for step in generator.rows.cpu.steps.values())]
    gc.disable()
    try:
        del generator
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("rows, threads, bounds", [(64, 2, [32, 64]), (64, 5, [16, 32, 48, 64]), (48, 2, [16, 48]), (16, 4, [16]),
                                                   (512, 3, [160, 336, 512])])  # fmt: skip
def test_shares_are_whole_blocks_of_rows(rows, threads, bounds):
    shares = shares_of(rows, threads)
    assert [s.start for s in shares] == [0, *(s.stop for s in shares[:-1])] and shares[-1].stop == rows
    assert len(shares) == min(threads, rows // 16) and all((s.stop - s.start) % 16 == 0 and s.stop > s.start for s in shares)
    assert {s.stop for s in shares} >= set(bounds)


@pytest.mark.parametrize("in_place", [True, False])
def test_captured_steps_read_the_weights_where_they_are(in_place):
    """Written in place, as an optimizer does, or put elsewhere, as a cast or a sharding library may."""
    model, asked, sampling = make_model(), requests(num=10, samples=4), SamplingConfig(max_tokens=20)
    kept = Generator(model, {EOS})
    before = kept.generate(asked, sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            if in_place:
                parameter.mul_(1.1)
            else:
                parameter.data = parameter.data * 1.1
    after, fresh = kept.generate(asked, sampling), Generator(model, {EOS}).generate(asked, sampling)
    changed = False
    for a, b, c in zip(sum(before, []), sum(after, []), sum(fresh, []), strict=True):
        changed |= a.token_ids.tolist() != b.token_ids.tolist()
        assert b.token_ids.tolist() == c.token_ids.tolist() and np.array_equal(b.logps, c.logps)
    assert changed
