"""Asked to leave: SIGTERM (a scheduler, or torchrun on its behalf) and SIGUSR1 (Slurm's --signal, ahead of the time limit).

The run finishes its step, saves, and ends with status 0; ranks agree at borders of steps and stages, so that none is left waiting for another.
The signal may come again (from Slurm and from torchrun, for instance): one time is like many.  torchrun kills what is still there after its
--shutdown-timeout (30 s); a kill costs the steps since the last save and nothing else.
"""

import signal

from athanor.parallel import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received = 0


class Stopped(Exception):
    """The run ends early and well; the message says what is saved."""


def listen() -> None:
    """Take note of the signals from now on instead of dying of them."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame) -> None:
    global _received
    _received = number


def asked_here() -> bool:
    """Has this rank got a signal?  For loops without collectives; `asked` must follow."""
    return bool(_received)


def asked(ranks: Ranks) -> bool:
    """Has any rank got a signal?  All ranks call it and get the same answer."""
    return ranks.sum_int(_received) > 0


def stop(ranks: Ranks, saved: str) -> None:
    """End the run on all ranks.  saved: what is behind us, for the line that the user sees."""
    ranks.barrier()
    name = signal.Signals(_received).name if _received else "a signal to another rank"
    raise Stopped(f"stopped by {name} {saved}; the same command goes on from there")
