"""Twenty processes that save states without end, each killed (SIGKILL) at a random moment:  python tests/killed_saver.py FOLDER [--background]

After each kill the newest state must be whole, and no older than the last one that the process had announced as finished.  Prints the last step.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
KILLS, LONGEST_S = 20, 0.05


def last_step(folder: Path, *words: str) -> int:
    """What the script prints, run in a process of its own; AssertionError with its complaint when a state was lost."""
    done = subprocess.run([sys.executable, __file__, str(folder), *words], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return int(done.stdout)


def main(folder: str, background: bool) -> None:
    import torch
    from test_checkpoint import RANKS, assert_is, restored, state_of

    from athanor.checkpoint import StateWriter

    torch.set_num_threads(1)
    last, delays = 0, random.Random(0)
    with StateWriter(RANKS, background=background) as states:  # what the first one imports, once for all children
        states.save(folder, 0, *state_of(0))
    for _ in range(KILLS):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with StateWriter(RANKS, background=background) as states:
                while True:
                    last += 1
                    states.save(folder, last, *state_of(last))
                    states.wait()
                    os.write(write, b"%d " % last)
        os.close(write)
        announced = os.read(read, 100)
        time.sleep(delays.uniform(0, LONGEST_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 10_000):
            announced += more
        os.close(read)
        state, finished = restored(folder), int(announced.split()[-1])
        assert_is(state, state.step)
        assert finished <= state.step <= finished + 1, (finished, state.step)
        last = state.step
    print(last)


if __name__ == "__main__":
    main(sys.argv[1], "--background" in sys.argv[2:])
