"""A recipe from start to end: stages in order, each with declared inputs and outputs, then the test of every stage and the report.

Whatever is finished is skipped, whatever was begun goes on from its last saved step, and the manifest proves by hashes that nothing changed in
between.  Runs the same on one rank and on many; rank 0 keeps the books and tells the others what to do.
"""

import importlib
import json
import platform
import resource
import shutil
import time
from collections.abc import Container
from pathlib import Path

import torch

from athanor import preemption, watchdog
from athanor.atomic import write_file
from athanor.checkpoint import StateWriter
from athanor.config import GRPOConfig, RecipeConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.generative_judge import judge_settings
from athanor.kernels import strict_mode
from athanor.losses import resolve_preset
from athanor.manifest import Manifest, code_version, hash_config
from athanor.metrics import MetricsWriter, check_loggers
from athanor.model.moe import use_fp8_
from athanor.parallel import Ranks
from athanor.recipe_inputs import missing_inputs
from athanor.recipe_io import config_data
from athanor.registry import near_misses
from athanor.report import write_report
from athanor.reward_models import MODEL_FIELDS, MODEL_REWARDS, load_reward
from athanor.rewards import make_reward
from athanor.rewards.verdicts import Comparison
from athanor.run_folder import open_run_folder
from athanor.samples import in_domain
from athanor.sharding import for_sampling, will_split
from athanor.stages import grpo, reward_model, validation
from athanor.stages.context import StageContext, checkpoint_dir, data_source
from athanor.stages.evaluate import evaluate
from athanor.tasks import make_task, require_answers
from athanor.tokenizer import Tokenizer, symbol_tokenizer
from athanor.transcripts import write_page
from athanor.weights import load_model

LOCATION_KEYS = (
    "name", "run_root", "reuse", "until", "threads", "max_rows", "speculation", "report_notes", "parallel", "failed_save", "background_save",
    "deadlines", "loggers",
    "downloads",
)  # fmt: skip
RESULT_KEYS = ("pass@1", "pass@1_t1", "mean_tokens", "reflection_rate", "format_rate", "language_consistency")


def run(recipe: RecipeConfig, recipe_name: str, *, overwrite: bool = False) -> dict:
    """Run or resume a recipe; return the summary that the command line prints as its last line."""
    started = time.time()
    if missing := missing_inputs(recipe):
        more = f" (and {len(missing) - 1} more: --dry-run lists them)" if len(missing) > 1 else ""
        raise UserError(f"{next(iter(missing.values()))}{more}")
    tasks = build_tasks(recipe)
    check(recipe, tasks)
    whole, recipe = recipe, up_to(recipe)
    deadlines_s = recipe.deadlines.by_phase()
    # The process group's own timeout comes after the watchdog, which can say more.
    ranks = Ranks(recipe.device, recipe.threads, timeout_s=deadlines_s["collective"] + watchdog.GRACE_S,
                  context=recipe.parallel.context, tensor=recipe.parallel.tensor, dispatch=recipe.parallel.dispatch,
                  gradient_parts=recipe.parallel.gradient_parts)  # fmt: skip
    will_split(recipe.parallel, ranks)  # sizes that do not divide the ranks
    run_dir = Path(recipe.run_root) / recipe.name
    console = Console(len(recipe.stages) + len(recipe.evaluation.stages))
    lock = open_run_folder(run_dir, config_data(whole), overwrite=overwrite, ignore=LOCATION_KEYS) if ranks.is_main else None
    ranks.barrier()
    guard = watchdog.Watchdog(deadlines_s, ranks.rank, ranks.world)
    try:
        with (
            strict_mode(recipe.strict),
            MetricsWriter(run_dir, loggers=recipe.loggers, config=config_data(whole)) as metrics,
            StateWriter(ranks, background=recipe.background_save) as states,
        ):
            manifest = Manifest(run_dir, seed=recipe.seed)
            if ranks.is_main:
                manifest.declare([*whole.stages, *(f"evaluate.{name}" for name in whole.evaluation.stages)])
                manifest.set_run_facts(recipe=recipe_name, **run_facts(ranks))
            tokenizer = build_tokenizer(recipe, tasks)
            for name in recipe.stages:
                _leave_if_asked(ranks, name)
                _run_stage(name, recipe, run_dir, ranks, tokenizer, tasks, metrics, console, manifest, states)
            for name in recipe.evaluation.stages:
                _leave_if_asked(ranks, f"evaluate.{name}")
                _evaluate_stage(name, recipe, run_dir, ranks, tokenizer, tasks, console, manifest)
        summary = {}
        if ranks.is_main:
            summary = finish(recipe, recipe_name, run_dir, manifest, console, started)
        ranks.barrier()
        return summary
    except Exception as error:
        watchdog.note(error)
        raise
    finally:
        if lock:
            lock.release()
        ranks.close()
        guard.stop()


