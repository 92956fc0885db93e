"""Stop strings: where the text of a completion first contains one, on token ids as they are drawn."""

import numpy as np

from athanor.tokenizer import Tokenizer

# A character may take this many tokens (a byte-level vocabulary spells a character in up to four), and special tokens have no text at all.
TOKENS_PER_CHARACTER, SPARE_TOKENS = 4, 8


class StopStrings:
    """Finds the first token after which a completion contains one of `strings`.  Only the completion is looked at, never the prompt."""

    def __init__(self, strings: list[str], tokenizer: Tokenizer):
        self.strings, self.tokenizer = strings, tokenizer
        self.reach = TOKENS_PER_CHARACTER * max(map(len, strings)) + SPARE_TOKENS

    def find(self, token_ids: np.ndarray, start: int) -> int | None:
        """Number of tokens up to and including the one that completes a stop string; tokens before `start` were looked at already."""
        for n in range(start + 1, len(token_ids) + 1):
            text = self.tokenizer.decode(token_ids[max(0, n - self.reach) : n])
            if any(string in text for string in self.strings):
                return n
        return None
