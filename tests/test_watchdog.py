"""Deadlines of phases: what a process that hangs prints, that it ends, and that torchrun then brings the run to the end it would have had."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import chaos

from athanor import watchdog

PROCESS = """
import ctypes, threading, time
from athanor import watchdog
watchdog.GRACE_S = 0.5
dog = watchdog.Watchdog({"update": 0.5, "rollout": 5.0, "collective": 5.0}, 1, 4)
watchdog.at("zero", 3)
with watchdog.phase("collective", "sum_int"):
    pass
def hang_here():
    HANG
with watchdog.phase("rollout"), watchdog.phase("update"):
    hang_here()
"""


def ended(code):
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done, time.time() - begun


def test_a_phase_beyond_its_deadline_says_where_and_ends_the_process():
    done, seconds = ended(PROCESS.replace("HANG", "time.sleep(60)"))
    assert done.returncode == watchdog.EXIT_STATUS and seconds < 30
    line = done.stderr.splitlines()[0]
    assert line.startswith("watchdog: ") and "deadlines.update_s is 0.5" in line
    assert "rank 1 of 4, stage zero, step 3, phase rollout, phase update, last collective sum_int" in line
    assert "in hang_here" in done.stderr and "Thread 0x" in done.stderr


def test_a_process_whose_interpreter_is_stuck_ends_too():
    # A call through PyDLL keeps the interpreter's lock, so no Python thread runs any more.
    done, seconds = ended(PROCESS.replace("5.0", "1.0").replace("HANG", "ctypes.PyDLL(None).sleep(60)"))
    assert done.returncode == 1 and seconds < 30 and "Timeout" in done.stderr and "in hang_here" in done.stderr


def test_signs_of_life_start_the_deadline_anew_and_a_phase_that_is_left_has_none():
    code = """
import time
from athanor import watchdog
dog = watchdog.Watchdog({"rollout": 0.6}, 0, 1)
with watchdog.phase("rollout") as alive:
    for _ in range(6):
        time.sleep(0.2)
        alive()
time.sleep(1.2)
dog.stop()
with watchdog.phase("rollout"):
    time.sleep(1.2)
"""
    assert (ended(code)[0].returncode, ended(code)[0].stderr) == (0, "")


def test_an_exception_tells_once_in_which_phase_it_came_up():
    watchdog.at("zero", 7)
    with pytest.raises(RuntimeError) as caught, watchdog.phase("update"), watchdog.phase("collective", "barrier"):
        raise RuntimeError("Connection closed by peer")
    assert len(caught.value.__notes__) == 1
    assert "stage zero, step 7, phase update, phase collective (barrier)" in caught.value.__notes__[0]
    assert "phase" not in watchdog.where()


def test_phases_may_end_in_another_order_than_they_began():
    def samples():
        with watchdog.phase("rollout"):
            yield 1
            yield 2

    stream = samples()
    with watchdog.phase("checkpoint"):
        next(stream)
    assert "phase rollout" in watchdog.where() and "checkpoint" not in watchdog.where()
    stream.close()
    assert "phase" not in watchdog.where()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return chaos.reference(tmp_path_factory.mktemp("whole"), 2)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("action, rank", [("hang", 0), ("hang", 1), ("exit", 1)])
def test_torchrun_restarts_a_run_of_which_one_rank_hangs_or_dies(whole, tmp_path, action, rank):
    fault = {"at": "athanor.rollout:Sample", "call": 20, "stage": "zero", "do": action, "rank": rank}
    begun = time.time()
    result = chaos.start(tmp_path, 2, "--deadlines.rollout_s", "5", "--deadlines.collective_s", "60", faults=[fault], restarts=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"fault: {action}" in result.stderr and time.time() - begun < 240
    if action == "hang":
        assert f"in phase rollout, deadlines.rollout_s is 5; rank {rank} of 2, stage zero, step " in result.stderr and "in strike" in result.stderr
    # The other one was waiting for it, and says so.
    assert f"rank {1 - rank} of 2, stage zero, step " in result.stderr and "phase collective (" in result.stderr
    assert not chaos.differences(chaos.outcome(tmp_path, result), whole)


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_rank_that_waits_for_a_hung_one_ends_by_its_own_deadline(tmp_path):
    """Without the hung rank's watchdog (its deadline is long), the other's fires."""
    fault = {"at": "athanor.rollout:Sample", "call": 20, "stage": "zero", "do": "hang", "rank": 0}
    result = chaos.start(tmp_path, 2, "--deadlines.collective_s", "5", faults=[fault])
    assert result.returncode == 1 and "in phase collective, deadlines.collective_s is 5; rank 1 of 2, stage zero, step " in result.stderr


@pytest.mark.slow
def test_one_rank_hangs_in_a_reward_and_in_a_checkpoint(tmp_path):
    for stage, at, phase in (("zero", "athanor.rewards.service:RewardService.score", "reward"), ("base", "os:rename", "checkpoint")):
        fault = {"at": at, "call": 1, "stage": stage, "do": "hang"} | ({"inside": chaos.SAVE} if phase == "checkpoint" else {})
        result = chaos.start(tmp_path / phase, 1, f"--deadlines.{phase}_s", "3", faults=[fault])
        assert result.returncode == watchdog.EXIT_STATUS and f"in phase {phase}" in result.stderr, result.stderr[-2000:]
        assert json.loads((tmp_path / phase / "micro" / "manifest.json").read_text())["stages"][stage]["status"] == "running"
