"""The decoder against transformers: logits and gradients of random tiny models of every family, truth in fp64.

Tolerance: our error against fp64 is at most twice that of transformers in the same type plus 2 ulp, in the Euclidean norm over a tensor: the
largest of a few hundred roundings is a matter of luck, their root mean square is not.
"""

import pytest
import torch

from athanor.config import ModelConfig
from athanor.model.transformer import ROW_STEP, Decoder, PackedAttention, fill_tokens, rope_frequencies
from athanor.weights import hf_tensors, model_config_to_hf

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPE = dict(
    vocab_size=67, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
    max_position_embeddings=256,
)  # fmt: skip
FAMILIES = {
    "llama_tied": ModelConfig(architecture="llama", **SHAPE),
    "llama_untied_llama3_rope": ModelConfig(
        architecture="llama", tie_word_embeddings=False, rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-5, **SHAPE
    ),
    "llama_linear_rope": ModelConfig(architecture="llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, **SHAPE),
    "qwen2_yarn": ModelConfig(architecture="qwen2", rope_theta=1e6, rope_scaling=YARN, **SHAPE),
    "llama_multi_query_wide_heads": ModelConfig(architecture="llama", **{**SHAPE, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2_biases_untied": ModelConfig(architecture="qwen2", tie_word_embeddings=False, rope_theta=1e6, **SHAPE),
    "qwen2_windows_in_some_layers": ModelConfig(
        architecture="qwen2", sliding_window=9, layer_types=("full_attention", "sliding_attention", "full_attention"), **SHAPE
    ),
    "mistral_windows": ModelConfig(architecture="mistral", sliding_window=9, tie_word_embeddings=False, **SHAPE),
    "qwen2_biases_multi_head_tied": ModelConfig(architecture="qwen2", **{**SHAPE, "num_key_value_heads": 4}),
    "qwen3_qk_norm_tied": ModelConfig(architecture="qwen3", **SHAPE),
    "qwen3_head_dim_is_not_D_over_H": ModelConfig(architecture="qwen3", head_dim=20, tie_word_embeddings=False, rope_theta=1e6, **SHAPE),
}
# One row, odd, and past the original context of LLAMA3.
LENGTHS = (1, 7, 45)


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """Every parameter random, norms and biases too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise if name.endswith("bias") else noise / parameter.shape[-1] ** 0.5)
    return model


def in_transformers(model: Decoder, dtype: torch.dtype):
    """The same model in transformers, filled by name from `hf_tensors`."""
    config = transformers.AutoConfig.for_model(**model_config_to_hf(model.config))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    # Their cast to bf16 rounds the frequencies; models that `from_pretrained` loads in bf16 keep them in fp32, as ours do.
    theirs.model.rotary_emb.inv_freq = rope_frequencies(model.config)
    ours = dict(model.named_parameters())
    state = {name: ours[s.parameter][s.start : s.start + s.shape[0]].detach() for name, s in hf_tensors(model.config).items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    if dtype == torch.float64:
        for module in theirs.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = fp64_norm(module)  # theirs computes in fp32 whatever comes in
    return theirs


def fp64_norm(module):
    return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def sequences(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SHAPE["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def our_logits(model: Decoder, ids: list[torch.Tensor]) -> torch.Tensor:
    """All sequences packed in one forward."""
    lengths = torch.tensor([0, *map(len, ids)])
    positions = torch.cat([torch.arange(len(x)) for x in ids])
    hidden = model(torch.cat(ids), positions, PackedAttention(lengths.cumsum(0).to(torch.int32)))
    return hidden @ model.lm_head_weight.T


def their_logits(theirs, ids: list[torch.Tensor]) -> torch.Tensor:
    """Each sequence on its own."""
    return torch.cat([theirs(x[None]).logits[0] for x in ids])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    error, allowed = (ours.double() - truth).norm(), 2 * (theirs.double() - truth).norm() + 2 * torch.finfo(ours.dtype).eps * truth.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def fused_gradient(theirs, model: Decoder, name: str) -> torch.Tensor:
    """Their gradients in our layout.  One comparison per fused matrix: what is left of a k bias after cancelling has no scale of its own."""
    pieces = sorted((source.start, hf_name) for hf_name, source in hf_tensors(model.config).items() if source.parameter == name)
    return torch.cat([theirs.get_parameter(hf_name).grad for _, hf_name in pieces])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_logits_equal_transformers_one_by_one(name, dtype):
    model, ids = random_decoder(FAMILIES[name]).to(dtype), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    assert_close(our_logits(model, ids), their_logits(in_transformers(model, dtype), ids), truth, name)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fp64_logits_equal_transformers_in_fp64(name):
    model, ids = random_decoder(FAMILIES[name]).double(), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    # Cosines come from fp32 angles on both sides; what is left is the rounding of some hundred additions per layer.
    assert float((our_logits(model, ids) - truth).abs().max()) <= 1000 * torch.finfo(torch.float64).eps * float(truth.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_all_parameters_equal_transformers(name):
    model, ids = random_decoder(FAMILIES[name]), sequences()
    targets = torch.cat([torch.roll(x, -1) for x in ids])
    theirs, truth = in_transformers(model, torch.float32), in_transformers(model, torch.float64)
    for logits in (our_logits(model, ids), their_logits(theirs, ids), their_logits(truth, ids)):
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, fused_gradient(theirs, model, name), fused_gradient(truth, model, name), name)


@pytest.mark.parametrize("scaling", [None, LLAMA3, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, YARN,
                                     {"rope_type": "linear", "factor": 4.0}])  # fmt: skip
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_frequencies_are_those_of_transformers_bit_for_bit(theta, scaling):
    config = ModelConfig(architecture="llama", **{**SHAPE, "head_dim": 64, "max_position_embeddings": 131072}, rope_theta=theta, rope_scaling=scaling)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model_config_to_hf(config)))
    assert torch.equal(rope_frequencies(config), theirs.model.rotary_emb.inv_freq)


def test_a_cast_to_bf16_keeps_the_rope_frequencies_in_fp32():
    model = random_decoder(FAMILIES["qwen3_qk_norm_tied"])
    before = model.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16 and torch.equal(model.inv_freq, before) and model.inv_freq.dtype == torch.float32


def test_a_sequence_gets_the_same_logits_wherever_it_is_packed():
    model, ids = random_decoder(FAMILIES["qwen3_qk_norm_tied"]).double(), sequences()
    with torch.no_grad():
        together, alone = our_logits(model, ids), torch.cat([our_logits(model, [x]) for x in ids])
        turned = our_logits(model, ids[::-1])
    limit = 1000 * torch.finfo(torch.float64).eps * float(alone.abs().max())
    assert float((together - alone).abs().max()) <= limit
    assert float((turned[-LENGTHS[0] :] - alone[: LENGTHS[0]]).abs().max()) <= limit


def test_initialization_depends_on_the_seed_alone():
    config = FAMILIES["qwen2_biases_untied"]
    a, b, c = (Decoder(config).initialize_(seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    layer = {name: parameter.detach() for name, parameter in a.layers[0].named_parameters()}
    # 3840 and 4608 normal numbers: a standard deviation is known to 1.2 %, 5 % is four of these.
    assert float(layer["down_proj.weight"].std()) == pytest.approx(config.initializer_range / (2 * config.num_hidden_layers) ** 0.5, rel=0.05)
    assert float(layer["qkv_proj.weight"].std()) == pytest.approx(config.initializer_range, rel=0.05)
    assert not layer["qkv_proj.bias"].any() and bool((layer["input_norm.weight"] == 1).all())


def test_a_decoder_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 0"):
        Decoder(ModelConfig())


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_filler_tokens_change_nothing_but_the_row_count(tokens):
    model = Decoder(ModelConfig(vocab_size=19, hidden_size=32, num_hidden_layers=2, intermediate_size=48, initializer_range=0.3)).initialize_(0)
    packed = torch.arange(tokens) % 19, torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32)
    ids, positions, cu_seqlens = fill_tokens(*packed)
    assert len(ids) == len(positions) == cu_seqlens[-1] and len(ids) % ROW_STEP == 0 and len(ids) - tokens < ROW_STEP
    assert torch.equal(ids[:tokens], packed[0]) and torch.equal(cu_seqlens[:2], packed[2])
    with torch.no_grad():
        plain, filled = (model(i, p, PackedAttention(c)) for i, p, c in (packed, (ids, positions, cu_seqlens)))
    torch.testing.assert_close(filled[:tokens], plain, rtol=1e-5, atol=1e-5)
