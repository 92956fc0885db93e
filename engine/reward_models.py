"""A preference reward model: a decoder with a scalar head that reads the prompt and the final summary, never the chain of thought.

R1 (arXiv 2501.12948 v2, section 3): helpfulness is judged on the summary only, so that the judge does not interfere with the reasoning.
Trained pairwise:  loss = -log sigmoid(r(chosen) - r(rejected))  (Bradley-Terry; arXiv 2203.02155, eq. 1).
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from athanor.errors import UserError
from athanor.model.transformer import Decoder, PackedAttention
from athanor.rewards import Reward, parse_response
from athanor.samples import Problem, Sample
from athanor.tokenizer import Tokenizer
from athanor.weights import load_model

HEAD_FILE = "value_head.safetensors"
SCALE_FILE = "reward_scale.json"


class RewardModel(nn.Module):
    """Decoder plus scalar head; rewards are standardised with the mean and deviation seen on the training replies."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.value_head = nn.Linear(decoder.config.hidden_size, 1, bias=False).to(decoder.embed.weight)
        nn.init.zeros_(self.value_head.weight)
        self.mean, self.std = 0.0, 1.0

    def forward(self, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Scores (S,) fp32 of packed sequences, read at each one's last token."""
        hidden = self.decoder(input_ids, positions, PackedAttention(cu_seqlens))
        return self.value_head(hidden[cu_seqlens[1:].long() - 1])[:, 0].float()

    @torch.no_grad()
    def score(self, sequences: list[np.ndarray], batch_size: int = 256) -> np.ndarray:
        """Standardised scores (S,) float64 of token sequences."""
        device, scores = self.value_head.weight.device, []
        for i in range(0, len(sequences), batch_size):
            scores.append(self(*packed(sequences[i : i + batch_size], device)).double().cpu().numpy())
        return (np.concatenate(scores) - self.mean) / self.std if scores else np.zeros(0)


def packed(sequences: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids (T,), positions (T,), cu_seqlens (S+1,)) of whole sequences."""
    lengths = [len(s) for s in sequences]
    ids = torch.from_numpy(np.concatenate(sequences)).to(device)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
    return ids, positions, torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)


def judged_tokens(tokenizer: Tokenizer, problem: Problem, text: str) -> np.ndarray:
    """What the reward model reads: the prompt, the final answer, the end token.  The chain of thought is left out."""
    summary = parse_response(text, prompt=problem.prompt).answer or ""
    ids = tokenizer.encode(f"{problem.prompt} {summary}".strip())
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.array([*start, *ids, tokenizer.eos_id], np.int64)


class Preference(Reward):
    """The reward model's standardised score; None for problems that have a gold answer (R1 uses no neural reward on reasoning)."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.__name__ = model, tokenizer, "preference"

    def __call__(self, samples=None, problems=None, **columns) -> list[float | None]:
        if samples is None:
            return super().__call__(samples, problems, **columns)
        problems = problems if problems is not None else [s.problem for s in samples]
        judged = [i for i, p in enumerate(problems) if p.answer is None]
        scores = self.model.score([judged_tokens(self.tokenizer, problems[i], samples[i].text) for i in judged])
        result: list[float | None] = [None] * len(samples)
        for i, score in zip(judged, scores.tolist(), strict=True):
            result[i] = score
        return result

    def score(self, sample: Sample, problem: Problem) -> float | None:
        return self([sample], [problem])[0]


def save_reward_head(model: RewardModel, folder: Path) -> None:
    """Write head and scale beside an exported decoder."""
    save_file({"weight": model.value_head.weight.detach().contiguous()}, folder / HEAD_FILE)
    (folder / SCALE_FILE).write_text(json.dumps({"mean": model.mean, "std": model.std}))


def load_preference_reward(folder: Path, tokenizer: Tokenizer, device: torch.device) -> Preference:
    """Load a folder that a reward_model stage wrote."""
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder} has no {HEAD_FILE}, wanted the checkpoint of a reward_model stage")
    model = RewardModel(load_model(folder, device=str(device)))
    with safe_open(folder / HEAD_FILE, framework="pt") as file:
        model.value_head.weight.data.copy_(file.get_tensor("weight"))
    scale = json.loads((folder / SCALE_FILE).read_text())
    model.mean, model.std = float(scale["mean"]), float(scale["std"])
    return Preference(model.eval().requires_grad_(False), tokenizer)
