"""Rewards against the tables of the papers and of other systems, hostile text, and the two ways to be called."""

import time
from fractions import Fraction

import numpy as np
import pytest

from athanor.errors import UserError
from athanor.rewards import Entry, RewardTable, available_rewards, make_reward, make_table, parse_response
from athanor.rewards.answers import answer_key, last_boxed, parse_number, same_answer
from athanor.rewards.language import count_words, language_consistency
from athanor.rewards.repetition import repetition_ratio
from athanor.samples import Problem, Sample


def sample(text="", answer="4", domain="reasoning", language="en", num_tokens=0, task="t", prompt="q"):
    problem = Problem(prompt, answer, 0, task, domain, language)
    return Sample(problem, text, np.arange(num_tokens), np.zeros(num_tokens, np.float32))


# ---- responses and format

FORMAT_TABLE = [  # the strings on which other systems' regular expressions differ
    ("<think>\nr\n</think>\n<answer>\n4\n</answer>", 1),
    ("<think>r</think><answer>4</answer>", 1),
    ("<think> 3 + 1 so 4 </think> <answer> 4 </answer>", 1),
    ("<think>\nr\n</think>\n<answer>\n4\n</answer>\nmore", 0),
    ("<think>\nr\n</think>\n<answer>\n4\n</answer>\n", 1),
    (" <think>\nr\n</think>\n<answer>\n4\n</answer>", 1),
    ("so <think>\nr\n</think>\n<answer>\n4\n</answer>", 0),
    ("<think>\nr\n</think> thus <answer>\n4\n</answer>", 0),
    ("<think>\nr\n</think>\n<answer>\n4\n</answer>\n<answer>\n5\n</answer>", 0),
    ("<think>\n\n</think>\n<answer>\n4\n</answer>", 0),
    ("<think></think>\n<answer>\n4\n</answer>", 0),
    ("<think>\nr\n</think>\n<answer> </answer>", 0),
    ("<think>\n<think>\nr\n</think>\n<answer>\n4\n</answer>", 0),
    ("<think>\n<think>a</think>r\n</think>\n<answer>\n4\n</answer>", 0),
    ("<think>\nr\n<answer>\n4\n</answer>", 0),
    ("<think>\n<answer>3</answer>\n</think>\n<answer>\n4\n</answer>", 0),
    ("<answer>\n4\n</answer><think>\nr\n</think>", 0),
    ("</think>r<think><answer>4</answer>", 0),
    ("4", 0),
    ("", 0),
]


@pytest.mark.parametrize("text, wanted", FORMAT_TABLE)
def test_format_is_one_of_each_tag_in_order_over_the_whole_text(text, wanted):
    assert make_reward("format")([sample(text)]) == [float(wanted)]


def test_prompt_that_ends_with_think_has_opened_the_block():
    given = sample("r </think> <answer> 4 </answer>", prompt="User: q Assistant: <think>\n")
    assert make_reward("format")([given]) == [1.0]
    assert make_reward("accuracy")([given]) == [1.0]


@pytest.mark.parametrize(
    "text, think, answer",
    [
        ("<think> a </think> <answer> 4 </answer>", "a", "4"),
        ("<answer> 3 </answer> <answer> 4 </answer>", None, "4"),
        ("<think> a <answer> 4 </answer> </think>", "a <answer> 4 </answer>", None),  # an answer written while thinking does not count
        ("<think> a <answer> 4 </answer>", "a <answer> 4 </answer>", None),  # unclosed: still thinking
        ("a <answer> 4 </answer> </think> b", "a <answer> 4 </answer>", None),  # opened by the prompt
        ("<think> a </think> <answer> 4 </answer> <think> b </think>", "a\nb", "4"),
        ("<think> a </think> <answer> 4", "a", None),
        ("<think> a </think> <answer> 3 <answer> 4 </answer>", "a", "4"),
        ("<think> cut", "cut", None),
        ("plain", None, None),
    ],
)
def test_thought_and_answer_of_a_response(text, think, answer):
    response = parse_response(text)
    assert (response.think, response.answer) == (think, answer)


