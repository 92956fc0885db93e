"""Multiple choice: options become lettered lines under the question, the answer is a letter.

The problem's metadata holds `choices` (the options in the order of their letters), by which the reward `choice` knows them.
"""

import string

import numpy as np

from athanor.errors import UserError
from athanor.seeds import derive_seed
from athanor.tasks._files import Item, shown

LETTERS = string.ascii_uppercase


def choice_item(question: str, choices: list, correct: int, metadata: dict, *, shuffle: bool = False, seed: int = 0) -> Item:
    """An item from options and the index of the right one.

    shuffle: the order is a function of (seed, question), so it survives reordering of the file and every letter is as likely to be right.
    """
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip() for text in choices) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"the options are {shown(choices)}, wanted 2 to {len(LETTERS)} non-empty texts")
    if not 0 <= correct < len(choices):
        raise UserError(f"the right option is number {correct}, wanted 0 to {len(choices) - 1}")
    order = np.arange(len(choices))
    if shuffle:
        order = np.random.default_rng(derive_seed("choice", seed, question)).permutation(len(choices))
    listed = [choices[i].strip() for i in order]
    letters = LETTERS[: len(listed)]
    text = question.strip() + "\n\n" + "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, listed, strict=True))
    return Item(text, letters[int(np.flatnonzero(order == correct)[0])], metadata | {"choices": listed}, letters=letters)


def correct_index(value, num_choices: int) -> int:
    """Index of the right option from a letter or a 0-based number, as number or text."""
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in LETTERS:
        value = LETTERS.index(value.strip().upper())
    elif isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_choices:
        raise UserError(f"the answer is {shown(value)}, wanted a letter or an index of {num_choices} options")
    return value
