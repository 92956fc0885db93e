"""report.html of procedurally made run folders: complete, partial, and hostile."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from made_run import NOTES, STAGES, make_run  # noqa: E402

from athanor.errors import UserError
from athanor.manifest import Manifest
from athanor.metrics import MetricsWriter
from athanor.report import color_transcript, headline, write_report
from athanor.report_charts import Series, line_chart, running_mean


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
