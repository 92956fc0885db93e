"""The folder is the registry: one file per reward or task, built by name with keyword settings.  Floor 1.

A file takes part when it defines `make(**settings)`, or `make(variant, **settings)` for names such as "gym:chain_sum" and
"jsonl:questions.jsonl", whose part after the colon is the variant.  Adding a reward or a task is adding one file.
"""

import difflib
import importlib
import inspect
import pkgutil

from athanor.errors import UserError


def near_misses(name: str, known: list[str]) -> str:
    """Return "did you mean a, b? " or "", then the sorted list of what exists, for the end of an error message."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}"


def registered(package: str) -> list[str]:
    """Names of the files of `package` (an import name) that define `make`."""
    folder = importlib.import_module(package).__path__
    names = [m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_")]
    return [name for name in names if hasattr(importlib.import_module(f"{package}.{name}"), "make")]


def build(package: str, kind: str, full_name: str, settings: dict):
    """Call `make` of the file that `full_name` ("name" or "name:variant") means.

    kind: "reward" or "task", for messages.  Raises UserError on an unknown name, a missing or superfluous variant, and an unknown or
    missing setting, with near misses.
    """
    name, colon, variant = full_name.partition(":")
    files = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    make = getattr(importlib.import_module(f"{package}.{name}"), "make", None) if name in files else None
    if make is None:
        raise UserError(f"unknown {kind} {full_name!r}: {near_misses(name, registered(package))}")
    parameters = inspect.signature(make).parameters.values()
    takes_variant = any(p.kind is p.POSITIONAL_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if takes_variant != bool(variant):
        wanted = f'"{name}:<{next(iter(parameters)).name}>"' if takes_variant else f'"{name}" alone'
        raise UserError(f"{kind} {full_name!r}: wanted {wanted}")
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in settings:
            if key not in known:
                raise UserError(f"{kind} {full_name!r}: unknown setting {key!r}: {near_misses(key, known)}")
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in settings]
    if missing:
        raise UserError(f"{kind} {full_name!r}: setting {missing[0]!r} is required")
    return make(variant, **settings) if takes_variant else make(**settings)
