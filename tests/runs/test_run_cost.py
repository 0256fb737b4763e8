import pytest

from advmoe.config import ModelConfig, RunConfig
from advmoe.errors import UserError
from advmoe.evaluation.cost import cost
from advmoe.models import MODELS
from advmoe.runs.cost import dense_estimate, estimate, image_spec, profile
from advmoe.training.methods import METHODS
from advmoe.training.start import network


def config(method, backbone="resnet18", width=10, **fields):
    return RunConfig(method=method, model=ModelConfig(backbone=backbone, width=width, **fields))


ONE_OF_A_KIND = {method.kind(ModelConfig()): name for name, method in METHODS.items()}.values()  # of network


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize(
    ("method", "stem", "scale"),
    [
        *((method, "cifar", 0.3) for method in ONE_OF_A_KIND),
        ("at_dense", "imagenet", 0.3),
        ("advmoe", "imagenet", 0.3),
        ("advmoe", "cifar", 1.0),
    ],
)
def test_estimate_is_the_cost_of_the_real_network(method, stem, scale, backbone):
    run = config(method, backbone, width=13 if backbone != "wrn28_10" else 40, stem=stem, model_scale=scale)
    real, guess = profile(run), estimate(run)
    assert guess.params == real.params
    assert guess.gmacs == pytest.approx(real.gmacs_ideal, rel=1e-12)


@pytest.mark.parametrize("fields", [{"routers": "per_network"}, {"norms": "per_expert"}, {"bank": "disjoint", "num_experts": 3}])
def test_estimate_knows_the_kinds_of_expert(fields):
    run = config("advmoe", **fields)
    real, guess = profile(run), estimate(run)
    assert guess.params == real.params
    assert guess.gmacs == pytest.approx(real.gmacs_ideal, rel=1e-12)


def test_sparse_is_counted_as_its_compact_network():
    sparse, small = (profile(config(method, model_scale=0.3)) for method in ("at_sparse", "at_small_dense"))
    run = config("at_sparse", model_scale=0.3)
    masked = cost(network(run, image_spec(run)), (3, 32, 32))
    assert sparse == small
    assert sparse.gmacs_ideal < 0.15 * masked.gmacs_ideal


def test_dense_estimate_is_at_denses():
    assert dense_estimate(config("advmoe", model_scale=0.2)) == estimate(config("at_dense"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "advmoo"}, "unknown method 'advmoo'"),
        ({"model": ModelConfig(backbone="resnet81")}, "unknown backbone 'resnet81'"),
        ({"data": RunConfig().data.replace(dataset="cifar")}, "unknown dataset 'cifar'"),
    ],
)
def test_unknown_parts_are_refused(change, message):
    for count in (profile, estimate):
        with pytest.raises(UserError, match=message):
            count(RunConfig().replace(**change))
