"""The continuous-batching scheduler case by case: groups, rows, blocks, order, and what it refuses."""

import numpy as np
import pytest

from athanor._host import Events, Scheduler


def small(**options) -> Scheduler:
    return Scheduler(**({"num_rows": 8, "max_length": 64, "num_blocks": 40, "block_size": 4} | options))


def test_a_group_prefills_once_and_copies_only_the_partial_block():
    s = small()
    assert s.submit(10, 3, 6, seeds=[7, 8, 2**63 - 1]) == 0
    a = s.admit()
    assert a.prompt_blocks.tolist() == [0, 1, 2] and a.needs_prefill.tolist() == [True] and a.row_offsets.tolist() == [0, 3]
    assert a.copies.tolist() == [[2, 3, 2], [2, 4, 2]]  # the last member takes the original
    assert s.block_table[:3, :3].tolist() == [[0, 1, 3], [0, 1, 4], [0, 1, 2]] and s.shared_blocks[:3].tolist() == [2, 2, 2]
    assert s.seeds[:3].tolist() == [7, 8, 2**63 - 1] and s.num_used_blocks == 5 and s.num_shared_blocks == 2
    offsets, rows, shared = s.groups()
    assert (offsets.tolist(), rows.tolist(), shared.tolist()) == ([0, 3], [0, 1, 2], [2])


def test_rows_close_up_and_groups_find_their_rows():
    s = small()
    for _ in range(3):
        s.submit(4, 2, 6)
    s.admit()
    e = s.advance(np.array([True, False, False, True, False, False]))
    assert e.finished_rows.tolist() == [0, 3] and e.moves.tolist() == [[4, 0], [5, 3]] and e.cleared_rows.tolist() == [4, 5]
    assert s.requests.tolist() == [2, 0, 1, 2, -1, -1, -1, -1] and s.lengths.tolist() == [5, 5, 5, 5, 0, 0, 0, 0]
    assert [x.tolist() for x in s.groups()] == [[0, 1, 2, 4], [1, 2, 0, 3], [1, 1, 1]]


def test_a_step_without_events_is_false_and_one_with_blocks_is_true():
    s = small()
    s.submit(3, 1, 20)
    s.admit()
    assert [bool(s.advance(np.zeros(1, bool))) for _ in range(6)] == [False, True, False, False, False, True]  # 5 and 9 tokens open a block


def test_the_last_token_needs_no_block():
    s = small(num_blocks=2)
    s.submit(4, 1, 5)  # 9 tokens, of which 8 are ever fed in
    with pytest.raises(ValueError, match="need 3 blocks of 4 tokens, wanted at most num_blocks = 2"):
        s.submit(4, 1, 6)
    s.admit()
    assert [s.advance(np.zeros(1, bool)).finished_reasons.tolist() for _ in range(5)] == [[]] * 4 + [[Events.LENGTH]]


def test_lookahead_maps_the_slots_of_the_next_steps():
    s = small(lookahead=6, null_block=40)
    s.submit(4, 1, 30)
    s.admit()
    assert s.block_table[0, :4].tolist() == [0, 1, 2, 40]  # prefill and 5 steps write slots 0 to 8
    e = s.advance(np.zeros(1, bool), appended=np.array([6]))
    assert e.blocks.tolist() == [[0, 3, 3]]  # 10 tokens: slots up to 14


def test_longest_expected_goes_first_and_waiting_counts():
    def order(aging):
        s = small(num_rows=1, num_blocks=16, aging=aging)
        s.submit(4, 1, 40, expected_new_tokens=1)
        taken = []
        for _ in range(12):  # a longer one arrives in every step
            s.submit(4, 1, 40, expected_new_tokens=5)
            a = s.admit()
            taken += zip(a.requests.tolist(), a.waited_steps.tolist(), strict=True)
            s.advance(np.ones(s.num_active, bool))
        return taken

    # Those of step 4 and before are preferred, at 4 tokens' worth; the one of step 4 ties and has the higher number.
    assert order(1)[:6] == [(1, 0), (2, 0), (3, 0), (4, 0), (0, 4), (5, 1)]
    assert 0 not in [request for request, _ in order(0)]  # without aging it starves


def test_set_expected_moves_a_request_in_the_queue():
    s = small()
    for _ in range(3):
        s.submit(4, 1, 20, expected_new_tokens=5)
    s.set_expected(2, 9)
    assert s.admit().requests.tolist() == [2, 0, 1]


def test_admission_waits_for_enough_free_rows_unless_nothing_more_is_to_come():
    s = small(num_rows=4, refill_rows=3)
    for _ in range(6):
        s.submit(4, 1, 20)
    assert len(s.admit()) == 4
    s.advance(np.array([True, False, False, False]))
    assert len(s.admit()) == 0  # one row free
    s.advance(np.array([True, False, False]))
    assert len(s.admit()) == 2  # two free, and two is all that waits


def test_prefill_budget_stops_before_it_is_exceeded_but_takes_one():
    s = small()
    for _ in range(3):
        s.submit(10, 1, 4)
    assert [len(s.admit(max_prefill_tokens=n)) for n in (3, 10, 20)] == [1, 1, 1]
    assert len(s.admit()) == 0


