"""report.html: one self-contained page that shows what a run did - figures per stage, the curves of the R1 report, transcripts, facts.

Reads manifest.json, config.json, metrics.jsonl and samples.jsonl of a run folder and nothing else, so a page can be made again at any time, also
of a run that is not finished.  Model text is untrusted: everything is escaped, and the page's own policy forbids scripts and requests.
"""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

from athanor.atomic import read_json, write_file
from athanor.console import format_duration, format_figure
from athanor.errors import UserError
from athanor.manifest import Manifest
from athanor.metrics import read_metrics
from athanor.metrics_eval import REFLECTIVE_WORDS
from athanor.report_charts import NUM_SERIES, Series, line_chart
from athanor.rewards.table import VERIFIERS

TEMPLATE = Path(__file__).parent / "report.html.j2"
MAX_PROBLEMS = 12

COLUMNS = {  # metric: (heading, shown as)
    "pass@1": ("pass@1", "rate"),
    "pass@1_t1": ("pass@1, T = 1", "rate"),
    "cons@": ("cons", "rate"),
    "mean_tokens": ("tokens", "number"),
    "reflection_rate": ("reflection", "rate"),
    "format_rate": ("format", "rate"),
    "language_consistency": ("one language", "rate"),
    "reward_failures": ("no verdict", "number"),
    "open_ended_reward": ("open-ended", "number"),
    "unsafe_rate": ("unsafe", "rate"),
}
CHARTS = [  # metrics (the first that a stage has), title, what it says, options
    (VERIFIERS, "Accuracy", "Share of right answers in the training rollouts", {"percent": True}),
    (("mean_tokens",), "Response length", "Mean tokens per response", {}),
    (("reflection_rate",), "Reflection", "Share of responses with a reflective word", {"percent": True}),
    (("entropy",), "Entropy", "Nats per token of the sampled distribution", {}),
    (("language_consistency", "language"), "One language", "Language consistency of the rollouts", {"percent": True}),
    (("logp_gap_max",), "Rollout vs. trainer", "Largest log-prob difference of a token, nats", {"log_scale": True}),
    # of mixtures of experts alone
    (("router_imbalance",), "Expert load", "Fullest expert's tokens / mean - 1, in the worst layer", {}),
    (("route_disagreement",), "Expert choices", "Share of replayed ones that the router would not make again, last update of a rollout", {}),
]
TIME_PARTS = {  # metric, seconds per step: heading
    "rollout_prefill_s": "prefill",
    "rollout_forward_s": "decode: forward",
    "rollout_sample_s": "decode: sampling",
    "rollout_host_s": "decode: host",
    "rollout_idle_s": "waiting for other ranks",
    "reward_wait_s": "waiting for rewards",
    "train_s": "update",
}


