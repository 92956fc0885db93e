"""The generator on mixtures of experts and latent attention: the trainer's log-probs bit for bit, and transformers' own cached decode."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor import kv_cache
from athanor.batch import pack
from athanor.config import SamplingConfig
from athanor.generator import Generator
from athanor.kernels import strict_mode
from athanor.samples import Request
from athanor.stages.training import completion_logprobs

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, in_transformers, random_decoder  # noqa: E402

EOS = 1


def requests(num=5, samples=3, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(2, 67, size=rng.integers(1, longest)), rng.integers(0, 2**62, size=samples)) for _ in range(num)]


pytestmark = pytest.mark.usefixtures("threads")


def gaps(model, asked, groups, micro_batch_tokens):
    """|trainer - sampler| of every token, the trainer's packing by micro_batch_tokens."""
    prompts, samples = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]
    found = []
    for batch in pack(prompts, [c.token_ids for c in samples], micro_batch_tokens):
        with torch.no_grad():
            scored = completion_logprobs(model, batch).logps.numpy()
        found.append(np.abs(scored - np.concatenate([samples[i].logps for i in batch.sequences])))
    return np.concatenate(found)


@pytest.mark.parametrize("name, num_threads", [(name, 1) for name in FAMILIES] + [("qwen3_moe", 2), ("deepseek_v3", 2)])
def test_log_probs_equal_the_packed_training_forward_bit_for_bit(name, num_threads, threads):
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs strict mode")
    threads(num_threads)
    model, asked, max_tokens = random_decoder(FAMILIES[name]), requests(num=12), 30 if num_threads == 1 else 3
    for max_rows in (3, 40) if num_threads == 1 else (40,):
        groups = Generator(model, {EOS}, max_rows=max_rows).generate(asked, SamplingConfig(max_tokens=max_tokens))
        for micro_batch_tokens in (64, 10**6) if num_threads == 1 else (10**6,):
            assert not gaps(model, asked, groups, micro_batch_tokens).any()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_layer_as_wide_as_a_small_models_keeps_the_bits_too(name):
    """Products of other sizes take other paths in BLAS."""
    config = FAMILIES[name].model_copy(update={"hidden_size": 192, "moe_intermediate_size": 72, "num_experts": 16, "vocab_size": 67})
    model, asked = random_decoder(config), requests(num=6, samples=4)
    groups = Generator(model, {EOS}, max_rows=24).generate(asked, SamplingConfig(max_tokens=20))
    assert not gaps(model, asked, groups, 10**6).any()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_long_prompt_is_read_by_its_samples_together_and_changes_no_bit(name, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("bit equality on CUDA needs strict mode")
    attention, prefixes = ("mla_decode" if FAMILIES[name].latent else "paged_attention"), []
    original = getattr(kv_cache, attention)
    monkeypatch.setattr(kv_cache, attention, lambda *args, **options: prefixes.append(options.get("prefix_lens")) or original(*args, **options))
    model = random_decoder(FAMILIES[name].model_copy(update={"max_position_embeddings": 300}))
    prompt = np.random.default_rng(0).integers(2, 67, size=262)
    asked = [Request(prompt, np.arange(3)), Request(prompt[:9], np.arange(2))]
    groups = Generator(model, {EOS}, max_rows=8).generate(asked, SamplingConfig(max_tokens=5))
    assert prefixes and all(shared is not None and shared.max() >= 256 for shared in prefixes)
    assert not gaps(model, asked, groups, 10**6).any()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_yarn"])
def test_a_prompt_in_pieces_gives_the_same_samples(name):
    model, asked = random_decoder(FAMILIES[name]), requests(num=4, samples=2, longest=60)
    whole, cut = (Generator(model, {EOS}, max_prefill_tokens=n).generate(asked, SamplingConfig(max_tokens=12)) for n in (4096, 7))
    for a, b in zip(sum(whole, []), sum(cut, []), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logps, b.logps)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "deepseek_v3_yarn"])
