import numpy as np
import pytest
import torch

from athanor.kernels import rmsnorm, rope

SIZES = [(1, 4, 2, 24), (64, 2, 2, 64), (33, 3, 1, 6), (0, 2, 1, 4)]  # one token, aligned, odd with one key head, empty


def inputs(T, H, Hkv, d, generator, dtype=torch.float64):
    q, k = (torch.randn(T, h, d, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for h in (H, Hkv))
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_complex(x, cos, sin):
    """Each pair (x_i, x_{i + d/2}) is a complex number; turning it is one complex multiplication."""
    x = x.detach().double().numpy()
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos.double().numpy() + 1j * sin.double().numpy())[:, None]
    return torch.from_numpy(np.concatenate([turned.real, turned.imag], -1))


@pytest.mark.parametrize("T, H, Hkv, d", SIZES)
def test_is_a_complex_rotation_and_its_gradient_the_opposite_one(T, H, Hkv, d, close64, generator):
    q, k, cos, sin = inputs(T, H, Hkv, d, generator)
    for x, y in zip((q, k), rope(q, k, cos, sin), strict=True):
        close64(y, rotate_complex(x, cos, sin))
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator)
        close64(torch.autograd.grad(y, x, dy)[0], rotate_complex(dy, cos, -sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_textbook(dtype, within_rule, generator):
    q, k, cos, sin = inputs(65, 4, 2, 24, generator, dtype)

    def plain(x):
        a, b = x.chunk(2, -1)
        return torch.cat((x * cos.repeat(1, 2)[:, None], ), 0) + torch.cat((-b, a), -1) * sin.repeat(1, 2)[:, None]  # fmt: skip

    for x, y in zip((q, k), rope(q, k, cos, sin), strict=True):
        within_rule(y, plain(x), rotate_complex(x, cos, sin))
        dy = torch.randn(y.shape, generator=generator).to(dtype)
        got, simple = torch.autograd.grad(y, x, dy, retain_graph=True)[0], torch.autograd.grad(plain(x), x, dy)[0]
        within_rule(got, simple, rotate_complex(dy, cos, -sin), "gradient")


def test_scores_depend_on_the_distance_alone(generator):
    q, k, cos, sin = inputs(9, 1, 1, 8, generator)
    same_q, same_k = q[:1].expand(9, 1, 8), k[:1].expand(9, 1, 8)
    a, b = rope(same_q, same_k, cos, sin)
    scores = a.squeeze(1) @ b.squeeze(1).T
    assert torch.allclose(scores[5, 2], scores[8, 5], rtol=1e-12) and not torch.allclose(scores[5, 2], scores[8, 4])


def test_mismatched_angles_are_refused():
    with pytest.raises(ValueError, match=r"rope: cos is \(3, 2\)"):
        rope(torch.ones(4, 1, 4), torch.ones(4, 1, 4), torch.ones(3, 2), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_qk_norm_has_the_bits_of_norm_then_rotation(dtype, generator):
    q, k, cos, sin = inputs(33, 4, 2, 24, generator, dtype)
    weights = [(1 + 0.3 * torch.randn(24, generator=generator)).to(dtype).requires_grad_() for _ in range(2)]
    fused = rope(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    apart = rope(rmsnorm(q, weights[0], eps=1e-5), rmsnorm(k, weights[1], eps=1e-5), cos, sin)
    upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in fused]
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))
    got, want = (torch.autograd.grad(out, (q, k, *weights), upstream) for out in (fused, apart))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_qk_norm_is_the_formula_and_its_gradient_agrees_with_finite_differences(close64, generator):
    q, k, cos, sin = inputs(3, 2, 1, 6, generator)
    weights = [torch.rand(6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    for x, w, y in zip((q, k), weights, rope(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1]), strict=True):
        close64(y, rotate_complex(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w, cos, sin))
    assert torch.autograd.gradcheck(lambda q, k, a, b: rope(q, k, cos, sin, q_weight=a, k_weight=b), (q, k, *weights))


def test_one_weight_without_the_other_is_refused():
    x, angle = torch.ones(4, 1, 4), torch.ones(4, 2)
    with pytest.raises(ValueError, match="one of q_weight and k_weight is missing"):
        rope(x, x, angle, angle, q_weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"q_weight is \(4,\), k_weight is \(3,\); wanted \(4,\)"):
        rope(x, x, angle, angle, q_weight=torch.ones(4), k_weight=torch.ones(3))
