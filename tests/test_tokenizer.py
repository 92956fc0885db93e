"""Tokenizers: exact round trips, end tokens, chat templates, refusals, and the same ids in transformers."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from athanor.errors import UserError
from athanor.tokenizer import Tokenizer, symbol_tokenizer

SYMBOLS = [*"0123456789+-=?;", "so", "则", "<think>", "</think>", "<answer>", "</answer>", "User:", "Assistant:"]
TEXT = "User: 1 2 + 3 = ? Assistant: <think> 2 + 3 = 5 so 则 1 5 </think> <answer> 1 5 </answer>"
MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}]
# What real templates use: loop controls, whitespace control, tojson, namespace, the generation tag, special tokens, optional variables.
TEMPLATE = """{{ bos_token }}{% set ns = namespace(n=0) %}
{% for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
{{- '<|' ~ m.role ~ '|>' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m | tojson }}{% endif %}
{% endfor %}
{{ ns.n }}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""


@pytest.fixture
def symbols() -> Tokenizer:
    return symbol_tokenizer(SYMBOLS)


@pytest.fixture
def bpe_folder(tmp_path):
    """A byte-level BPE of the Llama 3 / Qwen kind, trained here, whose post-processor would add <s>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT, "the answer is that the answer was there"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "<|im_end|>", "chat_template": TEMPLATE, "model_max_length": 4}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "temperature": 0.6}))
    return tmp_path


def test_canonical_text_survives_a_round_trip(symbols):
    generator = np.random.default_rng(0)
    for n in (1, 2, 60):
        text = " ".join(generator.choice(SYMBOLS, n))
        assert symbols.decode(symbols.encode(text)) == text
    assert symbols.encode("") == [] and symbols.decode([]) == ""


def test_special_ids_come_first_and_symbols_follow_in_order(symbols):
    assert (symbols.pad_id, symbols.bos_id, symbols.eos_id, symbols.eos_ids) == (0, 1, 2, {2})
    assert symbols.encode("0 9 Assistant:") == [4, 13, 3 + len(SYMBOLS)] and symbols.vocab_size == 4 + len(SYMBOLS)
    assert symbols.encode("<bos> 7 <eos>") == [1, 11, 2]


def test_decode_leaves_out_special_tokens_but_shows_a_sampled_unk(symbols):
    ids = [1, 4, 3, 5, 2, 0, 0]
    assert symbols.decode(ids) == "0 <unk> 1"
    assert symbols.decode(np.array(ids)) == symbols.decode(torch.tensor(ids)) == "0 <unk> 1"
    assert symbols.decode_batch([ids, np.array([2]), []]) == ["0 <unk> 1", "", ""]


@pytest.mark.parametrize("text, symbol", [("1 + x", "x"), ("12 + 3", "12"), ("1 + 3<eos>", "3<eos>"), ("so 但", "但")])
def test_an_unknown_symbol_is_named_not_replaced(symbols, text, symbol):
    for encode in (lambda: symbols.encode(text), lambda: symbols.encode_batch(["1", text])):
        with pytest.raises(UserError, match=f"unknown symbol '{symbol}'"):
            encode()


@pytest.mark.parametrize("bad", [["a", "b", "a"], ["a b"], [""], ["<eos>"], ["x<pad>"]])
def test_symbols_that_could_not_round_trip_are_refused(bad):
    with pytest.raises(ValueError, match="symbol_tokenizer: symbol"):
        symbol_tokenizer(bad)


def test_symbol_tokenizer_survives_a_save(symbols, tmp_path):
    symbols.save(tmp_path / "a")
    loaded = Tokenizer.from_folder(tmp_path / "a")
    assert loaded.encode(TEXT) == symbols.encode(TEXT) and loaded.decode(loaded.encode(TEXT)) == TEXT
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 2, 0, symbols.vocab_size)
    with pytest.raises(UserError, match="unknown symbol 'x'"):
        loaded.encode("x")
    assert Tokenizer.from_folder(tmp_path / "a" / "tokenizer.json").eos_ids == {2}


def test_dictionary_path_equals_the_library(symbols):
    assert symbols.encode(TEXT) == symbols._backend.encode(TEXT, add_special_tokens=False).ids


def test_file_tokenizer_adds_nothing_cuts_nothing_and_reads_all_end_tokens(bpe_folder):
    tokenizer = Tokenizer.from_folder(bpe_folder)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and ids[0] != 0 and len(ids) > 4
    assert tokenizer.encode_batch([TEXT, "", "the"]) == [ids, [], tokenizer.encode("the")]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 2) and tokenizer.eos_ids == {1, 2}
    assert tokenizer.encode("a<|im_end|>")[-1] == 2 and tokenizer.decode([2, *tokenizer.encode("é")]) == "é"


def test_save_keeps_template_end_tokens_and_generation_settings(bpe_folder, tmp_path):
    tokenizer = Tokenizer.from_folder(bpe_folder)
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer.from_folder(tmp_path / "copy")
    assert copy.chat_template == TEMPLATE and copy.eos_ids == tokenizer.eos_ids and copy.encode(TEXT) == tokenizer.encode(TEXT)
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text())["temperature"] == 0.6
    assert copy.eos_id == 2 and copy.pad_id == 2


def test_end_tokens_are_also_read_from_config_json(bpe_folder):
    (bpe_folder / "generation_config.json").unlink()
    (bpe_folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert Tokenizer.from_folder(bpe_folder).eos_ids == {1, 2}


def test_vocab_size_covers_the_largest_id():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 9}, unk_token="a"))
    assert Tokenizer(backend, {"eos_token": "<eos>"}).vocab_size == 10


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "not a valid tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {}}'), "not a valid tokenizer.json"),
    (lambda f: (f / "tokenizer_config.json").write_text("nope"), "tokenizer_config.json is not valid JSON"),
    (lambda f: (f / "tokenizer_config.json").write_text("[]"), "holds a list, wanted an object"),
    (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}'), "eos_token is '<nowhere>', which is not in the vocabulary"),
    (lambda f: [(f / "tokenizer_config.json").unlink(), (f / "generation_config.json").unlink()], "no end token"),
])  # fmt: skip
def test_a_bad_folder_is_one_clear_error(bpe_folder, damage, message):
    damage(bpe_folder)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(bpe_folder)


def test_chat_template_renders_messages(bpe_folder):
    tokenizer = Tokenizer.from_folder(bpe_folder)
    system = '<|system|>{"role": "system", "content": "Be <brief> & kind."}'
    user = '<|user|>{"role": "user", "content": "3 + 4?"}'
    skipped = [*MESSAGES, {"role": "skip", "content": ""}]
    assert tokenizer.apply_chat_template(skipped) == f"<s>{system}{user}<|assistant|>7<|im_end|>3<|assistant|>"
    assert tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=False) == f"<s>{system}1"
    assert tokenizer.apply_chat_template(MESSAGES[:1], enable_thinking=False).endswith("<|assistant|><think></think>")


def test_template_file_and_named_templates_are_found(bpe_folder):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (bpe_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": named}))
    assert Tokenizer.from_folder(bpe_folder).apply_chat_template([]) == "D"
    (bpe_folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(bpe_folder).apply_chat_template([]) == "F"


@pytest.mark.parametrize("template, message", [
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "failed"),
    ("{{ strftime_now('%Y') }}", "strftime_now' is undefined"),
    ("{{ 1 + 'a' }}", "failed"),
])  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_refused(bpe_folder, template, message):
    (bpe_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(bpe_folder).apply_chat_template(MESSAGES)


def test_no_chat_template_is_an_error(symbols):
    with pytest.raises(UserError, match="no chat template"):
        symbols.apply_chat_template(MESSAGES)


def test_transformers_reads_what_we_save_and_renders_the_same(symbols, bpe_folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    ours = Tokenizer.from_folder(bpe_folder)
    for tokenizer, folder in ((symbols, tmp_path / "symbols"), (ours, tmp_path / "bpe")):
        tokenizer.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
        assert theirs.decode(tokenizer.encode(TEXT) + [tokenizer.eos_id], skip_special_tokens=True) == TEXT
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
        assert set(transformers.GenerationConfig.from_pretrained(folder).eos_token_id) == tokenizer.eos_ids
    for kwargs in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"add_generation_prompt": True, "enable_thinking": False}):
        assert ours.apply_chat_template(MESSAGES, **kwargs) == theirs.apply_chat_template(MESSAGES, tokenize=False, **kwargs)
