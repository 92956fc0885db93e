"""train.py --dry-run: everything about a recipe that can be known before it runs, and nothing run or written.

Checks the recipe as a run would, with the data that is there; builds every model on the meta device with its true shape - config.json of its
folder, or while that is missing the shape in [models] - and puts a short packed batch through layers of the dense ones; adds up steps, samples and
tokens per stage.
What is missing is listed with where it comes from.  Time and memory on a given machine are another question.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from athanor.atomic import read_json
from athanor.config import ModelConfig, RecipeConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.hf_config import model_config_from_hf
from athanor.hf_tensors import hf_tensors
from athanor.kernels import use_backend
from athanor.losses import resolve_preset
from athanor.model.transformer import Decoder, PackedAttention
from athanor.pipeline import build_tasks, build_tokenizer, check
from athanor.recipe_inputs import absent_tasks, missing_inputs
from athanor.rollout import ProblemStream, as_asked
from athanor.samples import Problem
from athanor.stages.context import data_source
from athanor.stages.sft import read_examples
from athanor.tokenizer import Tokenizer

NUM_MEASURED = 64  # prompts or examples of a stage whose tokens are counted
PACKED = (0, 10, 24)  # cu_seqlens of the batch that goes through a model on the meta device
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """A model on the meta device."""

    config: ModelConfig
    source: str  # where the shape is from
    parameters: int

    def cache_bytes(self, width: int) -> int:
        """Bytes of one token's keys and values, `width` per number; a latent is kept once (on a GPU)."""
        return (1 if self.config.latent else 2) * self.config.num_hidden_layers * self.config.cache_heads * self.config.cache_width * width


def dry_run(recipe: RecipeConfig, name: str) -> dict:
    """Check a recipe, print what it would do to stderr, and return the summary that the command line prints as its last line.

    Raises UserError for what is wrong; what is only missing is in the summary's `missing`, one line each, and `ready` is false.
    """
    console = Console(len(recipe.stages))
    missing = missing_inputs(recipe)
    tasks = build_tasks(recipe, absent_tasks(recipe, missing))
    check(recipe, tasks)
    tokenizer = None if recipe.folder(recipe.tokenizer.path) in missing else build_tokenizer(recipe, tasks)
    shapes: dict[str, Shape | None] = {}
    for checkpoint in recipe.checkpoints:
        shapes[checkpoint] = _shape_of_folder(recipe, checkpoint, tokenizer)
    stages = {}
    _check_not_empty(recipe, tasks)
    for stage in recipe.stages:
        shapes[stage] = _shape_of_stage(recipe, stage, shapes, tokenizer)
        stages[stage] = _Budget(recipe, stage, shapes[stage], tasks, tokenizer, missing).add_up()
    for stage in recipe.evaluation.stages:
        _check_evaluation(recipe, stage, shapes[stage], tasks, tokenizer)
    for reference, shape in shapes.items():
        if shape and reference not in recipe.stages:
            console.note(f"{reference}: {_figure(shape.parameters)} parameters, {shape.config.architecture}, shape from {shape.source}")
    for stage, facts in stages.items():
        console.note(f"{stage}: {facts['says']}")
    for line in missing.values():
        console.warn(f"missing: {line}")
    console.note("ready: everything is there" if not missing else f"not ready: {len(missing)} missing; what was checked is right")
    models = {reference: {"parameters": shape.parameters, "source": shape.source} for reference, shape in shapes.items() if shape}
    return {"recipe": name, "dry_run": True, "ready": not missing, "missing": list(missing.values()), "models": models, "stages": stages}


def meta_shape(config: ModelConfig, source: str) -> Shape:
    """Build a model on the meta device, see that a HuggingFace folder's tensors are exactly its parameters, and run two layers of a dense one.

    The forward of a mixture of experts depends on what its router says, which the meta device does not know.
    """
    with torch.device("meta"):
        model = Decoder(config)
        short = Decoder(config.model_copy(update={"num_hidden_layers": min(2, config.num_hidden_layers)}))
    parameters = sum(p.numel() for p in model.parameters())
    stored = sum(torch.Size(place.shape).numel() for place in hf_tensors(config).values())
    if stored != parameters:
        raise UserError(f"{source}: the tensors of a HuggingFace folder have {stored} numbers, the model has {parameters}")
    if not any(map(config.is_sparse, range(config.num_hidden_layers))):
        ids = torch.zeros(PACKED[-1], dtype=torch.int64, device="meta")
        with use_backend("reference"), torch.no_grad():
            hidden = short(ids, torch.zeros_like(ids), PackedAttention(torch.tensor(PACKED, dtype=torch.int32)))
        wanted = (PACKED[-1], short.lm_head_weight.shape[1])
        if tuple(hidden.shape) != wanted:
            raise UserError(f"{source}: hidden states are {tuple(hidden.shape)}, lm_head wants {wanted}")
    return Shape(config, source, parameters)


