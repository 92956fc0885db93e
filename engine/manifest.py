"""manifest.json: which stage of a run is done, from which inputs, with which outputs, proven by hashes.

A stage is identified by its key, a hash over everything that decides its result (`hash_config`).  It counts as done when the recorded
key equals the wanted one and the files still have the recorded hashes; it starts only from inputs that are what their producing stage
recorded.  Every change is written atomically, so a kill at any moment leaves the last complete state.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from athanor.atomic import replace_folder, write_file
from athanor.errors import UserError

MANIFEST_NAME = "manifest.json"


def hash_config(value) -> str:
    """sha256 of JSON data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def hash_path(path: Path | str) -> str:
    """sha256 of a file's bytes; of a folder: over its sorted relative file names, each with the hash of its content.  UserError if absent."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path} does not exist; wanted a file or folder that a stage wrote")
    digest = hashlib.sha256()
    for file in sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix()):
        # a name cannot hold NUL and the content hash has a fixed length: two different folders never give the same stream
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + bytes.fromhex(hash_path(file)))
    return digest.hexdigest()


def code_version() -> str:
    """Version of the package, with the git commit (and `+changes`) when it runs from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        package = version("athanor")
    except PackageNotFoundError:
        package = "unknown"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return package

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None  # no git, or not the owner's checkout: the version alone must do

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return package
    return f"{package} ({commit}{'+changes' if git('status', '--porcelain', '--untracked-files=no') else ''})"


