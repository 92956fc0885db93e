"""Multi-head latent attention: its two forms are one function, YaRN as transformers has it."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from athanor.config import ModelConfig
from athanor.hf_config import model_config_to_hf
from athanor.kernels import attention
from athanor.model.mla import Latent, LatentAttention, rotation_factor, softmax_scale
from athanor.model.transformer import Decoder, packed_latent, rope_frequencies

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import DEEPSEEK, FAMILIES, YARN, our_logits, random_decoder, sequences  # noqa: E402

CU = torch.tensor([0, 1, 9, 22], dtype=torch.int32)


def a_latent(dtype=torch.float64, T=22, H=3, n=6, R=4, r=10, v=5):
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((T, H, n), (T, H, R), (T, r), (T, R), (H, n + v, r))]
    return Latent(*(p.requires_grad_() for p in parts), scale=0.3)


def by_hand(x):
    """Token by token, head by head."""
    n, out = x.q_nope.shape[2], []
    for start, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        for t in range(start, end):
            heads = []
            for h in range(x.q_nope.shape[1]):
                up_k, up_v = x.kv_b[h, :n], x.kv_b[h, n:]
                c = x.latent[start : t + 1]
                scores = (c @ up_k.T) @ x.q_nope[t, h] + x.k_rope[start : t + 1] @ x.q_rope[t, h]
                heads.append((scores * x.scale).softmax(0) @ (c @ up_v.T))
            out.append(torch.stack(heads))
    return torch.stack(out)


@pytest.mark.parametrize("absorbs", [True, False])
def test_both_forms_are_the_definition_with_its_gradients(absorbs, monkeypatch):
    monkeypatch.setattr(Latent, "absorbs", absorbs)
    x = a_latent()
    leaves = [x.q_nope, x.q_rope, x.latent, x.k_rope, x.kv_b]
    want = by_hand(x)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = packed_latent(x, partial(attention, cu_seqlens=CU))
    for a, b in zip((got, *torch.autograd.grad(got, leaves, dy)), (want, *torch.autograd.grad(want, leaves, dy)), strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-12 * max(1.0, float(b.detach().abs().max()))


def test_the_form_of_decoding_is_taken_where_bits_are_promised():
    assert a_latent(torch.float32).absorbs and not a_latent(torch.float64).absorbs and not a_latent(torch.bfloat16).absorbs


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_yarn"])
@torch.no_grad()
def test_models_give_the_same_logits_in_both_forms(name, monkeypatch):
    model, ids = random_decoder(FAMILIES[name]), sequences()
    absorbed = our_logits(model, ids)
    monkeypatch.setattr(Latent, "absorbs", False)
    torch.testing.assert_close(our_logits(model, ids), absorbed, rtol=1e-4, atol=1e-4)


SCALINGS = [
    YARN,
    {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.8, "truncate": False},
    None,
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_yarn_is_that_of_transformers(scaling):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    config = ModelConfig(**{**DEEPSEEK, "qk_rope_head_dim": 64, "max_position_embeddings": 131072}, rope_scaling=scaling)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model_config_to_hf(config)))
    # An ulp: DeepSeek's code divides the frequency by the factor, theirs multiplies the wavelength.
    torch.testing.assert_close(rope_frequencies(config), theirs.model.rotary_emb.inv_freq, rtol=2**-22, atol=0)
    assert rotation_factor(config) == pytest.approx(theirs.model.rotary_emb.attention_scaling, rel=1e-12)
    assert softmax_scale(config) == pytest.approx(theirs.model.layers[0].self_attn.scaling, rel=1e-12)


def test_scales_of_deepseek_v3_itself():
    """0.1 ln 40 + 1 = 1.3689; its square is in the softmax, and cosines stay as they are."""
    config = ModelConfig(**{**DEEPSEEK, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, rope_scaling=SCALINGS[1])
    assert softmax_scale(config) == pytest.approx(1.3688879454113936**2 / 192**0.5) and rotation_factor(config) == 1.0


@pytest.mark.parametrize("changes, message", [
    ({"v_head_dim": 40}, "v_head_dim is 40, queries are 18 wide"),
])  # fmt: skip
def test_shapes_that_attention_does_not_take_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LatentAttention(ModelConfig(**{**DEEPSEEK, **changes}), 0)


@pytest.mark.parametrize("changes, message", [
    ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
    ({"head_dim": 16}, "head_dim is 16; deepseek_v3 has one latent"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4; deepseek_v3 has one latent"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, RoPE wants it even"),
    ({"n_group": 3}, "n_group is 3"),
    ({"n_group": 8}, "n_group is 8"),
    ({"topk_group": 1}, "num_experts_per_tok is 3, wanted at most the 2 experts"),
    ({"mlp_only_layers": (1,)}, "mlp_only_layers is .* which the architecture deepseek_v3 does not have"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "wanted rope_type yarn or none"),
    ({"architecture": "qwen3"}, "which the architecture qwen3 does not have"),
    ({"architecture": "qwen3_moe"}, "which the architecture qwen3_moe does not have"),
])  # fmt: skip
def test_contradictory_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**DEEPSEEK, **changes})


def test_deepseek_v3_has_the_published_size():
    config = ModelConfig(
        architecture="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432,
        num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        norm_topk_prob=True, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config)
    # 671.03 billion with the selection biases, without the module for multi-token prediction
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(671.026, abs=1e-2)
    assert 61 * config.cache_heads * config.cache_width * 2 == 70272  # bytes per cached token in bf16
