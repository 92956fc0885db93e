"""Layers split over tensor parallel ranks against one process: gradients, weights, losses, states and whole copies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import tensor_worker  # noqa: E402
from sharding_worker import build, train, whole_state  # noqa: E402

from athanor.checkpoint import load_latest_state, save_state  # noqa: E402
from athanor.config import ModelConfig, ParallelConfig  # noqa: E402
from athanor.errors import UserError  # noqa: E402
from athanor.parallel import Ranks  # noqa: E402
from athanor.tensor_parallel import Split, check_tensor  # noqa: E402

ONE = Ranks("cpu", threads=1)


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return tensor_worker.main(Path(), "dense")


def distance(found: dict, wanted: dict) -> float:
    """The largest |a - b| / |b| of a parameter, in norms."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-30)) for name, x in wanted.items())


def compare(folder: Path, world: int, alone: dict) -> None:
    last, (case, _) = list(tensor_worker.cases(world).items())[-1]
    found = on_ranks(folder, world, "dense", case)
    for name in tensor_worker.cases(world):
        wanted = alone[", ".join(["tensor", *(word for word in ("untied", "fp32", "muon") if word in name)])]
        exact = 5e-6 if "fp32" in name or "muon" in name else 1e-13  # in another order; norms of heads cancel to small gradients
        assert distance(found[name]["gradients"], wanted["gradients"]) < exact, name
        # Muon multiplies in bf16: a last bit of the gradient is up to 2^-9 of an update.
        assert distance(found[name]["weights"], wanted["weights"]) < (2e-3 if "muon" in name else exact), name
        for step, one in zip(found[name]["figures"], wanted["figures"], strict=True):  # loss and norm
            assert step == pytest.approx(one, rel=1e-3 if "muon" in name else exact), name
    with pytest.raises(AssertionError):  # the comparison can fail
        assert distance(found["tensor"]["weights"], alone["tensor, muon"]["weights"]) < 0.01
    for (tokens, logps, finish), (one_tokens, one_logps, one_finish) in zip(found["samples"], alone["samples"], strict=True):
        assert tokens == one_tokens and finish == one_finish and logps == pytest.approx(one_logps, abs=1e-5)
    assert len({tuple(tokens) for tokens, _, _ in found["samples"]}) > 20
    compare_states(folder, found, case, 2e-3 if "muon" in last else 2e-6)


def on_ranks(folder: Path, world: int, kind: str, case: tuple) -> dict:
    """What the workers find, beside what one process makes of the state that they read."""
    model, optimizer = build(ONE, *case)
    train(ONE, model, optimizer, [0], 48)
    save_state(folder / "theirs", 1, model, optimizer, {}, ONE)
    saved = whole_state(model, optimizer)
    train(ONE, model, optimizer, [1], 48)
    straight = whole_state(model, optimizer)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    command = [sys.executable, HERE / "tensor_worker.py", folder, kind]
    workers = [subprocess.Popen(command, env=environment | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(world)]
    errors = [worker.communicate(timeout=400)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(errors)[-3000:]
    return torch.load(folder / "found.pt") | {"saved": saved, "straight": straight}


def compare_states(folder: Path, found: dict, case: tuple, limit: float) -> None:
    """A state of one process is read to the bit; what is then written is read by one process to the bit."""
    states = found["states"]
    assert all(torch.equal(states["loaded"][name], x) for name, x in found["saved"].items())
    assert distance(states["later"], found["straight"]) < limit
    assert load_latest_state(folder / "ours", *(other := build(ONE, *case, seed=2)), ONE).step == 2
    ours = whole_state(*other)
    assert ours.keys() == states["later"].keys() and all(torch.equal(ours[name], x) for name, x in states["later"].items())
    assert all(torch.equal(states["exported"][name], ours[name].to(states["exported"][name].dtype)) for name in states["exported"])


@pytest.mark.multiproc
def test_two_ranks_compute_what_one_does(tmp_path, alone):
    compare(tmp_path, 2, alone)


@pytest.mark.slow
@pytest.mark.multiproc
def test_four_ranks_compute_what_one_does_with_fsdp_and_without(tmp_path, alone):
    compare(tmp_path, 4, alone)


def test_parts_lie_where_megatron_has_them():
    """Each rank has its own heads of q, k and v; the parts, in order, make up the whole of each section."""

    class Two:
        world = 2

    split = Split(0, (8, 4, 4), Two)
    rows = torch.arange(16)
    assert split.part(rows, 0).tolist() == [0, 1, 2, 3, 8, 9, 12, 13] and split.part(rows, 1).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    odd = Split(1, (5,), Two)
    assert [odd.part(torch.arange(10).view(2, 5), r).shape for r in (0, 1)] == [(2, 2), (2, 3)]


def test_a_model_that_does_not_divide_is_an_error():
    class Four:
        world = 4

    config = ModelConfig(**tensor_worker.SHAPE)
    check_tensor(config, Four)
    with pytest.raises(UserError, match="parallel.tensor is 4, wanted a divisor of the 2 key and value heads"):
        check_tensor(config.model_copy(update={"num_key_value_heads": 2}), Four)
    sparse = tensor_worker.sharding_worker.MODELS["deepseek_v3"]
    check_tensor(sparse, Four)
    with pytest.raises(UserError, match=r"parallel.tensor is 4, wanted a divisor of the 6 attention heads \(num_attention_heads\)"):
        check_tensor(sparse.model_copy(update={"num_attention_heads": 6}), Four)
    with pytest.raises(UserError, match="parallel.tensor is 4, wanted a divisor of the 6 experts"):
        check_tensor(sparse.model_copy(update={"num_experts": 6}), Four)
    with pytest.raises(UserError, match="parallel.tensor is 2, wanted a divisor of the 1 ranks"):
        Ranks("cpu", threads=1, tensor=2)
    with pytest.raises(ValueError, match="rollout is split, which takes the parts of tensor parallelism; wanted tensor > 1"):
        ParallelConfig(rollout="split")
