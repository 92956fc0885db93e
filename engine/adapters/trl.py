"""TRL's GRPOTrainer with Athanor's log-probs, losses and Generator (TRL 1.16).

    from athanor.adapters.trl import AthanorGRPOTrainer
    trainer = AthanorGRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)    # in place of GRPOTrainer

What changes; rewards, advantages, metrics, logging, saving and the training loop stay TRL's:

  log-probs   `linear_logprob` scores the completion tokens, in place of TRL's fused lm_head: policy, old policy and reference model
  loss        `policy_loss` on the packed completion tokens: loss_type grpo, bnpo, dr_grpo, dapo, luspo, cispo and sapo, importance_sampling_level
              token and sequence (GSPO), epsilon_high, delta, beta with or without use_bias_correction_kl.  Where |log ratio| > 20 the gradient is 0
  sampling    `Generator` draws the completions: a prompt is prefilled once for its group, finished rows make room, weights are read where they are
              (shared_decoder.py moves them into fused matrices at the first step).  Seeds come from torch's generator, which TRL seeds by args.seed

rollout="trl" leaves sampling to TRL and its options.  Llama, Qwen2 and Qwen3; `patch(model)` of athanor.adapters.transformers, before the trainer is
made, adds the kernels of the training forward.  Options that are not there raise a UserError that names them.  Left out: VESPO, entropy bonus and
mask, off-policy mask, vLLM, PEFT, FSDP and DeepSpeed.

To undo it, make TRL's GRPOTrainer again, on a model loaded afresh or after `del model.forward`, which TRL itself leaves replaced.
"""

import functools
import itertools
from types import MethodType

import numpy as np
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from athanor.adapters.shared_decoder import shared_decoder, shares_weights
from athanor.adapters.transformers import SUPPORTED, label_logprobs
from athanor.config import SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.kernels import LossVariant, policy_loss
from athanor.kernels.policy_loss import k3
from athanor.samples import Request

AGGREGATION = {"grpo": "sequence_mean", "sapo": "sequence_mean", "bnpo": "token_mean", "dapo": "token_mean", "cispo": "token_mean",
               "dr_grpo": "constant", "luspo": "constant"}  # fmt: skip
# The only values under which what we leave out does nothing.
LOSS_ONLY = dict(top_entropy_quantile=1.0, entropy_coef=0.0, use_adaptive_entropy=False, off_policy_mask_threshold=None, cast_lm_head_to_fp32=False,
                 use_vllm=False)  # fmt: skip
ROLLOUT_ONLY = dict(repetition_penalty=1.0, cache_implementation=None, generation_kwargs=None, use_transformers_continuous_batching=False)


class AthanorGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with our kernels; arguments as TRL's.  rollout: "athanor" samples with our Generator, "trl" as TRL does.

    Raises UserError for an option, a model or a way to distribute it that is not supported (see the module).
    """

    def __init__(self, *args, rollout: str = "athanor", **kwargs):
        config = kwargs.get("args") or next((value for value in args if isinstance(value, GRPOConfig)), None)
        if rollout not in ("athanor", "trl"):
            raise UserError(f"AthanorGRPOTrainer: rollout is {rollout!r}; wanted 'athanor' or 'trl'")
        if config is not None:
            refuse_options(config, LOSS_ONLY | (ROLLOUT_ONLY if rollout == "athanor" else {}))
        super().__init__(*args, **kwargs)
        if type(self.model).__name__ not in SUPPORTED:
            raise UserError(f"AthanorGRPOTrainer: model is {type(self.model).__name__}; wanted one of {', '.join(SUPPORTED)}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("AthanorGRPOTrainer: FSDP or DeepSpeed is enabled; wanted whole weights in every process")
        self.variant = loss_variant(self.args)
        self.rollout = rollout
        self._generator: Generator | None = None
        for model in (self.model, self.ref_model):
            if model is not None:
                score_labels(self.accelerator.unwrap_model(model), self.temperature)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        if self.rollout == "trl":
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        if images is not None or multimodal_fields:
            raise UserError(f"AthanorGRPOTrainer: the prompts have images or {', '.join(multimodal_fields)}; wanted text, or rollout='trl'")
        sampling = SamplingConfig(temperature=self.temperature, top_k=self.top_k or 0, top_p=self.top_p, min_p=self.min_p or 0.0,
                                  max_tokens=self.max_completion_length)  # fmt: skip
        requests = []
        for ids, run in itertools.groupby(prompt_ids):  # TRL repeats a prompt in place; members of a group may lie in another process
            seeds = torch.randint(2**62, (len(list(run)),)).split(num_generations)
            requests += [Request(np.asarray(ids, np.int64), of_group.numpy()) for of_group in seeds]
        groups = self.generator.generate(requests, sampling)
        return [completion.token_ids.tolist() for group in groups for completion in group], None

    @property
    def generator(self) -> Generator:
        """The Generator on the model's own weights, made again where these have moved."""
        model = self.accelerator.unwrap_model(self.model)
        if self._generator is None or not shares_weights(self._generator.model, model):
            self._generator = Generator(shared_decoder(model), frozenset(self.eos_token_ids))
        return self._generator

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        advantages, kept = inputs["advantages"], mask.bool()
        if advantages.dim() != 1:
            raise UserError(f"AthanorGRPOTrainer: advantages is {tuple(advantages.shape)}; wanted one per completion, {(len(mask),)}")
        input_ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        attention_mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(model, input_ids, attention_mask, mask.shape[1], compute_entropy=True)
        old, ref = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        old = logps.detach() if old is None else old

        train = self.model.training
        accumulation = self.current_gradient_accumulation_steps if train else 1
        over_generation = self.loss_type in ("dapo", "cispo")
        if over_generation:  # TRL counts the tokens of a whole generation batch, in all processes
            share = accumulation / self.args.steps_per_generation if train else 1
            divisor = inputs["num_items_in_batch"].clamp_min(1) / self.accelerator.num_processes * share
        else:
            divisor = accumulation
        counts = {"num_sequences": len(mask), "num_tokens": 1 if over_generation else kept.sum()}
        loss, _ = policy_loss(
            logps[kept], old[kept], advantages, torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int(),
            ref_logps=ref[kept] if self.variant.kl != "none" else None, variant=self.variant, **counts,
        )  # fmt: skip
        if self.beta and self.args.use_bias_correction_kl:
            loss = loss + self.beta * mean_of(self.variant, k3(ref - logps) * ratio_of(self.variant, logps, old, mask), mask, **counts)
        self._log_loss(logps.detach(), old, ref, advantages, mask, entropies)
        return loss / divisor

    @torch.no_grad()
    def _log_loss(self, logps: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor, entropies: Tensor) -> None:
        """TRL's metrics under TRL's names: means over the tokens (of a sequence ratio: the sequences) of all processes."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        ratio, positive = ratio_of(self.variant, logps, old, mask), advantages.unsqueeze(1)

        def mean(x: Tensor) -> float:
            weight = torch.ones_like(x) if x.shape[1] == 1 else mask
            total, count = self.accelerator.reduce(torch.stack(((x * weight).sum(), weight.sum().float())), reduction="sum")
            return (total / count.clamp_min(1)).item()

        def extreme(x: Tensor, of) -> float:
            """Of the sequences' means; one without tokens has none."""
            rows = self.accelerator.gather(x.squeeze(1) if x.shape[1] == 1 else (x * mask).sum(1) / mask.sum(1))
            rows = rows[~rows.isnan()]
            return of(rows).item() if len(rows) else float("nan")

        if self.beta:
            metrics["kl"].append(mean(k3(ref - logps) * (ratio if self.args.use_bias_correction_kl else 1)))
        metrics["entropy"].append(mean(entropies))
        high = (ratio > 1 + self.variant.clip_high) & (positive > 0)
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(mean(high.float()))
        elif self.loss_type != "sapo":
            low = (ratio < 1 - self.variant.clip_low) & (positive < 0)
            for name, cut in (("low", low), ("high", high), ("region", low | high)):
                metrics[f"clip_ratio/{name}_mean"].append(mean(cut.float()))
            metrics["clip_ratio/low_min"].append(extreme(low.float(), torch.min))
            metrics["clip_ratio/high_max"].append(extreme(high.float(), torch.max))


