"""Named losses: what a paper's name stands for, as one resolved object whose complete formula can be printed."""

from athanor.losses.presets import PRESETS, Preset, formula, resolve_preset

__all__ = ["PRESETS", "Preset", "formula", "resolve_preset"]
