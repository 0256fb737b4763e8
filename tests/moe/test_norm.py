"""ExpertNorm compared with one nn.BatchNorm2d for each expert, which gets that expert's images; MaskedNorm."""

import pytest
import torch
from torch import nn

from advmoe.moe import HARD, ChannelMask, Channels, ExpertNorm, MaskedNorm, MoEConv2d, StraightThroughGate, images, synchronise
from advmoe.moe.experts import windows

N, K = 3, 4
EXPERTS = torch.tensor([2, 0, 2, 0, 2, 0, 0])  # expert 1 has no image


def make_norm(seed=0):
    torch.manual_seed(seed)
    norm = ExpertNorm(N, K).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def references(norm):
    """The slow twin: a separate batch norm for each expert."""
    batch_norms = []
    for e in range(N):
        batch_norm = nn.BatchNorm2d(K).double().train(norm.training)
        with torch.no_grad():
            batch_norm.weight.copy_(norm.weight[e])
            batch_norm.bias.copy_(norm.bias[e])
            batch_norm.running_mean.copy_(norm.running_mean[e])
            batch_norm.running_var.copy_(norm.running_var[e])
        batch_norms.append(batch_norm)
    return batch_norms


def slow(batch_norms, y, experts):
    """Each image through its expert's batch norm. A batch norm without images is not called."""
    out = torch.zeros_like(y)
    for e, batch_norm in enumerate(batch_norms):
        rows = (experts == e).nonzero()[:, 0]
        if len(rows):
            out = out.index_copy(0, rows, batch_norm(y[rows]))
    return out


