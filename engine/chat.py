"""A conversation with a checkpoint on the terminal, or with whoever writes lines into a pipe: `python -m athanor.generate --model DIR --chat`.

A line is a message. The folder's chat template renders the conversation; a folder without one needs a template of its own (`--template`), under
which each message stands alone. Chains of thought are shown dimmed or folded and do not go back into the conversation, as R1's and Qwen3's
templates have it.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

import numpy as np

from athanor.config import SamplingConfig
from athanor.errors import UserError
from athanor.generator import Generator
from athanor.samples import Completion, Request
from athanor.seeds import sample_seeds
from athanor.tasks import render
from athanor.tokenizer import Tokenizer

TAGS = ("<think>", "</think>")
THINK = ("auto", "show", "dim", "fold")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/reset begins anew, /quit (or Ctrl-D) ends, Ctrl-C stops a reply; anything else is a message"


class Parts:
    """Splits a growing text into what is thought and what is said; a tag that is not complete yet is held back."""

    def __init__(self, prompt: str = ""):
        self.thinking = prompt.rstrip().endswith("<think>")  # some templates open the chain of thought themselves
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[tuple[bool, str]]:
        """Yield (is it thought?, piece) for new text, the tags left out.  last: nothing follows, so what was held back is text."""
        text = self._held + text
        self._held = ""
        while text:
            tag = TAGS[self.thinking]
            before, found, after = text.partition(tag)
            if not found and not last:
                kept = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
                before, self._held = text[: len(text) - kept], text[len(text) - kept :]
            if before:
                yield self.thinking, before
            self.thinking ^= bool(found)
            text = after


class Conversation:
    """Messages so far, and the next reply."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, sampling: SamplingConfig, *, template: str = "", system: str = "", seed: int = 0):
        if tokenizer.chat_template is None and not template:
            raise UserError("--chat: the folder has no chat template; wanted --template raw, r1_zero, boxed or a text with {prompt}")
        self.generator, self.tokenizer, self.sampling = generator, tokenizer, sampling
        self.template, self.system, self.seed = template, system, seed
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system and not self.template else []

    def prompt_of(self, message: str) -> str:
        """The text that the model sees."""
        if self.template:
            return render(message, self.template)[0]
        return self.tokenizer.apply_chat_template([*self.messages, {"role": "user", "content": message}])

    def reply(self, message: str, show: Callable[[bool, str], None], stopped: Callable[[], bool] = lambda: False) -> Completion:
        """Draw the reply to a message, `show(is it thought?, piece)` as it grows; where `stopped()` it ends, and what was said stays.

        Raises ValueError when prompt and reply do not fit into the model's positions; the conversation is as before then.
        """
        prompt = self.prompt_of(message)
        ids = np.array(self.tokenizer.encode_prompt(prompt), np.int64)
        parts, said, shown = Parts(prompt), "", 0

        def take(token_ids: np.ndarray, *, last: bool = False) -> None:
            nonlocal said, shown
            text = self.tokenizer.decode([t for t in token_ids.tolist() if t not in self.tokenizer.eos_ids])
            whole = len(text if last else text.rstrip("\ufffd"))  # half a character decodes to this
            for thought, piece in parts.feed(text[shown:whole], last=last):
                show(thought, piece)
                said += "" if thought else piece
            shown = max(shown, whole)

        request = Request(ids, sample_seeds(1, self.seed, self.turn))
        completion = None
        with self.generator.stream([request], self.sampling) as stream:
            while not stream.finished:
                if done := stream.step():
                    completion = done[0].completion
                elif stopped():
                    stream.abort()
                else:
                    take(stream.tokens_of(0, 0))
        take(completion.token_ids, last=True)
        self.turn += 1
        if not self.template:
            self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": said.strip()}]
        return completion


def converse(conversation: Conversation, lines: Iterator[str], write: Callable[[str], None], *, think: str = "auto", terminal: bool = False) -> None:
    """Answer line after line until they end or one says /quit.  terminal: dim thoughts, and go on after what a message got wrong."""
    think = ("dim" if terminal else "show") if think == "auto" else think
    for line in lines:
        message = line.strip()
        if message == "/quit":
            break
        if message == "/reset":
            conversation.reset()
        elif message == "/help" or (message.startswith("/") and terminal):
            write(f"{HELP}\n")
        elif message:
            view = _View(write, think)
            try:
                with _interrupts(terminal) as interrupted:
                    completion = conversation.reply(message, view.show, interrupted)
            except ValueError as error:
                if not terminal:
                    raise UserError(str(error)) from None
                write(f"{error}; /reset begins anew\n")
                continue
            view.end()
            if completion.finish not in ("stop", "length"):
                write(f"[{completion.finish}]\n")
            elif completion.finish == "length":
                write(f"[stopped after {len(completion.token_ids)} tokens: --max-tokens]\n" if terminal else "")


@contextlib.contextmanager
def _interrupts(caught: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside the block, which it then does not leave: a window of tokens ends before the reply does."""
    pressed: list[int] = []
    if not caught:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines from the keyboard, with editing and history."""
    import readline  # noqa: F401  (gives input() its editing)

    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return


class _View:
    """Writes the two parts of a reply."""

    def __init__(self, write: Callable[[str], None], think: str):
        self.write, self.think = write, think
        self.thinking, self.folded, self.ended_line = False, 0, True

    def show(self, thought: bool, piece: str) -> None:
        if thought != self.thinking:
            self._turn(thought)
        if thought and self.think == "fold":
            self.folded += len(piece.split())
            return
        self.write(piece)
        self.ended_line = piece.endswith("\n")

    def _turn(self, thought: bool) -> None:
        if self.think == "dim":
            self.write(DIM if thought else PLAIN)
        elif self.think == "show":
            self.write(TAGS[0] if thought else TAGS[1])
        elif not thought:
            self.write(f"[thought for {self.folded} words]\n")
        self.thinking = thought

    def end(self) -> None:
        if self.thinking and self.think != "show":
            self._turn(False)
        if not self.ended_line:
            self.write("\n")


__all__ = ["Conversation", "Parts", "converse", "typed_lines"]
