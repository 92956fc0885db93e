"""A generative judge as a reward for open-ended problems: the final reply against a reference reply, both orders asked (verdicts.py).

    { reward = "judge", domain = "general", settings = { url = "http://localhost:8000/v1", model = "NAME", key_env = "JUDGE_KEY" } }
    { reward = "judge", domain = "general", settings = { checkpoint = "STAGE or folder" } }           the engine's own generator

The first asks an endpoint (endpoint.py); the second is built by the stage (engine/generative_judge.py).  A verdict that cannot be read, a refusal and
a timeout are outcomes that are counted, never scores.
"""

from dataclasses import dataclass

from athanor.rewards.endpoint import AskedEndpoint
from athanor.rewards.verdicts import Comparison


@dataclass(frozen=True, kw_only=True)
class EndpointJudge(Comparison, AskedEndpoint):
    """The judge behind an endpoint; a thread of the pool waits for it."""

    def __post_init__(self):
        Comparison.__post_init__(self)
        AskedEndpoint.__post_init__(self)


make = EndpointJudge
