"""Does memory grow over reinforcement learning:  python tests/memory_slope.py [--steps 200] [--plot FILE]

One process trains a small model by GRPO on chains of two to eight terms, so that prompts, samples, micro-batches and KV blocks differ from step to
step.  Of every step: the peak of anonymous memory (by the kernel's high-water mark, set back before each step) and the addresses of the KV pool; of
every fifth: what is resident when the freed memory is given back, and bytes of all live tensors.  The slope is that of a least-squares line over the
steps behind the first quarter, times their number, as a share of the mean.  The last line on stdout is one JSON object.
"""

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from athanor import pipeline
from athanor.config import RecipeConfig
from athanor.recipe_io import load_recipe
from athanor.stages import grpo
from athanor.stages.training import TrainingLoop

EVERY = 5
OVERRIDES = {
    "stages.base.steps": 30, "stages.base.save_every": 100, "stages.zero.save_every": 10, "stages.zero.prompts_per_step": 8,
    "stages.zero.sampling.max_tokens": 64, "stages.zero.loss_overrides.reference_interval": 50, "until": "zero", "evaluation.stages": "[]",
    "stages.zero.optimizer.lr": 1e-6, "tasks.chain.settings.max_terms": 8, "device": "cpu",
    "models.main.hidden_size": 32, "models.main.num_hidden_layers": 2,
}  # fmt: skip


def status(name: str) -> int:
    """Bytes of an entry of the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Without pages of files, such as libraries, which come and go with what other processes do."""
    return status("RssAnon")


def peak() -> int:
    """The high-water mark of `resident` since `forget_peak`."""
    return status("VmHWM") - status("RssFile") - status("RssShmem")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def live_tensors() -> int:
    """Bytes of the storages of all tensors that Python can reach."""
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def slope(values: list[float]) -> float:
    """Growth along a fitted line over the values behind the first quarter, as a share of their mean."""
    kept = np.array(values[len(values) // 4 :], np.float64)
    return float(np.polyfit(np.arange(len(kept)), kept, 1)[0] * len(kept) / kept.mean())


def measure(steps: int, run_root: str) -> dict[str, list]:
    """Figures of each step by name."""
    libc = ctypes.CDLL("libc.so.6")
    rows: dict[str, list] = {name: [] for name in ("peak", "resident", "tensors", "pool", "tokens")}
    generators = []
    rollout_generator, own_steps = grpo.rollout_generator, TrainingLoop.steps

    def noted(*args, **options):
        generators.append(rollout_generator(*args, **options))
        return generators[-1]

    def measured(self, total, figures):
        for step, metrics in own_steps(self, total, figures):
            forget_peak()
            yield step, metrics
            if self.context.name == "zero":
                rows["peak"].append(peak())
                if step % EVERY == 0:
                    gc.collect()
                    libc.malloc_trim(0)
                    rows["resident"].append(resident())
                    rows["tensors"].append(live_tensors())
                rows["pool"].append([part.data_ptr() for part in (*generators[0].cache.keys, *generators[0].cache.values)])
                rows["tokens"].append(metrics["mean_tokens"])

    grpo.rollout_generator, TrainingLoop.steps = noted, measured
    settings = {"stages.zero.steps": steps, "run_root": run_root} | OVERRIDES
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    pipeline.run(load_recipe(RecipeConfig, str(Path(__file__).with_name("micro_recipe.toml")), words), "memory_slope")
    return rows


def summary(rows: dict[str, list]) -> dict:
    pools = [tuple(pool) for pool in rows["pool"]]
    moves = [i for i in range(1, len(pools)) if pools[i] != pools[i - 1]]
    found = {f"{name}_slope": slope(rows[name]) for name in ("peak", "resident", "tensors")}
    found |= {f"{name}_mib": float(np.mean(rows[name][len(rows[name]) // 4 :])) / 2**20 for name in ("peak", "resident", "tensors")}
    lengths = rows["tokens"]
    return found | {"steps": len(pools), "pool_moves": moves, "shortest_mean_tokens": min(lengths), "longest_mean_tokens": max(lengths)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.steps, folder)
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        for name in ("peak", "resident"):
            axes.plot(np.linspace(0, options.steps, len(rows[name]), endpoint=False), np.array(rows[name]) / 2**20, label=name)
        axes.set(xlabel="step", ylabel="MiB")
        axes.legend()
        figure.savefig(options.plot, bbox_inches="tight")
    print(json.dumps(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
