"""Mixtures of experts of both families against transformers, one by one against packed, and the layer against a dense loop over experts in fp64.

Tolerance as in test_transformer.py.  Where logits are compared in bf16, every expert is chosen: a choice that flips by rounding is no error.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
from sparse_models import FAMILIES, assert_close, in_stack, in_transformers, our_logits, packed, random_decoder, sequences, their_logits

from athanor.hf_tensors import hf_tensors
from athanor.model.moe import MixtureOfExperts, Routes, imbalance, rebalance_, routers, sequence_balance_loss

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")


def all_chosen(config):
    return config.model_copy(update={"num_experts_per_tok": config.num_experts, "topk_group": config.n_group})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_logits_equal_transformers_one_by_one(name, dtype):
    config = FAMILIES[name] if dtype == torch.float32 else all_chosen(FAMILIES[name])
    model, ids = random_decoder(config).to(dtype), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    assert_close(our_logits(model, ids), their_logits(in_transformers(model, dtype), ids), truth, name)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fp64_logits_equal_transformers_in_fp64(name):
    model, ids = random_decoder(FAMILIES[name]).double(), sequences()
    truth = their_logits(in_transformers(model, torch.float64), ids)
    assert float((our_logits(model, ids) - truth).abs().max()) <= 1000 * torch.finfo(torch.float64).eps * float(truth.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_all_parameters_equal_transformers(name):
    model, ids = random_decoder(FAMILIES[name]), sequences()
    targets = torch.cat([torch.roll(x, -1) for x in ids])
    theirs, truth = in_transformers(model, torch.float32), in_transformers(model, torch.float64)
    for logits in (our_logits(model, ids), their_logits(theirs, ids), their_logits(truth, ids)):
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    # One comparison per fused matrix and per stack of experts: the gradient of one expert with two tokens is two roundings.
    fused = [{n: torch.zeros_like(p, dtype=dtype) for n, p in model.named_parameters()} for dtype in (torch.float32, torch.float64)]
    for grads, m in zip(fused, (theirs, truth), strict=True):
        named = {n: p.grad for n, p in m.named_parameters()}
        for hf_name, source in hf_tensors(model.config).items():
            if not hf_name.endswith("e_score_correction_bias"):
                source.of(grads).copy_(in_stack(named, hf_name))
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, *(grads[n] for grads in fused), n)
    assert not any(router.bias is not None and router.bias.requires_grad for router in routers(model))
