"""Prompts in pieces: whatever they are cut into, the bits are those of one piece, and the other samples go on in between."""

import numpy as np
import pytest
import torch

from athanor.config import ModelConfig, SamplingConfig
from athanor.generator import Generator
from athanor.model.transformer import ROW_STEP, Decoder
from athanor.prefill import pieces
from athanor.samples import Request
from athanor.tokenizer import symbol_tokenizer

EOS, NEVER = 2, {19}  # an end token outside of the vocabulary: no sample ends early
WORDS = symbol_tokenizer(["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "done"])
SAMPLING = SamplingConfig(max_tokens=12)


def make_model(architecture="qwen3"):
    shape = ModelConfig(architecture=architecture, vocab_size=19, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=48, initializer_range=0.3)  # fmt: skip
    return Decoder(shape).initialize_(0)


def requests(num, samples):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(3, 19, size=rng.integers(1, 20)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


def same(a, b):
    assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
    assert np.array_equal(a.logps, b.logps)


def long_request(length, samples=3, seed=0, **options):
    rng = np.random.default_rng(seed)
    return Request(rng.integers(3, 19, size=length), rng.integers(0, 2**62, size=samples), **options)


def widest_forward(model, seen):
    """Record the tokens of every forward of a prefill, the fillers included."""
    forward = model.forward

    def watched(input_ids, positions, attend, routes):
        seen.append(len(input_ids))
        return forward(input_ids, positions, attend, routes)

    model.forward = watched


@pytest.mark.parametrize(
    "lengths, most, wanted",
    [
        ([], 4, []),
        ([3, 1], 4, [[(0, 0, 3), (1, 0, 1)]]),
        ([3, 2], 4, [[(0, 0, 3), (1, 0, 1)], [(1, 1, 2)]]),
        ([9], 4, [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 9)]]),
        ([4, 4], 4, [[(0, 0, 4)], [(1, 0, 4)]]),
    ],
)
def test_pieces_are_full_and_in_order(lengths, most, wanted):
    assert pieces(lengths, most) == wanted


# One token, odd, whole row steps, a chunk of the attention, one token short of all; 600 tokens see three chunks.
@pytest.mark.parametrize("most, architecture", [(1, "qwen3"), (37, "llama"), (64, "qwen2"), (256, "qwen3"), (599, "llama")])
def test_a_prompt_in_pieces_leaves_the_same_bytes_in_the_cache_and_draws_the_same(most, architecture):
    request, model = long_request(70 if most == 1 else 600), make_model(architecture)
    whole, cut = Generator(model, {EOS}), Generator(model, {EOS}, max_prefill_tokens=most)
    for a, b in zip(whole.generate([request], SAMPLING)[0], cut.generate([request], SAMPLING)[0], strict=True):
        same(a, b)
    assert whole.num_prefill_tokens == cut.num_prefill_tokens == len(request.prompt_ids)
    for a, b in zip(whole.cache.keys + whole.cache.values, cut.cache.keys + cut.cache.values, strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("slab_bytes", [1, 3000, 1 << 28])  # a row at a time, rows of which no slab begins where a group does, all at once
def test_slabs_of_rows_change_no_bit(slab_bytes, threads, monkeypatch):
    request, model, before = long_request(330, samples=2), make_model(), torch.get_num_threads()
    (whole,) = Generator(model, {EOS}).generate([request], SAMPLING)
    monkeypatch.setattr("athanor.kv_cache.SLAB_BYTES", slab_bytes)
    torch.set_num_threads(threads)
    (cut,) = Generator(model, {EOS}, max_prefill_tokens=100).generate([request], SAMPLING)
    torch.set_num_threads(before)
    for a, b in zip(whole, cut, strict=True):
        same(a, b)


def test_no_forward_is_wider_than_a_piece():
    asked, model, seen = [long_request(300), long_request(50, seed=1), long_request(41, seed=2)], make_model(), []
    widest_forward(model, seen)
    generator = Generator(model, {EOS}, max_prefill_tokens=40, max_rows=3)
    generator.generate(asked, SamplingConfig(max_tokens=1))
    assert max(seen) == 48 and max(seen) - 40 < ROW_STEP  # 40 in whole row steps
    assert generator.num_prefill_tokens == 391 and sum(n > 16 for n in seen) == 8 + 1 + 1 and len(seen) == 12  # 40 + 10 and 40 + 1 of the others


@pytest.mark.parametrize("most", [9, 64])
def test_resumed_samples_run_only_what_is_behind_their_prompt_in_pieces_too(most):
    """The prompt is shared, so its tokens run once for all members, and a member's own tokens may be longer than a piece."""
    request, model = long_request(45, samples=4), make_model()
    sampling = SamplingConfig(max_tokens=60)
    (whole,) = Generator(model, NEVER).generate([request], sampling)
    with Generator(model, NEVER).stream([request], sampling) as stream:
        for _ in range(30):
            list(stream.step())
        stream.abort(0)
        aborted = {m: c for _, m, c in stream}
    members = sorted(m for m, c in aborted.items() if c.finish == "abort")
    assert len(members) >= 2
    partial = [aborted[m] for m in members[:-1]] + [None]  # and one from the start
    generator = Generator(model, NEVER, max_prefill_tokens=most)
    (again,) = generator.generate([Request(request.prompt_ids, request.seeds[members], partial=partial)], sampling)
    for m, completion in zip(members, again, strict=True):
        same(whole[m], completion)
    assert generator.num_prefill_tokens == 45 + sum(len(p.token_ids) for p in partial[:-1])


def test_the_others_decode_one_window_between_two_pieces():
    short, long = requests(1, samples=6)[0], long_request(400, samples=4)
    model, sampling = make_model(), SamplingConfig(max_tokens=40)
    asked = [Request(short.prompt_ids, short.seeds, priority=100), long]
    alone = [Generator(model, NEVER).generate([r], sampling)[0] for r in asked]
    generator, done, grown = Generator(model, NEVER, max_prefill_tokens=50, max_rows=64), {}, []
    with generator.stream(asked, sampling) as stream:
        while not stream.finished:
            tokens, length = generator.num_prefill_tokens, len(stream.tokens_of(0, 0))
            done.update({(i, m): c for i, m, c in stream.step()})
            if (0, 0) not in done and generator.num_prefill_tokens == tokens + 50:
                assert stream.num_decoding in (6, 10) and len(stream.tokens_of(1, 0)) <= 2
                grown.append(len(stream.tokens_of(0, 0)) - length)
    assert len(grown) == 8 and set(grown[1:]) == {1} and generator.num_prefill_tokens == 400 + len(short.prompt_ids)
    for (i, m), completion in done.items():
        same(alone[i][m], completion)


def test_rows_that_move_while_a_prompt_is_under_way_change_nothing():
    """Others end between the pieces, so that the held rows lie among those that decode when their first token is drawn."""
    asked = [*requests(6, samples=5), long_request(260, samples=7)]
    asked = [Request(r.prompt_ids, r.seeds, SamplingConfig(max_tokens=3 + 4 * i)) for i, r in enumerate(asked)]
    asked[-1] = Request(asked[-1].prompt_ids, asked[-1].seeds, SamplingConfig(max_tokens=30), priority=-100)
    model = make_model()
    alone = [Generator(model, {EOS}).generate([r])[0] for r in asked]
    for window, ahead in ((1, 0), (3, 0), (2, 1)):
        cut = Generator(model, {EOS}, max_prefill_tokens=20, max_rows=64, window=window, ahead=ahead).generate(asked)
        for a, b in zip(sum(alone, []), sum(cut, []), strict=True):
            same(a, b)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("what", ["request", "member", "all", "weights", "other"])
def test_what_happens_while_a_prompt_is_under_way(what, ahead):
    """Aborted and resumed, or with new weights: every sample still has the bits that it has alone."""
    short, long = requests(1, samples=4)[0], long_request(200, samples=3)
    model, sampling = make_model(), SamplingConfig(max_tokens=25)
    asked = [Request(short.prompt_ids, short.seeds, priority=100), long]
    generator, done = Generator(model, NEVER, max_prefill_tokens=30, max_rows=64, kv_tokens=2000, ahead=ahead, window=2), {}
    with generator.stream(asked, sampling) as stream:
        for _ in range(5):
            done.update({(i, m): c for i, m, c in stream.step()})
        assert 0 < generator.num_prefill_tokens - len(short.prompt_ids) < 200 and stream.num_decoding == 4
        if what == "weights":
            with torch.no_grad():
                model.layers[0].down_proj.weight.mul_(1.5)
        else:
            stream.abort(*{"request": (1,), "member": (1, 2), "all": (), "other": (0, 1)}[what])
            stream.scheduler.audit()
        done.update({(i, m): c for i, m, c in stream})
        assert stream.scheduler.num_free_blocks == stream.scheduler.num_blocks
    assert len(done) == 7
    aborted = {key for key, c in done.items() if c.finish == "abort"}
    long_samples = {(1, 0), (1, 1), (1, 2)}
    assert aborted == {"request": long_samples, "member": {(1, 2)}, "all": set(done), "weights": set(), "other": {(0, 1)}}[what]
    if what == "weights":  # the long prompt began anew
        assert all((done[key].versions == 1).all() for key in long_samples)
        (alone,) = Generator(model, NEVER).generate([long], sampling)
        for _, m in long_samples:
            same(alone[m], done[1, m])
        return
    alone = [Generator(model, NEVER).generate([r], sampling)[0] for r in asked]
    for (i, m), c in done.items():
        if c.finish == "abort":
            ((c,),) = generator.generate([Request(asked[i].prompt_ids, asked[i].seeds[m : m + 1], partial=[c])], sampling)
        same(alone[i][m], c)


def test_stop_strings_and_limits_hold_behind_a_prompt_in_pieces():
    asked = [long_request(90, seed=i) for i in range(6)]
    sampling = SamplingConfig(max_tokens=30, temperature=0.7, stop=["one two", "done"], repetition_tokens=4, repetition_probability=0.6)
    model = make_model()
    whole = Generator(model, {EOS}, tokenizer=WORDS).generate(asked, sampling)
    cut = Generator(model, {EOS}, tokenizer=WORDS, max_prefill_tokens=32, max_rows=7, kv_tokens=500, policy="pause").generate(asked, sampling)
    for a, b in zip(sum(whole, []), sum(cut, []), strict=True):
        same(a, b)
