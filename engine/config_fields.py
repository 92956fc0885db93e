"""The fields of any pydantic model by dotted path: nested models, dicts and lists of models, unions told apart by a literal field.

In a path, a dict's key and a list's index stand as parts of their own: `stages.zero.rewards.0.weight`.
"""

import difflib
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Field:
    """What the models say about one dotted path."""

    path: str  # "<name>" stands for a dict's key, "<index>" for a list's
    annotations: tuple  # one per union member that has the field
    type_name: str
    default: str | None  # as one would write it; None = required
    doc: str
    kind: str  # the tag of the union member that has it, "" outside unions

    @property
    def is_boolean(self) -> bool:
        return any(set(union_members(annotation)) == {bool} for annotation in self.annotations)


def describe_fields(model_cls: type[BaseModel], width: int = 120) -> str:
    """List every field with its dotted path, type, default and docstring: the body of `--help all`."""
    return describe(list_fields(model_cls), width)


def describe(fields: Iterable[Field], width: int = 120) -> str:
    """The same of some fields."""
    lines, kind = [], ""
    for field in fields:
        if field.kind != kind:
            lines += ["", f"  {field.path.rpartition('.')[0]} with {field.kind}:"] if field.kind else [""]
        kind = field.kind
        default = "required" if field.default is None else f"default {field.default}"
        lines.append(f"  --{field.path} {field.type_name}  ({default})")
        if field.doc:
            lines += textwrap.wrap(" ".join(field.doc.split()), width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def list_fields(model_cls: type[BaseModel]) -> Iterator[Field]:
    """Yield every field of a model and of the models below it, depth first, in the order of their definition."""
    yield from _list_model(model_cls, "", "", ())


def field_at(model_cls: type[BaseModel], dotted: str) -> Field | None:
    """Find what a dotted path means, whatever the tags of the unions on the way; None when no member has such a field."""
    annotations: list = [model_cls]
    info = None
    for part in dotted.split("."):
        found = []
        for annotation in annotations:
            models = models_in(annotation)
            found += [(fields_of(model)[part].annotation, fields_of(model)[part]) for model in models if part in fields_of(model)]
            if not models and is_container(annotation):
                found.append((entry_annotation(annotation), None))
        if not found:
            return None
        annotations, info = [annotation for annotation, _ in found], found[0][1]
    return Field(dotted, tuple(annotations), type_name(annotations[0], info), None, (info and info.description) or "", "")


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of one model by the name that a recipe writes."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def union_members(annotation) -> list:
    """The alternatives of an annotation without None; Annotated and aliases are looked through."""
    if isinstance(annotation, typing.TypeAliasType) if hasattr(typing, "TypeAliasType") else False:
        annotation = annotation.__value__
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return union_members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in union_members(argument)]
    return [] if annotation in (None, type(None)) else [annotation]


