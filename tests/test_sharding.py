"""Training split over ranks against one process: gradients, weights, what the rollout reads, and a whole RL run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import sharding_worker  # noqa: E402

from athanor.config import OptimizerConfig, ParallelConfig, SamplingConfig, TrainConfig  # noqa: E402
from athanor.errors import UserError  # noqa: E402
from athanor.generator import Generator  # noqa: E402
from athanor.model.transformer import Decoder  # noqa: E402
from athanor.optim import Optimizer  # noqa: E402
from athanor.parallel import Ranks  # noqa: E402
from athanor.samples import Request  # noqa: E402
from athanor.sharding import FullWeights, fully_shard_, shard_size, split_parameters  # noqa: E402
from athanor.stages.routing import RouterBalance  # noqa: E402
from athanor.stages.training import cross_entropy_step, packed_batches  # noqa: E402
from athanor.weights import weights_hash  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(world: int, *arguments, timeout: int = 240) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "0", "--standalone"]
    command = [*launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return sharding_worker.results(Ranks("cpu", threads=1))


def distance(found: dict, wanted: dict) -> float:
    """The largest |a - b| / |b| of a parameter, in norms."""
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-30)) for name, x in wanted.items())


def same_bits(one: dict, other: dict) -> bool:
    return all(torch.equal(one[part][name], x) for part in ("gradients", "weights") for name, x in other[part].items())


def test_recomputing_activations_changes_no_bit(alone):
    """One process, where a shard is the whole: forward twice, and with experts whose routes are recorded."""
    for kept, recomputed in (("fsdp", "fsdp, recomputed, kept"), ("fsdp, sparse", "fsdp, sparse, recomputed")):
        assert same_bits(alone[recomputed], alone[kept]) and alone[recomputed]["figures"] == alone[kept]["figures"]


# Layouts that are one on one process, by the one that ran there.
ALONE = {"hsdp": "fsdp", "hsdp, one batch": "fsdp, one batch", "experts": "fsdp, sparse", "experts, fsdp, recomputed": "fsdp, sparse, recomputed",
         "experts, fp8, mtp": "fsdp, fp8, mtp, recomputed", "experts, muon": "fsdp, sparse, muon"}  # fmt: skip


SPARSE_MUON = ("fsdp, sparse, muon", "experts, muon")


def compare_with_one_process(found: dict, alone: dict) -> None:
    for name, case in found.items():
        wanted = alone.get(name) or alone[ALONE[name]]
        assert distance(case["gradients"], wanted["gradients"]) < 1e-6, name
        # Muon multiplies in bf16: a last bit of the gradient is up to 2^-9 of an update, and more where the gradient has not full rank, as of experts
        # with few tokens; three updates are as long as a small matrix, so a wrong one is far beyond.
        # An update that is rounded otherwise may cross a border between two FP8 numbers, a sixteenth apart.
        allowed = 5e-2 if name in SPARSE_MUON else 2e-3 if "muon" in name else 2e-5 if "fp8" in name else 1e-6
        assert distance(case["weights"], wanted["weights"]) < allowed, name
        for (loss, norm), (one_loss, one_norm) in zip(case["figures"], wanted["figures"], strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-4 if "muon" in name else 2e-6), name
            assert norm == pytest.approx(one_norm, rel=1e-3 if "muon" in name else 2e-6), name
    for kept, recomputed in (("fsdp", "fsdp, recomputed, kept"), ("fsdp, sparse", "fsdp, sparse, recomputed")):
        assert same_bits(found[recomputed], found[kept])


@pytest.mark.multiproc
def test_two_ranks_train_as_one_however_they_are_split(tmp_path, alone):
    launch(2, HERE / "sharding_worker.py", "train", tmp_path / "two.pt")
    found = torch.load(tmp_path / "two.pt")
    compare_with_one_process(found, alone)
    # With one micro-batch, two ranks have one order to add in; with several, replicas add their own first.
    one, other = found["replicate, one batch"]["gradients"], found["fsdp, one batch"]["gradients"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(AssertionError):
        compare_with_one_process({"fsdp": found["fsdp, untied"]}, {"fsdp": alone["fsdp"]})  # the comparison can fail


@pytest.mark.slow
@pytest.mark.multiproc
def test_four_ranks_train_as_one_however_they_are_split(tmp_path, alone):
    launch(4, HERE / "sharding_worker.py", "train", tmp_path / "four.pt")
    found = torch.load(tmp_path / "four.pt")
    assert "hsdp" in found
    compare_with_one_process(found, alone)


def test_a_shard_that_does_not_divide_the_ranks_is_an_error():
    ranks = Ranks("cpu", threads=1)
    assert shard_size(ParallelConfig(), ranks) == shard_size(ParallelConfig(shard=0), ranks) == 1
    with pytest.raises(UserError, match="parallel.shard is 3, wanted 0 .all. or a divisor of the 1 ranks"):
        shard_size(ParallelConfig(shard=3), ranks)
    with pytest.raises(ValueError, match="offload is true, which takes split parameters"):
        ParallelConfig(offload=True)


def run_recipe(folder: Path, world: int, *changes: str) -> tuple[list[dict], Path]:
    """Metrics and run folder of base model, RL with a KL term, SFT and a reward model of the micro recipe."""
    options = ["--until", "judge", "--stages.zero.steps", "3", "--stages.base.steps", "20", "--stages.base.optimizer.name", "adamw",
               "--stages.base.optimizer.eps", "1e-3", "--device", "cpu", "--run_root", str(folder), "--verify_weights", "true",
               "--models.main.num_attention_heads", "4", "--models.main.num_key_value_heads", "2", *changes]  # fmt: skip
    launch(world, HERE.parent / "engine" / "train.py", HERE / "micro_recipe.toml", *options)
    return [json.loads(line) for line in (folder / "micro" / "metrics.jsonl").read_text().splitlines()], folder / "micro"


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory) -> list[dict]:
    """Metrics of the recipe on one process."""
    return run_recipe(tmp_path_factory.mktemp("one"), 1)[0]


TENSOR = ("--parallel.tensor", "2")
SPLIT = ("--parallel.shard", "0", "--parallel.activation_checkpointing", "true", "--stages.zero.micro_batch_tokens", "64")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize(
    "world, changes",
    [(2, SPLIT), (4, ("--parallel.shard", "2", *SPLIT[2:])), (2, TENSOR), (4, (*TENSOR, *SPLIT, "--parallel.rollout", "split")),
     (4, (*TENSOR, "--parallel.context", "2", "--stages.zero.micro_batch_tokens", "64"))],
    ids=["fsdp", "hsdp", "tensor", "tensor and fsdp", "tensor and context"],
)
def test_a_sharded_run_draws_the_samples_of_one_process(tmp_path, run_alone, world, changes):
    split, _ = run_recipe(tmp_path / "split", world, *changes)
    assert [(row["stage"], row["step"]) for row in run_alone] == [(row["stage"], row["step"]) for row in split]
    for one, other in zip(run_alone, split, strict=True):
        # Rewards, lengths and the like are means over samples, equal as long as each sample is.
        for name in ("reward", "mean_tokens", "truncated_rate", "accuracy", "format", "zero_advantage_rate", "pair_accuracy", "tokens"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-12)), (name, one, other)
        for name in ("loss", "entropy", "grad_norm", "kl_ref"):
            assert one.get(name) == (None if name not in one else pytest.approx(other[name], rel=1e-3, abs=1e-7)), (name, one, other)
        assert other.get("logp_gap_max", 0) < 1e-5


@pytest.fixture
def mesh(request):
    """A device mesh of one rank: FSDP's hooks, types and copies without a second process."""
    device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(device, (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


ON_BOTH = pytest.mark.parametrize("mesh", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def split_model(mesh, dtype: torch.dtype, lr: float, **parallel):
    model = Decoder(sharding_worker.MODELS["qwen3"]).initialize_(0).to(dtype)
    fully_shard_(model, mesh, ParallelConfig(shard=0, **parallel))
    ranks = Ranks(mesh.device_type, threads=1)
    return ranks, model, Optimizer(model, OptimizerConfig(lr=lr, warmup_steps=0), ranks)


def steps(ranks, model, optimizer, num_steps: int, lr: float) -> None:
    for step in range(num_steps):
        prompts, completions = sharding_worker.sequences(step, 48)
        batches = packed_batches(model, ranks, prompts, completions, 48)
        num_targets = sum(batch.num_targets for batch in batches)
        cross_entropy_step(model, optimizer, [batches], num_targets, lr, RouterBalance(model, TrainConfig(), ranks))


@ON_BOTH
@pytest.mark.parametrize("offload", [False, True])
def test_a_bf16_model_computes_in_bf16_and_keeps_fp32(mesh, offload):
    """Steps far below a last bit of bf16 add up, and the rollout gets the rounded sum at the same addresses."""
    ranks, model, optimizer = split_model(mesh, torch.bfloat16, 1e-5, offload=offload)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    if offload:
        assert all(p.to_local().is_cpu for p in model.parameters())
    full = FullWeights(model)
    before = {name: p.clone() for name, p in full.model.named_parameters()}
    addresses = [p.data_ptr() for p in full.model.parameters()]
    assert all(p.dtype == torch.bfloat16 and p.device.type == mesh.device_type for p in full.model.parameters())
    steps(ranks, model, optimizer, 4, 1e-5)
    assert all(value.dtype == torch.float32 and value.device == p.to_local().device
               for p in model.parameters() for part in optimizer.parts for value in part.state[p].values())  # fmt: skip
    full.refresh()
    assert weights_hash(full.model) == weights_hash(model)
    assert addresses == [p.data_ptr() for p in full.model.parameters()]
    moved = kept = 0
    for name, p in split_parameters(model).items():
        assert torch.equal(p.full_tensor().bfloat16().to(before[name].device), full.model.get_parameter(name))
        moved += int((p.full_tensor().to(before[name].device) != before[name].float()).sum())
        kept += int((full.model.get_parameter(name) == before[name]).sum())
    total = sum(p.numel() for p in full.model.parameters())
    assert moved > 0.9 * total and kept > 0.9 * total  # in fp32 nearly all have moved, in bf16 nearly none


@ON_BOTH
def test_a_model_split_over_one_rank_is_the_model(mesh):
    ranks, split, optimizer = split_model(mesh, torch.float32, 1e-2, activation_checkpointing=True)
    steps(ranks, split, optimizer, 2, 1e-2)
    plain = Decoder(sharding_worker.MODELS["qwen3"]).initialize_(0).to(ranks.device)
    plain_optimizer = Optimizer(plain, OptimizerConfig(lr=1e-2, warmup_steps=0), ranks)
    steps(ranks, plain, plain_optimizer, 2, 1e-2)
    assert all(torch.equal(p.full_tensor(), plain.get_parameter(name)) for name, p in split_parameters(split).items())


@pytest.mark.gpu
@pytest.mark.parametrize("mesh", ["cuda"], indirect=True)
def test_captured_steps_see_the_refreshed_weights(mesh):
    """A generator on the whole copy, its graphs captured before the step: afterwards it draws what a fresh one draws."""
    ranks, model, optimizer = split_model(mesh, torch.bfloat16, 1e-2)
    full = FullWeights(model)
    requests = [Request(np.arange(1, 9), np.arange(4)), Request(np.arange(20, 40), np.arange(4))]
    generator = Generator(full.model, {66}, max_rows=8)
    sampling = SamplingConfig(max_tokens=24)
    generator.generate(requests, sampling)
    version = generator.version
    steps(ranks, model, optimizer, 3, 1e-2)
    full.refresh()
    assert generator.version > version
    for one, other in zip(generator.generate(requests, sampling), Generator(full.model, {66}, max_rows=8).generate(requests, sampling), strict=True):
        assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True))
