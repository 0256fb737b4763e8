"""What users register by mistake: each mistake is one line, before a run is written or an image attacked."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_backbone import SMALL
from torch import nn

from advmoe import extension
from advmoe.attacks.presets import resolve
from advmoe.attacks.registry import ATTACKS, Attack
from advmoe.config import DataConfig
from advmoe.data import DATASETS, Dataset, Images, ImageSpec, load_dataset
from advmoe.data.fashion_mnist import SPEC
from advmoe.data.images import make_splits
from advmoe.entries import check_accepts, check_kind
from advmoe.errors import UserError
from advmoe.evaluation import evaluate
from advmoe.models import MODELS, Classifier
from advmoe.moe import GATES, HARD, Chosen, DenseKind, Mixed, MoEKind, Scaled, StraightThroughGate, images
from advmoe.recipes import recipe
from advmoe.training.loop import train
from advmoe.training.losses import LOSSES, Loss, trades, trades_attack
from advmoe.training.methods import METHODS, Method, Phase, dense, moe
from advmoe.training.steps import single_level, two_level

pytestmark = pytest.mark.usefixtures("registries")
BOTH = ("routers", "weights")


def test_a_value_of_another_class_is_named():
    for value, words in ((None, "None"), (int, "the class int"), (1, "an int"), (torch.zeros(1), "a Tensor")):
        with pytest.raises(UserError, match=f"^method 'x' must be a Method, not {words}$"):
            check_kind("method 'x'", value, Method)


def test_a_function_of_other_arguments_is_refused():
    check_accepts("f", lambda job, more=1: job, "job")
    check_accepts("f", max, "a", "b")  # a function of C without a signature
    with pytest.raises(UserError, match=r"^f must accept \(state, batches\): too many positional arguments$"):
        check_accepts("f", lambda state: None, "state", "batches")
    with pytest.raises(UserError, match=r"^f must be a function of \(job\), not a str$"):
        check_accepts("f", "PGD", "job")


# Data sets

IMAGES = ImageSpec(("across", "down"), (1, 4, 4), mean=(0.5,), std=(0.3,))
RAW, LABELS = torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2


@pytest.mark.parametrize(
    ("raw", "labels", "message"),
    [
        (RAW, torch.arange(40) % 3, "bad, train: label 2 in row 2 is not a whole number from 0 to 1"),
        (RAW, torch.where(LABELS == 0, -100, 1), "bad, train: label -100 in row 0 is not a whole number from 0 to 1"),
        (RAW, LABELS.int(), "labels must be a tensor of int64, [n] with n > 0, not int32, [40]"),
        (RAW[:0], LABELS[:0], "labels must be a tensor of int64, [n] with n > 0, not int64, [0]"),
        (RAW / 255, LABELS, "images must be a tensor of uint8 (0 to 255), [40, 1, 4, 4], not float32, [40, 1, 4, 4]"),
        (RAW.numpy(), LABELS, "images must be a tensor of uint8 (0 to 255), [40, 1, 4, 4], not a ndarray"),
        (RAW[:, :, :3], LABELS, "images must be a tensor of uint8 (0 to 255), [40, 1, 4, 4], not uint8, [40, 1, 3, 4]"),
        (RAW[:30], LABELS, "images must be a tensor of uint8 (0 to 255), [40, 1, 4, 4], not uint8, [30, 1, 4, 4]"),
    ],
)
def test_images_and_labels_that_do_not_fit_the_spec(raw, labels, message):
    DATASETS["bad"] = Dataset(
        lambda _: IMAGES, lambda config: make_splits("bad", IMAGES, Images(raw, labels), Images(RAW, LABELS), config)
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_dataset(DataConfig(dataset="bad"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda config: None, "dataset 'bad' must be a Dataset, not a function"),
        (Dataset(IMAGES, lambda config: None), "dataset 'bad': spec must be a function of (config), not an ImageSpec"),
        (Dataset(lambda _: IMAGES, lambda: None), "dataset 'bad': load must accept (config): too many positional arguments"),
        (Dataset(lambda _: IMAGES, lambda _: None), "dataset 'bad': the result of load must be a Splits, not None"),
    ],
)
def test_data_sets_that_cannot_be_loaded(entry, message):
    DATASETS["bad"] = entry
    with pytest.raises(UserError, match=re.escape(message)):
        load_dataset(DataConfig(dataset="bad"))


def test_splits_that_were_not_made_by_make_splits_are_checked_too(tiny, splits, tmp_path):
    wrong = replace(splits, val=Images(splits.val.raw, splits.val.labels + 5))
    DATASETS["bad"] = Dataset(lambda _: SPEC, lambda _: wrong)
    message = r", val: label 1\d in row \d+ is not a whole number from 0 to 9"
    with pytest.raises(UserError, match="dataset 'bad'" + message):
        load_dataset(DataConfig(dataset="bad"))
    with pytest.raises(UserError, match=message):
        train(tiny(), wrong, tmp_path / "run")
    grey = replace(splits, spec=replace(SPEC, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="mean and std must have one value for each of the 1 channels"):
        train(tiny(), grey, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": tuple(range(10))}, "ImageSpec.classes.0: Input should be a valid string"),
        ({"classes": ()}, "ImageSpec: classes must have a name or more"),
        ({"shape": (1, 28)}, "ImageSpec.shape.2: Field required"),
        ({"shape": tuple(np.array([1, 28, 28]))}, "ImageSpec: must hold plain numbers and strings (Object of type int64 is not "),
        ({"mean": 0.5}, "ImageSpec.mean: Input should be a valid array"),
        ({"mean": (np.float32(0.5),)}, "ImageSpec: must hold plain numbers and strings (Object of type float32 is not "),
        ({"mean": torch.tensor([0.5])}, "ImageSpec: must hold plain numbers and strings (Object of type Tensor is not "),
        ({"std": (0.0,)}, "ImageSpec: mean (0.286,) and std (0.0,) must be at most 65536, and std not 0"),
    ],
)
def test_specs_that_no_checkpoint_could_hold(fields, message, tiny, splits, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"fashion-mnist, {message}")):
        train(tiny(), replace(splits, spec=replace(SPEC, **fields)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Methods


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (two_level, "must be a Method, not a function"),
        (Method("moe", (Phase(two_level, BOTH),)), "kind must be a function of (config), not a str"),
        (Method(lambda config: None, (Phase(two_level, BOTH),)), "the result of kind must be a DenseKind, not None"),
        (Method(moe, ()), "phases must be a tuple of at least one Phase"),
        (Method(moe, Phase(two_level, BOTH)), "phases must be a tuple of at least one Phase"),
        (Method(moe, (two_level,)), "a phase must be a Phase, not a function"),
        (Method(moe, (Phase(lambda state: None, BOTH),)), "the step of a phase must accept (state, batches): too many"),
        (Method(moe, (Phase(single_level, "all"),)), "levels must be a tuple of at least one name, such as ('weights',)"),
        (Method(moe, (Phase(single_level, ("experts",)),)), "unknown level of method 'bad': 'experts': there is all, masks"),
        (Method(dense, (Phase(two_level, BOTH),)), "the level routers needs a MoEKind, and kind returns a DenseKind"),
        (Method(moe, (Phase(two_level, BOTH),), loss="missing"), "unknown loss 'missing'"),
        (Method(moe, (Phase(two_level, BOTH),), selects="val_x"), "selects must be val_ra or val_sa, not val_x"),
    ],
)  # fmt: skip
def test_methods_that_cannot_train(method, message, tiny, splits, tmp_path):
    METHODS["bad"] = method
    with pytest.raises(UserError, match=re.escape(message)):
        recipe("cifar10-resnet18-bad")
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny("bad"), splits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def returning(change):
    return lambda state, batches: change(two_level(state, batches))


def break_the_network(state, batches):
    metrics = two_level(state, batches)
    if state.iteration == 2:  # the last one: no later iteration can fail
        with torch.no_grad():
            state.model.classifier.weight.fill_(torch.nan)
    return metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "method 'bad': its step must return a dict of tensors with 'loss', not NoneType"),
        (lambda _: {}, "must return a dict of tensors with 'loss', not a dict of nothing"),
        (lambda _: {"loss": 1.0}, "'loss' must be one number, the sum over the images, not a float"),
        (lambda own: own | {"mine": torch.ones(3)}, "'mine' must be one number, the sum over the images, not shape [3]"),
        (lambda own: own | {"load": torch.ones(3)}, "'load' must be of 2 dimensions, not shape [3]"),
        (
            lambda own: own | {"loss": torch.tensor(torch.nan)},
            "epoch 1: the metric 'loss' is nan; last good checkpoint: none",
        ),
        (  # a checkpoint holds no such figure
            lambda own: own | {"loss": torch.tensor(1e20)},
            "epoch 1: the metric 'loss' is 5e+18; last good checkpoint: none",
        ),
    ],
)
def test_steps_that_return_something_else(change, message, tiny, splits, tmp_path):
    METHODS["bad"] = Method(moe, (Phase(returning(change), BOTH),))
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny("bad", epochs=1), splits, tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "levels", "message"),
    [
        (break_the_network, BOTH, "epoch 1: classifier.weight is not finite after the last iteration; last good checkpoint: none"),
        (single_level, BOTH, "the step single_level trains one level, not routers and weights"),
        (two_level, ("all",), "the step two_level needs the levels routers and weights, not all"),
        (two_level, (*BOTH, "all"), "method 'bad': a phase trains one level or two different ones, not routers, weights, all"),
        (two_level, ("weights", "weights"), "method 'bad': a phase trains one level or two different ones, not weights, weights"),
    ],
)
def test_steps_that_break_the_network_or_get_other_levels(step, levels, message, tiny, splits, tmp_path):
    METHODS["bad"] = Method(moe, (Phase(step, levels),))
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny("bad", epochs=1), splits, tmp_path / "run")


def test_a_network_that_a_step_broke_is_not_saved_within_an_epoch(tiny, splits, tmp_path):
    METHODS["bad"] = Method(moe, (Phase(break_the_network, BOTH),))
    with pytest.raises(UserError, match=r"classifier.weight is not finite .*; last good checkpoint: epoch-0000-000002 in "):
        train(tiny("bad", epochs=1, save_minutes=0.0), splits, tmp_path / "run")


# Losses and gates


def with_total(change):
    def value(*inputs):
        outcome = trades(*inputs)
        return outcome._replace(total=change(outcome.total))

    return value


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (trades, "loss 'bad' must be a Loss, not a function"),
        (Loss(lambda x: x, trades), "loss 'bad': attack must accept (forward, x, y, settings, draws)"),
        (Loss(trades_attack, lambda x: x), "loss 'bad': value must accept (forward, x, x_adv, y, beta)"),
        (Loss(trades_attack, lambda *inputs: trades(*inputs).total), "the result of the loss must be an Outcome, not a Tensor"),
        (Loss(trades_attack, with_total(lambda total: total.expand(3))), "must be one number, a tensor of shape [], not [3]"),
        (Loss(lambda *inputs: None, trades), "the result of the loss's attack must be a Tensor, not None"),
        (
            Loss(lambda *inputs: inputs[1][:, :, 1:], trades),
            "the loss's attack must return images of the shape [20, 1, 28, 28], not [20, 1, 27, 28]",
        ),
        (
            Loss(trades_attack, lambda *inputs: trades(*inputs)._replace(clean=torch.zeros(3))),
            "clean in the result of the loss must be logits of the shape [20, 10], not [3]",
        ),
        (Loss(trades_attack, with_total(torch.Tensor.detach)), "the loss does not depend on the parameters of the level weights"),
    ],
)
def test_losses_that_cannot_be_used(loss, message, tiny, splits, tmp_path):
    LOSSES["bad"] = loss
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny(loss="bad"), splits, tmp_path / "run")


def test_a_loss_without_the_routings_of_x_adv_is_refused_by_options_that_need_them(tiny, splits, tmp_path):
    LOSSES["bad"] = Loss(trades_attack, lambda *inputs: trades(*inputs)._replace(robust_routings=()))
    options = {"router_consistency": 1.0, "router_margin": 1.0, "runner_up_consistency": 1.0, "router_target": "label_mod_n"}
    for name, value in options.items():
        with pytest.raises(UserError, match=f"^{name} needs a loss whose Outcome has robust and robust_routings"):
            train(tiny(loss="bad", **{name: value}), splits, tmp_path / name)


class NeedsSettings(StraightThroughGate):
    def __init__(self, std):
        super().__init__()


class ReturnsTensor(StraightThroughGate):
    def weights(self, logits, layer):
        return self.p(logits)


class WithoutLayer(StraightThroughGate):
    def weights(self, logits):
        return Chosen(logits.argmax(dim=1))


class OutOfRange(StraightThroughGate):
    def weights(self, logits, layer):
        return Chosen(logits.argmax(dim=1) + 2)


class MixesOne(StraightThroughGate):
    def weights(self, logits, layer):
        return Mixed(logits.argmax(dim=1), self.p(logits)[:, :1])


class ScalesAll(StraightThroughGate):
    def weights(self, logits, layer):
        return Scaled(logits.argmax(dim=1), torch.ones(()))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (StraightThroughGate(), "gate 'bad' must be a function of (), not a StraightThroughGate"),
        (NeedsSettings, "gate 'bad' must accept (): missing a required argument: 'std'"),
        (dict, "gate 'bad' must be a Gate, not a dict"),
        (WithoutLayer, "gate 'bad': weights must accept (logits, layer)"),
        (ReturnsTensor, "gate 'bad': the result of weights must be a Chosen, not a Tensor"),
        (OutOfRange, "gate 'bad': experts must be int64 [B] from 0 to 1, not [2, 2]"),
        (MixesOne, "gate 'bad': for 2 images and 2 experts, mixture must have the shape [2, 2], not [2, 1]"),
        (ScalesAll, "gate 'bad': for 2 images and 2 experts, factor must have the shape [2], not []"),
    ],
)
def test_gates_that_cannot_be_used(gate, message, tiny, splits, tmp_path):
    GATES["bad"] = gate
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny(router_gate="bad"), splits, tmp_path / "run")


# Backbones


class Two(Classifier):
    """Two MoE layers."""

    def __init__(self, kind, spec, *, width, stem):
        super().__init__(kind, spec, stem)
        first, channels = images(spec.shape[0]), kind.channels(width)
        self.stem = kind.plain(first, channels)
        self.one, self.two = kind.conv(channels, channels), kind.conv(channels, channels)
        self.finish(channels)

    def features(self, x, gate, logits):
        h, first = self.one(self.stem(x), gate, logits)
        h, second = self.two(h, gate, logits)
        return h, first + second


class Swapped(Two):
    def features(self, x, gate, logits):
        h, first = self.two(self.stem(x), gate, logits)
        h, second = self.one(h, gate, logits)
        return h, first + second


class Dropped(Two):
    def features(self, x, gate, logits):
        h, routings = super().features(x, gate, logits)
        return h, routings[:1]


class Deaf(Two):
    def features(self, x, gate, logits):
        return super().features(x, HARD, logits)


class Unfinished(Two):
    def finish(self, outputs):
        pass


class Unrouted(Two):
    def __init__(self, kind, spec, **settings):
        super().__init__(DenseKind(), spec, **settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Two, "backbone 'bad' must be a pair in MODELS: (constructor, default width)"),
        ((Unfinished, 4), "backbone 'bad' must call self.finish(channels of the last layer) at the end of its constructor"),
        ((Unrouted, 4), "backbone 'bad' has no experts, which at_moe and advmoe train"),
        ((Dropped, 4), "Dropped: forward_routed returns 1 routings for 2 routers"),
        ((Swapped, 4), "Swapped: routing 0 is not the one that the gate gives MoE layer 0"),
        ((Deaf, 4), "Deaf: routing 0 is not the one that the gate gives MoE layer 0"),
    ],
)
def test_backbones_whose_routing_would_be_missed(entry, message, tiny, splits, tmp_path):
    MODELS["bad"] = entry
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny("advmoe", backbone="bad"), splits, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if isinstance(entry, tuple) and issubclass(entry[0], (Dropped, Swapped, Deaf)):
        model = entry[0](MoEKind(), SPEC, width=4, stem="cifar").eval()
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate(model, splits.test.pixels(), splits.test.labels, epsilon=0.1, preset=["pgd_10"])


def test_a_right_backbone_trains(tiny, splits, tmp_path):
    MODELS["good"] = (Two, 4)
    with pytest.raises(UserError, match="backbone 'good' ignores routers per_stage: call begin_stage"):
        train(tiny("advmoe", backbone="good", routers="per_stage"), splits, tmp_path / "run")
    for routers in ("per_layer", "per_network"):
        config = tiny("advmoe", backbone="good", routers=routers, num_experts=3, epochs=1)
        assert len(train(config, splits, tmp_path / routers)[0]["load"]) == (2 if routers == "per_layer" else 1)


# Attacks

X, Y = torch.rand(8, 1, 28, 28), torch.arange(8)
LINEAR = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(28 * 28, 10)).eval()


def left_in_train_mode(job):
    job.predict.train()
    return job.x


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda job: job.x, "attack 'bad' must be an Attack, not a function"),
        (Attack(lambda x, y: x), "attack 'bad': run must accept (job): missing a required argument: 'y'"),
        (Attack(lambda job: job.x, needs="routers"), "attack 'bad': needs must be '', routing or transfer, not routers"),
        (Attack(lambda job: job.x, norms="Linf"), "attack 'bad': norms must be a tuple of Linf and L2, not 'Linf'"),
        (Attack(lambda job: None), "attack 'bad': the result must be a Tensor, not None"),
        (
            Attack(lambda job: job.x[:1]),
            "attack 'bad' must return images of float32, [8, 1, 28, 28], not of float32, [1, 1, 28, 28]",
        ),
        (Attack(lambda job: job.x.double()), "attack 'bad' must return images of float32, [8, 1, 28, 28], not of float64"),
        (Attack(left_in_train_mode), "attack 'bad' left the network in another mode"),
    ],
)
def test_attacks_that_cannot_be_judged(attack, message):
    ATTACKS["bad"] = attack
    labels = LINEAR(X).argmax(dim=1)
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(LINEAR, X, labels, epsilon=0.1, preset=["bad"])
    LINEAR.eval()


def test_an_attack_that_leaves_the_ball_breaks_nothing_and_fails_check_11():
    for run in (lambda job: job.x + 2 * job.epsilon, lambda job: job.x * torch.nan, lambda job: job.x.add_(1)):
        ATTACKS["bad"] = Attack(run)
        result = evaluate(LINEAR, X / 2, LINEAR(X / 2).argmax(dim=1), epsilon=0.1, preset=["bad"])
        assert (result.worst, result.attacks["bad"].broken) == (100.0, 0)
        assert next(check for check in result.checks if check.number == 11).status == "fail"


# Names


def test_the_command_line_refuses_a_script_that_replaces_an_entry(monkeypatch):
    monkeypatch.setenv(extension.VARIABLE, "mine.py")
    ATTACKS["mine"] = Attack(lambda job: job.x)
    extension.check_names()
    for table, name in ((METHODS, "advmoe"), (ATTACKS, "pgd_50"), (MODELS, "resnet18")):
        entry = table[name]
        table[name] = table["mine"] if "mine" in table else table[SMALL] if table is MODELS else replace(entry)
        with pytest.raises(UserError, match=f"mine.py: [A-Z]+ has '{name}' already; give your entry another name"):
            extension.check_names()
        table[name] = entry
    monkeypatch.delenv(extension.VARIABLE)
    METHODS["advmoe"] = replace(METHODS["advmoe"])
    extension.check_names()


def test_a_plan_checks_an_added_attack_beside_autoattack():
    ATTACKS["mine"] = Attack(lambda job: job.x)
    assert resolve(["aa_square", "pgd_10", "mine"]).survivors == ("aa_square", "mine")
    ATTACKS["mine"] = Attack(lambda x, y: x)
    with pytest.raises(UserError, match="attack 'mine': run must accept"):
        resolve(["aa_square", "mine"])
