"""The engine's own generator as a generative judge: the questions of rewards/verdicts.py, asked of a checkpoint, all of a step in one batch.

A reply depends on the run's seed and the prompt alone (at temperature 0 on the prompt).  What cannot be read as a verdict, and a prompt that does not
fit the judge's context, are error outcomes, counted as those of an endpoint are.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from athanor.config import SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.registry import near_misses
from athanor.rewards import Outcome, Reward
from athanor.rewards.verdicts import Comparison, Equivalence, Question
from athanor.samples import Problem, Request, Sample
from athanor.seeds import derive_seed
from athanor.tokenizer import Tokenizer
from athanor.weights import load_model

QUESTIONS = {"judge": Comparison, "judge_answer": Equivalence}
MAX_ROWS = 64  # replies that decode at once


class GeneratorJudge(Reward):
    """A question put to a model of our own."""

    runs_in = "batch"

    def __init__(self, question: Question, generator: Generator, tokenizer: Tokenizer, sampling: SamplingConfig, seed: int = 0):
        self.question, self.generator, self.tokenizer, self.sampling, self.seed = question, generator, tokenizer, sampling, seed
        self.__name__ = question.__name__

    def outcomes(self, samples: list[Sample], problems: list[Problem] | None = None) -> list[Outcome]:
        """Judge samples, in their order."""
        problems = [sample.problem for sample in samples] if problems is None else problems
        outcomes: list[Outcome | None] = []
        asked: list[tuple[int, list[Request]]] = []
        for i, (sample, problem) in enumerate(zip(samples, problems, strict=True)):
            try:
                outcomes.append(self.question.quick(sample, problem))
                if outcomes[i] is None:
                    asked.append((i, self._requests(self.question.prompts(sample, problem))))
            except ValueError as error:
                outcomes[i:] = [Outcome("error", message=str(error))]
        completions = self.generator.generate([request for _, requests in asked for request in requests], self.sampling) if asked else []
        replies = iter([self._text(completion) for (completion,) in completions])
        for i, requests in asked:
            try:
                outcomes[i] = Outcome("score", self.question.value([next(replies) for _ in requests]))
            except ValueError as error:
                outcomes[i] = Outcome("error", message=str(error))
        return outcomes

    def score(self, sample: Sample, problem: Problem) -> Outcome:
        return self.outcomes([sample], [problem])[0]

    def _requests(self, prompts: list[str]) -> list[Request]:
        requests, limit = [], self.generator.model.config.max_position_embeddings
        for round, prompt in enumerate(prompts):
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if self.tokenizer.chat_template else f"{prompt}\n"
            ids = np.array(self.tokenizer.encode_prompt(text), np.int64)
            if len(ids) + self.sampling.max_tokens > limit:
                raise ValueError(f"the judge's prompt has {len(ids)} tokens and its reply up to {self.sampling.max_tokens}, more than {limit}")
            requests.append(Request(ids, np.array([derive_seed(self.seed, "judge", round, prompt)], np.int64)))
        return requests

    def _text(self, completion) -> str:
        return self.tokenizer.decode([t for t in completion.token_ids.tolist() if t not in self.tokenizer.eos_ids])


def judge_settings(name: str, settings: dict) -> tuple[Question, SamplingConfig]:
    """Question and sampling of a judge's settings (max_tokens, temperature, and the question's own).  UserError for wrong ones."""
    if name not in QUESTIONS:
        raise UserError(f"reward {name!r} has no setting checkpoint; wanted one of {', '.join(QUESTIONS)}")
    drawn = {key: settings[key] for key in ("max_tokens", "temperature") if key in settings}
    own = {key: value for key, value in settings.items() if key not in drawn}
    known = [field.name for field in dataclasses.fields(QUESTIONS[name])]
    for key in own:
        if key not in known:
            raise UserError(f"reward {name!r}: unknown setting {key!r}: {near_misses(key, [*known, 'checkpoint', 'max_tokens', 'temperature'])}")
    try:
        return QUESTIONS[name](**own), SamplingConfig(**({"max_tokens": 1024, "temperature": 0.0} | drawn))
    except (ValidationError, TypeError) as error:
        raise UserError(f"reward {name!r}: {error}") from None


def load_judge(name: str, folder: Path, settings: dict, *, device: torch.device, dtype: torch.dtype, seed: int) -> GeneratorJudge:
    """The judge `name` (judge or judge_answer) whose words come from the checkpoint in `folder`."""
    question, sampling = judge_settings(name, settings)
    tokenizer = Tokenizer.from_folder(folder)
    model = load_model(folder, dtype=dtype, device=str(device)).requires_grad_(False)
    return GeneratorJudge(question, Generator(model, tokenizer.eos_ids, tokenizer=tokenizer, max_rows=MAX_ROWS), tokenizer, sampling, seed)
