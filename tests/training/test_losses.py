import math

import pytest
import torch
from image_specs import image_spec
from torch import nn

from advmoe.attacks import BatchDraws, frozen, kl_divergence
from advmoe.config import AttackConfig
from advmoe.models.resnet import ResNet
from advmoe.moe import HARD, MoEKind
from advmoe.training.losses import LOSSES, clean, pgd_at, pgd_at_attack, rslad, rslad_attack, trades, trades_attack

LN3, LN4 = math.log(3), math.log(4)


def as_logits(x):
    """A network whose logits are the pixels themselves."""
    return x.flatten(1), ()


def image(*rows):
    return torch.tensor(rows)[:, :, None, None]


def draws():
    return BatchDraws(torch.Generator().manual_seed(0))


def conv_net():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return lambda x: (3 * net(x), ())


def test_trades_by_hand():
    x, x_adv = image([0.0, LN3], [LN4, 0.0]), image([0.0, 0.0], [0.0, LN4])
    outcome = trades(as_logits, x, x_adv, torch.tensor([1, 0]), 6.0)
    # p = (1/4, 3/4) and (4/5, 1/5), q = (1/2, 1/2) and (1/5, 4/5)
    natural = (-math.log(0.75) - math.log(0.8)) / 2
    divergence = (0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.8 * math.log(4) + 0.2 * math.log(0.25)) / 2
    assert outcome.total.item() == pytest.approx(natural + 6 * divergence, rel=1e-6)
    assert torch.equal(outcome.clean, x.flatten(1))
    assert torch.equal(outcome.robust, x_adv.flatten(1))


def test_rslad_by_hand():
    x, x_adv = image([0.0, LN3]), image([LN3, 0.0])
    outcome = rslad(as_logits, x, x_adv, torch.tensor([[0.5, 0.5]]), 5.0)
    # f(x) = (1/4, 3/4), f(x') = (3/4, 1/4): the same distance from (1/2, 1/2)
    assert outcome.total.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    one_class = rslad(as_logits, x, x_adv, torch.tensor([[1.0, 0.0]]), 5.0)
    assert one_class.total.item() == pytest.approx((math.log(4) + 5 * math.log(4 / 3)) / 6, rel=1e-6)
    beta_1 = rslad(as_logits, x, x_adv, torch.tensor([[1.0, 0.0]]), 1.0)
    assert beta_1.total.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-6)
    assert torch.equal(outcome.clean, x.flatten(1))
    assert torch.equal(outcome.robust, x_adv.flatten(1))


def test_rslad_attack_increases_the_divergence_from_the_teacher():
    net, attack = conv_net(), AttackConfig(epsilon=0.05, num_steps=10)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = net(x)[0].detach().softmax(dim=1).flip(1)
    x_adv = rslad_attack(net, x, targets, attack, draws())
    before, after = (kl_divergence(net(images)[0], targets.log()).mean() for images in (x, x_adv))
    assert after > before + 0.1
    assert (x_adv - x).abs().max() <= 0.05 + 1e-6
    assert x_adv.min() >= 0 <= 1 - x_adv.max()


def test_trades_without_perturbation_or_beta_is_cross_entropy():
    x, y = image([0.0, LN3]), torch.tensor([0])
    assert trades(as_logits, x, x, y, 6.0).total.item() == pytest.approx(LN4, rel=1e-6)
    assert trades(as_logits, x, image([2.0, 0.0]), y, 0.0).total.item() == pytest.approx(LN4, rel=1e-6)


def test_trades_gradient_by_hand():
    x, x_adv = image([0.0, LN3]).requires_grad_(True), image([0.0, 0.0]).requires_grad_(True)
    trades(as_logits, x, x_adv, torch.tensor([1]), 6.0).total.backward()
    # d/d(robust logits) = beta * (q - p); d/d(clean logits) = p - onehot + beta * p * (log p/q - KL)
    assert x_adv.grad.flatten().tolist() == pytest.approx([6 * (0.5 - 0.25), 6 * (0.5 - 0.75)], rel=1e-5)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    expected = [0.25 + 6 * 0.25 * (math.log(0.5) - divergence), -0.25 + 6 * 0.75 * (math.log(1.5) - divergence)]
    assert x.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_pgd_at_by_hand():
    x, x_adv = image([9.0, 9.0], [9.0, 9.0]), image([0.0, LN3], [LN4, 0.0])
    outcome = pgd_at(as_logits, x, x_adv, torch.tensor([0, 1]), 6.0)
    assert outcome.total.item() == pytest.approx((math.log(4) + math.log(5)) / 2, rel=1e-6)
    assert outcome.clean is None
    assert torch.equal(outcome.robust, x_adv.flatten(1))


