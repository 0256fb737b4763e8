import pytest
import torch
from image_specs import image_spec
from torch import nn

from advmoe.attacks import Pgd, evaluation_pgd
from advmoe.data import Images
from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, MoEKind
from advmoe.training.accuracy import correct_flags, predict_all, robust_flags

EPSILON = 8 / 255
SETTINGS = evaluation_pgd(EPSILON, 10)


class Linear(nn.Module):
    """Two classes with logits 0 and w . x + b. Records the size of each batch that needs a gradient."""

    def __init__(self, size=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, size, size, generator=generator))
        self.bias = nn.Parameter(-self.weight.detach().sum() / 2)
        self.attacked = []

    def forward(self, x):
        if x.requires_grad:
            self.attacked.append(len(x))
        score = (x * self.weight).sum(dim=(1, 2, 3)) + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def random_images(count, size=4, low=0, high=256, classes=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(low, high, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Images(images, torch.randint(classes, (count,), generator=generator))


def robust(model, images, settings, **options):
    return robust_flags(model, images, settings, correct=correct_flags(model, images), numbers=range(len(images)), **options)


def labelled_by(model, images):
    return Images(images.raw, predict_all(model, images))


def tiny(kind):
    torch.manual_seed(0)
    model = ResNet(kind, image_spec(3), blocks=(1, 1), width=4, stem="cifar")
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.3)
        model.train()(random_images(32, 12).pixels())
        model.classifier.bias -= model.eval()(random_images(32, 12).pixels()).mean(dim=0)
    return model.eval()


def worst_case(model, images, epsilon):
    """Robust flags in closed form: every pixel moves against the label as far as the ball and [0, 1] allow."""
    x, sign = images.pixels().double(), 2 * images.labels.double() - 1
    moved = (x - epsilon * sign[:, None, None, None] * model.weight.double().sign()).clamp(0, 1)
    margins = sign * ((moved * model.weight.double()).sum(dim=(1, 2, 3)) + model.bias.double())
    assert margins.abs().min() > 1e-4  # no flag depends on rounding
    return margins > 0


@pytest.mark.parametrize(("low", "high"), [(40, 200), (0, 256)])
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(low, high):
    model, images = Linear(), random_images(200, low=low, high=high)
    images = labelled_by(model, images)
    expected = worst_case(model, images, EPSILON)
    assert 20 < expected.sum() < 180
    assert robust(model, images, SETTINGS).tolist() == expected.tolist()


def test_saturated_images_reach_the_closed_form_too():
    model, images = Linear(), random_images(200)
    images = labelled_by(model, Images((images.raw > 127).to(torch.uint8) * 255, images.labels))
    expected = worst_case(model, images, 0.2)
    assert 20 < expected.sum() < 180
    assert robust(model, images, Pgd(0.2, 0.05, 10)).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, num_experts=2)])
def test_robust_flags_do_not_depend_on_the_batch_size(kind):
    model = tiny(kind)
    images = labelled_by(model, random_images(24, 12, classes=3))
    settings = Pgd(2 / 255, 0.5 / 255, 3)
    flags = [robust(model, images, settings, batch_size=size).tolist() for size in (1, 5, 24, 100)]
    assert 0 < sum(flags[0]) < 24
    assert all(result == flags[0] for result in flags)


def test_noise_depends_only_on_the_number_of_the_image():
    """Without a step, PGD returns its random start. The network records its input."""
    seen = []

    class Recording(Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    model, images, start = Recording(), random_images(6), Pgd(EPSILON, 0.01, 0)
    for rows, numbers in ((range(6), range(6)), (range(3, 5), [3, 4]), (range(6), range(1, 7))):
        part = images[torch.tensor(rows)]
        robust_flags(model, part, start, correct=torch.ones(len(part), dtype=torch.bool), numbers=numbers)
    together, two, others = seen
    assert torch.equal(two, together[3:5])
    assert not torch.equal(others, together)


def test_wrong_images_are_never_attacked():
    model, images = Linear(), random_images(50)
    correct = correct_flags(model, images)
    assert 10 < correct.sum() < 40
    flags = robust(model, images, Pgd(EPSILON, 0.01, 3), batch_size=4)
    assert sum(model.attacked) == 3 * correct.sum()
    assert not flags[~correct].any()


def test_epsilon_zero_gives_the_clean_accuracy():
    model, images = tiny(MoEKind(0.5)), random_images(40, 12, classes=3)
    flags = correct_flags(model, images)
    assert 0 < flags.sum() < 40
    assert torch.equal(robust(model, images, Pgd(0.0, 0.01, 2)), flags)


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, num_experts=2)])
def test_a_network_without_a_correct_image_is_not_attacked(kind):
    model = tiny(kind)
    images = random_images(10, 12, classes=3)
    wrong = Images(images.raw, (predict_all(model, images) + 1) % 3)
    assert robust(model, wrong, SETTINGS).tolist() == [False] * 10


def test_predictions_do_not_depend_on_the_batch_size():
    model, images = tiny(MoEKind(0.5)), random_images(20, 12)
    expected = [model(x[None]).argmax().item() for x in images.pixels()]
    assert len(set(expected)) > 1
    for size in (1, 7, 20, 256):
        assert predict_all(model, images, size).tolist() == expected


def test_correct_flags_by_hand():
    model = nn.Flatten()  # two pixels are the two logits
    images = torch.tensor([[10, 20], [20, 10], [0, 255]], dtype=torch.uint8).view(3, 1, 1, 2)
    flags = correct_flags(model, Images(images, torch.tensor([1, 1, 1])))
    assert flags.tolist() == [True, False, True]


def test_evaluation_restores_the_mode_and_keeps_the_statistics():
    model, images = tiny(MoEKind(0.5)).train(), random_images(12, 12, classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    robust(model, images, SETTINGS)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_whose_logits_are_not_finite_is_not_correct(value):
    """The argmax of such logits is class 0, the label. Here black images are classified, and only without an attack."""

    class Broken(nn.Module):
        def forward(self, x):
            sums = x.sum(dim=(1, 2, 3))
            logits = torch.stack([1 + 0 * sums, 0 * sums], dim=1)
            return logits.where(sums[:, None] == 0, value)

    images = Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4), torch.tensor([0, 0]))
    assert predict_all(Broken(), images).tolist() == [0, -1]
    assert correct_flags(Broken(), images).tolist() == [True, False]
    assert robust(Broken(), images, SETTINGS).tolist() == [False, False]
