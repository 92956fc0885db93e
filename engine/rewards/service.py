"""Score a reward table while generation goes on, and say who waited for whom.

    service = RewardService(table)
    service.submit(sample, step)              # as each sample finishes; returns at once
    scores = service.score(samples, step)     # waits for what is still missing; the order of `samples`, not that of completion
    figures, first_failure = service.measure()

Rewards that run in the caller are computed by `score`: they cost microseconds.  Those that run in batches (a model's) are too, each sample once.
Without any other kind nothing is started.
"""

import time
from concurrent.futures import Future

from athanor.rewards.base import Outcome
from athanor.rewards.pool import RewardPool
from athanor.rewards.table import Entry, RewardScores, RewardTable, gives_outcomes, runs_away
from athanor.samples import Sample


class RewardService:
    """A table whose worker rewards start as samples arrive.  num_workers: 0 = half of this rank's cores.  `close()` ends the workers."""

    def __init__(self, table: RewardTable, *, num_workers: int = 0):
        self.table = table
        self._away = [entry for entry in table.entries if runs_away(entry.reward)]
        self._known = [entry for entry in table.entries if gives_outcomes(entry.reward)]
        self._pool = RewardPool(num_workers or None) if self._away else None
        self._futures: dict[tuple[int, int], tuple[Sample, Future]] = {}  # (entry, sample) by identity; the sample is kept so that its id stays taken
        self._wait_s, self._busy_s, self._num_judged, self._num_batched, self._since = 0.0, 0.0, 0, 0, time.perf_counter()

    @property
    def measures(self) -> bool:
        """Does any reward of the table tell scores from failures, so that `measure` has figures?"""
        return bool(self._known)

    def submit(self, sample: Sample, step: int = 0) -> None:
        """Start what workers judge about a sample."""
        for entry in self._away:
            if self.table.rows(entry, [sample], step):
                self._future(entry, sample)

    def score(self, samples: list[Sample], step: int = 0) -> RewardScores:
        """Score samples at a training step, submitted before or not; the same samples may be asked for again until `measure`."""
        return self.table.score(samples, step, judge=self._outcomes)

    def _future(self, entry: Entry, sample: Sample) -> Future:
        key = id(entry), id(sample)
        if key not in self._futures:
            self._futures[key] = sample, self._pool.submit(entry.reward, sample, sample.problem)
        return self._futures[key][1]

    def _outcomes(self, entry: Entry, samples: list[Sample]) -> list[Outcome]:
        start = time.perf_counter()
        if not runs_away(entry.reward):
            self._judge_batch(entry, [sample for sample in samples if (id(entry), id(sample)) not in self._futures])
        futures = [self._future(entry, sample) for sample in samples]
        outcomes = [future.result() for future in futures]
        self._wait_s += time.perf_counter() - start
        return outcomes

    def _judge_batch(self, entry: Entry, samples: list[Sample]) -> None:
        """Judge samples here; what came of it stays like a worker's."""
        for sample, outcome in zip(samples, entry.reward.outcomes(samples) if samples else [], strict=True):
            future: Future = Future()
            future.set_result(outcome)
            self._futures[id(entry), id(sample)] = sample, future
        self._num_batched += len(samples)

    def measure(self) -> tuple[dict[str, float], str]:
        """Figures since the last call ({} without rewards that tell failures) and what the first failure was ("" without one); forget the samples.

        reward_wait_s: seconds that `score` waited.  reward_busy_share: worker seconds used of those there were.  reward_judged: samples that went to
        workers or in batches (the others were decided at once).  reward_errors, reward_timeouts: samples, also those that no later `score` asked for.
        """
        outcomes = [(entry, future.result()) for (entry, _), (_, future) in self._futures.items()]
        self._futures.clear()
        if not self._known:
            return {}, ""
        names = {id(entry): entry.reward.__name__ for entry in self._known}
        failed = [f"{names[entry]}: {outcome.message}" for entry, outcome in outcomes if outcome.status != "score"]
        now, busy_s, num_judged = time.perf_counter(), 0.0, self._num_batched
        figures = {"reward_wait_s": self._wait_s}
        if self._pool is not None:
            busy_s, num_judged = self._pool.busy_s, num_judged + self._pool.num_judged
            figures["reward_busy_share"] = (busy_s - self._busy_s) / (self._pool.num_workers * max(now - self._since, 1e-9))
        figures["reward_judged"] = num_judged - self._num_judged
        figures |= {f"reward_{kind}s": sum(outcome.status == kind for _, outcome in outcomes) for kind in ("error", "timeout")}
        self._wait_s, self._busy_s, self._num_judged, self._since = 0.0, busy_s, num_judged, now
        return figures, next(iter(failed), "")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "RewardService":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
