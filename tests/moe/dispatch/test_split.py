import torch

from advmoe.moe.dispatch.split import split
from advmoe.moe.experts import FilterBank


def test_split_computes_nothing_but_the_chosen_experts():
    bank = torch.ones(4, 1, 1, 1)
    bank[2:] = torch.nan
    y = split(torch.ones(5, 1, 2, 2), FilterBank(bank, (0, 2), 2, 1), torch.zeros(5, dtype=torch.int64), None)
    assert torch.equal(y, torch.ones(5, 2, 2, 2))


def test_straight_through_runs_no_expert_twice_forward():
    bank = torch.ones(4, 1, 1, 1, requires_grad=True)
    with torch.no_grad():
        bank[2:] = torch.nan
    experts = torch.zeros(5, dtype=torch.int64)
    one_hot = torch.nn.functional.one_hot(experts, 2).float().requires_grad_()
    y = split(torch.ones(5, 1, 2, 2), FilterBank(bank, (0, 2), 2, 1), experts, one_hot)
    assert torch.equal(y, torch.ones(5, 2, 2, 2))


def test_channels_last_stays_channels_last():
    x = torch.randn(6, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    bank = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    y = split(x, FilterBank(bank, (0, 3), 3, 1), torch.tensor([0, 1, 1, 0, 1, 0]), None)
    assert y.is_contiguous(memory_format=torch.channels_last)
