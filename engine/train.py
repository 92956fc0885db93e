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

SWITCHES = ("quick", "debug", "overwrite", "dry-run", "list", "help")
USAGE = """usage: torchrun engine/train.py [RECIPE] [--key.path VALUE ...] [--quick] [--overwrite] [--debug]
       torchrun engine/train.py [RECIPE or SHAPE] --plan [--plan.key.path VALUE ...]     (--plan --help lists all)
       torchrun engine/train.py eval --model DIR --task NAME [--data FILE] [--k K] [--limit N] ...   (eval --help lists all)

  RECIPE        a packaged recipe ({recipes}) or a TOML file; default: tiny
  --quick       the recipe's [quick] settings: all stages in a minute or two, no claims
  --overwrite   start afresh in a run folder that exists
  --plan        print memory and time per rank and the parallel layout that fits a cluster; nothing runs
  --dry-run     check the recipe, its data and its models' shapes, add up tokens per stage, and run nothing
  --debug       tracebacks
  --list        recipes, tasks, rewards, losses and kinds of stages
  --help TOPIC  {topics}

A run that was stopped goes on when the same command is given again.  `athanor doctor` says what this machine can run.
"""


def main(argv: list[str]) -> int:
    debug = "--debug" in argv
    try:
        from athanor.errors import UserError
        from athanor.preemption import Stopped
    except ImportError as error:
        print(f"train.py: {error}; install the package first: pip install -e .", file=sys.stderr)
        return 2
    try:
        run = _evaluate if argv[:1] == ["eval"] else _plan if "--plan" in argv else _train
        result = run([argument for argument in argv if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        # Not 0 where one node of many may be told to leave while the others wait for its successor (launch/kubernetes.yaml).
        return int(os.environ.get("ATHANOR_STOPPED_STATUS", "0"))
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
    if switches & {"help", "list"}:
        _explain(argv, positional, listed="list" in switches)
        return {}
    if len(positional) > 1:
        from athanor.errors import UserError

        raise UserError(f"unexpected argument {positional[1]!r}, wanted at most one recipe")
    name = positional[0] if positional else "tiny"
    recipe = load_recipe(RecipeConfig, name, overrides, quick="quick" in switches)
    if "dry-run" in switches:
        from athanor.dry_run import dry_run

        return dry_run(recipe, name)
    _keep_freed_memory()
    from athanor import preemption
    from athanor.pipeline import run

    preemption.listen()
    return run(recipe, name, overwrite="overwrite" in switches)


def _evaluate(argv: list[str]) -> dict:
    from athanor import preemption
    from athanor.evaluation import command

    preemption.listen()
    _keep_freed_memory()
    return command(argv[1:])


def _plan(argv: list[str]) -> dict:
    from athanor.planner.command import command

    return command(argv)


def _explain(argv: list[str], positional: list[str], *, listed: bool) -> None:
    from athanor.catalogue import TOPICS, help_on, listing
    from athanor.recipe_io import RECIPES_DIR

    if listed:
        print(listing())
    elif topic := next((word for word in argv[argv.index("--help") + 1 :][:1] if word in positional), ""):
        print(help_on(topic))
    else:
        print(USAGE.format(recipes=", ".join(sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))), topics=TOPICS))


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
