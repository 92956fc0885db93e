"""The engine's side of the rollout workloads, and their gate.

The gate: sampled log-probs equal the packed training forward's, greedy tokens equal those of the plain PyTorch loop, samples of a group that
shares its prompt equal those of one request per sample, and its gradient that of sequences by themselves; with drafts or without, samples are the
same.  It runs in fp32, where rounding in another order is about 1e-5 nats at most.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import torch
from gate import Verdict
from rollout_peers import eager_generate, figures
from torch import Tensor
from workloads import seconds_of

from athanor.advantages import advantages_of
from athanor.batch import pack
from athanor.config import GRPOConfig, MixEntry, ModelConfig, OptimizerConfig, RewardEntry, SamplingConfig, SpeculationConfig
from athanor.generate import Completion, Generator, Request
from athanor.losses import resolve_preset
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.samples import Problem, Sample
from athanor.stages.policy_update import ROUNDING_GAP, update_policy
from athanor.stages.training import completion_logprobs

MICRO_BATCH_TOKENS = 16384  # a step at once, as TRL takes it


def random_model(config: dict, device: str, dtype: torch.dtype) -> Decoder:
    """Random weights without zeros, biases and norms included, so that nothing which is forgotten goes unseen."""
    with torch.device("meta"):
        model = Decoder(ModelConfig(**config))
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
            if parameter.dim() < 2:
                parameter += 1.0
    return model.eval()


def random_prompts(model: Decoder, prompts: int, length: int) -> Tensor:
    """(prompts, length) int64 on the model's device."""
    drawn = np.random.default_rng(1).integers(0, model.config.vocab_size, (prompts, length))
    return torch.from_numpy(drawn).to(model.embed.weight.device)


def requests_of(prompts: Tensor, group_size: int, first_seed: int = 0) -> list[Request]:
    seeds = np.arange(first_seed, first_seed + len(prompts) * group_size).reshape(len(prompts), group_size)
    return [Request(ids, row) for ids, row in zip(prompts.cpu().numpy(), seeds, strict=True)]


def single_requests(requests: list[Request]) -> list[Request]:
    """One for each sample."""
    return [Request(r.prompt_ids, r.seeds[i : i + 1]) for r in requests for i in range(len(r.seeds))]


def generator_of(model: Decoder, num_rows: int) -> Generator:
    """With an end token outside of the vocabulary, so that no sample ends early."""
    return Generator(model, {model.config.vocab_size}, max_rows=num_rows)


def sampled(
    model: Decoder, requests: list[Request], new_tokens: int, temperature: float = 1.0, generator: Generator | None = None
) -> tuple[list[list[Completion]], dict[str, float]]:
    """Samples of exactly new_tokens each, by a generator that is kept (as the stages do) or a new one, and where their time went."""
    generator = generator or generator_of(model, sum(len(r.seeds) for r in requests))
    before = dict(generator.timings)
    groups = generator.generate(requests, SamplingConfig(temperature=temperature, max_tokens=new_tokens))
    return groups, {name: seconds - before[name] for name, seconds in generator.timings.items()}


@torch.no_grad()
def logp_gap(model: Decoder, prompts: Tensor, groups: list[list[Completion]]) -> float:
    """Largest difference in nats between the sampler's log-probs and the packed training forward's; NaN if any is."""
    flat = [(ids, c) for ids, group in zip(prompts.cpu().numpy(), groups, strict=True) for c in group]
    gaps = []
    for batch in pack([ids for ids, _ in flat], [c.token_ids for _, c in flat], MICRO_BATCH_TOKENS, prompts.device):
        trained = completion_logprobs(model, batch).logps.cpu().numpy()
        gaps.append(np.abs(trained - np.concatenate([flat[i][1].logps for i in batch.sequences])).max())
    return float(np.max(gaps))


def gate_sampling(model: Decoder, prompts: Tensor, group_size: int, new_tokens: int) -> Verdict:
    """All three; errors hold the gap to the training forward and the one between shared and single samples."""
    groups, _ = sampled(model, requests_of(prompts, group_size), new_tokens)
    gap = logp_gap(model, prompts, groups)
    greedy, _ = sampled(model, requests_of(prompts, 1), new_tokens, temperature=0.0)
    plain, _ = eager_generate(model, prompts, 1, new_tokens, 0.0)
    differ = int((np.stack([c.token_ids for (c,) in greedy]) != plain.cpu().numpy()).sum())
    verdict = gate_sharing(model, prompts, group_size, groups)
    verdict.errors.insert(0, [gap, ROUNDING_GAP])
    if not gap <= ROUNDING_GAP:
        verdict.wrong = f"sampled log-probs differ from the training forward's by {gap:.2e} nats, allowed {ROUNDING_GAP:g}"
    elif differ:
        verdict.wrong = f"greedy: {differ} of {plain.numel()} tokens differ from the eager loop's"
    return verdict


