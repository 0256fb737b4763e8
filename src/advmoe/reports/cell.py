"""The cell of a Record: the network and the setting that it has in common with runs of other seeds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from advmoe.config import RunConfig, flat_settings, to_dict
from advmoe.evaluation.record import Record
from advmoe.files import JsonObject
from advmoe.models import MODELS
from advmoe.recipes import PLUS, method_traits
from advmoe.training.methods import METHODS

Key = TypeVar("Key")
Runs = TypeVar("Runs")  # a Record, or a Summary of several
SAME_BATCHES, OFFICIAL, WITH_PLUS = "same batches", "variant of the public code", "with -plus"
OF_OFFICIAL = {  # what distinguishes the recipes with the suffix -official
    "model.routers": "per_network", "model.bank": "disjoint", "model.norms": "shared", "training.level_batches": "same",
    "training.router_loss": "target", "training.router_target": "label_mod_n", "training.router_target_weight": 6.0,
    "training.router_consistency": 6.0,
}  # fmt: skip
OF_VARIANTS = (  # choices of routers and experts with which a network is listed separately
    "model.routers", "model.bank",
    *(f"training.{name}" for name in (
        "level_batches", "weight_attack_gate", "awp_routers", "router_loss", "router_target", "router_target_weight",
        "router_consistency", "router_margin", "router_every", "router_schedule", "router_statistics", "runner_up_consistency",
        "router_gate", "router_attack_gate", "router_steps", "weight_steps", "level_order", "router_warmup", "balance",
        "balance_weight", "tied_statistics",
    )),
)  # fmt: skip
OF_CHOICE = ("model.norms", "training.router_lr", "training.tied_share")  # listed separately too; one expert ignores them
OF_ROUTERS = (*OF_VARIANTS, *OF_CHOICE, "model.num_experts")
OF_METHODS = (*OF_ROUTERS, "model.model_scale", "training.init_from")
INGREDIENTS = (  # the same for networks without routers too
    "model.activation", "data.augment", "data.augment_from", "data.generated", "data.generated_share", "attack.epsilon_ramp",
    "attack.steps_ramp",
    *(f"training.{name}" for name in ("loss", "beta", "ema", "label_smoothing", "soft_labels", "awp", "awp_from", "teacher")),
)  # fmt: skip
OF_FILES = {"data.generated": "generated images", "training.teacher": "teacher"}  # whose value, a path, is not part of the name


DEFAULTS = flat_settings(to_dict(RunConfig()))


def is_routed(method: str) -> bool:
    """Whether the method's networks have experts. A method that is not registered here counts as one with experts and with a model
    scale, so that runs that may differ in them are never averaged."""
    return method not in METHODS or method_traits(method).routed


def is_full_scale(method: str) -> bool:
    """Whether the method ignores the model scale."""
    return method in METHODS and not method_traits(method).scaled


@dataclass(frozen=True)
class Cell:
    """What identifies the runs behind one figure; they differ only in their seeds.

    `width` is None for the published width. A dense network has model scale 1, and a network without routers one expert.
    `epsilon` and `norm` are those of the evaluation; `attack_steps` is the number of steps of the training attack. `variant` says
    in which of `OF_VARIANTS` the routers and experts differ from the default: `SAME_BATCHES` if AdvMoE's two levels were trained on
    the same batches, `OFFICIAL` for the recipes with the suffix -official, 'router target confusion'. `ingredients` does the same
    for `INGREDIENTS`: `WITH_PLUS` for all that the suffix -plus adds, 'ema 0.999'.
    `choice` names those of `OF_CHOICE` that differ from the default, or from what -official or -plus sets: 'tied share 0.67'. It
    is empty with one expert or none.
    """

    dataset: str
    backbone: str
    width: int | None
    method: str
    model_scale: float
    num_experts: int
    attack_steps: int
    epsilon: float
    norm: str
    epochs: int
    train_images: int
    test_images: int
    variant: str = ""
    ingredients: str = ""
    choice: str = ""

    @property
    def has_one_expert(self) -> bool:
        """Whether a routed method was trained with one expert: the control, whose routers choose nothing."""
        return is_routed(self.method) and self.num_experts == 1

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the runs are of their method as published: with a choice between experts, and without other options."""
        return not (self.has_one_expert or self.variant or self.ingredients or self.choice)

    @property
    def label(self) -> str:
        """The method's name, and what differs from it: 'at_moe, one expert', 'advmoe, same batches'."""
        return self.method + ", one expert" * self.has_one_expert + self.options

    @property
    def words(self) -> str:
        """'advmoe, r 0.5, N 2, resnet18, fashion-mnist'."""
        return f"{self.method}{self.size}{self.options}, {self.backbone}, {self.dataset}"

    @property
    def size(self) -> str:
        """', r 0.5, N 2', as far as the method has a model scale and experts."""
        scale = "" if is_full_scale(self.method) else f", r {self.model_scale:g}"
        return scale + (f", N {self.num_experts}" if is_routed(self.method) else "")

    @property
    def options(self) -> str:
        """', same batches, ema 0.995', or empty."""
        return options_text(self.variant, self.ingredients, self.choice)

    @property
    def setting(self) -> "Cell":
        """The fields that cells must share to be compared: all but method, model scale, number of experts and options."""
        return replace(self, method="", model_scale=1.0, num_experts=0, variant="", ingredients="", choice="")