def write_report(run_dir: Path | str) -> Path:
    """Build <run_dir>/report.html and return its path.  UserError when the folder is no run folder."""
    import jinja2

    run_dir = Path(run_dir)
    config, samples = read_json(run_dir / "config.json", "report"), _read_samples(run_dir / "samples.jsonl")
    if not (run_dir / "manifest.json").exists():
        raise UserError(f"{run_dir}: no manifest.json, so there is nothing to report; wanted a run folder")
    manifest = Manifest(run_dir).data
    rows = read_metrics(run_dir)
    stages = _stages(manifest["stages"], config)
    colors = {name: slot for slot, name in enumerate(name for name, stage in stages.items() if stage["kind"] == "grpo")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": format_duration, "figure": format_figure, "rate": _rate}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=config.get("name", run_dir.name),
        headline=headline(stages, (config.get("evaluation") or {}).get("split", "test")),
        tiles=_tiles(stages, manifest["run"]),
        columns=_columns(stages),
        evaluated={name: stage for name, stage in stages.items() if "pass@1" in stage["metrics"]},
        protocol=_protocol(config),
        legend={stages[name]["title"]: slot % NUM_SERIES for name, slot in colors.items() if any(row["stage"] == name for row in rows)},
        charts=[_safe(chart) for chart in _rl_charts(rows, stages, colors)],
        reward_charts=[_safe(chart) for chart in _reward_charts(rows, stages, colors)],
        time_split=_time_split(rows, stages),
        supervised_charts=[_safe(chart) for chart in _supervised_charts(rows, stages)],
        stages=stages,
        longest_s=max((stage["wall_s"] for stage in stages.values()), default=0) or 1,
        problems=_problems(samples, stages, config.get("reflection_words") or REFLECTIVE_WORDS),
        formulas=_formulas(stages),
        notes=[*(config.get("report_notes") or []), *_own_notes(rows, stages)],
        facts=_facts(manifest["run"], config, manifest["stages"]),
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    write_file(run_dir / "report.html", page)
    return run_dir / "report.html"


def headline(stages: dict[str, dict], split: str = "test") -> str:
    """Say in one or two sentences what the run showed, from the figures that are there; rises and falls are called what they are."""
    base = next((s for s in stages.values() if s["kind"] == "pretrain" and _pass(s) is not None), None)
    zero = next((s for s in stages.values() if base and s["kind"] == "grpo" and s["init"] == base["name"] and _pass(s) is not None), None)
    sentences = []
    if zero:
        before, after = _rate(_pass(base)), _rate(_pass(zero))
        rose = f"Reinforcement learning alone took the base model from {before} to {after} of the {split} problems."
        fell = f"Reinforcement learning alone did not lift the base model: {before} of the {split} problems before, {after} after."
        sentences.append(rose if _pass(zero) > _pass(base) else fell)
    distilled = next((s for s in stages.values() if s["kind"] == "distill" and _pass(s) is not None), None)
    control = next(
        (s for s in stages.values() if distilled and s["kind"] == "grpo" and s["init"] == distilled["init"] and _pass(s) is not None), None
    )
    if control:
        relation = "against" if _pass(distilled) > _pass(control) else "behind"
        sentences.append(
            f"The distilled student reaches {_rate(_pass(distilled))}, {relation} {_rate(_pass(control))} for the same student with RL alone."
        )
    elif distilled:
        sentences.append(f"The distilled student reaches {_rate(_pass(distilled))}.")
    if sentences:
        return " ".join(sentences)
    done = sum(stage["status"] == "done" for stage in stages.values())
    return f"{done} of {len(stages)} stages are done." if stages else "Nothing has run yet."


def _stages(entries: dict, config: dict) -> dict[str, dict]:
    """Manifest entries joined with what the recipe says of them; the evaluations' entries only add their time."""
    recipe = config.get("stages") or {}
    stages = {}
    for name, entry in entries.items():
        if name.startswith("evaluate.") and name.removeprefix("evaluate.") in entries:
            continue
        settings = recipe.get(name) or {}
        evaluation = entries.get(f"evaluate.{name}") or {}
        stages[name] = {
            "name": name,
            "title": _title(name),
            "kind": settings.get("kind", ""),
            "label": settings.get("label") or "",
            "init": settings.get("init") or settings.get("source") or "",
            "source": ", ".join(_title(n) for n in [settings.get("init") or settings.get("source"), *(settings.get("data") or [])] if n),
            "steps": entry["metrics"].get("rl_steps", settings.get("steps")),
            "rewards": list(dict.fromkeys(reward["reward"] for reward in settings.get("rewards") or [])),
            "control": settings.get("control") not in (None, "none"),
            "status": entry["status"],
            "metrics": (evaluation.get("metrics") or {}) | entry["metrics"],
            "gates": entry["gates"],
            "wall_s": entry["wall_s"],
            "evaluation_s": evaluation.get("wall_s", 0.0),
            "adopted_from": entry["adopted_from"],
        }
    return stages


def _tiles(stages: dict, run: dict) -> list[dict]:
    """The key figures under the headline: {value, what, more}."""
    scored = [stage for stage in stages.values() if _pass(stage) is not None]
    tiles = []
    zero = next((s for s in scored if s["kind"] == "grpo" and s["init"] in stages and stages[s["init"]]["kind"] == "pretrain"), None)
    if zero:
        cons = next((key for key in zero["metrics"] if key.startswith("cons@")), None)
        more = f"{cons} {_rate(zero['metrics'][cons])}" if cons else ""
        tiles.append({"value": _rate(_pass(zero)), "what": f"{zero['title']}: pass@1", "more": more})
    best = max((s for s in scored if not s["control"]), key=_pass, default=None)
    if best and best is not zero:
        tiles.append({"value": _rate(_pass(best)), "what": "best stage: pass@1", "more": best["title"]})
    growth = [stage["metrics"].get("mean_tokens") for stage in (stages.get(zero["init"]) if zero else None, zero) if stage]
    if len(growth) == 2 and all(growth):
        tiles.append({"value": f"{growth[1] / growth[0]:.1f}x", "what": "response length", "more": f"{growth[0]:.0f} to {growth[1]:.0f} tokens"})
    gaps = [stage["metrics"]["logp_gap_max"] for stage in stages.values() if stage["metrics"].get("logp_gap_max") is not None]
    if gaps:
        tiles.append({"value": f"{max(gaps):.0e}" if max(gaps) else "0", "what": "rollout vs. trainer", "more": "largest log-prob gap, nats"})
    wall = run.get("wall_s") or sum(stage["wall_s"] + stage["evaluation_s"] for stage in stages.values())
    if wall:
        tiles.append({"value": format_duration(wall), "what": "wall time, all of it", "more": run.get("device", "")})
    return tiles


def _time_split(rows: list[dict], stages: dict) -> dict[str, dict[str, float]]:
    """Seconds per part of each RL stage's steps; `other` is rewards, decoding of text and everything else."""
    split = {}
    sometimes = ("rollout_idle_s", "reward_wait_s")
    headings = {m: heading for m, heading in TIME_PARTS.items() if m not in sometimes or any(row.get(m) is not None for row in rows)}
    for name, stage in stages.items():
        steps = [row for row in rows if row["stage"] == name and row.get("rollout_s") is not None and row.get("step_s") is not None]
        if stage["kind"] == "grpo" and steps:
            parts = {heading: sum(row.get(metric) or 0.0 for row in steps) for metric, heading in headings.items()}
            whole = sum(row["step_s"] for row in steps)
            split[stage["title"]] = parts | {"other": max(0.0, whole - sum(parts.values())), "all": whole}
    return split


def _columns(stages: dict) -> list[tuple[str, str, str]]:
    """Columns of the table that some stage has: (metric, heading, shown as)."""
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage["metrics"]))
    columns = []
    for metric, (heading, shown) in COLUMNS.items():
        for name in names:
            if name == metric or (metric == "cons@" and re.fullmatch(r"cons@\d+", name)):
                columns.append((name, name if metric == "cons@" else heading, shown))
    return columns


