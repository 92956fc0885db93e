"""report.html of procedurally made run folders: complete, partial, and hostile."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from athanor.errors import UserError
from athanor.manifest import Manifest
from athanor.metrics import MetricsWriter
from athanor.report import color_transcript, headline, write_report
from athanor.report_charts import Series, line_chart, running_mean

STAGES = {  # kind, init, pass@1, tokens, reflection, one language, seconds
    "base": ("pretrain", "", 0.213, 14.2, 0.09, 0.86, 128.0),
    "zero": ("grpo", "base", 0.914, 46.8, 0.88, 0.71, 133.4),
    "cold_data": ("rejection", "zero", None, None, None, None, 4.2),
    "cold_start": ("sft", "base", 0.902, 54.1, 0.97, 0.998, 6.3),
    "reasoning_rl": ("grpo", "cold_start", 0.951, 50.2, 0.99, 1.0, 63.0),
    "rejection_sft": ("sft", "base", 0.921, 49.0, 0.98, 0.997, 19.0),
    "reward_model": ("reward_model", "rejection_sft", None, None, None, None, 8.0),
    "general_rl": ("grpo", "rejection_sft", 0.943, 47.5, 0.99, 0.999, 38.5),
    "student_base": ("pretrain", "", 0.141, 12.0, 0.08, 0.85, 24.0),
    "distill": ("distill", "student_base", 0.618, 48.2, 0.98, 0.996, 28.0),
    "student_rl": ("grpo", "student_base", 0.196, 28.0, 0.04, 0.81, 32.0),
}
NOTES = [
    "The pre-training corpus contains the reflective pattern by design: RL selects it, it does not invent it.",
    "128 test problems: the standard error is two to three points.",
]


def make_run(run_dir, *, stages=STAGES, steps=60, facts=True):
    """A run folder as the pipeline leaves it, with curves that rise and saturate."""
    rng = random.Random(0)
    run_dir.mkdir()
    config = {"name": run_dir.name, "seed": 3, "report_notes": NOTES, "reflection_words": ["wait", "check"], "stages": {}}
    config["evaluation"] = {"num_problems": 128, "samples_per_problem": 16, "split": "test", "sampling": {"temperature": 0.6, "top_p": 0.95}}
    for name, (kind, init, *_) in stages.items():
        config["stages"][name] = {"kind": kind, "init": init, "steps": steps, "label": f"What {name.replace('_', ' ')} is in the terms of R1"}
        if kind == "grpo":
            config["stages"][name]["rewards"] = [{"reward": "accuracy", "weight": 1.0}, {"reward": "format", "weight": 1.0}]
    (run_dir / "config.json").write_text(json.dumps(config))
    manifest = Manifest(run_dir, seed=3)
    manifest.declare([*stages, *(f"evaluate.{name}" for name, values in stages.items() if values[2] is not None)])
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for name, (kind, _, accuracy, tokens, reflection, language, wall_s) in stages.items():
            metrics = {}
            for step in range(1, steps + 1) if kind not in ("rejection",) else ():
                rise, noise = 1 - math.exp(-step / (steps / 5)), rng.gauss(0, 0.02)
                if kind == "grpo":
                    row = {
                        "accuracy": 0.15 + rise * (accuracy - 0.3) + noise,
                        "format": 0.7 + 0.29 * rise,
                        "mean_tokens": 14 + rise * (tokens - 14) + 40 * noise,
                    }
                    row |= {"reward": row["accuracy"] + row["format"], "reflection_rate": max(0.0, 0.1 + rise * (reflection - 0.1) + noise)}
                    row |= {
                        "language_consistency": 0.85 + rise * (language - 0.85) + noise / 2,
                        "entropy": 0.6 * math.exp(-step / 30) + 0.15 + noise / 2,
                    }
                    row |= {
                        "logp_gap_max": 10 ** rng.uniform(-6.6, -5.4),
                        "step_s": 10.0,
                        "rollout_s": 5.0,
                        "rollout_prefill_s": 1.0,
                        "rollout_forward_s": 2.0,
                        "rollout_sample_s": 0.5,
                        "rollout_host_s": 0.5,
                        "train_s": 4.0,
                        "grad_norm": 0.3,
                        "loss": noise,
                        "clip_fraction": math.nan,
                        "tokens_per_s": 21000,
                    }
                else:
                    row = {"loss": 2.2 * math.exp(-step / 12) + 0.7 + noise}
                writer.write(name, step, row)
            if kind == "grpo":
                metrics = {"logp_gap_max": 3.4e-6, "loss_formula": "-1/N sum_t min(r_t A, clip(r_t, 0.8, 1.2) A),  r_t = exp(logp - old),  no KL"}
            if accuracy is not None:
                metrics |= {
                    "pass@1": accuracy,
                    "pass@1_se": 0.021,
                    "pass@1_t1": accuracy * 0.8,
                    "cons@16": min(1.0, accuracy + 0.06),
                    "mean_tokens": tokens,
                }
                metrics |= {"reflection_rate": reflection, "format_rate": 0.97, "language_consistency": language}
            if name == "general_rl":
                metrics["open_ended_reward"] = 1.83
                metrics["unsafe_rate"] = 0.125
            manifest.begin(name, "key", {})
            gates = {"competence": {"value": 0.984, "wanted": 0.97, "passed": True}} if kind == "pretrain" else {}
            manifest.finish(name, {}, metrics, wall_s, gates=gates)
    if facts:
        manifest.set_run_facts(recipe="tiny", device="Some CPU @ 2.60GHz", torch="2.13.0", peak_memory_gib=1.234, wall_s=612.3)
    with open(run_dir / "samples.jsonl", "w") as file:
        for problem in range(4):
            first, second, third = (rng.randint(1, 9) for _ in range(3))
            for name in [name for name, values in stages.items() if values[2] is not None]:
                total = first + second + third
                if name.endswith("base"):
                    text, right = f"<think> </think> <answer> {total - 1} </answer>", False
                else:
                    text = f"<think> {first} + {second} + {third} so {first + second} + {third} so {total} check {total} wait {total} ok </think>"
                    text, right = text + f" <answer> {total} </answer>", True
                row = {"stage": name, "problem_id": problem, "prompt": f"User: {first} + {second} + {third} ? Assistant:", "answer": str(total)}
                file.write(json.dumps(row | {"text": text, "correct": right, "finish": "stop"}) + "\n")
    return run_dir


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = {"meta", "br", "path", "line", "use", "rect", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page_text(tmp_path_factory):
    path = write_report(make_run(tmp_path_factory.mktemp("runs") / "tiny-3"))
    assert path.name == "report.html"
    return path.read_text()


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(page_text):
    page = Page(page_text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags and "iframe" not in page.tags
    assert not [a for a in page.attributes if a[1] in ("src", "href", "xlink:href") and not a[2].startswith("#")]
    assert "http" not in page_text.replace("http-equiv", "") and "@import" not in page_text


def test_ids_are_unique_and_every_reference_is_defined(page_text):
    ids = re.findall(r' id="([^"]+)"', page_text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"""url\(#([^)]+)\)|href="#([^"]+)\"""", page_text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_the_page_says_what_the_run_showed(page_text):
    text = " ".join(" ".join(Page(page_text).words).split())  # also turns no-break spaces into plain ones
    for part in ("from 21.3 % to 91.4 %", "61.8 %", "19.6 %", "10:12", *NOTES, "1.23 GiB", "2.13.0", "91.4 % ± 2.1", "competence 0.984, wanted 0.97"):
        assert part in text, part
    for heading in ("pass@1", "pass@1, T = 1", "cons@16", "tokens", "reflection", "format", "one language", "open-ended", "unsafe", "wall time"):
        assert heading in text
    assert "min(r_t A, clip(r_t, 0.8, 1.2) A)" in text


def test_curves_overlay_the_rl_stages_and_are_described_for_those_who_do_not_see_them(page_text):
    labels = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"', page_text)
    assert len(labels) == 6 + 4 + 6  # RL charts, rewards of 4 grpo stages, losses of 6 supervised stages
    accuracy = next(label for label in labels if label.startswith("Accuracy"))
    assert "zero from" in accuracy and "reasoning RL from" in accuracy
    assert page_text.count("var(--series-1)") > 5 and "currentColor" in page_text


def test_tables_have_headers_for_rows_and_columns(page_text):
    page = Page(page_text)
    scopes = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert scopes.count("col") == page.tags.count("th") - scopes.count("row")
    assert scopes.count("row") == 9 + 11 + 4  # results, stages, times of the RL stages


def test_missing_metrics_samples_and_facts_do_not_break_the_page(tmp_path):
    run_dir = make_run(tmp_path / "part", facts=False)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("entropy", "reflection_rate", "logp_gap_max", "format"):
            row.pop(key, None)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "samples.jsonl").unlink()
    text = write_report(run_dir).read_text()
    Page(text)
    assert "Entropy" not in text and "before and after" not in text and "Accuracy" in text


