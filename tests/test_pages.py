"""report.html, transcripts.html and results.html as a browser shows them: drawn, without a word on the console, without a request."""

import json
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser as chromium  # noqa: E402
from made_run import make_run  # noqa: E402

from athanor.evaluation_report import METRICS_NAME, write_results
from athanor.parallel import Ranks
from athanor.report import write_report
from athanor.rewards import RewardScores
from athanor.samples import Problem, Sample
from athanor.tokenizer import symbol_tokenizer
from athanor.transcript_log import transcript_path, write_transcripts
from athanor.transcripts import write_page
from athanor.watch_config import TranscriptConfig

pytestmark = [pytest.mark.multiproc, pytest.mark.skipif(chromium.program() is None, reason="no Chromium here (apt-get install chromium)")]
DRAWN = """[...document.querySelectorAll('figure svg[role=img]')].map(svg => {
    const box = svg.getBoundingClientRect();
    const lines = [...svg.querySelectorAll('path, line, use, rect')].filter(x => x.getBoundingClientRect().width > 0);
    return [Math.round(box.width), Math.round(box.height), lines.length];
})"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    profile = tempfile.mkdtemp()
    try:
        with chromium.Browser(Path(profile)) as running:
            yield running
    finally:
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with its report and its transcripts."""
    path = make_run(tmp_path_factory.mktemp("runs") / "tiny-3")
    tokenizer = symbol_tokenizer(["one", "two", "is", "<think>", "</think>", "<answer>", "</answer>"])
    text = "<think> one is two </think> <answer> two </answer>"
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int64)
    samples = [Sample(Problem(f"User: one {i} ?", "two", i, "chain"), text, ids, -np.arange(len(ids), dtype=np.float32)) for i in range(4)]
    total, applied = np.arange(4.0), np.ones(4, bool)
    scores = RewardScores(total, {"accuracy": list(total)}, total, applied, ~applied)
    groups, config = [[sample] for sample in samples], TranscriptConfig(num=4, logps=True)
    for step in (1, 11):
        write_transcripts(transcript_path(path, "zero"), step, groups, [0, 1, 2, 3], scores, [0.5] * 4, config, tokenizer, Ranks(threads=1))
    write_page(path)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    (out / "aime").mkdir()
    settings = {"model": "runs/tiny/checkpoints/general_rl", "k": 64, "split": "test", "seed": 0,
                "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 256}}  # fmt: skip
    metrics = {"num_problems": 30, "pass@1": 0.21, "pass@1_se": 0.04, "cons@64": 0.3, "cons@64_se": 0.08, "mean_tokens": 91.5}
    row = {"task": "aime", "kind": "aime", "settings": settings, "metrics": metrics,
           "breakdowns": {"year": {"2024": {"num_problems": 30, "pass@1": 0.21, "pass@1_se": 0.04}}}}  # fmt: skip
    (out / "aime" / METRICS_NAME).write_text(json.dumps(row))
    return write_results(out)


def quiet(page, path):
    assert page.console == []
    assert page.requests == [path.absolute().as_uri()]


def ink(png):
    """Share of the pixels that are not of the commonest colour, and how many colours there are."""
    image = pytest.importorskip("PIL.Image").open(BytesIO(png)).convert("RGB")
    colours = sorted((count for count, _ in image.getcolors(1 << 24)), reverse=True)
    return 1 - colours[0] / sum(colours), len(colours)


def test_the_report_is_drawn_and_asks_for_nothing(browser, run_dir):
    page = browser.open(run_dir / "report.html")
    figures = browser.value(page, DRAWN)
    assert len(figures) == 6 + 4 + 6  # RL charts, rewards of 4 grpo stages, losses of 6 supervised stages
    assert all(width >= 220 and height >= 80 and lines >= 3 for width, height, lines in figures), figures
    assert browser.value(page, "document.images.length") == 0
    assert browser.value(page, "getComputedStyle(document.querySelector('.tiles .value')).fontSize") > "25px"  # its style is let through
    tall = browser.value(page, "document.documentElement.scrollHeight")
    assert 2000 < tall < 20000
    share, colours = ink(browser.screenshot(page))
    assert share > 0.05 and colours > 30
    details = "[...document.querySelectorAll('details')].at(-1)"
    assert browser.value(page, f"{details}.open") is False
    browser.value(page, f"{details}.querySelector('summary').click()")
    assert browser.value(page, f"{details}.open") is True
    quiet(page, run_dir / "report.html")


@pytest.mark.parametrize("name", ["report.html", "transcripts.html", "results.html"])
def test_a_page_fits_a_phone_a_laptop_and_a_wide_screen(browser, run_dir, results, name):
    path = results if name == "results.html" else run_dir / name
    page = browser.open(path)
    for width in (375, 1280, 2560):
        browser.resize(page, width, 900)
        assert browser.value(page, OVERFLOW) == 0, width
    quiet(page, path)


def test_the_transcripts_fold_and_colour_their_tokens(browser, run_dir):
    page = browser.open(run_dir / "transcripts.html")
    assert browser.value(page, "document.querySelectorAll('details').length") >= 2
    browser.value(page, "document.querySelectorAll('details').forEach(x => { x.open = true })")
    token = "document.querySelector('.l5')"
    assert browser.value(page, f"{token}.getBoundingClientRect().width") > 5
    background = f"getComputedStyle({token}).backgroundColor"
    assert browser.value(page, background) not in ("rgba(0, 0, 0, 0)", browser.value(page, "getComputedStyle(document.body).backgroundColor"))
    quiet(page, run_dir / "transcripts.html")


def test_the_evaluation_shows_our_row_above_the_published_ones(browser, results):
    page = browser.open(results)
    assert browser.value(page, "document.querySelectorAll('h2').length") == 1
    rows = browser.value(page, "[...document.querySelectorAll('table')[0].rows].map(row => row.getBoundingClientRect().height)")
    assert len(rows) > 3 and min(rows) > 20
    assert browser.value(page, "document.querySelector('tr.own').rowIndex") == 1
    quiet(page, results)


def test_a_request_a_message_and_an_error_would_be_seen(browser, tmp_path):
    """What the tests above look for, in a page that has it."""
    path = tmp_path / "loud.html"
    path.write_text("<!doctype html><img src='https://athanor.invalid/x.png'><script>console.log('said'); null.thrown</script>")
    page = browser.open(path)
    assert "https://athanor.invalid/x.png" in page.requests
    assert any("said" in line for line in page.console) and any(line.startswith("exception: ") for line in page.console)
