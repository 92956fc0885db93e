"""The engine's own generator as a judge: a model that always says the same shows what is asked, averaged and counted."""

import numpy as np
import pytest
import torch

from athanor.checkpoint import export_model
from athanor.config import ModelConfig
from athanor.errors import UserError
from athanor.generative_judge import judge_settings, load_judge
from athanor.model.transformer import Decoder
from athanor.rewards import Entry, RewardService, RewardTable, make_reward
from athanor.rewards.verdicts import COMPARISON, EQUIVALENCE
from athanor.samples import Problem, Sample
from athanor.tokenizer import symbol_tokenizer

WORDS = f"{COMPARISON} {EQUIVALENCE} [[no]] well Hello Hi Say hi.".split()
TOKENIZER = symbol_tokenizer(list(dict.fromkeys(WORDS)))
WIDTH = 256


def says(tmp_path, *words, max_position_embeddings=4096):
    """A checkpoint that writes these different words after any prompt, then ends: hidden states are one-hot, the lm_head is a table of bigrams."""
    vocab = TOKENIZER.vocab_size
    config = ModelConfig(
        architecture="llama", vocab_size=vocab, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=16, tie_word_embeddings=False, max_position_embeddings=max_position_embeddings,
    )  # fmt: skip
    model = Decoder(config).initialize_(0)
    ids = [*(TOKENIZER.encode(word)[0] for word in words), TOKENIZER.eos_id]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.embed.weight.copy_(torch.eye(WIDTH)[:vocab])
        model.lm_head_weight[ids[0]] = 1.0
        for before, after in zip(ids, ids[1:], strict=False):
            model.lm_head_weight[after, before] = 2.0
    export_model(model, TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def load(folder, name="judge", **settings):
    return load_judge(name, folder, {"max_tokens": 8} | settings, device=torch.device("cpu"), dtype=torch.float32, seed=0)


def sample(text, *, answer=None, reference="Hello", i=0):
    problem = Problem("Say hi.", answer, i, "chat", "general", metadata={"reference": reference})
    return Sample(problem, text, np.zeros(1, np.int64), np.zeros(1, np.float32))


def test_a_judge_that_always_prefers_the_first_reply_says_nothing(tmp_path):
    judge = load(says(tmp_path, "[[A>>B]]"))
    asked = []
    generate, judge.generator.generate = judge.generator.generate, lambda requests, *rest: asked.extend(requests) or generate(requests, *rest)
    outcomes = judge.outcomes([sample("Hi"), sample("Hello Hello"), sample("x", answer="4")])
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [("score", 0.0), ("score", 0.0), ("score", None)]
    assert len(asked) == 4  # both orders of two replies, in one batch


def test_failures_are_counted_and_the_others_go_on(tmp_path):
    with RewardService(RewardTable([Entry(load(says(tmp_path, "well", "[[A=B]]"))), Entry(make_reward("format"))])) as service:
        given = [sample("Hi"), sample("Hi", reference=""), sample("Hi", i=2)]
        for s in given:
            service.submit(s)
        scores = [service.score(given), service.score(given)]  # a second look asks nothing
        figures, first = service.measure()
    assert scores[0].parts["judge"] == [0.0, None, 0.0] and scores[0].dropped.tolist() == [False, True, False]
    assert scores[1].total.tolist() == scores[0].total.tolist() and figures["reward_judged"] == 3
    assert (figures["reward_errors"], figures["reward_timeouts"]) == (1, 0) and "no text 'reference'" in first
    with RewardService(RewardTable([Entry(load(says(tmp_path, "well")))], "zero")) as service:
        scores = service.score([sample("Hi")])
        figures, first = service.measure()
    assert scores.total.tolist() == [0.0] and figures["reward_errors"] == 1 and "got none" in first


def test_a_prompt_beyond_the_context_is_an_error_of_its_sample(tmp_path):
    judge = load(says(tmp_path, "[[yes]]", max_position_embeddings=2000), "judge_answer")
    outcomes = judge.outcomes([sample("<answer> Hi </answer>", answer="Hi"), sample(f"<answer> {'Hi ' * 2000} </answer>", answer="Hi")])
    assert [outcome.status for outcome in outcomes] == ["score", "error"] and outcomes[0].value == 1.0 and "more than 2000" in outcomes[1].message


def test_settings_are_checked():
    question, sampling = judge_settings("judge", {"rounds": 2, "temperature": 0.5})
    assert question.rounds == 2 and (sampling.temperature, sampling.max_tokens) == (0.5, 1024)
    for name, settings, message in (
        ("judge", {"round": 2}, "unknown setting 'round'.*rounds"),
        ("judge", {"temperature": -1}, "temperature"),
        ("format", {}, "no setting checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            judge_settings(name, settings)