def _leave_if_asked(ranks: Ranks, name: str) -> None:
    watchdog.at(name)
    if preemption.asked(ranks):
        preemption.stop(ranks, f"before {name}")


def finish(recipe: RecipeConfig, recipe_name: str, run_dir: Path, manifest: Manifest, console: Console, started: float) -> dict:
    """Write samples and report of a run whose stages are done; return its summary (rank 0)."""
    # Peak of this process; a resumed run reports the largest of its processes.
    peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, manifest.data["run"].get("peak_memory_gib", 0.0))
    wall = sum(entry["wall_s"] for entry in manifest.stages.values())
    manifest.set_run_facts(peak_memory_gib=round(peak, 3), wall_s=round(wall, 1), last_start_wall_s=round(time.time() - started, 1))
    summary = summarise(recipe, recipe_name, run_dir, manifest)
    _write_samples(recipe, run_dir)
    report = write_report(run_dir)
    console.table(summary["stages"])
    console.note(f"report: {report}")
    if page := write_page(run_dir):
        console.note(f"transcripts: {page}")
    return summary


def up_to(recipe: RecipeConfig) -> RecipeConfig:
    """The recipe cut off after its stage `until`, with the evaluation of what is left."""
    if not recipe.until:
        return recipe
    names = list(recipe.stages)
    kept = names[: names.index(recipe.until) + 1]
    evaluation = recipe.evaluation.model_copy(update={"stages": [name for name in recipe.evaluation.stages if name in kept]})
    for task, model in (("general_task", "reward_model"), ("safety_task", "safety_model")):
        if getattr(evaluation, model) not in kept:
            evaluation = evaluation.model_copy(update={task: "", model: ""})
    return recipe.model_copy(update={"stages": {name: recipe.stages[name] for name in kept}, "evaluation": evaluation})


def build_tasks(recipe: RecipeConfig, absent: Container[str] = ()) -> dict:
    """The recipe's tasks by name; the run's seed goes to those that draw at random.  absent: names that get None, for want of their files."""
    tasks = {}
    for name, config in recipe.tasks.items():
        if name in absent:
            tasks[name] = None
            continue
        settings = dict(config.settings)
        module = config.kind.partition(":")[0]
        if module in ("arithmetic", "courtesy", "discretion"):
            settings = {"name": name, "seed": recipe.seed, **settings}
        tasks[name] = make_task(config.kind, **settings)
    return tasks


def build_tokenizer(recipe: RecipeConfig, tasks: dict) -> Tokenizer:
    """The recipe's tokenizer; `symbols` takes every task's symbols in the order of the recipe."""
    if recipe.tokenizer.kind == "file":
        return Tokenizer.from_folder(recipe.folder(recipe.tokenizer.path))
    return symbol_tokenizer(list(dict.fromkeys(symbol for task in tasks.values() for symbol in task.symbols)))


