"""Streams: abort and resume, pauses, changing weights, stop strings, and pools far smaller than the work."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from athanor.config import ModelConfig, SamplingConfig
from athanor.decode import DecodeRows
from athanor.generator import Generator
from athanor.model.transformer import Decoder
from athanor.samples import Request
from athanor.stream import Stream
from athanor.tokenizer import symbol_tokenizer

EOS = 2
WORDS = symbol_tokenizer(["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "done"])


def make_model(seed=0, width=32, layers=2, vocab=19):
    shape = ModelConfig(architecture="qwen3", vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3)  # fmt: skip
    return Decoder(shape).initialize_(seed)


def requests(num, samples=3, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(3, 19, size=rng.integers(1, longest)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


def same(a, b):
    assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
    assert np.array_equal(a.logps, b.logps)


SAMPLING = SamplingConfig(max_tokens=50)


def test_samples_come_as_they_finish_each_once():
    asked = requests(12)
    whole = Generator(make_model(), {EOS}).generate(asked, SAMPLING)
    generator, seen, decoding = Generator(make_model(), {EOS}, max_rows=9), {}, []
    with generator.stream(asked, SAMPLING) as stream:
        for request, member, completion in stream:
            assert (request, member) not in seen
            seen[request, member] = completion
            decoding.append(stream.num_decoding)
    assert max(decoding) > 0 and len(seen) == 36
    for (request, member), completion in seen.items():
        same(completion, whole[request][member])


@pytest.mark.parametrize("policy, kv_tokens", [("reserve", 600), ("pause", 160), ("pause", 10_000)])
def test_refills_and_pauses_change_no_bit(policy, kv_tokens):
    """160 tokens are ten blocks: one sample of the longest request and little else; rows pause with their KV and go on."""
    asked = requests(10, samples=4)
    short = [Request(r.prompt_ids, r.seeds, expected_tokens=3) for r in asked]
    whole = Generator(make_model(), {EOS}).generate(asked, SAMPLING)
    tight = Generator(make_model(), {EOS}, max_rows=16, kv_tokens=kv_tokens, policy=policy).generate(short, SAMPLING)
    for a, b in zip(sum(whole, []), sum(tight, []), strict=True):
        same(a, b)


@pytest.mark.parametrize("window", [2, 5, 64])  # the last is longer than any sample
def test_steps_without_the_host_change_no_bit(window):
    """End tokens, stop strings, repetition and limits inside a window: what was decoded beyond them is dropped, and its blocks are as good as new."""
    asked = requests(12, samples=4)
    sampling = SamplingConfig(max_tokens=30, temperature=0.7, stop=["one two", "done"], repetition_tokens=4, repetition_probability=0.6)
    model = make_model()
    whole = Generator(model, {EOS}, tokenizer=WORDS).generate(asked, sampling)
    ahead = Generator(model, {EOS}, tokenizer=WORDS, max_rows=16, kv_tokens=700, policy="pause", window=window).generate(asked, sampling)
    for a, b in zip(sum(whole, []), sum(ahead, []), strict=True):
        same(a, b)
    assert {c.finish for c in sum(whole, [])} == {"stop", "length", "repetition"}


@pytest.mark.parametrize(
    "policy, kv_tokens, window, ahead",
    [("reserve", 2000, 1, 1), ("reserve", 2000, 64, 1), ("pause", 160, 1, 1), ("pause", 200, 4, 1), ("pause", 200, 3, 2)],
)
def test_windows_launched_before_the_last_one_is_read_change_no_bit(policy, kv_tokens, window, ahead):
    """Rows end, move, grow, pause and go on while the device is ahead of what the host knows."""
    asked = [Request(r.prompt_ids, r.seeds, expected_tokens=3) for r in requests(12, samples=4)]
    sampling = SamplingConfig(max_tokens=40, temperature=0.7, stop=["one two", "done"], repetition_tokens=7, repetition_probability=0.6, top_k=15)
    model = make_model()
    whole = Generator(model, {EOS}, tokenizer=WORDS).generate(asked, sampling, full_logps=True)
    options = {"max_rows": 16, "kv_tokens": kv_tokens, "policy": policy, "window": window, "ahead": ahead}
    generator, done, paused = Generator(model, {EOS}, tokenizer=WORDS, **options), {}, 0
    with generator.stream(asked, sampling, full_logps=True) as stream:
        while not stream.finished:
            done.update({(i, m): c for i, m, c in stream.step()})
            paused += stream.scheduler.num_paused
            stream.scheduler.audit()
        assert stream.scheduler.num_free_blocks == stream.scheduler.num_blocks
    for i, group in enumerate(whole):
        for m, a in enumerate(group):
            same(a, done[i, m])
            for x, y in zip((a.full_logps, *a.support), (done[i, m].full_logps, *done[i, m].support), strict=True):
                assert np.array_equal(x, y)
    assert {c.finish for c in done.values()} == {"stop", "length", "repetition"} and (paused > 0) == (policy == "pause")


def test_a_window_is_launched_before_the_last_one_is_read(monkeypatch):
    order = []
    decode, account = DecodeRows.decode, Stream._account
    monkeypatch.setattr(DecodeRows, "decode", lambda *a: order.append("launch") or decode(*a))
    monkeypatch.setattr(Stream, "_account", lambda *a: order.append("read") or account(*a))
    generator = Generator(make_model(), {19}, window=4, ahead=1)
    generator.generate(requests(2), SamplingConfig(max_tokens=17))
    # The first read is that of the first tokens; one window too many has run when the host finds that all have ended.
    assert order == ["launch", "read"] * 5


@pytest.mark.parametrize("window, ahead", [(1, 0), (3, 1)])
def test_aborted_samples_go_on_where_they_were_with_the_same_bits(window, ahead):
    asked, model = requests(8, samples=4), make_model()
    sampling = SamplingConfig(max_tokens=50, temperature=0.7, repetition_tokens=7, repetition_probability=0.5)
    whole = Generator(model, {EOS}).generate(asked, sampling)
    results = [[None] * 4 for _ in asked]
    generator = Generator(model, {EOS}, max_rows=16, window=window, ahead=ahead)
    rounds = 0
    while any(c is None or c.finish == "abort" for group in results for c in group):
        todo = [[m for m in range(4) if group[m] is None or group[m].finish == "abort"] for group in results]
        partial = [Request(r.prompt_ids, r.seeds[m], partial=[results[i][k] for k in m]) for i, (r, m) in enumerate(zip(asked, todo, strict=True))]
        with generator.stream(partial, sampling) as stream:
            for _ in range(6 // window + 2 * ahead):
                for i, member, completion in stream.step():
                    results[i][todo[i][member]] = completion
            stream.abort()
            for i, member, completion in stream:
                results[i][todo[i][member]] = completion
        rounds += 1
    assert rounds > 5
    for a, b in zip(sum(whole, []), sum(results, []), strict=True):
        same(a, b)
    assert sum(c.finish == "repetition" for c in sum(whole, [])) >= 3


def test_one_sample_or_one_request_can_be_aborted():
    asked = requests(4, samples=3)
    whole = Generator(make_model(), {EOS}).generate(asked, SAMPLING)
    done = {}
    with Generator(make_model(), {EOS}).stream(asked, SAMPLING) as stream:
        for _ in range(3):
            done.update({(i, m): c for i, m, c in stream.step()})
        stream.abort(1, 2)
        stream.abort(3)
        stream.abort(3)  # what is gone stays gone
        done.update({(i, m): c for i, m, c in stream})
    assert len(done) == 12
    for (i, m), completion in done.items():
        if completion.finish == "abort":
            assert i == 3 or (i, m) == (1, 2)
            assert completion.token_ids.tolist() == whole[i][m].token_ids[: len(completion.token_ids)].tolist() and len(completion.token_ids) <= 4
        else:
            same(completion, whole[i][m])
    assert sum(c.finish == "abort" for c in done.values()) >= 2


@pytest.mark.parametrize("window, ahead", [(1, 0), (3, 1)])
def test_on_demand_samples_of_a_request_come_in_parts_and_go_on_after_an_abort(window, ahead):
    asked = requests(3, samples=4)
    whole = Generator(make_model(), {EOS}).generate(asked, SAMPLING)
    generator, done, aborted = Generator(make_model(), {EOS}, window=window, ahead=ahead), {}, 0
    with generator.stream(asked, SAMPLING, on_demand=True, max_rows=6) as stream:
        assert stream.step() == [] and stream.finished
        for i, members in ((1, [1, 3]), (0, [0, 1, 2, 3]), (1, [0]), (2, [2])):
            stream.submit(i, members)
        while len(done) < 8:
            for i, m, completion in stream.step():
                if completion.finish == "abort":
                    aborted += 1
                    stream.submit(i, [m], {m: completion} if len(completion.token_ids) else {})
                else:
                    done[i, m] = completion
            if aborted < 6:
                stream.abort(1, [0, 3])  # the scheduler has them in other requests behind each abort
        stream.submit(1, [2])  # after everything
        while not stream.finished:
            done.update({(i, m): c for i, m, c in stream.step()})
    assert sorted(done) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 2)] and aborted >= 4
    for (i, m), completion in done.items():
        same(completion, whole[i][m])


@pytest.mark.parametrize("window, ahead", [(1, 0), (2, 1)])
def test_new_weights_drop_the_keys_and_values_of_the_old_ones(window, ahead):
    """After a change the rest of a sample is what a new generator gives behind the tokens that were there."""
    asked, model = requests(5, samples=3), make_model()
    sampling = SamplingConfig(max_tokens=30)
    generator, done = Generator(model, {EOS}, max_rows=9, window=window, ahead=ahead), {}
    with generator.stream(asked, sampling) as stream:
        for _ in range(5):
            done.update({(i, m): c for i, m, c in stream.step()})
        with torch.no_grad():
            model.layers[0].down_proj.weight.mul_(1.5)
        done.update({(i, m): c for i, m, c in stream})
    assert generator.version == 1
    fresh, changed = Generator(model, {EOS}), 0
    for (i, m), completion in done.items():
        old = int((completion.versions == 0).sum())
        assert (np.diff(completion.versions) >= 0).all()
        if 0 < old < len(completion.token_ids):
            changed += 1
            before = type(completion)(*(x[:old] for x in (completion.token_ids, completion.logps)), "abort", completion.versions[:old])
            ((again,),) = fresh.generate([Request(asked[i].prompt_ids, asked[i].seeds[m : m + 1], partial=[before])], sampling)
            assert again.token_ids.tolist() == completion.token_ids.tolist() and np.array_equal(again.logps[old:], completion.logps[old:])
    assert changed >= 3


def test_a_stop_string_ends_a_sample_and_stays_in_it():
    model, asked = make_model(), requests(20, samples=4)
    free = Generator(model, {EOS}, tokenizer=WORDS).generate(asked, SamplingConfig(max_tokens=30))
    stop = ["one two", "done", "eta gam"]  # over two tokens, a whole one, and within two
    stopped = Generator(model, {EOS}, tokenizer=WORDS, max_rows=16).generate(asked, SamplingConfig(max_tokens=30, stop=stop))
    hits = 0
    for a, b in zip(sum(free, []), sum(stopped, []), strict=True):
        ends = [n for n in range(1, len(a.token_ids) + 1) if any(s in WORDS.decode(a.token_ids[:n]) for s in stop)]
        cut = ends[0] if ends else len(a.token_ids)
        hits += bool(ends)
        assert b.token_ids.tolist() == a.token_ids[:cut].tolist() and np.array_equal(b.logps, a.logps[:cut])
        assert not ends or b.finish == "stop"
    assert hits >= 5


def test_tokens_can_be_watched_while_they_come():
    (request,) = requests(1, samples=2)
    with Generator(make_model(), {EOS}).stream([request], SAMPLING) as stream:
        seen = [[], []]
        while not stream.finished:
            finished = {m: c for _, m, c in stream.step()}
            for m in (0, 1):
                now = finished[m].token_ids.tolist() if m in finished else stream.tokens_of(0, m).tolist()
                if now:
                    assert now[: len(seen[m])] == seen[m]
                    seen[m] = now
    assert all(len(s) > 2 for s in seen)


def test_a_second_stream_of_a_generator_is_refused_until_the_first_is_closed():
    generator = Generator(make_model(), {EOS})
    stream = generator.stream(requests(3), SAMPLING)
    with pytest.raises(ValueError, match="another stream is open"):
        generator.stream(requests(3), SAMPLING)
    stream.close()
    assert list(stream) == [] and len(generator.generate(requests(3), SAMPLING)) == 3


def test_a_partial_sample_must_fit_the_request():
    generator = Generator(make_model(), {EOS})
    (request,) = requests(1, samples=1)
    ((whole,),) = generator.generate([request], SamplingConfig(max_tokens=4))
    with pytest.raises(ValueError, match="finish '(length|stop)'"):
        generator.generate([Request(request.prompt_ids, request.seeds, partial=[whole])], SamplingConfig(max_tokens=9))
    aborted = type(whole)(whole.token_ids, whole.logps, "abort", whole.versions)
    with pytest.raises(ValueError, match="has no thresholds, last_kept"):
        generator.generate([Request(request.prompt_ids, request.seeds, partial=[aborted])], SamplingConfig(max_tokens=9, top_k=3))
    with pytest.raises(ValueError, match="request 0: .*blocks"):
        Generator(make_model(), {EOS}, kv_tokens=16).generate(requests(1), SamplingConfig(max_tokens=30))


def test_a_group_prefills_its_prompt_once():
    generator = Generator(make_model(), {EOS}, max_rows=8)
    prompt = np.random.default_rng(0).integers(3, 19, size=100)
    generator.generate([Request(prompt, np.arange(8))], SamplingConfig(max_tokens=5))
    assert generator.num_prefill_tokens == 100


def test_a_long_shared_prompt_is_read_together_with_the_same_bits():
    """Beyond 256 tokens the attention reads the prompt once per group; each sample alone must give the same."""
    model, prompt = make_model(), np.random.default_rng(0).integers(3, 19, size=300)
    (group,) = Generator(model, {EOS}).generate([Request(prompt, np.arange(6))], SamplingConfig(max_tokens=12))
    for seed, completion in enumerate(group):
        ((alone,),) = Generator(model, {EOS}).generate([Request(prompt, np.array([seed]))], SamplingConfig(max_tokens=12))
        same(alone, completion)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_stream import digest
print(digest(int(sys.argv[2])))
"""


