"""A configuration in the making: plain data, where each key came from, and what is wrong with it in one line.

pydantic validates in the end; unknown keys are found here first, because only here it is known which file, line or argument wrote them.
"""

import copy
import json
import re
import tomllib
import typing
from pathlib import Path

from pydantic import BaseModel, ValidationError

from athanor.config_fields import default_of, entry_annotation, fields_of, list_fields, models_in, nearest, select_model
from athanor.errors import UserError


class Draft:
    """Data on its way to a model: laid over the defaults by `take`, changed key by key by `set`, turned into the model by `validate`."""

    def __init__(self, model_cls: type[BaseModel]):
        self._model_cls = model_cls
        self._data: dict = {}
        self._places: dict[tuple, str] = {}  # path -> "file:line" or "command line"

    def take(self, data: dict, source: str, lines: dict[tuple, int]) -> None:
        """Use the data of a file.  lines: line numbers by path, as `key_lines` gives them."""
        self._places[()] = source
        self._places |= {path: f"{source}:{line}" for path, line in lines.items()}
        self._data = over_defaults(self._model_cls, data)
        self._check_known(self._model_cls, self._data, ())

    def set(self, dotted: str, value, place: str) -> None:
        """Set one key, entering nested models, dicts and lists; what is not there yet starts from its default."""
        path = tuple(dotted.split("."))
        here, annotation = self._data, self._model_cls
        for depth, part in enumerate(path):
            parent, is_last = ".".join(path[:depth]), depth + 1 == len(path)
            model = select_model(annotation, here)
            if isinstance(here, list):
                if not part.isdigit() or int(part) >= len(here):
                    raise UserError(f"unknown key {dotted} ({place}): {parent} is a list of {len(here)}, wanted an index below that")
                part, annotation = int(part), entry_annotation(annotation)
            elif model is not None:
                self._check_field(model, part, path[:depth], place, here)
                info = fields_of(model).get(part)
                annotation = info.annotation if info else typing.Any
                if not is_last and info and here.get(part) is None:
                    here[part] = plain(default_of(info)) or {}
            else:
                annotation = entry_annotation(annotation)
                if not is_last and part not in here:
                    if models_in(annotation):
                        near = nearest(part, list(here))
                        raise UserError(
                            f"unknown key {dotted} ({place}): {parent} has no {part!r}{near}; it has: {', '.join(here) or 'nothing'}"
                            f" (to add one: --{parent}.{part} '{{...}}')"
                        )
                    here[part] = {}
            if is_last:
                here[part] = value
                self._places = {known: origin for known, origin in self._places.items() if known[: len(path)] != path} | {path: place}
                return
            here = here[part]
            if not isinstance(here, dict | list):
                raise UserError(f"unknown key {dotted} ({place}): {'.'.join(path[: depth + 1])} is a single value ({show(here)}), it has no fields")

    def check(self, dotted: str, value, place: str) -> None:
        """Raise what `set` would raise, and change nothing."""
        trial = Draft(self._model_cls)
        trial._data = copy.deepcopy(self._data)
        trial.set(dotted, value, place)

    def validate(self) -> BaseModel:
        """Build the model, or raise a UserError with the key, its place, what was got and what was wanted."""
        self._check_known(self._model_cls, self._data, ())
        try:
            return self._model_cls.model_validate(self._data)
        except ValidationError as error:
            raise UserError(self._explain(error)) from None

    def _check_known(self, annotation, value, path: tuple) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._check_known(entry_annotation(annotation), item, (*path, index))
        if not isinstance(value, dict):
            return
        model = select_model(annotation, value)
        for key, item in value.items():
            if model is None:
                if not models_in(annotation):
                    self._check_known(entry_annotation(annotation), item, (*path, key))
                continue
            self._check_field(model, key, path, self._place((*path, key)), value)
            if key in fields_of(model):
                self._check_known(fields_of(model)[key].annotation, item, (*path, key))

    def _check_field(self, model: type[BaseModel], key: str, parent: tuple, place: str, data) -> None:
        fields = fields_of(model)
        if key in fields or model.model_config.get("extra") == "allow":
            return
        where = ".".join(map(str, parent))
        elsewhere = sorted({field.path for field in list_fields(self._model_cls) if field.path.split(".")[-1] == key})
        hint = f"; did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else nearest(key, list(fields))
        if not hint:
            kind = f" (kind = {data['kind']})" if isinstance(data, dict) and "kind" in fields and "kind" in data else ""
            hint = f"; {where or 'the recipe'}{kind} has: {', '.join(fields)}"
        raise UserError(f"unknown key {f'{where}.' if where else ''}{key} ({place}){hint}")

    def _place(self, path: tuple) -> str:
        path = tuple(map(str, path))
        return next((self._places[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in self._places), "default")

    def _explain(self, error: ValidationError) -> str:
        details = error.errors(include_url=False)
        path, value = _locate(details[0], self._data)
        absent = details[0]["type"] in ("missing", "union_tag_not_found")
        what = "required, but not given" if absent else _wanted(details[0])
        if what.startswith("wanted"):
            what = f"got {show(value)}, {what}"
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        # what is absent has no place of its own: name what last wrote beside it
        beside = [place for known, place in self._places.items() if absent and known[: len(path) - 1] == tuple(map(str, path[:-1]))]
        return f"{'.'.join(map(str, path)) or 'the recipe'} ({beside[-1] if beside else self._place(tuple(path))}): {what}{more}"


def read_toml(path: Path) -> tuple[dict, dict[tuple, int]]:
    """Read a TOML file: its data and the line of every key that a line begins with.  UserError with file:line:column when malformed."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"recipe file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); wanted a TOML file") from None
    try:
        return tomllib.loads(text), key_lines(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        place = f"{found[1]}:{found[2]}" if found else str(len(text.splitlines()))
        message = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise UserError(f"{path}:{place}: malformed TOML: {message}") from None


def key_lines(text: str) -> dict[tuple, int]:
    """First line of every key and table of a valid TOML text by path; keys inside inline tables are not listed."""
    lines: dict[tuple, int] = {}
    table: tuple = ()
    open_quotes = None  # of a multi-line string
    for number, line in enumerate(text.splitlines(), 1):
        if open_quotes:
            open_quotes = None if open_quotes in line else open_quotes
            continue
        header = re.match(r"\s*\[\[?([^\]]+)\]\]?\s*(#.*)?$", line)
        key = None if header else re.match(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""", line)
        if header or key:
            path = tuple(part.strip().strip("\"'") for part in (header or key)[1].split("."))
            table = path if header else table
            path = path if header else table + path
            for depth in range(1, len(path) + 1):
                lines.setdefault(path[:depth], number)
        open_quotes = next((quotes for quotes in ('"""', "'''") if line.count(quotes) % 2), None)
    return lines


