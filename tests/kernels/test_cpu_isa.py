"""The C++ kernels on lesser instruction sets: their tests again, in a process that asks for less than the machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from athanor.kernels._cpu import native

TESTS = Path(__file__).parent
FILES = ("test_rmsnorm_cpu.py", "test_rope_cpu.py", "test_linear_cpu.py", "test_logprob_cpu.py", "test_sample_cpu.py", "test_linear_logprob_cpu.py",
         "test_swiglu.py", "test_mlp_cpu.py", "test_attention_cpu.py", "test_paged_attention_cpu.py", "test_sliding_window.py")  # fmt: skip


@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_every_kernel_holds_its_promises(isa):
    if native().isa() not in ("avx512", "avx2"):
        pytest.skip("the machine has no more than the base instruction set")
    environment = os.environ | {"ATHANOR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    code = "import sys, pytest; from athanor.kernels._cpu import native; print(native().isa()); sys.exit(pytest.main(sys.argv[1:]))"
    quick = ["-k", "not 3001 and not 262144 and not 1300 and not 5000 and not reference"]  # sizes that a slower process takes seconds for
    command = [sys.executable, "-c", code, "-q", "-x", "-p", "no:cacheprovider", *quick, *(str(TESTS / name) for name in FILES)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.startswith(isa) and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused():
    code = "from athanor.kernels._cpu import native; native().isa()"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ATHANOR_CPU_ISA": "sse9"}, capture_output=True, text=True, timeout=60)
    assert run.returncode and "ATHANOR_CPU_ISA is sse9, wanted avx512, avx2 or base" in run.stderr
