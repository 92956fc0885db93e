"""What there is and what it means, for the terminal: `train.py --list` and `train.py --help TOPIC`.

Everything is read from where it is defined - recipes from their first comment, tasks and rewards from their files' docstrings, losses from their
presets, fields from the schema - so nothing here has to be kept in step.
"""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

from athanor.config import RecipeConfig, Stage
from athanor.config_fields import Field, describe, describe_fields, fields_of, list_fields, models_in, type_name
from athanor.errors import UserError
from athanor.losses import PRESETS, formula, resolve_preset
from athanor.recipe_io import RECIPES_DIR
from athanor.registry import near_misses
from athanor.rewards import available_rewards
from athanor.tasks import available_tasks

TOPICS = "recipes, tasks, rewards, losses, stages; one of them, as in rewards.math or stages.grpo; any field, as in evaluation or sampling; all"
WIDTH = 120
MODEL_REWARDS = {"preference": "the stage's pairwise reward model on the final reply (reward_model)",
                 "safety": "the stage's pointwise model on the whole response (safety_model)"}  # fmt: skip


def listing() -> str:
    """Recipes, tasks, rewards, losses and kinds of stages with a line each."""
    sections = {
        "Recipes (torchrun engine/train.py NAME)": {name: recipe_line(name) for name in recipe_names()},
        "Tasks ([tasks.NAME] kind = ...)": {name: first_sentence(_docstring("tasks", name)) for name in available_tasks()},
        "Rewards (rewards = [{ reward = ... }])": {name: first_sentence(_docstring("rewards", name)) for name in available_rewards()} | MODEL_REWARDS,
        "Losses (loss = ...)": {name: _loss_line(name) for name in PRESETS},
        "Stages ([stages.NAME] kind = ...)": {name: first_sentence(inspect.getdoc(model)) for name, model in stage_kinds().items()},
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections.items())


def help_on(topic: str) -> str:
    """The help of one topic.  Raises UserError with near misses for one that there is not."""
    group, _, name = topic.partition(".")
    if topic == "all":
        return describe_fields(RecipeConfig)
    if group == "recipes" and name in recipe_names():
        return (RECIPES_DIR / f"{name}.toml").read_text(encoding="utf-8")
    if group in ("tasks", "rewards") and name in (known := available_tasks() if group == "tasks" else available_rewards()):
        return f"{_docstring(group, name)}\n\nSettings:\n{_settings(group, name)}"
    if group == "rewards" and name in MODEL_REWARDS:
        return f"{name}: {MODEL_REWARDS[name]}"
    if group == "losses" and name in PRESETS:
        return f"{_loss_line(name)}\n\n{_formula(name)}\n\nAny of its fields can be changed by loss_overrides: {', '.join(_preset_fields())}"
    if group == "stages" and name in (kinds := stage_kinds()):
        fields = [field for field in list_fields(RecipeConfig) if field.path.startswith("stages.") and field.kind == f'kind = "{name}"']
        return f"{inspect.getdoc(kinds[name])}\n{describe(fields)}"
    if not name and group in ("recipes", "tasks", "rewards", "losses", "stages"):
        rows = next(part for part in listing().split("\n\n") if part.lower().startswith(group))
        fields = [field for field in _fields_at(group) if group in ("tasks", "rewards")]
        return f"{rows}\n\n--help {group}.NAME says more" + (f"\n{describe(fields)}" if fields else "")
    if fields := _fields_at(topic):
        return describe(fields)
    groups = ["all", "recipes", "tasks", "rewards", "losses", "stages", *fields_of(RecipeConfig)]
    known = {"recipes": recipe_names, "tasks": available_tasks, "losses": lambda: list(PRESETS), "stages": lambda: list(stage_kinds()),
             "rewards": lambda: [*available_rewards(), *MODEL_REWARDS]}  # fmt: skip
    if name and group in known:
        raise UserError(f"--help {topic}: {near_misses(name, known[group]())}")
    raise UserError(f"--help {topic}: no such topic; {near_misses(topic, list(dict.fromkeys(groups)))}; or any field of --help all")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def recipe_line(name: str) -> str:
    """First sentence of the comment that a recipe begins with."""
    comment = []
    for line in (RECIPES_DIR / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return first_sentence(" ".join(comment))


def first_sentence(text: str | None) -> str:
    """Up to the first full stop, or the colon before an example or a list, without line breaks; "eq. 7" is no end."""
    paragraph = (text or "").split("\n\n")[0].replace("\n", " ")
    return " ".join(re.split(r"(?<!\beq)(?<!\bDr)(?<!\betc)\.(?=\s|$)|:(?=\s\s|$)", paragraph, maxsplit=1)[0].split())


def stage_kinds() -> dict[str, type]:
    """Config class of each kind of stage."""
    return {fields_of(model)["kind"].annotation.__args__[0]: model for model in models_in(Stage)}


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(
        textwrap.fill(says, WIDTH, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)) for name, says in rows.items()
    )


def _docstring(group: str, name: str) -> str:
    """Docstring of the file of a task or reward, which is not imported for it."""
    file = {"math": "math_accuracy"}.get(name, name) if group == "rewards" else name
    path = Path(__file__).with_name(group) / f"{file}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _settings(group: str, name: str) -> str:
    file = {"math": "math_accuracy"}.get(name, name) if group == "rewards" else name
    module = importlib.import_module(f"athanor.rewards.{file}" if group == "rewards" else f"athanor.tasks.{file}")
    parameters = inspect.signature(module.make, eval_str=True).parameters.values()
    shown = []
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            shown.append(f'  {name}:<{p.name}> in place of "{name}"')
        elif p.kind is p.VAR_KEYWORD:
            shown.append(f"  **{p.name}")
        else:
            default = "required" if p.default is p.empty else "default {} or []" if "factory" in repr(p.default) else f"default {p.default!r}"
            shown.append(f"  {p.name} {type_name(p.annotation)}  ({default})")
    return "\n".join(shown) or "  none"


def _loss_line(name: str) -> str:
    """What the docstring of the presets says of one of them."""
    from athanor.losses import presets

    block = re.search(rf"(?ms)^{name}\s+(.*?)(?=^\w+\s{{2,}}|\Z)", presets.__doc__)
    return " ".join(block[1].split()) if block else ""


def _formula(name: str) -> str:
    return formula(resolve_preset(name, **({"max_tokens": 1024} if name == "dr_grpo" else {})))


def _preset_fields() -> list[str]:
    from athanor.losses.presets import _PRESET_KEYS, _VARIANT_KEYS

    return [*_VARIANT_KEYS, *_PRESET_KEYS]


def _fields_at(topic: str) -> list[Field]:
    """Fields at or below a dotted path, names and indices left out; a last part alone is found wherever it first stands."""
    fields = list(list_fields(RecipeConfig))
    paths = [re.sub(r"\.<(name|index)>", "", field.path) for field in fields]
    below = [field for field, path in zip(fields, paths, strict=True) if path == topic or path.startswith(f"{topic}.")]
    if below and not topic.startswith("stages."):
        return below
    found: dict[str, Field] = {}
    for field, path in zip(fields, paths, strict=True):
        parts = path.split(".")
        tail = ".".join(parts[parts.index(topic) :]) if topic in parts else path if field in below else ""
        if tail:
            found.setdefault(tail, field)
    return list(found.values())
