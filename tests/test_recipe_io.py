"""Recipes and overrides against a toy model of the real schema's shape: nested models, a dict of tagged unions, lists of models, free dicts."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from athanor.errors import UserError
from athanor.recipe_io import describe_fields, load_recipe, read_config, save_config, split_command_line


class Toy(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Heat(Toy):
    degrees: float = 20.0
    """Temperature in degrees."""
    even: bool = True
    """Whether the heat is even."""
    fuel: Literal["coal", "wood"] = "wood"
    bounds: tuple[float, float] = (0.0, math.inf)


class Metal(Toy):
    name: str
    """Which metal."""
    weight: float = Field(1.0, gt=0)


class Melt(Toy):
    kind: Literal["melt"]
    steps: int = Field(100, ge=1)
    """Strokes of the bellows."""
    metals: list[Metal] = []
    heat: Heat = Heat(degrees=900.0)

    @model_validator(mode="after")
    def _hot_enough(self):
        if self.heat.degrees < 500:
            raise ValueError(f"heat.degrees is {self.heat.degrees}, melting wants 500 or more")
        return self


class Cool(Toy):
    kind: Literal["cool"]
    minutes: int | None = None
    settings: dict = {}


class Furnace(Toy):
    name: str = "athanor"
    """Name on the door."""
    seed: int = 0
    door: Path = Path("front")
    heat: Heat = Heat()
    words: list[str] = []
    stages: dict[str, Annotated[Melt | Cool, Field(discriminator="kind")]] = {}
    """Work in order."""


RECIPE = """\
name = "gold"  # a name
[heat]
degrees = 30

[stages.one]
kind = "melt"
steps = 5
metals = [{name = "lead"}, {name = "tin", weight = 2}]
[stages.one.heat]
even = false
[stages.two]
kind = "cool"
settings = {draught = 1}

