"""Judge samples beside the trainer: killable worker processes for rewards that run in one, threads for those that are safe there.

    pool = RewardPool()
    future = pool.submit(reward, sample, problem)      # returns at once
    future.result()                                    # Outcome: score, error or timeout

Nothing starts before the first sample that needs it.  A worker that used up its time, its memory or its life is replaced; the sample that did it is
a timeout or an error, all others go on.  A result depends on its sample alone, never on the order in which samples are judged.

Deadlines: `reward.timeout_s` seconds of processor time, so that a busy machine does not turn slow verdicts into timeouts, and WALL_FACTOR times as
long by the clock, for what sleeps or starves.
"""

import atexit
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from athanor.errors import UserError
from athanor.rewards.base import RUNS_IN, Outcome, Reward, judge
from athanor.rewards.worker import receive_frame, send_frame
from athanor.samples import Problem, Sample

WALL_FACTOR = 10.0
MEMORY_BYTES = 2 << 30  # address space of one worker; an idle one has about a quarter of it
JOBS_PER_WORKER = 5000  # caches of libraries grow; forking another worker takes milliseconds
_START_S = 120.0  # importing on a machine under load
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
_NO_FLOATS = np.zeros(0, np.float32)


def default_workers() -> int:
    """Half of this rank's cores, at least one and at most 16: the other half decodes."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores // 2))


class RewardPool:
    """Workers and threads, `num_workers` of each kind at most.  Use as a context manager, or `close()`.  Safe to share between threads."""

    def __init__(self, num_workers: int | None = None, *, memory_bytes: int = MEMORY_BYTES):
        num_workers = default_workers() if num_workers is None else num_workers
        if num_workers < 1:
            raise ValueError(f"RewardPool: num_workers is {num_workers}, wanted at least 1")
        if memory_bytes < 256 << 20:
            raise ValueError(f"RewardPool: memory_bytes is {memory_bytes}, wanted at least {256 << 20}: an idle worker needs about as much")
        self.num_workers, self.memory_bytes = num_workers, memory_bytes
        self.busy_s = 0.0  # summed over workers and threads
        self.num_judged = 0  # samples that went to one of them
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._loops: list[threading.Thread] = []
        self._idle = 0
        self._template: _Template | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False

    def submit(self, reward: Reward, sample: Sample, problem: Problem) -> Future:
        """Judge one sample; the future gives an Outcome, or raises UserError when no worker can start (a package is missing).

        Raises UserError where the reward cannot be sent to a process: its class is defined in __main__.
        """
        where = getattr(reward, "runs_in", "caller")
        if where not in RUNS_IN:
            raise UserError(f"reward {reward.__name__}: runs_in is {where!r}, wanted one of {', '.join(RUNS_IN)}")
        if self._closed:
            raise ValueError("RewardPool.submit: the pool is closed")
        future: Future = Future()
        if where in ("caller", "batch"):
            future.set_result(judge(reward, sample, problem))
        elif (decided := _decided(reward, sample, problem)) is not None:
            future.set_result(decided)
        elif where == "thread":
            with self._lock:
                self._threads = self._threads or ThreadPoolExecutor(self.num_workers, "reward")
            return self._threads.submit(self._in_thread, reward, sample, problem)
        else:
            light = replace(sample, logps=_NO_FLOATS, support=None, prompt_ids=_NO_FLOATS, problem=problem)
            self._start(reward)
            self._jobs.put((future, reward.timeout_s, pickle.dumps((reward.timeout_s, reward, light, problem))))
        return future

    def _in_thread(self, reward: Reward, sample: Sample, problem: Problem) -> Outcome:
        outcome = judge(reward, sample, problem)
        self._count(outcome.seconds)
        return outcome

    def _count(self, seconds: float) -> None:
        with self._lock:
            self.busy_s += seconds
            self.num_judged += 1

    def _start(self, reward: Reward) -> None:
        if type(reward).__module__ == "__main__":
            raise UserError(f"reward {reward.__name__}: its class is defined in __main__, wanted a module that worker processes can import")
        with self._lock:
            if self._template is None:
                self._template = _Template(reward.preload, self.memory_bytes)
            if len(self._loops) < self.num_workers and self._jobs.qsize() >= self._idle:
                loop = threading.Thread(target=self._loop, args=(self._template,), name=f"reward-worker-{len(self._loops)}", daemon=True)
                self._loops.append(loop)
                loop.start()

    def _loop(self, template: "_Template") -> None:
        worker = _Worker(template)
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
            if job is None:
                worker.end()
                return
            future, timeout_s, frame = job
            start = time.perf_counter()
            try:
                outcome = worker.judge(frame, timeout_s)
            except UserError as error:  # no worker can start at all
                future.set_exception(error)
                continue
            except Exception as error:  # a future that never comes would hang the trainer
                outcome = Outcome("error", message=f"the worker pool failed: {type(error).__name__}: {error}")
            seconds = time.perf_counter() - start
            self._count(seconds)
            future.set_result(replace(outcome, seconds=seconds))

    def close(self) -> None:
        """End all workers; what still waits becomes an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        while not self._jobs.empty():
            job = self._jobs.get()
            job[0].set_result(Outcome("error", message="the pool was closed"))
        for _ in self._loops:
            self._jobs.put(None)
        if self._template is not None:
            self._template.close()
        for loop in self._loops:
            loop.join(5.0)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _decided(reward: Reward, sample: Sample, problem: Problem) -> Outcome | None:
    quick = getattr(reward, "quick", None)
    try:
        return quick(sample, problem) if quick else None
    except Exception as error:
        return Outcome("error", message=f"{type(error).__name__}: {error}"[:500])