def refuse_options(config: GRPOConfig, only: dict) -> None:
    """Raise UserError for a loss or an option that we do not have, naming it."""
    if config.loss_type not in AGGREGATION:
        raise UserError(f"AthanorGRPOTrainer: loss_type is {config.loss_type!r}; wanted one of {', '.join(AGGREGATION)}")
    for name, value in only.items():
        if (getattr(config, name) or None) != (value or None):
            hint = ", or rollout='trl'" if name in ROLLOUT_ONLY else ""
            raise UserError(f"AthanorGRPOTrainer: {name} is {getattr(config, name)!r}; wanted {value!r}{hint}")


def loss_variant(config: GRPOConfig) -> LossVariant:
    """TRL's options as one of our losses, without the KL where it is multiplied by the ratio.  Raises UserError on a contradiction."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    settings = dict(ratio=config.importance_sampling_level, aggregation=AGGREGATION[config.loss_type])
    if config.loss_type == "cispo":  # TRL's epsilon_high is the bound itself there, and there is no lower one
        settings |= dict(surrogate="cispo", clip_low=1.0, clip_high=high - 1)
    elif config.loss_type == "sapo":
        settings |= dict(surrogate="sapo", tau_positive=config.sapo_temperature_pos, tau_negative=config.sapo_temperature_neg)
    else:
        settings |= dict(clip_low=config.epsilon, clip_high=high)
        settings |= {} if config.delta is None else dict(surrogate="two_sided", delta=config.delta)
    if settings["aggregation"] == "constant":  # LUSPO sums over a sequence
        settings["max_tokens"] = config.max_completion_length if config.loss_type == "dr_grpo" else 1
    if config.beta and not config.use_bias_correction_kl:
        settings |= dict(kl="k3", beta=config.beta)
    try:
        return LossVariant(**settings)
    except ValueError as error:
        raise UserError(f"AthanorGRPOTrainer: loss_type {config.loss_type!r}: {error}") from None


def ratio_of(variant: LossVariant, logps: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The ratio to the old policy, (B, C) or for a sequence ratio (B, 1)."""
    log_ratio = logps - old
    if variant.ratio == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return log_ratio.exp()


def mean_of(variant: LossVariant, x: Tensor, mask: Tensor, num_tokens: int | Tensor, num_sequences: int) -> Tensor:
    """x (B, C) added up as the variant adds up its tokens."""
    if variant.aggregation == "sequence_mean":
        return ((x * mask).sum(1) / mask.sum(1).clamp_min(1)).sum() / num_sequences
    total = (x * mask).sum()
    return total / (num_sequences * variant.max_tokens) if variant.aggregation == "constant" else total / torch.as_tensor(num_tokens).clamp_min(1)


def score_labels(model, temperature: float) -> None:
    """Replace TRL's fused lm_head on this instance.

    model(..., labels=labels, fused_lm_head=True) then returns log_probs and entropy, (B, L - 1), 0 where the next label is -100.
    """
    without = model.forward

    @functools.wraps(type(model).forward)  # generate reads the signature
    def forward(self, *args, **kwargs):
        if not kwargs.pop("fused_lm_head", False):
            return without(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        hidden = self.model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        scored, kept = label_logprobs(hidden, self.lm_head.weight, labels, temperature=temperature)
        logps, entropy = (x.new_zeros(kept.shape).masked_scatter(kept, x) for x in (scored.logps, scored.entropy))
        return FusedCausalLMOutput(log_probs=logps, entropy=entropy, label_mask=kept)

    model.forward = MethodType(forward, model)