def models_in(annotation) -> list[type[BaseModel]]:
    """The pydantic models among the alternatives of an annotation."""
    return [member for member in union_members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def is_container(annotation) -> bool:
    """Whether dotted paths may go on below it: dicts, lists, tuples and what is not typed."""
    return any((typing.get_origin(member) or member) in (dict, list, tuple, typing.Any) for member in union_members(annotation))


def entry_annotation(annotation):
    """Annotation of the values of a dict or the items of a list; Any where it is not said."""
    for member in union_members(annotation):
        arguments = typing.get_args(member)
        if typing.get_origin(member) in (dict, list, tuple) and arguments:
            return arguments[1] if typing.get_origin(member) is dict else arguments[0]
    return typing.Any


def tag_name(models: list[type[BaseModel]]) -> str | None:
    """The literal field that tells the members of a union apart; None for a single model."""
    if len(models) < 2:
        return None
    shared = [name for name in fields_of(models[0]) if all(name in fields_of(model) for model in models)]
    return next((name for name in shared if all(_literals(fields_of(model)[name].annotation) for model in models)), None)


def select_model(annotation, data) -> type[BaseModel] | None:
    """The model that validates `data` at a place of this annotation; None when it is no model, or the tag is missing or unknown."""
    models = models_in(annotation)
    if len(models) == 1:
        return models[0]
    tag = tag_name(models)
    if tag is None or not isinstance(data, dict):
        return None
    return next((model for model in models if data.get(tag) in _literals(fields_of(model)[tag].annotation)), None)


def default_of(info: FieldInfo):
    """The default value of a field, None when it is required."""
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean a or b?" for an error message, "" when nothing known looks like the word."""
    close = difflib.get_close_matches(word.lower(), list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def type_name(annotation, info: FieldInfo | None = None) -> str:
    """A type as people write it: `int >= 1`, `adamw|muon`, `list of float`, `table of ModelConfig`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(item, name)}" for item in (info.metadata if info else ()) for name, sign in signs.items() if hasattr(item, name)]
    names = [_member_name(member) for member in union_members(annotation)]
    if len(models_in(annotation)) > 1:
        names = ["table"]
    optional = type(None) in typing.get_args(annotation)
    return " or ".join(dict.fromkeys(names)) + (" or null" if optional else "") + (f" {', '.join(bounds)}" if bounds else "")


def _list_model(model: type[BaseModel], prefix: str, kind: str, seen: tuple, instance: BaseModel | None = None) -> Iterator[Field]:
    """instance: the default of the field that holds this model, whose values come before the class's own defaults."""
    for name, info in fields_of(model).items():
        path = f"{prefix}{name}"
        default = default_of(info) if instance is None else getattr(instance, name, default_of(info))
        nested = _models_below(info.annotation)
        if not nested or default is None or isinstance(default, list | tuple | dict):
            shown = None if info.is_required() and instance is None else _default_text(default)
            yield Field(path, (info.annotation,), type_name(info.annotation, info), shown, info.description or "", kind)
        for below, models in nested:
            tag = tag_name(models)
            for member in models:
                if member in seen:  # a model that contains itself
                    continue
                own = f"{tag} = {json.dumps(_literals(fields_of(member)[tag].annotation)[0])}" if tag else kind
                yield from _list_model(member, f"{path}{below}.", own, (*seen, member), default if isinstance(default, member) else None)


def _models_below(annotation, below: str = "") -> list[tuple[str, list]]:
    """Models at an annotation or inside its dicts and lists, with the path parts in between."""
    found = [(below, models_in(annotation))] if models_in(annotation) else []
    for member in union_members(annotation):
        if typing.get_origin(member) in (dict, list, tuple):
            part = ".<name>" if typing.get_origin(member) is dict else ".<index>"
            found += _models_below(entry_annotation(member), below + part)
    return found


def _literals(annotation) -> tuple:
    members = union_members(annotation)
    return typing.get_args(members[0]) if len(members) == 1 and typing.get_origin(members[0]) is typing.Literal else ()


def _member_name(member) -> str:
    origin, arguments = typing.get_origin(member), typing.get_args(member)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is dict and arguments:
        return f"table of {type_name(arguments[1])}"
    if origin is list and arguments:
        return f"list of {type_name(arguments[0])}"
    if origin is tuple and arguments:
        return f"list of {type_name(arguments[0])}" if arguments[-1] is ... else f"[{', '.join(map(type_name, arguments))}]"
    if isinstance(member, type) and issubclass(member, Enum):
        return "|".join(str(item.value) for item in member)
    if member is typing.Any:
        return "any"
    if isinstance(member, type) and issubclass(member, BaseModel):
        return "table"
    return {dict: "table", list: "list", Path: "path", str: "text", float: "number"}.get(member, getattr(member, "__name__", str(member)))


def _default_text(default) -> str:
    if isinstance(default, Enum):
        default = default.value
    text = json.dumps(default, ensure_ascii=False, default=lambda value: value.model_dump() if isinstance(value, BaseModel) else str(value))
    return text.replace("Infinity", "inf")
