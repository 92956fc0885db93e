"""Updates whose loss or gradient is not finite: not applied, counted, and their batch kept for a replay.

    RUN/skipped/STAGE-step-00000012-1.pt    the first skipped update of the stage, in step 12, with the micro-batches of all ranks

`torch.load(path, weights_only=True)` reads it.  The weights that it failed with are those of the state that the run saves when the step is over: a
skipped update leaves them as they were.
"""

import dataclasses
import io

import numpy as np
import torch
from torch import Tensor

from athanor.atomic import write_file
from athanor.config import TrainConfig
from athanor.errors import UserError
from athanor.stages.context import StageContext


def record_skip(context: StageContext, config: TrainConfig, extra: dict, step: int, figures: dict[str, float], replay: dict) -> None:
    """Count a skipped update of 1-based `step` in `extra`, write what it was computed from, stop after too many in a row.  All ranks call it.

    figures: what was not finite.  replay: dataclasses, lists, dicts, arrays, tensors and plain values; this rank's.
    Raises UserError after `max_skipped_in_row` of them.
    """
    extra["skipped_updates"] = extra.get("skipped_updates", 0) + 1
    extra["skipped_in_row"] = extra.get("skipped_in_row", 0) + 1
    path = context.run_dir / "skipped" / f"{context.name}-step-{step:08d}-{extra['skipped_updates']}.pt"
    parts = context.ranks.concatenate([_plain(replay | {"rank": context.ranks.rank, **figures})])[0]
    if context.ranks.is_main:
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"stage": context.name, "step": step, "seed": context.recipe.seed, "parts": parts}, buffer)
        write_file(path, buffer.getvalue())
    said = ", ".join(f"{name} {value}" for name, value in figures.items())
    if extra["skipped_in_row"] >= config.max_skipped_in_row:
        raise UserError(
            f"stage {context.name}, step {step}: {extra['skipped_in_row']} updates in a row were not finite ({said}), as many as max_skipped_in_row; "
            f"wanted finite losses and gradients (a lower learning rate, other data); the last batch is {path}"
        )
    context.console.note(f"warning: {context.name}, step {step}: an update is skipped, it is not finite ({said}); its batch is {path}")


def _plain(value):
    """What weights-only loading takes: tensors on the CPU, dicts, lists, numbers and text."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return value.item() if isinstance(value, np.generic) else value
