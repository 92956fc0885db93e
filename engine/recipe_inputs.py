"""What a recipe reads from disk before its first stage: model folders, files of tasks, data files.  Each that is missing has one line to say so."""

from collections.abc import Iterator
from pathlib import Path

from athanor.config import RecipeConfig
from athanor.samples import SPLITS


def missing_inputs(recipe: RecipeConfig) -> dict[str, str]:
    """What is not there: path -> one line that says which key names it, where it comes from and where it belongs."""
    missing: dict[str, str] = {}
    for key, path in named_paths(recipe):
        there = Path(path).is_dir() if key.startswith("checkpoints.") else Path(path).exists()
        if not there and path not in missing:
            how = recipe.downloads.get(path)
            advice = f"{how}; put it at {path}" if how else f"wanted a {'model folder' if key.startswith('checkpoints.') else 'file'}"
            missing[path] = f"{key}: {path} does not exist; {advice}, or name another one"
    return missing


def absent_tasks(recipe: RecipeConfig, missing: dict[str, str]) -> set[str]:
    """Tasks that cannot be built for want of a file."""
    return {key.split(".")[1] for key, path in named_paths(recipe) if key.startswith("tasks.") and path in missing}


def named_paths(recipe: RecipeConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, path) of every checkpoint and file of a task, and of the other files that `downloads` knows."""
    for name, path in recipe.checkpoints.items():
        yield f"checkpoints.{name}", path
    for name, task in recipe.tasks.items():
        kind, _, path = task.kind.partition(":")
        if path and kind != "gym":
            yield f"tasks.{name}.kind", path
        for split in SPLITS:
            paths = task.settings.get(split) or []
            for path in [paths] if isinstance(paths, str) else paths:
                yield f"tasks.{name}.settings.{split}", str(path)
    for name, stage in recipe.stages.items():
        for field in ("data", "mixed", "decontaminate"):
            for path in getattr(stage, field, []):
                if path in recipe.downloads and path not in recipe.stages and path not in recipe.tasks:
                    yield f"stages.{name}.{field}", path