class Manifest:
    """The stages of one run folder.  `data` is what manifest.json holds; change it through the methods only.

    Per stage: status "pending" | "running" | "done", key, inputs and outputs {name: {path, sha256}}, metrics, gates, wall_s (summed over
    restarts), started, finished, code_version, seed, adopted_from (the run it was copied from, or null).
    """

    def __init__(self, run_dir: Path | str, *, seed: int | None = None, version: str | None = None):
        self.run_dir = Path(run_dir)
        self._path = self.run_dir / MANIFEST_NAME
        self._seed = seed
        self._version = version
        self.data = _read(self._path) if self._path.exists() else {"format": 1, "run": {}, "stages": {}}

    @property
    def stages(self) -> dict[str, dict]:
        return self.data["stages"]

    def declare(self, names: list[str]) -> None:
        """List the stages of the recipe in order; those without an entry become pending, entries that are no longer in the recipe go."""
        self.data["stages"] = {name: self.stages.get(name, _pending()) for name in names}
        self._write()

    def set_run_facts(self, **facts) -> None:
        """Record facts of the whole run (recipe, seed, machine, torch, peak memory, wall_s ...), shown at the end of the report."""
        self.data["run"].update(facts)
        self._write()

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the stage finished with this key, from the inputs as they are now, and its outputs are there.

        Raises UserError, naming both hashes and what to delete, when an output is not the file that the stage recorded.
        An output that was deleted makes the stage undone, without an error: deleting is how one asks for it again.
        """
        entry = self.stages.get(stage)
        if entry is None or entry["status"] != "done" or entry["key"] != key:
            return False
        for name, output in entry["outputs"].items():
            found = self._hash_if_present(output["path"])
            if found == "nothing":
                return False
            if found != output["sha256"]:
                raise UserError(
                    f"stage {stage}: output {name} ({self._full(output['path'])}) has sha256 {found}, the manifest recorded {output['sha256']};"
                    " restore it, or delete it to run the stage again"
                )
        # a stage upstream that was run again gives another input: then this one is out of date
        return all(self._expected_hash(item["path"], item["sha256"]) == item["sha256"] for item in entry["inputs"].values())

    def begin(self, stage: str, key: str, inputs: dict[str, Path | str]) -> bool:
        """Mark the stage as running from these inputs and return whether it goes on (same key and inputs as a begun, unfinished one).

        Raises UserError, naming both hashes, when an input is not what the producing stage recorded (or, for a file from outside, not what
        this stage had begun with).
        """
        recorded = {name: self._record_input(stage, name, path) for name, path in inputs.items()}
        entry = self.stages.get(stage)
        resumes = entry is not None and entry["status"] == "running" and entry["key"] == key
        if resumes:
            for name, item in recorded.items():
                before = entry["inputs"].get(name)
                if before is None or before["path"] != item["path"]:
                    resumes = False
                elif before["sha256"] != item["sha256"] and self._producer(item["path"]) is None:
                    raise UserError(
                        f"stage {stage}: input {name} ({self._full(item['path'])}) has sha256 {item['sha256']}, but the stage began with"
                        f" {before['sha256']}; restore the file, or start the run afresh with --overwrite"
                    )
                resumes = resumes and before["sha256"] == item["sha256"]
        if not resumes:
            entry = _pending() | {"key": key, "inputs": recorded, "started": _now()}
        entry |= {"status": "running", "code_version": self._version or code_version(), "seed": self._seed, "wall_s_before": entry["wall_s"]}
        self.stages[stage] = entry
        self._write()
        return resumes

    def record_wall(self, stage: str, wall_s: float) -> None:
        """Note the seconds that this process has spent in the stage so far: call it beside every checkpoint, so that a kill keeps the sum."""
        entry = self._running(stage)
        entry["wall_s"] = round(entry["wall_s_before"] + wall_s, 3)
        self._write()

    def finish(self, stage: str, outputs: dict[str, Path | str], metrics: dict, wall_s: float, *, gates: dict | None = None) -> None:
        """Mark the stage as done: hash its outputs, store metrics and gates ({name: {"value", "wanted", "passed"}}), add this process's seconds."""
        entry = self._running(stage)
        entry |= {
            "status": "done",
            "outputs": {name: {"path": self._relative(path), "sha256": hash_path(path)} for name, path in outputs.items()},
            "metrics": metrics,
            "gates": gates or {},
            "wall_s": round(entry.pop("wall_s_before") + wall_s, 3),
            "finished": _now(),
        }
        self._write()

    def update_metrics(self, stage: str, metrics: dict) -> None:
        """Add metrics to a finished stage, such as those of an evaluation that runs after it."""
        self.stages[stage]["metrics"] |= metrics
        self._write()

    def forget(self, stage: str) -> None:
        """Drop what is recorded of a stage: it will run again.  Its files stay."""
        self.stages[stage] = _pending()
        self._write()

    def reuse(self, other_run_dir: Path | str, stage: str, key: str) -> bool:
        """Adopt a finished stage of another run by copying its outputs; returns whether that was possible.

        Possible when the other run finished it with the same key, from inputs with the hashes that this run has, its outputs lie inside
        that run folder with the recorded hashes.  The copies are verified before they take their place.
        """
        other_dir = Path(other_run_dir)
        path = other_dir / MANIFEST_NAME
        if not path.exists() or other_dir.resolve() == self.run_dir.resolve():
            return False
        entry = _read(path)["stages"].get(stage)
        if entry is None or entry["status"] != "done" or entry["key"] != key or not entry["outputs"]:
            return False
        if any(self._expected_hash(item["path"], None) != item["sha256"] for item in entry["inputs"].values()):
            return False
        outputs = entry["outputs"].values()
        if any(Path(item["path"]).is_absolute() or not (other_dir / item["path"]).exists() for item in outputs):
            return False
        if any(hash_path(other_dir / item["path"]) != item["sha256"] for item in outputs):
            return False
        for item in outputs:
            _copy_verified(other_dir / item["path"], self.run_dir / item["path"], item["sha256"])
        self.stages[stage] = entry | {"adopted_from": str(other_dir.resolve())}
        self._write()
        return True

    def _record_input(self, stage: str, name: str, path: Path | str) -> dict:
        relative = self._relative(path)
        found = self._hash_if_present(relative)
        if found == "nothing":
            raise UserError(f"stage {stage}: input {name} ({path}) does not exist")
        producer = self._producer(relative)
        if producer is not None:
            producing_stage, output, expected = producer
            if found != expected:
                raise UserError(
                    f"stage {stage}: input {name} ({self._full(relative)}) has sha256 {found}, but stage {producing_stage} recorded {expected}"
                    f" for its output {output}; restore it, or delete it to run stage {producing_stage} again"
                )
        return {"path": relative, "sha256": found}

    def _producer(self, relative: str) -> tuple[str, str, str] | None:
        for stage, entry in self.stages.items():
            for name, output in entry["outputs"].items():
                if entry["status"] == "done" and output["path"] == relative:
                    return stage, name, output["sha256"]
        return None

    def _expected_hash(self, relative: str, default: str | None) -> str | None:
        """What a path should hash to: its producing stage's record, else (a file from outside) what it is now, else `default`."""
        producer = self._producer(relative)
        if producer is not None:
            return producer[2]
        found = self._hash_if_present(relative)
        return default if found == "nothing" else found

    def _running(self, stage: str) -> dict:
        entry = self.stages.get(stage)
        if entry is None or entry["status"] != "running":
            raise ValueError(f"Manifest: stage {stage} is {entry['status'] if entry else 'unknown'}, wanted running (call begin first)")
        return entry

    def _hash_if_present(self, relative: str) -> str:
        return hash_path(self._full(relative)) if self._full(relative).exists() else "nothing"

    def _full(self, relative: str) -> Path:
        return self.run_dir / relative  # an absolute right side stays as it is

    def _relative(self, path: Path | str) -> str:
        absolute, root = Path(os.path.abspath(path)), Path(os.path.abspath(self.run_dir))
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)

    def _write(self) -> None:
        write_file(self._path, json.dumps(self.data, indent=2, ensure_ascii=False, default=_plain_number) + "\n")


def _read(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
        if data["format"] == 1 and isinstance(data["stages"], dict):
            return data
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: not a manifest of this version; wanted JSON with format 1 and stages; give the run a new name, or --overwrite")


def _pending() -> dict:
    return {
        "status": "pending",
        "key": None,
        "inputs": {},
        "outputs": {},
        "metrics": {},
        "gates": {},
        "wall_s": 0.0,
        "started": None,
        "finished": None,
        "code_version": None,
        "seed": None,
        "adopted_from": None,
    }


def _copy_verified(source: Path, target: Path, sha256: str) -> None:
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        data = source.read_bytes()
        _check_copy(source, hashlib.sha256(data).hexdigest(), sha256)
        write_file(target, data)
        return
    with replace_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        _check_copy(source, hash_path(folder), sha256)


def _check_copy(source: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"copy of {source} has sha256 {found}, its run recorded {expected}: it changed while it was copied; start again")


def _plain_number(value):
    if hasattr(value, "item"):  # numpy scalars and 0-d tensors
        return value.item()
    raise TypeError(f"manifest: {type(value).__name__} is no JSON data")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
