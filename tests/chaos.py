"""The kill matrix:  python tests/chaos.py [--ranks 1 2] [--chains 1 2 3] [--background]

A micro recipe with all kinds of stages is killed (SIGKILL) at every point of POINTS, resumed by the same command, and compared with a run that
nothing interrupted: tokens and log-probs of all samples, weights and optimizer state after every update, metrics lines without times, data, exported
models, evaluations and the last line of stdout, bit for bit.  The points are spread over three runs, each of which is killed at a third of them; what
a process did is compared as soon as it is dead.  --background: the killed runs write their states in the background.  Prints a table and ends with 1
when anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SHORT = {
    "stages.base.steps": 12, "stages.base.save_every": 4, "stages.base.docs_per_step": 8, "stages.zero.steps": 4, "stages.student.save_every": 2,
    "stages.judge.num_examples": 10, "stages.guard.num_examples": 10, "evaluation.stages": '["zero", "general"]', "evaluation.num_problems": 4,
}  # fmt: skip


OF_TIME = ("rollout_idle_share", "rollout_handed_over")  # metrics besides seconds


@dataclass(frozen=True)
class Point:
    """Where a process dies: at the call-th call of a function in a stage, before it or after."""

    what: str
    stage: str
    at: str
    call: int = 1
    after: bool = False
    inside: str = ""
    rank: int = 0  # where there are two

    def fault(self, world: int) -> dict:
        facts = {"at": self.at, "call": self.call, "stage": self.stage, "do": "kill", "after": self.after, "rank": min(self.rank, world - 1)}
        return facts | ({"inside": self.inside} if self.inside else {})


STEP, SAVE, SCORE = "athanor.optim:Optimizer.step", "athanor.checkpoint:write_state", "athanor.rewards.service:RewardService.score"
EXPORT, SAMPLE, WRITE = "athanor.stages.context:export_model", "athanor.rollout:Sample", "athanor.metrics:MetricsWriter.write"
BEGIN, FINISH, DISCARD = ("athanor.manifest:Manifest.begin", "athanor.manifest:Manifest.finish", "athanor.stages.context:StageContext.discard_state")
POINTS = [
    Point("documents", "base", "athanor.stages.pretrain:_documents", 3, rank=1),
    Point("forward", "base", "athanor.stages.training:_scored", 2, rank=1),
    Point("before an update", "base", STEP, 3, rank=1),
    Point("after an update", "base", STEP, 3, after=True),
    Point("state, before the first fsync", "base", "os:fsync", 2, inside=SAVE),
    Point("state, after an fsync", "base", "os:fsync", 3, after=True, inside=SAVE),
    Point("state, before its rename", "base", "os:rename", inside=SAVE),
    Point("state, after its rename", "base", "os:rename", after=True, inside=SAVE),
    Point("before the metrics line", "base", WRITE, 2),
    Point("after the metrics line", "base", WRITE, 2, after=True),
    Point("hand-off, before an fsync", "base", "os:fsync", 2, inside=EXPORT),
    Point("hand-off, before the rename", "base", "os:rename", inside=EXPORT),
    Point("hand-off, after the rename", "base", "os:rename", after=True, inside=EXPORT),
    Point("hand-off, before the manifest", "base", FINISH),
    Point("hand-off, after the manifest", "base", FINISH, after=True),
    Point("hand-off, before the states go", "base", DISCARD, 1),
    Point("next stage, before it is begun", "zero", BEGIN),
    Point("next stage, after it is begun", "zero", BEGIN, after=True),
    Point("rollout, between samples", "zero", SAMPLE, 5, rank=1),
    Point("rollout, further on", "zero", SAMPLE, 12),
    Point("before rewards", "zero", SCORE, 1, rank=1),
    Point("after rewards", "zero", SCORE, 2, after=True),
    Point("between the updates of a rollout", "zero", STEP, 2, rank=1),
    Point("after the updates of a rollout", "zero", STEP, 2, after=True, rank=1),
    Point("state, before its rename", "zero", "os:rename", inside=SAVE),
    Point("state, after its rename", "zero", "os:rename", after=True, inside=SAVE),
    Point("before the reference model", "zero", "athanor.weights:write_model", 1),
    Point("after the reference model", "zero", "athanor.weights:write_model", 1, after=True),
    Point("hand-off, before the manifest", "zero", FINISH),
    Point("samples, before a group is written", "data", "athanor.sample_store:_line", 3, rank=1),
    Point("samples, before they become one file", "data", "athanor.sample_store:_write"),
    Point("samples, after they became one file", "data", "athanor.sample_store:_write", after=True),
    Point("before the data", "data", "athanor.stages.rejection:write_file"),
    Point("between data and statistics", "data", "athanor.stages.rejection:write_file", 2),
    Point("after the data, before the manifest", "data", FINISH),
    Point("after an update", "fine", STEP, 2, after=True, rank=1),
    Point("state, before its rename", "fine", "os:rename", inside=SAVE),
    Point("examples of the policy", "judge", SAMPLE, 3, rank=1),
    Point("before an update", "judge", STEP, 3, rank=1),
    Point("model, between decoder and head", "judge", "athanor.stages.reward_model:save_reward_head"),
    Point("model, before it takes its place", "judge", "os:replace"),
    Point("after an update", "guard", STEP, 3, after=True),
    Point("rollout, between samples", "general", SAMPLE, 7, rank=1),
    Point("after rewards", "general", SCORE, 1, after=True, rank=1),
    Point("between the updates of a rollout", "general", STEP, 4, rank=1),
    Point("state, after its rename", "general", "os:rename", after=True, inside=SAVE),
    Point("before an update", "student", STEP, 3),
    Point("samples", "evaluate.zero", SAMPLE, 4, rank=1),
    Point("before the figures", "evaluate.general", "athanor.pipeline:write_file"),
    Point("before the report", "evaluate.general", "athanor.pipeline:write_report"),
]


def command(folder: Path, world: int, *words: str, restarts: int = 0) -> list[str]:
    """The command line of a run in `folder`; one rank needs no launcher unless it is to be restarted."""
    recipe = [str(TESTS / "micro_recipe.toml"), "--run_root", str(folder), "--device", "cpu"]
    recipe += [word for key, value in SHORT.items() for word in (f"--{key}", str(value))] + list(words)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    return [sys.executable, *(launcher if world > 1 or restarts else []), str(TESTS / "faulty_train.py"), *recipe]


def environment(folder: Path, *faults: dict) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("FAULTS", "TRACE")}
    return inherited | {"OMP_NUM_THREADS": "1", "TRACE": str(folder), "FAULTS": json.dumps(faults)}


def start(folder: Path, world: int, *words: str, faults: list[dict] = (), restarts: int = 0) -> subprocess.CompletedProcess:
    """Run until the end, whatever that is."""
    folder.mkdir(exist_ok=True)
    arguments = command(folder, world, *words, restarts=restarts)
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment(folder, *faults))


def outcome(folder: Path, result: subprocess.CompletedProcess | None = None) -> dict:
    """Everything that two runs must have in common, by name; of an unfinished run, what there is."""
    run, found = folder / "micro", {}
    for path in sorted(folder.glob("trace.*.jsonl")):
        for key, digest in map(json.loads, path.read_text().splitlines()):
            found.setdefault(" ".join(map(str, key)), set()).add(digest)  # a step that is done again must come out the same
    for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else ():
        if line.endswith("\n"):
            row = json.loads(line)
            same = {key: value for key, value in row.items() if not key.endswith("_s") and key not in OF_TIME}
            found[f"metrics {row['stage']} {row['step']}"] = same
    if result is None:
        return found
    found["order of the metrics lines"] = [key for key in found if key.startswith("metrics")]
    for pattern in ("checkpoints/*/*", "data/*", "evaluations/*", "samples.jsonl"):
        files = [path for path in sorted(run.glob(pattern)) if path.is_file()]
        found |= {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    found["checkpoints"] = sorted(path.name for path in run.glob("checkpoints/*"))
    summary = json.loads(result.stdout.splitlines()[-1])
    found["last line"] = {name: {key: value for key, value in row.items() if key != "wall_s"} for name, row in summary["stages"].items()}
    return found


def differences(found: dict, wanted: dict) -> list[str]:
    """Names of what is not as it should be."""
    return [name for name, value in found.items() if wanted.get(name) != value]


def chain(root: Path, world: int, points: list[Point], wanted: dict, *words: str) -> list[tuple[Point, str]]:
    """Kill one run at each of the points in turn, let it end, and say of each point "equal" or what was not.  words: more of its command line."""
    folder = root / f"chain-{world}-{POINTS.index(points[0])}-{len(words)}"
    verdicts = []
    for point in points:
        begun = time.time()
        result = start(folder, world, *words, faults=[point.fault(world)])
        if result.returncode == 0 or "fault: kill" not in result.stderr:
            verdict = f"not reached, status {result.returncode}"
        else:
            verdict = "; ".join(differences(outcome(folder), wanted)[:3]) or "equal"
        verdicts.append((point, verdict))
        print(f"{world} ranks, {point.stage}, {point.what}: {verdict} ({time.time() - begun:.0f} s)", file=sys.stderr, flush=True)
    result = start(folder, world, *words)
    if result.returncode:
        return [(point, f"no end: {result.stderr[-300:]}") for point in points]
    found = outcome(folder, result)
    wrong = differences(found, wanted) + [f"{name} is missing" for name in wanted.keys() - found.keys()]
    return [(point, verdict if not wrong else f"{verdict}, the end: {'; '.join(wrong[:3])}") for point, verdict in verdicts]


def reference(root: Path, world: int) -> dict:
    """The outcome of a run that nothing interrupts."""
    result = start(root / f"whole-{world}", world)
    assert result.returncode == 0, result.stderr[-3000:]
    return outcome(root / f"whole-{world}", result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--background", action="store_true")
    options = parser.parse_args()
    words = ["--background_save", "true"] if options.background else []
    table: dict[Point, dict[int, str]] = {}
    with tempfile.TemporaryDirectory() as root:
        for world in options.ranks:
            wanted = reference(Path(root), world)
            for number in options.chains:
                for point, verdict in chain(Path(root), world, POINTS[number - 1 :: 3], wanted, *words):
                    table.setdefault(point, {})[world] = verdict
    print("| stage | killed | " + " | ".join(f"{world} rank{'s' if world > 1 else ''}" for world in options.ranks) + " |")
    print("|---|---|" + "---|" * len(options.ranks))
    for point in sorted(table, key=POINTS.index):
        print(f"| {point.stage} | {point.what} | " + " | ".join(table[point][world] for world in options.ranks) + " |")
    verdicts = [verdict for row in table.values() for verdict in row.values()]
    print(f"{verdicts.count('equal')} of {len(verdicts)} kills ended as the run that nothing interrupted")
    return int(verdicts.count("equal") < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
