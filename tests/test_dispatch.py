"""Dispatch: every sample is drawn once wherever it ends up, in any order of events, and its tokens are those of one rank."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor import dispatch as dispatching
from athanor.config import ModelConfig, SamplingConfig
from athanor.dispatch import Dispatch, pays, tokens_left
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.rollout import rollout_generator, sample_groups
from athanor.samples import Completion, Finished, Request
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tokenizer import symbol_tokenizer

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from thread_ranks import Turns, on_threads

TASK = ArithmeticTask()
TOKENIZER = symbol_tokenizer(list(TASK.symbols))
ALWAYS = {"FEW_ROWS": 1, "PREFILL_COST": 0, "HANDOVER_STEPS": 0, "LOOK_STEPS": 1, "POLL_S": (0, 0)}  # hand over whenever it could pay


@pytest.fixture(autouse=True, scope="module")
def always():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALWAYS.items():
            patch.setattr(dispatching, name, value)
        yield


class FakeStream:
    """A token a step for each sample that has a row; a sample's token t is (its seed, t), and it ends at the length that its seed says."""

    def __init__(self, requests, max_rows):
        self.requests, self.max_rows = requests, max_rows
        self.tokens, self.ready, self.num_steps, self.num_drawn = {}, [], 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, i, members, partial):
        assert list(members) == sorted(members) and not self.tokens.keys() & {(i, m) for m in members}
        self.tokens |= {(i, m): partial[i_m].token_ids.tolist() if (i_m := m) in partial else [] for m in members}

    def tokens_of(self, i, member):
        return self.tokens[i, member]

    def end(self, sample, finish):
        ids = np.array(self.tokens.pop(sample), np.int64)
        self.ready.append(Finished(*sample, Completion(ids, ids.astype(np.float32), finish, ids.astype(np.int32))))

    def abort(self, i, members):
        for m in members:
            self.end((i, m), "abort")

    def step(self):
        if not self.ready:
            self.num_steps += bool(self.tokens)
            for i, m in list(self.tokens)[: self.max_rows]:
                self.num_drawn += 1
                self.tokens[i, m].append(1000 * self.requests[i].seeds[m] + len(self.tokens[i, m]))
                if len(self.tokens[i, m]) == self.requests[i].seeds[m] % 1000:
                    self.end((i, m), "stop")
        done, self.ready = self.ready, []
        return done


def fake_generator(max_rows: int):
    generator = SimpleNamespace(peers=None, max_rows=max_rows, window=1, dispatched={"busy_s": 0.0, "wall_s": 0.0, "handed_over": 0})
    generator.stream = lambda requests, sampling, on_demand, max_rows: FakeStream(requests, max_rows)
    return generator


def fake_requests(lengths: list[list[int]]) -> list[Request]:
    return [Request(np.arange(3), np.array([1000 * (len(row) * i + m + 1) + n for m, n in enumerate(row)])) for i, row in enumerate(lengths)]


@st.composite
def rollouts(draw):
    """(ranks, lengths by request and member, max_rows, portions, who goes on when, FEW_ROWS), below which ranks ask for more."""
    world, G = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    num_requests = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.lists(st.sampled_from([1, 2, 3, 9]), min_size=G, max_size=G), min_size=num_requests, max_size=num_requests))
    choices = draw(st.lists(st.integers(0, 2), max_size=120))
    return world, lengths, draw(st.integers(G, 2 * G + 1)), draw(st.sampled_from(["group", "sample"])), choices, draw(st.integers(1, 3))


