"""Training state that survives a kill at any instant, and export of a finished model.

    FOLDER/step-00000010/   shard-*.safetensors (of each writing rank), extra.json, checksums.json (SHA-256 of the others)

A state is written under a hidden name, flushed to the disk and renamed, so a step folder is complete; the checksums catch what is damaged later.
The last states are kept: when the newest is damaged, the one before takes its place.  What a state's extra["best"] names by its step is kept, too,
and best.json beside the states is that entry of the newest.
Tensors go through torch.distributed.checkpoint: a rank writes the rows that it holds, and a state is read by any number of ranks, split or not.  What
tensor parallelism has split is gathered, matrix by matrix, and written as rows of the whole.
The folder must be one that all ranks see.

`StateWriter` can do it in the background: it copies the tensors into CPU memory, and a thread of its own writes the copy while the run goes on.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from athanor import atomic, tokenizer, watchdog, weights
from athanor.errors import UserError
from athanor.model.transformer import Decoder
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.sharding import as_rows, assign_, is_sharded
from athanor.tensor_parallel import Split, splits
from athanor.tokenizer import Tokenizer

NUM_KEPT = 2
BEST_NAME = "best.json"


@dataclass(frozen=True)
class State:
    """Which training state was restored."""

    step: int
    extra: dict
    path: Path


class StateWriter:
    """Saves the states of a run, one at a time; `wait` says how that ended.  Every rank has one and makes the same calls.

    background: `save` returns when the tensors are copied, and a thread writes the copy.  The copy takes as much CPU memory as a rank's share of the
    state, once; it is kept for the next save of the same stage.  Leaving the `with` block waits.
    """

    def __init__(self, ranks: Ranks, *, background: bool = False):
        self.ranks, self.background = ranks, background
        # Ranks of a split model agree while they write, which must not mix with what the run exchanges meanwhile.
        self._writing = ranks.twin() if background else ranks
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stager: DefaultStager | None = None

    def save(self, folder: str | Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict, *, keep: int = NUM_KEPT) -> None:
        """Write the state after `step` steps as `save_state` does.  Call `wait` before the next one."""
        assert self._thread is None and self._error is None, "wait for the former state first"
        if not self.background:
            try:
                save_state(folder, step, model, optimizer, extra, self.ranks, keep=keep)
            except Exception as error:
                self._error = error
            return
        _check(step, keep)
        extra, split = _json(extra), is_sharded(model)
        if not (split or self.ranks.is_main):
            return
        if self._stager is None:
            pinned = self.ranks.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned))
        tensors = self._stager.stage(_saved(model, optimizer, self.ranks))  # waits for the device
        options = {"split": split, "keep": keep}
        self._thread = threading.Thread(target=self._write, args=(Path(folder), step, tensors, extra), kwargs=options, name="state writer")
        self._thread.start()

    def _write(self, folder: Path, step: int, *state, **options) -> None:
        try:
            with watchdog.phase("checkpoint", f"state after step {step}, in the background"):
                write_state(folder, step, *state, self._writing, **options)
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that `wait` will raise."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the state is in place, at once where there is none; raise what `save_state` would have raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def release(self) -> None:
        """Give back the memory of the copies."""
        assert self._thread is None
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.wait()
        except (UserError, OSError) as error:
            if kind is None:
                raise
            print(f"warning: {error}", file=sys.stderr)  # what ends the run goes first
        self.release()


def save_state(folder: str | Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict, ranks: Ranks, *, keep: int = NUM_KEPT) -> Path:
    """Write the state after `step` steps, then drop all but the last `keep`; return its folder.  Every rank calls it.

    extra: JSON with string keys, rank 0's.  States beyond `step` are dropped: they belong to a run that this one has replaced.
    Raises ValueError when extra could not be read back, UserError when the folder cannot be written.
    """
    _check(step, keep)
    return write_state(Path(folder), step, _saved(model, optimizer, ranks), _json(extra), ranks, split=is_sharded(model), keep=keep)


def write_state(folder: Path, step: int, tensors: dict[str, Tensor], extra: str, ranks: Ranks, *, split: bool, keep: int) -> Path:
    """`save_state` of tensors by name and of extra as text.  split: some of the tensors are DTensors, and every rank has its part."""
    path = folder / f"step-{step:08d}"
    if not (split or ranks.is_main):
        return path
    with ExitStack() as stack:
        tmp, failure = "", ""
        try:
            tmp = str(stack.enter_context(atomic.replace_folder(path))) if ranks.is_main else ""
        except UserError as error:
            failure = str(error)
        tmp, failure = ranks.broadcast((tmp, failure)) if split else (tmp, failure)
        if failure:
            raise UserError(failure)
        tmp = Path(tmp)
        _without_advice()
        try:
            writer = HuggingFaceStorageWriter(str(tmp), save_distributed=True)
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=not split)
        except dcp.api.CheckpointException as error:
            raise OSError(_reason(error)) from error
        digests = _digests(tmp, ranks, split)
        if not ranks.is_main:
            return path
        (tmp / "extra.json").write_text(extra, encoding="utf-8")
        digests["extra.json"] = _sha256(tmp / "extra.json")
        (tmp / "checksums.json").write_text(json.dumps({"step": step, "sha256": digests}, indent=1), encoding="utf-8")
    if best := json.loads(extra).get("best"):
        atomic.write_file(folder / BEST_NAME, json.dumps(best | {"state": f"step-{best['step']:08d}"}) + "\n")
    # The new state is in place, so whatever still has a hidden name is a dead writer's.
    for hidden in folder.glob(".step-*"):
        shutil.rmtree(hidden)
    last = [s for s in _steps(folder) if s <= step][-keep:]
    kept = {*last, *(_best_step(folder / f"step-{s:08d}") for s in last)}
    for number in set(_steps(folder)) - kept:
        dropped = folder / f".step-{number:08d}.removed"
        os.rename(folder / f"step-{number:08d}", dropped)
        shutil.rmtree(dropped)
    return path


def _best_step(path: Path) -> int | None:
    """The step that a state names as the best so far."""
    try:
        return (json.loads((path / "extra.json").read_text(encoding="utf-8")).get("best") or {}).get("step")
    except (OSError, ValueError):  # damaged: found and named when it is read
        return None


def _digests(tmp: Path, ranks: Ranks, split: bool) -> dict[str, str]:
    """SHA-256 by name of what all ranks have written, each of which reads its share."""
    found, failure = {}, ""
    try:
        files = sorted(file.name for file in tmp.glob("*.safetensors"))
        found = {name: _sha256(tmp / name) for name in (ranks.share(files) if split else files)}
    except OSError as error:
        failure = f"{tmp}: {error.strerror or error}"
    parts = ranks.concatenate([(found, failure)])[0] if split else [(found, failure)]
    if failure := next((failure for _, failure in parts if failure), ""):
        raise OSError(failure)
    return {name: digest for own, _ in parts for name, digest in own.items()}


def load_latest_state(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks, *, step: int | None = None
) -> State | None:
    """Restore model and optimizer from the newest undamaged state; None, and nothing is changed, when there is none.  Every rank calls it.

    step: from that of this step alone.
    A damaged state is named on stderr and passed over, never read.  Raises UserError when a whole one is of another model or optimizer.
    """
    folder = Path(folder)
    if ranks.is_main:
        for aside in folder.glob(".step-*.old"):
            atomic.recover(folder / aside.name[1:].removesuffix(".old"))
    steps = [s for s in sorted(_steps(folder), reverse=True) if step in (None, s)] if ranks.is_main else None
    for step in ranks.broadcast(steps):
        path = folder / f"step-{step:08d}"
        reasons = [reason for reason in ranks.concatenate([_damage(path, step, ranks)])[0] if reason]
        if not reasons:
            extra = json.loads((path / "extra.json").read_text(encoding="utf-8"))
            try:
                _without_advice()
                tensors = _saved(model, optimizer, ranks)
                dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not is_sharded(model))
                for name, (value, split) in _in_parts(model, optimizer).items():
                    assign_(value, tensors[name].full_tensor(), split)
            except dcp.api.CheckpointException as error:
                raise UserError(f"training state {path} is not of this model and optimizer: {_reason(error)}") from error
            return State(step, extra, path)
        if ranks.is_main:
            print(f"warning: training state {path} is damaged ({reasons[0]}); trying the one before", file=sys.stderr)
    return None


def export_model(model: Decoder, tokens: Tokenizer, folder: str | Path, *, writes: bool = True) -> None:
    """Write weights and tokenizer as a HuggingFace folder that replaces `folder` at once; other files in it are kept.

    writes: one rank does; where the model is split, the others call it, too, and hand over their parts.
    """
    if not writes:
        weights.hand_over(model)
        return
    token_ids = {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    with atomic.replace_folder(folder, carry=lambda name: not weights.is_model_file(name) and name not in tokenizer.FILES) as tmp:
        weights.write_model(model, tmp, token_ids=token_ids)
        tokens.save(tmp)


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return state | {f"optimizer.{name}": value for name, value in optimizer.state_tensors().items()}


def _in_parts(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[Tensor, Split]]:
    """What tensor parallelism has split, and how."""
    found, of = {}, splits(model)
    for name, value in _tensors(model, optimizer).items():
        kind, _, parameter = name.partition(".")
        parameter = parameter if kind == "model" else parameter.rpartition(".")[0]
        if parameter in of and value.dim():  # AdamW's count of steps is a number
            found[name] = value, of[parameter]
    return found


def _saved(model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """The tensors as a state has them: those that tensor parallelism has split as rows of the whole."""
    return _tensors(model, optimizer) | {name: as_rows(value, split, ranks) for name, (value, split) in _in_parts(model, optimizer).items()}


def _without_advice() -> None:
    """One process that saves alone is what is meant here, not a mistake to be warned of.  For good: taking a filter back is not safe in a thread."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)


