"""The manifest: stages done, resumed, refused and adopted by hashes."""

import hashlib
import json

import pytest

from athanor.errors import UserError
from athanor.manifest import Manifest, code_version, hash_config, hash_path


@pytest.fixture
def run(tmp_path):
    """A run folder whose stage `base` is done with a checkpoint folder, and whose manifest lists two more stages."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "base").mkdir(parents=True)
    (run_dir / "checkpoints" / "base" / "model.safetensors").write_bytes(b"weights")
    manifest = Manifest(run_dir, seed=3)
    manifest.declare(["base", "zero", "rl"])
    manifest.begin("base", "key-base", {})
    manifest.finish("base", {"checkpoint": run_dir / "checkpoints" / "base"}, {"pass@1": 0.2}, 1.5, gates={"competence": {"value": 0.98}})
    return run_dir


def checkpoint(run_dir):
    return run_dir / "checkpoints" / "base"


def test_folder_hash_is_over_sorted_names_and_contents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"1")
    (tmp_path / "a").write_bytes(b"22")
    expected = hashlib.sha256()
    for name, content in (("a", b"22"), ("b/c", b"1")):
        expected.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    assert hash_path(tmp_path) == expected.hexdigest()
    assert hash_path(tmp_path / "a") == hashlib.sha256(b"22").hexdigest()


@pytest.mark.parametrize("change", ["content", "rename", "move", "add", "remove"])
def test_every_change_of_a_folder_changes_its_hash(tmp_path, change):
    for name in ("x", "y", "d/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = hash_path(tmp_path)
    match change:
        case "content":
            (tmp_path / "x").write_text("y")
        case "rename":
            (tmp_path / "x").rename(tmp_path / "w")
        case "move":
            (tmp_path / "d/z").rename(tmp_path / "z")
        case "add":
            (tmp_path / "empty").touch()
        case "remove":
            (tmp_path / "y").unlink()
    assert hash_path(tmp_path) != before


def test_config_hash_does_not_depend_on_the_order_of_keys():
    assert hash_config({"a": 1, "b": [1, 2]}) == hash_config({"b": [1, 2], "a": 1})
    assert hash_config({"a": 1}) != hash_config({"a": 2})


def test_a_finished_stage_is_recorded_and_survives_a_restart(run):
    manifest = Manifest(run)
    entry = manifest.stages["base"]
    assert manifest.is_done("base", "key-base") and not manifest.is_done("base", "other-key") and not manifest.is_done("zero", "key-base")
    assert entry["outputs"]["checkpoint"] == {"path": "checkpoints/base", "sha256": hash_path(checkpoint(run))}
    assert (entry["status"], entry["metrics"], entry["wall_s"], entry["seed"]) == ("done", {"pass@1": 0.2}, 1.5, 3)
    assert entry["gates"] == {"competence": {"value": 0.98}} and entry["code_version"] == code_version() and entry["started"] and entry["finished"]
    assert list(manifest.stages) == ["base", "zero", "rl"] and manifest.stages["zero"]["status"] == "pending"


def test_a_changed_output_is_refused_with_both_hashes(run):
    recorded = hash_path(checkpoint(run))
    (checkpoint(run) / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(UserError) as caught:
        Manifest(run).is_done("base", "key-base")
    text = str(caught.value)
    assert recorded in text and hash_path(checkpoint(run)) in text and "delete" in text and str(checkpoint(run)) in text and "\n" not in text


def test_a_deleted_output_makes_the_stage_undone(run):
    (checkpoint(run) / "model.safetensors").unlink()
    checkpoint(run).rmdir()
    assert not Manifest(run).is_done("base", "key-base")


def test_a_stage_refuses_an_input_that_is_not_what_its_producer_recorded(run):
    recorded = hash_path(checkpoint(run))
    (checkpoint(run) / "extra").touch()
    manifest = Manifest(run)
    with pytest.raises(UserError) as caught:
        manifest.begin("zero", "key-zero", {"init": checkpoint(run)})
    text = str(caught.value)
    assert recorded in text and hash_path(checkpoint(run)) in text and "zero" in text and "base" in text
    assert Manifest(run).stages["zero"]["status"] == "pending"


def test_a_missing_input_is_a_user_error(run):
    with pytest.raises(UserError, match="input data .*does not exist"):
        Manifest(run).begin("zero", "key-zero", {"data": run / "data" / "none.jsonl"})


def test_wall_time_adds_up_over_restarts_and_resume_needs_the_same_key(run):
    assert Manifest(run).begin("zero", "key-zero", {"init": checkpoint(run)}) is False
    first = Manifest(run)
    first.record_wall("zero", 2.0)
    assert first.begin("zero", "key-zero", {"init": checkpoint(run)}) is True  # as after a kill
    first.record_wall("zero", 1.0)
    first.record_wall("zero", 3.0)  # seconds of this process so far, not a further three
    second = Manifest(run)
    assert second.begin("zero", "key-zero", {"init": checkpoint(run)}) is True
    second.finish("zero", {}, {}, 4.0)
    assert Manifest(run).stages["zero"]["wall_s"] == 9.0
    assert Manifest(run).begin("zero", "other-key", {}) is False
    assert Manifest(run).stages["zero"]["wall_s"] == 0.0


def test_an_outside_input_that_changes_between_begin_and_resume_is_refused(run, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("1\n")
    before = hash_path(data)
    Manifest(run).begin("zero", "key", {"data": data})
    data.write_text("2\n")
    with pytest.raises(UserError) as caught:
        Manifest(run).begin("zero", "key", {"data": data})
    assert before in str(caught.value) and hash_path(data) in str(caught.value)


def test_a_stage_is_undone_when_its_input_was_made_again(run):
    manifest = Manifest(run)
    manifest.begin("zero", "key-zero", {"init": checkpoint(run)})
    manifest.finish("zero", {}, {}, 1.0)
    assert manifest.is_done("zero", "key-zero")
    manifest.begin("base", "key-base-2", {})
    (checkpoint(run) / "model.safetensors").write_bytes(b"new weights")
    manifest.finish("base", {"checkpoint": checkpoint(run)}, {}, 1.0)
    assert not manifest.is_done("zero", "key-zero")


def test_a_kill_while_writing_leaves_the_last_manifest(run, monkeypatch):
    manifest = Manifest(run)
    before = (run / "manifest.json").read_bytes()
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.begin("zero", "key-zero", {})
    assert (run / "manifest.json").read_bytes() == before


def test_finish_without_begin_is_our_own_mistake(run):
    with pytest.raises(ValueError, match="call begin first"):
        Manifest(run).finish("zero", {}, {}, 1.0)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99, "stages": {}}'])
def test_a_damaged_manifest_is_a_user_error(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json"):
        Manifest(tmp_path)


def test_reuse_copies_a_finished_stage_of_another_run(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    manifest = Manifest(other, seed=3)
    manifest.declare(["base"])
    assert manifest.reuse(run, "base", "key-base")
    assert (other / "checkpoints" / "base" / "model.safetensors").read_bytes() == b"weights"
    assert Manifest(other).is_done("base", "key-base") and Manifest(other).stages["base"]["adopted_from"] == str(run)
    (checkpoint(run) / "model.safetensors").write_bytes(b"later change")
    assert Manifest(other).is_done("base", "key-base")


@pytest.mark.parametrize("reason", ["no such run", "other key", "not done", "tampered", "other input"])
def test_reuse_declines_what_is_not_the_same(run, tmp_path, reason):
    other = tmp_path / "other"
    (other / "checkpoints" / "base").mkdir(parents=True)
    (other / "checkpoints" / "base" / "model.safetensors").write_bytes(b"other weights")
    manifest, source, stage, key = Manifest(other), run, "base", "key-base"
    match reason:
        case "no such run":
            source = tmp_path / "nowhere"
        case "other key":
            key = "key-2"
        case "not done":
            stage = "zero"
        case "tampered":
            (checkpoint(run) / "model.safetensors").write_bytes(b"tampered")
        case "other input":
            theirs = Manifest(run)
            theirs.begin("zero", "key-zero", {"init": checkpoint(run)})
            (run / "data").mkdir()
            (run / "data" / "zero.jsonl").write_text("{}\n")
            theirs.finish("zero", {"data": run / "data" / "zero.jsonl"}, {}, 1.0)
            stage, key = "zero", "key-zero"
    assert manifest.reuse(source, stage, key) is False
    assert (other / "checkpoints" / "base" / "model.safetensors").read_bytes() == b"other weights" and not (other / "data").exists()


def test_metrics_and_facts_take_numbers_of_torch_and_numpy(run):
    import numpy as np
    import torch

    manifest = Manifest(run)
    manifest.update_metrics("base", {"pass@1_t1": np.float64(0.1), "peak": torch.tensor(2)})
    manifest.set_run_facts(recipe="tiny")
    data = json.loads((run / "manifest.json").read_text())
    assert data["stages"]["base"]["metrics"] == {"pass@1": 0.2, "pass@1_t1": 0.1, "peak": 2} and data["run"] == {"recipe": "tiny"}
