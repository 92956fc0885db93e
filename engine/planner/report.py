"""A plan as text for people and as one JSON object."""

from athanor.console import format_duration
from athanor.planner.memory import num_active, num_parameters
from athanor.planner.search import Plan

GB = 1e9
UNBUILT = "not what this engine runs yet: a sampler with expert or tensor parallel ranks of its own, or experts that travel and are sharded besides"


def as_data(plan: Plan, name: str) -> dict:
    """The whole plan: figures in bytes, seconds and tokens, everything that it was told or assumed, and the [parallel] table of a recipe."""
    layout, sampler = plan.training.layout, plan.sampling
    data = {
        "model": name,
        "num_parameters": num_parameters(plan.config),
        "num_active": num_active(plan.config),
        "ranks": plan.cluster.world,
        "fits": plan.fits,
        "parallel": {
            "shard": layout.shard, "replicate": layout.replicate, "context": layout.context, "tensor": layout.tensor, "expert": layout.expert,
            "rollout": "split" if sampler and sampler.layout.tensor > 1 else "whole", "activation_checkpointing": layout.activation_checkpointing,
        },
        "micro_batch_tokens": plan.training.micro_batch_tokens,
        "micro_batches": plan.training.micro_batches,
        "training_bytes": {key: int(value) for key, value in plan.training.memory.items()},
        "peak_bytes": int(plan.peak_bytes),
        "phases_s": plan.phases,
        "step_s": plan.step_s,
        "total_h": plan.step_s * plan.workload.num_steps / 3600,
        "model_flops_utilization": plan.model_flops / plan.step_s / plan.cluster.world / plan.cluster.flops,
        "cluster": vars(plan.cluster),
        "workload": plan.workload.model_dump(),
        "assume": plan.assume.model_dump(),
    }  # fmt: skip
    if sampler:
        data |= {
            "sampler": {"tensor": sampler.layout.tensor, "expert": sampler.layout.expert, "rows": sampler.rows, "kv_tokens": sampler.kv_tokens},
            "rollout_bytes": {key: int(value) for key, value in sampler.memory.items()},
            "drain_s": sampler.drain_s,
        }
    return data


def as_text(plan: Plan, name: str) -> str:
    """A page: the layout, memory per rank while training and while sampling, time per phase, and what was assumed."""
    c, w, layout, sampler = plan.cluster, plan.workload, plan.training.layout, plan.sampling
    lines = [
        f"{name}: {_count(num_parameters(plan.config))} parameters, {_count(num_active(plan.config))} of them met by a token",
        f"{c.nodes} x {c.gpus_per_node} {c.gpu}: {c.flops / 1e12:.4g} TFLOP/s, {c.memory / GB:.3g} GB at {c.memory_bandwidth / GB:.4g} GB/s, "
        f"{c.intra / GB:.3g} GB/s in a node, {c.inter / GB:.3g} GB/s between  ({c.source})",
        "",
        f"[parallel]  shard = {layout.shard}  replicate = {layout.replicate}  context = {layout.context}  tensor = {layout.tensor}  "
        f"expert = {layout.expert}  activation_checkpointing = {str(layout.activation_checkpointing).lower()}",
        f"update      {plan.training.micro_batches} micro-batch{'es' if plan.training.micro_batches > 1 else ''} of up to "
        f"{plan.training.micro_batch_tokens} tokens per {f'{layout.context} ranks' if layout.context > 1 else 'rank'}",
    ]
    tables = [("training", plan.training.memory)]
    if sampler:
        lines.append(
            f"rollout     tensor = {sampler.layout.tensor}  expert = {sampler.layout.expert}; in flight {sampler.rows} samples and pages for "
            f"{sampler.kv_tokens} tokens per {sampler.layout.tensor} rank{'s' if sampler.layout.tensor > 1 else ''}, "
            f"{sampler.rows * (c.world // sampler.layout.tensor)} samples in all"
        )
        tables.append(("rollout", sampler.memory))
    if not plan.is_built:
        lines.append(f"note        {UNBUILT}; without these: --plan.layout.built true")
    lines += ["", f"{'GB per rank':<18}" + "".join(f"{title:>12}" for title, _ in tables)]
    for key in dict.fromkeys(key for _, table in tables for key in table):
        lines.append(f"  {key:<16}" + "".join(f"{_gb(table.get(key)):>12}" for _, table in tables))
    lines.append(f"  {'sum':<16}" + "".join(f"{_gb(sum(table.values())):>12}" for _, table in tables))
    room = c.memory * plan.assume.usable_memory
    lines.append(f"  {'usable':<16}{_gb(room):>12}   {'fits' if plan.fits else f'DOES NOT FIT: {(plan.peak_bytes - room) / GB:.1f} GB too much'}")
    lines += ["", f"{'time per step':<24}{'s':>12}{'share':>8}"]
    lines += [f"  {key.replace('_', ' '):<22}{seconds:>12.4g}{seconds / plan.step_s:>8.1%}" for key, seconds in plan.phases.items()]
    total = f"{w.num_steps} steps: {format_duration(plan.step_s * w.num_steps)} (h:mm:ss)" if w.num_steps > 1 else ""
    lines.append(f"  {'sum':<22}{plan.step_s:>12.4g}          {total}")
    if sampler:
        lines.append(f"  of decoding, {sampler.drain_s:.4g} s with nothing left to refill with: the tail of the longest samples")
    lines.append(f"  {plan.model_flops / plan.step_s / c.world / c.flops:.1%} of the peak in model operations")
    for title, part in (("workload", w), ("assumed", plan.assume)):
        lines += ["", f"{title} (--plan.{'workload' if part is w else 'assume'}.KEY VALUE)"]
        pairs = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in part.model_dump().items()]
        lines += ["  " + "   ".join(pairs[i : i + 4]) for i in range(0, len(pairs), 4)]
    return "\n".join(lines) + "\n"


def _count(n: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if n >= unit:
            return f"{n / unit:.4g} {name}"
    return str(n)


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value / GB:.2f}" if value >= GB / 10 or not value else f"{value / GB:.5f}"