def test_greedy_samples_and_their_log_probs_are_those_of_transformers_cached_decode(name):
    pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    model, asked = random_decoder(FAMILIES[name]), requests(num=3, samples=1)
    theirs = in_transformers(model, torch.float32)
    ours = Generator(model, {EOS}).generate(asked, SamplingConfig(temperature=0, max_tokens=25), full_logps=True)
    for request, (completion,) in zip(asked, ours, strict=True):
        past, ids, logps = None, torch.from_numpy(request.prompt_ids)[None], []
        for token in completion.token_ids.tolist():
            with torch.no_grad():
                out = theirs(ids, past_key_values=past, use_cache=True)
            past, row = out.past_key_values, out.logits[0, -1].log_softmax(-1)
            assert int(row.argmax()) == token
            logps.append(float(row[token]))
            ids = torch.tensor([[token]])
        np.testing.assert_allclose(completion.full_logps, logps, atol=2e-5)


def test_a_latent_cache_holds_one_head_of_rank_and_rotated_width():
    config = FAMILIES["deepseek_v3"]
    assert (config.cache_heads, config.cache_width) == (1, 16 + 8)
    generator = Generator(random_decoder(config), {EOS})
    generator.generate(requests(num=1), SamplingConfig(max_tokens=2))
    assert all(keys.shape[1:] == (1, 16, 24) for keys in generator.cache.keys)
    keys, values = generator.cache.keys[0], generator.cache.values[0]
    assert torch.equal(keys, values) and keys.any()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_step_that_changes_the_weights_changes_the_next_sample(name):
    """A decode step that cannot be captured must not leave stale states to the captured rest of it."""
    model, asked = random_decoder(FAMILIES[name]), requests(num=3)
    generator = Generator(model, {EOS})
    generator.generate(asked, SamplingConfig(max_tokens=10))
    with torch.no_grad():
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.down_proj.mul_(1.5)
                layer.moe.router.weight.neg_()
    groups = generator.generate(asked, SamplingConfig(max_tokens=10))
    assert not gaps(model, asked, groups, 10**6).any()


@pytest.mark.gpu
def test_strict_log_probs_of_a_mixture_of_experts_equal_the_trainers_bit_for_bit_on_cuda():
    config = FAMILIES["qwen3_moe"].model_copy(update={"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128})
    model, asked = random_decoder(config).to("cuda", torch.bfloat16), requests(num=12, samples=4)
    with strict_mode():
        groups = Generator(model, {EOS}, max_rows=32).generate(asked, SamplingConfig(max_tokens=40))
        prompts, samples = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]
        for batch in pack(prompts, [c.token_ids for c in samples], 600, "cuda"):
            with torch.no_grad():
                scored = completion_logprobs(model, batch).logps.cpu().numpy()
            assert np.array_equal(scored, np.concatenate([samples[i].logps for i in batch.sequences]))


@pytest.mark.gpu
def test_latent_attention_on_cuda_is_near_the_trainers_forward_and_refused_in_strict_mode():
    config = FAMILIES["deepseek_v3_yarn"].model_copy(update={"hidden_size": 256, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
                                                             "qk_nope_head_dim": 32, "v_head_dim": 32})  # fmt: skip
    model, asked = random_decoder(config).to("cuda", torch.bfloat16), requests(num=6, samples=4)
    groups = Generator(model, {EOS}, max_rows=32).generate(asked, SamplingConfig(max_tokens=30))
    prompts, samples = [r.prompt_ids for r, g in zip(asked, groups, strict=True) for _ in g], [c for g in groups for c in g]
    (batch,) = pack(prompts, [c.token_ids for c in samples], 10**6, "cuda")
    with torch.no_grad():
        scored = completion_logprobs(model, batch).logps.cpu().numpy()
    gap = np.abs(scored - np.concatenate([samples[i].logps for i in batch.sequences]))
    assert np.median(gap) < 0.05  # bf16; a choice of experts may flip here and there
    with strict_mode(), pytest.raises(ValueError, match="latent attention on CUDA"):
        Generator(model, {EOS}).generate(asked, SamplingConfig(max_tokens=3))
