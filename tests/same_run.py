"""Two run folders, file by file: what a run made must be the same bytes, but for times and for what names the machine.

    python tests/same_run.py RUN RUN      prints what differs, one line each; exit status 1 when anything does
"""

import json
import sys
from pathlib import Path

SHARED_OUT = {"reward_busy_share", "rollout_idle_share", "rollout_handed_over"}  # how ranks and workers shared the work


def made(run: Path) -> dict[str, bytes]:
    """Samples, data, weights, evaluations and transcripts of a run by name, its metrics line by line, and what its manifest says of each stage."""
    names = [path for folder in ("checkpoints", "data", "evaluations", "transcripts") for path in sorted((run / folder).rglob("*")) if path.is_file()]
    found = {str(path.relative_to(run)): path.read_bytes() for path in [*names, *run.glob("samples.jsonl")]}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if not (name in SHARED_OUT or name.endswith("_s"))}
        found[f"metrics.jsonl {row['stage']} {row['step']}"] = json.dumps(row).encode()
    for stage, entry in json.loads((run / "manifest.json").read_text())["stages"].items():
        found[f"manifest.json {stage}"] = json.dumps({name: entry.get(name) for name in ("status", "key", "outputs", "metrics", "gates")}).encode()
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What is not in both, or not the same in both."""
    a, b = made(one), made(other)
    lost = [f"{name}: only in {one if name in a else other}" for name in sorted(a.keys() ^ b.keys())]
    unlike = [name for name in a if name in b and a[name] != b[name]]
    return lost + [f"{name}: {_first(a[name], b[name])}" for name in unlike]


def _first(one: bytes, other: bytes) -> str:
    """The metrics that differ, or where two files part."""
    try:
        a, b = json.loads(one), json.loads(other)
        return ", ".join(f"{name} {a.get(name)} and {b.get(name)}" for name in a | b if a.get(name) != b.get(name))
    except (ValueError, AttributeError, TypeError):
        at = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
        return f"{len(one)} and {len(other)} bytes, the first that differs is {at}"


if __name__ == "__main__":
    found = differences(*map(Path, sys.argv[1:3]))
    print("\n".join(found[:40]) or f"{len(made(Path(sys.argv[1])))} files and lines of metrics, the same bits")
    sys.exit(1 if found else 0)
