"""The shape of a decoder, under HuggingFace's names: dense (Llama 3, Mistral, Qwen2/2.5, Qwen3), Qwen3-MoE and DeepSeek-V3."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """What every part of the recipe schema is: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


# Fields of one kind of model alone; elsewhere they keep their defaults.
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
QWEN3_MOE = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
DEEPSEEK_V3 = ("n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank",
               "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave", "norm_topk_prob",
               "num_nextn_predict_layers")  # fmt: skip
SPARSE = {"qwen3_moe": (*EXPERTS, *QWEN3_MOE), "deepseek_v3": (*EXPERTS, *DEEPSEEK_V3)}
WINDOWED = ("mistral", "qwen2", "qwen3", "qwen3_moe")  # architectures that may have sliding windows

ROPE_NUMBERS = {  # that a rope_scaling of the type must have
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}


class ModelConfig(Config):
    """A decoder; the names are HuggingFace's."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"] = "qwen3"
    """Family: llama, mistral (no biases), qwen2 (biases on q, k, v), qwen3 (RMS norm on q and k heads), qwen3_moe,
    deepseek_v3 (MLA, mixture of experts)."""
    vocab_size: int = Field(0, ge=0)
    """Vocabulary entries; 0 = taken from the tokenizer."""
    hidden_size: int = Field(96, gt=0)
    """Width D."""
    num_hidden_layers: int = Field(3, gt=0)
    """Decoder layers."""
    num_attention_heads: int = Field(4, gt=0)
    """Query heads H."""
    num_key_value_heads: int = Field(2, gt=0)
    """Key/value heads (GQA); must divide num_attention_heads.  deepseek_v3 has one latent instead."""
    head_dim: int = Field(0, ge=0)
    """Width of one head; 0 = hidden_size / num_attention_heads."""
    intermediate_size: int = Field(192, gt=0)
    """SwiGLU width F of dense layers."""
    sliding_window: int = Field(0, ge=0)
    """Tokens that a query sees in layers with a sliding window, its own and those before it; 0 = no layer has one.  Not llama and deepseek_v3."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    """qwen2, qwen3: which layers have the sliding window, one entry per layer; () = all alike."""
    num_experts: int = Field(0, ge=0)
    """Routed experts E of a sparse layer (DeepSeek: n_routed_experts)."""
    num_experts_per_tok: int = Field(0, ge=0)
    """Experts that each token goes to, k."""
    moe_intermediate_size: int = Field(0, ge=0)
    """SwiGLU width of one expert."""
    norm_topk_prob: bool = False
    """Divide a token's routing weights by their sum."""
    decoder_sparse_step: int = Field(1, ge=1)
    """qwen3_moe: every so many layers one is sparse."""
    mlp_only_layers: tuple[int, ...] = ()
    """qwen3_moe: layers that are dense all the same."""
    n_shared_experts: int = Field(0, ge=0)
    """deepseek_v3: experts that every token goes to, as one SwiGLU of so many widths."""
    n_group: int = Field(1, ge=1)
    """deepseek_v3: groups of experts."""
    topk_group: int = Field(1, ge=1)
    """deepseek_v3: groups that a token chooses from."""
    routed_scaling_factor: float = Field(1.0, gt=0)
    """deepseek_v3: factor of the routing weights."""
    first_k_dense_replace: int = Field(0, ge=0)
    """deepseek_v3: first layers, which are dense."""
    q_lora_rank: int = Field(0, ge=0)
    """deepseek_v3: rank of the query projection; 0 = a full matrix."""
    kv_lora_rank: int = Field(0, ge=0)
    """deepseek_v3: width of the latent that keys and values are computed from, and that the cache holds."""
    qk_nope_head_dim: int = Field(0, ge=0)
    """deepseek_v3: width of a query head without position."""
    qk_rope_head_dim: int = Field(0, ge=0)
    """deepseek_v3: width of a query head with RoPE, and of the one rotated key."""
    v_head_dim: int = Field(0, ge=0)
    """deepseek_v3: width of a value head."""
    rope_interleave: bool = True
    """deepseek_v3: the rotated pairs are neighbours (x0, x1), (x2, x3), ... rather than halves."""
    num_nextn_predict_layers: int = Field(0, ge=0, le=1)
    """deepseek_v3: 1 = a layer behind the last that predicts the token after the next one (multi-token prediction): a loss, and drafts."""
    rope_theta: float = Field(10000.0, gt=0)
    """RoPE base."""
    rope_scaling: dict | None = None
    """HuggingFace rope_scaling; None or rope_type llama3, linear or yarn, for deepseek_v3 None or yarn."""
    rms_norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every RMS norm (deepseek_v3: but those of the latents, which have 1e-6)."""
    tie_word_embeddings: bool = True
    """Use the embedding as lm_head."""
    max_position_embeddings: int = Field(4096, gt=0)
    """Longest sequence in tokens."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; matrices that write to the residual get it divided by sqrt(2 x layers)."""

    @model_validator(mode="after")
    def _heads(self):
        heads = self.num_attention_heads
        if not self.latent and heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads is {self.num_key_value_heads}, wanted a divisor of num_attention_heads = {heads}")
        if not self.latent and not self.head_dim and self.hidden_size % heads:
            raise ValueError(f"hidden_size is {self.hidden_size}, wanted a multiple of num_attention_heads = {heads} (or set head_dim)")
        if self.rotary_width % 2:
            raise ValueError(f"{'qk_rope_head_dim' if self.latent else 'head_dim'} is {self.rotary_width}, RoPE wants it even")
        scaled = ("yarn",) if self.latent else tuple(ROPE_NUMBERS)
        if self.rope_type not in (*scaled, "default"):
            raise ValueError(f"rope_scaling is {self.rope_scaling}, wanted rope_type {', '.join(scaled)} or none")
        if absent := [key for key in ROPE_NUMBERS.get(self.rope_type, ()) if not isinstance(self.rope_scaling.get(key), (int, float))]:
            raise ValueError(f"rope_scaling of type {self.rope_type} has no {', '.join(absent)}")
        return self

    @model_validator(mode="after")
    def _windows(self):
        window, types = self.sliding_window, self.layer_types
        if window and self.architecture not in WINDOWED:
            raise ValueError(f"sliding_window is {window}, which the architecture {self.architecture} does not have")
        if types and (self.architecture not in ("qwen2", "qwen3") or len(types) != self.num_hidden_layers):
            raise ValueError(f"layer_types has {len(types)} entries, wanted one per layer of qwen2 or qwen3 ({self.num_hidden_layers}) or none")
        if types and ("sliding_attention" in types) != (window > 0):
            raise ValueError(f"sliding_window is {window} and layer_types has {sorted(set(types))}, wanted a window if and only if a layer slides")
        return self

    @model_validator(mode="after")
    def _experts(self):
        mine = SPARSE.get(self.architecture, ())
        for name in sorted({*EXPERTS, *QWEN3_MOE, *DEEPSEEK_V3} - set(mine)):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, which the architecture {self.architecture} does not have")
        if not mine:
            return self
        for name in (*EXPERTS, *(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if self.latent else ())):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0, wanted a positive number for {self.architecture}")
        E, k, groups = self.num_experts, self.num_experts_per_tok, self.n_group
        if E % groups or self.topk_group > groups or (groups > 1 and E // groups < 2):
            raise ValueError(f"n_group is {groups}, topk_group is {self.topk_group}, wanted groups of at least 2 of {E} experts, and no more chosen")
        if k > E // groups * self.topk_group:
            raise ValueError(f"num_experts_per_tok is {k}, wanted at most the {E // groups * self.topk_group} experts that it can choose from")
        for name in ("head_dim", "num_key_value_heads") if self.latent else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}; deepseek_v3 has one latent for all heads, and qk_*_head_dim and v_head_dim")
        return self

    @property
    def rope_type(self) -> str:
        """default, llama3, linear or yarn; older files call the key `type`."""
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type", scaling.get("type")) if scaling else "default"

    @property
    def latent(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.architecture == "deepseek_v3"

    @property
    def width_per_head(self) -> int:
        """Of queries and keys."""
        if self.latent:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """What RoPE turns of a head."""
        return self.qk_rope_head_dim if self.latent else self.width_per_head

    @property
    def cache_heads(self) -> int:
        return 1 if self.latent else self.num_key_value_heads

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds per head and token, as keys and again as values; of a latent, once on a GPU."""
        return self.kv_lora_rank + self.qk_rope_head_dim if self.latent else self.width_per_head

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of the layer sees; None = all before it."""
        slides = self.sliding_window and (not self.layer_types or self.layer_types[layer] == "sliding_attention")
        return self.sliding_window if slides else None

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of its SwiGLU."""
        if self.architecture == "qwen3_moe":
            return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.latent and layer >= self.first_k_dense_replace