def _protocol(config: dict) -> str:
    evaluation = config.get("evaluation")
    if not evaluation:
        return ""
    problems, split, samples = (evaluation.get(key, "?") for key in ("num_problems", "split", "samples_per_problem"))
    temperature, top_p = ((evaluation.get("sampling") or {}).get(key, "?") for key in ("temperature", "top_p"))
    return (
        f"{problems} problems of the {split} split, {samples} samples each at T = {temperature}, top-p {top_p};"
        " ± is the standard error, clustered by problem."
    )


def _own_notes(rows: list[dict], stages: dict) -> list[str]:
    """What the figures themselves ask to be said: numbers that were not finite, stages that were copied, gates that failed."""
    notes = []
    for name, stage in stages.items():
        own = [row for row in rows if row["stage"] == name]
        missing = {}
        for metric in dict.fromkeys(key for row in own for key in row):
            values = [row[metric] for row in own if metric in row]
            if 0 < values.count(None) < len(values):  # null throughout = not measured
                missing[metric] = values.count(None)
        if missing:
            notes.append(f"{stage['title']}: {', '.join(missing)} not finite in up to {max(missing.values())} of {len(own)} steps.")
        if stage["adopted_from"]:
            notes.append(f"{stage['title']} was not trained here: it is a verified copy from {stage['adopted_from']}.")
        for gate, result in stage["gates"].items():
            if isinstance(result, dict) and result.get("passed") is False:
                notes.append(f"{stage['title']} did not pass its gate {gate}.")
    return notes