@pytest.mark.parametrize("started", [False, True])
def test_an_unfinished_run_has_a_page(tmp_path, started):
    run_dir = tmp_path / "new"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    manifest = Manifest(run_dir)
    manifest.declare(["base", "zero"] if started else [])
    text = write_report(run_dir).read_text()
    Page(text)
    assert ("0 of 2 stages are done" if started else "Nothing has run yet") in text


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="manifest.json"):
        write_report(tmp_path)
    Manifest(tmp_path).declare(["base"])
    (tmp_path / "samples.jsonl").write_text('{}\n{"stage"\n')
    with pytest.raises(UserError, match="samples.jsonl:2"):
        write_report(tmp_path)


THINK, END = '<span class="tag">&lt;think&gt;</span>', '<span class="tag">&lt;/think&gt;</span>'


def test_the_page_admits_what_went_wrong(tmp_path):
    run_dir = make_run(tmp_path / "odd", stages={"base": STAGES["base"], "zero": STAGES["zero"]}, steps=5)
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        writer.write("zero", 6, {"logp_gap_max": math.nan, "accuracy": 0.5})
    manifest = Manifest(run_dir)
    manifest.begin("base", "again", {})
    manifest.finish("base", {}, {}, 1.0, gates={"competence": {"value": 0.5, "wanted": 0.97, "passed": False}})
    text = " ".join(Page(write_report(run_dir).read_text()).words)
    assert "zero: logp_gap_max not finite in up to 1 of 6 steps." in text
    assert "clip_fraction not finite" not in text  # null in every step: not measured
    assert "base did not pass its gate competence." in text and "✗ competence 0.500" in text


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> & \"'{{ 7 * 7 }}"