def test_a_split_group_keeps_its_prompt_until_the_last_member():
    s = small(num_rows=2, split_groups=True)
    s.submit(6, 5, 4)
    parts = []
    while s.num_requests:
        a = s.admit()
        s.audit()
        parts.append((a.members.tolist(), a.needs_prefill.tolist(), len(a.copies), s.waiting_members(0)))
        s.advance(np.ones(s.num_active, bool))
    assert parts == [([0, 1], [True], 2, 3), ([2, 3], [False], 2, 1), ([4], [False], 0, 0)]


def test_an_aborted_sample_goes_on_as_prompt_and_partial():
    s = small()
    s.submit(6, 2, 10, seeds=[5, 6])
    s.admit()
    s.advance(np.zeros(2, bool), appended=None)
    e = s.abort(0, 1)
    assert (e.finished_rows.tolist(), e.finished_generated.tolist(), e.finished_reasons.tolist()) == ([1], [1], [Events.ABORTED])
    assert e.completed_requests.tolist() == [] and s.abort(0).completed_requests.tolist() == [0] and s.num_used_blocks == 0
    s.submit(6, 1, 10, seeds=[6], generated=e.finished_generated)
    a = s.admit()
    assert a.generated.tolist() == [1] and s.lengths[0] == 7 and s.max_lengths[0] == 16 and s.seeds[0] == 6
    assert [len(s.advance(np.zeros(1, bool)).finished_rows) for _ in range(9)] == [0] * 8 + [1]  # 10 tokens in all


def test_a_row_may_end_without_a_token():
    s = small()  # its logits were NaN
    s.submit(6, 2, 10)
    s.admit()
    e = s.advance(np.array([True, False]), appended=np.array([0, 1]))
    assert (e.finished_members.tolist(), e.finished_generated.tolist()) == ([0], [0]) and s.lengths[0] == 7


def test_views_stay_where_they_are_and_scribbling_on_them_changes_no_schedule():
    s = small()
    views = {name: getattr(s, name) for name in ("state", "lengths", "prompt_lengths", "max_lengths", "requests", "members", "seeds", "row_blocks")}
    for value in (*views.values(), s.block_table):
        assert value.flags.writeable and value.base is s
    s.submit(6, 2, 10)
    s.admit()
    for name, value in views.items():
        assert value.ctypes.data == getattr(s, name).ctypes.data
        value[:] = 99
    s.block_table[:] = -7
    s.advance(np.array([True, False]))
    s.audit()
    lengths, table = s.lengths, s.block_table
    del s
    assert lengths.shape == (8,) and table.shape == (8, 16)  # they keep their owner alive


BAD_CONFIGS = [
    ({"num_rows": 0}, "num_rows is 0, wanted 1 to 1048576"),
    ({"max_length": 1}, "max_length is 1, wanted 2 to"),
    ({"num_blocks": 0}, "BlockPool: num_blocks is 0"),
    ({"block_size": -4}, "BlockPool: block_size is -4"),
    ({"policy": "swap"}, "policy is 'swap', wanted 'reserve' or 'pause'"),
    ({"lookahead": 0}, "lookahead is 0"),
    ({"refill_rows": 9}, "refill_rows is 9, wanted 1 to 8"),
    ({"aging": -1}, "aging is -1"),
    ({"null_block": 39}, "null_block is 39, wanted -1 or a block outside the pool, 40 to"),
    ({"num_rows": 1 << 20, "max_length": 1 << 30}, "block table of 281474976710656 entries, wanted at most 268435456"),
]


@pytest.mark.parametrize("options, message", BAD_CONFIGS)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def running() -> Scheduler:
    s = small()
    s.submit(6, 2, 10)
    s.admit()
    s.submit(6, 2, 10)
    return s


