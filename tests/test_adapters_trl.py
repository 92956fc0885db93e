"""AthanorGRPOTrainer beside TRL's GRPOTrainer: equal losses, gradients and metrics on the same batch, samples of the trained weights, errors.

The truth of a loss is TRL's own code on log-probs of an fp64 model; our gradient's error is at most twice that of TRL's fused lm_head in fp32.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (trl extra)")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from athanor.adapters import shared_decoder as shared_decoder_module  # noqa: E402
from athanor.adapters import trl as trl_adapter  # noqa: E402
from athanor.adapters.shared_decoder import shared_decoder, shares_weights  # noqa: E402
from athanor.adapters.transformers import patch, unpatch  # noqa: E402
from athanor.adapters.trl import AthanorGRPOTrainer  # noqa: E402
from athanor.config import SamplingConfig  # noqa: E402
from athanor.errors import UserError  # noqa: E402
from athanor.generator import Generator  # noqa: E402
from athanor.samples import Request  # noqa: E402

V, G, P, C = 40, 4, 5, 9  # vocabulary, group, prompt and completion tokens
EOS = V - 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A model folder, because TRL loads the reference model by its name."""
    config = Qwen3Config(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12, use_cache=True,
                         intermediate_size=56, max_position_embeddings=128, bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3).add_(float(parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V - 1)} | {"<end>": EOS}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def even(completion_ids, **_) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer(cls, checkpoint: str, tmp_path, model=None, rollout=None, **options):
    options = dict(per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=C, gradient_checkpointing=False) | options
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **options)
    data = Dataset.from_dict({"prompt": [" ".join(f"t{(i + j) % (V - 1)}" for j in range(2 + i % 3)) for i in range(8)]})
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) if model is None else model
    extra = {} if rollout is None else {"rollout": rollout}
    made = cls(model=model, reward_funcs=even, args=config, train_dataset=data, processing_class=tokenizer(), **extra)
    made.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # what the training loop sets
    made.model.train()
    return made


class InFp64(GRPOTrainer):
    """TRL's loss on log-probs that are computed from logits in fp64."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1] / self.temperature
        log_p = logits.log_softmax(-1)
        scored = attention_mask[:, -logits_to_keep:]  # TRL has 0 behind the end of a completion
        logps = log_p.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
        return logps * scored, -(log_p.exp() * log_p).sum(-1) * scored, None


def fp64_model(checkpoint: str):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    frequencies = model.model.rotary_emb.inv_freq
    model.double().model.rotary_emb.inv_freq = frequencies
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
    return model


def batch(dtype=torch.float32, tools: bool = False) -> dict:
    """Ragged rows: one prompt is short, one completion has a single token, one is masked as a whole, others end early."""
    draw = torch.Generator().manual_seed(3)
    S = 2 * G
    lengths = torch.tensor([C, 1, 0, 4, C, 6, 2, 7])
    prompt_mask = torch.ones(S, P, dtype=torch.long)
    prompt_mask[1, :3] = 0
    completion_mask = (torch.arange(C) < lengths[:, None]).long()
    made = {
        "prompt_ids": torch.randint(V - 1, (S, P), generator=draw), "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(V - 1, (S, C), generator=draw), "completion_mask": completion_mask,
        "advantages": torch.randn(S, generator=draw, dtype=torch.float64).to(dtype), "num_items_in_batch": completion_mask.sum() + 13,
    }  # fmt: skip
    if tools:
        made["tool_mask"] = (torch.rand(S, C, generator=draw) < 0.7).long()
    return made


def with_other_policies(inputs: dict, oracle: GRPOTrainer, dtype, far: float = 0.4) -> dict:
    """Old and reference log-probs around the policy's own, far enough that ratios leave every clip range on both sides."""
    draw = torch.Generator().manual_seed(4)
    ids, mask = (torch.cat((inputs[f"prompt_{name}"], inputs[f"completion_{name}"]), 1) for name in ("ids", "mask"))
    with torch.no_grad():
        logps, _, _ = oracle._get_per_token_logps_and_entropies(oracle.model, ids, mask, C)
    noise = torch.randn(2, *logps.shape, generator=draw, dtype=torch.float64) * far
    old, ref = ((logps + x).to(dtype) * inputs["completion_mask"] for x in noise)
    return inputs | {"old_per_token_logps": old, "ref_per_token_logps": ref}


