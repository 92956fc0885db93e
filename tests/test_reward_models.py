"""The preference model reads the summary only, learns the annotators' taste, and survives a save."""

import random

import numpy as np
import torch

from athanor.checkpoint import export_model
from athanor.config import ModelConfig
from athanor.model.transformer import Decoder
from athanor.reward_models import Preference, RewardModel, judged_tokens, load_reward, packed, save_reward_head
from athanor.samples import Problem, Sample
from athanor.tasks.courtesy import CourtesyTask
from athanor.tokenizer import symbol_tokenizer

TASK = CourtesyTask()
TOKENIZER = symbol_tokenizer(list(TASK.symbols))


def reward_model():
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.1)
    return RewardModel(Decoder(config).initialize_(0))


def sample(problem, text):
    return Sample(problem, text, np.zeros(1, np.int64), np.zeros(1))


def test_the_chain_of_thought_is_not_read():
    problem = TASK.problem("train", 0)
    a = judged_tokens(TOKENIZER, problem, "<think> greet tom </think> <answer> hello tom </answer>")
    b = judged_tokens(TOKENIZER, problem, "<think> oi whatever oi </think> <answer> hello tom </answer>")
    c = judged_tokens(TOKENIZER, problem, "<think> greet tom </think> <answer> hello ann </answer>")
    assert a.tolist() == b.tolist() != c.tolist()


def test_scores_do_not_depend_on_the_batch():
    model = reward_model()
    torch.nn.init.normal_(model.value_head.weight)
    sequences = [judged_tokens(TOKENIZER, TASK.problem("train", i), TASK.written(i)[1]) for i in range(9)]
    whole = model.score(sequences)
    np.testing.assert_allclose(whole, np.concatenate([model.score([s]) for s in sequences]), atol=1e-5)
    np.testing.assert_allclose(whole, model.score(sequences, batch_size=4), atol=1e-5)


def test_training_on_pairs_recovers_the_taste_and_a_folder_keeps_it(tmp_path):
    model = reward_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    def pair(i):
        problem = TASK.problem("train", i)
        texts = [f"<answer> {TASK.reply(random.Random(f'{i}/{j}'), problem)} </answer>" for j in range(2)]
        return problem, texts

    for step in range(60):
        chosen = []
        for i in range(step * 16, step * 16 + 16):
            problem, (a, b) = pair(i)
            chosen.append(((a, b) if TASK.preferred(problem, a, b, i) else (b, a), problem))
        ids = [judged_tokens(TOKENIZER, problem, text) for texts, problem in chosen for text in texts]
        scores = model(*packed(ids, torch.device("cpu"))).view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.mean, model.std = 0.5, 2.0
    reward = Preference(model, TOKENIZER)
    agree = total = 0
    for i in range(5000, 5200):
        problem, (a, b) = pair(i)
        difference = TASK.utility(problem, a) - TASK.utility(problem, b)
        if abs(difference) >= 2:
            first, second = reward([sample(problem, a), sample(problem, b)])
            agree += (first > second) == (difference > 0)
            total += 1
    assert total > 40 and agree / total > 0.8
    export_model(model.decoder, TOKENIZER, tmp_path / "judge")
    save_reward_head(model, tmp_path / "judge")
    loaded = load_reward("preference", tmp_path / "judge", TOKENIZER, torch.device("cpu"))
    samples = [sample(problem, a), sample(problem, b)]
    np.testing.assert_allclose(loaded(samples), reward(samples), atol=1e-6)


def test_problems_with_a_gold_answer_are_left_to_the_rules():
    reasoning = Problem("User: thank tom ann ? Assistant:", "2", 0, "chain")
    general = TASK.problem("train", 0)
    scores = Preference(reward_model(), TOKENIZER)([sample(reasoning, "<answer> tom </answer>"), sample(general, "<answer> tom </answer>")])
    assert scores[0] is None and isinstance(scores[1], float)


def test_utility_orders_replies_as_described():
    problem = Problem("User: thank tom ann ? Assistant:", None, 0, "courtesy", "general", metadata={"verb": "thank", "people": ["tom", "ann"]})

    def utility(answer):
        return TASK.utility(problem, f"<answer> {answer} </answer>")

    ladder = ["whatever", "tom", "thanks tom", "thanks tom ann", "thanks tom ann so kind", "thanks tom ann so kind friend"]
    values = [utility(answer) for answer in ladder]
    assert values == sorted(values) and len(set(values)) == len(values) and values[-1] == 5.0
    assert utility("thanks tom tom ann") < utility("thanks tom ann") and TASK.utility(problem, "thanks tom ann") == -2.0
