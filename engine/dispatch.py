"""Which rank samples what: every rank takes more from shared queues while it has rows free, and what runs long is handed over to ranks that have
nothing left.  A sample is a function of its seed, its prompt and the weights, so none of this changes a token.

Each rank has a queue, its share of the requests (every world-th), the longest expected first, as the scheduler has them.  It takes from its own,
then from the one with most left, half of that at most (guided self-scheduling, Polychronopoulos and Kuck, 1987).  It holds no more than `max_rows`
and an even part of all samples, so that whoever starts first does not take what others are about to begin.  `parallel.dispatch` is about portions:

    group    whole groups, which share their prompt's keys and values (but for samples that are handed over)
    sample   as many samples as there are rows free, so that a group may be split over ranks, each of which computes its prompt
    static   a rank samples its share and nothing else

When the queues are empty and a rank has few samples left, it takes a ticket, and when it has none, it waits.  A rank that has more than its fair
part of all unfinished samples ends some of its own (`abort`) and sends tokens, log-probs, supports and routes to who holds a ticket, where they go on
behind a prefill with the same bits.  Those with the fewest tokens go first, until either has the fair part, if it pays (`pays`).

What is taken, finished and waited for are counters in the store of the process group: an atomic addition each, no rank waits for another between
steps.  The samples travel from rank to rank over gloo.  Whoever finishes the last sample ends those who wait; a rank that waits is in the
watchdog's phase `collective` meanwhile, and gives up after the process group's timeout.

Ranks that have a part of the model each (`Generator.peers`) are one consumer with one queue: the first talks to the store and tells the others.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from athanor import watchdog
from athanor.config import SamplingConfig
from athanor.generator import Generator
from athanor.parallel import Ranks
from athanor.samples import Completion, Finished, Request
from athanor.stream import Stream

FEW_ROWS = 16  # a step costs the same for fewer: whole row steps on a CPU; on a GPU weights are what is read
PREFILL_COST = 0.25  # of a token that is prefilled, in tokens that are decoded among many rows
LOOK_STEPS = 8  # between two looks for ranks that wait
HANDOVER_STEPS = 8  # in which a sample that travels does not grow
POLL_S = (0.001, 0.05)  # between two looks of a rank that waits, first and longest
MOST_ASKED = 8  # who want more that a look considers
NOTHING, END = b"nothing", b"end"


class Dispatch:
    """One call's samples, of which every rank gets some: iterate over those of this rank; then, when all ranks have met, `clear`.

    requests: the same on all ranks, with as many samples each.  Leaving the iteration early is fine: the other ranks end without what is left.
    Adds to generator.dispatched: busy_s, wall_s (busy and waiting), handed_over (samples that went on elsewhere).
    """

    def __init__(self, generator: Generator, requests: Sequence[Request], sampling: SamplingConfig, ranks: Ranks):
        self.generator, self.requests, self.sampling, self.ranks, self.peers = generator, requests, sampling, ranks, generator.peers
        size = self.peers.world if self.peers else 1
        self.leads = self.peers is None or self.peers.rank == 0
        self.consumer, self.num_consumers = ranks.rank // size, ranks.world // size
        self.group_size = max((len(request.seeds) for request in requests), default=0)
        assert all(len(request.seeds) == self.group_size for request in requests)
        order = sorted(range(len(requests)), key=lambda i: -((requests[i].expected_tokens or self._limit(i)) + requests[i].priority))
        self.queues = [[i for i in order if i % ranks.world // size == consumer] for consumer in range(self.num_consumers)]
        self.lengths = [len(queue) * self.group_size for queue in self.queues]  # in samples
        self.total = sum(self.lengths)
        self.portion = 1 if ranks.dispatch == "sample" else self.group_size
        self.open = {consumer for consumer, length in enumerate(self.lengths) if length}  # where there may be something left
        self.held: set[tuple[int, int]] = set()  # (request, member) that this consumer has to finish
        self.finished: list[int] = []  # tokens of those that it has
        self.unreported = 0  # of these, not in the store yet
        self.asked, self.gone = 0, set()  # this consumer's own ticket; those that are known to be answered
        self.waited_s = 0.0
        self.store = ranks.board() if self.moves and self.total else None

    @property
    def moves(self) -> bool:
        """May a sample be drawn elsewhere than static dispatch would have it?"""
        return self.num_consumers > 1 and self.ranks.dispatch != "static"

    def owner(self, i: int) -> int:
        """The rank whose share request i is in."""
        return i % self.ranks.world

    def owns(self, i: int) -> bool:
        return self.owner(i) == self.ranks.rank

    def brings(self, i: int) -> bool:
        """Is it for this rank to bring samples of request i, which it has finished, to their owner?"""
        return self.leads and i not in self.queues[self.consumer]

    def __iter__(self) -> Iterator[Finished]:
        start, figures = time.perf_counter(), self.generator.dispatched
        try:
            if self.store is not None:
                yield from self._shared()
            elif self.queues[self.consumer]:
                yield from self._own()
        finally:
            figures["wall_s"] += time.perf_counter() - start
            figures["busy_s"] += time.perf_counter() - start - self.waited_s

    def clear(self) -> None:
        """Empty the store; called when all ranks have ended their iteration."""
        if self.store is None or self.ranks.rank:
            return
        tickets = range(1, self.store.add("tickets", 0) + self.num_consumers + 1)
        names = [f"{kind}/{ticket}" for ticket in tickets for kind in ("taken", "rank", "gift")]
        for name in ["tickets", "finished", *(f"next/{consumer}" for consumer in range(self.num_consumers)), *names]:
            self.store.delete_key(name)

    def _own(self) -> Iterator[Finished]:
        own = self.queues[self.consumer]
        with watchdog.phase("rollout") as alive, self.generator.stream([self.requests[i] for i in own], self.sampling) as stream:
            for i, member, completion in stream:
                alive()
                yield Finished(own[i], member, completion)

    def _shared(self) -> Iterator[Finished]:
        fair = -(-self.total // self.num_consumers)
        self.rows = min(self.generator.max_rows, -(-fair // self.portion) * self.portion)
        self.every = max(1, LOOK_STEPS // self.generator.window)
        try:
            with self.generator.stream(self.requests, self.sampling, on_demand=True, max_rows=self.rows) as stream:
                while True:
                    with watchdog.phase("rollout") as alive:
                        for done in self._work(stream):
                            alive()
                            yield done
                    with watchdog.phase("collective", "rollout of the other ranks"):
                        start = time.perf_counter()
                        gift = self._agreed(self._wait)
                        self.waited_s += time.perf_counter() - start
                    if gift is None:
                        return
                    self._receive(stream, gift)
        except GeneratorExit:
            if self.leads:
                self._leave()
            raise

    def _work(self, stream: Stream) -> Iterator[Finished]:
        """Finish what this consumer holds and what it can take."""
        windows, look = 0, self.every
        while True:
            self._take(stream)
            if not self.held:
                return
            windows, given = windows + 1, None
            if windows >= look:
                gift, waiting, finished = self._agreed(self._look)
                self._receive(stream, gift)
                given = self._give(stream, waiting, finished)
                look = windows + (self.every if given is None else 1)  # there may be more who wait
            found = stream.step()
            if given is not None:  # first of all: who leaves at a `yield` owes it to nobody
                gift = [tuple(done) for done in found if done.completion.finish == "abort"]
                self.held -= {(i, member) for i, member, _ in gift}
                if self.leads:
                    self._send(gift, *given)
            for done in found:
                if done.completion.finish != "abort":
                    self.held.remove((done.request, done.member))
                    self.unreported += 1
                    self.finished.append(len(done.completion.token_ids))
                    yield done

    def _take(self, stream: Stream) -> None:
        """Fill free rows from the queues, when the scheduler would: not for a few of many."""
        free = self.rows - len(self.held)
        if self.held and free < self.rows // 4:
            return
        while self.open and free >= self.portion:
            taken, self.open = self._agreed(lambda free=free: self._claim(free))
            if not taken:
                return
            self._submit(stream, taken, {})
            free -= len(taken)

    def _submit(self, stream: Stream, samples: list[tuple[int, int]], partial: dict[tuple[int, int], Completion]) -> None:
        for i in dict.fromkeys(i for i, _ in samples):
            members = sorted(m for j, m in samples if j == i)
            stream.submit(i, members, {m: partial[i, m] for m in members if (i, m) in partial})
        self.held.update(samples)

    def _claim(self, free: int) -> tuple[list[tuple[int, int]], set[int]]:
        """Up to `free` samples of a queue, and the queues that may have more."""
        still = set(self.open)
        while still:
            if self.consumer in still:
                source, wanted = self.consumer, free
            else:
                left = {consumer: self.lengths[consumer] - self.store.add(f"next/{consumer}", 0) for consumer in sorted(still)}
                still = {consumer for consumer in still if left[consumer] > 0}
                if not still:
                    break
                source = max(sorted(still), key=left.__getitem__)
                wanted = min(free, -(-left[source] // 2))
            wanted = max(1, wanted // self.portion) * self.portion
            first = self.store.add(f"next/{source}", wanted) - wanted
            end = min(first + wanted, self.lengths[source])
            if first < end:
                G, queue = self.group_size, self.queues[source]
                return [(queue[k // G], k % G) for k in range(first, end)], still
            still.discard(source)
        return [], still

    def _look(self) -> tuple[list, list[tuple[int, int, int]], int]:
        """What somebody has given; (ticket, rank, samples that it has) of some who want more; if there are any, how many samples are finished."""
        gift = []
        if self.asked:
            if self.store.check([f"gift/{self.asked}"]):
                gift = self._opened()
            else:
                self.store.set(f"rank/{self.asked}", f"{self.ranks.rank} {len(self.held)}")
        elif not self.open and len(self.held) < max(FEW_ROWS, self.rows // 4):
            self._ask()
        tickets = range(1, self.store.add("tickets", 0) + 1)
        waiting = [ticket for ticket in tickets if ticket not in self.gone and ticket != self.asked][:MOST_ASKED]
        return gift, [(ticket, *map(int, self.store.get(f"rank/{ticket}").split())) for ticket in waiting], self._report(0) if waiting else 0

    def _ask(self) -> None:
        self.asked = self.store.add("tickets", 1)
        self.store.set(f"rank/{self.asked}", f"{self.ranks.rank} {len(self.held)}")

    def _give(self, stream: Stream, waiting: list[tuple[int, int, int]], finished: int) -> tuple[int, int] | None:
        """End what somebody else should go on with; (ticket, rank) of who that is, or None."""
        if not waiting:
            return None
        fair = -(-(self.total - finished) // self.num_consumers)
        samples = {sample: len(stream.tokens_of(*sample)) for sample in sorted(self.held)}
        for ticket, rank, has in waiting:
            chosen = sorted(samples, key=samples.get)[: max(0, min(fair - has, len(samples) - fair))]
            if chosen and self._pays(samples, chosen, has) and self._agreed(lambda ticket=ticket: self._claims(ticket)):
                for i in dict.fromkeys(i for i, _ in chosen):
                    stream.abort(i, [m for j, m in chosen if j == i])
                return ticket, rank
        return None

    def _pays(self, samples: dict[tuple[int, int], int], chosen: list[tuple[int, int]], has: int) -> bool:
        again = sum(samples[sample] for sample in chosen) + sum(len(self.requests[i].prompt_ids) for i in {i for i, _ in chosen})
        left = [tokens_left(samples[i, m], self._limit(i), np.array(self.finished)) for i, m in chosen]
        return pays(len(samples), len(chosen), has, again, float(np.mean(left)))

    def _limit(self, i: int) -> int:
        return (self.requests[i].sampling or self.sampling).max_tokens

    def _claims(self, ticket: int) -> bool:
        """Is this rank the one that answers the ticket?"""
        self.gone.add(ticket)
        return self.store.add(f"taken/{ticket}", 1) == 1

    def _send(self, gift: list[tuple[int, int, Completion]], ticket: int, rank: int) -> None:
        self.generator.dispatched["handed_over"] += len(gift)
        self.store.set(f"gift/{ticket}", str(self.ranks.rank) if gift else NOTHING)  # they may all have finished meanwhile
        if gift:
            self.ranks.send(gift, rank)

    def _opened(self) -> list[tuple[int, int, Completion]] | None:
        """What lies there for this rank's ticket; None: all samples are finished."""
        answer, self.asked = self.store.get(f"gift/{self.asked}"), 0
        return None if answer == END else [] if answer == NOTHING else self.ranks.receive(int(answer))

    def _receive(self, stream: Stream, gift: list[tuple[int, int, Completion]]) -> None:
        self._submit(stream, [(i, m) for i, m, _ in gift], {(i, m): c for i, m, c in gift if len(c.token_ids)})

    def _report(self, more: int) -> int:
        """Count what has finished here; all that is finished anywhere."""
        reported, self.unreported = self.unreported + more, 0
        finished = self.store.add("finished", reported)
        if reported and finished == self.total:
            self._release()
        return finished

    def _wait(self) -> list[tuple[int, int, Completion]] | None:
        """Say that there is nothing left here; what another rank gives, or None when all samples are finished."""
        if self._report(0) == self.total:
            return None
        if self.asked:
            self.store.set(f"rank/{self.asked}", f"{self.ranks.rank} 0")
        else:
            self._ask()
        return self._wait_for_gift()

    def _wait_for_gift(self) -> list[tuple[int, int, Completion]] | None:
        end, pause = time.monotonic() + self.ranks.timeout.total_seconds(), POLL_S[0]
        while not self.store.check([f"gift/{self.asked}"]):  # `get` would hold the connection, which a watchdog of NCCL's may need
            if time.monotonic() > end:
                raise TimeoutError(f"rollout: nothing from the other ranks for {self.ranks.timeout.total_seconds():g} s")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        return self._opened()

    def _release(self) -> None:
        """The last samples are finished: end the others, each of which has a ticket, is about to take one, or will see that there is nothing left."""
        tickets = (ticket for ticket in itertools.count(1) if ticket not in self.gone and self._claims(ticket))
        for ticket in itertools.islice(tickets, self.num_consumers):
            self.store.set(f"gift/{ticket}", END)

    def _leave(self) -> None:
        """Count as finished what this rank leaves behind, and what nobody has taken so that nobody does."""
        left = len(self.held) + sum(max(0, n - self.store.add(f"next/{consumer}", n) + n) for consumer, n in enumerate(self.lengths))
        if self.asked and not self._claims(self.asked):  # what is under way must be taken
            left += len(self._wait_for_gift() or ())
        self._report(left)

    def _agreed(self, decide: Callable):
        """What the consumer's first rank decides."""
        if self.peers is None:
            return decide()
        return self.peers.broadcast(decide() if self.leads else None)


def pays(num_rows: int, num_given: int, num_there: int, tokens_again: int, tokens_left: float) -> bool:
    """Does it pay to hand over num_given of num_rows samples to a rank that has num_there, with tokens_again to prefill and a mean of tokens_left
    still to draw?

    The cost of a step is taken as its rows, at least FEW_ROWS; the slower of the two ranks counts.  What becomes cheaper are the tokens_left
    steps; what is paid is the prefill, PREFILL_COST a token, and HANDOVER_STEPS in which nothing of it is drawn.
    """
    after = max(num_rows - num_given, num_there + num_given, FEW_ROWS)
    saved = (max(num_rows, FEW_ROWS) - after) * tokens_left
    return saved > PREFILL_COST * tokens_again + HANDOVER_STEPS * after


def tokens_left(length: int, limit: int, finished: np.ndarray) -> float:
    """Tokens that a sample of `length` probably still gets: what the `finished` ones that became longer had more, or as many again if none did."""
    longer = finished[finished > length]
    return min(limit - length, longer.mean() - length if len(longer) else length)
