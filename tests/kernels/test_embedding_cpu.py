import pytest
import torch

from athanor.kernels.embedding_cpu import embedding_cpu


def test_rows_of_a_table(generator):
    table = torch.randn(9, 12, generator=generator)[:, :5]
    indices = torch.tensor([8, 0, 3, 3])
    assert torch.equal(embedding_cpu(table, indices), table[indices]) and embedding_cpu(table, indices[:0]).shape == (0, 5)
    for bad in (-1, 9):
        with pytest.raises(IndexError, match=f"indices are {min(bad, 2)} to {max(bad, 2)}, wanted 0 to 8"):
            embedding_cpu(table, torch.tensor([2, bad]))
