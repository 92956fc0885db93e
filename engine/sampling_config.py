"""How completions are drawn, and how drafts may speed it up: the parts of the recipe schema that a generator takes."""

from typing import Literal

from pydantic import Field, model_validator

from athanor.model_config import Config


class SamplingConfig(Config):
    """How completions are drawn."""

    temperature: float = Field(1.0, ge=0)
    """Softmax temperature; 0 = greedy."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 = all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens below this fraction of the largest probability."""
    max_tokens: int = Field(128, ge=1)
    """Longest completion in tokens, the end token included."""
    stop: list[str] = []
    """Texts that end a completion; they stay in it."""
    repetition_tokens: int = Field(0, ge=0)
    """End a completion after this many tokens in a row above repetition_probability; 0 = never (MiniMax-M1: 3000)."""
    repetition_probability: float = Field(0.99, gt=0, lt=1)
    """Probability, without truncation, above which a token counts as a repetition."""

    @property
    def truncated(self) -> bool:
        """Whether the log-prob that was sampled from is not that of the full softmax."""
        return bool(self.top_k or self.top_p < 1 or self.min_p or self.temperature == 0)

    @model_validator(mode="after")
    def _stop_strings(self):
        if not all(self.stop):
            raise ValueError("stop has an empty text, wanted at least one character each")
        return self


class SpeculationConfig(Config):
    """Self-speculative decoding: while few samples decode, tokens are drafted and checked several at a time.  The samples stay what they are."""

    tokens: int = Field(0, ge=0, le=15)
    """Drafts per sample and forward, k; 0 = off."""
    draft: Literal["ngram", "mtp"] = "ngram"
    """ngram: what followed the last tokens before, in the sample or in a sibling of its group; mtp: the model's layer for multi-token prediction."""
    max_rows: int = Field(4, ge=1)
    """Samples up to which it pays: more of them fill the machine without drafts."""
