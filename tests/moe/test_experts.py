import pytest
import torch
from masked_twin import expert_filters

from advmoe.moe.experts import FilterBank, aligned, mixture, windows


@pytest.mark.parametrize(
    ("num_experts", "out_channels", "width", "starts", "size"),
    [
        (2, 64, 32, (0, 32), 64),  # r = .5: two halves
        (2, 64, 12, (0, 12), 24),  # r = .2: 0..11 and 52..63; the 40 filters between them are not allocated
        (2, 64, 51, (0, 13), 64),  # r = .8: 0..50 and 13..63
        (4, 64, 16, (0, 16, 32, 48), 64),  # r = .25: four quarters
        (4, 64, 32, (0, 11, 21, 32), 64),  # r = .5: thirds of 32, 10.67 and 21.33, rounded
        (1, 64, 32, (0,), 32),
        (1, 64, 64, (0,), 64),
        (8, 64, 32, (0, 5, 9, 14, 18, 23, 27, 32), 64),  # sevenths of 32: 4.57, 9.14, 13.71, 18.29, 22.86, 27.43
        (8, 64, 4, (0, 4, 8, 12, 16, 20, 24, 28), 32),  # 8.57 apart, 4 wide
        (3, 10, 3, (0, 3, 6), 9),  # 0..2, 4..6 (3.5 rounds up), 7..9: filter 3 is not allocated
        (4, 8, 8, (0, 0, 0, 0), 8),  # r = 1: all experts are the whole layer
    ],
)
def test_backbone_windows(num_experts, out_channels, width, starts, size):
    assert windows("backbone", num_experts, out_channels, width) == (starts, width, size)


@pytest.mark.parametrize(
    ("num_experts", "width", "starts", "size"),
    [(2, 32, (0, 32), 64), (2, 51, (0, 51), 102), (4, 32, (0, 32, 64, 96), 128), (1, 32, (0,), 32)],
)
def test_disjoint_windows(num_experts, width, starts, size):
    assert windows("disjoint", num_experts, 64, width) == (starts, width, size)


@pytest.mark.parametrize("num_experts", range(1, 9))
@pytest.mark.parametrize("width", range(1, 17))
def test_backbone_windows_use_every_filter_and_overlap_only_if_they_must(num_experts, width):
    starts, _, size = windows("backbone", num_experts, 16, width)
    used = {m for start in starts for m in range(start, start + width)}
    assert used == set(range(size))
    assert size <= 16
    if num_experts * width <= 16:
        assert size == num_experts * width
    elif num_experts > 1:
        assert size == 16


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("start", "width"), [(0, 4), (1, 4), (3, 4), (4, 4), (7, 4), (5, 1), (2, 5)])
def test_aligned_puts_filter_m_at_channel_m_mod_width(start, width, dim):
    stack = torch.arange(12.0)[:, None] if dim == 0 else torch.arange(12.0)[None]
    window = aligned(stack, start, width, dim=dim).flatten().tolist()
    assert sorted(window) == list(range(start, start + width))
    assert [m % width for m in window] == list(range(width))


def test_aligned_by_hand():
    assert aligned(torch.arange(10), 3, 4).tolist() == [4, 5, 6, 3]


def test_the_slow_twin_has_the_same_windows():
    for num_experts, width in [(2, 3), (2, 10), (4, 6), (8, 5), (3, 4)]:
        for bank in ("backbone", "disjoint"):
            starts, _, size = windows(bank, num_experts, 12, width)
            rows = [aligned(torch.arange(size), start, width).tolist() for start in starts]
            assert rows == expert_filters(bank, num_experts, 12, width)


def test_mixture_by_hand():
    bank = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    y = mixture(x, FilterBank(bank, (0, 1), 2, 1), torch.tensor([[0.5, 0.5], [0.25, 2.0]]))
    # channel 0: filter 0 of expert 0, filter 2 of expert 1; channel 1: filter 1 of both
    assert y.flatten(1).tolist() == [[0.5 + 50, 5 + 5], [0.5 + 400, 5 + 40]]


def test_mixture_of_disjoint_experts_by_hand():
    bank = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(4, 1, 1, 1)
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    y = mixture(x, FilterBank(bank, (0, 2), 2, 1), torch.tensor([[0.5, 0.5], [0.25, 2.0]]))
    assert y.flatten(1).tolist() == [[0.5 + 50, 5 + 500], [0.5 + 400, 5 + 4000]]
