"""Decoder definitions: one forward for training, prefill and decode."""
