"""A run folder as the pipeline leaves it, without a run: curves that rise and saturate, samples, a manifest.  For the tests of the pages."""

import json
import math
import random

from athanor.manifest import Manifest
from athanor.metrics import MetricsWriter

STAGES = {  # kind, init, pass@1, tokens, reflection, one language, seconds
    "base": ("pretrain", "", 0.213, 14.2, 0.09, 0.86, 128.0),
    "zero": ("grpo", "base", 0.914, 46.8, 0.88, 0.71, 133.4),
    "cold_data": ("rejection", "zero", None, None, None, None, 4.2),
    "cold_start": ("sft", "base", 0.902, 54.1, 0.97, 0.998, 6.3),
    "reasoning_rl": ("grpo", "cold_start", 0.951, 50.2, 0.99, 1.0, 63.0),
    "rejection_sft": ("sft", "base", 0.921, 49.0, 0.98, 0.997, 19.0),
    "reward_model": ("reward_model", "rejection_sft", None, None, None, None, 8.0),
    "general_rl": ("grpo", "rejection_sft", 0.943, 47.5, 0.99, 0.999, 38.5),
    "student_base": ("pretrain", "", 0.141, 12.0, 0.08, 0.85, 24.0),
    "distill": ("distill", "student_base", 0.618, 48.2, 0.98, 0.996, 28.0),
    "student_rl": ("grpo", "student_base", 0.196, 28.0, 0.04, 0.81, 32.0),
}
NOTES = [
    "The pre-training corpus contains the reflective pattern by design: RL selects it, it does not invent it.",
    "128 test problems: the standard error is two to three points.",
]


def make_run(run_dir, *, stages=STAGES, steps=60, facts=True):
    """A run folder as the pipeline leaves it, with curves that rise and saturate."""
    rng = random.Random(0)
    run_dir.mkdir()
    config = {"name": run_dir.name, "seed": 3, "report_notes": NOTES, "reflection_words": ["wait", "check"], "stages": {}}
    config["evaluation"] = {"num_problems": 128, "samples_per_problem": 16, "split": "test", "sampling": {"temperature": 0.6, "top_p": 0.95}}
    for name, (kind, init, *_) in stages.items():
        config["stages"][name] = {"kind": kind, "init": init, "steps": steps, "label": f"What {name.replace('_', ' ')} is in the terms of R1"}
        if kind == "grpo":
            config["stages"][name]["rewards"] = [{"reward": "accuracy", "weight": 1.0}, {"reward": "format", "weight": 1.0}]
    (run_dir / "config.json").write_text(json.dumps(config))
    manifest = Manifest(run_dir, seed=3)
    manifest.declare([*stages, *(f"evaluate.{name}" for name, values in stages.items() if values[2] is not None)])
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for name, (kind, _, accuracy, tokens, reflection, language, wall_s) in stages.items():
            metrics = {}
            for step in range(1, steps + 1) if kind not in ("rejection",) else ():
                rise, noise = 1 - math.exp(-step / (steps / 5)), rng.gauss(0, 0.02)
                if kind == "grpo":
                    row = {
                        "accuracy": 0.15 + rise * (accuracy - 0.3) + noise,
                        "format": 0.7 + 0.29 * rise,
                        "mean_tokens": 14 + rise * (tokens - 14) + 40 * noise,
                    }
                    row |= {"reward": row["accuracy"] + row["format"], "reflection_rate": max(0.0, 0.1 + rise * (reflection - 0.1) + noise)}
                    row |= {
                        "language_consistency": 0.85 + rise * (language - 0.85) + noise / 2,
                        "entropy": 0.6 * math.exp(-step / 30) + 0.15 + noise / 2,
                    }
                    row |= {
                        "logp_gap_max": 10 ** rng.uniform(-6.6, -5.4),
                        "step_s": 10.0,
                        "rollout_s": 5.0,
                        "rollout_prefill_s": 1.0,
                        "rollout_forward_s": 2.0,
                        "rollout_sample_s": 0.5,
                        "rollout_host_s": 0.5,
                        "train_s": 4.0,
                        "grad_norm": 0.3,
                        "loss": noise,
                        "clip_fraction": math.nan,
                        "tokens_per_s": 21000,
                    }
                else:
                    row = {"loss": 2.2 * math.exp(-step / 12) + 0.7 + noise}
                writer.write(name, step, row)
            if kind == "grpo":
                metrics = {"logp_gap_max": 3.4e-6, "loss_formula": "-1/N sum_t min(r_t A, clip(r_t, 0.8, 1.2) A),  r_t = exp(logp - old),  no KL"}
            if accuracy is not None:
                metrics |= {
                    "pass@1": accuracy,
                    "pass@1_se": 0.021,
                    "pass@1_t1": accuracy * 0.8,
                    "cons@16": min(1.0, accuracy + 0.06),
                    "mean_tokens": tokens,
                }
                metrics |= {"reflection_rate": reflection, "format_rate": 0.97, "language_consistency": language}
            if name == "general_rl":
                metrics["open_ended_reward"] = 1.83
                metrics["unsafe_rate"] = 0.125
            manifest.begin(name, "key", {})
            gates = {"competence": {"value": 0.984, "wanted": 0.97, "passed": True}} if kind == "pretrain" else {}
            manifest.finish(name, {}, metrics, wall_s, gates=gates)
    if facts:
        manifest.set_run_facts(recipe="tiny", device="Some CPU @ 2.60GHz", torch="2.13.0", peak_memory_gib=1.234, wall_s=612.3)
    with open(run_dir / "samples.jsonl", "w") as file:
        for problem in range(4):
            first, second, third = (rng.randint(1, 9) for _ in range(3))
            for name in [name for name, values in stages.items() if values[2] is not None]:
                total = first + second + third
                if name.endswith("base"):
                    text, right = f"<think> </think> <answer> {total - 1} </answer>", False
                else:
                    text = f"<think> {first} + {second} + {third} so {first + second} + {third} so {total} check {total} wait {total} ok </think>"
                    text, right = text + f" <answer> {total} </answer>", True
                row = {"stage": name, "problem_id": problem, "prompt": f"User: {first} + {second} + {third} ? Assistant:", "answer": str(total)}
                file.write(json.dumps(row | {"text": text, "correct": right, "finish": "stop"}) + "\n")
    return run_dir
