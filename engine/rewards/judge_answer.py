"""A generative judge that says whether the final answer means the gold answer: 1 or 0, for answers that no rule can compare (verdicts.py).

Settings as of the reward "judge": `url` and `model` of an endpoint, or `checkpoint` for the engine's own generator.
"""

from dataclasses import dataclass

from athanor.rewards.endpoint import AskedEndpoint
from athanor.rewards.verdicts import Equivalence


@dataclass(frozen=True, kw_only=True)
class EndpointAnswerJudge(Equivalence, AskedEndpoint):
    """The judge behind an endpoint; a thread of the pool waits for it."""


make = EndpointAnswerJudge
