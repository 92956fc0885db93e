"""transcripts.html: the samples that a run wrote down (transcript_log.py), best and worst of a step, thoughts folded, tokens coloured by log-prob.

    athanor transcripts runs/NAME        (or python -m athanor.transcripts)

A page of its own like report.html: no script, no request, model text escaped.  Of many steps it shows some, of a long sample its two ends.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from athanor.atomic import write_file
from athanor.console import format_figure
from athanor.errors import UserError

TEMPLATE = Path(__file__).parent / "transcripts.html.j2"
MAX_STEPS = 24  # per stage: the first, the last, and some between them
MAX_HEAD, MAX_TAIL = 1600, 400  # tokens of a sample, where it has more than both; characters are four times as many
LEVELS = (-0.1, -0.5, -1.5, -3.0, -6.0)  # log-probs in nats below which a token gets the next colour


@dataclass(frozen=True)
class Piece:
    """A stretch of text: one token where log-probs are known."""

    text: str
    logp: float | None

    @property
    def level(self) -> int:
        """0 = as good as certain, 5 = a surprise."""
        return 0 if self.logp is None else sum(self.logp < bound for bound in LEVELS)


def write_page(run_dir: Path | str) -> Path | None:
    """Build <run_dir>/transcripts.html and return its path; None where the run wrote no transcripts."""
    import jinja2

    run_dir = Path(run_dir)
    stages = {path.stem: _steps(path) for path in sorted((run_dir / "transcripts").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)}
    stages = {name: steps for name, steps in stages.items() if steps}
    if not stages:
        return None
    coloured = any("logps" in row for steps in stages.values() for step in steps for row in step["rows"])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = format_figure
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run_dir.resolve().name, stages=stages, levels=LEVELS, coloured=coloured
    )
    write_file(run_dir / "transcripts.html", page)
    return run_dir / "transcripts.html"


def split_thought(row: dict) -> tuple[list[Piece], list[Piece]]:
    """(chain of thought with its tags, the rest) of a sample; a sample without a closed thought is all rest."""
    pieces = [Piece(text, logp) for text, logp in zip(row["tokens"], row["logps"], strict=True)] if "tokens" in row else [Piece(row["text"], None)]
    text = "".join(piece.text for piece in pieces)
    end = text.find("</think>")
    end = 0 if end < 0 else end + len("</think>")
    thought, rest, at = [], [], 0
    for piece in pieces:
        cut = min(max(end - at, 0), len(piece.text))
        thought += [Piece(piece.text[:cut], piece.logp)] if cut else []
        rest += [Piece(piece.text[cut:], piece.logp)] if cut < len(piece.text) else []
        at += len(piece.text)
    return thought, rest


def shortened(pieces: list[Piece]) -> list[Piece]:
    """The two ends of a part that is too long for a page, and how much is left out between them."""
    if len(pieces) == 1 and pieces[0].logp is None:
        text, head, tail = pieces[0].text, 4 * MAX_HEAD, 4 * MAX_TAIL
        if len(text) <= head + tail:
            return pieces
        return [Piece(text[:head], None), Piece(f"\n[... {len(text) - head - tail} characters ...]\n", None), Piece(text[-tail:], None)]
    if len(pieces) <= MAX_HEAD + MAX_TAIL:
        return pieces
    left_out = Piece(f"\n[... {len(pieces) - MAX_HEAD - MAX_TAIL} tokens ...]\n", None)
    return [*pieces[:MAX_HEAD], left_out, *pieces[-MAX_TAIL:]]


def _steps(path: Path) -> list[dict]:
    """The steps of a stage that are shown: {step, rows, names of the rewards}; each row with its two parts."""
    found: dict[int, list[dict]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.setdefault(row["step"], []).append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a line of transcripts ({error!r})") from None
    numbers = sorted(found)
    if len(numbers) > MAX_STEPS:
        numbers = sorted({numbers[round(i * (len(numbers) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)})
    steps = []
    for number in numbers:
        rows = found[number]
        for row in rows:
            thought, rest = split_thought(row)
            row["thought_tokens"] = len(thought) if "tokens" in row else None
            row["thought"], row["rest"] = shortened(thought), shortened(rest)
        steps.append({"step": number, "rows": rows, "rewards": list(dict.fromkeys(name for row in rows for name in row["rewards"]))})
    return steps


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = arguments[:1] in (["--help"], ["-h"])
        print(__doc__ if asked else "error: wanted one run folder, as in athanor transcripts runs/tiny", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        path = write_page(arguments[0])
        if path is None:
            raise UserError(f"{arguments[0]}: no transcripts/*.jsonl; RL stages write them, see train.py --help transcripts")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
