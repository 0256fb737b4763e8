import pytest
import torch

from advmoe.moe import ForcedGate, MoEKind, images
from advmoe.moe.dispatch.split import split
from advmoe.moe.experts import FilterBank


def test_split_computes_only_the_chosen_experts():
    bank = torch.ones(4, 1, 1, 1)
    bank[2:] = torch.nan
    y = split(torch.ones(5, 1, 2, 2), FilterBank(bank, (0, 2), 2, 1), torch.zeros(5, dtype=torch.int64), None)
    assert torch.equal(y, torch.ones(5, 2, 2, 2))


def test_the_forward_pass_of_straight_through_computes_only_the_chosen_experts():
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


@pytest.mark.parametrize("dispatch", ["auto", "split", "wide"])
def test_a_layer_can_add_its_output_onto_a_tensor(dispatch):
    torch.manual_seed(0)
    kind = MoEKind(0.5, 2, norms="shared")
    layer = kind.conv(images(4), kind.channels(6)).double().eval()
    layer.norm, layer.dispatch = None, dispatch
    x, onto = torch.randn(5, 4, 6, 6, dtype=torch.float64), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    gate = ForcedGate(torch.tensor([[0], [1], [1], [0], [1]]))
    alone = layer(x, gate)[0]
    summed = layer(x, gate, onto=onto.clone())[0]
    assert torch.equal(summed, alone + onto)
    grads = [torch.autograd.grad(y.sin().sum(), layer.filters)[0] for y in (alone + onto, summed)]
    assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(layer(x, gate, onto=onto.clone())[0], alone + onto)
