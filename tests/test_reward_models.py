"""Reward models read what they should, learn taste and labels, and survive a save."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from athanor.checkpoint import export_model
from athanor.config import ModelConfig, RecipeConfig, RewardModelConfig
from athanor.console import Console
from athanor.errors import UserError
from athanor.metrics import MetricsWriter, read_metrics
from athanor.model.moe import Routes, routers
from athanor.model.transformer import Decoder, PackedAttention, fill_tokens
from athanor.parallel import Ranks
from athanor.reward_models import Preference, RewardModel, Safety, batches, judged_tokens, load_reward, packed, save_reward_head
from athanor.samples import Problem, Sample
from athanor.stages import reward_model as reward_model_stage
from athanor.stages.context import StageContext
from athanor.tasks import make_task
from athanor.tasks.courtesy import CourtesyTask
from athanor.tasks.discretion import SECRET, DiscretionTask
from athanor.tokenizer import symbol_tokenizer

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES  # noqa: E402

TASK, DISCRETION = CourtesyTask(), DiscretionTask()
TOKENIZER, WITH_MINUS = symbol_tokenizer(list(TASK.symbols)), symbol_tokenizer(list(DISCRETION.symbols))


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
    np.testing.assert_array_equal(whole, np.concatenate([model.score([s]) for s in sequences]))  # which rank judges whom changes no bit
    np.testing.assert_array_equal(whole, model.score(sequences, batch_size=4))


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
    save_reward_head(model, model.value_head.weight.detach(), tmp_path / "judge")
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


# ---- the pointwise safety model


def test_safety_reads_the_whole_response_and_preference_the_final_reply():
    problem = DISCRETION.problem("train", 0)
    quiet, thinks = (f"<think> thank {name} </think> <answer> hello </answer>" for name in ("tom", SECRET))
    assert judged_tokens(WITH_MINUS, problem, quiet).tolist() == judged_tokens(WITH_MINUS, problem, thinks).tolist()
    a, b = (judged_tokens(WITH_MINUS, problem, text, "pointwise") for text in (quiet, thinks))
    assert a.tolist() != b.tolist() and WITH_MINUS.decode(b).endswith(thinks)


def test_the_final_reply_needs_no_answer_tags():
    problem = TASK.problem("train", 0)
    tagged, plain = (judged_tokens(TOKENIZER, problem, text).tolist() for text in ("<answer> hello </answer>", "<think> greet </think> hello"))
    assert tagged == plain


def test_labels_are_the_rule_with_noise_and_the_splits_share_no_pair_of_people():
    problems = [DISCRETION.problem("train", i) for i in range(2000)]
    texts = [DISCRETION.response(random.Random(i), problem) for i, problem in enumerate(problems)]
    unsafe = [DISCRETION.unsafe(problem, text) for problem, text in zip(problems, texts, strict=True)]
    wrong = [DISCRETION.judged_safe(p, text, i) == u for i, (p, text, u) in enumerate(zip(problems, texts, unsafe, strict=True))]
    assert 0.3 < np.mean(unsafe) < 0.6 and 0.035 < np.mean(wrong) < 0.065  # 0.05, standard error 0.005
    thoughts = [text.split("</think>")[0].split() for text in texts]
    assert 0.2 < np.mean([SECRET in thought for thought in thoughts]) < 0.5
    pairs = {split: {frozenset(DISCRETION.problem(split, i).metadata["people"]) for i in range(200)} for split in ("train", "validation", "test")}
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["validation"]
    assert problems[0] == DISCRETION.problem("train", 0) and problems[0].domain == "safety" and problems[0].answer is None


def rows(n, flip=lambda i: False):
    """Labelled responses: those with a rude word are unsafe, but for those that `flip` names."""
    for i in range(n):
        word = "oi" if i % 2 else "hello"
        yield {"prompt": f"User: thank {'tom ann bob eve'.split()[i // 2 % 4]} ?", "response": f"<think> {word} </think> <answer> hi </answer>",
               "label": "unsafe" if (i % 2 == 1) != flip(i) else "safe"}  # fmt: skip


def stage_context(tmp_path, task):
    run_dir = tmp_path / "run"
    decoder = Decoder(ModelConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.1)).initialize_(0)
    export_model(decoder, TOKENIZER, tmp_path / "policy")
    recipe = RecipeConfig(name="run", stages={})
    metrics = MetricsWriter(run_dir)
    return StageContext("guard", None, recipe, run_dir, Ranks("cpu", 1), TOKENIZER, {"rows": task}, metrics, Console(1))


def test_a_safety_model_is_trained_from_a_file_and_scores_probabilities(tmp_path):
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(80, flip=lambda i: i % 10 == 0)))
    task = make_task("labelled", train=str(path), validation_share=0, test_share=0)
    context = stage_context(tmp_path, task)
    settings = {"kind": "reward_model", "objective": "pointwise", "task": "rows", "init": str(tmp_path / "policy"), "num_examples": 200}
    config = RewardModelConfig(**settings, steps=30, batch_size=32, optimizer={"lr": 3e-3}, micro_batch_tokens=100)
    with context.metrics:
        result = reward_model_stage.run(context, config)
    measured = result["metrics"]
    assert measured["examples"] == 80 and measured["unsafe_share"] == 0.6  # 40 rude, 8 others by a labeller's error
    assert measured["held_out_label_accuracy"] >= 0.75
    guard = load_reward("safety", context.checkpoint_dir, TOKENIZER, torch.device("cpu"))
    problem = task.problem("train", 0)
    texts = ["<think> hello </think> <answer> hi </answer>", "<think> oi </think> <answer> hi </answer>"]
    safe, unsafe = guard([sample(problem, text) for text in texts])
    assert safe > 0.5 > unsafe and 0 <= unsafe <= safe <= 1
    with pytest.raises(UserError, match="trained pointwise, wanted pairwise"):
        load_reward("preference", context.checkpoint_dir, TOKENIZER, torch.device("cpu"))
    assert guard([sample(Problem("User: 1 ?", "1", 0, "chain"), "x")]) == [None]  # rules judge what has a gold answer


def test_micro_batches_change_nothing(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"User: greet {name} ?", "chosen": f"hi {name}", "rejected": "oi"} for name in ("tom", "ann", "bob", "eve", "lin")]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    context = stage_context(tmp_path, make_task("preferences", train=str(path), validation_share=0, test_share=0))
    heads = []
    with context.metrics:
        for tokens in (16, 4096):
            context.discard_state()
            config = RewardModelConfig(kind="reward_model", task="rows", init=str(tmp_path / "policy"), steps=3, micro_batch_tokens=tokens)
            reward_model_stage.run(context, config)
            heads.append(load_reward("preference", context.checkpoint_dir, TOKENIZER, torch.device("cpu")).model.value_head.weight)
    assert heads[0].abs().max() > 0
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["pairwise", "pointwise"])
def test_a_mixture_is_balanced_while_it_learns_to_judge(tmp_path, objective):
    if objective == "pointwise":
        path, task = tmp_path / "rows.jsonl", "labelled"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    else:
        path, task = tmp_path / "pairs.jsonl", "preferences"
        names = ("tom", "ann", "bob")
        pairs = [{"prompt": f"User: greet {a} {b} ?", "chosen": f"hi {a}", "rejected": "oi"} for a in names for b in names]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    context = stage_context(tmp_path, make_task(task, train=str(path), validation_share=0, test_share=0))
    shape = FAMILIES["deepseek_v3"].model_copy(update={"vocab_size": TOKENIZER.vocab_size, "num_nextn_predict_layers": 1})
    policy = Decoder(shape).initialize_(0)
    policy.train_mtp_(False)
    export_model(policy, TOKENIZER, tmp_path / "policy")
    settings = dict(kind="reward_model", objective=objective, task="rows", init=str(tmp_path / "policy"), steps=1, micro_batch_tokens=32)
    config = RewardModelConfig(**settings, router_bias_rate=0.01, balance_loss=0.5, optimizer={"lr": 1e-3, "warmup_steps": 0})
    collect = reward_model_stage._pairs if objective == "pairwise" else reward_model_stage._labelled
    examples = collect(context, config)
    with context.metrics:
        reward_model_stage.run(context, config)
    (row,) = read_metrics(context.run_dir)
    sequences = [ids for example in examples[len(examples) // 5 :] for ids in example.sequences]
    balances, counts = [], 0
    for ids in sequences:  # one at a time, by forwards of their own
        routes = Routes(num_tokens=len(ids), cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32))
        with torch.no_grad():
            token_ids, positions, cu_seqlens = fill_tokens(*packed([ids], torch.device("cpu")))
            policy(token_ids, positions, PackedAttention(cu_seqlens), routes)
        balances.append(torch.stack(routes.balance).mean())
        counts = counts + torch.stack(routes.counts)
    # The head is zero at first, so every margin is.
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * float(torch.stack(balances).mean()), rel=1e-5)
    assert row["router_imbalance"] == pytest.approx(float((counts.amax(1) / counts.double().mean(1)).max()) - 1) and counts.sum() > 0
    judge = load_reward("preference" if objective == "pairwise" else "safety", context.checkpoint_dir, TOKENIZER, torch.device("cpu")).model
    for before, after, count in zip(routers(policy), routers(judge.decoder), counts.double(), strict=True):
        torch.testing.assert_close(after.bias - before.bias, 0.01 * torch.sign(count.mean() - count).float(), rtol=0, atol=1e-6)
    assert judge.decoder.mtp is not None  # a layer for multi-token prediction stays in the folder, untrained


def test_the_pointwise_loss_is_the_logistic_one():
    model = RewardModel(reward_model().decoder, "pointwise")
    torch.nn.init.normal_(model.value_head.weight)
    problem = TASK.problem("train", 0)
    ids = judged_tokens(TOKENIZER, problem, "hello", "pointwise")
    examples = [reward_model_stage.Example((ids,), safe) for safe in (True, False)]
    loss = -torch.nn.functional.logsigmoid(reward_model_stage._margins(model(*packed([ids, ids], torch.device("cpu"))), examples))
    p = 1 / (1 + math.exp(-model.score([ids])[0]))
    np.testing.assert_allclose(loss.detach().numpy(), [-math.log(p), -math.log(1 - p)], rtol=1e-5)
    np.testing.assert_allclose(Safety(model, TOKENIZER)([sample(problem, "hello")]), [p], rtol=1e-5)


def test_batches_hold_at_most_so_many_tokens_and_items():
    assert batches([3, 3, 3, 9, 1], 6) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert batches([1] * 5, 100, 2) == [(0, 2), (2, 4), (4, 5)] and batches([], 6) == []


@pytest.mark.parametrize("row", [{"label": "maybe"}, {"label": True}, {"is_safe": "safe"}, {"is_safe": 1}, {"label": "safe", "response": " "}, {}])
def test_a_bad_label_is_an_error_of_its_line(tmp_path, row):
    path = tmp_path / "safety.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"} | row) + "\n")
    with pytest.raises(UserError, match=r"safety\.jsonl:1: "):
        make_task("labelled", train=str(path))
