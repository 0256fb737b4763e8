"""What a run is: frozen dataclasses, checked when made; YAML in and out.

Field names are unique across the sections, so that on the command line each is a plain flag (`--epochs`, `--epsilon`).
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from advmoe import migrations
from advmoe.errors import UserError, nearest
from advmoe.files import bounded_text

SCHEMA = 2  # 1 said "picture" where 2 says "image"
MAX_BYTES = 2**18  # of a YAML file: ours have a few thousand
MOST_EXPERTS = 1000
LARGEST = 2**64  # whole number


def parse_fraction(text: str) -> float:
    """'8/255' or '0.031' as a float."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{shown(text)} is neither a number nor a fraction such as 8/255") from None


Fraction = Annotated[
    float,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="FRACTION",
        instance_from_str=lambda words: parse_fraction(words[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [repr(value)],
    ),
]
Device = str
Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class ModelConfig:
    """The network. A method that has no experts ignores the expert fields; a dense one ignores model_scale."""

    backbone: str = "resnet18"
    """Name of the architecture."""
    width: int | None = None
    """Channels of the dense network's first stage (of a DenseNet: its growth rate); by default the published one."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First convolution: 3x3 stride 1, or 7x7 stride 2 with max pooling."""
    model_scale: float = 0.5
    """r: the share of the dense network's channels that one expert, or the small dense network, has."""
    num_experts: int = 2
    """N: experts in each MoE layer."""
    bank: Literal["backbone", "disjoint"] = "backbone"
    """Experts as windows of the dense layer's filters, or with N * K filters of their own."""
    routers: Literal["per_layer", "per_network"] = "per_layer"
    """A router in every MoE layer, or one small CNN on the image whose choice serves all of them."""
    norms: Literal["shared", "per_expert"] = "per_expert"
    """Batch norm after an MoE layer: one for all its experts, or one for each (measured better, docs/choices.md)."""

    def __post_init__(self) -> None:
        _check(self, "width", self.width is None or self.width >= 1, "at least 1")
        _check(self, "model_scale", 0 < self.model_scale <= 1, "in (0, 1]")
        _check(self, "num_experts", self.num_experts >= 1, "at least 1")
        _check(self, "num_experts", self.num_experts <= MOST_EXPERTS, f"at most {MOST_EXPERTS}")


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    dataset: str = "cifar10"
    """Name of the data set."""
    data_dir: str | None = None
    """File or folder that holds it (embedded data needs none)."""
    limit_train: int | None = None
    """Keep this many training images, balanced over the classes."""
    limit_test: int | None = None
    """Keep this many test images, balanced over the classes."""
    validation_share: float = 0.02
    """Stratified share of the training set held out to select the best epoch, where the data has no such part."""
    crop_padding: int = 4
    """Augmentation: random crop after zero padding by this many pixels."""
    flip: bool = True
    """Augmentation: mirror every second image, at random."""
    image_size: int | None = None
    """Dataset folder: height and width that images are brought to; by default those of the first one."""
    workers: int | None = None
    """Processes that decode streamed images (ImageNet); by default one for each CPU core."""

    def __post_init__(self) -> None:
        _check(self, "validation_share", 0 < self.validation_share < 1, "in (0, 1)")
        _check(self, "crop_padding", self.crop_padding >= 0, "at least 0")
        for name in ("limit_train", "limit_test", "image_size", "workers"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class AttackConfig:
    """The L-infinity threat model, and the attack that training meets it with."""

    epsilon: Fraction = 8 / 255
    """Radius of the ball, in pixels of [0, 1]."""
    num_steps: int = 2
    """Steps of the training attack."""
    step_size: Fraction | None = None
    """Step of the training attack; by default 5/8 of epsilon for up to 2 steps (5/255 of 8/255), 1/4 for more (2/255)."""

    def __post_init__(self) -> None:
        _check(self, "epsilon", 0 <= self.epsilon <= 1, "in [0, 1]")
        _check(self, "step_size", self.step_size is None or 0 < self.step_size < inf, "positive and finite")
        _check(self, "num_steps", self.num_steps >= 1, "at least 1")

    @property
    def step(self) -> float:
        """The step in force: `step_size`, or its default in proportion to epsilon (appendix, tables A1 and A2)."""
        return self.step_size if self.step_size is not None else self.epsilon * (5 / 8 if self.num_steps <= 2 else 1 / 4)


@dataclass(frozen=True)
class TrainingConfig:
    """How the parameters are learned."""

    loss: str = "trades"
    """Robust loss: trades or pgd_at; the method `standard` has none and trains on clean images."""
    beta: float = 6.0
    """TRADES: weight of the KL term."""
    epochs: int = 100
    """Passes over the training set, per phase."""
    batch_size: int = 128
    """Images per batch, for each level."""
    lr: float = 0.1
    """Initial learning rate of the weights (cosine decay to 0)."""
    router_lr: float = 0.1
    """The same for the routers (advmoe's lower level)."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """SGD weight decay."""
    tied_share: float = 0.0
    """MoE methods: share of the epochs in which the experts of a layer are kept equal before they part (ours; paper: 0)."""
    router_gate: str = "straight_through"
    """Gate of the routers' update, and of all of at_moe: hard, straight_through, scaled or soft."""
    router_attack_gate: str = "straight_through"
    """Gate that the attack of the routers' update goes through."""
    level_order: Literal["routers_first", "weights_first"] = "routers_first"
    """advmoe: which level of an iteration comes first."""
    balance: Literal["none", "switch", "importance", "entropy"] = "none"
    """Load-balance term in the loss of every update that the routers learn from."""
    balance_weight: float = 0.01
    """Its weight."""
    router_warmup: float = 0.0
    """Share of the phase in which the routers' learning rate rises from 0 to its schedule."""
    init_from: str | None = None
    """at_sparse: folder of an at_dense run to start from instead of a fresh dense network."""
    router_steps: int = 1
    """advmoe: updates of the routers per iteration."""
    weight_steps: int = 1
    """advmoe: updates of the weights per iteration."""
    sync_norm: bool = True
    """Several processes: batch norms and routers take their statistics from the whole batch, not from each one's part."""
    on_nonfinite: Literal["stop", "restore"] = "stop"
    """On a NaN or infinity: stop, or go back to the last good checkpoint with half the routers' rate, at most 3 times."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "router_steps", "weight_steps"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("beta", "lr", "router_lr", "weight_decay", "balance_weight"):
            _check(self, name, 0 <= getattr(self, name) < inf, "at least 0 and finite")
        for name in ("tied_share", "router_warmup"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs; no part of what the run is."""

    device: Device = "auto"
    """Torch device; auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    precision: Precision = "float32"
    """bfloat16 runs the convolutions in bf16 (routers and losses stay float32); auto takes it where it was measured faster
    (CPUs with AVX-512 BF16) and on CUDA from compute capability 8.0 on."""
    dispatch: Literal["auto", "split", "wide", "grouped", "triton"] = "auto"
    """How images meet their experts' filters: all give the same; auto takes what was measured fastest (docs/performance.md)."""
    save_minutes: float = 15.0
    """Checkpoint within an epoch that takes longer, every so many minutes."""
    deterministic: bool = False
    """Only operations that give the same bits each time on one machine; some are slower, and CUDA lacks a few."""

    def __post_init__(self) -> None:
        _check(self, "threads", self.threads >= 0, "at least 0")
        _check(self, "save_minutes", self.save_minutes >= 0, "at least 0")


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run."""

    method: str = "advmoe"
    """Training method: standard, at_dense, at_small_dense, at_sparse, at_moe or advmoe."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and attack noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2**63)")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict, as it stands in YAML and in Records."""
    return {"schema": SCHEMA, **dataclasses.asdict(config)}


def from_dict(tree: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """The inverse of to_dict; missing fields take their defaults.

    Raises UserError, led by `where`, on unknown fields (with the nearest names) and values of the wrong type.
    """
    tree = dict(tree)
    schema = tree.pop("schema", 1)
    if schema not in (1, SCHEMA):
        raise UserError(f"{where}: schema {shown(schema)} is not one this version reads (1 to {SCHEMA})")
    if schema == 1:
        tree = migrations.renamed(tree)
    config: RunConfig = _build(RunConfig, tree, where, "")
    return config


def load_yaml(path: Path) -> RunConfig:
    """The configuration in a YAML file. Raises UserError where it cannot be read."""
    return from_dict(read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[Any, Any]:
    """A YAML file that holds a mapping. Raises UserError where it does not."""
    try:
        text = bounded_text(path, MAX_BYTES)
        tree = yaml.load(text, _Loader)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a value that is not of its tag raises nearly anything
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no mapping of fields")
    return tree


class _Loader(yaml.SafeLoader):
    """Python's plain values only, and no merging of mappings (<<): a few lines of it can mean gigabytes."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leaves << as it is, a tag that nothing is made of."""


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """'section.field: x, not y' for every field in which two runs differ; where they run and lie and what a NaN does is none."""
    place = dataclasses.replace
    a, b = (
        place(
            c,
            runtime=RuntimeConfig(precision=c.runtime.precision),
            data=place(c.data, data_dir=None, workers=None),
            training=place(c.training, on_nonfinite="stop"),
        )
        for c in (a, b)
    )
    flat_a, flat_b = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    return [f"{name}: {value}, not {flat_b[name]}" for name, value in flat_a.items() if value != flat_b[name]]


def _check(config: Any, name: str, right: bool, wanted: str) -> None:
    if not right:
        raise UserError(f"{name} must be {wanted}, not {getattr(config, name)}")


def _build(kind: Any, tree: Any, where: str, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.')} must be a mapping of fields, not {shown(tree)}")
    hints = get_type_hints(kind, include_extras=True)
    for name in tree:
        if name not in hints:
            raise UserError(f"{where}: unknown field {named(name, prefix)!r}: {nearest(named(name), list(hints))}")
    values = {
        name: _build(hints[name], value, where, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _value(hints[name], value, f"{where}: {prefix}{name}")
        for name, value in tree.items()
    }
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {prefix}{error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} must be one of {', '.join(get_args(hint))}, not {shown(value)}")
        return value
    kinds = tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in _members(hint))
    if float in kinds and type(value) in (int, float, str):
        return _number(value, where)
    if type(value) not in kinds:
        names = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"{where} must be {names}, not {shown(value)}")
    if type(value) is int and abs(value) >= LARGEST:
        raise UserError(f"{where} must be less than 2**64 in size, not {shown(value)}")
    return value


def _number(value: float | str, where: str) -> float:
    """A float from a number or from text: '8/255', and '5e-4', which YAML 1.1 takes for text."""
    try:
        return parse_fraction(value) if isinstance(value, str) else float(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None


def shown(value: Any) -> str:
    """A value from a file in at most 80 letters."""
    try:
        text = reprlib.repr(value)  # not repr: a few lines of YAML aliases can mean gigabytes
    except ValueError:  # Python's own limit on the digits that it writes
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(name: Any, prefix: str = "") -> str:
    """A field's name from a file in at most 80 letters."""
    text = prefix + (name if isinstance(name, str) else shown(name))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
