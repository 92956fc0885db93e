"""States written in the background: of the moment in which they were asked for, one after the other, with errors that show, and killed anywhere."""

import json
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import chaos
import killed_saver
from test_checkpoint import FILES, RANKS, assert_is, folders, restored, save_state, state_of
from test_sharded_checkpoint import ADAMW, SPARSE, alone, assert_equal, work

from athanor import checkpoint
from athanor.checkpoint import StateWriter
from athanor.errors import UserError


@pytest.fixture
def held(monkeypatch):
    """Lets the thread write when told so."""
    may_write, write = threading.Event(), checkpoint.write_state

    def waits(*args, **options):
        assert may_write.wait(20)
        return write(*args, **options)

    monkeypatch.setattr(checkpoint, "write_state", waits)
    return may_write


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path, held):
    model, optimizer, extra = state_of(10)
    with StateWriter(RANKS, background=True) as states:
        states.save(tmp_path / "a", 10, model, optimizer, extra)
        with torch.no_grad():  # the run goes on
            for value in (*model.parameters(), *optimizer.state_tensors().values()):
                value.fill_(11)
        extra["step"] = 11
        assert not (tmp_path / "a").exists() and not states.failed
        held.set()
        states.wait()
        assert_is(restored(tmp_path / "a"), 10)
        states.save(tmp_path / "a", 11, model, optimizer, extra)
    assert_is(restored(tmp_path / "a"), 11)  # leaving the block waits
    save_state(tmp_path / "b", 11, *state_of(11))
    assert folders(tmp_path / "a" / "step-00000011") == folders(tmp_path / "b" / "step-00000011")
    one, other = (load_file(tmp_path / name / "step-00000011" / FILES[0]) for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_copies_are_made_once(tmp_path, monkeypatch):
    addresses, write = [], checkpoint.write_state

    def noted(*args, **options):
        addresses.append([tensor.data_ptr() for tensor in args[2].values()])
        return write(*args, **options)

    monkeypatch.setattr(checkpoint, "write_state", noted)
    model, optimizer, extra = state_of(1)
    with StateWriter(RANKS, background=True) as states:
        for step in (1, 2):
            states.save(tmp_path, step, model, optimizer, extra)
            states.wait()
    assert addresses[0] == addresses[1] and set(addresses[0]).isdisjoint(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("background", [False, True])
def test_an_error_shows_once_and_the_state_before_stays(tmp_path, background):
    with StateWriter(RANKS, background=background) as states:
        states.save(tmp_path, 10, *state_of(10))
        states.wait()
        (tmp_path / "step-00000020").write_text("in the way")
        states.save(tmp_path, 20, *state_of(20))
        with pytest.raises(UserError, match="cannot write .*step-00000020"):
            states.wait()
        assert not states.failed
        states.wait()
        (tmp_path / "step-00000020").unlink()
        assert_is(restored(tmp_path), 10)
        states.save(tmp_path, 20, *state_of(20))
    assert folders(tmp_path) == ["step-00000010", "step-00000020"]


def test_what_could_not_be_read_back_is_refused_at_once(tmp_path):
    with StateWriter(RANKS, background=True) as states, pytest.raises(ValueError, match=r"extra\['a'\] is a Tensor"):
        states.save(tmp_path, 1, *state_of(1)[:2], {"a": torch.ones(1)})


def test_an_error_of_the_writer_does_not_hide_what_ends_the_run(tmp_path, capsys):
    (tmp_path / "step-00000020").write_text("in the way")
    with pytest.raises(KeyError, match="the first"), StateWriter(RANKS, background=True) as states:
        states.save(tmp_path, 20, *state_of(20))
        raise KeyError("the first")
    assert capsys.readouterr().err.startswith("warning: cannot write")


@pytest.mark.slow
def test_kill_9_while_the_thread_writes_never_loses_a_finished_state(tmp_path):
    assert killed_saver.last_step(tmp_path, "--background") >= killed_saver.KILLS


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("case, world, parallel", [
    (ADAMW, 2, {"shard": 0}), (SPARSE, 4, {"shard": 2}), (ADAMW, 2, {}),
], ids=["fsdp", "hsdp, sparse", "replicas"])  # fmt: skip
def test_split_states_are_written_in_the_background_too(tmp_path, case, world, parallel):
    """The ranks train on, with collectives of their own, while their threads agree on a state."""
    folder = tmp_path / "states"
    straight, _ = work(world, "save", folder, case, parallel, "background")
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "step-00000001", "step-00000002"]
    assert_equal(straight["saved"], alone(folder, case)["loaded"])


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_rank_that_dies_in_the_background_leaves_the_state_before(tmp_path):
    folder = tmp_path / "states"
    work(2, "save", folder, ADAMW, {"shard": 0}, "background", "dies", fails=True)
    assert not (folder / "step-00000002").exists() and alone(folder, ADAMW)["step"] == 1


PART = [point for point in chaos.POINTS if point.inside == chaos.SAVE and point.stage in ("base", "general")]


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("world", [1, 2])
def test_killed_in_a_background_save_a_run_ends_as_one_that_nothing_interrupted(tmp_path, world):
    wanted = chaos.reference(tmp_path, world)
    verdicts = chaos.chain(tmp_path, world, PART, wanted, "--background_save", "true")
    assert len(PART) == 5 and [verdict for _, verdict in verdicts] == ["equal"] * 5, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "go_on"])
def test_a_full_disk_shows_in_the_run_while_it_goes_on(tmp_path, choice):
    """The second state of the stage cannot be flushed; the run hears of it within a step."""
    whole = chaos.reference(tmp_path, 1)
    fault = {"at": "os:fsync", "call": 8, "stage": "base", "inside": chaos.SAVE, "do": "full"}
    stops = {"at": "athanor.optim:Optimizer.step", "call": 12, "stage": "base", "do": "kill"}
    words = ("--background_save", "true", "--failed_save", choice)
    result = chaos.start(tmp_path / "run", 1, *words, faults=[fault, stops])
    text = " ".join(result.stderr.split())
    assert "base.partial/step-00000008: No space left on device; the last good state is that after step 4" in text
    assert [path.name for path in (tmp_path / "run" / "micro" / "checkpoints" / "base.partial").iterdir()] == ["step-00000004"]
    assert result.returncode == (2 if choice == "stop" else -signal.SIGKILL)
    again = chaos.start(tmp_path / "run", 1, *words)
    assert not chaos.differences(chaos.outcome(tmp_path / "run", again), whole)


@pytest.mark.slow
def test_sigterm_and_the_end_of_a_stage_wait_for_the_state(tmp_path):
    """A writer that takes a second: the signal comes while it is at work, and what it writes is there when the process has left."""
    fault = {"at": "athanor.optim:Optimizer.step", "call": 6, "stage": "base", "do": "term"}
    slow = [{"at": "athanor.checkpoint:_digests", "call": n, "do": "slow"} for n in (1, 2)]
    stopped = chaos.start(tmp_path, 1, "--background_save", "true", faults=[fault, *slow])
    assert stopped.returncode == 0 and "stopped by SIGTERM after step 6 of base, saved up to step 6" in stopped.stderr, stopped.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "micro" / "checkpoints" / "base.partial").iterdir()) == ["step-00000004", "step-00000006"]
    ended = chaos.start(tmp_path, 1, "--background_save", "true", "--until", "base", faults=slow[:1])
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads((tmp_path / "micro" / "manifest.json").read_text())["stages"]["base"]["status"] == "done"
    assert [path.name for path in (tmp_path / "micro" / "checkpoints").iterdir()] == ["base"]
