"""Two hosts in network namespaces: c10d and static rendezvous, and a host that is lost and comes back (two_hosts.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import two_hosts


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_job_of_two_hosts_survives_the_loss_of_one(tmp_path):
    if reason := two_hosts.why_not():
        pytest.skip(reason)
    script = [sys.executable, str(Path(two_hosts.__file__)), "--keep", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("every bit as in the undisturbed run") == 2
    assert "in phase collective, deadlines.collective_s is 15; rank " in done.stdout
