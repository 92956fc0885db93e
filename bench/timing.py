"""Times, peak memory and the machine's ceilings.

On CUDA each call is timed alone by events: a sleep kernel gives the host time to queue everything behind it, then 256 MiB are overwritten to clear
the L2, then the call.  A call that the host could not queue in time (it waits for the device somewhere) is marked, because its time holds Python's.
On a CPU the contenders take turns, so that what else the machine does falls on all of them: only their ratios mean anything.
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory reports its own start and stop otherwise

import torch  # noqa: E402

MIN_REPEATS = 20
WARM_UP_S = 0.1  # of load before a contender is timed on CUDA, in which clocks settle
FLUSH_BYTES = 256 << 20  # several times any L2


def quantile(times: list[float], q: float) -> float:
    return times[min(len(times) - 1, round(q * (len(times) - 1)))]


def times_us(contenders: dict[str, Callable], device: str, repeats: int) -> dict[str, tuple[list[float], bool]]:
    """Sorted times of single calls, and whether all launches were queued ahead (always True on a CPU), of each contender."""
    if device == "cuda":
        return {name: _cuda_times(function, repeats) for name, function in contenders.items()}
    for function in contenders.values():
        function()
        function()
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: (sorted(values), True) for name, values in times.items()}


def _cuda_times(function: Callable, repeats: int) -> tuple[list[float], bool]:
    start_s, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start_s < WARM_UP_S:
        before = time.perf_counter()
        function()
        host_s = time.perf_counter() - before  # of the last call: compilation is in the first
        torch.cuda.synchronize()
        calls += 1
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    cycles = int(2e9 * min(2 * host_s + 2e-4, 0.05))  # at about 2 GHz, twice what the host took to queue the call
    times, queued = [], True
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        cache.zero_()
        start.record()
        function()
        end.record()
        queued &= not start.query()  # still asleep, so every launch lay in the queue before the first began
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return sorted(times), queued


def peak_bytes(function: Callable, device: str) -> int:
    """Bytes at the peak of one call beyond what was allocated before it, outputs included; memory that bypasses torch's allocators is not seen."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    del result
    live = peak = 0
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):  # in time; the sort is stable, so equal stamps keep their order
        live += change
        peak = max(peak, live)
    return peak


def ceilings(device: str) -> dict[str, float]:
    """GB/s of a copy (read + write) and TFLOP/s of a large matmul, on random numbers, now; on CUDA bf16, and fp8 where the card has it."""
    n, m = (1 << 28, 8192) if device == "cuda" else (1 << 23, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, y = torch.randn(n, device=device), torch.empty(n, device=device)
    a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
    probes = {"copy_gb_s": lambda: y.copy_(x), "matmul_tflop_s": lambda: a @ b}
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)
        probes["fp8_tflop_s"] = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=False)
    work = {"copy_gb_s": 8e-3 * n, "matmul_tflop_s": 2e-6 * m**3, "fp8_tflop_s": 2e-6 * m**3}
    # on a CPU the fastest: what else the machine does only ever slows it down
    measured = times_us(probes, device, MIN_REPEATS)
    return {name: work[name] / (times[0] if device == "cpu" else quantile(times, 0.5)) for name, (times, _) in measured.items()}
