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
    halves = [
        subprocess.Popen([*command, *map(str, files)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for files in (FILES[::2], FILES[1::2])
    ]
    for half in halves:
        output, _ = half.communicate(timeout=1200)
        assert half.returncode == 0, output[-8000:]
        assert int(re.search(r"(\d+) passed", output)[1]) >= 30, output[-2000:]  # a file that silently skips everything would pass otherwise
