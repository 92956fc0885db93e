"""Split a response into chain of thought and answer with one pass over its tags.

Well formed (the format reward's meaning):  <think> reasoning </think> <answer> answer </answer>, exactly one of each tag, in this order, over the
whole string; white space around and between is free, both bodies are non-empty, nothing else stands outside.  A scanner and not a regular
expression over the whole text, because `.*?` crosses tags and a multi-line `$` accepts trailing text.

For text that is not well formed:  the chain of thought is what stands inside think blocks (an unclosed block runs to the end; text before a
`</think>` that nothing opened is thought too, as when the prompt ends with `<think>`).  The answer is the last complete answer block outside the
chain of thought, so an answer written while thinking does not count.
"""

import re
from dataclasses import dataclass

_TAGS = re.compile(r"</?(?:think|answer)>")
ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class Response:
    """A parsed response; bodies are stripped of outer white space."""

    think: str | None  # None = no think tag at all
    answer: str | None  # None = no answer block outside the chain of thought
    summary: str  # what the user reads: all text after the chain of thought, tags included
    well_formed: bool


def parse_response(text: str, *, prompt: str = "") -> Response:
    """Parse a completion.  A prompt that ends with `<think>` has opened the think block already.  Linear in the length of the text."""
    if prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    tags = [(match.group(), match.start(), match.end()) for match in _TAGS.finditer(text)]
    thoughts, answer, summary_start = [], None, 0
    think_start = answer_start = None
    for tag, start, end in tags:
        if tag == "<think>" and think_start is None:
            think_start, answer_start = end, None
        elif tag == "</think>":
            if think_start is None:
                think_start, answer = summary_start, None
            thoughts.append(text[think_start:start].strip())
            think_start, summary_start = None, end
        elif think_start is None and tag == "<answer>":
            answer_start = end
        elif think_start is None and tag == "</answer>" and answer_start is not None:
            answer, answer_start = text[answer_start:start].strip(), None
    if think_start is not None:
        thoughts.append(text[think_start:].strip())
        summary_start = len(text)
    well_formed = False
    if [tag for tag, _, _ in tags] == ORDER:
        outside = text[: tags[0][1]] + text[tags[1][2] : tags[2][1]] + text[tags[3][2] :]
        well_formed = not outside.strip() and bool(thoughts[0]) and bool(answer)
    return Response("\n".join(thoughts) if thoughts else None, answer, text[summary_start:].strip(), well_formed)