@settings(max_examples=100, deadline=None)
@given(rollouts())
def test_every_sample_is_finished_once_in_any_order_of_events(rollout):
    world, lengths, max_rows, portion, choices, few = rollout
    requests = fake_requests(lengths)

    def draw(ranks):
        work = Dispatch(fake_generator(max_rows), requests, SamplingConfig(max_tokens=50), ranks)
        return work, [(i, m, completion.token_ids.tolist()) for i, m, completion in work]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatching, "FEW_ROWS", few)
        found, store = on_threads(world, draw, turns=Turns(choices), dispatch=portion)
    everything = [row for _, rows in found for row in rows]
    wanted = [(i, m, [1000 * int(r.seeds[m]) + t for t in range(lengths[i][m])]) for i, r in enumerate(requests) for m in range(len(r.seeds))]
    assert sorted(everything) == wanted
    assert store
    found[0][0].store.wait = lambda: None
    found[0][0].clear()
    assert not store


@settings(max_examples=100, deadline=None)
@given(rollouts(), st.integers(0, 5), st.integers(0, 2))
def test_when_a_rank_leaves_early_the_others_end_without_what_it_leaves(rollout, after, leaver):
    world, lengths, max_rows, portion, choices, few = rollout
    requests = fake_requests(lengths)

    def draw(ranks):
        rows = []
        for row in Dispatch(fake_generator(max_rows), requests, SamplingConfig(max_tokens=50), ranks):
            if ranks.rank == leaver % world and len(rows) == after:
                break
            rows.append(tuple(row)[:2])
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatching, "FEW_ROWS", few)
        found, _ = on_threads(world, draw, turns=Turns(choices), dispatch=portion)
    everything = sum(found, [])
    assert len(everything) == len(set(everything)) and len(found[leaver % world]) <= after
    if len(found[leaver % world]) < after:  # it had no more by itself
        assert len(everything) == sum(map(len, lengths))


class Clocks(Turns):
    """Simulated time, in row steps: who is furthest behind goes on.  A step takes its rows, at least 16; a prefilled token a quarter."""

    def __init__(self):
        super().__init__([])
        self.now, self.of_thread = Counter(), threading.local()

    def pick(self, waiting, taken):
        return min(waiting, key=lambda rank: (self.now[rank], rank))

    def spend(self, row_steps: float) -> None:
        self.now[self.of_thread.rank] += row_steps

    def stream(self, requests, max_rows):
        clocks = self

        class Timed(FakeStream):
            def submit(self, i, members, partial):
                super().submit(i, members, partial)
                clocks.spend(0.25 * (len(requests[i].prompt_ids) + sum(len(c.token_ids) for c in partial.values())))

            def step(self):
                if not self.ready:
                    clocks.spend(max(16, min(len(self.tokens), max_rows)))
                return super().step()

            def __iter__(self):  # fixed shares
                for i, request in enumerate(requests):
                    self.submit(i, range(len(request.seeds)), {})
                while self.tokens:
                    yield from self.step()

        return Timed(requests, max_rows)


@pytest.fixture
def timed(monkeypatch):
    """A function (lengths, ranks, max_rows, portions) -> (row steps until the last sample is there, samples handed over)."""
    for name, value in {"FEW_ROWS": 16, "PREFILL_COST": 0.25, "HANDOVER_STEPS": 8, "LOOK_STEPS": 8}.items():
        monkeypatch.setattr(dispatching, name, value)

    def run(lengths, world: int, rows: int, portion: str) -> tuple[float, int]:
        requests, clocks = fake_requests(lengths), Clocks()
        waits = SimpleNamespace(perf_counter=time.perf_counter, monotonic=time.monotonic, sleep=lambda _: clocks.spend(16))
        monkeypatch.setattr(dispatching, "time", waits)

        def draw(ranks):
            clocks.of_thread.rank, generator = ranks.rank, fake_generator(rows)
            generator.stream = lambda requests, sampling, on_demand=False, max_rows=rows: clocks.stream(requests, max_rows)
            num = sum(1 for _ in Dispatch(generator, requests, SamplingConfig(max_tokens=500), ranks))
            return num, generator.dispatched["handed_over"]

        found, _ = on_threads(world, draw, turns=clocks, dispatch=portion)
        assert sum(num for num, _ in found) == sum(map(len, lengths))
        return max(clocks.now.values()), sum(given for _, given in found)

    return run