def check(recipe: RecipeConfig, tasks: dict) -> None:
    """Find what is wrong with a recipe before anything is written: names, order, rewards, losses, answers.

    What is not there yet - tasks that are None, folders of missing checkpoints - is left out: `missing_inputs` has spoken of it.
    """
    if not recipe.stages:
        raise UserError("the recipe has no stages, wanted at least one [stages.NAME]")
    if twice := sorted(recipe.checkpoints.keys() & recipe.stages.keys()):
        raise UserError(f"checkpoints.{twice[0]}: a stage has that name too, wanted another one")
    if recipe.tokenizer.kind == "symbols":
        for name, task in tasks.items():
            if task is not None and not hasattr(task, "symbols"):
                raise UserError(f"tasks.{name}: this task is not written in symbols; set tokenizer.kind = \"file\" and tokenizer.path")
    elif recipe.tokenizer.path not in recipe.checkpoints or Path(recipe.folder(recipe.tokenizer.path)).exists():
        build_tokenizer(recipe, tasks)
    earlier: list[str] = []
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        for field, reference in _references(stage).items():
            trained = field in MODEL_FIELDS.values()
            named = reference in recipe.checkpoints or Path(reference).is_dir()
            if reference and reference not in earlier and (trained or not named):
                wanted = "an earlier stage" if trained else "an earlier stage, a checkpoint or a model folder"
                raise UserError(f"{where}.{field}: got {reference!r}, wanted {wanted}; {near_misses(reference, [*earlier, *recipe.checkpoints])}")
        if stage.kind in ("sft", "grpo", "reward_model", "distill") and not stage.init:
            raise UserError(f"{where}.init is empty, wanted an earlier stage or a model folder")
        for field in ("mixed", "decontaminate"):
            for source in getattr(stage, field, []):
                if not Path(source).is_file() and source not in recipe.downloads and not (field == "decontaminate" and source in tasks):
                    raise UserError(f"{where}.{field}: got {source!r}, wanted a file{' or a task' if field == 'decontaminate' else ''}")
        for source in getattr(stage, "data", []):
            if source not in earlier and not Path(source).is_file() and source not in recipe.downloads:
                raise UserError(f"{where}.data: got {source!r}, wanted an earlier stage or a JSONL file; {near_misses(source, earlier)}")
        if stage.kind == "pretrain" and stage.model not in recipe.models:
            raise UserError(f"{where}.model: got {stage.model!r}; {near_misses(stage.model, list(recipe.models))}")
        if stage.kind == "pretrain":
            for entry in stage.corpus:
                if tasks.get(entry.task) is not None and not hasattr(tasks[entry.task], "corpus"):
                    raise UserError(f"{where}.corpus: task {entry.task!r} writes no pre-training documents")
        for task in _tasks_of(stage):
            if task not in tasks:
                raise UserError(f"{where}: unknown task {task!r}; {near_misses(task, list(tasks))}")
        if stage.kind == "grpo":
            grpo.check(name, stage)
            resolve_preset(stage.loss, **stage.loss_overrides)
            _check_rewards(where, stage, tasks)
        if getattr(stage, "verifier", ""):
            make_reward(stage.verifier, **stage.verifier_settings)
        if stage.kind == "reward_model":
            powers = reward_model.SOURCES[stage.objective]
            if tasks[stage.task] is not None and not any(hasattr(tasks[stage.task], power) for power in powers):
                wanted = f"objective {stage.objective!r} wants a task with {' or '.join(powers)}"
                raise UserError(f"{where}.task: {stage.task!r} offers no verdicts of that kind, {wanted}")
        if getattr(stage, "validation", None) and tasks[stage.validation.task] is not None:
            validation.check(f"{where}.validation", stage.validation, tasks[stage.validation.task])
        _check_models(where, stage, recipe)
        earlier.append(name)
    _check_models("evaluation", recipe.evaluation, recipe)
    for name in recipe.evaluation.stages:
        if name not in earlier:
            raise UserError(f"evaluation.stages: unknown stage {name!r}; {near_misses(name, earlier)}")
    check_loggers(recipe.loggers)
    if recipe.until and recipe.until not in earlier:
        raise UserError(f"until: unknown stage {recipe.until!r}; {near_misses(recipe.until, earlier)}")
    for field in ("task", "general_task", "safety_task") if recipe.evaluation.stages else ():
        task = getattr(recipe.evaluation, field)
        if task not in tasks and (task or field == "task"):
            raise UserError(f"evaluation.{field}: unknown task {task!r}; {near_misses(task, list(tasks))}")


def _check_rewards(where: str, stage: GRPOConfig, tasks: dict) -> None:
    """Every reward can be built, and accuracy finds answers in all that it would judge."""
    for entry in stage.rewards:
        if entry.reward in MODEL_FIELDS:
            field = MODEL_FIELDS[entry.reward]
            if not getattr(stage, field):
                raise UserError(f"{where}.{field} is empty, wanted the stage that trains the model of the {entry.reward} reward")
            continue
        if "checkpoint" in entry.settings:
            reward, _ = judge_settings(entry.reward, {key: value for key, value in entry.settings.items() if key != "checkpoint"})
        else:
            reward = make_reward(entry.reward, **entry.settings)
        for task in (task for prompt in stage.prompts if (task := tasks[prompt.task]) is not None):
            if isinstance(reward, Comparison) and in_domain(task.domain, entry.domain) and task.size("train") != 0:
                reward.reference_reply(task.problem("train", 0))
            if entry.reward in ("accuracy", "math") and in_domain(task.domain, entry.domain):
                require_answers(task, entry.reward)
                if task.domain == "general" and task.problem("train", 0).answer is None:
                    raise UserError(f'{where}.rewards: task {task.name!r} is open-ended, without answers; wanted domain = "reasoning"')