def digest(max_rows):
    """Of tokens and log-probs of a fixed set of requests."""
    groups = Generator(make_model(), {EOS}, max_rows=max_rows).generate(requests(10, samples=4), SAMPLING)
    return hashlib.sha256(b"".join(c.token_ids.tobytes() + c.logps.tobytes() for g in groups for c in g)).hexdigest()


@pytest.mark.multiproc
def test_another_process_with_another_batch_size_draws_the_same():
    from pathlib import Path

    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), "8"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    assert out.stdout.split()[-1] == digest(64)


@pytest.mark.parametrize("num", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests_go_through_a_pool_that_holds_five_percent(num):
    """All finish, and memory does not grow with the number of requests: the second half allocates nothing that stays."""
    rng = np.random.default_rng(0)
    model = make_model(width=16, layers=1)
    asked = [
        Request(rng.integers(3, 19, size=rng.integers(1, 24)), np.array([i]), SamplingConfig(max_tokens=int(rng.integers(1, 12)))) for i in range(num)
    ]
    blocks = sum(-(-(len(r.prompt_ids) + r.sampling.max_tokens - 1) // 16) for r in asked)
    generator = Generator(model, {EOS}, max_rows=256, kv_tokens=max(16 * blocks // 20, 64), policy="pause")
    done, resident = 0, []
    with generator.stream(asked) as stream:
        for _ in stream:
            done += 1
            if done in (num // 2, num - 1):
                resident.append(int(open("/proc/self/statm").read().split()[1]))
        assert stream.scheduler.num_free_blocks == stream.scheduler.num_blocks
    assert done == num
    assert resident[1] - resident[0] < 4096  # pages, 16 MiB
