"""Command line:  python -m athanor.rewards.check FILE.jsonl [--reward NAME[:SETTINGS] ...] [--json] [--rows OUT.jsonl]

Score a file of completions with a table of rewards.  One JSON object per line (.gz too), columns:

  completion   the response: a text, or chat messages                       (required)
  answer       the gold answer; `solution` is another name for it           (rewards that judge answers: a line without one is not judged by them)
  prompt       a text, or chat messages                                     (default "")
  domain       math, code, stem, logic, reasoning, general, safety          (default reasoning)
  language     ISO 639-1 code of the chain of thought                       (default en)
  task, split, id, token_ids; every other column goes into the problem's metadata (the code reward's tests, "extract" of math)

Lines of one prompt are one group.  A missing `token_ids` is counted in words.  Settings are keys and JSON values: overlong:max_tokens=512,buffer=64.
Exit codes: 0, 1 when a reward failed on some line and --strict was given, 2 for what the user can fix, 130 when interrupted.
"""

import argparse
import gzip
import json
import sys

import numpy as np

from athanor.errors import UserError
from athanor.rewards import RewardScores, available_rewards, make_table
from athanor.rewards.base import samples_from_columns
from athanor.rewards.repetition import words_of
from athanor.rewards.table import ON_FAILURE
from athanor.samples import DOMAINS, Sample


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m athanor.rewards.check", description=__doc__.partition("\n\n")[2].rpartition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("file", metavar="FILE.jsonl")
    p.add_argument(
        "--reward", action="append", default=[], metavar="NAME[:KEY=VALUE,...]",
        help="may be given several times (default: math and format); keys are the reward's settings, weight and domain; "
        f"names: {', '.join(available_rewards())}",
    )  # fmt: skip
    p.add_argument("--on-failure", choices=ON_FAILURE, default="drop_sample", help="what becomes of a sample without a verdict (default drop_sample)")
    p.add_argument("--rows", metavar="OUT.jsonl", help="write each line's scores here: total, raw, and one column per reward")
    p.add_argument("--strict", action="store_true", help="exit with 1 when a reward ended in an error or a timeout")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return p


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Score, print and return the exit code; UserError for what the user can fix."""
    table = make_table([reward_line(text) for text in arguments.reward or ["math", "format"]], arguments.on_failure)
    samples = read_samples(arguments.file)
    scores = table.score(samples)
    rows = [_row(name, parts, scores) for name, parts in scores.parts.items()]
    kept = scores.total[scores.applied]
    summary = {"samples": len(samples), "dropped": int(scores.dropped.sum()), "mean_total": float(kept.mean()) if len(kept) else None}
    summary["seconds"] = sum(scores.seconds.values())
    if arguments.rows:
        _write_rows(arguments.rows, scores)
    if arguments.json:
        print(json.dumps(summary | {"rewards": rows}))
    else:
        _print_table(rows, summary)
    return int(arguments.strict and bool(scores.failures))


def reward_line(text: str) -> dict:
    """A line of the table from NAME:KEY=VALUE,...; values are JSON, or else text."""
    name, _, settings = text.partition(":")
    line = {"name": name}
    for pair in filter(None, settings.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--reward {text}: {pair!r}, wanted KEY=VALUE")
        try:
            line[key] = json.loads(value)
        except json.JSONDecodeError:
            line[key] = value
    return line


def read_samples(path: str) -> list[Sample]:
    """Samples of a file.  Raises UserError naming file:line, what was got and wanted."""
    samples = []
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    samples.append(_sample(line, f"{path}:{number}", number))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), wanted a JSONL file") from None
    if not samples:
        raise UserError(f"{path}: no lines, wanted one JSON object per line")
    return samples


def _sample(line: bytes, where: str, number: int) -> Sample:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}), wanted one JSON object per line") from None
    if not isinstance(row, dict) or not isinstance(row.get("completion"), (str, list)):
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no completion, wanted the column `completion` with a text or chat messages, got {got}")
    if row.get("domain", "reasoning") not in DOMAINS:
        raise UserError(f"{where}: domain is {row['domain']!r}, wanted one of {', '.join(DOMAINS)}")
    prompt, completion, token_ids = row.pop("prompt", ""), row.pop("completion"), row.pop("token_ids", None)
    if token_ids is not None and not (isinstance(token_ids, list) and all(isinstance(i, int) for i in token_ids)):
        raise UserError(f"{where}: token_ids is {str(token_ids)[:40]}, wanted a list of integers")
    try:
        (sample,) = samples_from_columns([prompt], [completion], None if token_ids is None else [token_ids], {k: [v] for k, v in row.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}, wanted the columns of --help") from None
    if token_ids is None:
        sample.token_ids = np.zeros(len(words_of(sample.text)), np.int64)
    return sample


def _row(name: str, parts: list, scores: RewardScores) -> dict:
    failures = scores.failures.get(name, {})
    values = [value for value in parts if value is not None]
    row = {"reward": name, "mean": float(np.mean(values)) if values else None, "count": len(values)}
    return row | {"errors": failures.get("error", 0), "timeouts": failures.get("timeout", 0), "seconds": scores.seconds[name]}


def _write_rows(path: str, scores: RewardScores) -> None:
    with open(path, "w") as file:
        for i in range(len(scores.total)):
            row = {"total": float(scores.total[i]), "raw": None if np.isnan(scores.raw[i]) else float(scores.raw[i])}
            row |= {"applied": bool(scores.applied[i]), "dropped": bool(scores.dropped[i])}
            file.write(json.dumps(row | {name: parts[i] for name, parts in scores.parts.items()}) + "\n")


def _print_table(rows: list[dict], summary: dict) -> None:
    width = max(len(row["reward"]) for row in rows)
    print(f"{'reward':<{width}}  {'mean':>8}  {'count':>7}  {'errors':>7}  {'timeouts':>8}  {'seconds':>9}")
    for row in rows:
        mean = "-" if row["mean"] is None else f"{row['mean']:.4f}"
        counts = f"{row['count']:>7}  {row['errors']:>7}  {row['timeouts']:>8}"
        print(f"{row['reward']:<{width}}  {mean:>8}  {counts}  {row['seconds']:>9.2f}")
    total = "-" if summary["mean_total"] is None else f"{summary['mean_total']:.4f}"
    print(f"{summary['samples']} samples, {summary['dropped']} dropped, mean total {total}, {summary['seconds']:.2f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
