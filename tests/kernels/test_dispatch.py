import subprocess
import sys

import pytest
import torch

from athanor.kernels import rmsnorm, strict_mode, use_backend
from athanor.kernels._dispatch import OPS, Backend, Op


def make_op():
    return Op("toy", {
        "reference": Backend(lambda x: ("reference", x)),
        "triton": Backend(lambda x: ("triton", x), lambda call: None),
        "cuda": Backend(lambda x: ("cuda", x), lambda call: "x is too small" if call["x"].numel() < 4 else None),
    })  # fmt: skip


def test_auto_takes_the_first_backend_that_can_serve():
    toy = make_op()
    assert toy(None, x=torch.zeros(4))[0] == "cuda"
    assert toy(None, x=torch.zeros(4, device="meta"))[0] == "cuda"
    assert toy(None, x=torch.zeros(3, device="meta"))[0] == "triton"


def test_auto_never_takes_triton_for_cpu_tensors():
    assert make_op()(None, x=torch.zeros(3))[0] == "reference"


def test_named_backend_that_cannot_serve_raises_with_the_reason():
    with pytest.raises(ValueError, match="toy: backend 'cuda' cannot serve this call: x is too small"):
        make_op()("cuda", x=torch.zeros(3))
    with pytest.raises(ValueError, match="rmsnorm has no cuda backend"):
        rmsnorm(torch.ones(2, 4), torch.ones(4), backend="cuda")


def test_argument_beats_context_beats_environment(monkeypatch):
    toy = make_op()
    monkeypatch.setenv("ATHANOR_BACKEND", "triton")
    x = torch.zeros(8)
    assert toy(None, x=x)[0] == "triton"
    with use_backend("reference"):
        assert toy(None, x=x)[0] == "reference"
        assert toy("cuda", x=x)[0] == "cuda"
        with use_backend("triton"):
            assert toy(None, x=x)[0] == "triton"
        assert toy(None, x=x)[0] == "reference"
    assert toy(None, x=x)[0] == "triton"


def test_strict_mode_takes_strict_backends_alone_and_nothing_else_does():
    toy = Op("toy", {
        "cuda": Backend(lambda x: ("cuda", x)),
        "triton": Backend(lambda x: ("triton", x), lambda call: "x is too small" if call["x"].numel() < 4 else None, strict=True),
        "reference": Backend(lambda x: ("reference", x)),
    })  # fmt: skip
    x = torch.zeros(4, device="meta")
    assert toy(None, x=x)[0] == "cuda" and toy("triton", x=x)[0] == "triton"
    with strict_mode():
        assert toy(None, x=x)[0] == toy("triton", x=x)[0] == "triton"
        assert toy(None, x=torch.zeros(4))[0] == "cuda" and toy("reference", x=torch.zeros(4))[0] == "reference"  # on CPU nothing changes
        with pytest.raises(ValueError, match=r"toy: no backend can serve this call in strict mode \(triton: x is too small\)"):
            toy(None, x=x[:3])
        with pytest.raises(ValueError, match="toy: backend 'reference' cannot serve this call: strict mode is on"):
            toy("reference", x=x)
        assert make_op()(None, x=x)[0] == "cuda"  # an operation that has nothing to choose
    with use_backend("triton"):
        assert toy(None, x=x)[0] == "triton"


def test_auto_by_name_overrides_context_and_environment(monkeypatch):
    monkeypatch.setenv("ATHANOR_BACKEND", "triton")
    with use_backend("reference"), use_backend("auto"):
        assert make_op()(None, x=torch.zeros(8))[0] == "cuda"
    with use_backend("reference"):
        assert make_op()("auto", x=torch.zeros(8))[0] == "cuda"


def test_wrong_backend_name_lists_near_misses(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'triton'.*cuda"):
        rmsnorm(torch.ones(2, 4), torch.ones(4), backend="tritn")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'refrence'; did you mean 'reference'"), use_backend("refrence"):
        pass
    monkeypatch.setenv("ATHANOR_BACKEND", "cudaa")
    with pytest.raises(ValueError, match="ATHANOR_BACKEND: unknown backend 'cudaa'; did you mean 'cuda'"):
        rmsnorm(torch.ones(2, 4), torch.ones(4))


def test_every_operation_has_a_reference():
    assert {"rmsnorm", "attention", "grpo_loss", "sample"} <= set(OPS)
    assert all("reference" in op.backends for op in OPS.values())


def test_importing_kernels_imports_no_triton_and_names_are_functions():
    code = (
        "import sys, athanor.kernels as K; assert not any(m.split('.')[0] in ('triton', 'cupy', 'flash_attn') for m in sys.modules);"
        "from athanor.kernels.policy_loss import k3; from athanor.kernels import policy_loss, sample;"
        "assert callable(policy_loss) and callable(sample)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
