"""Which problems a step asks, and what comes back."""

import collections
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from athanor.config import MixEntry, ModelConfig, SamplingConfig
from athanor.model.transformer import Decoder
from athanor.parallel import Ranks
from athanor.rollout import ProblemStream, rollout_generator, sample_groups
from athanor.tasks.arithmetic import ArithmeticTask
from athanor.tokenizer import symbol_tokenizer

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from thread_ranks import Turns, on_threads


def counting_task(name, size=None):
    return SimpleNamespace(name=name, size=lambda split: size, problem=lambda split, index: (name, index))


def test_a_finite_task_gives_each_problem_once_per_epoch():
    stream = ProblemStream({"a": counting_task("a", 12)}, [MixEntry(task="a")], 8, 100, 0, "zero")
    asked = [index for step in range(6) for _, index in stream.draw(step)]  # 48 = 4 epochs of 12
    for epoch in range(4):
        assert sorted(asked[epoch * 12 : epoch * 12 + 12]) == list(range(12))
    assert asked[:12] != asked[12:24]


def test_a_step_is_the_same_whenever_it_is_drawn():
    tasks = {"a": counting_task("a", 5), "b": counting_task("b")}
    entries = [MixEntry(task="a", weight=2), MixEntry(task="b")]
    in_order = ProblemStream(tasks, entries, 7, 10, 3, "zero")
    drawn = [in_order.draw(step) for step in range(10)]
    assert ProblemStream(tasks, entries, 7, 10, 3, "zero").draw(9) == drawn[9]
    assert ProblemStream(tasks, entries, 7, 10, 4, "zero").draw(9) != drawn[9]


def test_an_unbounded_task_never_repeats_an_index_and_stages_do_not_share():
    def asked(stage):
        stream = ProblemStream({"a": counting_task("a")}, [MixEntry(task="a")], 32, 50, 0, stage)
        return [index for step in range(50) for _, index in stream.draw(step)]

    assert len(set(asked("zero"))) == 1600
    assert not set(asked("zero")) & set(asked("reasoning_rl"))


def test_shares_follow_the_weights_and_the_start():
    tasks = {"a": counting_task("a"), "b": counting_task("b")}
    stream = ProblemStream(tasks, [MixEntry(task="a", weight=3), MixEntry(task="b", start=0.5)], 8, 10, 0, "general")
    counts = [collections.Counter(name for name, _ in stream.draw(step)) for step in range(10)]
    assert all(c == {"a": 8} for c in counts[:5]) and all(c == {"a": 6, "b": 2} for c in counts[5:])


def test_a_step_without_an_active_task_is_an_error():
    with pytest.raises(ValueError, match="no task is active at step 0"):
        ProblemStream({"a": counting_task("a")}, [MixEntry(task="a", start=0.5)], 8, 10, 0).draw(0)


def test_groups_come_back_with_text_prompt_and_reproducible_samples():
    task = ArithmeticTask()
    tokenizer = symbol_tokenizer(list(task.symbols))
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)).initialize_(0)
    problems = [task.problem("train", i) for i in range(3)]
    ranks, sampling = Ranks(threads=1), SamplingConfig(max_tokens=9)
    generator = rollout_generator(model, tokenizer, 512, 4)
    groups = sample_groups(generator, tokenizer, problems, 4, sampling, ranks, 0, "zero", 5)
    again = sample_groups(generator, tokenizer, problems[1:], 4, sampling, ranks, 0, "zero", 5)
    assert [[s.text for s in g] for g in groups[1:]] == [[s.text for s in g] for g in again]
    for problem, group in zip(problems, groups, strict=True):
        for sample in group:
            assert sample.problem is problem and sample.prompt_ids.tolist() == tokenizer.encode_prompt(problem.prompt)
            kept = [t for t in sample.token_ids.tolist() if t != tokenizer.eos_id]
            assert sample.text == tokenizer.decode(kept) and np.all(sample.logps <= 0)


def test_samples_do_not_depend_on_the_number_of_ranks():
    task = ArithmeticTask()
    tokenizer = symbol_tokenizer(list(task.symbols))
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)).initialize_(0)
    problems, sampling = [task.problem("train", i) for i in range(7)], SamplingConfig(max_tokens=9)

    def drawn(ranks):
        groups = sample_groups(rollout_generator(model, tokenizer, 512, 4), tokenizer, problems, 4, sampling, ranks, 0, "zero", 5)
        return [[(s.problem.id, s.token_ids.tolist(), s.logps.tolist()) for s in group] for group in groups]

    alone = drawn(Ranks(threads=1))
    for world in (2, 3):
        found, _ = on_threads(world, drawn, turns=Turns([]), dispatch="static")
        assert found == [alone[rank::world] for rank in range(world)]


def test_samples_are_handed_over_as_they_finish_and_are_the_ones_that_come_back():
    task = ArithmeticTask()
    tokenizer = symbol_tokenizer(list(task.symbols))
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)).initialize_(0)
    generator, seen, decoding = rollout_generator(model, tokenizer, 4, 4), [], []

    def arrived(sample):
        seen.append(sample)
        decoding.append(generator.running().num_decoding)

    problems = [task.problem("train", i) for i in range(3)]
    groups = sample_groups(generator, tokenizer, problems, 4, SamplingConfig(max_tokens=9), Ranks(threads=1), 0, "zero", 5, on_sample=arrived)
    assert sorted(map(id, seen)) == sorted(id(sample) for group in groups for sample in group)
    assert [group[0].problem for group in groups] == problems
    assert any(n > 0 for n in decoding)  # while others decode
