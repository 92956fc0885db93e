"""What else samples and trains: a plain PyTorch loop, transformers' generate and TRL's GRPOTrainer, with the weights of a Decoder.

TRL's step is its own `training_step` (sampling, rewards, advantages, loss, backward) followed by what its loop does next: clip, AdamW, zero_grad.
Logging, saving, evaluation, data loading and gradient checkpointing are off or outside the timer.  Read against transformers 5.23 and TRL 1.16.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched or reported

import tempfile  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
from gate import Verdict  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from workloads import seconds_of  # noqa: E402

from athanor.model.transformer import Decoder  # noqa: E402
from athanor.weights import hf_tensors, model_config_to_hf  # noqa: E402


@torch.inference_mode()
def eager_generate(model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample with a dense cache allocated in full and scaled_dot_product_attention; temperature 0 = greedy.

    prompts: (P, L) int64.  Returns tokens and their log-probs, both (P * group_size, new_tokens), a prompt's samples side by side.
    """
    c, d = model.config, model.config.width_per_head
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.hidden_size
    ids = prompts.repeat_interleave(group_size, 0)
    B, length = ids.shape
    weight = model.lm_head_weight
    keys, values = (weight.new_empty(c.num_hidden_layers, B, K, length + new_tokens, d) for _ in range(2))
    angles = torch.arange(length + new_tokens, device=ids.device).float()[:, None] * model.inv_freq
    cos, sin = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)

    def norm(x, module):
        return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)

    def rotated(x, at):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos[at] - second * sin[at], second * cos[at] + first * sin[at]), -1)

    def last_logits(ids, start):
        n = ids.shape[1]
        at = slice(start, start + n)
        x = F.embedding(ids, model.embed.weight)
        for i, layer in enumerate(model.layers):
            qkv = F.linear(norm(x, layer.input_norm), layer.qkv_proj.weight, layer.qkv_proj.bias)
            q, k, v = qkv.view(B, n, H + 2 * K, d).transpose(1, 2).split((H, K, K), 1)
            if layer.qk_norm:
                q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
            keys[i, :, :, at], values[i, :, :, at] = rotated(k, at), v
            past = keys[i, :, :, : at.stop], values[i, :, :, : at.stop]
            out = F.scaled_dot_product_attention(rotated(q, at), *past, is_causal=n > 1, enable_gqa=True)
            x = x + F.linear(out.transpose(1, 2).reshape(B, n, H * d), layer.o_proj.weight)
            gate, up = F.linear(norm(x, layer.post_attention_norm), layer.gate_up_proj.weight).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down_proj.weight)
        return F.linear(norm(x[:, -1].view(B, D), model.norm), weight).float()

    tokens, logps = [], []
    for t in range(new_tokens):
        logits = last_logits(ids, 0 if t == 0 else length + t - 1)
        log_p = (logits / (temperature or 1.0)).log_softmax(-1)
        ids = torch.multinomial(log_p.exp(), 1) if temperature else log_p.argmax(-1, keepdim=True)
        tokens.append(ids)
        logps.append(log_p.gather(1, ids))
    return torch.cat(tokens, 1), torch.cat(logps, 1)


@torch.no_grad()
def huggingface_model(model: Decoder):
    """The same model in transformers' own class, with copies of the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    embed = model.embed.weight
    with torch.device(embed.device):
        config = AutoConfig.for_model(**model_config_to_hf(model.config))
        twin = AutoModelForCausalLM.from_config(config, dtype=embed.dtype, attn_implementation="sdpa")
    parameters, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    sources = hf_tensors(model.config)
    if set(theirs) != set(sources):
        raise ValueError(f"huggingface_model: parameters that only one side has: {sorted(set(theirs) ^ set(sources))[:4]}")
    for name, source in sources.items():
        theirs[name].copy_(parameters[source.parameter][source.start : source.start + source.shape[0]])
    return twin.eval()


def figures(generate, rows: int, new_tokens: int, device: str) -> dict[str, float]:
    """Figures of one run of generate(new_tokens) -> anything: its time, that of the first tokens alone, and the speed of the decoding between."""
    _, first_s = seconds_of(lambda: generate(1), device)
    _, total_s = seconds_of(lambda: generate(new_tokens), device)
    return {"seconds": total_s, "first_token_s": first_s, "decode_tokens_per_s": rows * (new_tokens - 1) / (total_s - first_s)}


class EagerGenerate:
    """The plain loop."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str):
        self.model, self.prompts, self.group_size, self.new_tokens, self.device = model, prompts, group_size, new_tokens, device

    def generate(self, new_tokens: int) -> Tensor:
        return eager_generate(self.model, self.prompts, self.group_size, new_tokens, 1.0)[0]

    def check(self) -> Verdict:
        return count(self.generate(self.new_tokens), len(self.prompts) * self.group_size, self.new_tokens)

    def run(self) -> dict[str, float]:
        return figures(self.generate, len(self.prompts) * self.group_size, self.new_tokens, self.device)


