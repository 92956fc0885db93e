"""200 steps of reinforcement learning with varying lengths: memory does not grow, and the KV pool stays where it is (memory_slope.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import memory_slope


def test_a_slope_is_found():
    level = [100.0 + (i * 7919) % 3 * 0.01 for i in range(200)]
    assert abs(memory_slope.slope(level)) < 1e-4
    assert memory_slope.slope([value + 0.01 * i for i, value in enumerate(level)]) == pytest.approx(1.5 / 101.26, rel=0.02)  # 150 steps of 0.01


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_memory_does_not_grow_over_200_steps():
    script = [sys.executable, str(Path(memory_slope.__file__)), "--steps", "200"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 200 and found["longest_mean_tokens"] > 1.3 * found["shortest_mean_tokens"], found
    assert abs(found["peak_slope"]) < 0.005 and abs(found["resident_slope"]) < 0.005 and abs(found["tensors_slope"]) < 0.005, found
    assert all(step < 50 for step in found["pool_moves"]) and len(found["pool_moves"]) <= 5, found
