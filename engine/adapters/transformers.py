"""Llama, Qwen2 and Qwen3 models of transformers with Athanor's kernels, one instance at a time and undoable.

    from athanor.adapters.transformers import patch, unpatch
    patch(model)                                    # any LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM; unpatch(model) undoes it

What changes, on this instance alone (classes, other models, weights, state dict and config stay as they are):

  RMSNorm    `rmsnorm`: fp32 throughout and one cast at the end, where transformers casts before it multiplies by the weight (differs in bf16 only)
  RoPE       `rope` in place of apply_rotary_pos_emb; the rest of the attention is the host's own code, mask, cache and attention interface included
  MLP        `swiglu` on the outputs of gate_proj and up_proj, computed in fp32 and rounded once
  loss       a forward in training mode with labels takes `linear_logprob` from the hidden states, and the output has `logits=None`.  In eval mode,
             without labels, with logits_to_keep, with another loss function or an lm_head that is no plain nn.Linear (LoRA) it is the host's forward

Whoever replaces `forward` too (TRL's trainers, accelerate's mixed precision) must come after `patch` and be undone before `unpatch`; both say so
otherwise.  A deepcopy of a patched model is patched.  Left out: other architectures, and FSDP or tensor-parallel heads, whose weight is not whole in
front of the loss.
"""

import functools
import importlib
import inspect
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from athanor.errors import UserError
from athanor.kernels import LogProbs, linear_logprob, rmsnorm, rope, swiglu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}  # class -> its folder in transformers.models


def patch(model: "PreTrainedModel") -> "PreTrainedModel":
    """Replace the forwards that the module's docstring lists; return the same model.  Patching twice is patching once.

    Raises UserError for another class (a subclass may compute something else), an activation other than SiLU, a version of transformers whose
    attention has no apply_rotary_pos_emb, or where somebody else has replaced a forward of this instance already; then nothing is changed.
    """
    forwards = _forwards(model)
    for name, module in model.named_modules():
        current = vars(module).get("forward")
        if type(module) in forwards and current is not None and not _is_ours(current) and current != MethodType(type(module).forward, module):
            raise UserError(f"patch: the forward of {name or type(model).__name__} is replaced already; wanted a model as transformers builds it")
    for module in model.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return model


def unpatch(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give a patched model its class's forwards back; return it.  A model that is not patched stays as it is.

    Raises UserError where somebody has replaced the forward of the model after `patch`; then nothing is changed.
    """
    current = vars(model).get("forward")
    patched = [module for module in model.modules() if _is_ours(vars(module).get("forward"))]
    if patched and not _is_ours(current):
        by = getattr(current, "__module__", None)
        raise UserError(f"unpatch: the forward of {type(model).__name__} was replaced by {by} after patch; wanted that undone first")
    for module in patched:
        del module.forward
    return model


def _is_ours(forward) -> bool:
    return getattr(getattr(forward, "__func__", None), "athanor", False)


def _forwards(model: "PreTrainedModel") -> dict[type, FunctionType]:
    """The class of a module -> its new forward."""
    name = type(model).__name__
    modeling = importlib.import_module(f"transformers.models.{SUPPORTED[name]}.modeling_{SUPPORTED[name]}") if name in SUPPORTED else None
    if modeling is None or type(model) is not getattr(modeling, name):
        raise UserError(f"patch: model is {type(model).__module__}.{name}; wanted one of transformers' {', '.join(SUPPORTED)}")
    if model.config.hidden_act not in ("silu", "swish"):
        raise UserError(f"patch: hidden_act is {model.config.hidden_act!r} in the config; wanted 'silu'")
    family = name.removesuffix("ForCausalLM")
    norm, mlp, attention = (getattr(modeling, family + part) for part in ("RMSNorm", "MLP", "Attention"))
    return {norm: norm_forward, mlp: mlp_forward, attention: _attention_forward(modeling, attention), type(model): _loss_forward(type(model))}


def norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return rmsnorm(hidden_states, self.weight, eps=self.variance_epsilon)


def mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    # The host keeps two matrices, so their products are copied side by side once.
    gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
    return self.down_proj(swiglu(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1]))


norm_forward.athanor = mlp_forward.athanor = True


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of transformers: q (B, H, L, d), k (B, K, L, d), cos and sin (B or 1, L, d) whose halves are equal."""
    if unsqueeze_dim != 1:
        raise UserError(f"rotate: unsqueeze_dim is {unsqueeze_dim}; wanted 1, heads before positions")
    B, _, L, d = q.shape
    angles = (x[..., : d // 2].expand(B, L, d // 2).reshape(B * L, d // 2) for x in (cos, sin))
    turned = rope(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k)), *angles)
    return tuple(x.unflatten(0, (B, L)).transpose(1, 2) for x in turned)


@functools.cache
def _attention_forward(modeling: ModuleType, attention: type) -> FunctionType:
    """The host's own attention forward, reading `rotate` where it reads apply_rotary_pos_emb.

    A copy of the function with other globals and not a rewrite: mask, cache and attention interface change with every version of the host.
    """
    host = inspect.unwrap(attention.forward)
    if "apply_rotary_pos_emb" not in host.__code__.co_names:
        import transformers

        version = transformers.__version__
        raise UserError(f"patch: {attention.__name__} of transformers {version} does not call apply_rotary_pos_emb; wanted 4.57 to 5.23")
    forward = FunctionType(host.__code__, {**vars(modeling), "apply_rotary_pos_emb": rotate}, host.__name__, host.__defaults__, host.__closure__)
    forward.__kwdefaults__ = host.__kwdefaults__
    forward.athanor = True
    return forward


@functools.cache
def _loss_forward(causal_lm: type) -> FunctionType:
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    signature = inspect.signature(causal_lm.forward)

    @can_return_tuple
    def with_loss(self, *, labels, logits_to_keep=0, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **inputs):
        outputs = self.model(**inputs)
        if shift_labels is None:  # the last position predicts nothing
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        scored, kept = label_logprobs(outputs.last_hidden_state, self.lm_head.weight, shift_labels, ignore_index=ignore_index)
        loss = -scored.logps.sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
        passed_on = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, **passed_on)

    @functools.wraps(causal_lm.forward)  # generate and Trainer read the signature
    def forward(self, *args, **kwargs):
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        plain = type(self.lm_head) is nn.Linear and self.lm_head.bias is None and self.loss_function is ForCausalLMLoss
        keeps_all = isinstance(given.get("logits_to_keep", 0), int) and given.get("logits_to_keep", 0) == 0
        if self.training and given.get("labels") is not None and plain and keeps_all:
            del given["self"]
            return with_loss(self, **given)
        return causal_lm.forward(self, *args, **kwargs)

    forward.athanor = True
    return forward


def label_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> tuple[LogProbs, Tensor]:
    """Log-prob and entropy of those labels (B, L) that are not ignore_index, from hidden states (B, L, D), and the mask (B, L) of where they stand.

    Other positions do not meet the lm_head.  Inside autocast the products have its dtype, like the host's.
    """
    labels, device = labels.to(hidden.device), hidden.device.type
    kept = labels != ignore_index
    if torch.is_autocast_enabled(device):
        hidden, weight = hidden.to(torch.get_autocast_dtype(device)), weight.to(torch.get_autocast_dtype(device))
    return linear_logprob(hidden[kept], weight, labels[kept], temperature=temperature), kept
