"""More than 2³¹ elements: an index that is 32 bits wide anywhere shows in the last rows."""

import os

import pytest
import torch

import fastnn
import fastnn.functional as fF

N = 46_400  # N² is a little over 2³¹
NEEDED = 10 << 30


def memory_available():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def square():
    """A matrix of bfloat16 whose element [i, j] is row[i] · column[j], computed here."""
    if memory_available() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory")
    row, column = (torch.randint(-2, 3, (N,)).bfloat16() for _ in range(2))
    yield fastnn.mm(row[:, None], column[None]), row, column
    fastnn.empty_cache()


def test_past_two_to_the_31(square, no_fallback):
    big, row, column = square
    assert big.numel() > 2**31
    for i in (0, 1, N // 2, N - 2, N - 1):
        assert torch.equal(big[i], row[i] * column)
    # As A, by a few columns and by many; as B; transposed; and elementwise, in place.
    ones = torch.zeros(N, 70, dtype=torch.bfloat16)
    ones[-1] = 1
    last = row * column[-1]
    for columns in (1, 3, 70):
        assert torch.equal(fastnn.mm(big, ones[:, :columns]), last[:, None].expand(N, columns))
        assert torch.equal(fF.linear(ones[:, :columns].t(), big), last.expand(columns, N))
    assert torch.equal(fastnn.mm(ones[:, :3].t(), big), (row[-1] * column).expand(3, N))
    fF.relu(big, inplace=True)
    assert torch.equal(big[-1], (row[-1] * column).relu())