KL = dict(beta=0.07)
LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "grpo, clip-higher, T": dict(loss_type="grpo", epsilon_high=0.28, temperature=0.7),
    "grpo, KL times ratio": dict(loss_type="grpo", **KL),
    "grpo, KL": dict(loss_type="grpo", use_bias_correction_kl=False, **KL),
    "bnpo": dict(loss_type="bnpo", delta=1.5, **KL),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28, **KL),
    "dapo, accumulated": dict(loss_type="dapo", gradient_accumulation_steps=3, steps_per_generation=6),
    "dr_grpo": dict(loss_type="dr_grpo", gradient_accumulation_steps=2, **KL),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=0.03, use_bias_correction_kl=False, **KL),
    "cispo": dict(loss_type="cispo", epsilon_high=1.2, **KL),
    "sapo": dict(loss_type="sapo", sapo_temperature_neg=1.3, gradient_accumulation_steps=2),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04, **KL),
    "gspo, sapo": dict(loss_type="sapo", importance_sampling_level="sequence"),
    "gspo, dapo": dict(loss_type="dapo", importance_sampling_level="sequence", epsilon=0.03),
}


ON_POLICY = ("grpo", "dapo, accumulated")


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_and_metrics_equal_trl(name, checkpoint, tmp_path):
    ours, theirs = (trainer(cls, checkpoint, tmp_path, **LOSSES[name]) for cls in (AthanorGRPOTrainer, GRPOTrainer))
    truth = trainer(InFp64, checkpoint, tmp_path, fp64_model(checkpoint), **LOSSES[name])
    made, tools = [], name in ("bnpo", "gspo")
    for t, dtype in ((ours, torch.float32), (theirs, torch.float32), (truth, torch.float64)):
        inputs = with_other_policies(batch(dtype, tools), truth, dtype)
        if name in ON_POLICY:
            del inputs["old_per_token_logps"]  # TRL's first update of a rollout
        loss = t._compute_loss(t.model, inputs)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in t.model.parameters()]).double()
        made.append((loss.item(), gradient, {key: values[-1] for key, values in t._metrics["train"].items()}))
    (loss, gradient, metrics), (their_loss, their_gradient, their_metrics), (true_loss, true_gradient, _) = made
    assert true_gradient.norm() > 1e-3
    allowed = 2 * (their_gradient - true_gradient).norm() + 2 * torch.finfo(torch.float32).eps * true_gradient.norm()
    assert (gradient - true_gradient).norm() <= allowed
    assert loss == pytest.approx(true_loss, abs=1e-5) == pytest.approx(their_loss, abs=1e-5)  # a sum of some forty log-probs, each 1e-6 off
    assert metrics.keys() == their_metrics.keys()
    assert metrics == pytest.approx(their_metrics, abs=1e-5, nan_ok=True)
    if "clip_ratio/region_mean" in metrics and name not in ON_POLICY:
        assert 0.1 < metrics["clip_ratio/region_mean"] < 0.9  # both sides of every bound are met


def test_log_probs_and_entropies_equal_trl_and_outside_the_completions_nothing_is_scored(checkpoint, tmp_path):
    ours, theirs = (trainer(cls, checkpoint, tmp_path, temperature=0.6) for cls in (AthanorGRPOTrainer, GRPOTrainer))
    inputs = batch()
    ids, mask = (torch.cat((inputs[f"prompt_{name}"], inputs[f"completion_{name}"]), 1) for name in ("ids", "mask"))
    (logps, entropy, _), (their_logps, their_entropy, _) = (
        t._get_per_token_logps_and_entropies(t.model, ids, mask, C, batch_size=3, compute_entropy=True) for t in (ours, theirs)
    )
    torch.testing.assert_close(logps, their_logps)
    torch.testing.assert_close(entropy, their_entropy)
    assert not logps[inputs["completion_mask"] == 0].any()
    assert ours.model(ids).logits.shape == (*ids.shape, V)  # without the flag it is the model's own forward


