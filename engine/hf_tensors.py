"""Which rows of which parameter of a Decoder a HuggingFace tensor is."""

from dataclasses import dataclass

from torch import Tensor

from athanor.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """Where one HuggingFace tensor lives in a Decoder: rows start .. start + shape[0] of `parameter`, or of one expert of a stack."""

    parameter: str
    start: int
    shape: tuple[int, ...]
    expert: int | None = None

    def of(self, parameters: dict[str, Tensor]) -> Tensor:
        """The view of the parameter that it is."""
        parameter = parameters[self.parameter] if self.expert is None else parameters[self.parameter][self.expert]
        return parameter[self.start : self.start + self.shape[0]]


def hf_tensors(config: ModelConfig) -> dict[str, Source]:
    """HuggingFace name -> place in the Decoder, in file order."""
    D, V = config.hidden_size, config.vocab_size
    tensors = {"model.embed_tokens.weight": Source("embed.weight", 0, (V, D))}
    for i in range(config.num_hidden_layers):
        tensors |= _layer(config, f"model.layers.{i}", f"layers.{i}", config.is_sparse(i))
    tensors["model.norm.weight"] = Source("norm.weight", 0, (D,))
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = Source("lm_head.weight", 0, (V, D))
    if config.num_nextn_predict_layers:
        hf = mtp_prefix(config)
        for name, ours in (("enorm", "embed_norm"), ("hnorm", "hidden_norm"), ("shared_head.norm", "norm")):
            tensors[f"{hf}.{name}.weight"] = Source(f"mtp.{ours}.weight", 0, (D,))
        tensors[f"{hf}.eh_proj.weight"] = Source("mtp.input_proj.weight", 0, (D, 2 * D))
        tensors |= _layer(config, hf, "mtp.layer", config.is_sparse(config.num_hidden_layers))
    return tensors


def mtp_prefix(config: ModelConfig) -> str:
    """Where a file has the layer for multi-token prediction: behind the last one."""
    return f"model.layers.{config.num_hidden_layers}"


def hf_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that a file may have beside the same one under another name: name -> that name.  DeepSeek's files have those of multi-token
    prediction."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    if config.num_nextn_predict_layers:
        copies[f"{mtp_prefix(config)}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{mtp_prefix(config)}.shared_head.head.weight"] = head
    return copies


def _layer(config: ModelConfig, hf: str, ours: str, sparse: bool) -> dict[str, Source]:
    D = config.hidden_size
    tensors = {f"{hf}.input_layernorm.weight": Source(f"{ours}.input_norm.weight", 0, (D,))}
    attention = _latent_attention(config, ours) if config.latent else _attention(config, ours)
    tensors |= {f"{hf}.self_attn.{name}": source for name, source in attention.items()}
    tensors[f"{hf}.post_attention_layernorm.weight"] = Source(f"{ours}.post_attention_norm.weight", 0, (D,))
    mlp = _experts(config, f"{ours}.moe") if sparse else _swiglu(f"{ours}.", D, config.intermediate_size)
    return tensors | {f"{hf}.mlp.{name}": source for name, source in mlp.items()}


def _attention(config: ModelConfig, ours: str) -> dict[str, Source]:
    D, d = config.hidden_size, config.width_per_head
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    tensors, start = {}, 0
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        tensors[f"{name}_proj.weight"] = Source(f"{ours}.qkv_proj.weight", start, (rows, D))
        if config.architecture == "qwen2":
            tensors[f"{name}_proj.bias"] = Source(f"{ours}.qkv_proj.bias", start, (rows,))
        start += rows
    if config.architecture in ("qwen3", "qwen3_moe"):
        tensors["q_norm.weight"] = Source(f"{ours}.q_norm.weight", 0, (d,))
        tensors["k_norm.weight"] = Source(f"{ours}.k_norm.weight", 0, (d,))
    tensors["o_proj.weight"] = Source(f"{ours}.o_proj.weight", 0, (D, q))
    return tensors


def _latent_attention(config: ModelConfig, ours: str) -> dict[str, Source]:
    D, H, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_rows, latent = H * config.width_per_head, rank + config.qk_rope_head_dim
    q_rank, tensors = config.q_lora_rank, {}
    if q_rank:
        tensors["q_a_proj.weight"] = Source(f"{ours}.mla.qkv_a_proj.weight", 0, (q_rank, D))
        tensors["q_a_layernorm.weight"] = Source(f"{ours}.mla.q_a_norm.weight", 0, (q_rank,))
    tensors[f"{'q_b' if q_rank else 'q'}_proj.weight"] = Source(f"{ours}.mla.q_b_proj.weight", 0, (q_rows, q_rank or D))
    tensors["kv_a_proj_with_mqa.weight"] = Source(f"{ours}.mla.qkv_a_proj.weight", q_rank, (latent, D))
    tensors["kv_a_layernorm.weight"] = Source(f"{ours}.mla.kv_a_norm.weight", 0, (rank,))
    tensors["kv_b_proj.weight"] = Source(f"{ours}.mla.kv_b_proj.weight", 0, (H * (config.qk_nope_head_dim + config.v_head_dim), rank))
    tensors["o_proj.weight"] = Source(f"{ours}.mla.o_proj.weight", 0, (D, H * config.v_head_dim))
    return tensors


def _swiglu(ours: str, D: int, F: int) -> dict[str, Source]:
    return {
        "gate_proj.weight": Source(f"{ours}gate_up_proj.weight", 0, (F, D)),
        "up_proj.weight": Source(f"{ours}gate_up_proj.weight", F, (F, D)),
        "down_proj.weight": Source(f"{ours}down_proj.weight", 0, (D, F)),
    }


def _experts(config: ModelConfig, ours: str) -> dict[str, Source]:
    D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
    tensors = {"gate.weight": Source(f"{ours}.router.weight", 0, (E, D))}
    if config.latent:
        tensors["gate.e_score_correction_bias"] = Source(f"{ours}.router.bias", 0, (E,))
    for e in range(E):
        tensors[f"experts.{e}.gate_proj.weight"] = Source(f"{ours}.gate_up_proj", 0, (F, D), e)
        tensors[f"experts.{e}.up_proj.weight"] = Source(f"{ours}.gate_up_proj", F, (F, D), e)
        tensors[f"experts.{e}.down_proj.weight"] = Source(f"{ours}.down_proj", 0, (D, F), e)
    if config.n_shared_experts:
        shared = _swiglu(f"{ours}.shared.", D, F * config.n_shared_experts)
        tensors |= {f"shared_experts.{name}": source for name, source in shared.items()}
    return tensors
