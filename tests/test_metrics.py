"""metrics.jsonl and TensorBoard: one line per step, nothing twice after a kill and a resume."""

import json
import math
import sys
import time

import numpy as np
import pytest
import torch

from athanor.errors import UserError
from athanor.metrics import MetricsWriter, read_metrics


def steps(run_dir, stage):
    return [row["step"] for row in read_metrics(run_dir) if row["stage"] == stage]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write("zero", 1, {"reward": 0.5, "tokens": 7})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"stage": "zero", "step": 1, "reward": 0.5, "tokens": 7}


def test_numbers_of_all_kinds_are_written_and_what_is_not_finite_as_null(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        values = {
            "a": torch.tensor(0.5),
            "b": np.float32(0.25),
            "c": np.int64(3),
            "d": math.nan,
            "e": -math.inf,
            "f": torch.tensor(math.nan),
            "g": None,
            "h": True,
        }
        writer.write("s", 0, values)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path) == [{"stage": "s", "step": 0, "a": 0.5, "b": 0.25, "c": 3, "d": None, "e": None, "f": None, "g": None, "h": 1}]


@pytest.mark.parametrize("values", [{"text": "high"}, {"vector": [1.0]}, {"step": 3}])
def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path, values):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="MetricsWriter.write"):
            writer.write("s", 0, values)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_rewind_drops_later_steps_of_that_stage_only(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write("base", step, {"loss": step})
            writer.write("zero", step, {"reward": step})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.rewind("zero", 3)
        for step in (4, 5):
            writer.write("zero", step, {"reward": 10 * step})
    assert steps(tmp_path, "base") == steps(tmp_path, "zero") == [1, 2, 3, 4, 5]
    assert [row["reward"] for row in read_metrics(tmp_path) if row["stage"] == "zero"] == [1, 2, 3, 40, 50]


def test_rewind_to_minus_one_forgets_the_stage(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("base", 0, {"loss": 1.0})
        writer.rewind("base", -1)
        assert read_metrics(tmp_path) == []


def test_a_half_written_last_line_is_dropped_on_read_and_on_resume(tmp_path):
    whole = b'{"stage": "base", "step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"stage": "base", "st')
    assert steps(tmp_path, "base") == [1]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("base", 2, {"loss": 1.0})
    assert steps(tmp_path, "base") == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(whole)


def test_damage_before_the_last_line_names_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage"\n{"stage": "a", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        read_metrics(tmp_path)


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write("zero", 1, {"reward": 1.0})
        writer.rewind("zero", 0)
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_every_step_once_after_a_kill_and_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write("zero", step, {"reward": float(step), "kl": math.nan})
            writer.write("base", step, {"loss": float(step)})
    time.sleep(1.1)  # event files are named, and so ordered, by the second
    with MetricsWriter(tmp_path) as writer:
        writer.rewind("zero", 3)
        for step in (4, 5, 6):
            writer.write("zero", step, {"reward": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "zero")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert len(EventAccumulator(str(tmp_path / "tensorboard" / "base")).Reload().Scalars("loss")) == 5


SERVICE = """
import json
calls = []
def init(**settings): calls.append(["init", settings])
def log(values): calls.append(["log", values])
def finish(): calls.append(["finish"])
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_gets_the_numbers_of_every_step(name, tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, name, raising=False)
    with MetricsWriter(tmp_path / "mine", tensorboard=False, loggers=[name], config={"seed": 3}) as writer:
        writer.write("zero", 1, {"reward": 0.5, "kl": math.nan})
        writer.write("base", 7, {"loss": torch.tensor(2.0)})
    calls = sys.modules.pop(name).calls
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["config"] == {"seed": 3} and calls[0][1]["name"] == "mine" and calls[0][1]["resume"] == "allow"
    assert [call[1] for call in calls[1:3]] == [{"zero/step": 1, "zero/reward": 0.5}, {"base/step": 7, "base/loss": 2.0}]


def test_a_logger_that_is_not_installed_is_one_line_and_is_not_needed_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetricsWriter(tmp_path / "without", tensorboard=False).close()
    with pytest.raises(UserError, match="loggers: wandb is not installed; pip install wandb") as error:
        MetricsWriter(tmp_path / "with", tensorboard=False, loggers=["wandb"])
    assert "\n" not in str(error.value)


def test_other_ranks_start_no_logger(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("imported"))
    with MetricsWriter(tmp_path / "run", rank=1, loggers=["wandb"]) as writer:
        writer.write("zero", 1, {"reward": 1.0})


def test_a_full_disk_is_one_clear_error_and_the_lines_before_it_stay(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, rank=0) as metrics:
        metrics.write("zero", 1, {"loss": 1.0})
        metrics._file.close()
        metrics._file = open("/dev/full", "ab")  # takes nothing: no space left on device
        with pytest.raises(UserError, match="cannot write .*metrics.jsonl.*: No space left on device"):
            metrics.write("zero", 2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