# ---- accuracy

EQUAL = [
    ("4", "4"), (" 4 ", "4"), ("4.", "4"), ("4.0", "4"), ("+4", "4"), ("- 4", "-4"), ("−4", "-4"), ("-0", "0"), ("0.0", "-0.00"), ("007", "7"),
    ("1,000", "1000"), ("1,000.", "1000"), ("1{,}000", "1000"), ("12,345,678.90", "12345678.9"), ("72.0", "72"), (".5", "0.5"), ("5.", "5"),
    ("1/2", "0.5"), ("1 / 2", "0.5"), ("2/4", "1/2"), ("-1/2", "-0.5"), ("\\frac{1}{2}", "1/2"), ("\\dfrac{1}{2}", "0.5"), ("-\\frac{3}{4}", "-0.75"),
    ("\\frac12", "0.5"), ("1 1/2", "1.5"), ("-1 1/2", "-1.5"), ("1\\frac{1}{2}", "1.5"), ("50%", "0.5"), ("50 %", "1/2"), ("12.5\\%", "1/8"),
    ("$18", "18"), ("-$18", "-18"), ("$-18", "-18"), ("$18$", "18"), ("$$18$$", "18"), ("\\(18\\)", "18"), ("\\[ 18 \\]", "18"), ("\\$18", "18"),
    ("€ 5", "5"),
    ("1e3", "1000"), ("1.5E-2", "0.015"), ("\\boxed{7}", "7"), ("$\\boxed{7}$", "7"),
    ("\\boxed{\\frac{1}{2}}", "0.5"), ("４２", "42"), ("0.1", "1/10"),
    ("0.30000000000000000000000000000001", "0.30000000000000000000000000000001"),
    ("(B)", "B"), ("B)", "b"), ("B.", "B"), ("$\\text{(B)}$", "B"),
    ("Paris", "paris"), ("New  York", "New York"), ("True", "true"), ("\\text{Evelyn}", "Evelyn"), ("(1, 2)", "(1,2)"), ("( 1 , 2 )", "(1,2)"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"), ("\\dfrac{\\pi}{2}", "\\frac{\\pi}{2}"), ("x + 1", "x+1"), ("a.", "a"),
    ("检查", "检查"),
]  # fmt: skip
DIFFERENT = [
    ("4", "5"), ("", "4"), ("4 5", "45"), ("1 000", "1000"), ("1,00", "100"), ("10,00,000", "1000000"), ("4", "-4"), ("4-", "4"), ("--4", "4"),
    ("+-4", "-4"),
    ("50%", "50"), ("0.333", "1/3"), ("0.30000000000000000000000000000001", "0.3"), ("1/0", "0"), ("1/0", "1"), ("9**9**9", "387420489"),
    ("2+2", "4"), ("2*2", "4"), ("10²", "102"), ("2½", "10.5"), ("2^2", "22"), ("1e9999", "1"), ("nan", "4"), ("inf", "1e999"), ("x+1", "1+x"),
    ("(B", "B"), ("(BC)", "BC"), ("(4)", "4"),
    ("four", "4"), ("4 apples", "4"), ("Paris", "London"), ("\\frac{1}{2", "1/2"), ("\\boxed{7", "7"), ("0x10", "16"), ("1_000", "1000"),
    ("a b", "ab"),
    ("__import__('os')", "4"), ("1 2/0", "1"), ("(1,2)", "(2,1)"), (".", "0"), ("-", "0"), ("%", "0"), ("$", "0"),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold", EQUAL)
def test_equal_answers_are_equal_both_ways(answer, gold):
    assert same_answer(answer, gold) and same_answer(gold, answer)
    assert answer_key(answer) == answer_key(gold) and hash(answer_key(answer)) == hash(answer_key(gold))


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_different_answers_differ_both_ways(answer, gold):
    assert not same_answer(answer, gold) and not same_answer(gold, answer)


def test_numbers_are_exact():
    assert parse_number("-1,234.5/3") == Fraction(-12345, 30)
    assert parse_number("1e-999") == Fraction(1, 10**999)
    assert parse_number("9" * 81) is None


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{4}", "4"),
        ("so \\boxed{3} no \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\fbox{4}", "4"),
        ("\\boxed{\\boxed{4}}", "\\boxed{4}"),
        ("\\boxed{ \\{1, 2\\} }", "\\{1, 2\\}"),
        ("\\boxed{4} and \\boxed{5", "4"),
        ("\\boxed{3", None),
        ("{\\boxed{4}}}}", "4"),
        ("4", None),
    ],
)
def test_last_boxed_nests_braces(text, content):
    assert last_boxed(text) == content


