"""Command line:  torchrun engine/train.py [RECIPE] [--key.path VALUE ...]   and   torchrun engine/train.py eval --model DIR --task NAME

RECIPE is a packaged name or a TOML file; without one the embedded recipe `tiny` runs: the complete R1 recipe, small, offline, on a CPU.
The last line on stdout is one JSON object.  What a user can fix is one line on stderr and exit code 2 (torchrun itself then exits with 1).
"""

import ctypes
import json
import os
import sys

# `torchrun engine/train.py` puts engine/ itself on the path, where its module names would shadow others.
sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]

SWITCHES = ("quick", "debug", "overwrite", "help")
USAGE = """usage: torchrun engine/train.py [RECIPE] [--key.path VALUE ...] [--quick] [--overwrite] [--debug]
       torchrun engine/train.py eval --model DIR --task NAME [--task.KEY VALUE ...] [--num_problems N] [--samples_per_problem K]
                                     [--split validation|test] [--sampling.temperature T] [--sampling.max_tokens N] [--seed S]

  RECIPE        a packaged recipe ({recipes}) or a TOML file; default: tiny
  --quick       the recipe's [quick] settings: all stages in a minute or two, no claims
  --overwrite   start afresh in a run folder that exists
  --debug       tracebacks
  --help        this text

A run that was stopped goes on when the same command is given again.  Fields (any of them as --key VALUE):
"""


def main(argv: list[str]) -> int:
    debug = "--debug" in argv
    try:
        from athanor.errors import UserError
    except ImportError as error:
        print(f"train.py: {error}; install the package first: pip install -e .", file=sys.stderr)
        return 2
    try:
        result = _evaluate(argv[1:]) if argv[:1] == ["eval"] else _train(argv)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    if result:
        print(json.dumps(result), flush=True)
    return 0


def _train(argv: list[str]) -> dict:
    from athanor.config import RecipeConfig
    from athanor.recipe_io import load_recipe, split_command_line

    positional, overrides, switches = split_command_line(RecipeConfig, argv, SWITCHES)
    if "help" in switches:
        _help(RecipeConfig)
        return {}
    if len(positional) > 1:
        from athanor.errors import UserError

        raise UserError(f"unexpected argument {positional[1]!r}, wanted at most one recipe")
    name = positional[0] if positional else "tiny"
    recipe = load_recipe(RecipeConfig, name, overrides, quick="quick" in switches)
    _keep_freed_memory()
    from athanor.pipeline import run

    return run(recipe, name, overwrite="overwrite" in switches)


def _evaluate(argv: list[str]) -> dict:
    from pydantic import Field

    from athanor.config import Config, SamplingConfig
    from athanor.errors import UserError
    from athanor.recipe_io import load_recipe, split_command_line

    class EvalCommand(Config):
        model: str = ""
        """HuggingFace checkpoint folder."""
        task: str = ""
        """Task kind: arithmetic, courtesy, jsonl:FILE, gym:FAMILY."""
        settings: dict = Field(default_factory=dict)
        """Settings of the task."""
        split: str = "test"
        """validation or test."""
        num_problems: int = Field(128, ge=1)
        """Problems."""
        samples_per_problem: int = Field(16, ge=1)
        """k."""
        sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
        """How samples are drawn."""
        device: str = "auto"
        """auto, cpu or cuda."""
        seed: int = Field(0, ge=0)
        """Key of the samples."""

    positional, overrides, switches = split_command_line(EvalCommand, argv, SWITCHES)
    if "help" in switches:
        _help(EvalCommand)
        return {}
    if positional:
        raise UserError(f"eval: unexpected argument {positional[0]!r}, wanted --key value")
    command = load_recipe(EvalCommand, None, overrides)
    if not command.model or not command.task:
        raise UserError("eval: wanted --model DIR and --task NAME")
    _keep_freed_memory()
    from athanor.config import EvaluationConfig
    from athanor.pipeline import evaluate_folder

    config = EvaluationConfig(
        split=command.split, num_problems=command.num_problems, samples_per_problem=command.samples_per_problem, sampling=command.sampling
    )
    metrics = evaluate_folder(command.model, command.task, command.settings, config, device=command.device, seed=command.seed)
    return {"model": command.model, "task": command.task, "split": command.split, "metrics": metrics}


def _help(model_cls) -> None:
    from athanor.recipe_io import RECIPES_DIR, describe_fields

    print(USAGE.format(recipes=", ".join(sorted(path.stem for path in RECIPES_DIR.glob("*.toml")))))
    print(describe_fields(model_cls))


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: giving every activation back to the kernel costs a third of the CPU time of a training step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library, with an allocator of its own
    for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(parameter, value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
