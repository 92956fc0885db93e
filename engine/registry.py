"""The folder is the registry: one file per reward or task, built by name with keyword settings.  Floor 1.

A file takes part when it defines `make`, a function or class that takes the settings as keywords.  A positional-only first parameter,
`make(variant, /, **settings)`, is what stands after the colon in names such as "gym:chain_sum" and "jsonl:questions.jsonl".
"""

import difflib
import importlib
import inspect
import pkgutil

from athanor.errors import UserError


def near_misses(name: str, known: list[str]) -> str:
    """End of an error message: "did you mean a, b? Known: ..." (the whole list only where it is short or nothing is near)."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close and len(known) > 30:
        return f"did you mean {', '.join(close)}?"
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}"


def registered(package: str, renamed: dict[str, str] | None = None) -> list[str]:
    """Names of the files of `package` (an import name) that define `make`.  renamed: name -> file, where they differ."""
    folder = importlib.import_module(package).__path__
    names = [m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_")]
    names_of = {file: name for name, file in (renamed or {}).items()}
    return sorted(names_of.get(name, name) for name in names if hasattr(importlib.import_module(f"{package}.{name}"), "make"))


def build(package: str, kind: str, full_name: str, settings: dict, renamed: dict[str, str] | None = None):
    """Call `make` of the file that `full_name` ("name" or "name:variant") means.

    kind: "reward" or "task", for messages.  renamed: name -> file, where they differ.  Raises UserError on an unknown name, a missing or superfluous
    variant, and an unknown, missing or mistyped setting, with near misses.
    """
    name, _, variant = full_name.partition(":")
    files = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    renamed = renamed or {}
    file = renamed.get(name, name)
    known_file = file in files and not name.startswith("_") and name not in renamed.values()
    make = getattr(importlib.import_module(f"{package}.{file}"), "make", None) if known_file else None
    if make is None:
        raise UserError(f"unknown {kind} {full_name!r}: {near_misses(name, registered(package, renamed))}")
    parameters = inspect.signature(make, eval_str=True).parameters.values()
    variants = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if variant and not variants:
        raise UserError(f'{kind} {full_name!r}: {name} has no variants, wanted "{name}"')
    if not variant and variants and variants[0].default is inspect.Parameter.empty:
        raise UserError(f'{kind} {full_name!r}: wanted "{name}:<{variants[0].name}>"')
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in settings:
            if key not in known:
                raise UserError(f"{kind} {full_name!r}: unknown setting {key!r}: {near_misses(key, known)}")
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in settings]
    if missing:
        raise UserError(f"{kind} {full_name!r}: setting {missing[0]!r} is required")
    types = {p.name: p.annotation for p in parameters if p.name in known and p.annotation is not p.empty}
    checked = dict(settings)
    for key in types.keys() & settings.keys():
        checked[key] = _checked(f"{kind} {full_name!r}: setting {key!r}", settings[key], types[key])
    return make(variant, **checked) if variant else make(**checked)


def _checked(where: str, value, annotation):
    import pydantic  # a tenth of a second that only building needs

    try:
        return pydantic.TypeAdapter(annotation).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"{where} is {value!r}: {error.errors()[0]['msg']}") from error