def test_boxed_rule_reads_after_the_thought():
    accuracy = make_reward("accuracy", extract="boxed")
    texts = ["<think> \\boxed{4} </think> so \\boxed{5}", "<think> \\boxed{5} </think> so $\\boxed{4}$", "so \\boxed{4}", "<think> \\boxed{4}", "4"]
    assert accuracy([sample(text) for text in texts]) == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_accuracy_needs_an_answer_block_and_a_gold_answer():
    accuracy = make_reward("accuracy")
    assert accuracy([sample("<think> a </think> <answer> 4 </answer>"), sample("4"), sample("<answer></answer>")]) == [1.0, 0.0, 0.0]
    assert accuracy([sample("<answer> 4 </answer>", answer=None)]) == [None]
    strict = make_reward("accuracy", require_format=True)
    assert strict([sample("<answer> 4 </answer>"), sample("<think> a </think><answer>4</answer>")]) == [0.0, 1.0]
    assert make_reward("accuracy", ignore_case=False)([sample("<answer>a</answer>", answer="A")]) == [0.0]


REPEATED = [
    "(",
    "\\boxed{",
    "{",
    "\\frac{",
    "1",
    "a",
    "$",
    "`",
    "\\begin{a}",
    " ",
    "\\[",
    "<think>",
    "<answer>",
    "</answer>",
    "</think>",
    "-",
    "1,",
    "$a ",
    "\\text{",
]
REPEATED += [" .", "\\left", "\u0300", "a'", "https://", "```", "字a", "检查", "1/", "\n", "\\"]
HOSTILE = ["9**9**9", "10**10**8", "1e999999999", "\x00\ud800\U0010ffff", *(text * (60_000 // len(text)) for text in REPEATED)]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_costs_little_and_raises_nothing(text):
    rewards = [make_reward("accuracy"), make_reward("accuracy", extract="boxed"), make_reward("format"), make_reward("language")]
    given = [sample(text), sample(f"<think>{text}</think><answer>{text}</answer>"), sample("<answer>4</answer>", answer=text)]
    start = time.process_time()
    for reward in rewards:
        assert all(0.0 <= value <= 1.0 for value in reward(given))
    answer_key(text)
    assert time.process_time() - start < 2  # quadratic behaviour would take minutes at this length


# ---- language

T18 = [
    ("So we need to find the derivative", "en", 1.0),
    ("首先我们需要计算导数", "en", 0.0),
    ("首先我们需要计算导数", "zh", 1.0),
    ("So 首先 we need 计算 it", "en", 4 / 6),  # 首先 and 计算: two characters, one word each
    ("so 则 wait 等等", "en", 0.5),
    ("so 则 wait 等等", "zh", 0.5),
    ("so我们需要计算导数we", "en", 2 / 6),  # eight characters without a space: four words
    ("the value ```\nfor i in range(3): 打印(i)\n``` 结果", "en", 2 / 3),
    ("the value `变量` here", "en", 1.0),
    ("the value $\\text{变量} x$ here", "en", 1.0),
    ("因为 $\\frac{alpha}{beta}$ 所以 \\(gamma delta\\) 对 \\[epsilon\\] \\sqrt", "zh", 1.0),
    ("it costs $5 and then $6 more 钱", "en", 5 / 6),
    ("设 x 为 变量 n1 foo_bar α", "zh", 1.0),
    ("don't stop", "en", 1.0),
    ("3 + 1 - 2 = 2", "en", 1.0),
    ("3 + 1 - 2 = 2", "zh", 1.0),
    ("", "en", 1.0),
    ("これは答えです", "ja", 1.0),
    ("мы считаем the answer", "ru", 0.5),
    ("हम गणना करते हैं", "hi", 1.0),
    ("naïve café déjà vu", "fr", 1.0),
    ("ｗｅ ｎｅｅｄ", "en", 1.0),
    ("```\nunclosed code 中文", "en", 1.0),
]


@pytest.mark.parametrize("thought, language, wanted", T18)
def test_language_consistency_is_the_exact_share(thought, language, wanted):
    assert language_consistency(f"<think>{thought}</think><answer>别的 other</answer>", language) == pytest.approx(wanted, abs=1e-15)


def test_language_looks_at_the_thought_alone_unless_there_is_none():
    assert language_consistency("<think>so we go</think> <answer>中文 中文</answer>", "en") == 1.0
    assert language_consistency("so 则 <answer> 4 </answer>", "en") == 0.5
    assert language_consistency("<think>so 则", "en") == 0.5
    assert make_reward("language", empty=0.0)([sample("<think> 3 </think>")]) == [0.0]
    assert make_reward("language", target="zh")([sample("<think>则</think>", language="en")]) == [1.0]
    assert make_reward("language")([sample("<think>则</think>", language="zh")]) == [1.0]


def test_unknown_language_names_the_known_ones():
    with pytest.raises(UserError, match="unknown target 'xx'"):
        make_reward("language", target="xx")


def test_word_counts_by_script():
    assert count_words("so 则 wait 等等 检查一下") == {"LATIN": 2, "CJK": 4}


# ---- repetition and overlong


def test_repetition_counts_repeated_ngrams():
    assert repetition_ratio([5, 5, 5, 5, 5], 2) == 0.75
    repeated = sample()
    repeated.token_ids = np.array([5, 5, 5, 5, 5])
    assert make_reward("repetition", ngram_size=2)([repeated, sample(num_tokens=1), sample()]) == [-0.75, 0.0, 0.0]
    assert make_reward("repetition", ngram_size=2, max_penalty=2.0)([repeated]) == [-1.5]
    words = make_reward("repetition", ngram_size=1, unit="words")
    assert words([sample("a b A b"), sample("等等等等"), sample("")]) == [-0.5, -0.75, 0.0]


@pytest.mark.parametrize("length, wanted", [(0, 0), (70, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (500, -1)])
def test_overlong_is_dapos_soft_punishment(length, wanted):
    assert make_reward("overlong", max_tokens=100, buffer=20)([sample(num_tokens=length)]) == [pytest.approx(wanted, abs=1e-15)]


# ---- by name, and as TRL calls them


def test_every_file_is_a_reward_and_has_its_name():
    assert set(available_rewards()) >= {
        "accuracy", "cosine", "format", "language", "length", "math", "overlong", "readability", "repetition"
    }  # fmt: skip
    settings = {"overlong": {"max_tokens": 8, "buffer": 4}, "cosine": {"max_tokens": 8}, "code": {"unsafe": True}}
    settings |= dict.fromkeys(("judge", "judge_answer"), {"url": "http://127.0.0.1:1/v1", "model": "m"})
    for name in available_rewards():
        assert make_reward(name, **settings.get(name, {})).__name__ == name


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("acuracy", {}, "did you mean accuracy"),
        ("table", {}, "unknown reward 'table'"),
        ("base", {}, "unknown reward 'base'"),
        ("maths", {}, "did you mean math"),
        ("math_accuracy", {}, "unknown reward 'math_accuracy': did you mean"),
        ("format", {"mode": "loose"}, "mode is 'loose'"),
        ("length", {"scale": 0.0}, "scale is 0.0"),
        ("cosine", {"max_tokens": 0}, "max_tokens is 0"),
        ("readability", {"min_language": 2.0}, "min_language is 2.0"),
        ("readability", {"target": "xx"}, "unknown target 'xx'"),
        ("language", {"detector": "no_such_module:f"}, "detector 'no_such_module:f' cannot be loaded"),
        ("overlong", {"max_token": 3, "buffer": 1}, "unknown setting 'max_token': did you mean max_tokens"),
        ("overlong", {"max_tokens": 3}, "'buffer' is required"),
        ("overlong", {"max_tokens": 0, "buffer": 1}, "max_tokens is 0"),
        ("overlong", {"max_tokens": 3, "buffer": 0}, "buffer is 0"),
        ("repetition", {"ngram_size": 0}, "ngram_size is 0"),
        ("repetition", {"max_penalty": -1.0}, "max_penalty is -1.0"),
        ("repetition", {"unit": "letters"}, "unit is 'letters'"),
        ("accuracy", {"extract": "last"}, "extract is 'last'"),
        ("accuracy", {"extract": "boxed", "require_format": True}, "cannot go with"),
        ("format:x", {}, "no variants"),
        ("overlong", {"max_tokens": "many", "buffer": 1}, "setting 'max_tokens' is 'many': Input should be a valid integer"),
        ("accuracy", {"require_format": 7}, "setting 'require_format' is 7"),
    ],
)
def test_wrong_rewards_are_one_clear_line(name, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        make_reward(name, **settings)
    assert "\n" not in str(caught.value)


def test_trl_calls_the_same_object():
    good, bad = "<think> a </think> <answer> 4 </answer>", "5"
    strings = dict(prompts=["p", "p"], completions=[good, bad], completion_ids=[[1, 2, 1, 2, 1, 2], [3]], answer=["4", "4"], trainer_state=object())
    chat = strings | dict(
        prompts=[[{"role": "user", "content": "p"}]] * 2,
        completions=[[{"role": "assistant", "content": good}], [{"role": "assistant", "content": [{"type": "text", "text": bad}]}]],
    )
    for columns in (strings, chat):
        assert make_reward("accuracy")(**columns) == [1.0, 0.0]
        assert make_reward("format")(**columns) == [1.0, 0.0]
        assert make_reward("language")(**columns, language=["en", "en"]) == [1.0, 1.0]
        assert make_reward("overlong", max_tokens=6, buffer=2)(**columns) == [-1.0, 0.0]
        assert make_reward("repetition", ngram_size=2)(**columns) == [pytest.approx(-0.6), 0.0]
    assert make_reward("accuracy")(prompts=["p"], completions=[good], solution=["4"]) == [1.0]
    assert make_reward("accuracy")(prompts=["p", "p"], completions=[good, good], answer=[None, "4"]) == [None, 1.0]


def test_a_call_that_cannot_be_scored_raises():
    with pytest.raises(ValueError, match="wanted a column `answer`"):
        make_reward("accuracy")(prompts=["p"], completions=["x"], gold=["4"])
    with pytest.raises(ValueError, match="completion_ids"):
        make_reward("overlong", max_tokens=6, buffer=2)(prompts=["p"], completions=["x"])
    with pytest.raises(ValueError, match="got neither"):
        make_reward("format")()
    with pytest.raises(ValueError, match="1 samples but 0 problems"):
        make_reward("format")([sample("x")], [])


# ---- the table


class Constant:
    def __init__(self, name, value):
        self.__name__, self.value, self.seen = name, value, 0

    def __call__(self, samples, problems):
        self.seen += len(samples)
        return [self.value] * len(samples)


def test_r1_totals_by_domain_and_step():
    right, wrong = "<think> so </think> <answer> 4 </answer>", "<think> 则 </think> <answer> 5 </answer>"
    preference = Constant("preference", 0.25)
    table = RewardTable(
        [
            Entry(make_reward("accuracy"), domain="reasoning"),
            Entry(make_reward("format")),
            Entry(make_reward("language")),
            Entry(preference, weight=2.0, domain="general", first_step=10, last_step=11),
        ]
    )
    samples = [sample(right), sample(wrong), sample(right, answer=None, domain="general")]
    early, late = table.score(samples, step=9), table.score(samples, step=10)
    assert early.total.tolist() == [3.0, 1.0, 2.0] and early.total.dtype == np.float64
    assert late.total.tolist() == [3.0, 1.0, 2.5] and table.score(samples, step=12).total.tolist() == [3.0, 1.0, 2.0]
    assert late.parts == {"accuracy": [1.0, 0.0, None], "format": [1.0, 1.0, 1.0], "language": [1.0, 0.0, 1.0], "preference": [None, None, 0.25]}
    assert preference.seen == 1  # a reward model never sees what it does not count for


def test_families_and_domains():
    values = {name: Constant(name, 1.0) for name in ("a", "b", "c", "d")}
    lines = [("a", "math"), ("b", "reasoning"), ("c", "safety"), ("d", "any")]
    table = RewardTable([Entry(values[name], domain=domain) for name, domain in lines])
    domains = ["math", "code", "stem", "logic", "reasoning", "general", "safety"]
    parts = table.score([sample(domain=domain) for domain in domains]).parts
    told = ["".join(name for name in parts if parts[name][i] is not None) for i in range(len(domains))]
    assert told == ["abd", "bd", "bd", "bd", "bd", "d", "cd"]


def test_filters_see_the_raw_score_under_shaping():
    table = make_table([{"name": "accuracy"}, {"name": "overlong", "max_tokens": 10, "buffer": 10}, {"name": "format", "domain": "general"}])
    text = "<answer> 4 </answer>"
    scores = table.score([sample(text, num_tokens=2), sample(text, num_tokens=9), sample(text, answer=None, domain="general", num_tokens=5)])
    assert scores.total.tolist() == pytest.approx([0.8, 0.1, -0.5])
    assert scores.raw.tolist() == pytest.approx([1.0, 1.0, -0.5])  # an all-right group stays all right; without accuracy the total stands in


def test_a_sample_to_which_nothing_applies_is_marked():
    scores = make_table([{"name": "accuracy"}]).score([sample("<answer> 4 </answer>", answer=None), sample("<answer> 4 </answer>")])
    assert scores.applied.tolist() == [False, True] and scores.total.tolist() == [0.0, 1.0]
    empty = make_table([{"name": "accuracy"}]).score([])
    assert empty.total.shape == (0,) and empty.raw.shape == (0,)


def test_wrong_tables_are_refused():
    with pytest.raises(UserError, match="no rewards"):
        RewardTable([])
    with pytest.raises(UserError, match="domain 'maths'; did you mean math"):
        make_table([{"name": "format", "domain": "maths"}])
    with pytest.raises(UserError, match="two lines of 'format'"):  # math belongs to the family reasoning
        make_table([{"name": "format", "domain": "math"}, {"name": "format", "domain": "reasoning"}])
    make_table([{"name": "format", "domain": domain} for domain in ("math", "code", "stem", "logic", "general", "safety")])
    with pytest.raises(UserError, match="two lines of 'format'"):
        make_table([{"name": "format"}, {"name": "format", "domain": "general"}])
    with pytest.raises(UserError, match="steps 5 to 4"):
        make_table([{"name": "format", "first_step": 5, "last_step": 4}])
    with pytest.raises(UserError, match="without `name`"):
        make_table([{"weight": 1.0}])
    make_table([{"name": "format", "domain": "reasoning"}, {"name": "format", "domain": "general"}])
    make_table([{"name": "format", "last_step": 4}, {"name": "format", "first_step": 5, "weight": 2.0}])


def test_a_broken_reward_is_named():
    with pytest.raises(ValueError, match="reward judge: score is nan"):
        RewardTable([Entry(Constant("judge", float("nan")))]).score([sample("x")])
    short = Constant("judge", 1.0)
    short.__class__ = type("Short", (Constant,), {"__call__": lambda self, samples, problems: []})
    with pytest.raises(ValueError, match="0 scores for 1 samples"):
        RewardTable([Entry(short)]).score([sample("x")])