BAD_CALLS = [
    (lambda s: s.submit(0, 1, 1), "submit: prompt_length is 0, wanted 1 to 63"),
    (lambda s: s.submit(4, 0, 1), "submit: num_members is 0, wanted 1 to 8"),
    (lambda s: s.submit(4, 9, 1), "submit: num_members is 9, wanted 1 to 8"),
    (lambda s: s.submit(4, 1, 0), "submit: max_new_tokens is 0"),
    (lambda s: s.submit(40, 1, 25), r"submit: prompt_length \+ max_new_tokens is 65, wanted at most max_length = 64"),
    (lambda s: s.submit(4, 1, 5, expected_new_tokens=6), "submit: expected_new_tokens is 6, wanted 1 to 5"),
    (lambda s: s.submit(4, 1, 5, priority=1 << 50), "submit: priority is 1125899906842624"),
    (lambda s: s.submit(4, 2, 5, seeds=[1]), "submit: length of seeds is 1, wanted num_members = 2"),
    (lambda s: s.submit(4, 1, 5, seeds=[]), "submit: length of seeds is 0"),
    (lambda s: s.submit(4, 1, 5, seeds=[0.5]), "submit: seeds is float64, wanted int64"),
    (lambda s: s.submit(4, 1, 5, seeds=np.ones(1, np.uint64)), "submit: seeds is uint64, wanted int64"),
    (lambda s: s.submit(4, 2, 5, generated=[0, 5]), r"submit: generated\[1\] is 5, wanted 0 to 4"),
    (lambda s: s.submit(40, 8, 20), "submit: .* 8 of 8 members at once need 50 blocks of 4 tokens, wanted at most num_blocks = 40"),
    (lambda s: s.set_expected(5, 1), "set_expected: request is 5, wanted one that waits or runs"),
    (lambda s: s.set_expected(0, 11), "set_expected: expected_new_tokens is 11, wanted 1 to 10"),
    (lambda s: s.admit(0), "admit: max_prefill_tokens is 0, wanted >= 1"),
    (lambda s: s.admit(-1), "admit: max_prefill_tokens is -1, wanted >= 1"),
    (lambda s: s.abort(9), "abort: request is 9, wanted one that waits or runs"),
    (lambda s: s.abort(0, 2), "abort: member is 2, wanted one of request 0 that waits or runs"),
    (lambda s: s.abort(0, -1), "abort: member is -1, wanted >= 0"),
    (lambda s: s.waiting_members(-3), "waiting_members: request is -3"),
    (lambda s: s.advance(np.zeros(3, bool)), "advance: length of done is 3, wanted num_active - first = 2"),
    (lambda s: s.advance(np.zeros(2, bool), first=1), "advance: length of done is 2, wanted num_active - first = 1"),
    (lambda s: s.advance(np.zeros(0, bool), first=3), "advance: first is 3, wanted 0 to 2"),
    (lambda s: s.advance(np.zeros(2, bool), first=-1), "advance: first is -1"),
    (lambda s: s.advance([False, False]), "advance: done is <class 'list'>, wanted a numpy array of bool"),
    (lambda s: s.advance(np.zeros(2)), "advance: done has 1 dimensions of float64, wanted 1 of bool"),
    (lambda s: s.advance(np.zeros((2, 1), bool)), "advance: done has 2 dimensions of bool"),
    (lambda s: s.advance(np.zeros(2, bool), appended=np.array([1])), "advance: length of appended is 1, wanted that of done, 2"),
    (lambda s: s.advance(np.zeros(2, bool), appended=np.array([0, 2])), r"advance: appended\[1\] is 2, wanted 0 to 1 \(lookahead 1, 10 tokens left"),
    (lambda s: s.advance(np.zeros(2, bool), appended=np.array([-1, 0])), r"advance: appended\[0\] is -1"),
    (lambda s: s.advance(np.zeros(2, bool), appended=np.array([1.0, 0.0])), "advance: appended is float64, wanted int64"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_calls_are_named_and_change_nothing(call, message):
    s, other = running(), running()
    with pytest.raises(ValueError, match=message):
        call(s)
    s.audit()
    for x in (s, other):
        x.advance(np.array([True, False]))
    assert s.submit(4, 1, 1) == other.submit(4, 1, 1) == 2  # the refused one took no number
    assert np.array_equal(s.block_table, other.block_table) and s.num_free_blocks == other.num_free_blocks and s.step == other.step
    assert s.admit().requests.tolist() == other.admit().requests.tolist()


def test_a_mask_with_strides_is_read_where_its_entries_are():
    s = running()
    mask = np.array([True, False, False, True, True, True])[::3]
    assert s.advance(mask).finished_rows.tolist() == [0, 1]


WILD_CALLS = [
    lambda s, rng, a, b, c: s.submit(a, b, c),
    lambda s, rng, a, b, c: s.submit(abs(a) % 9, b, 3, generated=[c]),
    lambda s, rng, a, b, c: s.submit(5, 2, 9, expected_new_tokens=2),
    lambda s, rng, a, b, c: s.admit(),
    lambda s, rng, a, b, c: s.admit(a),
    lambda s, rng, a, b, c: s.abort(a, b),
    lambda s, rng, a, b, c: s.abort(a),
    lambda s, rng, a, b, c: s.set_expected(a, b),
    lambda s, rng, a, b, c: s.advance(rng.random(s.num_active) < 0.2),
    lambda s, rng, a, b, c: s.advance(np.zeros(abs(a) % 5, bool), first=a),
    lambda s, rng, a, b, c: s.advance(rng.random(s.num_active) < 0.2, appended=np.full(s.num_active, a)),
]


def test_calls_at_random_are_answered_or_refused():
    rng = np.random.default_rng(0)
    wild = [-(1 << 62), -2, -1, 0, 1, 2, 3, 7, 64, 1 << 31, 1 << 62]
    answered = refused = 0
    for _ in range(300):
        policy = "pause" if rng.integers(2) else "reserve"
        s = small(num_rows=4, policy=policy, split_groups=bool(rng.integers(2)), lookahead=int(rng.integers(1, 4)))
        for _ in range(30):
            try:
                WILD_CALLS[rng.integers(len(WILD_CALLS))](s, rng, *(int(rng.choice(wild)) for _ in range(3)))
                answered += 1
            except ValueError as error:
                assert str(error).startswith("Scheduler.")
                refused += 1
            s.audit()
    assert answered > 2000 and refused > 2000
