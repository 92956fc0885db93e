"""Tasks -> groups of samples: which problems a step asks, and the completions that the current weights give."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from athanor import watchdog
from athanor.config import MixEntry, SamplingConfig, SpeculationConfig
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
    progress: Callable[[int, int], None] | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[list[Sample]]:
    """Draw `group_size` samples for this rank's share of `problems`; seeds follow (key, task, split, problem id, sample).

    on_sample: called with each sample as it finishes, while the others decode (a reward service's `submit`).
    """
    mine = ranks.share(problems)
    asked, first = together(generator, mine)
    own = range(first, first + len(mine))

    def arrived(i: int, sample: Sample) -> None:
        if on_sample and i in own:
            on_sample(sample)

    groups = dict(stream_groups(generator, tokenizer, asked, group_size, sampling, *key, progress=progress, on_sample=arrived))
    return [groups[i] for i in own]


def together(generator: Generator, mine: list) -> tuple[list, int]:
    """What a generator must be asked for this rank to get `mine`, and where that begins: where ranks have a part of the model each, what they all
    want."""
    return generator.peers.concatenate(mine) if generator.peers else (mine, 0)


def stream_groups(
    generator: Generator,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    group_size: int,
    sampling: SamplingConfig,
    *key: int | str,
    progress: Callable[[int, int], None] | None = None,
    on_sample: Callable[[int, Sample], None] | None = None,
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (index into `problems`, its samples) as groups are complete; `progress(done, total)` counts samples.  Seeds as in `sample_groups`.

    on_sample: called with (index into `problems`, sample).
    """
    problems = [as_asked(problem, tokenizer) for problem in problems]
    prompts = [np.array(tokenizer.encode_prompt(problem.prompt), np.int64) for problem in problems]
    requests = [Request(ids, sample_seeds(group_size, *key, p.task, p.split, p.id)) for ids, p in zip(prompts, problems, strict=True)]
    groups: list[list] = [[None] * group_size for _ in problems]
    missing, done = [group_size] * len(problems), 0
    with watchdog.phase("rollout") as alive, generator.stream(requests, sampling) as stream:
        for i, member, c in stream:
            alive()
            text = tokenizer.decode([t for t in c.token_ids.tolist() if t not in tokenizer.eos_ids])
            groups[i][member] = Sample(problems[i], text, c.token_ids, c.logps, c.finish, prompts[i], c.support, c.routes)
            if on_sample:
                on_sample(i, groups[i][member])
            missing[i] -= 1
            done += 1
            if progress:
                progress(done, len(problems) * group_size)
            if not missing[i]:
                yield i, groups[i]
                groups[i] = []


def as_asked(problem: Problem, tokenizer: Tokenizer) -> Problem:
    """The problem as the model sees it: the `messages` of a chat become the prompt, by the tokenizer's template."""
    messages = problem.metadata.get("messages")
    if not messages:
        return problem
    metadata = {name: value for name, value in problem.metadata.items() if name != "messages"}
    return dataclasses.replace(problem, prompt=tokenizer.apply_chat_template(messages), metadata=metadata)
