"""Athanor: a kernel-centric training engine for reasoning language models."""
