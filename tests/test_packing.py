"""Best-fit packing: the C++ against a search written here, its promises, and its own test under the sanitizers."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from athanor._host import best_fit_pack

ROOT = Path(__file__).resolve().parents[1]


def search(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """Best fit decreasing as defined: look at every bin, take the one with least room that suffices, the lowest of equals."""
    bins, free = [0] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room, bin_) for bin_, room in enumerate(free) if room >= lengths[i]]
        if fitting:
            _, bins[i] = min(fitting)
        else:
            bins[i] = len(free)
            free.append(capacity)
        free[bins[i]] -= lengths[i]
    return bins, len(free)


def fewest_bins(lengths: list[int], capacity: int) -> int:
    def place(i: int, free: tuple[int, ...]) -> int:
        if i == len(lengths):
            return len(free)
        tries = [free + (capacity - lengths[i],)]
        tries += [free[:b] + (room - lengths[i],) + free[b + 1 :] for b, room in enumerate(free) if room >= lengths[i]]
        return min(place(i + 1, t) for t in tries)

    return place(0, ())


# Nothing, one, few and many sequences; capacity 1 (all full), small (many ties), prime, and larger than all lengths together.
@pytest.mark.parametrize("num_sequences", [0, 1, 7, 300])
@pytest.mark.parametrize("capacity, longest", [(1, 1), (8, 8), (97, 60), (10**6, 50)])
def test_every_sequence_goes_to_the_fullest_bin_that_holds_it(num_sequences, capacity, longest):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, longest + 1, num_sequences)
        bins, num_bins = best_fit_pack(lengths, capacity)
        assert (bins.tolist(), num_bins) == search(lengths.tolist(), capacity)


def test_each_sequence_has_one_bin_and_no_bin_exceeds_the_capacity():
    lengths = np.random.default_rng(0).geometric(0.01, 20_000).clip(max=512)
    bins, num_bins = best_fit_pack(lengths, 512)
    assert bins.dtype == np.int32 and bins.shape == lengths.shape
    tokens = np.bincount(bins, weights=lengths, minlength=num_bins)
    assert np.array_equal(np.unique(bins), np.arange(num_bins))
    assert tokens.max() <= 512 and tokens.sum() == lengths.sum()
    assert num_bins <= 1.01 * lengths.sum() / 512 + 1  # best fit wastes almost nothing on many short sequences


def test_bin_count_stays_within_eleven_ninths_of_the_optimum():
    rng = np.random.default_rng(3)
    for _ in range(60):
        lengths = rng.integers(1, 11, 7)
        assert best_fit_pack(lengths, 10)[1] <= 11 / 9 * fewest_bins(lengths.tolist(), 10) + 1


def test_equal_lengths_go_in_index_order_and_equal_bins_by_number():
    assert best_fit_pack(np.array([5, 5, 5, 3, 3, 3]), 8)[0].tolist() == [0, 1, 2, 0, 1, 2]


def test_strided_and_narrow_integers_give_the_same_packing():
    lengths = np.arange(1, 40)
    wanted = best_fit_pack(lengths, 64)[0].tolist()
    spread = np.zeros(78, np.int64)
    spread[::2] = lengths
    assert best_fit_pack(spread[::2], 64)[0].tolist() == wanted
    assert best_fit_pack(lengths.astype(np.uint8), 64)[0].tolist() == wanted
    lengths.flags.writeable = False
    assert best_fit_pack(lengths, 64)[0].tolist() == wanted


@pytest.mark.parametrize(
    "lengths, capacity, message",
    [
        ([3, 9], 8, r"lengths\[1\] is 9, wanted 1 to capacity = 8"),
        ([0], 8, r"lengths\[0\] is 0"),
        ([4, -2], 8, r"lengths\[1\] is -2"),
        ([1], 0, "capacity is 0, wanted > 0"),
        ([], -1, "capacity is -1"),
        ([1.5], 8, "lengths is float64, wanted int64"),
        ([True], 8, "lengths is bool"),
        ([[1, 2]], 8, "lengths has 2 dimensions, wanted 1"),
    ],
)
def test_bad_input_is_named(lengths, capacity, message):
    with pytest.raises(ValueError, match="best_fit_pack: " + message):
        best_fit_pack(np.array(lengths), capacity)


def test_other_threads_run_while_it_packs():
    lengths = np.random.default_rng(0).integers(1, 4096, 1_000_000)
    started, spent = threading.Event(), []

    def pack():
        started.set()
        begin = time.perf_counter()
        best_fit_pack(lengths, 4096)
        spent.append(time.perf_counter() - begin)

    thread = threading.Thread(target=pack)
    thread.start()
    started.wait()
    longest_gap, last = 0.0, time.perf_counter()
    while not spent:
        time.sleep(0.001)
        now = time.perf_counter()
        longest_gap, last = max(longest_gap, now - last), now
    thread.join()
    assert longest_gap < 0.7 * spent[0]


def test_cpp_is_clean_under_the_address_and_undefined_behaviour_sanitizers(tmp_path):
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++")
    flags = [gxx, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = subprocess.run([*flags, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")], capture_output=True, text=True)
    if probe.returncode or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip("g++ has no working sanitizer runtime here: " + (probe.stderr.strip().splitlines() or ["its program does not start"])[-1])
    host = ROOT / "csrc" / "host"
    binary = tmp_path / "test_packing"
    sources = [str(ROOT / "tests" / "test_packing.cpp"), str(host / "packing.cpp")]
    built = subprocess.run([*flags, f"-I{host}", *sources, "-o", str(binary)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([binary], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr
