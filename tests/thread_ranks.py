"""Ranks that are threads of one process, for tests without process groups: what `Ranks` has of collectives, messages and the store."""

import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace


class Turns:
    """One thread runs at a time, to its next call of `wait`; `choices` says who of those that wait goes on, and everybody in turn behind its end."""

    def __init__(self, choices, most: int = 100_000):
        self.choices, self.most, self.threads, self.waiting, self.turn = list(choices), most, set(), set(), None
        self.changed = threading.Condition()

    def pick(self, waiting: list[int], taken: int) -> int:
        return waiting[(self.choices[taken] if taken < len(self.choices) else taken) % len(waiting)]

    def wait(self, rank: int) -> None:
        with self.changed:
            self.waiting.add(rank)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.turn == rank or self.most < 0, 60) and self.most >= 0, "never its turn"
            self.turn = None
            self.waiting.remove(rank)

    def end(self, rank: int) -> None:
        with self.changed:
            self.threads.remove(rank)
            self.changed.notify_all()

    def give(self) -> None:
        """Hand out turns until all threads have ended."""
        taken = 0
        with self.changed:
            while self.threads:
                assert self.changed.wait_for(lambda: self.turn is None and self.waiting == self.threads, 60), "a thread has stopped"
                if not self.threads:
                    return
                self.turn = self.pick(sorted(self.waiting), taken)
                taken += 1
                self.most -= 1
                self.changed.notify_all()


class Store:
    """What the store of a process group does, in a dictionary; before each call `wait` is called."""

    lock = threading.Lock()

    def __init__(self, wait: Callable[[], None], values: dict):
        self.wait, self.values = wait, values

    def add(self, key: str, amount: int) -> int:
        self.wait()
        with self.lock:
            self.values[key] = str(int(self.values.get(key, "0")) + amount)
            return int(self.values[key])

    def set(self, key: str, value: str | bytes) -> None:
        self.wait()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self.wait()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        while not self.check([key]):
            pass
        value = self.values[key]
        return value if isinstance(value, bytes) else value.encode()

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


class ThreadRanks:
    """`peers` neighbours train on the same samples."""

    def __init__(self, rank: int, world: int, shared: SimpleNamespace, peers: int = 1, dispatch: str = "group", num_parts: int = 1):
        self.rank, self.world, self.shared, self.dispatch, self.num_parts = rank, world, shared, dispatch, num_parts
        self.data = SimpleNamespace(rank=rank // peers, world=world // peers)
        self.is_main, self.timeout = rank == 0, datetime.timedelta(seconds=60)
        self._num_calls = 0

    def _all(self, value) -> list:
        call, self._num_calls = self._num_calls, self._num_calls + 1
        self.shared.board[call, self.rank] = value
        return [self._wait_for(self.shared.board, (call, rank)) for rank in range(self.world)]

    def _wait_for(self, values: dict, key):
        while key not in values:
            assert not self.shared.failed, "another rank has failed"
            self.shared.pause(self.rank)
        return values[key]

    def concatenate(self, items: list) -> tuple[list, int]:
        parts = self._all(items)
        return sum(parts, []), sum(map(len, parts[: self.rank]))

    def exchange(self, outgoing: list[list]) -> list[list]:
        return [given[self.rank] for given in self._all(outgoing)]

    def send(self, item, rank: int) -> None:
        self.shared.pause(self.rank)
        self.shared.sent[self.rank, rank] = item

    def receive(self, rank: int):
        item = self._wait_for(self.shared.sent, (rank, self.rank))
        del self.shared.sent[rank, self.rank]
        return item

    def board(self) -> Store:
        return Store(lambda: self.shared.pause(self.rank), self.shared.values)


def on_threads(world: int, function: Callable[[ThreadRanks], object], *, turns: Turns | None = None, **options) -> tuple[list, dict]:
    """function(ranks) of every rank, and what is left in the store.  turns: one thread at a time, to its next message or call of the store."""
    shared = SimpleNamespace(board={}, sent={}, values={}, failed=False, pause=turns.wait if turns else lambda rank: time.sleep(1e-4))

    def one(rank: int):
        try:
            if turns:
                turns.wait(rank)
            return function(ThreadRanks(rank, world, shared, **options))
        except BaseException:
            shared.failed = True
            raise
        finally:
            if turns:
                turns.end(rank)

    with ThreadPoolExecutor(world) as pool:
        if turns:
            turns.threads = set(range(world))
        futures = [pool.submit(one, rank) for rank in range(world)]
        if turns:
            turns.give()
        return [future.result() for future in futures], shared.values
