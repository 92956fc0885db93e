"""Athanor: a kernel-centric training engine for reasoning language models."""

from importlib import import_module

_LAZY = {"Generator": "athanor.generator", "Request": "athanor.samples", "SamplingConfig": "athanor.config"}  # `import athanor` loads no torch


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'athanor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