def test_queues_are_shared_by_what_is_left(timed):
    lengths = [[200 if i % 2 == 0 else 20] * 16 for i in range(10)]  # rank 0 has all the long groups, one after the other
    fixed, _ = timed(lengths, 2, 16, "static")
    assert fixed > 5 * 200 * 16 and timed(lengths, 2, 16, "group")[0] < 3.3 * 200 * 16


def test_a_group_is_split_where_the_recipe_says_so(timed):
    whole, split = (timed([[300] * 64], 2, 64, portion) for portion in ("group", "sample"))
    assert 300 * 32 < split[0] < 301 * 32 < whole[0] < 0.6 * 300 * 64 and split[1] == 0 < whole[1]  # handed over, where they are not split


def test_stragglers_go_to_idle_ranks_where_it_pays(timed):
    few, many = [[300] * 16, [2] * 16], [[300] * 64, [2] * 64]
    assert timed(few, 2, 64, "group") == timed(few, 2, 64, "static") == (300 * 16 + 0.75, 0)  # 8 rows cost what 16 do
    fixed, shared = timed(many, 2, 64, "static")[0], timed(many, 2, 64, "group")
    assert fixed == 300 * 64 + 0.75 and shared[0] < 0.6 * fixed and 32 <= shared[1] < 48


def test_skewed_lengths_take_less_time_than_with_fixed_shares(timed):
    """32 prompts x 32 samples; prompts have log-normal mean lengths, and their samples geometric ones."""
    times = Counter()
    for seed in range(2):
        rng = np.random.default_rng(seed)
        lengths = [rng.geometric(1 / mean, 32).clip(1, 499).tolist() for mean in np.exp(rng.normal(3.5, 1.2, 32)).clip(2, 400)]
        for portion in ("static", "group"):
            times[portion] += timed(lengths, 4, 256, portion)[0]
    assert times["group"] < 0.85 * times["static"]


def test_a_handover_pays_where_fewer_rows_save_more_than_the_prefill_costs(monkeypatch):
    monkeypatch.setattr(dispatching, "FEW_ROWS", 16)
    monkeypatch.setattr(dispatching, "PREFILL_COST", 0.25)
    monkeypatch.setattr(dispatching, "HANDOVER_STEPS", 16)
    assert not pays(16, 8, 0, 0, 1e9)  # a step of 8 rows costs what one of 16 does
    # 64 rows, half of them given away: 32 rows less for 100 steps, against 0.25 a token and 16 steps of 32 rows
    assert pays(64, 32, 0, 10_000, 100) and not pays(64, 32, 0, 11_000, 100)
    assert not pays(64, 32, 0, 0, 16) and pays(64, 32, 0, 0, 17) and not pays(64, 32, 1, 0, 17)
    assert pays(64, 8, 0, 900, 100) == pays(64, 56, 0, 900, 100) is False  # the slower of the two ranks counts


def test_what_a_sample_still_gets_is_learnt_from_longer_ones():
    finished = np.array([10, 20, 60])
    assert tokens_left(15, 100, finished) == 25 and tokens_left(20, 100, finished) == 40
    assert tokens_left(70, 100, finished) == 30 and tokens_left(40, 1000, finished) == 20 and tokens_left(70, 1000, finished) == 70
    assert tokens_left(0, 100, np.zeros(0)) == 0


SAMPLING = {
    "plain": SamplingConfig(max_tokens=24),
    "truncated": SamplingConfig(max_tokens=24, top_p=0.9, temperature=1.5),
    "stop": SamplingConfig(max_tokens=24, stop=["1", "+ 3"], repetition_tokens=3, repetition_probability=0.3),
}