def test_a_batch_without_any_token_has_zero_gradients(checkpoint, tmp_path):
    inputs = batch()
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    for loss_type in ("grpo", "bnpo", "dapo"):
        ours = trainer(AthanorGRPOTrainer, checkpoint, tmp_path, loss_type=loss_type)
        loss = ours._compute_loss(ours.model, inputs)
        loss.backward()
        assert loss.item() == 0 and not any(p.grad.any() for p in ours.model.parameters() if p.grad is not None)


def test_training_samples_the_weights_that_it_trains(checkpoint, tmp_path):
    """Two steps of TRL's own loop, on a patched model: rewards rise in neither, but samples, weights and saved files must be of one model."""
    model = patch(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = trainer(AthanorGRPOTrainer, checkpoint, tmp_path, model, learning_rate=0.05, max_steps=2, logging_steps=1, beta=0.01)
    ours.train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    logs = [log for log in ours.state.log_history if "reward" in log]
    assert len(logs) == 2 and all(0 < log["reward"] < 1 and log["grad_norm"] > 0 and 1 <= log["completions/mean_length"] <= C for log in logs)
    decoder = ours.generator.model
    assert shares_weights(decoder, model) and ours.generator is ours.generator
    prompt = torch.tensor([3, 4, 5])
    (completions,) = ours.generator.generate([Request(prompt.numpy(), torch.arange(6).numpy())], SamplingConfig(max_tokens=C))
    model.eval()
    for completion in completions:
        ids = torch.cat((prompt, torch.from_numpy(completion.token_ids)))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, ids[len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.from_numpy(completion.logps), expected, rtol=1e-4, atol=1e-4)
    ours.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="replaced by athanor.adapters.trl|replaced by transformers"):
        unpatch(model)
    del model.forward
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()


def test_the_lines_of_the_docstrings_run(checkpoint, tmp_path):
    plain = trainer(GRPOTrainer, checkpoint, tmp_path)
    scope = {"model": plain.model, "reward": even, "config": plain.args, "data": plain.train_dataset, "tokenizer": tokenizer()}
    exec(snippet(trl_adapter), scope)
    assert type(scope["trainer"]) is AthanorGRPOTrainer
    scope |= {"Generator": Generator, "eos_ids": {EOS}}
    exec(snippet(shared_decoder_module), scope)
    assert scope["generator"].model is not plain.model and shares_weights(scope["generator"].model, plain.model)


def snippet(module) -> str:
    """The two indented lines of a docstring."""
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ") and not line.startswith("     ")]
    assert len(lines) == 2
    return "\n".join(lines)


def test_a_group_is_one_request_and_ends_like_trls(checkpoint, tmp_path):
    ours = trainer(AthanorGRPOTrainer, checkpoint, tmp_path)
    prompts = [[3, 4, 5]] * G + [[6, 7]] * (G + 1)  # one more than a group: a prompt drawn twice in a row
    ids, logps = ours._generate_single_turn(prompts, None, {}, G)
    assert logps is None and len(ids) == len(prompts)
    assert ours.generator.num_prefill_tokens == 3 + 2 + 2
    assert all(1 <= len(x) <= C and EOS not in x[:-1] and (len(x) == C or x[-1] == EOS) for x in ids)
    assert len({tuple(x) for x in ids}) > 6  # members differ
    ours.model.to(torch.bfloat16)  # the parameters move, and with them the generator
    assert not shares_weights(ours._generator.model, ours.model)
    ours._generate_single_turn(prompts, None, {}, G)
    assert shares_weights(ours.generator.model, ours.model) and ours.generator.dtype == torch.bfloat16


def test_samples_are_a_function_of_the_seed(checkpoint, tmp_path):
    def sampled():
        torch.manual_seed(5)
        return trainer(AthanorGRPOTrainer, checkpoint, tmp_path)._generate_single_turn([[3, 4]] * G, None, {}, G)[0]

    assert sampled() == sampled()


