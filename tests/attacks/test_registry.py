"""The registry of attacks: each entry's needs, cost and description."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.attacks import autoattack
from advmoe.attacks.job import Job, Setting
from advmoe.attacks.registry import ATTACKS, other_network
from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.models import build_model
from advmoe.moe import HARD, MoEKind

SETTING = Setting("Linf", 10, (3, 32, 32), routed=True, transfer=True)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_words_and_a_cost_and_can_run_somewhere(name):
    attack = ATTACKS[name]
    assert attack.words
    assert attack.passes > 0
    assert attack.kind != "other"
    assert attack.obstacle(SETTING) == ""


class Counting:
    """Counts the passes of an image through a routed network; a forward pass alone is a third of one."""

    def __init__(self, network):
        self.network, self.passes = network, 0.0

    def forward_routed(self, x, gate=HARD):
        self.passes += len(x) * (1 if torch.is_grad_enabled() and x.requires_grad else 1 / 3)
        return self.network.forward_routed(x, gate)

    def __call__(self, x):
        return self.forward_routed(x)[0]


@pytest.mark.parametrize(
    "name",
    [
        "pgd_10",
        "apgd_scaled",
        "apgd_margin_t",
        "straight_through_1",
        "second_route",
        "reroute_quick",
        "reroute",
        "paths",
        "transfer",
    ],
)
def test_passes_are_those_of_an_image_that_withstands_the_attack(name):
    torch.manual_seed(0)
    spec = ImageSpec(tuple("0123456789"), (3, 8, 8), (0.5,) * 3, (0.2,) * 3)
    network = build_model(ModelConfig(width=4), MoEKind(0.5, 2), spec).eval().requires_grad_(False)
    x = torch.rand(2, 3, 8, 8)
    y, counting = network(x).argmax(dim=1), Counting(network)
    ATTACKS[name].run(Job(counting, x, y, [0, 1], 1e-7, "Linf", 0, 0, 10, transfer=counting))
    # rerouting takes a gradient of each of the 16 routers from one forward pass, each through half of the network on average
    gradients = 16 * 1 / 3 - 2 / 3 if name.startswith("reroute") else 0
    assert 0.97 * ATTACKS[name].passes <= counting.passes / 2 + gradients <= ATTACKS[name].passes + 1e-6


@pytest.mark.parametrize("name", ["apgd_t_soft", "apgd_t_straight_through"])
def test_many_classes_need_no_more_passes(name):
    torch.manual_seed(0)
    spec = ImageSpec(tuple(map(str, range(20))), (3, 8, 8), (0.5,) * 3, (0.2,) * 3)
    network = build_model(ModelConfig(width=4), MoEKind(0.5, 2), spec).eval().requires_grad_(False)
    x = torch.rand(1, 3, 8, 8)
    y, counting = network(x).argmax(dim=1), Counting(network)
    ATTACKS[name].run(Job(counting, x, y, [0], 1e-7, "Linf", 0, 0, 20))
    assert 0.97 * ATTACKS[name].passes <= counting.passes <= ATTACKS[name].passes + 1e-6


class CountingModel(nn.Module):
    """As `Counting`, for a network that does not route."""

    def __init__(self, network):
        super().__init__()
        self.network, self.passes = network, 0.0

    def forward(self, x):
        self.passes += len(x) * (1 if torch.is_grad_enabled() and x.requires_grad else 1 / 3)
        return self.network(x)


@pytest.mark.parametrize("name", ["aa_apgd-ce", "aa_apgd-t", "aa_fab-t", "aa_square", "aaplus_fab", "aarand_apgd-dlr"])
def test_passes_of_autoattack_are_those_of_an_image_that_withstands_it(name):
    torch.manual_seed(0)
    counting = CountingModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).requires_grad_(False)).eval()
    x = torch.rand(2, 3, 8, 8)
    y = counting(x).argmax(dim=1)
    counting.passes = 0.0
    ATTACKS[name].run(Job(counting, x, y, [0, 1], 1e-7, "Linf", 0, 0, 10))
    assert 0.95 * ATTACKS[name].passes <= counting.passes / 2 <= ATTACKS[name].passes


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("reroute", {"routed": False}, "the network does not route"),
        ("reroute", {"norm": "L2"}, "works only in Linf"),
        ("transfer", {"transfer": False}, "no network to transfer from was given"),
        ("aa_apgd-t", {"num_classes": 3}, "needs 4 classes"),
        ("aaplus_apgd-dlr", {"num_classes": 2}, "needs 3 classes"),
        ("aa_square", {"norm": "L2", "shape": (3, 12, 12)}, "the official Square cannot start in L2 on images of 12 x 12 pixels"),
        ("aa_square", {"shape": (3, 12, 12)}, ""),
    ],
)
def test_obstacles_name_their_reason(name, change, reason):
    assert ATTACKS[name].obstacle(replace(SETTING, **change)) == reason


@pytest.mark.parametrize("shape", [(side, side) for side in range(1, 30)] + [(32, 16), (16, 32), (28, 14), (32, 24), (20, 30)])
def test_square_is_skipped_where_the_official_code_raises(shape):
    """The official class, with three queries, on a linear network: in L2 it fails on exactly the sizes that are skipped."""
    square = pytest.importorskip("pyautoattack.square").SquareAttack
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * shape[0] * shape[1], 5)).eval(), torch.rand(2, 3, *shape)
    attack = square(model, p_init=0.8, n_queries=3, eps=0.5, norm="L2", n_restarts=1, seed=0, device="cpu", resc_schedule=False)
    try:
        attack.perturb(x, model(x).argmax(dim=1))
        failed = False
    except (RuntimeError, ZeroDivisionError):
        failed = True
    assert bool(autoattack.square_obstacle(replace(SETTING, norm="L2", shape=(3, *shape)))) == failed


def test_ten_starts_break_every_image_that_the_first_breaks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval(), torch.rand(32, 1, 6, 6)
    y = model(x).argmax(dim=1)
    job = Job(model, x, y, range(32), 0.01, "Linf", 0, 0, 4)
    one, ten = (model(ATTACKS[name].run(job)).argmax(dim=1) != y for name in ("pgd_50", "pgd_50x10"))
    assert one.any()
    assert (ten | ~one).all()


@pytest.mark.parametrize("name", ["aa_apgd-ce", "aaplus_apgd-dlr", "aarand_apgd-ce"])
def test_autoattack_keeps_the_random_state_and_takes_one_image(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval(), torch.rand(1, 1, 6, 6)
    y, before = model(x).argmax(dim=1), torch.get_rng_state()
    x_adv = ATTACKS[name].run(Job(model, x, y, [0], 0.5, "Linf", 0, 0, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert model(x_adv).argmax(dim=1) != y


def test_a_transfer_attack_ascends_the_loss_of_the_other_network():
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    x, y = torch.rand(5, 1, 2, 2), torch.arange(5) % 3
    job = Job(model, x, y, range(5), 0.1, "Linf", 0, 0, 3, transfer=other)
    assert torch.allclose(other_network(job)(x, y, torch.arange(5)), F.cross_entropy(other(x), y, reduction="none"))


class NanBeside(nn.Module):
    """Right on the images `clean`, and NaN on all others. The argmax of NaN is 0, the label."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean

    def forward(self, x):
        same = (x == self.clean[: len(x)]).flatten(1).all(dim=1)
        logits = torch.tensor([2.0, 1.0, 0.0, 0.0]) + 0 * x.mean(dim=(1, 2, 3))[:, None]
        return logits.where(same[:, None], torch.nan)


@pytest.mark.parametrize("name", [n for n, attack in ATTACKS.items() if not attack.needs and not n.startswith("aa")])
def test_a_point_with_logits_that_are_not_finite_is_returned_as_fooled(name):
    x = torch.full((3, 1, 4, 4), 0.5)
    job = Job(NanBeside(x), x, torch.zeros(3, dtype=torch.int64), range(3), 0.1, "Linf", seed=0, shard=0, num_classes=4)
    assert torch.isnan(job.predict(ATTACKS[name].run(job))).all()
