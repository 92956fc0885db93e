"""Run the tests of the Triton kernels under Triton's interpreter, which must be chosen before Triton is imported: in a process of its own."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((*Path(__file__).parent.glob("test_*_triton.py"), Path(__file__).with_name("test_sliding_window.py")))


def version(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def test_triton_kernels_under_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 does not run with numpy >= 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("ATHANOR_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(Path(__file__).parents[2])]
    command += ["-n", "2", "--dist", "loadfile"]
    run = subprocess.run([*command, *map(str, FILES)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-8000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 60, run.stdout[-2000:]  # files that silently skip everything would pass otherwise