def _check_models(where: str, config, recipe: RecipeConfig) -> None:
    """Stages that are named as reward models train one, with the objective that their reward needs."""
    for name, field in MODEL_FIELDS.items():
        if not getattr(config, field, ""):
            continue
        stage = recipe.stages.get(getattr(config, field))
        if stage is None:
            raise UserError(f"{where}.{field}: unknown stage {getattr(config, field)!r}; {near_misses(getattr(config, field), list(recipe.stages))}")
        if getattr(stage, "objective", None) != MODEL_REWARDS[name].objective:
            what = f"a {stage.kind} stage" if stage.kind != "reward_model" else stage.objective
            wanted = f'kind = "reward_model" with objective = "{MODEL_REWARDS[name].objective}"'
            raise UserError(f"{where}.{field}: {getattr(config, field)!r} is {what}, wanted {wanted}")


def _references(stage) -> dict[str, str]:
    """Checkpoints that a stage reads, by the field that names them; "" where it names none."""
    found = {field: getattr(stage, field, "") for field in ("init", "source", *MODEL_FIELDS.values())}
    judges = [(i, entry.settings["checkpoint"]) for i, entry in enumerate(getattr(stage, "rewards", [])) if "checkpoint" in entry.settings]
    return found | {f"rewards.{i}.settings.checkpoint": reference for i, reference in judges}


def _tasks_of(stage) -> list[str]:
    mixes = [entry.task for field in ("corpus", "prompts", "written") for entry in getattr(stage, field, [])]
    gate = [stage.gate.task] if getattr(stage, "gate", None) else []
    references = [name for name in getattr(stage, "decontaminate", []) if not Path(name).is_file()]
    looks = [stage.validation.task] if getattr(stage, "validation", None) else []
    return [*mixes, *gate, *looks, *references, *([stage.task] if hasattr(stage, "task") else [])]


def _run_stage(
    name, recipe: RecipeConfig, run_dir: Path, ranks: Ranks, tokenizer, tasks, metrics, console: Console, manifest: Manifest, states: StateWriter
) -> None:
    stage = recipe.stages[name]
    used = {task: recipe.tasks[task].model_dump() for task in sorted(set(_tasks_of(stage)))}
    shape = recipe.models[stage.model].model_dump() if stage.kind == "pretrain" else None
    # Everything that decides the stage's result besides its inputs' bytes; how often it saves and what it is called in the report do not.
    own = stage.model_dump(mode="json", exclude={"label", "save_every", "keep_states", "max_skipped_in_row", "detectors", "transcripts"})
    vocabulary = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    facts = {"stage": own, "tasks": used, "model": shape, "vocabulary": vocabulary, "name": name}
    facts |= {"seed": recipe.seed, "dtype": recipe.dtype, "strict": recipe.strict, "fp8": recipe.fp8}
    if recipe.parallel.gradient_parts > 1:  # the one setting of `parallel` that has bits of its own
        facts["gradient_parts"] = recipe.parallel.gradient_parts
    key = hash_config(facts)
    inputs = stage_inputs(name, recipe, run_dir)
    decision = "run"
    if ranks.is_main:
        if manifest.is_done(name, key):
            decision = "done before"
        elif recipe.reuse and manifest.reuse(recipe.reuse, name, key):
            decision = f"taken from {recipe.reuse}"
        else:
            resumes = manifest.begin(name, key, inputs)
            decision = "resume" if resumes else "run"
    decision = ranks.broadcast(decision)
    context = StageContext(name, stage, recipe, run_dir, ranks, tokenizer, tasks, metrics, console, states=states)
    if decision not in ("run", "resume"):
        if ranks.is_main:
            context.discard_state()  # of a process that died between the last two lines of this function
        console.skip(name, decision)
        return
    start = time.perf_counter()
    context.on_save = lambda: manifest.record_wall(name, time.perf_counter() - start)
    if decision == "run" and ranks.is_main:
        context.discard_state()
        shutil.rmtree(context.best_dir, ignore_errors=True)
        metrics.rewind(name, -1)
    ranks.barrier()
    torch.manual_seed(recipe.seed)
    result = importlib.import_module(f"athanor.stages.{stage.kind}").run(context, stage)
    states.release()
    if ranks.is_main:
        metrics.flush()
        manifest.finish(name, result["outputs"], result["metrics"], time.perf_counter() - start, gates=result.get("gates"))
        context.discard_state()
    ranks.barrier()


def stage_inputs(name: str, recipe: RecipeConfig, run_dir: Path) -> dict[str, Path]:
    """The files and folders that a stage reads, by role."""
    stage = recipe.stages[name]
    inputs = {}
    for field, reference in _references(stage).items():
        if reference:
            inputs[field] = checkpoint_dir(run_dir, reference) if reference in recipe.stages else Path(recipe.folder(reference))
    for source in getattr(stage, "data", []):
        inputs[f"data.{source}"] = data_source(run_dir, recipe.stages, source)
    for source in [*getattr(stage, "mixed", []), *getattr(stage, "decontaminate", [])]:
        if source not in recipe.tasks:
            inputs[f"file.{source}"] = Path(source)
    return inputs


