"""Recipes in, configurations out: TOML files and dotted overrides for any pydantic model; whatever is wrong is one line with key and place.

Order: the model's defaults, the recipe file, its [quick] table when asked for, the command line.  A table in a recipe goes over the
defaults of the nested model that it describes; dicts and lists in a recipe replace their defaults; an override goes into what is there.
"""

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from athanor.atomic import write_file
from athanor.config_fields import describe_fields, field_at, nearest
from athanor.errors import UserError
from athanor.recipe_draft import Draft, flatten, read_toml, show

__all__ = ["config_data", "describe_fields", "find_recipe", "load_recipe", "parse_overrides", "read_config", "save_config", "split_command_line"]

RECIPES_DIR = Path(__file__).parent / "recipes"


def load_recipe(
    model_cls: type[BaseModel],
    recipe: str | Path | None,
    overrides: Sequence[str] = (),
    recipes_dir: Path | str = RECIPES_DIR,
    *,
    quick: bool = False,
) -> BaseModel:
    """Build a validated `model_cls` from a recipe and command-line overrides.

    recipe: a name in recipes_dir, a path to a TOML file, or None for the model's defaults.  overrides: `--a.b VALUE`, `--a.b=VALUE`,
    `--flag`, `--no-flag`; a value is a TOML or JSON literal, else a string.  quick: apply the recipe's [quick] table of dotted overrides.
    Raises UserError with one line for whatever is wrong.
    """
    draft = Draft(model_cls)
    if recipe is None and quick:
        raise UserError("--quick: no recipe is given, so there is no [quick] table; wanted a recipe")
    if recipe is not None:
        path = find_recipe(recipe, recipes_dir)
        data, lines = read_toml(path)
        table = data.pop("quick", None)
        if table is not None and not isinstance(table, dict):
            raise UserError(f"{path}:{lines[('quick',)]}: quick is {show(table)}, wanted a table [quick] of dotted overrides")
        draft.take(data, str(path), lines)
        if quick and not table:
            raise UserError(f"{path}: has no [quick] table, so --quick means nothing for this recipe")
        for key, value in flatten(table or {}):
            place = f"{path}:{lines.get(('quick', *key)) or lines[('quick',)]}"
            # checked without --quick too: a wrong key must not wait for the first quick run
            (draft.set if quick else draft.check)(".".join(key), value, place)
    for key, value in parse_overrides(model_cls, overrides):
        draft.set(key, value, "command line")
    return draft.validate()


def find_recipe(recipe: str | Path, recipes_dir: Path | str = RECIPES_DIR) -> Path:
    """Find the file of a packaged recipe name or a path; UserError with near misses and the list of names."""
    names = sorted(path.stem for path in Path(recipes_dir).glob("*.toml"))
    if str(recipe) in names:
        return Path(recipes_dir) / f"{recipe}.toml"
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = f"packaged recipes: {', '.join(names) or 'none'}"
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise UserError(f"recipe file {recipe}: {'is a folder' if path.is_dir() else 'no such file'}{nearest(path.stem, names)}; {packaged}")
    raise UserError(f"unknown recipe {str(recipe)!r}{nearest(path.stem, names)}; {packaged}; or give a path to a TOML file")


def split_command_line(model_cls: type[BaseModel], argv: Sequence[str], switches: Sequence[str] = ()) -> tuple[list[str], list[str], set[str]]:
    """Sort arguments into (positional ones, overrides, the names of the `switches` that were given), in any order.

    The fields of `model_cls` decide which `--key` takes the next argument as its value: a boolean field takes only true or false.
    Overrides come back in one piece each (`--key=value`, `--flag`).
    """
    positional, overrides, given = [], [], set()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            positional.append(argument)
        elif argument[2:] in switches:
            given.add(argument[2:])
        elif "=" in argument or not rest or rest[0].startswith("--") or _stands_alone(model_cls, argument[2:], rest[0]):
            overrides.append(argument)
        else:
            overrides.append(f"{argument}={rest.pop(0)}")
    return positional, overrides, given


def parse_overrides(model_cls: type[BaseModel], arguments: Sequence[str]) -> list[tuple[str, object]]:
    """Turn override arguments into (dotted key, value), each value read as the field at that key can take it."""
    positional, overrides, _ = split_command_line(model_cls, arguments)
    if positional:
        raise UserError(f"unexpected argument {positional[0]!r} (command line); wanted --key value")
    pairs = []
    for argument in overrides:
        name, equals, text = argument[2:].partition("=")
        key, negated = _resolve_name(model_cls, name)
        field = field_at(model_cls, key)
        if equals and negated:
            raise UserError(f"--{name} (command line): got the value {show(text)}, wanted none; --no- switches a boolean off")
        if equals:
            pairs.append((key, _parse_value(text, field)))
        elif field is not None and not field.is_boolean:
            raise UserError(f"{key} (command line): got no value, wanted {field.type_name}")
        else:
            pairs.append((key, not negated))
    return pairs


def config_data(config: BaseModel) -> dict:
    """The configuration as strict JSON data; infinities become the strings "inf" and "-inf", which pydantic reads back as numbers."""
    return _finite(config.model_dump(mode="json"))


def save_config(config: BaseModel, path: Path | str) -> None:
    """Write the resolved configuration as JSON."""
    write_file(path, json.dumps(config_data(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_config(model_cls: type[BaseModel], path: Path | str) -> BaseModel:
    """Read what `save_config` wrote, equal to the saved one; UserError naming the file and the key when it does not fit."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); wanted the config.json of a run") from None
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {show(data)}, wanted a JSON object")
    draft = Draft(model_cls)
    draft.take(data, str(path), {})
    return draft.validate()


def _resolve_name(model_cls: type[BaseModel], name: str) -> tuple[str, bool]:
    """Field that an option means, hyphens read as underscores where that is the field, and whether it is the --no- form."""
    for key in (name, name.replace("-", "_")):
        if field_at(model_cls, key) is not None:
            return key, False
    positive = name.removeprefix("no-").replace("-", "_")
    if name.startswith("no-") and (field := field_at(model_cls, positive)) is not None:
        if not field.is_boolean:
            raise UserError(f"--{name} (command line): {positive} is no boolean, wanted --{positive} {field.type_name}")
        return positive, True
    return name.replace("-", "_"), False


def _stands_alone(model_cls: type[BaseModel], name: str, following: str) -> bool:
    key, negated = _resolve_name(model_cls, name)
    field = field_at(model_cls, key)
    return negated or (field is not None and field.is_boolean and following not in ("true", "false"))


def _parse_value(text: str, field) -> object:
    """A TOML literal, else a JSON literal, else the text itself; the text also where the field takes that and not the literal."""
    for parse in (lambda: tomllib.loads(f"value = {text}"), lambda: {"value": json.loads(text)}):
        try:
            parsed = parse()
        except (ValueError, RecursionError):
            continue
        if parsed.keys() != {"value"} or ("#" in text and text[0] not in "\"'[{"):
            continue  # a line break or a comment sign in a plain text is no TOML
        fits_only_as_text = field is not None and not _fits(field.annotations, parsed["value"]) and _fits(field.annotations, text)
        return text if fits_only_as_text else parsed["value"]
    return text


def _fits(annotations: tuple, value) -> bool:
    for annotation in annotations:
        try:
            TypeAdapter(annotation).validate_python(value)
            return True
        except ValidationError:
            continue
    return False


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
