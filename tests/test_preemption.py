"""SIGTERM and SIGUSR1: the step ends, the state is saved, the status is 0, and the same command ends with the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import chaos

SIGNALLED = ("zero", "athanor.rollout:Sample", 20), ("data", "athanor.sample_store:_line", 3), ("judge", "athanor.manifest:Manifest.finish", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    known = {}
    return lambda world: known.setdefault(world, known.get(world) or chaos.reference(tmp_path_factory.mktemp(f"whole{world}"), world))


def said(result):
    return [line for line in result.stderr.splitlines() if line.startswith("stopped by ")]


@pytest.mark.slow
def test_a_signal_anywhere_is_a_clean_end_from_which_the_same_command_goes_on(whole, tmp_path):
    """In a rollout, in the sampling of a data set, at the end of a stage: one after the other in one run."""
    lines = []
    for stage, at, call in SIGNALLED:
        stopped = chaos.start(tmp_path, 1, faults=[{"at": at, "call": call, "stage": stage, "do": "term"}])
        assert stopped.returncode == 0 and stopped.stdout == "", stopped.stderr[-2000:]
        lines += said(stopped)
        assert not chaos.differences(chaos.outcome(tmp_path), whole(1))
        assert (tmp_path / "micro" / ".lock").read_text() == ""
    again = "; the same command goes on from there"
    assert lines == [
        f"stopped by SIGTERM after step 2 of zero, saved up to step 2{again}",
        f"stopped by SIGTERM with 3 of 8 groups of samples saved{again}",
        f"stopped by SIGTERM before guard{again}",
    ]
    result = chaos.start(tmp_path, 1)
    assert not chaos.differences(chaos.outcome(tmp_path, result), whole(1))


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_torchrun_hands_the_signal_on_and_every_rank_leaves_alike(whole, tmp_path, world, number):
    metrics = tmp_path / "micro" / "metrics.jsonl"
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--signals-to-handle",
                 "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *chaos.command(tmp_path, 1)[1:]]  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=chaos.environment(tmp_path))
    until = time.time() + 120
    while time.time() < until and not (metrics.exists() and '"base", "step": 5' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.005)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    lines = [line for line in text.splitlines() if line.startswith("stopped by ")]
    assert len(lines) == 1 and lines[0].startswith(f"stopped by {number.name} "), text[-3000:]
    assert "Traceback" not in text.split("stopped by")[0]
    result = chaos.start(tmp_path, world)
    assert result.returncode == 0 and not chaos.differences(chaos.outcome(tmp_path, result), whole(world))


@pytest.mark.slow
@pytest.mark.multiproc
def test_ranks_that_get_the_signal_themselves_let_torchrun_end_with_0(whole, tmp_path):
    """As when Slurm signals every process of a step, or one rank alone has heard of it."""
    fault = {"at": "athanor.rollout:Sample", "call": 20, "stage": "zero", "do": "term", "rank": 1}
    stopped = chaos.start(tmp_path, 2, faults=[fault])
    assert stopped.returncode == 0, stopped.stderr[-2000:]
    assert [line.split(";")[0] for line in said(stopped)] == ["stopped by a signal to another rank after step 3 of zero, saved up to step 3"]
    result = chaos.start(tmp_path, 2)
    assert not chaos.differences(chaos.outcome(tmp_path, result), whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "go_on"])
def test_a_full_disk_during_a_save_keeps_the_last_good_state(whole, tmp_path, choice):
    """The second state of the stage cannot be flushed."""
    fault = {"at": "os:fsync", "call": 8, "stage": "base", "inside": chaos.SAVE, "do": "full"}
    stops = {"at": "athanor.optim:Optimizer.step", "call": 11, "stage": "base", "do": "kill"}
    result = chaos.start(tmp_path, 1, "--failed_save", choice, faults=[fault, stops] if choice == "go_on" else [fault])
    text = " ".join(result.stderr.split())
    assert "base.partial/step-00000008: No space left on device; the last good state is that after step 4" in text
    partial = tmp_path / "micro" / "checkpoints" / "base.partial"
    assert sorted(entry.name for entry in partial.iterdir()) == ["step-00000004"]
    assert result.returncode == (2 if choice == "stop" else -signal.SIGKILL)
    steps = [json.loads(line)["step"] for line in (tmp_path / "micro" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9 if choice == "stop" else 11))
    again = chaos.start(tmp_path, 1, "--failed_save", choice)
    assert not chaos.differences(chaos.outcome(tmp_path, again), whole(1))
