"""Warnings about reinforcement learning that goes wrong in the ways that are known: read off the metrics of a stage's steps.

Two windows of `window` steps each are compared, the last one and the one before it ("before"); `start` is the first window of the stage.

    entropy_collapse   entropy now < entropy_ratio x start
    length_explosion   length now > length_ratio x before, and the reward did not rise by min_gain
    reward_saturation  share of samples with zero advantage now > saturation_share: groups are all right or all wrong, and nothing is learnt
    format_hacking     format reward rose by min_gain while accuracy fell by min_gain, now against before
    language_drift     share of words in the target language fell by language_drop against the stage's best window

A detector speaks when an episode begins, and again only after a window of steps without it.  Log-prob gaps have their own check (policy_update.py).
"""

from collections.abc import Iterable

from athanor.rewards.table import VERIFIERS
from athanor.watch_config import DetectorConfig

NAMES = ("entropy_collapse", "length_explosion", "reward_saturation", "format_hacking", "language_drift")


class Detectors:
    """All detectors over one stage.  `seen`: metrics of the steps before, in order, so that a resumed stage warns as an uninterrupted one does."""

    def __init__(self, config: DetectorConfig, seen: Iterable[dict] = ()):
        self.config = config
        self._history: dict[str, list[float]] = {}
        self._quiet = dict.fromkeys(NAMES, config.window)  # steps since the detector last held
        for row in seen:
            self.update(row)

    def update(self, metrics: dict) -> dict[str, str]:
        """Take the metrics of one step; return what begins with it, name -> what is wrong in one sentence."""
        row = {name: metrics.get(name) for name in ("entropy", "mean_tokens", "reward", "zero_advantage_rate", "format", "language_consistency")}
        row["accuracy"] = next((metrics[name] for name in VERIFIERS if metrics.get(name) is not None), None)
        for name, value in row.items():
            if value is not None:
                self._history.setdefault(name, []).append(float(value))
        begun = {}
        for name in NAMES:
            message = getattr(self, f"_{name}")() if self.config.window else None
            if message is not None and self._quiet[name] >= self.config.window:
                begun[name] = message
            self._quiet[name] = 0 if message is not None else self._quiet[name] + 1
        return begun

    def _mean(self, name: str, back: int = 0) -> float | None:
        """Mean of a metric over the window that ended `back` windows ago; None while there are too few steps for it."""
        values, width = self._history.get(name, []), self.config.window
        end = len(values) - back * width
        return sum(values[end - width : end]) / width if end >= width else None

    def _start(self, name: str) -> float | None:
        """Mean over the first window, once there are two."""
        values, width = self._history.get(name, []), self.config.window
        return sum(values[:width]) / width if len(values) >= 2 * width else None

    def _rise(self, name: str) -> float | None:
        now, before = self._mean(name), self._mean(name, 1)
        return None if now is None or before is None else now - before

    def _entropy_collapse(self) -> str | None:
        now, start = self._mean("entropy"), self._start("entropy")
        if now is None or start is None or now >= self.config.entropy_ratio * start:
            return None
        return f"entropy collapsed: {now:.2g} nats per token, {start:.2g} at the start; samples of a group become the same"

    def _length_explosion(self) -> str | None:
        now, before, gain = self._mean("mean_tokens"), self._mean("mean_tokens", 1), self._rise("reward")
        if now is None or before is None or gain is None or now <= self.config.length_ratio * before or gain >= self.config.min_gain:
            return None
        return f"length explodes: {before:.0f} to {now:.0f} tokens per response, while the reward changed by {gain:+.3f}"

    def _reward_saturation(self) -> str | None:
        now = self._mean("zero_advantage_rate")
        if now is None or now <= self.config.saturation_share:
            return None
        return f"rewards are saturated: {100 * now:.0f} % of the samples have no advantage, mean reward {self._mean('reward') or 0:.3f}"

    def _format_hacking(self) -> str | None:
        form, accuracy = self._rise("format"), self._rise("accuracy")
        if form is None or accuracy is None or form < self.config.min_gain or accuracy > -self.config.min_gain:
            return None
        return f"format is hacked: the format reward rose by {form:.3f} while accuracy fell by {-accuracy:.3f}"

    def _language_drift(self) -> str | None:
        values, width, now = self._history.get("language_consistency", []), self.config.window, self._mean("language_consistency")
        if now is None or len(values) < 2 * width:
            return None
        best = max(sum(values[i : i + width]) / width for i in range(len(values) - width + 1))
        if best - now < self.config.language_drop:
            return None
        return f"language drifts: {100 * now:.0f} % of the words are in the target language, {100 * best:.0f} % at best"
