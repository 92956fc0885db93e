"""Tiny random mixtures of experts of both families, with what their tests need of transformers."""

import torch

from athanor.config import ModelConfig
from athanor.hf_config import model_config_to_hf
from athanor.hf_tensors import hf_tensors
from athanor.model.transformer import Decoder, PackedAttention, rope_frequencies

SHAPE = dict(vocab_size=67, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, max_position_embeddings=256)
QWEN = dict(architecture="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, **SHAPE)
# Widths that differ from each other, so that none can stand in another's place.
DEEPSEEK = dict(architecture="deepseek_v3", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_shared_experts=2, n_group=4,
                topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1, q_lora_rank=20, kv_lora_rank=16,
                qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14, **SHAPE)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 0.7}  # fmt: skip
FAMILIES = {
    "qwen3_moe": ModelConfig(**QWEN, norm_topk_prob=True),
    "qwen3_moe_unnormalised_some_dense_untied": ModelConfig(
        **{**QWEN, "num_hidden_layers": 4, "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 20}, decoder_sparse_step=2, mlp_only_layers=(3,),
        tie_word_embeddings=False, rope_theta=1e6,
    ),
    "deepseek_v3": ModelConfig(**DEEPSEEK, tie_word_embeddings=False),
    "deepseek_v3_yarn": ModelConfig(**DEEPSEEK, rope_scaling=YARN, rms_norm_eps=1e-5),
    "deepseek_v3_plain_queries_no_groups_halves_all_sparse": ModelConfig(
        **{**DEEPSEEK, "q_lora_rank": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "norm_topk_prob": False},
        rope_interleave=False, rope_scaling={**YARN, "mscale": 0.5, "mscale_all_dim": 0.0},
    ),
}  # fmt: skip
LENGTHS = (1, 7, 45)  # one row, odd, past the original context of YARN


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """Every parameter random, norms and selection biases too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("router.weight"):
                parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)  # scores well apart
            else:
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.1 * noise if name.endswith("bias") else noise / parameter.shape[-1] ** 0.5)
    return model


def in_transformers(model: Decoder, dtype: torch.dtype):
    """The same model in transformers, filled by name."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**model_config_to_hf(model.config)), attn_implementation="sdpa", experts_implementation="eager"
    ).to(dtype)  # fmt: skip
    theirs.model.rotary_emb.inv_freq = rope_frequencies(model.config)
    state = theirs.state_dict()
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, source in hf_tensors(model.config).items():
        in_stack(state, name).copy_(source.of(ours))
    if model.config.tie_word_embeddings:
        theirs.tie_weights()
    if dtype == torch.float64:
        for module in theirs.modules():  # theirs compute in fp32 whatever comes in
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = fp64_norm(module)
            if type(module).__name__.endswith("Router"):
                module.forward = fp64_router(module, model.config)
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias = module.e_score_correction_bias.float()
    return theirs


def in_stack(tensors, name: str) -> torch.Tensor:
    """The tensor of that name, or its part of the stacks that transformers keeps the experts in."""
    if ".experts." not in name:
        return tensors[name]
    layer, _, rest = name.partition(".experts.")
    expert, matrix, _ = rest.split(".")
    if matrix == "down_proj":
        return tensors[f"{layer}.experts.down_proj"][int(expert)]
    return tensors[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)[matrix == "up_proj"]


def fp64_norm(module):
    return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def fp64_router(module, config: ModelConfig):
    """Both families' routing written out, with the weights of the k best in any order."""

    def forward(x):
        x = x.flatten(0, -2)
        logits = x @ module.weight.T
        if not config.latent:
            weights, ids = logits.softmax(-1).topk(config.num_experts_per_tok)
            return logits, weights / weights.sum(-1, keepdim=True) if config.norm_topk_prob else weights, ids
        scores = logits.sigmoid()
        keys = (scores + module.e_score_correction_bias).unflatten(1, (config.n_group, -1))
        best = keys.topk(2).values.sum(-1).topk(config.topk_group).indices
        keys = torch.full_like(keys, -torch.inf).scatter(1, best[..., None].expand(-1, -1, keys.shape[2]), keys.gather(
            1, best[..., None].expand(-1, -1, keys.shape[2])))  # fmt: skip
        ids = keys.flatten(1).topk(config.num_experts_per_tok).indices
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) if config.norm_topk_prob else weights
        return logits, weights * config.routed_scaling_factor, ids

    return forward


def sequences(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(SHAPE["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def packed(ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, PackedAttention]:
    lengths = torch.tensor([0, *map(len, ids)])
    return torch.cat(ids), torch.cat([torch.arange(len(x)) for x in ids]), PackedAttention(lengths.cumsum(0).to(torch.int32))


def our_logits(model: Decoder, ids: list[torch.Tensor], routes=None) -> torch.Tensor:
    """All sequences packed in one forward."""
    return model(*packed(ids), routes) @ model.lm_head_weight.T


def their_logits(theirs, ids: list[torch.Tensor]) -> torch.Tensor:
    """Each sequence on its own."""
    return torch.cat([theirs(x[None]).logits[0] for x in ids])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    """As in test_transformer.py: twice their error against fp64 plus 2 ulp, in the Euclidean norm."""
    error, allowed = (ours.double() - truth).norm(), 2 * (theirs.double() - truth).norm() + 2 * torch.finfo(ours.dtype).eps * truth.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