class TransformersGenerate(EagerGenerate):
    """`generate` of transformers: all rows at once, its default cache, no end token, nothing filtered."""

    def __init__(self, model: Decoder, **workload):
        super().__init__(model, **workload)
        self.twin = huggingface_model(model)

    @torch.inference_mode()
    def generate(self, new_tokens: int, **options) -> Tensor:
        ids = self.prompts.repeat_interleave(self.group_size, 0)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
        out = self.twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
                                 use_cache=True, **options)  # fmt: skip
        return out[:, ids.shape[1] :]

    def check(self) -> Verdict:
        """In fp32 it must also choose the tokens of the plain loop when both are greedy: then the weights are the same ones."""
        if self.model.embed.weight.dtype == torch.float32:
            options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
            greedy, _ = eager_generate(self.model, self.prompts, 1, self.new_tokens, 0.0)
            differ = self.generate(self.new_tokens, **options)[:: self.group_size] != greedy
            if differ.any():
                return Verdict(f"greedy: {int(differ.sum())} of {differ.numel()} tokens differ from the eager loop's")
        return super().check()


def count(tokens: Tensor, rows: int, new_tokens: int) -> Verdict:
    return Verdict(None if tokens.shape == (rows, new_tokens) else f"gave {tuple(tokens.shape)} tokens; wanted {(rows, new_tokens)}")


class TRLStep:
    """One step of GRPOTrainer without a reference model: the prompts' groups, then one update on all of their tokens."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, reward, optimizer):
        """reward: list of token ids -> float.  optimizer: the engine's OptimizerConfig, whose numbers TRL is given."""
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig

        self.device, self.new_tokens = device, new_tokens
        V, rows = model.config.vocab_size, len(prompts) * group_size
        # The end token lies outside of the model's vocabulary, so that no sample ends early.
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)} | {"<end>": V}, unk_token="<end>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")

        def rewards(completion_ids, **_):
            return [reward(ids) for ids in completion_ids]

        config = GRPOConfig(
            output_dir=tempfile.gettempdir(), use_cpu=device == "cpu", bf16=model.embed.weight.dtype == torch.bfloat16, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, per_device_train_batch_size=rows,
            gradient_accumulation_steps=1, num_generations=group_size, num_iterations=1, max_completion_length=new_tokens, temperature=1.0,
            beta=0.0, loss_type="grpo", scale_rewards="group", epsilon=0.2, shuffle_dataset=False, dataloader_pin_memory=False,
            learning_rate=optimizer.lr, lr_scheduler_type="constant", optim="adamw_torch_fused", adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=optimizer.grad_clip,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in ids) for ids in prompts.tolist()]})
        self.trainer = self.make_trainer(huggingface_model(model), reward_funcs=rewards, args=config, train_dataset=data, processing_class=tokenizer)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped, self.trainer.optimizer = prepared
        self.trainer.current_gradient_accumulation_steps = 1  # what its loop sets before the first step
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.rollout_s = 0.0
        prepare = self.trainer._prepare_inputs  # sampling, rewards and advantages

        def prepare_timed(batch):
            inputs, self.rollout_s = seconds_of(lambda: prepare(batch), device)
            return inputs

        self.trainer._prepare_inputs = prepare_timed

    def make_trainer(self, model, **arguments):
        from trl import GRPOTrainer

        return GRPOTrainer(model, **arguments)

    def step(self) -> float:
        t = self.trainer
        loss = t.training_step(t.model_wrapped, self.batch, num_items_in_batch=None)
        t.accelerator.clip_grad_norm_(t.model_wrapped.parameters(), t.args.max_grad_norm)
        t.optimizer.step()
        t.model_wrapped.zero_grad()
        return float(loss)

    def check(self) -> Verdict:
        before = self.trainer.model.get_input_embeddings().weight.detach().clone()
        self.step()
        seen = SimpleNamespace(**{k: self.trainer._metrics["train"][f"completions/{k}_length"][-1] for k in ("min", "max")})
        if (seen.min, seen.max) != (self.new_tokens, self.new_tokens):
            return Verdict(f"gave completions of {seen.min:.0f} to {seen.max:.0f} tokens; wanted {self.new_tokens}")
        return Verdict("a step left the weights as they were" if torch.equal(before, self.trainer.model.get_input_embeddings().weight) else None)

    def run(self) -> dict[str, float]:
        _, total_s = seconds_of(self.step, self.device)
        return {"seconds": total_s, "rollout_s": self.rollout_s, "update_s": total_s - self.rollout_s}


class TRLStepOnAthanor(TRLStep):
    """The same step with the adapters: our sampling, log-probs and loss in TRL's trainer, our kernels in transformers' model."""

    def __init__(self, model: Decoder, prompts: Tensor, **step):
        super().__init__(model, prompts, **step)
        self.decoder = model

    def check(self) -> Verdict:
        """Its log-probs of its own samples against those of an unpatched model, in bf16 on average, then as TRL's."""
        t, plain = self.trainer, huggingface_model(self.decoder)
        inputs = t._prepare_inputs(self.batch)
        ids, kept = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1), inputs["completion_ids"].shape[1]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            ours = t._get_per_token_logps_and_entropies(t.model, ids, mask, kept)[0]
            rows = [plain(row[None]).logits[0, -kept - 1 : -1].float().log_softmax(-1).gather(1, row[-kept:, None])[:, 0] for row in ids]
        gap = (ours - torch.stack(rows)).abs()
        error, allowed = (gap.max(), 1e-4) if plain.dtype == torch.float32 else (gap.mean(), 2e-2)
        verdict = super().check()
        verdict.errors = [[float(error), allowed]]
        if not error <= allowed:
            verdict.wrong = f"log-probs differ from plain transformers' by {float(error):.2e} nats, allowed {allowed:g}"
        return verdict

    def make_trainer(self, model, **arguments):
        from athanor.adapters.transformers import patch
        from athanor.adapters.trl import AthanorGRPOTrainer

        return AthanorGRPOTrainer(patch(model), **arguments)
