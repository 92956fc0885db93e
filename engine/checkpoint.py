"""Training state that survives a kill at any instant, and export of a finished model.

    FOLDER/step-00000010/   model.safetensors, optimizer.pt, extra.json, checksums.json (SHA-256 of the other three)

A state is written under a hidden name, flushed to the disk and renamed, so a step folder is complete; the checksums catch what is damaged later.
The last two states are kept: when the newest is damaged, the one before takes its place.  For one writing process; sharded state is not covered.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from athanor import atomic, tokenizer, weights
from athanor.model.transformer import Decoder
from athanor.tokenizer import Tokenizer

NUM_KEPT = 2
STATE_FILES = ("model.safetensors", "optimizer.pt", "extra.json")


@dataclass(frozen=True)
class State:
    """A training state as read back; `model.load_state_dict(state.model)` and the optimizer's counterpart restore it."""

    step: int
    model: dict[str, Tensor]  # on the CPU
    optimizer: dict  # as given to save_state, tensors on the CPU
    extra: dict
    path: Path


def save_state(folder: str | Path, step: int, model: nn.Module, optimizer_state: dict, extra: dict) -> Path:
    """Write the state after `step` steps, then drop all but the last two; return its folder.

    optimizer_state: nested dicts, lists and tuples of tensors, numbers and strings (random-generator states belong here too).
    extra: JSON with string keys.  States beyond `step` are dropped: they belong to a run that this one has replaced.
    Raises ValueError when something in it could not be read back, UserError when the folder cannot be written.
    """
    if step < 0:
        raise ValueError(f"save_state: step is {step}, wanted >= 0")
    folder = Path(folder)
    _check_readable(optimizer_state, "optimizer_state", tensors=True)
    _check_readable(extra, "extra", tensors=False)
    path = folder / f"step-{step:08d}"
    with atomic.replace_folder(path) as tmp:
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
        weights.write_tensors(tensors, tmp / "model.safetensors")
        try:
            torch.save(optimizer_state, tmp / "optimizer.pt")
        except RuntimeError as error:  # the contents are checked: what is left is the disk
            raise OSError(str(error)) from error
        (tmp / "extra.json").write_text(json.dumps(extra, indent=1), encoding="utf-8")
        digests = {name: _sha256(tmp / name) for name in STATE_FILES}
        (tmp / "checksums.json").write_text(json.dumps({"step": step, "sha256": digests}, indent=1), encoding="utf-8")
    # The new state is in place, so whatever still has a hidden name is a dead writer's.
    for hidden in folder.glob(".step-*"):
        shutil.rmtree(hidden)
    steps = _steps(folder)
    for number in [s for s in steps if s > step] + [s for s in steps if s <= step][:-NUM_KEPT]:
        dropped = folder / f".step-{number:08d}.removed"
        os.rename(folder / f"step-{number:08d}", dropped)
        shutil.rmtree(dropped)
    return path


def load_latest_state(folder: str | Path) -> State | None:
    """Read the newest undamaged state, None when there is none.  A damaged one is named on stderr and passed over, never read."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for aside in folder.glob(".step-*.old"):
        atomic.recover(folder / aside.name[1:].removesuffix(".old"))
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        reason = _damage(path, step)
        if reason is None:
            try:
                return State(
                    step,
                    safetensors.torch.load_file(path / "model.safetensors"),
                    torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
                    json.loads((path / "extra.json").read_text(encoding="utf-8")),
                    path,
                )
            except (OSError, SafetensorError, pickle.UnpicklingError) as error:
                reason = str(error)
        print(f"warning: training state {path} is damaged ({reason}); trying the one before", file=sys.stderr)
    return None


def export_model(model: Decoder, tokens: Tokenizer, folder: str | Path) -> None:
    """Write weights and tokenizer as a HuggingFace folder that replaces `folder` at once; other files in it are kept."""
    token_ids = {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.pad_id}
    with atomic.replace_folder(folder, carry=lambda name: not weights.is_model_file(name) and name not in tokenizer.FILES) as tmp:
        weights.write_model(model, tmp, token_ids=token_ids)
        tokens.save(tmp)


def _steps(folder: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def _damage(path: Path, step: int) -> str | None:
    """Why this state must not be read; None = it is whole."""
    try:
        record = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        if record["step"] != step:
            return f"its checksums.json is of step {record['step']}"
        for name in STATE_FILES:
            if _sha256(path / name) != record["sha256"][name]:
                return f"the SHA-256 of {name} does not match"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else path.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "checksums.json is not readable"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_readable(value, where: str, *, tensors: bool) -> None:
    """Raise now what would otherwise be found at resume: torch.load(weights_only) and JSON read plain values only."""
    if value is None or type(value) in (bool, int, float, str) or (tensors and isinstance(value, Tensor)):
        return
    if type(value) is dict or (tensors and type(value) is OrderedDict):
        for key, item in value.items():
            if not (type(key) is str or (tensors and type(key) is int)):
                raise ValueError(f"save_state: {where} has the key {key!r}, wanted {'text or a whole number' if tensors else 'text'}")
            _check_readable(item, f"{where}[{key!r}]", tensors=tensors)
    elif type(value) is list or (tensors and type(value) is tuple):
        for i, item in enumerate(value):
            _check_readable(item, f"{where}[{i}]", tensors=tensors)
    else:
        wanted = "dict, list, tuple, tensor, number, text or None" if tensors else "JSON (dict, list, number, text, None)"
        raise ValueError(f"save_state: {where} is a {type(value).__name__}, wanted {wanted}")
