"""Reward models: a decoder with a scalar head r, trained with the engine's own trainer (stages/reward_model.py).

    preference  pairwise     loss = -log sigmoid(r(chosen) - r(rejected))                    Bradley-Terry; arXiv 2203.02155, eq. 1
    safety      pointwise    loss = -y log sigmoid(r) - (1 - y) log sigmoid(-r), y = 1 safe  logistic

What they read (R1, arXiv 2501.12948 v2, section 3): helpfulness is judged on the final reply alone, so that the judge does not interfere with the
reasoning; safety on the whole response, chain of thought included.  Their rewards: r, standardised over the training replies, and
sigmoid(r) = P(safe).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from athanor.context_parallel import part_of
from athanor.errors import UserError
from athanor.model.layers import Linear
from athanor.model.moe import Routes
from athanor.model.transformer import Decoder, PackedAttention, fill_tokens
from athanor.rewards import Reward
from athanor.rewards.verdicts import final_reply
from athanor.samples import Problem, Sample
from athanor.tokenizer import Tokenizer
from athanor.weights import load_model

HEAD_FILE = "value_head.safetensors"
SCALE_FILE = "reward_scale.json"
SCORED_TOKENS = 32768  # in one forward, where a sequence is not longer


class RewardModel(nn.Module):
    """Decoder plus scalar head.  mean, std: of r over the training replies (pairwise), else 0 and 1."""

    def __init__(self, decoder: Decoder, objective: str = "pairwise"):
        super().__init__()
        self.decoder, self.objective = decoder, objective
        self.value_head = Linear(decoder.config.hidden_size, 1, bias=False).to(decoder.embed.weight)
        nn.init.zeros_(self.value_head.weight)
        self.mean, self.std = 0.0, 1.0

    def forward(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor, routes: Routes | None = None) -> Tensor:
        """r (S,) fp32 of packed sequences, read at each one's last token.  routes: for the routers of a mixture of experts."""
        part, last = part_of(self.decoder, len(input_ids)), cu_seqlens[1:].long() - 1
        own, rows = part.own(last)
        input_ids, positions, cu_seqlens = fill_tokens(input_ids, positions, cu_seqlens, part.step)
        hidden = self.decoder(part.rows(input_ids), part.rows(positions), part.attend(PackedAttention(cu_seqlens)), routes)
        return part.joined(self.value_head(hidden[rows])[:, 0].float(), own, len(last))

    @torch.no_grad()
    def score(self, sequences: list[np.ndarray], batch_size: int = 256) -> np.ndarray:
        """Standardised r (S,) float64 of token sequences, in batches of at most `batch_size` and about SCORED_TOKENS tokens."""
        device, scores = self.value_head.weight.device, []
        for first, end in batches([len(ids) for ids in sequences], SCORED_TOKENS, batch_size):
            scores.append(self(*packed(sequences[first:end], device)).double().cpu().numpy())
        return (np.concatenate(scores) - self.mean) / self.std if scores else np.zeros(0)


def batches(lengths: Sequence[int], max_tokens: int, max_items: int | None = None) -> list[tuple[int, int]]:
    """Consecutive ranges [first, end) of at most `max_tokens` tokens and `max_items` items; one that is longer stands alone."""
    ranges, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and (tokens + length > max_tokens or i - first == max_items):
            ranges.append((first, i))
            first, tokens = i, 0
        tokens += length
    return [*ranges, (first, len(lengths))] if len(lengths) else []


def packed(sequences: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids (T,), positions (T,), cu_seqlens (S+1,)) of whole sequences."""
    lengths = [len(s) for s in sequences]
    ids = torch.from_numpy(np.concatenate(sequences)).to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
    return ids, positions, torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)


def judged_tokens(tokenizer: Tokenizer, problem: Problem, text: str, objective: str = "pairwise") -> np.ndarray:
    """What a reward model reads: the prompt, then the final reply (pairwise) or the whole response (pointwise), the end token."""
    read = final_reply(text, problem) if objective == "pairwise" else text
    ids = tokenizer.encode(f"{problem.prompt} {read}".strip())
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.array([*start, *ids, tokenizer.eos_id], np.int64)


class Preference(Reward):
    """The preference model's standardised score; None for problems that have a gold answer (R1 uses no neural reward on reasoning)."""

    __name__, objective = "preference", "pairwise"

    def __init__(self, model: RewardModel, tokenizer: Tokenizer):
        if model.objective != self.objective:
            raise UserError(f"reward {self.__name__}: its model was trained {model.objective}, wanted {self.objective}")
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, samples=None, problems=None, **columns) -> list[float | None]:
        if samples is None:
            return super().__call__(samples, problems, **columns)
        problems = problems if problems is not None else [s.problem for s in samples]
        judged = [i for i, p in enumerate(problems) if p.answer is None]
        scores = self.model.score([judged_tokens(self.tokenizer, problems[i], samples[i].text, self.objective) for i in judged])
        result: list[float | None] = [None] * len(samples)
        for i, score in zip(judged, self.reward(scores).tolist(), strict=True):
            result[i] = score
        return result

    def reward(self, scores: np.ndarray) -> np.ndarray:
        """From the model's scores (S,) to rewards (S,)."""
        return scores

    def score(self, sample: Sample, problem: Problem) -> float | None:
        return self([sample], [problem])[0]


class Safety(Preference):
    """The safety model's probability, 0 to 1, that the whole response is safe; None for problems that have a gold answer."""

    __name__, objective = "safety", "pointwise"

    def reward(self, scores: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(scores / 2))  # sigmoid without overflow


MODEL_REWARDS = {"preference": Preference, "safety": Safety}
MODEL_FIELDS = {"preference": "reward_model", "safety": "safety_model"}  # reward -> field of a stage or evaluation that names its model's stage


def save_reward_head(model: RewardModel, weight: Tensor, folder: Path) -> None:
    """Write the head's whole weight and the scale beside an exported decoder."""
    save_file({"weight": weight.cpu().contiguous()}, folder / HEAD_FILE)
    (folder / SCALE_FILE).write_text(json.dumps({"mean": model.mean, "std": model.std, "objective": model.objective}))


def load_reward(name: str, folder: Path, tokenizer: Tokenizer, device: torch.device) -> Preference:
    """The reward `name` (preference or safety) from a folder that a reward_model stage wrote.  UserError for another folder or objective."""
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder} has no {HEAD_FILE}, wanted the checkpoint of a reward_model stage")
    scale = json.loads((folder / SCALE_FILE).read_text())
    model = RewardModel(load_model(folder, device=str(device)), scale["objective"])
    with safe_open(folder / HEAD_FILE, framework="pt") as file:
        model.value_head.weight.data.copy_(file.get_tensor("weight"))
    model.mean, model.std = float(scale["mean"]), float(scale["std"])
    return MODEL_REWARDS[name](model.eval().requires_grad_(False), tokenizer)