[quick]
"stages.one.steps" = 2
heat.degrees = 25
"""


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "gold.toml").write_text(RECIPE)
    (tmp_path / "silver.toml").write_text('name = "silver"\n')
    return tmp_path


def message(recipes, *overrides, text=None, quick=False) -> str:
    if text is not None:
        (recipes / "gold.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(Furnace, "gold", list(overrides), recipes, quick=quick)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_recipe_gives_the_defaults():
    assert load_recipe(Furnace, None, []) == Furnace()


def test_tables_go_over_defaults_of_nested_models(recipes):
    one = load_recipe(Furnace, "gold", [], recipes).stages["one"]
    # the recipe writes only heat.even: 900 comes from Melt's own default for heat, not from Heat's class default
    assert (one.heat.degrees, one.heat.even, one.heat.fuel) == (900.0, False, "wood")


def test_a_recipe_is_found_by_name_and_by_path(recipes):
    by_name = load_recipe(Furnace, "gold", [], recipes)
    assert by_name == load_recipe(Furnace, recipes / "gold.toml", [], recipes / "elsewhere")
    assert by_name == load_recipe(Furnace, str(recipes / "gold.toml"), [])


@pytest.mark.parametrize(
    "override, read, value",
    [
        (["--stages.one.steps", "10"], lambda c: c.stages["one"].steps, 10),
        (["--stages.one.steps=10"], lambda c: c.stages["one"].steps, 10),
        (["--stages.one.heat.degrees", "1e3"], lambda c: c.stages["one"].heat.degrees, 1000.0),
        (["--stages.one.metals.1.weight", "0.5"], lambda c: c.stages["one"].metals[1].weight, 0.5),
        (["--stages.one.metals", '[{name = "zinc"}]'], lambda c: c.stages["one"].metals, [Metal(name="zinc")]),
        (["--stages.one.metals", '[{"name": "zinc"}]'], lambda c: c.stages["one"].metals, [Metal(name="zinc")]),
        (["--stages.three", "{kind = 'cool'}"], lambda c: list(c.stages), ["one", "two", "three"]),
        (["--stages.two.minutes", "null"], lambda c: c.stages["two"].minutes, None),
        (["--stages.two.settings.damper.angle", "3"], lambda c: c.stages["two"].settings, {"draught": 1, "damper": {"angle": 3}}),
        (["--no-heat.even"], lambda c: c.heat.even, False),
        (["--heat.even"], lambda c: c.heat.even, True),
        (["--heat.even", "false"], lambda c: c.heat.even, False),
        (["--heat.even=true"], lambda c: c.heat.even, True),
        (["--heat.degrees", "-5"], lambda c: c.heat.degrees, -5.0),
        (["--heat.bounds", "[1, inf]"], lambda c: c.heat.bounds, (1.0, math.inf)),
        (["--name", "12"], lambda c: c.name, "12"),
        (["--name", "true"], lambda c: c.name, "true"),
        (["--name", "a # b"], lambda c: c.name, "a # b"),
        (["--name", "1\nseed = 5"], lambda c: (c.name, c.seed), ("1\nseed = 5", 0)),
        (["--name="], lambda c: c.name, ""),
        (["--name", "--seed", "1"], None, "name"),  # a text field without a value is an error that names it
        (["--door", "7"], lambda c: c.door, Path("7")),
        (["--words", '["so", "wait"]'], lambda c: c.words, ["so", "wait"]),
        (["--seed", "1", "--seed", "2"], lambda c: c.seed, 2),
    ],
)
def test_overrides_set_the_value_that_the_field_can_take(recipes, override, read, value):
    if read is None:
        assert value in message(recipes, *override)
    else:
        assert read(load_recipe(Furnace, "gold", override, recipes)) == value


def test_an_override_keeps_what_is_beside_it(recipes):
    before = load_recipe(Furnace, "gold", [], recipes)
    after = load_recipe(Furnace, "gold", ["--stages.one.heat.fuel", "coal"], recipes)
    assert after.stages["one"] == before.stages["one"].model_copy(update={"heat": before.stages["one"].heat.model_copy(update={"fuel": "coal"})})
    assert after.stages["two"] == before.stages["two"] and after.heat == before.heat


def test_quick_applies_its_table_before_the_command_line(recipes):
    slow = load_recipe(Furnace, "gold", [], recipes)
    quick = load_recipe(Furnace, "gold", ["--heat.degrees", "26"], recipes, quick=True)
    assert (slow.stages["one"].steps, slow.heat.degrees) == (5, 30.0)
    assert (quick.stages["one"].steps, quick.heat.degrees, quick.stages["one"].heat.degrees) == (2, 26.0, 900.0)


def test_quick_without_a_table_is_refused_and_a_wrong_key_in_it_is_found_in_every_run(recipes):
    assert "no [quick] table" in message(recipes, text='name = "x"\n', quick=True)
    text = message(recipes, text=RECIPE.replace('"stages.one.steps"', '"stages.one.stps"'))
    assert "stages.one.stps" in text and "gold.toml:16" in text and "did you mean steps?" in text


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["--stages.one.stps", "1"], ["stages.one.stps", "command line", "did you mean steps?"]),
        (["--stages.oen.steps", "1"], ["stages.oen.steps", "command line", "did you mean one?", "one, two"]),
        (["--stages.two.steps", "1"], ["stages.two.steps", "command line", "did you mean stages.<name>.steps?"]),
        (["--xyzzy", "1"], ["xyzzy", "command line", "name, seed, door, heat, words, stages"]),
        (["--stages.two.xyzzy", "1"], ["stages.two.xyzzy", "stages.two (kind = cool) has: kind, minutes, settings"]),
        (["--name.x", "1"], ["name.x", "command line", "single value"]),
        (["--stages.one.metals.2.name", "x"], ["stages.one.metals.2.name", "list of 2"]),
        (["--stages.one.steps", "ten"], ["stages.one.steps", "command line", 'got "ten"', "wanted an integer"]),
        (["--stages.one.steps", "1.5"], ["stages.one.steps", "got 1.5", "wanted an integer"]),
        (["--stages.one.steps", "0"], ["stages.one.steps", "got 0", "wanted >= 1"]),
        (["--stages.one.metals.0.weight", "0"], ["stages.one.metals.0.weight", "command line", "got 0", "wanted > 0"]),
        (["--heat.fuel", "coke"], ["heat.fuel", 'got "coke"', "'coal', 'wood'"]),
        (["--heat.fuel", "coall"], ["heat.fuel", "did you mean coal?"]),
        (["--heat.even", "true", "--heat.bounds", "3"], ["heat.bounds", "got 3", "wanted a list"]),
        (["--stages.one.kind", "mlet"], ["stages.one.kind", 'got "mlet"', "did you mean melt?"]),
        (["--stages.new", "{minutes = 1}"], ["stages.new.kind", "required"]),
        (["--stages.one.metals", "[{weight = 1}]"], ["stages.one.metals.0.name", "command line", "required"]),
        (["--stages.one.heat", "{degres = 1}"], ["stages.one.heat.degres", "command line", "did you mean degrees?"]),
        (["--stages.one.heat.degrees", "100"], ["stages.one", "melting wants 500"]),
        (["--seed"], ["seed", "command line", "got no value", "wanted int"]),
        (["--no-seed"], ["seed", "no boolean"]),
        (["--no-heat.even=1"], ["--no-heat.even", "wanted none"]),
        (["gold"], ["unexpected argument 'gold'"]),
    ],
)
def test_a_wrong_override_is_one_line_with_key_place_and_what_was_wanted(recipes, overrides, parts):
    text = message(recipes, *overrides)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "text, parts",
    [
        ('name = "x"\nseed = \n', ["gold.toml:2", "malformed TOML"]),
        ('name = "x\n', ["gold.toml:1", "malformed TOML"]),
        ("[heat\n", ["gold.toml:1", "malformed TOML"]),
        ('name = "x"\n\n[heat]\ndegres = 3\n', ["heat.degres", "gold.toml:4", "did you mean degrees?"]),
        ('[stages.one]\nkind = "melt"\nsteps = "many"\n', ["stages.one.steps", "gold.toml:3", 'got "many"', "wanted an integer"]),
        ("[stages.one]\nsteps = 1\n", ["stages.one.kind", "gold.toml:2", "required"]),
        ('doc = """\n[heat]\n"""\n', ["unknown key doc", "gold.toml:1"]),
        ("quick = 3\n", ["gold.toml:1", "quick", "wanted a table"]),
        ('[stages.one]\nkind = "melt"\n[[stages.one.metals]]\nname = "tin"\nwieght = 1\n', ["stages.one.metals.0.wieght", "gold.toml:3", "weight"]),
    ],
)
def test_a_wrong_recipe_is_one_line_with_file_and_line(recipes, text, parts):
    found = message(recipes, text=text)
    assert all(part in found for part in parts), found


def test_an_unknown_recipe_gives_near_misses_and_the_list(recipes, tmp_path):
    with pytest.raises(UserError, match=r"unknown recipe 'glod'; did you mean gold\?; packaged recipes: gold, silver"):
        load_recipe(Furnace, "glod", [], recipes)
    with pytest.raises(UserError, match="nowhere/gold.toml: no such file"):
        load_recipe(Furnace, "nowhere/gold.toml", [], recipes)
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(Furnace, f"{tmp_path}/", [], recipes)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(Furnace, tmp_path / "binary.toml", [])


def test_the_command_line_is_sorted_by_what_the_fields_take(recipes):
    argv = ["--seed", "3", "--heat.even", "gold", "--quick", "--no-stages.one.heat.even", "more", "--name=--x", "--heat.even", "false"]
    positional, overrides, switches = split_command_line(Furnace, argv, ("quick", "debug"))
    assert positional == ["gold", "more"] and switches == {"quick"}
    assert overrides == ["--seed=3", "--heat.even", "--no-stages.one.heat.even", "--name=--x", "--heat.even=false"]


def test_a_saved_configuration_is_read_back_equal(recipes, tmp_path):
    config = load_recipe(Furnace, "gold", ["--heat.bounds", "[-inf, inf]", "--name", 'é "quoted"\n'], recipes)
    save_config(config, tmp_path / "config.json")
    assert read_config(Furnace, tmp_path / "config.json") == config
    assert "Infinity" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "content, part", [("{", "malformed JSON"), ("[1]", "wanted a JSON object"), ('{"sed": 1}', "did you mean seed?"), (None, "cannot be read")]
)
def test_a_damaged_saved_configuration_is_a_user_error(tmp_path, content, part):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_config(Furnace, tmp_path / "config.json")
    assert part in str(caught.value) and "config.json" in str(caught.value)


def test_help_lists_every_field_with_path_type_default_and_docstring():
    text = describe_fields(Furnace)
    for line in (
        '--name text  (default "athanor")',
        "Name on the door.",
        "--heat.degrees number  (default 20.0)",
        "--heat.fuel coal|wood",
        'stages.<name> with kind = "melt":',
        "--stages.<name>.steps int >= 1  (default 100)",
        "Strokes of the bellows.",
        "--stages.<name>.metals.<index>.name text  (required)",
        "--stages.<name>.metals.<index>.weight number > 0  (default 1.0)",
        "--stages.<name>.heat.degrees number  (default 900.0)",
        'stages.<name> with kind = "cool":',
        "--stages.<name>.minutes int or null  (default null)",
    ):
        assert line in text, f"{line}\n\n{text}"


def test_help_of_a_model_that_contains_itself_ends():
    assert "--child.name" in describe_fields(Tree)


class Tree(Toy):
    name: str = ""
    child: "Tree | None" = None
