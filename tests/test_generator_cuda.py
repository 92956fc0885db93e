"""The generator on a GPU: captured graphs, windows of steps, and the bits of strict mode.  None of it has run where there is no GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.batch import pack
from athanor.config import ModelConfig, SamplingConfig
from athanor.decode import DecodeRows
from athanor.generator import Generator
from athanor.kernels import strict_mode
from athanor.model.transformer import Decoder
from athanor.samples import Request
from athanor.stages.training import completion_logprobs

pytestmark = pytest.mark.gpu
EOS = 1


def make_model(dtype=torch.bfloat16):
    shape = ModelConfig(architecture="qwen3", vocab_size=512, hidden_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
                        head_dim=64, intermediate_size=512, initializer_range=0.1)  # fmt: skip
    return Decoder(shape).initialize_(0).to("cuda", dtype)


def requests(num=12, samples=8, longest=300):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(2, 512, size=rng.integers(1, longest)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


def tokens_of(groups):
    return [c.token_ids.tolist() for group in groups for c in group]


@pytest.mark.parametrize("fused", [False, True])
def test_captured_steps_draw_what_eager_steps_draw(fused, monkeypatch):
    """The same kernels, launched one by one or from a graph, in fp32 so that nothing else can differ."""
    model, sampling = make_model(torch.float32), SamplingConfig(max_tokens=60)
    captured = Generator(model, {EOS}, max_rows=32, fused_sampling=fused).generate(requests(), sampling)

    monkeypatch.setattr(DecodeRows, "_graph", lambda rows, *key: SimpleNamespace(replay=lambda: rows._step(*key)))
    eager = Generator(model, {EOS}, max_rows=32, fused_sampling=fused).generate(requests(), sampling)
    assert tokens_of(captured) == tokens_of(eager)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20}], ids=str)
def test_strict_log_probs_equal_the_trainers_bit_for_bit(sampling):
    model, asked = make_model(), requests()
    with strict_mode():
        groups = Generator(model, {EOS}, max_rows=32).generate(asked, SamplingConfig(max_tokens=60, **sampling))
        prompts = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g]
        samples = [c for g in groups for c in g]
        for micro_batch_tokens in (600, 10**6):
            for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens, "cuda"):
                support = None
                if sampling:
                    support = tuple(torch.from_numpy(np.concatenate([samples[i].support[j] for i in batch.sequences])).cuda() for j in (0, 1))
                with torch.no_grad():
                    logps = completion_logprobs(model, batch, sampling.get("temperature", 1.0), support).logps.cpu().numpy()
                assert np.array_equal(logps, np.concatenate([samples[i].logps for i in batch.sequences]))


def test_strict_samples_do_not_depend_on_the_batch():
    model, asked = make_model(), requests(num=6, samples=4)
    with strict_mode():
        together = Generator(model, {EOS}, max_rows=24).generate(asked, SamplingConfig(max_tokens=40))
        alone = [Generator(model, {EOS}, max_rows=4).generate([r], SamplingConfig(max_tokens=40))[0] for r in asked]
    assert tokens_of(together) == tokens_of(alone)


def test_an_optimizer_step_needs_no_new_graph():
    """Captured graphs read the parameters where they lie: after an update in place they draw what a new generator draws."""
    model, sampling = make_model(torch.float32), SamplingConfig(max_tokens=30)
    kept = Generator(model, {EOS}, max_rows=32)
    before = kept.generate(requests(), sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    after = kept.generate(requests(), sampling)
    assert tokens_of(before) != tokens_of(after) == tokens_of(Generator(model, {EOS}, max_rows=32).generate(requests(), sampling))


def test_no_step_of_a_window_waits_for_the_device():
    model = make_model()
    generator = Generator(model, {EOS}, max_rows=32)
    generator.generate(requests(num=4), SamplingConfig(max_tokens=20))
    rows = generator.rows
    rows.status[:32] = 0
    rows.slot.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows._step(32, 512)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(a, b):
    assert tokens_of(a) == tokens_of(b)
    for x, y in zip(sum(a, []), sum(b, []), strict=True):
        assert x.finish == y.finish and np.array_equal(x.logps, y.logps)


@pytest.mark.parametrize("most", [64, 300])
def test_strict_prompts_in_pieces_have_the_bits_of_one_piece(most):
    """Prompts of up to 900 tokens see four chunks of the attention; the cache of a lone request holds the same bytes."""
    model, asked = make_model(), requests(num=6, samples=4, longest=900)
    with strict_mode():
        whole, cut = (Generator(model, {EOS}, max_rows=24, max_prefill_tokens=n) for n in (16384, most))
        same(whole.generate(asked, SamplingConfig(max_tokens=30)), cut.generate(asked, SamplingConfig(max_tokens=30)))
        whole, cut = (Generator(model, {EOS}, max_prefill_tokens=n) for n in (16384, most))
        same(whole.generate(asked[:1], SamplingConfig(max_tokens=30)), cut.generate(asked[:1], SamplingConfig(max_tokens=30)))
    for a, b in zip(whole.cache.keys + whole.cache.values, cut.cache.keys + cut.cache.values, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy, kv_tokens", [("reserve", None), ("pause", 4096)])
def test_windows_launched_ahead_of_the_host_change_no_bit(policy, kv_tokens):
    """In strict mode, where a sample does not depend on its company: refills, pauses and ends that come some windows later draw the same."""
    model, sampling = make_model(), SamplingConfig(max_tokens=70, repetition_tokens=5, repetition_probability=0.6)
    asked = [Request(r.prompt_ids, r.seeds, expected_tokens=5) for r in requests(num=10, samples=6, longest=80)]
    with strict_mode():
        waiting = Generator(model, {EOS}, max_rows=16, ahead=0).generate(asked, sampling)
        for ahead in (1, 2):
            same(waiting, Generator(model, {EOS}, max_rows=16, ahead=ahead, policy=policy, kv_tokens=kv_tokens).generate(asked, sampling))


def test_the_host_waits_for_the_device_only_to_read_what_was_drawn():
    """Rows go up, blocks grow, prompts run: all of it is enqueued.  In strict mode: flash attention asks for the longest prompt."""
    model, asked, sampling = make_model(), requests(), SamplingConfig(max_tokens=40)
    with strict_mode():
        generator = Generator(model, {EOS}, max_rows=32, max_prefill_tokens=500)
        wanted = generator.generate(asked, sampling)  # captures
        torch.cuda.set_sync_debug_mode("error")
        try:
            same(wanted, generator.generate(asked, sampling))
        finally:
            torch.cuda.set_sync_debug_mode("default")