class _Template:
    """The process that forks workers.  One command at a time."""

    def __init__(self, preload: tuple[str, ...], memory_bytes: int):
        self._lock = threading.Lock()
        self._preload, self._memory_bytes = preload, memory_bytes
        self._closed = False
        self._open()

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from athanor.rewards.worker import template_main; template_main({theirs.fileno()})"
            environment = os.environ | _ONE_THREAD | {"PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], env=environment, pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self._control = ours
        self._control.settimeout(_START_S)
        settings = {"path": sys.path, "preload": list(self._preload), "memory_bytes": self._memory_bytes}
        send_frame(self._control, json.dumps(settings).encode())
        self._ready = False

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        hello = receive_frame(self._control)
        if self._closed:
            raise OSError("the pool is closed")
        answer = {"error": f"the process ended with code {self._process.wait(5)}"} if hello is None else json.loads(hello)
        if "error" in answer:
            missing = (answer.get("missing") or "").split(".")[0]
            hint = f"; pip install {missing.replace('_', '-')}" if missing else ""
            raise UserError(f"reward workers: cannot start, {answer['error']}{hint}")
        self._ready = True

    def _ask(self, command: str, fds: list[int]) -> dict:
        with self._lock:
            if self._closed:
                raise OSError("the pool is closed")
            if self._process.poll() is not None and self._ready:  # killed from outside: start another
                self._control.close()
                self._open()
            self._wait_until_ready()
            socket.send_fds(self._control, [command.encode()], fds)
            answer = receive_frame(self._control)
        if answer is None:
            raise OSError("the template process is gone")
        return json.loads(answer)

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: (pid, socket)."""
        ours, theirs = socket.socketpair()
        with theirs:
            return self._ask("fork", [theirs.fileno()])["pid"], ours

    def reap(self, pid: int) -> int:
        """End a worker that may have died already; the signal that ended it, 0 for none."""
        return self._ask(f"reap {pid}", [])["signal"]

    def close(self) -> None:
        self._closed = True
        self._process.kill()  # workers are told by the kernel
        self._process.wait()
        self._control.close()


class _Worker:
    """One worker process as its thread sees it; forked when there is work, forked again after a failure."""

    def __init__(self, template: _Template):
        self._template = template
        self._pid, self._connection, self._num_jobs = 0, None, 0

    def judge(self, frame: bytes, timeout_s: float) -> Outcome:
        if self._connection is None or self._num_jobs >= JOBS_PER_WORKER:
            self.end()
            self._pid, self._connection = self._template.fork()
            self._num_jobs = 0
        self._num_jobs += 1
        wall_s = WALL_FACTOR * timeout_s
        deadline = time.monotonic() + wall_s
        self._connection.settimeout(wall_s)
        try:
            send_frame(self._connection, frame)
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            answer = receive_frame(self._connection, 1 << 16)
        except TimeoutError:
            self.end()
            return Outcome("timeout", message=f"took more than {wall_s:g} s by the clock")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            return self._obituary(timeout_s)
        try:
            status, value, message = json.loads(answer)
        except ValueError:
            self.end()
            return Outcome("error", message="the worker wrote what is no answer")
        if message.startswith(("MemoryError", "RecursionError")):
            self.end()  # what such an error left behind is not worth finding out
        return Outcome(status, value, message)

    def _obituary(self, timeout_s: float) -> Outcome:
        self._connection.close()
        self._connection = None
        cause = self._template.reap(self._pid)
        if cause == signal.SIGPROF:
            return Outcome("timeout", message=f"took more than {timeout_s:g} s of processor time")
        how = f"signal {signal.Signals(cause).name}" if cause else "an exit"
        return Outcome("error", message=f"the worker died of {how}")

    def end(self) -> None:
        if self._connection is None:
            return
        self._connection.close()
        self._connection = None
        try:
            self._template.reap(self._pid)
        except (OSError, ValueError, UserError):
            pass  # the template is gone, and its workers with it


_shared: RewardPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> RewardPool:
    """The pool of this process, made when first asked for and closed at its end."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed:
            _shared = RewardPool()
            atexit.register(_shared.close)
        return _shared
