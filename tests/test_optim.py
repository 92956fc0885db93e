"""Schedule values by hand, the update against torch's own optimizers, and what clipping and bad gradients do."""

import math

import pytest
import torch
from torch import nn

from athanor.config import OptimizerConfig
from athanor.optim import Optimizer, learning_rate
from athanor.parallel import Ranks


def test_constant_schedule_warms_up_linearly():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, s, 100) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_ends_at_the_floor():
    config = OptimizerConfig(lr=2.0, warmup_steps=0, schedule="cosine", final_lr_ratio=0.1)
    assert learning_rate(config, 0, 11) == pytest.approx(2.0)
    assert learning_rate(config, 5, 11) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 10, 11) == pytest.approx(0.2)
    assert learning_rate(config, 10, 11, peak=1.0) == pytest.approx(0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, ids):
        return self.second(self.first(self.embed(ids)).tanh())


def a_mixture(shape=(2, 3, 4)):
    net = nn.Module()
    net.experts, net.norm = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))), nn.Parameter(torch.ones(3))
    net.bias = nn.Parameter(torch.zeros(2), requires_grad=False)
    return net


def test_stacks_of_experts_decay_like_matrices():
    (adamw,) = Optimizer(a_mixture(), OptimizerConfig(weight_decay=0.1), Ranks()).parts
    assert [(g["weight_decay"], [p.shape for p in g["params"]]) for g in adamw.param_groups] == [(0.1, [(2, 3, 4)]), (0.0, [(3,)])]


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 24, 16), (5, 16, 40)])  # one row, tall, wide
def test_muon_updates_each_expert_of_a_stack_as_a_matrix_of_its_own(shape):
    net = a_mixture(shape)
    start = net.experts.detach().clone()
    alone = [nn.Parameter(expert.clone()) for expert in start]
    theirs = torch.optim.Muon(alone, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = Optimizer(net, OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1, grad_clip=0.0), Ranks(threads=1))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        # scales far apart: one norm for the whole stack would be another update
        gradient = torch.randn(shape, generator=generator) * 10.0 ** torch.arange(shape[0])[:, None, None]
        net.experts.grad, net.norm.grad = gradient.clone(), torch.zeros(3)
        for expert, own in zip(alone, gradient, strict=True):
            expert.grad = own
        optimizer.step(0.01)
        theirs.step()
    for expert, own, before in zip(net.experts, alone, start, strict=True):
        # bf16: a last bit is 2^-9 of an update, and five iterations pass it on
        assert (expert - own).detach().norm() < 2e-2 * (own - before).detach().norm()
    assert sorted(optimizer.state_tensors()) == ["experts.momentum_buffer", "norm.exp_avg", "norm.exp_avg_sq", "norm.step"]


def loss_of(net):
    return net(torch.tensor([0, 3, 4])).square().sum()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_update_equals_torch_with_matrices_decayed_and_the_rest_not(name):
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1, grad_clip=0.0, betas=(0.8, 0.9))
    optimizer = Optimizer(ours, config, Ranks(threads=1))
    matrices, rest = [theirs.first.weight, theirs.second.weight], [theirs.embed.weight, theirs.first.bias]
    adamw = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-8)
    if name == "muon":
        parts = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")]
        parts.append(torch.optim.AdamW(rest, weight_decay=0.0, **adamw))
    else:
        parts = [torch.optim.AdamW(matrices, weight_decay=0.1, **adamw), torch.optim.AdamW(rest, weight_decay=0.0, **adamw)]
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(ours).backward()
        norm = optimizer.step(0.01)
        theirs.zero_grad()
        loss_of(theirs).backward()
        assert norm == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters())), rel=1e-5)
        for part in parts:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clipping_scales_the_gradient_and_reports_the_norm_before_it():
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(grad_clip=0.5), Ranks(threads=1))
    (1000 * loss_of(net)).backward()
    assert optimizer.step(1e-3) > 0.5
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters())) == pytest.approx(0.5, rel=1e-4)


def test_a_non_finite_gradient_changes_nothing():
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = Optimizer(net, OptimizerConfig(), Ranks(threads=1))
    (loss_of(net) * float("nan")).backward()
    assert math.isnan(optimizer.step(1e-3))
    assert not any(value.any() for value in optimizer.state_tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_counts_as_a_write_to_every_parameter(name):
    """Generators and FP8 copies look at these counters; fused updates alone leave them."""
    net = Net()
    before = [p._version for p in net.parameters()]
    net(torch.arange(5)).sum().backward()
    Optimizer(net, OptimizerConfig(name=name), Ranks(threads=1)).step(1e-2)
    assert all(p._version > old for p, old in zip(net.parameters(), before, strict=True))