def _shape_of_folder(recipe: RecipeConfig, reference: str, tokenizer: Tokenizer | None) -> Shape | None:
    folder = Path(recipe.folder(reference))
    if (folder / "config.json").is_file():
        config, source = model_config_from_hf(read_json(folder / "config.json", "dry run")), str(folder / "config.json")
    elif reference in recipe.models:
        config, source = recipe.models[reference], f"models.{reference}"
    else:
        return None
    if tokenizer and reference == recipe.tokenizer.path and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{source}: vocab_size is {config.vocab_size}, its tokenizer has ids up to {tokenizer.vocab_size - 1}")
    return meta_shape(config, source)


def _shape_of_stage(recipe: RecipeConfig, name: str, shapes: dict, tokenizer: Tokenizer | None) -> Shape | None:
    """The shape of what a stage trains or samples; None where nothing says it."""
    stage = recipe.stages[name]
    if stage.kind == "pretrain":
        config = recipe.models[stage.model]
        if not config.vocab_size and tokenizer:
            config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return meta_shape(config, f"models.{stage.model}") if config.vocab_size else None
    reference = getattr(stage, "init", "") or getattr(stage, "source", "")
    if reference and reference not in shapes:
        shapes[reference] = _shape_of_folder(recipe, reference, tokenizer)
    return shapes.get(reference)


