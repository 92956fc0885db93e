"""How a run is watched: when it counts as hung, when a stage of RL warns, and which samples are written down to be read.  It changes no result."""

from pydantic import Field

from athanor.model_config import Config


class DeadlineConfig(Config):
    """Seconds after which a phase counts as hung: the process says where it is and ends with status 3; `torchrun --max-restarts` starts it again."""

    rollout_s: float = Field(7200, gt=0)
    """Sampling without one more finished sample."""
    reward_s: float = Field(3600, gt=0)
    """Judging the samples of a rollout, or as many at a time, and in an evaluation comparing their answers."""
    update_s: float = Field(3600, gt=0)
    """One optimizer step."""
    checkpoint_s: float = Field(3600, gt=0)
    """Writing a state or a finished model."""
    collective_s: float = Field(7200, gt=0)
    """Waiting for other ranks: at least as long as they may differ in the phases above."""

    def by_phase(self) -> dict[str, float]:
        return {name.removesuffix("_s"): seconds for name, seconds in self.model_dump().items()}


class DetectorConfig(Config):
    """When a stage of RL warns of what is going wrong (detectors.py)."""

    window: int = Field(5, ge=0)
    """Steps in each of the windows that are compared; 0 = no warnings."""
    entropy_ratio: float = Field(0.1, ge=0)
    """Entropy collapse: below this fraction of the first window's."""
    length_ratio: float = Field(1.5, ge=1)
    """Length explosion: above this multiple of the window before, without min_gain in reward."""
    saturation_share: float = Field(0.95, gt=0, le=1)
    """Reward saturation: more than this share of samples has advantage zero."""
    min_gain: float = Field(0.05, ge=0)
    """Change in a mean reward between two windows that counts as one."""
    language_drop: float = Field(0.15, gt=0, le=1)
    """Language drift: the share of words in the target language is this much below its best window."""


class TranscriptConfig(Config):
    """Samples of a stage of RL that go to transcripts/<stage>.jsonl and onto transcripts.html."""

    every: int = Field(10, ge=0)
    """Steps between two steps that are written, the first always; 0 = none."""
    num: int = Field(8, ge=2)
    """Samples of such a step: the best half and the worst half by reward."""
    logps: bool = False
    """With the text and log-prob of every token."""