def _reason(error: dcp.api.CheckpointException) -> str:
    """The first rank's failure in one line."""
    first = error.failures[min(error.failures)][0]
    return str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in folder.glob("step-*") if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def _damage(path: Path, step: int, ranks: Ranks) -> str | None:
    """Why this state must not be read, as far as this rank's share of its files tells; None = it is whole."""
    try:
        record = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        if record["step"] != step:
            return f"its checksums.json is of step {record['step']}"
        if "extra.json" not in record["sha256"]:
            return "checksums.json is not readable"
        for name, digest in ranks.share(sorted(record["sha256"].items())):
            if _sha256(path / name) != digest:
                return f"the SHA-256 of {name} does not match"
        if surplus := {file.name for file in path.glob("*.safetensors")} - set(record["sha256"]):
            return f"{min(surplus)} does not belong to it"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else path.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checksums.json is not readable"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(step: int, keep: int) -> None:
    if step < 0 or keep < 1:
        raise ValueError(f"save_state: step is {step}, keep is {keep}, wanted step >= 0 and keep >= 1")


def _json(extra: dict) -> str:
    _check_json(extra, "extra")
    return json.dumps(extra, indent=1)


def _check_json(value, where: str) -> None:
    """Raise now what would otherwise be found at resume."""
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"save_state: {where} has the key {key!r}, wanted text")
            _check_json(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    else:
        raise ValueError(f"save_state: {where} is a {type(value).__name__}, wanted JSON (dict, list, number, text, None)")
