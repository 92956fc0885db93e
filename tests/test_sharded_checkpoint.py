"""Training state of split models: saved by one number of ranks and read by another, to the bit; damaged and half-written ones are passed over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import sharding_worker  # noqa: E402

from athanor.parallel import Ranks  # noqa: E402
from athanor.weights import load_model  # noqa: E402

ADAMW, MUON, SPARSE = ("qwen3", "adamw"), ("qwen3", "muon"), ("deepseek_v3", "adamw")


def work(world: int, job: str, folder: Path, case: tuple, parallel: dict, *more: str, fails: bool = False) -> tuple[dict, str]:
    """The worker's result and its stderr."""
    target = folder.with_name(f"{job}-{world}.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0", "--standalone"]
    command = [*launcher, HERE / "sharding_worker.py", job, target, folder, json.dumps(case), json.dumps(parallel), *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return (torch.load(target) if not fails else {}), done.stderr


def alone(folder: Path, case: tuple) -> dict:
    return sharding_worker.load(Ranks("cpu", threads=1), folder, case, {})


def assert_equal(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype
        if tolerance:
            assert float((other[name] - tensor).norm() / tensor.norm().clamp_min(1e-30)) < tolerance, name
        else:
            assert torch.equal(other[name], tensor), name


@pytest.mark.multiproc
def test_a_state_of_two_ranks_is_read_by_one(tmp_path, capsys):
    folder = tmp_path / "states"
    straight, _ = work(2, "save", folder, ADAMW, {"shard": 0})
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "step-00000001", "step-00000002"]
    assert len(list((folder / "step-00000002").glob("*.safetensors"))) == 2
    resumed = alone(folder, ADAMW)
    assert resumed["step"] == 2
    assert_equal(straight["saved"], resumed["loaded"])
    assert_equal(straight["later"], resumed["later"], 2e-6)
    # The HuggingFace folder, of several files here, is that of the whole model.
    assert len(list((folder / "hf").glob("*.safetensors"))) > 3
    exported = {f"model.{name}": p.detach() for name, p in load_model(folder / "hf").named_parameters()}
    assert_equal(exported, {name: value for name, value in straight["saved"].items() if name.startswith("model.")})
    # A bit of what the second rank wrote, a file that is cut off, one that is gone: the state before is read.
    shard = sorted((folder / "step-00000002").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for damage in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole[: len(whole) // 2], None):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        capsys.readouterr()
        assert alone(folder, ADAMW)["step"] == 1
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "step-00000002 is damaged" in warning and shard.name in warning
    shard.write_bytes(whole)
    assert_equal(straight["saved"], alone(folder, ADAMW)["loaded"])


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("case, saved_by, saved_as, read_by, read_as", [
    (ADAMW, 2, {"shard": 0}, 2, {"shard": 0}),
    (MUON, 2, {"shard": 0}, 4, {"shard": 0}),
    (SPARSE, 2, {"shard": 0}, 4, {"shard": 2}),
    (ADAMW, 4, {"shard": 2}, 2, {}),
    (ADAMW, 1, {}, 2, {"shard": 0}),
    (SPARSE, 2, {}, 2, {"shard": 0}),
    (SPARSE, 2, {"expert": 2}, 2, {"expert": 2}),
    (SPARSE, 4, {"expert": 2, "shard": 0}, 2, {"shard": 0}),
], ids=["2 to 2", "2 to 4, muon", "2 to 4 hsdp, sparse", "4 hsdp to 2 replicas", "1 to 2", "2 replicas to 2", "2, experts, to 2",
        "4, copies of experts, to 2"])  # fmt: skip
def test_a_state_is_read_by_any_number_of_ranks(tmp_path, case, saved_by, saved_as, read_by, read_as):
    folder = tmp_path / "states"
    straight, _ = work(saved_by, "save", folder, case, saved_as)
    resumed, warnings = work(read_by, "load", folder, case, read_as)
    assert resumed["step"] == 2 and "damaged" not in warnings
    assert_equal(straight["saved"], resumed["loaded"])
    if (saved_by, saved_as) == (read_by, read_as):
        assert_equal(straight["later"], resumed["later"])  # as if nothing had happened
    elif case == ADAMW:
        assert_equal(straight["later"], resumed["later"], 2e-6)


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_rank_that_dies_in_a_save_leaves_the_state_before(tmp_path):
    folder = tmp_path / "states"
    work(2, "save", folder, ADAMW, {"shard": 0}, "dies", fails=True)
    assert not (folder / "step-00000002").exists()
    (folder / ".step-00000002.tmp").mkdir(exist_ok=True)  # rank 0 has removed it; had it died, too, it would be there
    (folder / ".step-00000002.tmp" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    resumed, warnings = work(2, "load", folder, ADAMW, {"shard": 0})
    assert resumed["step"] == 1 and "damaged" not in warnings  # never seen as a state
    # A damaged one is passed over by all ranks together, with one message.
    work(2, "save", folder, ADAMW, {"shard": 0})
    shard = sorted((folder / "step-00000002").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed, warnings = work(2, "load", folder, ADAMW, {"shard": 0})
    assert resumed["step"] == 1 and warnings.count("step-00000002 is damaged") == 1