def test_clean_by_hand():
    x = image([0.0, LN3])
    outcome = clean(as_logits, x, image([9.0, -9.0]), torch.tensor([1]), 6.0)
    assert outcome.total.item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert outcome.robust is None
    assert torch.equal(outcome.clean, x.flatten(1))


def test_clean_has_no_attack():
    assert LOSSES["clean"].attack is None


@pytest.mark.parametrize("robust", [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("natural", [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 0.0, 0.0]])
def test_huge_logits_give_no_nan(natural, robust):
    x, x_adv = image(natural).requires_grad_(True), image(robust).requires_grad_(True)
    outcome = trades(as_logits, x, x_adv, torch.tensor([0]), 6.0)
    outcome.total.backward()
    for tensor in (outcome.total, x.grad, x_adv.grad):
        assert torch.isfinite(tensor).all()


def test_huge_logits_give_the_right_divergence():
    reference = torch.tensor([[1e4, -1e4]]).log_softmax(dim=1)
    assert kl_divergence(torch.tensor([[-1e4, 1e4]]), reference).item() == 2e4
    assert kl_divergence(torch.tensor([[1e4, -1e4]]), reference).item() == 0


def test_losses_are_float32_for_bfloat16_logits():
    x, y = image([0.0, LN3]), torch.tensor([1])
    bfloat16_logits = lambda z: (z.flatten(1).bfloat16(), ())  # noqa: E731
    for value in (trades, pgd_at, clean):
        assert value(bfloat16_logits, x, x, y, 6.0).total.dtype == torch.float32


def test_trades_attack_increases_the_divergence():
    net, x = conv_net(), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y, attack = torch.zeros(6, dtype=torch.int64), AttackConfig(epsilon=8 / 255, step_size=2 / 255, num_steps=10)
    reference = net(x)[0].detach().log_softmax(dim=1)
    values = []
    for steps in (1, 3, 10):
        x_adv = trades_attack(net, x, y, AttackConfig(epsilon=8 / 255, step_size=2 / 255, num_steps=steps), draws())
        assert (x_adv - x).abs().max() <= attack.epsilon + 1e-6
        values.append(kl_divergence(net(x_adv)[0], reference).detach())
    assert (values[0] > 1e-4).all()
    assert (values[1] > values[0]).all()
    assert (values[2] > values[1]).all()
    start = (x + 0.001 * draws().normal(x)).clamp(0, 1)
    assert (values[0] > 10 * kl_divergence(net(start)[0], reference)).all()


def test_trades_attack_ignores_the_labels():
    net, x = conv_net(), torch.rand(4, 3, 8, 8)
    attacks = [trades_attack(net, x, torch.full((4,), label), AttackConfig(), draws()) for label in (0, 3)]
    assert torch.equal(*attacks)


def test_trades_attack_starts_with_small_normal_noise():
    x = torch.full((1, 1, 40, 40), 0.5)
    flat = lambda z: (torch.zeros(1, 2) * z.mean() * 0, ())  # noqa: E731
    x_adv = trades_attack(flat, x, torch.tensor([0]), AttackConfig(epsilon=0.1, step_size=0.05, num_steps=1), draws())
    assert (x_adv - x).std().item() == pytest.approx(0.001, rel=0.1)


def test_pgd_at_attack_increases_the_cross_entropy():
    net, x, y = conv_net(), torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    x_adv = pgd_at_attack(net, x, y, AttackConfig(epsilon=8 / 255, step_size=5 / 255, num_steps=4), draws())
    before, after = (nn.functional.cross_entropy(net(z)[0], y, reduction="none") for z in (x, x_adv))
    assert (after > before + 1e-3).all()
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6


def test_pgd_at_attack_starts_anywhere_in_the_ball():
    x = torch.full((1, 1, 40, 40), 0.5)
    flat = lambda z: (torch.zeros(1, 2) * z.mean() * 0, ())  # noqa: E731
    noise = pgd_at_attack(flat, x, torch.tensor([0]), AttackConfig(epsilon=0.1, step_size=0.05, num_steps=1), draws()) - x
    assert noise.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["trades", "pgd_at"])
def test_attacks_do_not_change_gradients(name):
    torch.manual_seed(0)
    model = ResNet(MoEKind(0.5), image_spec(3), blocks=(1,), width=4, stem="cifar")
    buffers = [buffer.clone() for buffer in model.buffers()]
    gradient = torch.full_like(model.classifier.weight, 2.0)
    model.classifier.weight.grad = gradient.clone()
    with frozen(model):
        x, y = torch.rand(4, 3, 8, 8), torch.arange(4) % 3
        x_adv = LOSSES[name].attack(lambda z: model.forward_routed(z, HARD), x, y, AttackConfig(), draws())
    assert not x_adv.requires_grad
    assert torch.equal(model.classifier.weight.grad, gradient)
    assert all(p.grad is None for p in model.parameters() if p is not model.classifier.weight)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