def test_sampling_can_be_left_to_trl(checkpoint, tmp_path):
    ours = trainer(AthanorGRPOTrainer, checkpoint, tmp_path, rollout="trl", repetition_penalty=1.2)
    ids, _ = ours._generate_single_turn([[3, 4]] * G, None, {}, G)
    assert len(ids) == G and ours._generator is None


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_type="vespo"), "loss_type is 'vespo'; wanted one of grpo, sapo, bnpo"),
        (dict(top_entropy_quantile=0.2), "top_entropy_quantile is 0.2; wanted 1.0"),
        (dict(entropy_coef=0.01), "entropy_coef is 0.01; wanted 0.0"),
        (dict(off_policy_mask_threshold=0.5), "off_policy_mask_threshold is 0.5; wanted None"),
        (dict(repetition_penalty=1.2), "repetition_penalty is 1.2; wanted 1.0, or rollout='trl'"),
        (dict(generation_kwargs={"num_beams": 2}), "generation_kwargs is .*; wanted None, or rollout='trl'"),
        (dict(loss_type="cispo", epsilon_high=5.0, importance_sampling_level="sequence"), "loss_type 'cispo'.*ratio 'sequence' has no meaning"),
        (dict(delta=1.1, epsilon=0.2), "delta is 1.1; wanted >= 1 .* = 1.2"),
        (dict(rollout="vllm"), "rollout is 'vllm'; wanted 'athanor' or 'trl'"),
    ],
)
def test_what_is_not_supported_is_named(options, message, checkpoint, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(AthanorGRPOTrainer, checkpoint, tmp_path, **options)


def test_other_models_are_refused(checkpoint, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, eos_token_id=EOS, bos_token_id=EOS))
    with pytest.raises(UserError, match="model is GPT2LMHeadModel; wanted one of LlamaForCausalLM"):
        trainer(AthanorGRPOTrainer, checkpoint, tmp_path, model)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="shared_decoder: model.layers.0.mlp.extra and 0 other parameters are not as Qwen3ForCausalLM has them"):
        shared_decoder(model)


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_processes_have_the_gradients_and_metrics_of_trls(checkpoint, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, checkpoint, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert sorted(line for line in ran.stdout.splitlines() if line.startswith("rank")) == ["rank 0 of 2 is done", "rank 1 of 2 is done"]


def in_one_of_two_processes(checkpoint: str, tmp_path: str) -> None:
    """Each rank has half of the batch; DDP averages the gradients.  Then a whole step, after which the ranks must have the same weights."""
    for options in (dict(loss_type="dapo", epsilon_high=0.28), dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.03)):
        made = []
        for cls in (AthanorGRPOTrainer, GRPOTrainer):
            t = trainer(cls, checkpoint, tmp_path, per_device_train_batch_size=G, **options)
            rank, world = t.accelerator.process_index, t.accelerator.num_processes
            draw = torch.Generator().manual_seed(4)
            inputs = batch() | {"old_per_token_logps": -3 - torch.rand(2 * G, C, generator=draw)}
            half = {key: value if value.ndim == 0 else value[rank * G : (rank + 1) * G] for key, value in inputs.items()}
            wrapped = t.accelerator.prepare(t.model)  # a name, because DDP's hooks hold it weakly
            t._compute_loss(wrapped, half).backward()
            made.append((torch.cat([p.grad.flatten() for p in t.model.parameters()]), {key: x[-1] for key, x in t._metrics["train"].items()}))
        (gradient, metrics), (their_gradient, their_metrics) = made
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-5)
        assert gradient.abs().max() > 1e-3 and metrics == pytest.approx(their_metrics, abs=1e-5, nan_ok=True)
    ours = trainer(AthanorGRPOTrainer, checkpoint, tmp_path, per_device_train_batch_size=G, learning_rate=0.01, max_steps=1)
    ours.train()
    weights = torch.cat([p.detach().flatten() for p in ours.model.parameters()])
    assert torch.equal(*ours.accelerator.gather(weights[None]))
    first_tokens = ours.accelerator.gather(torch.tensor([ours._generate_single_turn([[3, 4]], None, {}, 1)[0][0][0] for _ in range(8)])[None])
    assert not torch.equal(*first_tokens)  # each rank has seeds of its own
    print(f"rank {rank} of {world} is done", flush=True)


if __name__ == "__main__":
    in_one_of_two_processes(*sys.argv[1:])
