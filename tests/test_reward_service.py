"""Reward workers: what they survive, what becomes of a failure, who waits for whom, and that nothing starts that is not needed."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import Entry, Outcome, Reward, RewardService, RewardTable, make_reward, make_table
from athanor.rewards.pool import WALL_FACTOR, RewardPool
from athanor.samples import Problem, Sample

sys.path.insert(0, str(Path(__file__).parent))
from hostile_answers import hostile_answers  # noqa: E402

# Rewards that do what model text makes a verifier do.  Workers import them by name, so they stand in a module of their own.
NASTY = '''
import ctypes, os, subprocess, time
from dataclasses import dataclass
from athanor.rewards.base import Outcome, Reward

@dataclass(frozen=True)
class Nasty(Reward):
    __name__ = "nasty"
    runs_in = "process"
    timeout_s: float = 0.2

    def score(self, sample, problem):
        return getattr(self, "do_" + sample.text.partition(" ")[0])(sample.text.partition(" ")[2])

    def do_say(self, x): return float(x)
    def do_none(self, x): return None
    def do_outcome(self, x): return Outcome("timeout", message="its own")
    def do_wait(self, x): time.sleep(float(x)); return 1.0
    def do_loop(self, x):
        while True: pass
    def do_c_loop(self, x): return float(len(str(9 ** 9 ** 9)))
    def do_crash(self, x): return ctypes.string_at(0)
    def do_leave(self, x): os._exit(3)
    def do_raise(self, x): raise KeyError(x)
    def do_memory(self, x): return float(len(bytearray(64 << 30)))
    def do_fill(self, x):
        kept = []
        while True: kept.append(bytearray(64 << 20))
    def do_write(self, x): return float(open(x, "w").write("x"))
    def do_run(self, x): return float(subprocess.call(["true"]))
    def do_fork(self, x): return float(os.fork())
    def do_recurse(self, x): return self.do_recurse(x)
    def do_threads(self, x): return float(os.environ["OMP_NUM_THREADS"]) + len(os.environ["CUDA_VISIBLE_DEVICES"])
    def do_pid(self, x): return float(os.getpid())

class Broken(Nasty):
    preload = ("package_that_is_not_there",)
'''


def sample(text, answer="4", domain="math", prompt="q"):
    return Sample(Problem(prompt, answer, 0, "t", domain), text, np.arange(3), np.zeros(3, np.float32))


@pytest.fixture
def nasty(tmp_path, monkeypatch):
    (tmp_path / "nasty_reward.py").write_text(NASTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("athanor.rewards.pool._shared", None)  # a pool that other tests have started does not look into this folder
    monkeypatch.delitem(sys.modules, "nasty_reward", raising=False)
    return importlib.import_module("nasty_reward").Nasty


@pytest.fixture
def pool():
    with RewardPool(2, memory_bytes=1 << 30) as pool:
        yield pool


def outcomes(pool, reward, texts):
    given = [sample(text) for text in texts]
    return [future.result(60) for future in [pool.submit(reward, s, s.problem) for s in given]]


# ---- workers


@pytest.mark.parametrize(
    "text, status, message",
    [
        ("say 0.5", "score", ""),
        ("none", "score", ""),
        ("outcome", "timeout", "its own"),
        ("wait 60", "timeout", "by the clock"),
        ("loop", "timeout", "processor time"),
        ("c_loop", "timeout", "processor time"),
        ("crash", "error", "SIGSEGV"),
        ("leave", "error", "died of an exit"),
        ("raise x", "error", "KeyError"),
        ("memory", "error", "MemoryError"),
        ("fill", "error", "MemoryError"),
        ("recurse", "error", "RecursionError"),
        ("say nan", "error", "score is nan"),
        ("run", "error", "refuses"),
        ("fork", "error", "refuses"),
        ("unknown", "error", "AttributeError"),
    ],
)
def test_whatever_a_verifier_does_there_is_an_outcome_and_the_next_sample_is_judged(pool, nasty, text, status, message):
    reward = nasty(timeout_s=2.0) if text == "fill" else nasty()
    start = time.monotonic()
    bad, good = outcomes(pool, reward, [text, "say 0.25"])
    assert time.monotonic() - start < WALL_FACTOR * reward.timeout_s + 10  # the worst deadline, and starting the interpreter on a busy machine
    assert bad.status == status and message in bad.message, bad
    assert (good.status, good.value) == ("score", 0.25)
    if status != "score":
        assert bad.value is None


def test_a_worker_writes_no_files_and_has_one_thread_and_no_cuda(pool, nasty, tmp_path):
    written, threads = outcomes(pool, nasty(), [f"write {tmp_path / 'x'}", "threads"])
    assert written.status == "error" and not (tmp_path / "x").exists()
    assert threads.value == 1.0


def test_outcomes_belong_to_their_samples_whatever_the_order_of_completion(pool, nasty):
    texts = [f"wait {0.05 * (i % 3)}" if i % 4 == 0 else f"say {i}" for i in range(24)] + ["loop", "say 99"]
    found = outcomes(pool, nasty(), texts)
    assert [o.value for o in found] == [1.0 if i % 4 == 0 else float(i) for i in range(24)] + [None, 99.0]
    assert pool.num_judged == 26 and pool.busy_s > 0.3 and all(o.seconds > 0 for o in found)


def test_a_killed_worker_or_template_is_replaced(nasty):
    with RewardPool(1) as pool:
        (first,) = outcomes(pool, nasty(), ["pid"])
        os.kill(int(first.value), signal.SIGKILL)
        killed, second = outcomes(pool, nasty(), ["say 1", "pid"])
        assert killed.status == "error" and "SIGKILL" in killed.message and second.value != first.value
        pool._template._process.kill()
        pool._template._process.wait()
        time.sleep(0.1)  # its worker is told by the kernel
        found = outcomes(pool, nasty(), ["say 1", "say 2", "say 3"])
        assert [o.value for o in found[1:]] == [2.0, 3.0]  # one sample at most is lost, and not as a 0
        assert found[0].status in ("score", "error")


def test_nothing_starts_before_it_is_needed(nasty):
    with RewardPool(2) as pool:
        caller = make_reward("format")
        assert pool.submit(caller, sample("x"), sample("x").problem).result().value == 0.0
        assert make_reward("math").quick(sample("<answer>4</answer>"), sample("").problem).value == 1.0
        assert pool.submit(make_reward("math"), sample("<answer>4</answer>"), sample("").problem).result().value == 1.0
        assert pool._template is None and pool._threads is None and not pool._loops
        outcomes(pool, nasty(), ["say 1"])
        assert len(pool._loops) == 1
    before = threading.active_count()
    service = RewardService(make_table([{"name": "accuracy"}, {"name": "format"}]))
    service.submit(sample("<answer>4</answer>"))
    assert service.measure() == ({}, "") and service._pool is None and threading.active_count() == before


def test_a_closed_pool_ends_its_processes_and_says_so(nasty):
    pool = RewardPool(1)
    waiting = [pool.submit(nasty(), s, s.problem) for s in (sample("wait 1"), sample("say 1"), sample("say 1"))]
    time.sleep(0.05)
    pool.close()
    assert {future.result(5).status for future in waiting} <= {"error", "score"}
    assert pool._template._process.poll() is not None
    with pytest.raises(ValueError, match="closed"):
        pool.submit(nasty(), sample("x"), sample("x").problem)


def test_wrong_pools_and_rewards_are_named(nasty):
    with pytest.raises(ValueError, match="num_workers is 0"):
        RewardPool(0)
    with pytest.raises(ValueError, match="memory_bytes is 1"):
        RewardPool(1, memory_bytes=1)
    here = type("Here", (nasty,), {"__module__": "__main__"})
    with RewardPool(1) as pool, pytest.raises(UserError, match="defined in __main__"):
        pool.submit(here(), sample("x"), sample("x").problem)
    odd = type("Odd", (Reward,), {"runs_in": "cloud"})
    with RewardPool(1) as pool, pytest.raises(UserError, match="runs_in is 'cloud'"):
        pool.submit(odd(), sample("x"), sample("x").problem)


def test_workers_that_cannot_start_raise_and_name_the_package(nasty):
    broken = sys.modules["nasty_reward"].Broken
    with RewardPool(1) as pool, pytest.raises(UserError, match="pip install package-that-is-not-there"):
        pool.submit(broken(), sample("say 1"), sample("x").problem).result(60)


def test_workers_die_with_the_trainer(nasty, tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
from nasty_reward import Nasty
from athanor.rewards.pool import RewardPool
from athanor.samples import Problem, Sample
pool = RewardPool(1)
s = Sample(Problem("q", "4", 0, "t"), "pid", np.arange(1), np.zeros(1))
pid = int(pool.submit(Nasty(), s, s.problem).result().value)
s.text = "wait 60"
pool.submit(Nasty(timeout_s=60), s, s.problem)
print(pid, pool._template._process.pid, flush=True)
time.sleep(0.2)
os.kill(os.getpid(), 9)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in ran.stdout.split()]
    assert len(pids) == 2, ran.stderr
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- hostile answers


def check_hostile(count: int, num_workers: int) -> dict:
    reward, gold = make_reward("math", timeout_s=0.2), "\\frac{\\pi}{7}"
    found = []
    with RewardPool(num_workers) as pool:
        warm = sample("<answer>\\sqrt{2}</answer>", gold)
        pool.submit(reward, warm, warm.problem).result(120)
        given = [sample(f"<answer> {text} </answer>", gold) for text in hostile_answers(count)]
        found = [future.result(600) for future in [pool.submit(reward, s, s.problem) for s in given]]
        good = sample("<answer>\\pi/7</answer>", gold)
        assert pool.submit(make_reward("math", timeout_s=5.0), good, good.problem).result(60).value == 1.0
    slow = [(o.seconds, o.message) for o in found if o.seconds > WALL_FACTOR * reward.timeout_s + 1.0]  # the clock's deadline, and another fork
    assert slow == [] and len(found) == count
    assert not any(o.value for o in found), "a hostile answer was accepted"
    assert not list(Path("/tmp").glob("athanor-hostile-*")), "a hostile answer was executed"
    return {status: sum(o.status == status for o in found) for status in ("score", "error", "timeout")}


def test_sixty_hostile_answers_keep_to_their_deadline_and_the_pool_lives():
    counts = check_hostile(60, 2)
    assert counts["timeout"] >= 3 and counts["score"] >= 20


@pytest.mark.slow
def test_a_thousand_hostile_answers_keep_to_their_deadline_and_the_pool_lives():
    print(check_hostile(1000, 2))


# ---- the service


class Slow(Reward):
    """Waits in a thread; text "raise", "late" or a number of seconds."""

    __name__ = "code"
    runs_in = "thread"

    def score(self, sample, problem):
        if sample.text == "raise":
            raise RuntimeError("no compiler")
        if sample.text == "late":
            raise TimeoutError("tests took too long")
        time.sleep(float(sample.text))
        return 1.0


def test_samples_are_judged_while_others_are_still_generated():
    with RewardService(RewardTable([Entry(Slow())]), num_workers=2) as service:
        given = [sample(str(0.1 * (3 - i))) for i in range(4)]
        start = time.perf_counter()
        for s in given:
            service.submit(s, 0)
        assert time.perf_counter() - start < 0.05  # nobody waited
        time.sleep(0.45)  # "generation" goes on; 0.6 s of work for two threads
        scores = service.score(given, 0)
        assert scores.total.tolist() == [1.0] * 4
        figures, first = service.measure()
        assert figures["reward_wait_s"] < 0.1 and figures["reward_judged"] == 4 and first == ""
        assert 0.3 < figures["reward_busy_share"] <= 1.05
        assert service.score([sample("0.1")], 0).total.tolist() == [1.0]  # not submitted before: judged now
        assert service.measure()[0]["reward_wait_s"] > 0.08


@pytest.mark.parametrize(
    "on_failure, total, applied, raw",
    [
        ("zero", [1.0, 0.0, 0.0, 1.0], [True] * 4, [1.0, 0.0, 0.0, 1.0]),
        ("drop_sample", [1.0, 0.0, 0.0, 1.0], [True, False, False, True], [1.0, None, None, 1.0]),
        ("drop_group", [0.0, 0.0, 0.0, 1.0], [False, False, False, True], [None, None, None, 1.0]),
    ],
)
def test_a_failure_is_counted_and_treated_as_configured(on_failure, total, applied, raw):
    given = [sample("0"), sample("raise"), sample("late"), sample("0", prompt="another")]
    with RewardService(RewardTable([Entry(Slow()), Entry(make_reward("format"))], on_failure), num_workers=2) as service:
        scores = service.score(given, 0)
        figures, first = service.measure()
    assert scores.total.tolist() == total and scores.applied.tolist() == applied
    assert [None if np.isnan(r) else r for r in scores.raw] == raw
    assert scores.failures == {"code": {"error": 1, "timeout": 1}}
    assert (figures["reward_errors"], figures["reward_timeouts"]) == (1, 1) and first == "code: RuntimeError: no compiler"


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="on_failure is 'ignore'"):
        make_table([{"name": "format"}], "ignore")


def test_direct_calls_give_none_for_a_failure_and_log_it(caplog):
    assert Slow()([sample("0"), sample("raise")]) == [1.0, None]
    assert "1 errors and 0 timeouts among 2 samples" in caplog.text
    assert Slow().outcomes([sample("late")])[0] == Outcome("timeout", None, "tests took too long", pytest.approx(0, abs=0.5))


def test_scores_do_not_depend_on_what_was_submitted_or_when(nasty):
    table = RewardTable([Entry(nasty()), Entry(make_reward("format"), weight=0.5)])
    texts = ["say 1", "loop", "say 0.5", "wait 0.1", "say 0.25"]
    wanted = table.score([sample(text) for text in texts])
    for order in ([4, 3, 2, 1, 0], [1, 4]):
        given = [sample(text) for text in texts]
        with RewardService(table, num_workers=2) as service:
            for i in order:
                service.submit(given[i], 0)
            scores = service.score(given, 0)
        assert scores.total.tolist() == wanted.total.tolist() and scores.parts == wanted.parts and scores.applied.tolist() == wanted.applied.tolist()
