"""Every Triton kernel compiles without a GPU for A100, H100 and B200, keeps its variables in registers, and holds no atomics."""

import importlib
import importlib.util
import os
import pkgutil
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import athanor.kernels
from athanor.kernels import attention_triton, fp8_producers_triton, mla_decode_triton, paged_attention_triton, rmsnorm_triton
from athanor.kernels._triton import limits_broken, resources

MODULES = [
    importlib.import_module(f"athanor.kernels.{found.name}")
    for found in pkgutil.iter_modules(athanor.kernels.__path__)
    if found.name.endswith("_triton") and not found.name.startswith("_")
]
CASES = [case for module in MODULES for case in module.ahead_of_time()]
# .ci/run takes one each under the oldest and the newest Triton, to save time
CAPABILITIES = [int(number) for number in os.environ.get("ATHANOR_CAPABILITIES", "80 90 100").split()]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_within_its_limits(case, capability, tmp_path):
    """No spills, no atomics, registers and shared memory within the case's limits, tensor cores where it says so."""
    if capability not in case.capabilities:
        pytest.skip(f"tiles for sm_{case.capabilities}")
    compiled = case.compile(capability)
    assert limits_broken(case, capability, compiled, resources(compiled, tmp_path)) == []


def test_a_broken_limit_is_seen(tmp_path):
    """Each limit against a compiled kernel that exceeds it, so that the empty list above means something."""
    case = next(case for case in CASES if case.kernel.__name__ == "finish_kernel")
    compiled = case.compile(90)
    used = resources(compiled, tmp_path)
    assert limits_broken(replace(case, registers=used["reg"] - 1), 90, compiled, used) == [f"{used['reg']} registers; at most {used['reg'] - 1}"]
    assert limits_broken(replace(case, matrix=True), 90, compiled, used) == ["no wgmma"]
    assert limits_broken(case, 90, compiled, used | {"local": 8}) == [f"spills: stack {used['stack']}, local 8 bytes"]
    greedy = SimpleNamespace(asm={"ptx": ".target sm_90a\n @%p1 atom.global.add.f32 %f1;"}, metadata=SimpleNamespace(shared=1 << 20))
    assert limits_broken(case, 90, greedy, used) == ["atomics atom.global.add.f32", f"{1 << 20} bytes of shared memory; at most {227 * 1024}"]
    assert limits_broken(case, 80, compiled, used) == ["compiled for something else than sm_80"]


def order_of_sums(compiled):
    """Types and layouts, in full, of the products and of the sums and maxima along rows: what decides in which order Triton adds."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"(?m)^(#\w+) = (.*)$", text))
    products = re.findall(r"(?m)((?:warp_group_dot|tt\.dot|tc_gen5_mma) .*? : .*?)(?: loc\(.*)?$", text)
    rows = re.findall(r"(?m)^\s*\}\) : \((tensor<\d+x\d+xf32, .*?>)\) ->", text)
    full = [re.sub(r"#\w+", lambda m: layouts.get(m[0], m[0]), re.sub(r"%\S+", "", line)) for line in (*products, *rows)]
    assert len(products) >= 2 and len(rows) >= 2, text
    return full


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_packed_and_decode_attention_add_in_the_same_order(capability):
    """For every dtype, head, number of query heads and tile that both have cases of: they promise equal bits."""
    decode, packed = {}, {}
    for module, kernel, found in ((paged_attention_triton, "paged_attention_split", decode), (attention_triton, "attention_fwd", packed)):
        for case in module.ahead_of_time():
            if case.kernel.__name__ == f"{kernel}_kernel" and capability in case.capabilities:
                found[case.signature["q_ptr"], *(case.constants[name] for name in ("D", "REPEAT", "BM", "BN"))] = case
    both = sorted(decode.keys() & packed.keys())
    assert len(both) >= 4
    for key in both:
        assert order_of_sums(decode[key].compile(capability)) == order_of_sums(packed[key].compile(capability)), key


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_latent_attention_adds_in_one_order_for_any_number_of_queries(capability):
    """Sharing a prefix, and few heads, change how many columns a tile has: instructions are as wide, and all else is equal."""
    columns = r"\d+x\d+x|(?<=instrShape = \[16, )\d+|(?<=blockN = )\d+|(?<=swizzlingByteWidth = )\d+"
    cases = [case for case in mla_decode_triton.ahead_of_time() if case.capabilities == (capability,)]
    orders = [[re.sub(columns, "", line) for line in order_of_sums(case.compile(capability))] for case in cases]
    assert len(orders) == 3 and orders[0] == orders[1] == orders[2]


def test_a_norm_that_quantises_adds_in_the_order_of_one_that_does_not():
    """They promise equal bits.  A store of bytes may spread a row over the threads in another way, and has done so."""
    found = {}
    for module in (fp8_producers_triton, rmsnorm_triton):
        cases = [case for case in module.ahead_of_time() if case.kernel.__name__ in ("fp8_rmsnorm_kernel", "rmsnorm_fwd_kernel")]
        case = next(case for case in cases if case.constants["BLOCK"] == 8192)
        text = case.compile(90).asm["ttgir"]
        layouts = dict(re.findall(r"(?m)^(#\w+) = (.*)$", text))
        found[module] = [re.sub(r"#\w+", lambda m, layouts=layouts: layouts[m[0]], line)
                         for line in re.findall(r"(?m)^\s*\}\) : \((tensor<[\dx]+xf32, .*?>)\) ->", text)]  # fmt: skip
    assert len(found[rmsnorm_triton]) == 1 and found[rmsnorm_triton] == found[fp8_producers_triton]


def test_every_kernel_is_among_the_cases():
    from triton.runtime import JITFunction

    for module in MODULES:
        kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
        assert kernels <= {case.kernel.__name__ for case in CASES} and kernels
