"""What rejection sampling lets through: recomputed sample by sample from the definition (check T25), and what a kill leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from athanor.checkpoint import export_model
from athanor.config import ModelConfig, RecipeConfig, RejectionConfig, SpeculationConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.judging import score_groups
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.pipeline import build_tasks, check
from athanor.recipe_io import load_recipe
from athanor.samples import Problem, Sample
from athanor.stages import rejection
from athanor.stages.sft import read_examples
from athanor.tasks import make_task
from athanor.tokenizer import symbol_tokenizer
from athanor.weights import load_model

PROBLEM = Problem("User: 3 + 1 - 2 ? Assistant:", "2", 7, "chain")
GOOD = "<think> 4 - 2 so 2 </think> <answer> 2 </answer>"
OPEN = Problem("p", None, 0, "courtesy", "general")
BOXED = Problem("p", "2", 0, "math", metadata={"extract": "boxed"})


def verdict(text, finish="stop", problem=PROBLEM, **changes):
    tokens = np.array([hash(word) % 1000 for word in text.split()])
    sample = Sample(problem, text, tokens, np.zeros(len(tokens)), finish)
    return rejection._unusable(sample) or rejection._verdict(sample, score_groups([[sample]])[0][0], RejectionConfig(kind="rejection", **changes))


@pytest.mark.parametrize(
    "text, wanted",
    [
        (GOOD, "kept"),
        (GOOD.replace("<answer> 2", "<answer> 3"), "incorrect"),
        ("4 - 2 so 2 <answer> 2 </answer>", "format"),
        (GOOD + " 2", "format"),
        (GOOD.replace("so", "则"), "language"),
        ("<think> " + "4 - 2 so 2 wait " * 30 + "</think> <answer> 2 </answer>", "repetition"),
        (GOOD.replace("so", "\n```\nprint(2)\n```\n"), "code"),
        (GOOD.replace("so", " ".join(f"w{i}" for i in range(600))), "paragraph"),
        (GOOD.replace("so", "\n\n".join(" ".join(f"w{i}" for i in range(j, j + 300)) for j in (0, 300))), "kept"),
    ],
)
def test_a_sample_is_kept_only_when_correct_well_formed_readable_and_in_one_language(text, wanted):
    assert verdict(text) == wanted


def test_filters_can_be_changed():
    assert verdict(GOOD, finish="length") == "truncated" and verdict(GOOD, finish="error") == "error"
    assert verdict(GOOD.replace("so", "则"), min_language_consistency=0.0) == "kept"
    assert verdict(GOOD.replace("so", "\n```\nprint(2)\n```\n"), code_blocks=True) == "kept"
    assert verdict(GOOD.replace("so", " ".join(f"w{i}" for i in range(600))), max_paragraph_words=0) == "kept"
    plain = GOOD.replace("4 - 2 so 2", "two and\ntwo make four")
    assert verdict(plain, max_paragraph_words=5) == "kept" and verdict(plain, max_paragraph_words=4) == "paragraph"


def test_a_prompt_that_asks_for_a_box_wants_thought_and_summary():
    assert verdict("<think> 1 + 1 </think> It is \\boxed{2}.", problem=BOXED) == "kept"
    assert verdict("<think> 1 + 1 </think> It is \\boxed{3}.", problem=BOXED) == "incorrect"
    assert verdict("It is \\boxed{2}.", problem=BOXED) == "format" == verdict("<think> \\boxed{2}", problem=BOXED)


def test_open_ended_problems_are_not_judged_by_accuracy():
    assert verdict("<think> thank tom </think> <answer> thanks tom </answer>", problem=OPEN) == "kept"


def test_a_verifier_that_gave_up_keeps_nothing():
    sample = Sample(PROBLEM, GOOD, np.arange(9), np.zeros(9))
    assert rejection._verdict(sample, None, RejectionConfig(kind="rejection")) == "unjudged"


def context_of(tmp_path, groups=None, **recipe):
    """A stage context whose samples are `groups`, or come from the checkpoint tmp_path/model."""
    tasks = {"chain": make_task("arithmetic", min_terms=2, max_terms=3), **recipe.pop("tasks", {})}
    tokenizer = symbol_tokenizer(list(tasks["chain"].symbols))
    return SimpleNamespace(
        name="data", recipe=SimpleNamespace(seed=0, max_rows=8, speculation=SpeculationConfig()), ranks=Ranks("cpu", 1), tasks=tasks,
        tokenizer=tokenizer, console=Console(1),
        state_dir=tmp_path / "state", data_path=tmp_path / "data" / "data.jsonl", load=lambda source: load_model(tmp_path / "model"), on_save=None,
    )  # fmt: skip


def run_on(monkeypatch, context, groups, **changes):
    """Run the stage on given groups of samples; return its rows and metrics."""
    problems = [group[0].problem for group in groups]
    monkeypatch.setattr(rejection, "resumable_groups", lambda g, t, asked, *a, **k: [group for group in groups if group[0].problem in asked])
    monkeypatch.setattr(rejection, "ProblemStream", lambda *a, **k: SimpleNamespace(draw=lambda step: problems))
    result = rejection.run(context, RejectionConfig(kind="rejection", source="zero", **changes))
    return [json.loads(line) for line in context.data_path.read_text().splitlines()], result["metrics"]


def group_of(problem, *texts):
    return [Sample(problem, text, np.arange(len(text.split())), np.zeros(1)) for text in texts]


def test_duplicates_and_surplus_are_dropped_and_counted(monkeypatch, tmp_path):
    other = GOOD.replace("4 - 2 so 2", "4 - 2 so 2 check 4 - 2 so 2 ok")
    group = group_of(PROBLEM, GOOD, GOOD, other, other.replace("ok", "ok ok"), GOOD.replace("<answer> 2", "<answer> 9"))
    rows, metrics = run_on(monkeypatch, context_of(tmp_path), [group], keep_per_prompt=2)
    assert sorted(row["completion"] for row in rows) == sorted([GOOD, other])
    wanted = {"sampled": 5, "kept": 2, "written": 0, "acceptance": 0.4, "dropped_duplicate": 1, "dropped_surplus": 1, "dropped_incorrect": 1}
    assert metrics == wanted
    statistics = json.loads((tmp_path / "data" / "data.statistics.json").read_text())
    mean_tokens = (len(GOOD.split()) + len(other.split())) / 2
    assert statistics == wanted | {"tasks": {"chain": {"prompts": 1, "sampled": 5, "kept": 2, "acceptance": 0.4, "mean_tokens": mean_tokens}}}


def test_what_cannot_stay_is_not_judged(monkeypatch, tmp_path):
    judged = []
    monkeypatch.setattr(rejection, "score_groups", lambda groups, *a, **k: judged.extend(groups) or score_groups(groups, *a, **k))
    wrong = GOOD.replace("<answer> 2", "<answer> 3")
    drawn = [("2", "stop"), (wrong, "stop"), (GOOD, "length"), (GOOD, "stop")]
    group = [Sample(PROBLEM, text, np.arange(3), np.zeros(3), finish) for text, finish in drawn]
    rows, metrics = run_on(monkeypatch, context_of(tmp_path), [group])
    assert [[sample.text for sample in group] for group in judged] == [[wrong], [GOOD]] and len(rows) == 1
    assert metrics["dropped_format"] == metrics["dropped_incorrect"] == metrics["dropped_truncated"] == 1


def test_what_an_evaluation_set_holds_is_removed_and_counted_per_set(monkeypatch, tmp_path):
    asked = "A farmer has nine cows and sells four of them at the market today, how many stay?"
    solution = "nine cows less four cows leaves five cows on the old farm by the river"
    for name, row in (("gsm", {"question": asked, "answer": "#### 5"}), ("other", {"question": solution, "answer": "5"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    tasks = {"gsm": make_task(f"gsm8k:{tmp_path}/gsm.jsonl")}
    other = str(tmp_path / "other.jsonl")
    template = "Please think about the question that follows here and answer it in the way you know: {}"
    questions = [asked.upper(), "How many cows are left?"]
    bad, good = (Problem(template.format(q), "5", i, "farm", metadata={"question": q}) for i, q in enumerate(questions))
    right = "<think> nine less four </think> <answer> 5 </answer>"
    leaked = f"<think> {solution} </think> <answer> 5 </answer>"
    rows, metrics = run_on(
        monkeypatch, context_of(tmp_path, tasks=tasks), [group_of(bad, right), group_of(good, right, leaked)], decontaminate=["gsm", other]
    )
    assert [row["completion"] for row in rows] == [right] and rows[0]["id"] == 1
    assert (metrics["sampled"], metrics["dropped_contaminated"], metrics["contaminated_prompts"], metrics["contaminated_samples"]) == (2, 1, 1, 1)
    found = json.loads((tmp_path / "data" / "data.statistics.json").read_text())["contaminated"]
    assert found == {"prompts": {"gsm": 1, other: 0}, "samples": {"gsm": 0, other: 1}}


def test_files_are_mixed_in(monkeypatch, tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "completion": f"c {i}"}) + "\n" for i in range(10)))
    group = [group_of(PROBLEM, GOOD)]
    rows, metrics = run_on(monkeypatch, context_of(tmp_path), group, mixed=[str(path)], num_mixed=4)
    assert metrics["mixed"] == 4 and sorted(row["source"] for row in rows) == ["data", *["mixed"] * 4]
    assert len({row["prompt"] for row in rows}) == 5
    assert len(run_on(monkeypatch, context_of(tmp_path), group, mixed=[str(path)])[0]) == 11


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("decontaminate", "nothing", "stages.data.decontaminate: got 'nothing', wanted a file or a task"),
        ("mixed", "chain", "stages.data.mixed: got 'chain', wanted a file"),
    ],
)
def test_a_wrong_source_is_found_before_anything_runs(field, value, message):
    recipe = load_recipe(RecipeConfig, Path(__file__).with_name("micro_recipe.toml"), [f'--stages.data.{field}=["{value}"]'])
    with pytest.raises(UserError, match=message):
        check(recipe, build_tasks(recipe))


# ---- a kill in the middle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = context_of(folder).tokenizer
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, intermediate_size=16, initializer_range=0.3)
    export_model(Decoder(config).initialize_(0), tokenizer, folder / "model")
    return folder


def collect(context, step=lambda done: None):
    config = RejectionConfig(
        kind="rejection", source="zero", prompts=[{"task": "chain"}], num_prompts=12, samples_per_prompt=3, sampling={"max_tokens": 8}
    )
    return rejection._sampled(context, config, SimpleNamespace(step=step))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 20, 35])
def test_a_killed_stage_samples_only_what_is_missing(checkpoint, tmp_path, monkeypatch, after):
    (tmp_path / "model").symlink_to(checkpoint / "model")
    judged = []
    monkeypatch.setattr(rejection, "_unusable", lambda sample: None)
    monkeypatch.setattr(rejection, "_verdict", lambda sample, score, config: judged.append((sample.text, sample.token_ids.tolist())) or "kept")
    whole, reasons, statistics = collect(context_path(tmp_path, "whole"))
    reference, judged[:] = list(judged), []

    def die(done):
        if done >= after:
            raise Killed

    context = context_path(tmp_path, "killed")
    with pytest.raises(Killed):
        collect(context, die)
    path = context.state_dir / "samples.jsonl"
    finished = len(path.read_bytes().splitlines()) if path.exists() else 0
    if path.exists():
        with open(path, "ab") as file:
            file.write(b'{"index": 11, "samp')  # half a line, as a kill inside a write leaves it
    drawn = []
    original = rejection.resumable_groups
    monkeypatch.setattr(rejection, "resumable_groups", lambda *a, **k: original(*a, **k | {"progress": drawn.append}))
    again, reasons_again, statistics_again = collect(context)
    assert (again, reasons_again, statistics_again, judged) == (whole, reasons, statistics, reference)
    assert len(drawn) == 36 - 3 * finished and (after < 20 or finished > 0)
    assert path.read_bytes() == (tmp_path / "whole" / "state" / "samples.jsonl").read_bytes()


def context_path(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    if not (tmp_path / name / "model").exists():
        (tmp_path / name / "model").symlink_to(tmp_path / "model")
    return context_of(tmp_path / name)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "a"}', '{"prompt": "a", "completion": 3}', '{"prompt": "a", "completion": ""}'])
def test_a_wrong_line_of_a_data_file_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"{path}:2"):
        read_examples(path)
