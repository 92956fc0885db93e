"""The run folder: who may use it, for which configuration, and what is never deleted."""

import json
import os
import subprocess
import sys

import pytest

from athanor.errors import UserError
from athanor.run_folder import RunLock, changed_keys, open_run_folder

CONFIG = {"name": "a", "seed": 0, "stages": {"zero": {"steps": 10, "betas": [0.9, 0.95]}}}


def changed(**stage):
    return CONFIG | {"stages": {"zero": CONFIG["stages"]["zero"] | stage}}


def test_a_new_folder_gets_the_configuration_and_can_be_entered_again(tmp_path):
    for _ in range(2):
        open_run_folder(tmp_path / "runs" / "a", CONFIG).release()
    assert json.loads((tmp_path / "runs" / "a" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("parent", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, parent):
    if parent == "a file":
        parent = tmp_path / "file"
        parent.touch()
    with pytest.raises(UserError, match="cannot write there") as caught:
        open_run_folder(f"{parent}/run", CONFIG)
    assert "\n" not in str(caught.value)


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    open_run_folder(tmp_path / "a", CONFIG).release()
    with pytest.raises(UserError) as caught:
        open_run_folder(tmp_path / "a", changed(steps=20))
    text = str(caught.value)
    assert "stages.zero.steps: 10 -> 20" in text and "--overwrite" in text and "new name" in text and "seed" not in text
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == CONFIG
    open_run_folder(tmp_path / "a", CONFIG).release()  # the refusal left no lock


def test_keys_of_where_the_run_lies_may_differ(tmp_path):
    open_run_folder(tmp_path / "a", CONFIG).release()
    open_run_folder(tmp_path / "a", CONFIG | {"name": "b"}, ignore=("name",)).release()
    assert changed_keys(CONFIG, changed(steps=1, extra=True), ignore=("stages.zero.steps",)) == ["stages.zero.extra: absent -> true"]
    assert changed_keys(CONFIG, changed(steps=1, extra=True), ignore=("stages",)) == []


def test_overwrite_empties_what_a_run_writes_and_leaves_the_rest(tmp_path):
    run = tmp_path / "a"
    open_run_folder(run, CONFIG).release()
    (run / "checkpoints" / "zero").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    (run / ".metrics.jsonl.tmp").touch()
    (run / "my notes.txt").write_text("keep")
    open_run_folder(run, changed(steps=20), overwrite=True).release()
    assert sorted(p.name for p in run.iterdir()) == [".lock", "config.json", "my notes.txt"]
    assert json.loads((run / "config.json").read_text()) == changed(steps=20)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_folder_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="no run folder"):
        open_run_folder(tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "data").exists() and not (tmp_path / "config.json").exists()


HOLD = "import sys; from athanor.run_folder import RunLock; lock = RunLock(sys.argv[1]); print('held', flush=True); sys.stdin.read(1)"


def hold(run_dir):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid}"):
            RunLock(tmp_path)
        process.communicate(b"x")
        RunLock(tmp_path).release()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("reaped", [True, False])  # not reaped: the pid still exists as a zombie
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, reaped):
    process = hold(tmp_path)
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    RunLock(tmp_path).release()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_the_lock_of_a_recycled_pid_is_taken_over_and_of_another_host_is_not(tmp_path):
    holder = RunLock(tmp_path)
    record = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(record | {"pid": 1, "started": "1"}))  # pid 1 lives, but began at another time
    RunLock(tmp_path).release()
    (tmp_path / ".lock").write_text(json.dumps(record | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="on elsewhere.*delete"):
        RunLock(tmp_path)
    holder.release()  # does not free what is no longer its own
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("content", ["", '{"pid": 12', "[]"])
def test_a_half_written_lock_holds_nobody_back(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
