"""engine/train.py with faults planted from outside and a trace of what it computed, for tests; the engine itself knows nothing of either.

    FAULTS='[{"at": "athanor.optim:Optimizer.step", "call": 3, "do": "kill"}]' TRACE=FOLDER torchrun tests/faulty_train.py RECIPE ...

A fault: at, "module:function" or "module:Class.method"; call, which call of it counting from 1 (or a list).  Optional: stage, or inside, another
function, in which alone calls are counted; rank; after, strike when the call has returned.  do:
  kill   SIGKILL to this process            exit   leave at once with status 13
  hang   wait forever                       term   SIGTERM to this process
  full   OSError, no space left on device   nan    NaN in place of the log-probs that the call returns
  slow   a second later
Processes that torchrun started anew have no faults.

A trace: FOLDER/trace.RANK.jsonl, [key, SHA-256] of every sample (tokens and log-probs) and, after every update, of weights and
optimizer state.
"""

import errno
import functools
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANK = int(os.environ.get("RANK", 0))
where = {"stage": "", "step": 0}


def plant(fault: dict) -> None:
    """Wrap the function that the fault names."""
    owner, name = find(fault["at"])
    real, calls, here = getattr(owner, name), 0, threading.local()
    wanted = fault["call"] if isinstance(fault["call"], list) else [fault["call"]]
    if "inside" in fault:
        place = find(fault["inside"])
        outer = getattr(*place)

        @functools.wraps(outer)
        def entered(*args, **kwargs):
            here.depth = getattr(here, "depth", 0) + 1
            try:
                return outer(*args, **kwargs)
            finally:
                here.depth -= 1

        setattr(*place, entered)

    @functools.wraps(real)
    def faulty(*args, **kwargs):
        nonlocal calls
        counts = fault.get("stage", where["stage"]) == where["stage"] and ("inside" not in fault or getattr(here, "depth", 0) > 0)
        calls += counts
        strikes = counts and calls in wanted and fault.get("rank", RANK) == RANK
        if strikes and not fault.get("after") and fault["do"] != "nan":
            strike(fault["do"])
        result = real(*args, **kwargs)
        if strikes and fault["do"] == "nan":
            return result._replace(logps=result.logps * float("nan"))
        if strikes and fault.get("after"):
            strike(fault["do"])
        return result

    setattr(owner, name, faulty)


def find(place: str) -> tuple[object, str]:
    """What owns the function, and its name there."""
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def strike(action: str) -> None:
    print(f"fault: {action}", file=sys.stderr, flush=True)
    if action in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
    elif action == "exit":
        os._exit(13)
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "slow":
        time.sleep(1)
    while action == "hang":
        time.sleep(1)


def follow() -> None:
    """Keep `where` true."""
    from athanor import pipeline
    from athanor.stages.training import TrainingLoop

    def named(real, prefix):
        def run(name, *args):
            where.update(stage=prefix + name, step=0)
            return real(name, *args)

        return run

    pipeline._run_stage, pipeline._evaluate_stage = named(pipeline._run_stage, ""), named(pipeline._evaluate_stage, "evaluate.")
    steps = TrainingLoop.steps

    def followed(self, *args):
        for step, metrics in steps(self, *args):
            where["step"] = step + 1
            yield step, metrics

    TrainingLoop.steps = followed


def trace(folder: Path) -> None:
    """Write digests as the run goes; must come before the modules that import `stream_samples`."""
    from athanor import rollout
    from athanor.optim import Optimizer

    file = open(folder / f"trace.{RANK}.jsonl", "a")
    stream, step = rollout.stream_samples, Optimizer.step
    updates: dict = {}  # of this process, by stage and step

    def record(key: list, *arrays) -> None:
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.tobytes())
        print(json.dumps([key, digest.hexdigest()]), file=file, flush=True)

    def streamed(dispatch, problems, tokenizer):
        for i, member, sample in stream(dispatch, problems, tokenizer):
            record(["samples", where["stage"], int(dispatch.requests[i].seeds[member]), problems[i].id], sample.token_ids, sample.logps)
            yield i, member, sample

    def stepped(self, lr):
        norm = step(self, lr)
        states = [part.state[p] for part in self.parts for p in self.parameters if p in part.state]
        tensors = [*self.parameters, *(state[name] for state in states for name in sorted(state))]
        place = where["stage"], where["step"]
        updates[place] = updates.get(place, 0) + 1
        record(["update", *place, updates[place], RANK], *(tensor.detach().cpu().numpy() for tensor in tensors))
        return norm

    rollout.stream_samples, Optimizer.step = streamed, stepped


if __name__ == "__main__":
    if "TRACE" in os.environ:
        trace(Path(os.environ["TRACE"]))
    follow()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        for planted in json.loads(os.environ.get("FAULTS", "[]")):
            plant(planted)
    sys.argv[0] = str(ROOT / "engine" / "train.py")
    script = importlib.util.spec_from_file_location("train_script", sys.argv[0])
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    sys.exit(module.main(sys.argv[1:]))
