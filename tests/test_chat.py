"""A conversation: what the model is asked, what is shown of a reply, and what of it goes on."""

import io
import os
import pty
import random
import subprocess
import sys

import pytest

from athanor.chat import DIM, PLAIN, Conversation, Parts, _View, converse
from athanor.checkpoint import export_model
from athanor.config import ModelConfig, SamplingConfig
from athanor.errors import UserError
from athanor.generate import main
from athanor.generator import Generator
from athanor.model.transformer import Decoder
from athanor.tokenizer import symbol_tokenizer

WORDS = ["one", "two", "is", "plus", "user", "assistant", "system", "<think>", "</think>"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"


def tokenizer_with(template):
    tokenizer = symbol_tokenizer(WORDS)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=tokenizer_with(None).vocab_size, hidden_size=32, num_hidden_layers=1, initializer_range=0.3)
    return Decoder(config).initialize_(0).requires_grad_(False)


def talk(model, chat=TEMPLATE, max_tokens=12, **settings):
    tokenizer = tokenizer_with(chat)
    generator = Generator(model, tokenizer.eos_ids, tokenizer=tokenizer, max_rows=1)
    return Conversation(generator, tokenizer, SamplingConfig(max_tokens=max_tokens), **settings)


@pytest.mark.parametrize("text, parts", [
    ("<think>a <b</think> c", [(True, "a <b"), (False, " c")]),
    ("no thought < here", [(False, "no thought < here")]),
    ("x<think>never closed", [(False, "x"), (True, "never closed")]),
    ("<think></think>", []),
    ("a <thi", [(False, "a <thi")]),
])  # fmt: skip
def test_parts_do_not_depend_on_how_the_text_arrives(text, parts):
    for seed in range(20):
        rng, splitter, found, at = random.Random(seed), Parts(), [], 0
        while at < len(text):
            step = rng.randint(1, 5)
            found += splitter.feed(text[at : at + step])
            at += step
        found += splitter.feed("", last=True)
        joined = []
        for thought, piece in found:
            if joined and joined[-1][0] == thought:
                joined[-1] = (thought, joined[-1][1] + piece)
            else:
                joined.append((thought, piece))
        assert joined == parts


def test_a_template_that_opens_the_thought_is_understood():
    assert list(Parts("assistant <think>\n").feed("a</think>b", last=True)) == [(True, "a"), (False, "b")]


@pytest.mark.parametrize("think, shown", [("show", "<think>so it is</think>4\n"), ("dim", f"{DIM}so it is{PLAIN}4\n"),
                                          ("fold", "[thought for 3 words]\n4\n")])  # fmt: skip
def test_thoughts_are_shown_dimmed_or_folded(think, shown):
    out = []
    view = _View(out.append, think)
    for part in [(True, "so "), (True, "it is"), (False, "4")]:
        view.show(*part)
    view.end()
    assert "".join(out) == shown


def test_what_was_said_goes_on_and_what_was_thought_does_not(model, monkeypatch):
    conversation = talk(model, system="plus")
    assert conversation.prompt_of("one") == "system plus user one assistant"
    monkeypatch.setattr(conversation.tokenizer, "decode", lambda ids: "<think> one </think> two")
    conversation.reply("one", lambda *_: None)
    assert conversation.prompt_of("is") == "system plus user one assistant two user is assistant"
    conversation.reset()
    assert conversation.prompt_of("is") == "system plus user is assistant"


def test_a_reply_is_shown_as_it_grows_and_is_the_completion(model):
    conversation, shown = talk(model), []
    completion = conversation.reply("one plus two", lambda thought, piece: shown.append((thought, piece)))
    text = conversation.tokenizer.decode([t for t in completion.token_ids.tolist() if t not in conversation.tokenizer.eos_ids])
    whole = list(Parts().feed(text, last=True))
    assert "".join(piece for _, piece in shown) == "".join(piece for _, piece in whole) and len(completion.token_ids) > 0
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1]["content"] == "".join(piece for thought, piece in whole if not thought).strip()


def test_the_same_seed_gives_the_same_conversation_and_turns_differ(model):
    def said(seed):
        conversation, out = talk(model, seed=seed), []
        converse(conversation, iter(["one", "one"]), out.append)
        return "".join(out)

    assert said(0) == said(0) != said(1)


def test_a_reply_can_be_stopped_and_what_was_said_stays(model):
    conversation = talk(model, max_tokens=1000)
    conversation.generator.eos_ids = frozenset([0])  # <pad>: nothing ends it soon
    calls = iter([False] * 2 + [True] * 1000)
    completion = conversation.reply("one", lambda *_: None, lambda: next(calls))
    assert completion.finish == "abort" and 0 < len(completion.token_ids) < 1000 and len(conversation.messages) == 2


def test_commands_reset_and_quit(model):
    conversation, out = talk(model), []
    converse(conversation, iter(["one", "", "/reset", "two", "/help", "/quit", "one"]), out.append)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["two"] and "Ctrl-D" in "".join(out)


def test_a_folder_without_a_template_needs_one_and_messages_then_stand_alone(model):
    with pytest.raises(UserError, match="--template"):
        talk(model, None)
    conversation = talk(model, None, template="user {prompt} assistant")
    converse(conversation, iter(["one", "two"]), lambda text: None)
    assert conversation.prompt_of("is") == "user is assistant" and conversation.messages == []


def test_a_conversation_that_is_too_long_is_said_and_forgotten_on_a_terminal(model):
    conversation, out = talk(model, max_tokens=4090), []
    converse(conversation, iter(["one plus two is one plus two"]), out.append, terminal=True)
    assert "max_position_embeddings" in out[0] and "/reset" in out[0] and conversation.messages == []
    with pytest.raises(UserError, match="max_position_embeddings"):
        converse(conversation, iter(["one plus two is one plus two"]), out.append)


def test_the_command_line_talks_with_a_pipe(model, tmp_path, monkeypatch, capsys):
    export_model(model, tokenizer_with(TEMPLATE), tmp_path / "m")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/quit\n"))
    assert main(["--model", str(tmp_path / "m"), "--chat", "--max-tokens", "5", "--threads", "1"]) == 0
    out = capsys.readouterr()
    assert out.out.endswith("\n") and "\x1b" not in out.out and out.err == ""
    for wrong, word in ((["--chat", "--json"], "--json"), (["--prompt", "one", "--system", "x"], "--system")):
        assert main(["--model", str(tmp_path / "m"), *wrong]) == 2 and word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiproc
def test_it_talks_on_a_terminal(model, tmp_path):
    export_model(model, tokenizer_with(TEMPLATE), tmp_path / "m")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "athanor.generate", "--model", str(tmp_path / "m"), "--chat", "--max-tokens", "5", "--threads", "1"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    seen = b""
    while b"> " not in seen:
        seen += os.read(ours, 1024)
    os.write(ours, b"one\n")
    seen = b""
    while b"> " not in seen.replace(b"one", b"", 1) or len(seen) < 12:
        seen += os.read(ours, 1024)
    os.write(ours, b"/quit\n")
    assert process.wait(timeout=30) == 0, process.stderr.read()