def _formulas(stages: dict) -> dict[str, list[str]]:
    """Each loss that was run, with the stages that ran it."""
    formulas: dict[str, list[str]] = {}
    for stage in stages.values():
        if stage["metrics"].get("loss_formula"):
            formulas.setdefault(stage["metrics"]["loss_formula"], []).append(stage["title"])
    return formulas


def _rl_charts(rows: list[dict], stages: dict, colors: dict) -> list[dict]:
    charts = []
    for metrics, title, says, options in CHARTS:
        lines = []
        for name, slot in colors.items():
            metric = next((m for m in metrics if any(row["stage"] == name and row.get(m) is not None for row in rows)), None)
            if metric:
                lines.append(_series(rows, name, metric, stages[name]["title"], slot))
        if lines:
            charts.append({"title": title, "says": says, "svg": _svg(lines, title, f"rl-{metrics[0]}", options)})
    return charts


def _reward_charts(rows: list[dict], stages: dict, colors: dict) -> list[dict]:
    charts = []
    for name in colors:
        parts = [part for part in stages[name]["rewards"] if any(row["stage"] == name and row.get(part) is not None for row in rows)]
        lines = [_series(rows, name, part, part.replace("_", " "), slot) for slot, part in enumerate(parts)]
        if lines:
            title = stages[name]["title"]
            legend = {line.name: line.slot % NUM_SERIES for line in lines}
            charts.append(
                {"title": title, "says": "Mean of each reward part", "svg": _svg(lines, f"Rewards, {title}", f"reward-{name}", {}), "legend": legend}
            )
    return charts


def _supervised_charts(rows: list[dict], stages: dict) -> list[dict]:
    charts = []
    for name, stage in stages.items():
        if stage["kind"] != "grpo" and sum(row["stage"] == name and row.get("loss") is not None for row in rows) > 1:
            line = _series(rows, name, "loss", "loss", 0)
            charts.append(
                {"title": stage["title"], "says": "Training loss by step", "svg": _svg([line], f"Loss, {stage['title']}", f"loss-{name}", {})}
            )
    return charts + _load_chart(rows, stages)


def _load_chart(rows: list[dict], stages: dict) -> list[dict]:
    """One chart of how evenly experts are loaded in all stages but RL, by percent of a stage's steps; none without experts."""
    sparse = [name for name, stage in stages.items() if stage["kind"] != "grpo" and any(r["stage"] == name and "router_imbalance" in r for r in rows)]
    lines = [_series(rows, name, "router_imbalance", stages[name]["title"], slot) for slot, name in enumerate(sparse)]
    lines = [replace(line, steps=[100 * step / line.steps[-1] for step in line.steps]) for line in lines]
    if not lines:
        return []
    says = "Fullest expert's tokens / mean - 1, in the worst layer; the axis is percent of the stage's steps"
    legend = {line.name: line.slot % NUM_SERIES for line in lines}
    return [{"title": "Expert load", "says": says, "svg": _svg(lines, "Expert load", "expert-load", {}), "legend": legend}]


def _series(rows: list[dict], stage: str, metric: str, name: str, slot: int) -> Series:
    own = [row for row in rows if row["stage"] == stage and metric in row]
    return Series(name, [row["step"] for row in own], [row[metric] for row in own], slot)