def facts(samples) -> list:
    """All bits of samples."""
    return [
        (s.problem.id, s.text, s.finish, s.token_ids.tolist(), s.logps.tolist(), s.prompt_ids.tolist())
        + tuple(None if pair is None else tuple(part.tolist() for part in pair) for pair in (s.support, s.routes))
        for s in samples
    ]


def small_model(**shape) -> Decoder:
    shape = {"vocab_size": TOKENIZER.vocab_size, "hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.3} | shape
    return Decoder(ModelConfig(**shape)).initialize_(0)


SPARSE = dict(architecture="qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


@pytest.mark.parametrize("world, portion, kind", [(2, "group", "truncated"), (3, "sample", "stop"), (2, "sample", "routes")])
def test_samples_are_those_of_one_rank_to_the_bit(world, portion, kind):
    model, sampling = small_model(**SPARSE if kind == "routes" else {}), SAMPLING.get(kind, SAMPLING["plain"])
    problems, handed_over, seen = [TASK.problem("train", i) for i in range(8)], [], []

    def drawn(ranks):
        generator = rollout_generator(model, TOKENIZER, 8, 4, record_routes=kind == "routes")
        groups = sample_groups(generator, TOKENIZER, problems, 4, sampling, ranks, 0, "zero", 5, on_sample=seen.append)
        assert all(sample.problem is problem for problem, group in zip(problems[ranks.rank :: world], groups, strict=True) for sample in group)
        handed_over.append(generator.dispatched["handed_over"])
        return groups

    one = Ranks(threads=1)
    generator = rollout_generator(model, TOKENIZER, 8, 4, record_routes=kind == "routes")
    wanted = sample_groups(generator, TOKENIZER, problems, 4, sampling, one, 0, "zero", 5)
    quick = np.random.default_rng(1).choice(world, 3000, p=[0.9] + [0.1 / (world - 1)] * (world - 1))  # rank 0 is: others hand over to it
    found, store = on_threads(world, drawn, turns=Turns(quick.tolist()), dispatch=portion)
    assert [[facts(group) for group in groups] for groups in found] == [[facts(group) for group in wanted[rank::world]] for rank in range(world)]
    assert sum(handed_over) > 0 and not store
    assert sorted(map(id, seen)) == sorted(id(sample) for groups in found for group in groups for sample in group)


def start(folder: Path, world: int, kind: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, Path(__file__).with_name("dispatch_worker.py"), folder, kind]
    return [subprocess.Popen(command, env=environment | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(world)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    import dispatch_worker

    return json.loads(json.dumps(dispatch_worker.main(tmp_path_factory.mktemp("one"), "")))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_over_gloo_draw_what_one_rank_does(tmp_path, world, one_rank):
    workers = start(tmp_path, world, "")
    errors = [worker.communicate(timeout=400)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(errors)[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for name, wanted in one_rank.items():
        for rank in range(world):
            own = found[rank][name]
            if not name.startswith("parts"):
                assert own["rollouts"] == [groups[rank::world] for groups in wanted["rollouts"]], (name, rank)
            else:  # sums over the parts of a layer round otherwise
                assert [[s[:4] for s in g] for groups in own["rollouts"] for g in groups] == [
                    [s[:4] for s in g] for groups in wanted["rollouts"] for g in groups[rank::world]
                ]
            assert own["stored"] == wanted["stored"] and own["file"] == wanted["file"] and own["left"] == []
        moved = sum(rank[name]["handed_over"] for rank in found)
        assert not moved if "static" in name or name == "parts" and world == 2 else moved, name


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_dead_rank_ends_those_that_wait_for_it(tmp_path):
    begun = time.monotonic()
    workers = start(tmp_path, 2, "dead")
    error = workers[0].communicate(timeout=100)[1]
    assert workers[1].wait(60) == 7 and workers[0].returncode == 1 and time.monotonic() - begun < 60
    assert "TimeoutError: rollout: nothing from the other ranks for 4 s" in error