class _Budget:
    """Steps, samples and tokens of one stage."""

    def __init__(self, recipe: RecipeConfig, name: str, shape: Shape | None, tasks: dict, tokenizer: Tokenizer | None, missing: dict[str, str]):
        self.recipe, self.name, self.stage, self.shape, self.tasks = recipe, name, recipe.stages[name], shape, tasks
        self.tokenizer, self.missing, self.width = tokenizer, missing, BYTES[recipe.dtype]

    def add_up(self) -> dict:
        stage = self.stage
        facts = {"kind": stage.kind, "from": getattr(stage, "init", "") or getattr(stage, "source", "")}
        facts |= {"parameters": self.shape.parameters if self.shape else None}
        facts |= getattr(self, f"_{stage.kind}")()
        if self.shape and hasattr(stage, "optimizer"):
            # weights, gradients and AdamW's two moments in the parameters' type, the reference model's weights beside them
            copies = 4 + (stage.kind == "grpo" and resolve_preset(stage.loss, **stage.loss_overrides).variant.kl != "none")
            facts["state_bytes"] = copies * self.width * self.shape.parameters
            facts["says"] += f"; {_bytes(facts['state_bytes'])} of weights, gradients and optimizer state in {self.recipe.dtype}"
        return facts

    def _pretrain(self) -> dict:
        stage, lengths = self.stage, []
        for entry in stage.corpus:
            task = self.tasks[entry.task]
            if task is not None and self.tokenizer:
                lengths += [len(self.tokenizer.encode(" ".join(task.corpus(i)))) + 1 for i in range(NUM_MEASURED)]
        facts = {"optimizer_steps": stage.steps, "documents": stage.steps * stage.docs_per_step} | _mean(lengths, stage.steps * stage.docs_per_step)
        return facts | {"says": f"{stage.steps:,} steps of {stage.docs_per_step} documents{_about(facts)}"}

    def _sft(self) -> dict:
        stage = self.stage
        examples = stage.steps * stage.batch_size
        facts = {"optimizer_steps": stage.steps, "examples": examples}
        says = f"{stage.steps:,} steps of {stage.batch_size} examples, {examples:,} in all"
        paths = [data_source(Path(), self.recipe.stages, source) for source in stage.data if source not in self.recipe.stages]
        rows = [example for path in paths if path.is_file() for example in read_examples(path)]
        if rows and len(paths) == len(stage.data) and not any(str(path) in self.missing for path in paths):
            facts["epochs"] = examples / len(rows)
            says += f", {facts['epochs']:.2f} epochs of {len(rows):,}"
        if rows and self.tokenizer:
            lengths = [len(self.tokenizer.encode(prompt)) + len(self.tokenizer.encode(text)) + 1 for prompt, text in rows[:NUM_MEASURED]]
            facts |= _mean(lengths, examples)
            self._fits(max(lengths), "an example")
        return facts | {"says": says + _about(facts)}

    _distill = _sft

    def _rejection(self) -> dict:
        stage = self.stage
        samples = stage.num_prompts * stage.samples_per_prompt if stage.source else 0
        facts = {"samples": samples, "max_tokens": samples * stage.sampling.max_tokens, "written": stage.num_written}
        if samples:
            self._fits(stage.sampling.max_tokens + self._longest_prompt(stage.num_prompts), "prompt and sample")
        says = f"{stage.num_prompts:,} prompts x {stage.samples_per_prompt} samples, at most {_figure(facts['max_tokens'])} tokens" if samples else ""
        return facts | {"says": says + (f"{'; ' if says else ''}{stage.num_written} written examples" if stage.num_written else "")}

    def _grpo(self) -> dict:
        stage, samples = self.stage, self.stage.prompts_per_step * self.stage.group_size
        prompt = self._longest_prompt(stage.prompts_per_step)
        longest = stage.sampling.max_tokens + prompt
        self._fits(longest, "prompt and sample")
        facts = {
            "rollouts": stage.steps, "optimizer_steps": stage.steps * stage.updates_per_rollout, "prompts": stage.steps * stage.prompts_per_step,
            "samples": stage.steps * samples, "samples_per_update": samples // stage.updates_per_rollout,
            "max_tokens": stage.steps * samples * stage.sampling.max_tokens, "longest_prompt": prompt or None,
        }  # fmt: skip
        says = f"{stage.steps:,} rollouts of {stage.prompts_per_step} prompts x {stage.group_size} samples, {stage.updates_per_rollout} updates each"
        says += f": {facts['optimizer_steps']:,} optimizer steps of {facts['samples_per_update']} samples"
        says += f", at most {_figure(facts['max_tokens'])} sampled tokens (up to {stage.sampling.max_tokens:,} each)"
        sizes = [self.tasks[entry.task].size("train") for entry in stage.prompts if self.tasks[entry.task] is not None]
        if len(sizes) == len(stage.prompts) and None not in sizes:
            facts["epochs"] = facts["prompts"] / sum(sizes)
            says += f", {facts['epochs']:.2f} epochs of {sum(sizes):,} prompts"
        if self.shape:
            rows = min(self.recipe.max_rows, samples)
            facts["cache_bytes"] = self.shape.cache_bytes(self.width) * rows * longest
            says += f"; KV cache of {rows} rows at full length {_bytes(facts['cache_bytes'])}"
        return facts | {"says": says}

    def _reward_model(self) -> dict:
        stage = self.stage
        says = f"{stage.steps:,} steps of {stage.batch_size} on {stage.num_examples:,} examples ({stage.objective}), a fifth of them held out"
        seen = stage.steps * stage.batch_size / (stage.num_examples - stage.num_examples // 5)
        return {"optimizer_steps": stage.steps, "examples": stage.num_examples, "epochs": seen, "says": f"{says}: {seen:.2f} epochs"}

    def _longest_prompt(self, count: int) -> int:
        """Tokens of the longest of the first training prompts; 0 where data or tokenizer are missing."""
        entries = [entry for entry in self.stage.prompts if self.tasks[entry.task] is not None and self.tasks[entry.task].size("train") != 0]
        if not entries or self.tokenizer is None:
            return 0
        entries = [entry.model_copy(update={"start": 0.0}) for entry in entries]
        stream = ProblemStream(self.tasks, entries, min(count, NUM_MEASURED), 1, self.recipe.seed, self.name)
        return _longest(stream.draw(0), self.tokenizer)

    def _fits(self, longest: int, what: str) -> None:
        _check_fits(f"stages.{self.name}", self.shape, longest, what)


def _check_not_empty(recipe: RecipeConfig, tasks: dict) -> None:
    asked = [(f"stages.{name}", entry.task, "train") for name, stage in recipe.stages.items() for entry in getattr(stage, "prompts", [])]
    asked += [("evaluation", recipe.evaluation.task, recipe.evaluation.split)] * bool(recipe.evaluation.stages)
    for where, name, split in asked:
        if (task := tasks[name]) is not None and task.size(split) == 0:
            dropped = getattr(task, "num_dropped", 0)
            why = f"; {dropped} were dropped because another split has them, too" if dropped else ""
            raise UserError(f"{where}: task {name!r} has no problems in its {split} split{why}")


def _check_evaluation(recipe: RecipeConfig, stage: str, shape: Shape | None, tasks: dict, tokenizer: Tokenizer | None) -> None:
    task, config = tasks[recipe.evaluation.task], recipe.evaluation
    count = 0 if task is None or tokenizer is None else min(NUM_MEASURED, config.num_problems, task.size(config.split) or NUM_MEASURED)
    prompt = _longest([task.problem(config.split, i) for i in range(count)], tokenizer)
    _check_fits(f"evaluation of {stage}", shape, prompt + config.sampling.max_tokens, "prompt and sample")


def _longest(problems: list[Problem], tokenizer: Tokenizer) -> int:
    """Tokens of the longest prompt."""
    return max((len(tokenizer.encode_prompt(as_asked(problem, tokenizer).prompt)) for problem in problems), default=0)


def _check_fits(where: str, shape: Shape | None, longest: int, what: str) -> None:
    if shape and longest > shape.config.max_position_embeddings:
        limit = f"max_position_embeddings = {shape.config.max_position_embeddings} of {shape.source}"
        raise UserError(f"{where}: {what} take up to {longest} tokens, more than {limit}")


def _mean(lengths: list[int], count: int) -> dict:
    if not lengths:
        return {}
    mean = sum(lengths) / len(lengths)
    return {"mean_tokens": mean, "tokens": round(mean * count)}


def _about(facts: dict) -> str:
    if "tokens" not in facts:
        return ""
    return f", about {_figure(facts['tokens'])} tokens ({facts['mean_tokens']:.0f} each, by the first ones)"


def _figure(value: float) -> str:
    """1.23 thousand, million, billion or trillion: for people."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