def _svg(lines: list[Series], title: str, key: str, options: dict) -> str:
    ends = []
    for line in lines:
        values = [value for value in line.values if value is not None]
        if values:
            ends.append(f"{line.name} from {format_figure(values[0])} to {format_figure(values[-1])}")
    return line_chart(lines, label=f"{title} by step: {'; '.join(ends)}", key=key, **options)


def _safe(chart: dict) -> dict:
    from markupsafe import Markup

    return {"legend": {}} | chart | {"svg": Markup(chart["svg"])}  # drawn by us; texts in it were escaped when it was drawn


def _problems(samples: list[dict], stages: dict, words) -> list[dict]:
    """Transcripts grouped by problem, stages in the order of the run; problems that most stages answered come first."""
    problems: dict[tuple, dict] = {}
    order = {name: index for index, name in enumerate(stages)}
    for row in samples:
        key = (str(row.get("task", "")), str(row.get("problem_id")))
        problem = problems.setdefault(key, {"prompt": row.get("prompt") or "", "answer": row.get("answer"), "answers": []})
        title = _title(str(row.get("stage", "")))
        item = {
            "stage": title,
            "correct": row.get("correct"),
            "finish": row.get("finish"),
            "html": color_transcript(str(row.get("text") or ""), words),
        }
        problem["answers"].append((order.get(row.get("stage"), len(order)), item))
    for problem in problems.values():
        problem["answers"] = [item for _, item in sorted(problem["answers"], key=lambda pair: pair[0])]
    return sorted(problems.values(), key=lambda problem: -len(problem["answers"]))[:MAX_PROBLEMS]


def color_transcript(text: str, words=REFLECTIVE_WORDS):
    """Model text as HTML: escaped, the think and answer parts in spans, reflective words inside thoughts marked."""
    from markupsafe import Markup, escape

    pattern = "|".join(rf"\b{re.escape(w)}\b" if w.isascii() or len(w) == 1 else re.escape(w) for w in sorted(words, key=len, reverse=True))
    reflective = re.compile(f"({pattern})", re.IGNORECASE) if pattern else None
    html, part = Markup(), ""
    for piece in re.split(r"(</?(?:think|answer)>)", text):
        tag = re.fullmatch(r"<(/?)(think|answer)>", piece)
        if tag:
            part = "" if tag[1] else tag[2]
            html += Markup('<span class="tag">{}</span>').format(piece)
            continue
        body = Markup()
        for index, bit in enumerate(reflective.split(piece) if reflective and part == "think" else [piece]):
            body += Markup("<mark>{}</mark>").format(bit) if index % 2 else escape(bit)
        html += Markup('<span class="{}">{}</span>').format(part, body) if part and piece else body
    return html


def _facts(run: dict, config: dict, entries: dict) -> dict[str, str]:
    """What one needs to know to run it again, in the order in which it is shown."""
    facts = {"seed": config.get("seed")} | run
    versions = sorted({entry["code_version"] for entry in entries.values() if entry["code_version"]})
    if versions and "version" not in facts:
        facts["version"] = ", ".join(versions)
    for name in ("wall_s", "last_start_wall_s"):
        if isinstance(facts.get(name), int | float):
            facts[name] = format_duration(facts[name])
    if isinstance(facts.get("peak_memory_gib"), int | float):
        facts["peak_memory_gib"] = f"{facts['peak_memory_gib']:.2f} GiB"
    titles = {"peak_memory_gib": "peak memory", "wall_s": "wall time", "last_start_wall_s": "wall time of the last start", "version": "Athanor"}
    return {titles.get(name, name.replace("_", " ")): str(value) for name, value in facts.items() if value not in (None, "")}


def _title(name: str) -> str:
    """A stage's name as people write it: reasoning_rl -> reasoning RL."""
    return " ".join(word.upper() if word in ("rl", "sft") else word for word in name.split("_"))


def _pass(stage: dict) -> float | None:
    return stage["metrics"].get("pass@1")


def _rate(value) -> str:
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _read_samples(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: malformed JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: got {type(row).__name__}, wanted an object with stage, problem_id and text")
        rows.append(row)
    return rows
