import numpy as np
import torch

from athanor.kernels import philox_uniform
from athanor.kernels._philox import philox4x32

# Known answers of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds): counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def test_published_vectors_in_numpy_and_torch():
    for counter, key, answer in KNOWN:
        for make in (lambda x: np.array([x], np.int64), lambda x: torch.tensor([x])):
            assert [int(word[0]) for word in philox4x32(*map(make, counter), *map(make, key))] == answer


def test_uniform_is_the_published_word_scaled():
    u = philox_uniform(torch.tensor([0]), torch.tensor([0]))
    assert u.dtype == torch.float64 and u.item() == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_negative_seeds_and_large_positions_use_all_64_bits():
    u = philox_uniform(torch.tensor([-1, 2**32 - 1, -1]), torch.tensor([5, 5, 5 + 2**40]))
    assert len(set(u.tolist())) == 3 and ((u >= 0) & (u < 1)).all()


def test_a_number_depends_on_its_own_seed_and_position_alone():
    seeds, positions = torch.arange(5)[:, None], torch.arange(7)
    table = philox_uniform(seeds, positions)
    assert table.shape == (5, 7) and len(set(table.flatten().tolist())) == 35
    assert table[3, 4] == philox_uniform(torch.tensor([3]), torch.tensor([4]))[0]


def test_is_uniform_along_seeds_and_along_positions():
    many = torch.arange(100_000)
    for u in (philox_uniform(many, many * 0), philox_uniform(many * 0, many)):
        counts = torch.histc(u, 64, 0, 1)
        chi2 = ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum()
        assert 63 - 4 * 11.2 < chi2 < 63 + 5 * 11.2  # mean 63, standard deviation sqrt(126)
        assert abs(u.mean() - 0.5) < 5 / (12 * 100_000) ** 0.5
        assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 / 100_000**0.5


def test_no_draws_from_no_seeds():
    assert philox_uniform(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_tile_and_stream_are_the_third_and_fourth_word_of_the_counter():
    counter, key, answer = KNOWN[2]
    signed = [k - (1 << 32) if k >= 1 << 31 else k for k in key]
    seed, position = key[0] + (signed[1] << 32), counter[0] + ((counter[1] - (1 << 32)) << 32)
    u = philox_uniform(torch.tensor([seed]), torch.tensor([position]), tile=torch.tensor([counter[2]]), stream=counter[3])
    assert u.item() == ((answer[0] >> 5) * 2**26 + (answer[1] >> 6)) / 2**53


def test_tiles_and_streams_are_independent():
    seeds, tiles = torch.arange(300)[:, None], torch.arange(300)
    a, b = (philox_uniform(seeds, torch.tensor([3]), tile=tiles, stream=s) for s in (1, 2))
    assert a.shape == (300, 300)
    for x, y in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1])):
        assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) < 5 / 300
