"""`athanor COMMAND ...`, the same as `python -m athanor COMMAND ...`: the commands of this package that need no launcher.

Training is `torchrun engine/train.py`, and nothing else.
"""

import importlib
import sys

COMMANDS = {  # a module of this package with main(argv): what it does
    "doctor": "what this machine has, and whether the default run can work",
    "generate": "sample from a checkpoint, or chat with it (--chat)",
    "transcripts": "a page of a run's sampled transcripts",
}


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        return importlib.import_module(f".{command}", "athanor").main(rest)
    listed = "\n".join(f"  {name:<12} {says}" for name, says in COMMANDS.items())
    if command in ("--help", "-h"):
        print(f"usage: athanor COMMAND ...  (COMMAND --help says more)\n\n{listed}")
        return 0
    print(f"error: unknown command {command!r}, wanted one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