def gate_sharing(model: Decoder, prompts: Tensor, group_size: int, groups: list[list[Completion]]) -> Verdict:
    """groups: the samples of one request per prompt, held against those of one request per sample with the same seeds."""
    together = [c for group in groups for c in group]
    apart, _ = sampled(model, single_requests(requests_of(prompts, group_size)), len(together[0].token_ids))
    pairs = [(a, b) for a, (b,) in zip(together, apart, strict=True)]
    differ = sum(int((a.token_ids != b.token_ids).sum()) for a, b in pairs)
    gap = float(np.max([np.abs(a.logps - b.logps).max() for a, b in pairs]))
    wrong = f"{differ} tokens of samples that share a prompt differ from those of single requests" if differ else None
    if wrong is None and not gap <= ROUNDING_GAP:
        wrong = f"log-probs of samples that share a prompt differ from those of single requests by {gap:.2e} nats, allowed {ROUNDING_GAP:g}"
    return Verdict(wrong, [[gap, ROUNDING_GAP]])


class EngineGenerate:
    """Generator over all groups at once."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, gated: dict):
        """gated: what gate_sampling runs on."""
        self.model, self.prompts, self.group_size, self.new_tokens, self.device = model, prompts, group_size, new_tokens, device
        self.gated, self.gap, self.timings = gated, 0.0, {}
        self.generator = generator_of(model, len(prompts) * group_size)

    def generate(self, new_tokens: int) -> list[list[Completion]]:
        groups, self.timings = sampled(self.model, requests_of(self.prompts, self.group_size), new_tokens, generator=self.generator)
        return groups

    def check(self) -> Verdict:
        verdict = gate_sampling(**self.gated)
        self.gap, _ = verdict.errors[0]
        if self.gated["model"] is not self.model:
            self.gap = logp_gap(self.model, self.prompts, self.generate(self.new_tokens))
            if verdict.wrong is None and not np.isfinite(self.gap):
                verdict.wrong = "log-probs at full size are not finite"
        return verdict

    def run(self) -> dict[str, float]:
        # Full length last: its timings are the ones that stay.
        return figures(self.generate, len(self.prompts) * self.group_size, self.new_tokens, self.device) | {"logp_gap": self.gap} | self.timings


def applied(norm: float, loss: float, replay) -> bool:
    """A step that was skipped did not do the work that is timed."""
    if not math.isfinite(norm):
        raise ArithmeticError(f"the gradient norm is {norm}, the loss {loss}")
    return True


class EngineStep:
    """A GRPO step of the engine's pieces: Generator, a reward, group advantages, and `update_policy` with one optimizer step and no KL."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, reward, optimizer: OptimizerConfig):
        self.prompts, self.group_size, self.new_tokens, self.device, self.reward = prompts, group_size, new_tokens, device, reward
        self.config = GRPOConfig(
            kind="grpo", prompts=[MixEntry(task="bench")], rewards=[RewardEntry(reward="accuracy")], prompts_per_step=len(prompts),
            group_size=group_size, updates_per_rollout=1, optimizer=optimizer, micro_batch_tokens=MICRO_BATCH_TOKENS,
            sampling=SamplingConfig(max_tokens=new_tokens),
        )  # fmt: skip
        self.preset = resolve_preset("grpo", kl="none")
        ranks = Ranks(device, threads=torch.get_num_threads())
        self.context = SimpleNamespace(name="bench", ranks=ranks, console=SimpleNamespace(warn=lambda text: None))  # the row says the gap
        model = copy.deepcopy(model)
        self.loop = SimpleNamespace(model=model, optimizer=Optimizer(model, optimizer, ranks), applied=applied)
        self.generator, self.steps = generator_of(model, len(prompts) * group_size), 0

    def rollout(self) -> tuple[list[list[Sample]], Tensor]:
        """Groups of samples with new seeds, and their advantages (S,)."""
        requests = requests_of(self.prompts, self.group_size, first_seed=self.steps * len(self.prompts) * self.group_size)
        completions, _ = sampled(self.loop.model, requests, self.new_tokens, generator=self.generator)
        groups = [
            [Sample(Problem("", None, i, "bench"), "", c.token_ids, c.logps, c.finish, request.prompt_ids) for c in group]
            for i, (request, group) in enumerate(zip(requests, completions, strict=True))
        ]
        rewards = torch.tensor([self.reward(s.token_ids) for group in groups for s in group])
        return groups, advantages_of(rewards, torch.arange(len(rewards)) // self.group_size, self.preset)

    def step(self) -> dict[str, float]:
        (groups, advantages), rollout_s = seconds_of(self.rollout, self.device)
        metrics = update_policy(self.context, self.config, self.preset.variant, self.loop, None, groups, list(range(len(groups))), advantages, 0)
        self.steps += 1
        tokens = sum(s.num_tokens for group in groups for s in group)
        return {"rollout_s": rollout_s, "logp_gap": metrics["logp_gap_max"], "live": int((advantages != 0).sum()), "tokens": tokens}

    def check(self) -> Verdict:
        before = self.loop.model.embed.weight.detach().clone()
        seen, rows = self.step(), len(self.prompts) * self.group_size
        verdict = Verdict(errors=[[seen["logp_gap"], ROUNDING_GAP]])
        if not seen["logp_gap"] <= ROUNDING_GAP:
            verdict.wrong = f"sampled log-probs differ from the training forward's by {seen['logp_gap']:.2e} nats, allowed {ROUNDING_GAP:g}"
        elif (seen["live"], seen["tokens"]) != (rows, rows * self.new_tokens):
            verdict.wrong = f"{seen['live']} samples with an advantage, {seen['tokens']} tokens; wanted {rows}, {rows * self.new_tokens}"
        elif torch.equal(before, self.loop.model.embed.weight):
            verdict.wrong = "a step left the weights as they were"
        return verdict

    def run(self) -> dict[str, float]:
        seen, total_s = seconds_of(self.step, self.device)
        return {"seconds": total_s, "rollout_s": seen["rollout_s"], "update_s": total_s - seen["rollout_s"], "logp_gap": seen["logp_gap"]}


class EngineStragglers:
    """Greedy samples, with n-gram drafts or (drafts=0) without."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, drafts: int):
        self.requests, self.sampling, self.device = requests_of(prompts, group_size), SamplingConfig(temperature=0, max_tokens=new_tokens), device
        rows, eos = len(prompts) * group_size, {model.config.vocab_size}
        self.generator = Generator(model, eos, max_rows=rows, speculation=SpeculationConfig(tokens=drafts, max_rows=rows))
        self.plain = Generator(model, eos, max_rows=rows)

    def sample(self, generator: Generator) -> list[Completion]:
        return sum(generator.generate(self.requests, self.sampling, full_logps=True), [])

    def check(self) -> Verdict:
        pairs = zip(self.sample(self.generator), self.sample(self.plain), strict=True)
        equal = all(np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.full_logps, b.full_logps) for a, b in pairs)
        return Verdict(None if equal else "samples with drafts differ from those without")

    def run(self) -> dict[str, float]:
        before = dict(self.generator.drafting)
        _, seconds = seconds_of(lambda: self.sample(self.generator), self.device)
        forwards, tokens = (count - before[name] for name, count in self.generator.drafting.items())
        return {"seconds": seconds, "tokens_per_forward": tokens / forwards if forwards else 1.0}


class EnginePrefill:
    """The first token of every sample of one prompt: a group, or (shared=False) a request per sample."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, gated: dict, shared: bool):
        self.model, self.new_tokens, self.device, self.gated = model, new_tokens, device, gated
        requests = requests_of(prompts, group_size)
        self.requests = requests if shared else single_requests(requests)

    def sample(self) -> tuple[list[list[Completion]], dict[str, float]]:
        return sampled(self.model, self.requests, self.new_tokens)

    def check(self) -> Verdict:
        g = SimpleNamespace(**self.gated)
        groups, _ = sampled(g.model, requests_of(g.prompts, g.group_size), g.new_tokens)
        verdict = gate_sharing(g.model, g.prompts, g.group_size, groups)
        groups, _ = self.sample()
        if verdict.wrong is None and not all(np.isfinite(c.logps).all() for group in groups for c in group):
            verdict.wrong = "log-probs at full size are not finite"
        return verdict

    def run(self) -> dict[str, float]:
        (_, timings), seconds = seconds_of(self.sample, self.device)
        return {"seconds": seconds} | timings


class EngineUpdate:
    """Forward and backward of the log-probs of a group's completions (random tokens), one micro-batch: its prompt once, or (shared=False) each."""

    def __init__(self, model: Decoder, prompts: Tensor, group_size: int, new_tokens: int, device: str, *, gated: dict, shared: bool):
        self.model, self.device, self.gated, self.shared = copy.deepcopy(model), device, gated, shared
        self.batches = group_batches(prompts, group_size, new_tokens, shared)

    def gradient(self, model: Decoder, batches: list) -> Tensor:
        model.zero_grad()
        for batch in batches:
            completion_logprobs(model, batch).logps.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def check(self) -> Verdict:
        g = SimpleNamespace(**self.gated)
        model = copy.deepcopy(g.model)
        alone, shared = (self.gradient(model, group_batches(g.prompts, g.group_size, g.new_tokens, share)) for share in (False, True))
        error = float((shared - alone).norm() / alone.norm())
        verdict = Verdict(errors=[[error, ROUNDING_GAP]])
        if not error <= ROUNDING_GAP:
            verdict.wrong = f"gradients with and without a shared prompt differ by {error:.2e} of their norm, allowed {ROUNDING_GAP:g}"
        elif not self.gradient(self.model, self.batches).isfinite().all():
            verdict.wrong = "the gradient at full size is not finite"
        return verdict

    def run(self) -> dict[str, float]:
        _, seconds = seconds_of(lambda: self.gradient(self.model, self.batches), self.device)
        return {"seconds": seconds, "packed_tokens": sum(len(batch.input_ids) for batch in self.batches)}


def group_batches(prompts: Tensor, group_size: int, new_tokens: int, shared: bool) -> list:
    rows = prompts.cpu().numpy().repeat(group_size, 0)
    completions = np.random.default_rng(2).integers(0, prompts.max().item() + 1, (len(rows), new_tokens))
    return pack(list(rows), list(completions), rows.size + completions.size, prompts.device, share_prompts=shared)