def outputs():
    return torch.randn(len(EXPERTS), K, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2 + 1


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def grads(y, x, parameters):
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    return torch.autograd.grad((y * probe).sum(), [x, *parameters], allow_unused=True)


@pytest.mark.parametrize("training", [True, False])
def test_equals_a_batch_norm_for_each_expert(training):
    norm = make_norm().train(training)
    batch_norms = references(norm)
    x, x_slow = outputs().requires_grad_(True), outputs().requires_grad_(True)
    output, expected = norm(x, EXPERTS), slow(batch_norms, x_slow, EXPERTS)
    close(output, expected)
    gradients = grads(output, x, [norm.weight, norm.bias])
    expected_gradients = grads(expected, x_slow, [p for batch_norm in batch_norms for p in (batch_norm.weight, batch_norm.bias)])
    close(gradients[0], expected_gradients[0])
    for e in range(N):
        for number, gradient in ((1, expected_gradients[1 + 2 * e]), (2, expected_gradients[2 + 2 * e])):
            close(gradients[number][e], torch.zeros(K, dtype=torch.float64) if gradient is None else gradient)
    for e, batch_norm in enumerate(batch_norms):
        close(norm.running_mean[e], batch_norm.running_mean)
        close(norm.running_var[e], batch_norm.running_var)


def test_an_expert_without_images_keeps_its_statistics_exactly():
    norm = make_norm().train()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm(outputs(), EXPERTS)
    assert torch.equal(norm.running_mean[1], mean[1])
    assert torch.equal(norm.running_var[1], var[1])
    assert not torch.isclose(norm.running_mean[[0, 2]], mean[[0, 2]]).any()
    norm.eval()(outputs(), EXPERTS)
    assert torch.equal(norm.running_mean[1], mean[1])


def test_eval_mode_changes_no_state_and_an_images_output_does_not_depend_on_its_batch():
    norm = make_norm().eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    together = norm(outputs(), EXPERTS)
    for i in range(len(EXPERTS)):
        torch.testing.assert_close(norm(outputs()[i : i + 1], EXPERTS[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_every_equals_forward_at_the_chosen_experts(training):
    parts = torch.stack([outputs() * (e + 1) - e for e in range(N)], dim=1)
    rows = torch.arange(len(EXPERTS))
    norm, norm_of_all = make_norm().train(training), make_norm().train(training)
    chosen = norm(parts[rows, EXPERTS], EXPERTS)
    close(norm_of_all.every(parts, EXPERTS)[rows, EXPERTS], chosen)
    for (name, value), twin in zip(norm.state_dict().items(), norm_of_all.state_dict().values(), strict=True):
        torch.testing.assert_close(value, twin, rtol=1e-10, atol=1e-10, msg=name)


def test_every_uses_the_running_statistics_of_an_expert_without_images():
    norm = make_norm().train()
    parts = torch.stack([outputs()] * N, dim=1)
    twin = references(norm)[1].eval()
    close(norm.every(parts, EXPERTS)[:, 1], twin(outputs()))


def test_a_tied_norm_is_that_of_expert_0_for_all_images():
    norm, parts = make_norm().train(), torch.stack([outputs()] * N, dim=1)
    norm.tied = True
    (twin, *_) = references(norm)
    x, x_slow = outputs().requires_grad_(True), outputs().requires_grad_(True)
    output, expected = norm(x, EXPERTS), twin(x_slow)
    close(output, expected)
    gradients, expected_gradients = grads(output, x, [norm.weight]), grads(expected, x_slow, [twin.weight])
    close(gradients[0], expected_gradients[0])
    close(gradients[1], torch.stack([expected_gradients[1], *[torch.zeros(K, dtype=torch.float64)] * (N - 1)]))
    close(norm.every(parts, EXPERTS)[:, 0], twin(outputs()))
    close(norm.running_mean, twin.running_mean.expand(N, K))
    close(norm.running_var, twin.running_var.expand(N, K))


def test_one_image_of_one_pixel_gives_no_nan():
    norm = make_norm().train()
    y = norm(torch.randn(1, K, 1, 1, dtype=torch.float64), torch.tensor([2]))
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(value).all() for value in norm.state_dict().values())


def moe_layer():
    torch.manual_seed(0)
    experts = windows("disjoint", 2, 8, 4)
    layer = MoEConv2d(images(3), experts, kernel_size=3, stride=1, norm=ExpertNorm(2, 4), routed=True).double()
    with torch.no_grad():
        layer.filters.normal_()
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.normal_()
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_has_the_value_of_the_hard_gate(training):
    x = torch.randn(9, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hard, straight = moe_layer().train(training), moe_layer().train(training)
    y, (routing,) = hard(x, HARD)
    assert len(routing.experts.unique()) == 2
    close(straight(x, StraightThroughGate())[0], y)
    close(straight.norm.running_mean, hard.norm.running_mean)


def test_tie_gradients_sums_over_the_experts_norms():
    layer = moe_layer().float()
    layer.norm.weight.grad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    layer.norm.bias.grad = torch.ones(2, 4)
    layer.tie_gradients()
    assert layer.norm.weight.grad.tolist() == [[11, 22, 33, 44]] * 2
    assert layer.norm.bias.grad.tolist() == [[2] * 4] * 2


@pytest.mark.parametrize("training", [True, False])
def test_masked_channels_are_zero_and_the_others_do_not_change(training):
    channels = Channels(4, 4, (ChannelMask(4, 2),))
    channels.masks[0].scores.data = torch.tensor([0.0, 2.0, 1.0, 0.5])
    norm, plain = MaskedNorm(channels).train(training), nn.BatchNorm2d(4).train(training)
    norm.bias.data.fill_(3.0)
    plain.bias.data.fill_(3.0)
    x = torch.randn(5, 4, 3, 3)
    y, expected = norm(x), plain(x)
    assert torch.equal(y[:, [0, 3]], torch.zeros(5, 2, 3, 3))
    assert torch.equal(y[:, [1, 2]], expected[:, [1, 2]])


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm2d, (6, 4, 3, 3)), (nn.BatchNorm1d, (6, 4)), (nn.BatchNorm1d, (6, 4, 3))])
def test_a_synchronised_norm_equals_torchs_batch_norm(kind, shape, options):
    """Here the batch of the only rank is that of all ranks (tests/training/test_ranks.py has two)."""
    ours, theirs = nn.Sequential(kind(4, **options)), kind(4, **options)
    synchronise(ours, True)
    assert ours[0].synchronised
    for _ in range(2):
        x = torch.randn(shape)
        leaf, leaf_of_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(leaf), theirs(leaf_of_theirs)
        torch.testing.assert_close(y, expected)
        gradient, expected_gradient = (
            torch.autograd.grad(y.sin().sum(), leaf)[0],
            torch.autograd.grad(expected.sin().sum(), leaf_of_theirs)[0],
        )
        torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(dict(ours[0].named_buffers()), dict(theirs.named_buffers()))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_sync_batch_norm_does_not_replace_a_masked_norm():
    norm = MaskedNorm(Channels(4, 4, (ChannelMask(4, 2),)))
    assert "4 channels" in repr(norm)
    with pytest.raises(AttributeError, match=r"MaskedNorm sets .*SyncBatchNorm, cannot replace it; advmoe\.moe\.synchronise"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))