def flatten(table: dict, prefix: tuple = ()) -> typing.Iterator[tuple[tuple, object]]:
    """Yield (path, value) of the leaves of nested tables; a quoted key "a.b" counts as two parts."""
    for key, value in table.items():
        path = (*prefix, *key.split("."))
        if isinstance(value, dict) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def over_defaults(annotation, data, default=None):
    """Lay file data over the defaults of nested models that differ from their class's own; dicts and lists replace their defaults."""
    if isinstance(data, list):
        return [over_defaults(entry_annotation(annotation), item) for item in data]
    if not isinstance(data, dict):
        return data
    model = select_model(annotation, data)
    if model is None:
        return dict(data) if models_in(annotation) else {key: over_defaults(entry_annotation(annotation), item) for key, item in data.items()}
    base = default if isinstance(default, model) else None
    result = {} if base is None else {key: plain(getattr(base, key)) for key in base.model_fields_set}
    for key, item in data.items():
        info = fields_of(model).get(key)
        inherited = None if info is None else getattr(base, key) if base is not None and hasattr(base, key) else default_of(info)
        result[key] = item if info is None else over_defaults(info.annotation, item, inherited)
    return result


def plain(value):
    """Models as dicts, tuples as lists, all the way down."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def show(value) -> str:
    """A value in an error message, as TOML or JSON would write it, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(detail: dict, data) -> tuple[list, object]:
    """Path of an error in the data: pydantic's, without the names of union members that it puts in between."""
    path, here = [], data
    for index, part in enumerate(detail["loc"]):
        if isinstance(here, dict) and part in here or isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
            path.append(part)
        elif detail["type"] == "missing" and index + 1 == len(detail["loc"]):
            path.append(part)
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(detail["ctx"]["discriminator"].strip("'"))
        here = here.get(path[-1])
    return path, here


_BOUNDS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<"), "less_than_equal": ("le", "<=")}
_WANTED_BY_PREFIX = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string_type": "a string",
    "list_type": 'a list such as ["a", "b"]',
    "tuple_type": "a list such as [1, 2]",
    "dict_type": "a table such as {name = value}",
    "model_": "a table such as {name = value}",
    "path_type": "a path",
}


def _wanted(detail: dict) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        tags = context["expected_tags"]
        return f"wanted one of {tags}{nearest(str(context['tag']), re.findall(r'[^, ]+', tags.replace(chr(39), '')))}"
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"wanted {'one of ' if len(choices) > 1 else ''}{context['expected'].replace(' or ', ', ')}{nearest(str(detail['input']), choices)}"
    if kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        return f"wanted {sign} {context[name]}"
    wanted = next((wanted for prefix, wanted in _WANTED_BY_PREFIX.items() if kind.startswith(prefix)), None)
    return f"wanted {wanted}" if wanted else f"wanted: {detail['msg'].removeprefix('Input should ').removeprefix('be ')}"