def options_text(*parts: str) -> str:
    """', same batches, ema 0.995, tied share 0.5', ' with -plus', or empty."""
    return "".join(f"{'' if part.startswith(WITH_PLUS) else ','} {part}" for part in parts if part)


def grouped(runs: Iterable[Runs], key: Callable[[Runs], Key]) -> dict[Key, list[Runs]]:
    """Records or summaries by `key`, in order of first occurrence."""
    groups: dict[Key, list[Runs]] = {}
    for one in runs:
        groups.setdefault(key(one), []).append(one)
    return groups


CELL_FIELDS = tuple(field.name for field in fields(Cell))


def cell_of(record: Record) -> Cell:
    """The cell that a Record belongs to."""
    method, config, backbone = record.method, record.config, record.backbone
    width, published = config.model.width, MODELS[backbone][1] if backbone in MODELS else None
    return Cell(
        dataset=record.dataset, backbone=backbone, width=None if width == published else width,
        method=method, model_scale=1.0 if is_full_scale(method) else config.model.model_scale,
        num_experts=config.model.num_experts if is_routed(method) else 1, attack_steps=config.attack.num_steps,
        epsilon=record.epsilon, norm=record.norm, epochs=config.training.epochs,
        train_images=record.train_images, test_images=record.test_images,
        variant=_variant(record) if is_routed(method) else "", ingredients=_ingredients(record),
        choice=_choice(record) if is_routed(method) and config.model.num_experts > 1 else "",
    )  # fmt: skip


def _variant(record: Record) -> str:
    official = _official(record)
    return ", ".join([*([OFFICIAL] if official else []), *_in_words(_differing(record, OF_VARIANTS, DEFAULTS | official))])


def _ingredients(record: Record) -> str:
    plus = _plus(record)
    return ", ".join([*([WITH_PLUS] if plus else []), *_in_words(_differing(record, INGREDIENTS, DEFAULTS | plus))])


def _choice(record: Record) -> str:
    return ", ".join(_in_words(_differing(record, OF_CHOICE, DEFAULTS | _official(record) | _plus(record))))


def _official(record: Record) -> JsonObject:
    """What the suffix -official sets, if the run has all of it; else empty."""
    pgd_at = not _differing(record, ["training.loss"], {"training.loss": "pgd_at"})
    official = OF_OFFICIAL | ({"training.router_consistency": 0.0} if pgd_at else {})
    return {} if _differing(record, official, official) else official


def _plus(record: Record) -> JsonObject:
    """What the suffix -plus sets, if the run has all of it that does not depend on routers; else empty."""
    plus = flat_settings(PLUS)
    return {} if _differing(record, [name for name in plus if name not in OF_ROUTERS], plus) else plus


def _differing(record: Record, names: Iterable[str], expected: JsonObject) -> JsonObject:
    """Those of the settings `names` that are not as expected. A field that the Record is too old to have has its default."""
    values = DEFAULTS | flat_settings(record.config.model_dump())
    return {name: values[name] for name in names if values[name] != expected[name]}


def _in_words(options: Mapping[str, object]) -> list[str]:
    """['same batches', 'router target confusion']."""
    texts = [
        OF_FILES.get(name) or f"{name.partition('.')[2].replace('_', ' ')} {short_value(value)}" for name, value in options.items()
    ]
    return [SAME_BATCHES if text == "level batches same" else text for text in texts]


def short_value(value: Any) -> str:
    """A setting's value as text. A long one without spaces, such as a fingerprint, is cut."""
    text = f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
    return text if len(text) <= 20 or " " in text else f"{text[:12]}..."
