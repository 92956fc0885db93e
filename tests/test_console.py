"""What a person sees of a run: plain lines in a log, a live line on a terminal, nothing on other ranks and nothing on stdout."""

import io
import re

import pytest

from athanor.console import Console, format_duration, format_figure


def run_stage(console, total=3):
    with console.stage("zero", total) as progress:
        for step in range(1, total + 1):
            progress.step(step, {"accuracy": 0.125 * step, "mean_tokens": 40.25})


def test_a_log_gets_the_first_and_last_step_and_the_figures(capsys):
    file = io.StringIO()
    run_stage(Console(8, every_s=1000, file=file), total=5)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("[1/8] zero  step 1/5") and "left" in lines[0] and "accuracy 0.125  length 40.2" in lines[0]
    assert lines[1].startswith("[1/8] zero  step 5/5") and "left" not in lines[1]
    assert lines[2].startswith("[1/8] zero  done in") and "accuracy 0.625" in lines[2]
    assert capsys.readouterr().out == ""


def test_a_log_gets_a_line_whenever_the_interval_has_passed():
    file = io.StringIO()
    run_stage(Console(1, every_s=0, file=file), total=5)
    assert file.getvalue().count("step ") == 5


def test_a_long_line_is_not_wrapped_in_a_log():
    file = io.StringIO()
    with Console(1, file=file).stage("zero", 1) as progress:
        progress.step(1, {f"a_long_name_of_a_figure_{i}": 0.5 for i in range(9)})
    assert file.getvalue().splitlines()[0].count("a_long_name") == 7


def test_a_terminal_shows_a_live_line_and_leaves_one_when_done(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    run_stage(Console(2, file=file))
    assert "zero" in file.getvalue() and "done in" in file.getvalue() and "\x1b[" in file.getvalue()


def test_a_step_of_rl_shows_what_people_watch_live_and_in_a_log(monkeypatch):
    figures = {"reward": 1.25, "mean_tokens": 412.0, "pass@1": 0.375, "reflection_rate": 0.5, "logp_gap_max": 2e-6, "tokens_per_s": 21345.6}

    def shown():
        file = io.StringIO()
        with Console(3, file=file, every_s=0).stage("zero", 100, first_step=40) as progress:
            progress.step(41, figures)
        return file.getvalue()

    wanted = ("[1/3] zero", "step 41/100", "left", "reward 1.250", "length 412.0", "pass@1 0.375", "logp gap 2.0e-06", "tokens/s 21346")
    plain = shown()
    assert all(part in plain for part in wanted) and "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "250")
    live = shown()
    assert "\x1b[" in live and all(part in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live) for part in wanted)


def test_other_ranks_are_quiet(capsys):
    file = io.StringIO()
    console = Console(2, rank=1, file=file)
    run_stage(console)
    console.note("note")
    console.warn("warning")
    console.skip("base", "done")
    console.table({"base": {"pass@1": 0.5}})
    assert file.getvalue() == "" and capsys.readouterr() == ("", "")


def test_a_warning_is_said_once():
    file = io.StringIO()
    console = Console(1, rank=0, file=file)
    for text in ("slow", "slow", "steep"):
        console.warn(text)
    assert file.getvalue().count("slow") == file.getvalue().count("steep") == 1


def test_a_stage_that_raises_says_where_it_stopped():
    file = io.StringIO()
    with pytest.raises(KeyError):
        with Console(1, file=file).stage("zero", 9) as progress:
            progress.step(4)
            raise KeyError
    assert "stopped at step 4" in file.getvalue()


def test_a_stage_keeps_its_number_over_several_rounds():
    file = io.StringIO()
    console = Console(3, file=file)
    console.skip("base", "done before")
    run_stage(console)
    run_stage(console)
    assert "[1/3] base" in file.getvalue() and "[2/3] zero" in file.getvalue() and "[3/3]" not in file.getvalue()


def test_rate_and_time_left_count_only_the_steps_of_this_process():
    file = io.StringIO()
    with Console(1, file=file).stage("zero", 100, first_step=98) as progress:
        progress.step(99)
    assert "step 99/100" in file.getvalue() and "left" in file.getvalue()


def test_text_from_outside_is_not_read_as_markup():
    file = io.StringIO()
    console = Console(1, file=file)
    console.note("[red]not red[/red] [/]")
    assert file.getvalue() == "[red]not red[/red] [/]\n"


def test_the_table_shows_the_columns_that_some_stage_has():
    file = io.StringIO()
    Console(2, file=file).table({"base": {"pass@1": 0.2, "wall_s": 65}, "zero": {"pass@1": 0.75, "mean_tokens": 47.62}})
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["stage", "pass@1", "mean_tokens", "wall_s"]
    assert lines[1].split() == ["base", "0.200", "-", "1:05"] and lines[2].split() == ["zero", "0.750", "47.6", "-"]


def test_figures_and_durations_are_short():
    assert [format_figure(v) for v in (0.5, 12.34, 12345.6, 1.2e-5, 7, None, float("nan"), 0.0)] == [
        "0.500",
        "12.3",
        "12346",
        "1.2e-05",
        "7",
        "-",
        "-",
        "0.000",
    ]
    assert [format_duration(v) for v in (8.26, 125, 3725)] == ["8.3 s", "2:05", "1:02:05"]
