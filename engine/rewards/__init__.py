"""Rewards by name: one file per reward, `make_reward("overlong", max_tokens=512, buffer=64)`.

A reward is a callable with a `__name__`:  reward(samples, problems) -> list[float | None], None = does not apply to this sample.
TRL calls the same object unchanged:  reward(prompts=[...], completions=[...], completion_ids=[...], answer=[...], **columns).
"""

from athanor.registry import build, registered
from athanor.rewards.base import Outcome, Reward
from athanor.rewards.response import Response, parse_response
from athanor.rewards.service import RewardService
from athanor.rewards.table import Entry, RewardScores, RewardTable, make_table

__all__ = [
    "Entry", "Outcome", "Response", "Reward", "RewardScores", "RewardService", "RewardTable", "available_rewards", "make_reward", "make_table",
    "parse_response",
]  # fmt: skip

# A file math.py would hide the standard module from every script of its folder.
_FILES = {"math": "math_accuracy"}


def make_reward(name: str, **settings) -> Reward:
    """Build the reward that the file `rewards/<name>.py` (of "math": math_accuracy.py) defines.

    Raises UserError on an unknown name or setting, with near misses.
    """
    return build(__name__, "reward", name, settings, _FILES)


def available_rewards() -> list[str]:
    """Names that `make_reward` takes."""
    return registered(__name__, _FILES)
