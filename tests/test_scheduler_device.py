"""The scheduler driven by a simulated device that holds real slot contents: it sees only what Admission and Events say, and every decode step
checks that a row reads its own prompt and its own tokens.  Order and admission are compared with a model written here."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from athanor._host import Events, Scheduler

NULL = 10_000  # outside every pool here


class Device:
    """Slots hold (request, member, position), member -1 for the prompt.  Rows and block tables are copies kept up by admissions and events."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.block_size = scheduler, scheduler.block_size
        self.kv = np.full((scheduler.num_blocks, scheduler.block_size, 3), -1)
        self.table = np.full((scheduler.num_table_rows, scheduler.max_blocks), NULL)
        self.rows = np.full((scheduler.num_table_rows, 3), -1)  # request, member, prompt length
        self.length = np.zeros(scheduler.num_table_rows, int)
        self.prompts = {}  # blocks of the prompts that are held for waiting members
        self.prompt_length, self.log = {}, []

    def write(self, blocks, begin, end, request, member):
        slots = np.arange(begin, end)
        at = np.asarray(blocks)[slots // self.block_size]
        assert (at < self.scheduler.num_blocks).all(), "a step writes where no block is"
        assert member < 0 or self.alone(at), "a step writes to a shared block"
        self.kv[at, slots % self.block_size] = np.stack([np.full_like(slots, request), np.full_like(slots, member), slots], 1)

    def alone(self, blocks) -> bool:
        used = np.concatenate([self.table[self.length > 0].ravel(), *self.prompts.values()])
        return all((used == block).sum() == 1 for block in set(blocks.tolist()))

    def prefill(self, a) -> None:
        self.log.append((a.requests.tolist(), a.rows.tolist(), a.copies.tolist(), a.blocks.tolist()))
        assert a.rows.tolist() == list(range(a.first_row, self.scheduler.num_active)) and not self.length[a.rows].any()
        assert len(a) == len(a.requests) == len(a.waited_steps) == len(a.needs_prefill) == len(a.row_offsets) - 1
        self.table[a.blocks[:, 0], a.blocks[:, 1]] = a.blocks[:, 2]
        for i, request in enumerate(a.requests.tolist()):
            p = self.prompt_length[request]
            blocks = a.prompt_blocks[a.block_offsets[i] : a.block_offsets[i + 1]]
            assert bool(len(blocks)) == bool(a.needs_prefill[i]) == (request not in self.prompts)
            if len(blocks):
                assert len(blocks) == -(-p // self.block_size)
                self.write(blocks, 0, p, request, -1)
                self.prompts[request] = blocks.astype(int)
            if not (request in self.scheduler and self.scheduler.waiting_members(request)):
                del self.prompts[request]
            for j in range(a.row_offsets[i], a.row_offsets[i + 1]):
                self.rows[a.rows[j]], self.length[a.rows[j]] = (request, a.members[j], p), p + a.generated[j]
        for source, target, tokens in a.copies.tolist():
            self.kv[target] = -1
            self.kv[target, :tokens] = self.kv[source, :tokens]
        for row in a.rows.tolist():
            request, member, p = self.rows[row].tolist()
            self.write(self.table[row], p, self.length[row], request, member)

    def decode(self, row: int) -> None:
        request, member, p = self.rows[row].tolist()
        n = self.length[row]
        self.write(self.table[row], n - 1, n, request, member if n - 1 >= p else -1)
        self.check(row, n)

    def check(self, row: int, n: int) -> None:
        request, member, p = self.rows[row].tolist()
        slots = np.arange(n)
        read = self.kv[self.table[row, slots // self.block_size], slots % self.block_size]
        assert np.array_equal(read, np.stack([np.full(n, request), np.where(slots < p, -1, member), slots], 1))

    def apply(self, e) -> list[tuple[int, int, int, int]]:
        """Finished (request, member, generated, reason)."""
        columns = (e.finished_requests, e.finished_members, e.finished_generated, e.finished_reasons)
        finished = list(zip(*(column.tolist() for column in columns), strict=True))
        for row, (request, member, generated, _) in zip(e.finished_rows.tolist(), finished, strict=True):
            if row >= 0:
                assert self.rows[row].tolist()[:2] == [request, member] and self.length[row] - self.rows[row, 2] == generated
        self.log.append((finished, e.finished_rows.tolist(), e.moves.tolist(), e.cleared_rows.tolist(), e.blocks.tolist()))
        for state in (self.table, self.rows, self.length):
            state[e.moves[:, 1]] = state[e.moves[:, 0]]
        self.table[e.cleared_rows], self.rows[e.cleared_rows], self.length[e.cleared_rows] = NULL, -1, 0
        self.table[e.blocks[:, 0], e.blocks[:, 1]] = e.blocks[:, 2]
        self.prompts = {r: b for r, b in self.prompts.items() if r in self.scheduler and self.scheduler.waiting_members(r)}
        return finished

    def agrees(self) -> None:
        """The scheduler's views say the same, and blocks are in use where something holds them and nowhere else."""
        s = self.scheduler
        assert np.array_equal(s.block_table, self.table) and np.array_equal(s.lengths, self.length)
        assert np.array_equal(s.requests, self.rows[:, 0]) and np.array_equal(s.members, np.maximum(self.rows[:, 1], 0))
        assert np.array_equal(s.state[: s.num_rows], np.arange(s.num_rows) < s.num_active)
        assert np.array_equal(s.state[s.num_rows :], 2 * (np.arange(s.num_table_rows - s.num_rows) < s.num_paused))
        held = [*self.table[self.length > 0], *self.prompts.values()]
        blocks, holders = np.unique(np.concatenate([[NULL], *held]), return_counts=True)
        assert s.num_used_blocks == len(blocks) - 1 and s.num_shared_blocks == (holders[:-1] > 1).sum()
        s.audit()


def drawn(device: Device, first: int, wanted: int, target, forced=()):
    """Decode and draw `wanted` tokens for each row from `first` on; a row ends at its target or where forced, and then draws no more."""
    s = device.scheduler
    n = s.num_active - first
    done, appended, ends = np.zeros(n, bool), np.zeros(n, np.int32), []
    for row in range(first, s.num_active):
        request, member, p = device.rows[row].tolist()
        for k in range(wanted):
            if first == 0 or k:
                device.decode(row)
            device.length[row] += 1
            appended[row - first] += 1
            generated = device.length[row] - p
            done[row - first] = generated >= target[request, member] or (row, k) in forced
            if done[row - first] or device.length[row] == s.max_lengths[row]:
                ends.append((request, member, generated, Events.DONE if done[row - first] else Events.LENGTH))
                break
    finished = device.apply(s.advance(done, first=first, appended=appended))
    assert finished == ends
    return finished


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_rows=st.integers(1, 8), num_blocks=st.integers(8, 30), block_size=st.integers(1, 5), lookahead=st.integers(1, 6), pause=st.booleans(),
        split=st.booleans(), refill=st.integers(1, 8), aging=st.integers(0, 3),
    )  # fmt: skip
    def begin(self, num_rows, num_blocks, block_size, lookahead, pause, split, refill, aging):
        self.pause, self.split, self.refill, self.aging = pause, split, min(refill, num_rows), aging
        self.s = Scheduler(
            num_rows, 24, num_blocks, block_size, policy="pause" if pause else "reserve", split_groups=split, lookahead=lookahead,
            refill_rows=self.refill, aging=aging, null_block=NULL,
        )  # fmt: skip
        self.device = Device(self.s)
        self.target, self.waiting, self.alive, self.partly = {}, {}, set(), None
        self.facts = {}  # request: prompt, max new tokens, expected, priority, step of submission
        self.lookahead = lookahead

    @rule(p=st.integers(1, 14), n=st.integers(1, 6), c=st.integers(1, 12), priority=st.integers(-5, 5), random=st.randoms(use_true_random=False))
    def submit(self, p, n, c, priority, random):
        expected = random.randint(1, c)
        generated = [random.choice([0, random.randrange(c)]) for _ in range(n)]
        worst, full = -(-(p + c - 1) // self.s.block_size), p // self.s.block_size
        try:
            request = self.s.submit(p, n, c, expected_new_tokens=expected, priority=priority, generated=generated, seeds=np.arange(n))
        except ValueError as error:
            together = 1 if self.split else n
            too_many = n > self.s.num_rows and not self.split
            partial = -(-p // self.s.block_size) - full if together < n else 0  # the group keeps its prompt for the others
            needed = full + partial + together * (worst - full)
            assert p + c > 24 or too_many or needed > self.s.num_blocks, error
            return
        self.device.prompt_length[request] = p
        self.facts[request] = [p, c, expected, priority, self.s.step]
        self.waiting[request] = list(range(n))
        for member in range(n):
            self.alive.add((request, member))
            self.target[request, member] = generated[member] + random.randint(1, c + 1 - generated[member])  # c + 1: cut off by the length

    def key(self, request):
        _, _, expected, priority, step = self.facts[request]
        return (request != self.partly, -(expected + priority - self.aging * step), request)

    @rule()
    def admit(self):
        paused, in_flight = self.s.num_paused, self.s.num_active + self.s.num_paused
        free_rows, waiting = self.s.num_rows - in_flight, sum(map(len, self.waiting.values()))
        order = sorted((r for r in self.waiting if self.waiting[r]), key=self.key)
        a = self.s.admit()
        taken = a.requests.tolist()
        assert taken == order[: len(taken)]
        if paused or (in_flight and free_rows < min(self.refill, waiting)):
            assert not taken
        else:
            assert taken or in_flight or not order  # nothing can be left undone
        for i, request in enumerate(taken):
            members = a.members[a.row_offsets[i] : a.row_offsets[i + 1]].tolist()
            whole = members == self.waiting[request]
            assert whole or (self.split and request == taken[-1] and members == self.waiting[request][: len(members)] and members)
            del self.waiting[request][: len(members)]
            self.partly = None if whole else request
        self.device.prefill(a)
        for row in a.rows.tolist():
            assert self.s.seeds[row] == self.s.members[row]
        if not self.pause and not self.split and taken and len(taken) < len(order):
            assert not self.fits(order[len(taken)])
        if taken:
            self.finished(drawn(self.device, a.first_row, 1, self.target))

    def fits(self, request) -> bool:
        """Reserve: the worst case of the group beside what the rows in flight may still ask for."""
        B, (p, c, *_), n = self.s.block_size, self.facts[request], len(self.waiting[request])
        worst, full = -(-(p + c - 1) // B), p // B
        rows = np.arange(self.s.num_active)
        asked = (-(-(self.s.max_lengths[rows] - 1) // B) - (self.device.table[rows] != NULL).sum(1)).sum()
        assert asked == self.s.num_reserved_blocks
        return n <= self.s.num_rows - self.s.num_active and full + n * (worst - full) <= self.s.num_free_blocks - asked

    @rule(steps=st.integers(1, 6), forced=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=2))
    def decode(self, steps, forced):
        before = self.s.num_active
        self.finished(drawn(self.device, 0, min(steps, self.lookahead), self.target, forced))
        assert before == 0 or self.s.num_active > 0 or self.s.num_paused == 0

    def finished(self, rows, aborted=False):
        for request, member, generated, reason in rows:
            self.alive.remove((request, member))  # each once
            assert (reason == Events.ABORTED) == aborted and generated <= self.facts[request][1]

    @precondition(lambda self: getattr(self, "alive", None))
    @rule(random=st.randoms(use_true_random=False), whole=st.booleans())
    def abort(self, random, whole):
        request, member = random.choice(sorted(self.alive))
        gone = {(r, m) for r, m in self.alive if r == request and (whole or m == member)}
        rows = self.device.apply(self.s.abort(request, None if whole else member))
        assert {(r, m) for r, m, *_ in rows} == gone
        self.waiting[request] = [m for m in self.waiting[request] if (request, m) not in gone]
        self.partly = None if self.partly == request and not self.waiting[request] else self.partly
        self.finished(rows, aborted=True)

    @precondition(lambda self: getattr(self, "alive", None))
    @rule(random=st.randoms(use_true_random=False))
    def correct_expectation(self, random):
        request, _ = random.choice(sorted(self.alive))
        self.facts[request][2] = random.randint(1, self.facts[request][1])
        self.s.set_expected(request, self.facts[request][2])

    @invariant()
    def books_balance(self):
        if hasattr(self, "device"):
            self.device.agrees()
            assert self.s.num_requests == len({request for request, _ in self.alive})
            assert self.s.num_waiting == sum(map(len, self.waiting.values()))
            for row in np.flatnonzero(self.device.length):
                self.device.check(row, self.device.length[row] - 1)  # paused rows too: their KV is kept

    def teardown(self):
        """Whatever has happened, the rest finishes: no deadlock."""
        if not hasattr(self, "device"):
            return
        for _ in range(3 * (2 + len(self.alive)) * 24):
            if not self.alive:
                break
            self.admit()
            self.decode(1, set())
        assert not self.alive and self.s.num_used_blocks == 0 and self.s.num_reserved_blocks == 0 and self.s.num_requests == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
TestRandomSequences = SchedulerMachine.TestCase


def test_pause_keeps_the_kv_and_the_oldest_row_always_goes_on():
    s = Scheduler(num_rows=3, max_length=64, num_blocks=14, block_size=4, policy="pause", null_block=NULL)
    for _ in range(3):
        s.submit(4, 1, 36, expected_new_tokens=4)  # worst case 10 blocks each, expected 2
    device, target = Device(s), {(i, 0): 100 for i in range(3)}
    device.prompt_length = {i: 4 for i in range(3)}
    device.prefill(s.admit())
    drawn(device, 0, 1, target)
    oldest, paused, steps = 0, 0, 1
    while s.num_requests:
        device.agrees()
        active = s.requests[: s.num_active].tolist()
        assert oldest in active
        paused = max(paused, s.num_paused)
        steps += 1
        for request, *_ in drawn(device, 0, 1, target):
            oldest = min((r for r in range(3) if r in s), default=None)
            assert request not in s
    assert paused == 2 and s.num_used_blocks == 0
    assert 36 < steps < 3 * 36  # they overlapped, and nobody began anew: 36 tokens were drawn for each


def test_younger_rows_take_no_more_in_one_step_than_the_oldest_can_spare():
    s = Scheduler(num_rows=3, max_length=16, num_blocks=7, block_size=4, policy="pause")
    for _ in range(3):
        s.submit(4, 1, 12, expected_new_tokens=1)  # worst case 4 blocks, 1 at first: 4 are free, 3 of them for the oldest
    s.admit()
    e = s.advance(np.zeros(3, bool))  # all three want their second block at once
    s.audit()
    assert s.requests[:2].tolist() == [0, 1] and s.requests[3] == 2 and e.paused_rows.tolist() == [3] and s.num_free_blocks == 2


def test_blocks_that_two_rows_share_come_back_once():
    s = Scheduler(num_rows=4, max_length=64, num_blocks=12, block_size=4, policy="pause")
    s.submit(8, 2, 5, expected_new_tokens=1, priority=100)  # two blocks, both shared
    s.submit(4, 1, 37, expected_new_tokens=1, priority=50)  # 10 blocks in the end
    s.submit(4, 1, 9, generated=[8])  # takes 3 at once: only 2 of 12 can be spared beside those 10, although 9 are free
    assert s.admit().requests.tolist() == [0, 1] and s.num_free_blocks == 9
    s.audit()
