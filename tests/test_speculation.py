"""Speculative decoding: the samples of decoding without it to the bit, whatever is drafted, and drafts that are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.config import ModelConfig, RecipeConfig, SamplingConfig, SpeculationConfig
from athanor.decode import DecodeRows
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.kernels import strict_mode
from athanor.model.transformer import Decoder, PackedAttention, fill_tokens
from athanor.recipe_io import load_recipe
from athanor.samples import Request
from athanor.speculation import NGRAM, MtpDraft, NgramDraft, lay_out
from athanor.tokenizer import symbol_tokenizer

TESTS = Path(__file__).parent
sys.path.append(str(TESTS))  # tests/ is no package
from sparse_models import FAMILIES, random_decoder  # noqa: E402

EOS = 2
WORDS = symbol_tokenizer(["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "done"])
MTP = FAMILIES["deepseek_v3"].model_copy(update={"num_nextn_predict_layers": 1})

pytestmark = pytest.mark.usefixtures("threads")


def make_model(**changes):
    shape = ModelConfig(architecture="qwen3", vocab_size=19, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=48, initializer_range=0.3, **changes)  # fmt: skip
    return Decoder(shape).initialize_(0)


def requests(num=6, samples=3, longest=30):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(3, 19, size=rng.integers(1, longest)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


def same(a, b):
    assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish == b.finish
    for name in ("logps", "full_logps"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    for name in ("support", "routes"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or all(map(np.array_equal, x, y)))


def drafts_that_know(monkeypatch, groups, asked):
    """Drafts from the samples themselves, a fifth of them wrong and some missing: runs of every length are accepted, and cut, in every place."""
    truth = {int(seed): c.token_ids for r, group in zip(asked, groups, strict=True) for seed, c in zip(r.seeds, group, strict=True)}

    def propose(draft, n, limit):
        rows, rng = draft.rows, np.random.default_rng(int(draft.rows.generated.sum()))  # reading a number: never captured
        drafts = np.full((n, len(draft.ahead) - 1), -1)
        for row, seed, at in zip(drafts, rows.seeds[:n].tolist(), rows.generated[:n].tolist(), strict=True):
            known = truth.get(seed, np.zeros(0, np.int64))[at : at + len(row)]
            row[: len(known)] = known
            row[len(known) :] = rng.integers(0, 19, len(row) - len(known))  # behind the end
        return torch.from_numpy(np.where(rng.random(drafts.shape) < 0.2, rng.integers(-1, 19, drafts.shape), drafts))

    monkeypatch.setattr(NgramDraft, "propose", propose)


SAMPLINGS = {
    "plain": SamplingConfig(max_tokens=24),
    "ends inside": SamplingConfig(max_tokens=8, temperature=0.7, stop=["one two", "done"], repetition_tokens=3, repetition_probability=0.5),
    "filters": SamplingConfig(max_tokens=16, temperature=0.8, top_k=9, top_p=0.9, min_p=0.02),
    "greedy": SamplingConfig(max_tokens=20, temperature=0),
}
OPTIONS = [
    {},
    {"max_rows": 3},  # refills
    {"window": 3, "ahead": 1, "max_rows": 5},
    {"policy": "pause", "kv_tokens": 96, "max_rows": 8, "max_prefill_tokens": 16},
]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samples_are_those_of_decoding_without_drafts(name, monkeypatch):
    model, sampling = make_model(), SAMPLINGS[name]
    asked = [Request(r.prompt_ids, r.seeds, expected_tokens=4) for r in requests(num=5)]
    plain = Generator(model, {EOS}, tokenizer=WORDS, max_rows=18).generate(asked, sampling, full_logps=True)
    drafts_that_know(monkeypatch, plain, asked)
    forwards = tokens = 0
    for options, k, most in zip(OPTIONS, (5, 1, 3, 2), (18, 2, 4, 5), strict=True):
        generator = Generator(model, {EOS}, tokenizer=WORDS, speculation=SpeculationConfig(tokens=k, max_rows=most), **options)
        for a, b in zip(sum(plain, []), sum(generator.generate(asked, sampling, full_logps=True), []), strict=True):
            same(a, b)
        forwards, tokens = forwards + generator.drafting["forwards"], tokens + generator.drafting["tokens"]
    assert tokens > 1.3 * forwards > 0
    if name == "ends inside":
        assert {c.finish for c in sum(plain, [])} == {"stop", "length", "repetition"}


@pytest.mark.parametrize("width", [1, 5])
def test_streaks_of_a_run_are_those_of_its_tokens_one_by_one(width):
    g = torch.Generator().manual_seed(0)
    logps, before = -torch.rand(64, width, generator=g), torch.randint(4, (64,), generator=g)
    rows = SimpleNamespace(streak_logp=torch.full((64,), -0.6), ahead_of=torch.arange(5), streak=before)
    for got, line, count in zip(DecodeRows._streaks(rows, logps, slice(0, 64)).tolist(), logps.tolist(), before.tolist(), strict=True):
        for streak, logp in zip(got, line, strict=True):
            count = count + 1 if logp > -0.6 else 0
            assert streak == count


@pytest.mark.parametrize("window", [0, 7])
def test_requests_of_several_kinds_decode_side_by_side(window, monkeypatch):
    """Sampling parameters, limits and end tokens per row, without and with a sliding window of the attention."""
    model, kinds = make_model(sliding_window=window), [*SAMPLINGS.values()]
    asked = [Request(r.prompt_ids, r.seeds, kinds[i % 4], frozenset({EOS, i + 4})) for i, r in enumerate(requests(num=8, samples=2))]
    plain = Generator(model, {EOS}, tokenizer=WORDS).generate(asked, full_logps=True)
    drafts_that_know(monkeypatch, plain, asked)
    drafted = Generator(model, {EOS}, tokenizer=WORDS, speculation=SpeculationConfig(tokens=4, max_rows=16)).generate(asked, full_logps=True)
    for a, b in zip(sum(plain, []), sum(drafted, []), strict=True):
        same(a, b)


@pytest.mark.parametrize("name, draft", [("qwen3_moe_unnormalised_some_dense_untied", "ngram"), ("deepseek_v3", "mtp")])
def test_experts_and_latents_too_and_the_recorded_routes(name, draft):
    """Greedy samples of random weights run into circles, which n-grams find; a random layer for multi-token prediction is next to always wrong."""
    model = random_decoder(FAMILIES[name] if draft == "ngram" else MTP)
    rng = np.random.default_rng(0)
    asked = [Request(rng.integers(2, 67, size=n), np.arange(2)) for n in (1, 16, 23)]  # 16 = a whole block
    longest = 36 if draft == "ngram" else 10
    for sampling, options in (
        (SamplingConfig(max_tokens=8), {}), (SamplingConfig(max_tokens=longest, temperature=0), {"window": 2, "ahead": 1, "max_prefill_tokens": 16})
    ):  # fmt: skip
        plain = Generator(model, {1}, record_routes=True).generate(asked, sampling, full_logps=True)
        generator = Generator(model, {1}, record_routes=True, max_rows=3, speculation=SpeculationConfig(tokens=3, draft=draft), **options)
        for a, b in zip(sum(plain, []), sum(generator.generate(asked, sampling, full_logps=True), []), strict=True):
            same(a, b)
    gained = generator.drafting["tokens"] - generator.drafting["forwards"]
    assert generator.drafting["forwards"] > 0 and (gained > 0 or draft == "mtp")


@pytest.mark.parametrize("draft", ["ngram", "mtp"])
def test_aborted_samples_go_on_with_the_same_bits(draft):
    model, sampling = random_decoder(MTP), SamplingConfig(max_tokens=16, temperature=0.3)
    asked = [Request(np.arange(3, 3 + n), np.arange(2)) for n in (16, 5)]
    speculation = SpeculationConfig(tokens=2, draft=draft)
    plain = Generator(model, {999}).generate(asked, sampling, full_logps=True)
    generator, todo = Generator(model, {999}, speculation=speculation), asked
    for _ in range(2):
        with generator.stream(todo, sampling, full_logps=True) as stream:
            for _ in range(4):
                stream.step()
            stream.abort()
            partial = sorted(stream, key=lambda f: (f.request, f.member))
        assert all(f.completion.finish == "abort" for f in partial)
        todo = [Request(r.prompt_ids, r.seeds, partial=[f.completion for f in partial if f.request == i]) for i, r in enumerate(asked)]
    for a, b in zip(sum(plain, []), sum(generator.generate(todo, sampling, full_logps=True), []), strict=True):
        same(a, b)


def test_new_weights_take_over_behind_the_tokens_of_the_old_ones():
    model = random_decoder(MTP)
    asked, sampling = Request(np.arange(3, 20), np.arange(3)), SamplingConfig(max_tokens=16, temperature=0.3)

    @torch.no_grad()
    def scored(c):
        tokens = torch.from_numpy(np.concatenate((asked.prompt_ids, c.token_ids)))
        n = len(tokens) - 1
        ids, positions, cu_seqlens = fill_tokens(tokens[:-1], torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        logits = model(ids, positions, PackedAttention(cu_seqlens))[16:n] @ model.lm_head_weight.T / 0.3
        return logits.log_softmax(1).gather(1, tokens[17:, None])[:, 0].numpy()

    with Generator(model, {999}, speculation=SpeculationConfig(tokens=2, draft="mtp")).stream([asked], sampling) as stream:
        for _ in range(6):
            stream.step()
        with torch.no_grad():
            model.lm_head_weight.neg_()
        done = list(stream)
    for _, _, c in done:
        new = c.versions == 1
        assert 5 < (~new).sum() < 16 and c.versions.tolist() == sorted(c.versions)
        np.testing.assert_allclose(c.logps[new], scored(c)[new], atol=1e-4)
        model.lm_head_weight.data.neg_()
        np.testing.assert_allclose(c.logps[~new], scored(c)[~new], atol=1e-4)
        model.lm_head_weight.data.neg_()


def looked_up(own, siblings, k):
    """As the docstring of NgramDraft has it, letter by letter: a later token of the suffix counts more than all before it."""
    best, found = 0, None
    for text in [*siblings, own]:
        for end in range(1, len(text) + (text is not own)):  # what ends in front of the text's last token, or with a sibling's
            weight = sum(2 ** (NGRAM - j) for j in range(1, NGRAM + 1) if end >= j and len(own) >= j and text[end - j] == own[-j])
            if weight >= max(best, 2 ** (NGRAM - 1)):
                best, found = weight, (text, end)
    if found is None:
        return [-1] * k
    text, end = found
    if text is own:
        return [own[end + j % (len(own) - end)] for j in range(k)]
    return [text[end + j] if end + j < len(text) else None for j in range(k)]  # None: whatever comes behind it


@pytest.mark.parametrize("alphabet", [2, 5, 30])
def test_ngram_drafts_are_what_followed_the_longest_match_the_latest_first(alphabet):
    rng, k, longest = np.random.default_rng(alphabet), 4, 40
    rows = SimpleNamespace(lengths=torch.zeros(16, dtype=torch.int32))
    draft = NgramDraft(rows, k, 16, longest, 60)
    for _ in range(6):
        own = [rng.integers(0, alphabet, size=n) for n in (NGRAM, 5, 6, 17, 30, 30, 30, 30)]
        siblings = [[rng.integers(0, alphabet, size=n) for n in (9, 20, 14)] for _ in own]
        rows.lengths[:8] = torch.tensor([len(text) for text in own])
        draft.load(8, np.full(8, -1), lambda own=own, siblings=siblings: lay_out(draft, [[text[:1], text[1:]] for text in own], siblings))
        for _ in range(2):
            got = draft.propose(8, 0).tolist()
            for text, others, drafted in zip(own, siblings, got, strict=True):
                wanted = looked_up(text.tolist(), [t.tolist() for t in others], k)
                assert [x for x, y in zip(drafted, wanted, strict=True) if y is not None] == [y for y in wanted if y is not None]
            tokens, gained = torch.from_numpy(rng.integers(0, alphabet, (8, k + 1))), torch.tensor([0, 1, 2, 3, 4, 5, 5, 0])
            draft.follow(slice(0, 8), None, tokens, gained, None)
            own = [np.append(text, drawn[:n]) for text, drawn, n in zip(own, tokens.numpy(), gained.tolist(), strict=True)]
            rows.lengths[:8] += gained


def test_a_text_that_is_too_long_for_siblings_keeps_its_latest_ones():
    draft = NgramDraft(SimpleNamespace(lengths=torch.zeros(1, dtype=torch.int32)), 2, 1, 8, 10)
    (row,) = lay_out(draft, [[np.array([7, 8])]], [[np.array([1] * 9), np.array([2, 3, 4, 5]), np.array([6, 6, 6])]])
    assert row.tolist() == [1, -1, 2, 3, 4, 5, -1, 6, 6, 6] + [-1] * NGRAM + [7, 8] + [-1] * 7


def test_mtp_drafts_are_those_of_the_layer_over_the_whole_sequence(monkeypatch):
    """Each proposal against packed forwards: h of the decoder and the next tokens; then the layer's own state and draft one position further."""
    model, k, seen = random_decoder(MTP), 3, []
    propose = MtpDraft.propose

    def spied(draft, n, limit):
        seen.append((draft.rows.seeds[:n].tolist(), draft.rows.generated[:n].tolist(), propose(draft, n, limit)))
        return seen[-1][2]

    monkeypatch.setattr(MtpDraft, "propose", spied)
    monkeypatch.setattr("athanor.cpu_steps.CAPTURED_BYTES", 0)  # a replayed step calls no Python
    rng = np.random.default_rng(0)
    asked = [Request(rng.integers(3, 67, size=n), np.array([n])) for n in (5, 17, 30)]  # none fills its last block
    options = {"max_prefill_tokens": 16, "max_rows": 2}
    groups = Generator(model, {999}, speculation=SpeculationConfig(tokens=k, draft="mtp"), **options).generate(asked, SamplingConfig(max_tokens=9))
    texts = {len(r.prompt_ids): (r.prompt_ids, c.token_ids) for r, (c,) in zip(asked, groups, strict=True)}

    def packed(n):
        return PackedAttention(torch.tensor([0, n], dtype=torch.int32))

    for seeds, generated, drafts in seen:
        for seed, count, got in zip(seeds, generated, drafts.tolist(), strict=True):
            prompt, drawn = texts[seed]
            if not 0 < count <= len(drawn) - k:  # its prompt is under way, or the last places are beyond its limit
                continue
            tokens = torch.from_numpy(np.concatenate((prompt, drawn[:count])))
            with torch.no_grad():
                n = len(tokens) - 1
                hidden, following, wanted = model(tokens[:-1], torch.arange(n), packed(n)), tokens[1:], []
                for _ in range(k):
                    states = model.look_ahead(hidden, following, torch.arange(len(hidden)), packed(len(hidden)))
                    wanted.append(int((states[-1] @ model.lm_head_weight.T).argmax()))
                    hidden, following = torch.cat((hidden, states[-1:])), torch.cat((following, torch.tensor(wanted[-1:])))
            assert got == wanted
    assert len(seen) > 8


