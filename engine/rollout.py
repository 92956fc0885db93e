"""Tasks -> groups of samples: which problems a step asks, and the completions that the current weights give."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from athanor.config import MixEntry, SamplingConfig, SpeculationConfig
from athanor.dispatch import Dispatch
from athanor.generator import Generator
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.samples import Problem, Request, Sample
from athanor.seeds import derive_seed, sample_seeds
from athanor.tokenizer import Tokenizer


class ProblemStream:
    """The training problems of one stage, `per_step` at a time, as a pure function of the step.

    Shares follow the weights of the entries that are active at that point of the stage (largest remainder, earlier entries first).  A finite task
    gives each of its problems once per epoch, in an order of its own per epoch; an unbounded one never repeats an index.
    """

    def __init__(self, tasks: dict, entries: Sequence[MixEntry], per_step: int, num_steps: int, *key: int | str, split: str = "train"):
        self.tasks, self.entries, self.per_step, self.num_steps, self.key, self.split = tasks, entries, per_step, num_steps, key, split
        self._positions = [[0] * len(entries)]  # problems that each entry gave before step i
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def draw(self, step: int) -> list[Problem]:
        """The `per_step` problems of 0-based `step`."""
        while len(self._positions) <= step + 1:
            quota = self._quota(len(self._positions) - 1)
            self._positions.append([p + q for p, q in zip(self._positions[-1], quota, strict=True)])
        before, after = self._positions[step], self._positions[step + 1]
        return [self._problem(entry, p) for entry, first, end in zip(self.entries, before, after, strict=True) for p in range(first, end)]

    def _quota(self, step: int) -> list[int]:
        weights = np.array([e.weight if step >= e.start * self.num_steps else 0.0 for e in self.entries])
        if not weights.any():
            raise ValueError(f"no task is active at step {step}, wanted an entry with start = 0")
        exact = self.per_step * weights / weights.sum()
        quota = np.floor(exact).astype(int)
        for i in np.argsort(-(exact - quota), kind="stable")[: self.per_step - quota.sum()]:
            quota[i] += 1
        return quota.tolist()

    def _problem(self, entry: MixEntry, position: int) -> Problem:
        task = self.tasks[entry.task]
        size = task.size(self.split)
        if size is None:
            # A stage's problems start at an offset of its own, so that two stages do not ask the same ones.
            return task.problem(self.split, derive_seed(*self.key, entry.task) % 2**31 * 2**20 + position)
        epoch, at = divmod(position, size)
        if (entry.task, epoch) not in self._orders:
            self._orders[entry.task, epoch] = np.random.default_rng(derive_seed(*self.key, entry.task, epoch)).permutation(size)
        return task.problem(self.split, int(self._orders[entry.task, epoch][at]))


def rollout_generator(
    model: Decoder, tokenizer: Tokenizer, max_rows: int, group_size: int, speculation: SpeculationConfig = SpeculationConfig(), **options
) -> Generator:
    """The generator of a stage: made once, so that its KV pool and captured graphs outlive a step.  options: more of `Generator`'s."""
    options |= {"tokenizer": tokenizer, "max_rows": max(max_rows, group_size), "speculation": speculation}
    return Generator(model, tokenizer.eos_ids, **options)


def sample_groups(
    generator: Generator,
    tokenizer: Tokenizer,
    problems: list[Problem],
    group_size: int,
    sampling: SamplingConfig,
    ranks: Ranks,
    *key: int | str,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[list[Sample]]:
    """Draw `group_size` samples for this rank's share of `problems`, on whatever rank; seeds follow (key, task, split, problem id, sample).

    on_sample: called with each sample of the share, while others decode (a reward service's `submit`), or at the end if another rank has finished it.
    """
    problems, dispatch = asked(generator, tokenizer, problems, group_size, sampling, ranks, *key)
    groups: dict[int, list] = {i: [None] * group_size for i in range(len(problems)) if dispatch.owns(i)}
    outgoing: list[list] = [[] for _ in range(ranks.world)]

    def arrived(i: int, member: int, sample: Sample) -> None:
        groups[i][member] = sample
        if on_sample:
            on_sample(sample)

    for i, member, sample in stream_samples(dispatch, problems, tokenizer):
        if dispatch.owns(i):
            arrived(i, member, sample)
        elif dispatch.brings(i):
            outgoing[dispatch.owner(i)].append((i, member, dataclasses.replace(sample, problem=None, prompt_ids=None)))
    if dispatch.moves:
        for i, member, sample in sum(ranks.exchange(outgoing), []):
            arrived(i, member, dataclasses.replace(sample, problem=problems[i], prompt_ids=dispatch.requests[i].prompt_ids))
        dispatch.clear()
    return list(groups.values())


def asked(
    generator: Generator, tokenizer: Tokenizer, problems: Sequence[Problem], group_size: int, sampling: SamplingConfig, ranks: Ranks, *key: int | str
) -> tuple[list[Problem], Dispatch]:
    """The problems as the model sees them, and who samples them.  Seeds as in `sample_groups`."""
    problems = [as_asked(problem, tokenizer) for problem in problems]
    prompts = [np.array(tokenizer.encode_prompt(problem.prompt), np.int64) for problem in problems]
    requests = [Request(ids, sample_seeds(group_size, *key, p.task, p.split, p.id)) for ids, p in zip(prompts, problems, strict=True)]
    return problems, Dispatch(generator, requests, sampling, ranks)


def stream_samples(dispatch: Dispatch, problems: Sequence[Problem], tokenizer: Tokenizer) -> Iterator[tuple[int, int, Sample]]:
    """Yield (index into `problems`, index in its group, sample) of what this rank finishes; close it to leave early."""
    for i, member, c in dispatch:
        text = tokenizer.decode([t for t in c.token_ids.tolist() if t not in tokenizer.eos_ids])
        yield i, member, Sample(problems[i], text, c.token_ids, c.logps, c.finish, dispatch.requests[i].prompt_ids, c.support, c.routes)


def as_asked(problem: Problem, tokenizer: Tokenizer) -> Problem:
    """The problem as the model sees it: the `messages` of a chat become the prompt, by the tokenizer's template."""
    messages = problem.metadata.get("messages")
    if not messages:
        return problem
    metadata = {name: value for name, value in problem.metadata.items() if name != "messages"}
    return dataclasses.replace(problem, prompt=tokenizer.apply_chat_template(messages), metadata=metadata)