def evaluation_path(run_dir: Path, stage: str) -> Path:
    return run_dir / "evaluations" / f"{stage}.json"


def _evaluate_stage(name: str, recipe: RecipeConfig, run_dir: Path, ranks: Ranks, tokenizer, tasks, console: Console, manifest: Manifest) -> None:
    config, entry = recipe.evaluation, f"evaluate.{name}"
    decides = {"evaluation": config.model_dump(mode="json", exclude={"stages"}), "words": recipe.reflection_words}
    key = hash_config(decides | {"seed": recipe.seed, "stage": name})
    inputs = {"checkpoint": checkpoint_dir(run_dir, name)}
    models = {"general_task": ("preference", config.reward_model), "safety_task": ("safety", config.safety_model)}
    models = {reward: stage for task, (reward, stage) in models.items() if getattr(config, task) and stage}
    inputs |= {MODEL_FIELDS[reward]: checkpoint_dir(run_dir, stage) for reward, stage in models.items()}
    done = False
    if ranks.is_main and not (done := manifest.is_done(entry, key)):
        manifest.begin(entry, key, inputs)
    if ranks.broadcast(done):
        console.skip(entry, "done before")
        return
    start = time.perf_counter()
    device = "cpu" if recipe.parallel.rollout == "split" else str(ranks.device)
    model = use_fp8_(load_model(inputs["checkpoint"], dtype=getattr(torch, recipe.dtype), device=device), recipe.fp8)
    model = for_sampling(model, recipe.parallel, ranks)
    rewards = {reward: load_reward(reward, inputs[MODEL_FIELDS[reward]], tokenizer, ranks.device) for reward in models}
    with console.stage(entry, 1) as progress:
        result = evaluate(
            model, tokenizer, tasks, config, ranks, recipe.seed,
            rewards=rewards, reflection_words=recipe.reflection_words, max_rows=recipe.max_rows, speculation=recipe.speculation,
        )  # fmt: skip
        progress.step(1, {name: result.metrics[name] for name in ("pass@1", "pass@1_t1", "mean_tokens", "reflection_rate")})
    if ranks.is_main:
        path = evaluation_path(run_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"metrics": result.metrics, "transcripts": result.transcripts}, ensure_ascii=False, indent=1))
        manifest.finish(entry, {"evaluation": path}, result.metrics, time.perf_counter() - start)


def summarise(recipe: RecipeConfig, recipe_name: str, run_dir: Path, manifest: Manifest) -> dict:
    """The JSON line: per evaluated stage its test metrics and its own wall time."""
    cons = f"cons@{recipe.evaluation.samples_per_problem}"
    stages = {}
    for name in recipe.evaluation.stages:
        metrics = manifest.stages[f"evaluate.{name}"]["metrics"]
        row = {key: metrics.get(key) for key in (*RESULT_KEYS[:2], cons, *RESULT_KEYS[2:])}
        extra = {key: metrics[key] for key in ("pass@1_se", "mean_tokens_t1", "reflection_rate_t1", "language_consistency_t1") if key in metrics}
        extra |= {key: value for key, value in metrics.items() if key.startswith(("open_ended", "safety", "unsafe"))}
        row |= extra | {key: value for key, value in manifest.stages[name]["metrics"].items() if key in ("logp_gap_max", "rl_steps")}
        row["wall_s"] = manifest.stages[name]["wall_s"]
        stages[name] = row
        manifest.update_metrics(name, {key: value for key, value in row.items() if key != "wall_s"})
    facts = manifest.data["run"]
    return {
        "recipe": recipe_name, "seed": recipe.seed, "wall_s": facts["wall_s"], "run_dir": str(run_dir),
        "peak_memory_gib": facts["peak_memory_gib"], "stages": stages,
    }  # fmt: skip


def _write_samples(recipe: RecipeConfig, run_dir: Path) -> None:
    """samples.jsonl: the transcripts of all evaluated stages, the same problems in each."""
    lines = []
    for name in recipe.evaluation.stages:
        for row in json.loads(evaluation_path(run_dir, name).read_text(encoding="utf-8"))["transcripts"]:
            lines.append(json.dumps({"stage": name, **row}, ensure_ascii=False) + "\n")
    write_file(run_dir / "samples.jsonl", "".join(lines))


def run_facts(ranks: Ranks) -> dict:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else _cpu_name()
    return {
        "device": device, "ranks": ranks.world, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "version": code_version(), "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