def test_what_cannot_be_drafted_is_refused():
    with pytest.raises(UserError, match="speculation.draft is mtp, but the model has no layer for multi-token prediction"):
        Generator(make_model(), {EOS}, speculation=SpeculationConfig(tokens=1, draft="mtp"))
    with pytest.raises(UserError, match="speculation.draft is mtp, wanted ngram: not every model of the run"):
        load_recipe(RecipeConfig, "tiny", ["--speculation.tokens", "1", "--speculation.draft", "mtp"])


def run_micro(folder, *arguments):
    command = [sys.executable, str(TESTS.parent / "engine" / "train.py"), str(TESTS / "micro_recipe.toml"), "--run_root", str(folder)]
    changes = ["--until", "zero", "--stages.zero.steps", "3", "--stages.base.steps", "20", "--device", "cpu", *arguments]
    result = subprocess.run([*command, *changes], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "micro" / "metrics.jsonl").read_text().splitlines()]
    return rows, (folder / "micro" / "checkpoints" / "zero" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_with_drafts_trains_the_same_weights_and_says_how_they_did(tmp_path):
    for name in ("plain", "drafted"):
        (tmp_path / name).mkdir()
    plain, weights = run_micro(tmp_path / "plain")
    drafted, same_weights = run_micro(tmp_path / "drafted", "--speculation.tokens", "3", "--speculation.max_rows", "64")
    assert weights == same_weights
    for a, b in zip(plain, drafted, strict=True):
        assert all(a.get(name) == b.get(name) for name in ("loss", "reward", "mean_tokens", "logp_gap_max"))
        assert ("draft_acceptance" in b) == (b["stage"] == "zero") and "draft_acceptance" not in a
    rows = [row for row in drafted if row["stage"] == "zero"]
    for row in rows:
        assert 0 <= row["draft_acceptance"] < 1 and row["drafted_tokens_per_forward"] == pytest.approx(1 + 3 * row["draft_acceptance"])
    assert len(rows) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_strict_samples_on_cuda_are_those_of_decoding_without_drafts(fused):
    shape = ModelConfig(architecture="qwen3", vocab_size=512, hidden_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
                        head_dim=64, intermediate_size=512, initializer_range=0.1)  # fmt: skip
    model, sampling = Decoder(shape).initialize_(0).to("cuda", torch.bfloat16), SamplingConfig(max_tokens=200, temperature=0.5)
    asked = [Request(np.arange(2, n), np.arange(4)) for n in (20, 300, 700)]
    with strict_mode():
        plain = Generator(model, {1}, fused_sampling=fused).generate(asked, sampling, full_logps=True)
        generator = Generator(model, {1}, fused_sampling=fused, speculation=SpeculationConfig(tokens=3, max_rows=12))
        for a, b in zip(sum(plain, []), sum(generator.generate(asked, sampling, full_logps=True), []), strict=True):
            same(a, b)
    assert generator.drafting["tokens"] > generator.drafting["forwards"] > 0
