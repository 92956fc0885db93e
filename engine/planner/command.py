"""`torchrun engine/train.py [RECIPE or SHAPE] --plan`: what is planned, from a recipe's stage or a model's shape alone.

A shape is a name in engine/shapes, a config.json in HuggingFace's format or a folder that has one.
"""

import os
import sys
from pathlib import Path

from athanor.atomic import read_json
from athanor.config import RecipeConfig
from athanor.config_fields import describe_fields, nearest
from athanor.errors import UserError
from athanor.hf_config import model_config_from_hf
from athanor.losses import resolve_preset
from athanor.model_config import Config, ModelConfig
from athanor.pipeline import build_tasks, build_tokenizer
from athanor.planner.report import as_data, as_text
from athanor.planner.search import Plan, make_plan
from athanor.planner.settings import PlanConfig
from athanor.recipe_inputs import absent_tasks, missing_inputs
from athanor.recipe_io import RECIPES_DIR, load_recipe, split_command_line
from athanor.rollout import as_asked

SHAPES_DIR = Path(__file__).parents[1] / "shapes"
SAMPLED_PROBLEMS = 16  # of each task, for the mean length of its prompts
USAGE = """usage: torchrun engine/train.py [RECIPE or SHAPE] --plan [--plan.key.path VALUE ...]

  RECIPE        a packaged recipe ({recipes}) or a TOML file, with its own fields as overrides; default: tiny
  SHAPE         {shapes}; or a HuggingFace model folder, or its config.json

Prints memory and time per rank, and the parallel layout that fits; the last line is one JSON object.  Fields:
"""


class _Shape(Config):
    plan: PlanConfig = PlanConfig()


class _Recipe(RecipeConfig):
    plan: PlanConfig = PlanConfig()


def command(argv: list[str]) -> dict:
    """Print the plan; return it as data (nothing on other ranks than the first)."""
    if int(os.environ.get("RANK", 0)):
        return {}
    shapes = {path.stem: path for path in sorted(SHAPES_DIR.glob("*.json"))}
    positional, overrides, switches = split_command_line(_Recipe, argv, ("plan", "quick", "help"))
    if "help" in switches:
        print(USAGE.format(recipes=", ".join(sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))), shapes=", ".join(shapes)))
        print(describe_fields(_Shape))
        return {}
    if len(positional) > 1:
        raise UserError(f"unexpected argument {positional[1]!r}, wanted at most one recipe or shape")
    name = positional[0] if positional else "tiny"
    path = shapes.get(name) or Path(name)
    if name not in shapes and path.suffix != ".json" and not (path / "config.json").is_file():
        known = sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))
        if path.suffix != ".toml" and name not in known:
            raise UserError(f"--plan: {name!r} is no recipe ({', '.join(known)}), no shape ({', '.join(shapes)}), no TOML file and no folder with a "
                            f"config.json{nearest(name, [*known, *shapes])}")  # fmt: skip
        plan = plan_of_recipe(load_recipe(_Recipe, name, overrides, quick="quick" in switches))
    else:
        settings = load_recipe(_Shape, None, overrides).plan
        plan = make_plan(shape_at(path), settings)
    print(as_text(plan, name))
    sys.stdout.flush()
    return as_data(plan, name)


def shape_at(path: Path) -> ModelConfig:
    """The model of a config.json, or of the folder that has it, without a layer for multi-token prediction, whose time no plan counts."""
    config = model_config_from_hf(read_json(path / "config.json" if path.is_dir() else path, "--plan"))
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def plan_of_recipe(recipe: _Recipe) -> Plan:
    """The plan of one stage; what [plan.workload] says goes over what the stage does.

    What the recipe names need not be there: a missing model has the shape in [models], and prompts that cannot be read the workload's length.
    """
    name = stage_of(recipe)
    missing = missing_inputs(recipe)
    tasks = build_tasks(recipe, absent_tasks(recipe, missing))
    tokenizer = None if recipe.folder(recipe.tokenizer.path) in missing else build_tokenizer(recipe, tasks)
    config = _model_of(recipe, name)
    if not config.vocab_size:
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    stage = recipe.stages[name]
    values = dict(num_steps=stage.steps, micro_batch_tokens=stage.micro_batch_tokens, max_rows=recipe.max_rows, optimizer=stage.optimizer.name,
                  gradient_parts=recipe.parallel.gradient_parts, precision=recipe.dtype)  # fmt: skip
    if stage.kind == "grpo":
        variant = resolve_preset(stage.loss, **stage.loss_overrides).variant
        there = [entry for entry in stage.prompts if tokenizer and tasks[entry.task] is not None]
        lengths = [(entry.weight, _prompt_tokens(tasks[entry.task], tokenizer)) for entry in there]
        values |= dict(
            prompts_per_step=stage.prompts_per_step, group_size=stage.group_size, updates_per_rollout=stage.updates_per_rollout,
            max_tokens=stage.sampling.max_tokens, reference=variant.kl != "none",
            scoring_passes=(variant.kl != "none") + (variant.correction != "none") + (stage.routing_replay == "trainer"),
        )  # fmt: skip
        values |= {"prompt_tokens": sum(weight * tokens for weight, tokens in lengths) / sum(weight for weight, _ in lengths)} if lengths else {}
    else:
        size = stage.docs_per_step if stage.kind == "pretrain" else stage.batch_size
        longest = min(1024, config.max_position_embeddings)
        values |= dict(prompts_per_step=0, group_size=size, prompt_tokens=0, max_tokens=longest, reference=False, scoring_passes=0)
    return make_plan(config, recipe.plan.model_copy(update={"workload": recipe.plan.workload.over(values), "stage": name}))


def stage_of(recipe: _Recipe) -> str:
    """The stage that is planned."""
    trained = {name: stage for name, stage in recipe.stages.items() if hasattr(stage, "optimizer")}
    wanted = recipe.plan.stage
    if wanted and wanted not in trained:
        raise UserError(f"plan.stage is {wanted!r}{nearest(wanted, list(trained))}; wanted one of {', '.join(trained) or 'no stage that trains'}")
    if not trained:
        raise UserError("--plan: the recipe has no stage that trains a model")
    return wanted or next((name for name, stage in trained.items() if stage.kind == "grpo"), list(trained)[-1])


def _model_of(recipe: _Recipe, name: str) -> ModelConfig:
    """The shape that a stage trains: that of the stage that it starts from, and so on."""
    seen = set()
    while name in recipe.stages and name not in seen:
        seen.add(name)
        stage = recipe.stages[name]
        if stage.kind == "pretrain" and not stage.init:
            if stage.model not in recipe.models:
                raise UserError(f"stages.{name}.model is {stage.model!r}{nearest(stage.model, list(recipe.models))}; wanted a key of [models]")
            return recipe.models[stage.model]
        name = stage.init
    folder = Path(recipe.folder(name))
    if not (folder / "config.json").is_file():
        if name in recipe.checkpoints and name in recipe.models:
            return recipe.models[name]
        raise UserError(f"--plan: init is {name!r}, wanted a stage of the recipe or a folder with a config.json")
    return shape_at(folder)


def _prompt_tokens(task, tokenizer) -> float:
    size = task.size("train")
    problems = [as_asked(task.problem("train", i), tokenizer) for i in range(min(SAMPLED_PROBLEMS, SAMPLED_PROBLEMS if size is None else size))]
    return sum(len(tokenizer.encode_prompt(problem.prompt)) for problem in problems) / max(1, len(problems))