def test_hostile_text_anywhere_stays_text(tmp_path):
    name = 'z"><script>$x_1$'
    run_dir = make_run(tmp_path / "hostile", stages={name: STAGES["zero"]}, steps=3)
    config = json.loads((run_dir / "config.json").read_text())
    config |= {"name": HOSTILE, "report_notes": [HOSTILE]}
    config["stages"][name]["label"] = HOSTILE
    (run_dir / "config.json").write_text(json.dumps(config))
    row = {"stage": name, "problem_id": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "correct": None, "finish": HOSTILE}
    with open(run_dir / "samples.jsonl", "w") as file:
        for text in (HOSTILE, f"<think>{HOSTILE} wait", f"<answer>{HOSTILE}</answer>"):
            file.write(json.dumps(row | {"text": text}) + "\n")
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and "{{ 7 * 7 }}" in text
    assert not [a for a in page.attributes if a[1].startswith("on")]


@pytest.mark.parametrize(
    "text, html",
    [
        ("plain & <b>", "plain &amp; &lt;b&gt;"),
        ("<think>a</think>", f'{THINK}<span class="think">a</span>{END}'),
        ("<answer>4", '<span class="tag">&lt;answer&gt;</span><span class="answer">4</span>'),
        ("wait", "wait"),
        ("<think>so Wait</think>", f'{THINK}<span class="think">so <mark>Wait</mark></span>{END}'),
        ("<think>waiter</think>", f'{THINK}<span class="think">waiter</span>{END}'),
        ("", ""),
    ],
)
def test_transcripts_are_coloured_and_escaped(text, html):
    assert str(color_transcript(text, ["wait"])) == html


def stage(name, kind, init, accuracy):
    return {"name": name, "kind": kind, "init": init, "status": "done", "metrics": {} if accuracy is None else {"pass@1": accuracy}}


def test_the_headline_calls_a_fall_a_fall():
    stages = {"b": stage("b", "pretrain", "", 0.3), "z": stage("z", "grpo", "b", 0.2)}
    said = headline(stages, "validation").replace("\N{NO-BREAK SPACE}", " ")
    assert said == "Reinforcement learning alone did not lift the base model: 30.0 % of the validation problems before, 20.0 % after."
    stages |= {"s": stage("s", "pretrain", "", 0.1), "d": stage("d", "distill", "s", 0.4), "r": stage("r", "grpo", "s", 0.5)}
    assert "reaches 40.0 %, behind 50.0 % for the same student with RL alone" in headline(stages).replace("\N{NO-BREAK SPACE}", " ")


def test_running_mean_is_the_mean_of_the_neighbours():
    assert running_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert running_mean([1.0, 2.0], 1) == [1.0, 2.0]
    found = running_mean([1.0, math.nan, 3.0], 3)
    assert found[0] == 1.0 and math.isnan(found[1]) and found[2] == 3.0


@pytest.mark.parametrize("values", [[0.5], [None, None], [0.0, 0.0], [1e-6, None, 1e-5], [5, 5, 5], []])
@pytest.mark.parametrize("log_scale", [False, True])
def test_a_chart_of_few_constant_or_missing_values_is_drawn(values, log_scale):
    svg = line_chart([Series("a", list(range(len(values))), values, 0)], label='a "label" & <more>', log_scale=log_scale)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and 'aria-label="a &quot;label&quot; &amp; &lt;more>"' in svg


def test_the_time_of_rl_is_split_up(page_text):
    """Per step: 10 s, of which 1 prefill, 2 + 0.5 + 0.5 decode, 4 update, so 2 are left."""
    section = page_text[page_text.index('id="time"') :]
    section = section[: section.index("</section>")]
    for part, percent in (("prefill", 10), ("decode: forward", 20), ("decode: sampling", 5), ("decode: host", 5), ("update", 40), ("other", 20)):
        assert f">{part}</th>" in section and f"{percent} %" in section
