"""The settings of a run: frozen pydantic models. Flags, YAML, JSON Schema and error messages come from these definitions.

Field names are unique across the sections, so that each one is a plain flag on the command line (`--epochs`, `--epsilon`).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from advmoe.config.choices import Activation, Bank, Dispatch, Norms, Routers, Stem
from advmoe.errors import INTEGER_LIMIT, UserError, one_line, short_repr

MAX_EXPERTS = 1000
MAX_THREADS = 1024  # torch crashes with some ten thousand


def parse_fraction(text: str) -> float:
    """'8/255' or '0.031' as a float. Raises ValueError for other text."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{short_repr(text)} is neither a number nor a fraction such as 8/255") from None


def fraction_text(value: float) -> str:
    """'8/255' for a whole number of 255ths, else '0.031'."""
    parts = 255 * value
    return f"{round(parts)}/255" if abs(parts - round(parts)) < 1e-6 else f"{value:g}"


def _as_float(value: Any) -> Any:
    """Numbers and their text as floats: '8/255', and '5e-4', which YAML 1.1 reads as text. Other values are not changed."""
    try:
        return parse_fraction(value) if isinstance(value, str) else float(value) if type(value) is int else value
    except OverflowError as error:
        raise ValueError(str(error)) from None


FROM_TEXT = BeforeValidator(_as_float)
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
Count = Annotated[int, Field(ge=1, lt=INTEGER_LIMIT)]
Index = Annotated[int, Field(ge=0, lt=INTEGER_LIMIT)]
Share = Annotated[float, Field(ge=0, le=1), FROM_TEXT]
Rate = Annotated[float, Field(ge=0), FROM_TEXT]
BelowOne = Annotated[float, Field(ge=0, lt=1), FROM_TEXT]
Precision = Literal["float32", "bfloat16", "auto"]
Compile = Literal["none", "graphs", "inductor"]


class Section(BaseModel):
    """A group of settings. Raises UserError, in one line, for a value that is not allowed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(one_line(error, type(self))) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic validates inner sections without calling it

    def replace(self, **changes: Any) -> Self:
        """A copy with other values for some fields. Raises UserError for a value that is not allowed."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


class ModelConfig(Section):
    """The network. A method without experts ignores the expert fields; a dense one ignores model_scale."""

    backbone: str = "resnet18"
    """Name of the architecture."""
    width: Count | None = None
    """Channels of the dense network's first stage (for a DenseNet: its growth rate); by default the published number."""
    stem: Stem = "cifar"
    """First convolution: 3x3 with stride 1, or 7x7 with stride 2 and max pooling. VGG has one form only."""
    model_scale: Annotated[float, Field(gt=0, le=1), FROM_TEXT] = 0.5
    """r: the share of the dense network's channels that one expert, or the small dense network, has."""
    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 2
    """N: experts in each MoE layer."""
    bank: Bank = "backbone"
    """backbone: an expert is a window of the dense layer's filters, and windows may overlap; disjoint: experts share no filters."""
    routers: Routers = "per_layer"
    """per_layer: a router in every MoE layer; per_stage: one for the layers of each stage, which sees the stage's input;
    per_network: one small CNN that sees the image and chooses for all layers."""
    norms: Norms = "per_expert"
    """Batch norm after an MoE layer: one for all experts, or one for each expert (more robust in short runs with untied
    experts: docs/choices.md)."""
    activation: Activation = "relu"
    """Activation function of the backbone; a router that is a CNN keeps ReLU."""


class DataConfig(Section):
    """The images."""

    dataset: str = "cifar10"
    """Name of the data set."""
    data_dir: str | None = None
    """File or folder of the data set (data that comes with the package needs none)."""
    limit_train: Count | None = None
    """Keep this many training images, balanced over the classes."""
    limit_test: Count | None = None
    """Keep this many test images, balanced over the classes."""
    validation_share: Annotated[float, Field(gt=0, lt=1), FROM_TEXT] = 0.02
    """Share of the training set that is held out, balanced over the classes, to select the best epoch. Data with a validation part
    does not need it."""
    crop_padding: Index = 4
    """Augmentation: random crop after zero padding by this many pixels."""
    flip: bool = True
    """Augmentation: mirror half of the images, chosen at random."""
    augment: Literal["crop_flip", "crop_shift", "idbh_weak"] = "crop_flip"
    """Augmentation of images in memory: crop_flip crops after padding; crop_shift is CropShift (Li and Spratling, ICLR 2023);
    idbh_weak adds one colour or shape operation and erasing to it."""
    augment_from: BelowOne = 0.0
    """Share of the epochs, at the start, that use crop_flip. Then the augmentation of `augment` begins."""
    generated: str | None = None
    """File of generated training images: an .npz, written by numpy.savez, with `image` (uint8, NHWC) and `label`."""
    generated_share: Annotated[float, Field(gt=0, lt=1), FROM_TEXT] = 0.7
    """Share of every training batch that is generated, if there are generated images."""
    image_size: Count | None = None
    """For a folder of images: the shorter side of each image is resized to this many pixels, and the middle is kept. By default
    nothing is resized: all images must be square and of one size."""
    workers: Count | None = None
    """Processes that decode streamed images (ImageNet), for each process of torchrun; by default the machine's CPU cores, divided
    by the processes of torchrun on it."""


class AttackConfig(Section):
    """The L-infinity threat model, and the attack used during training."""

    epsilon: Annotated[Fraction, Field(ge=0, le=1), FROM_TEXT] = 8 / 255
    """Radius of the ball, such as 8/255; pixel values are in [0, 1]."""
    num_steps: Count = 2
    """Steps of the training attack."""
    step_size: Annotated[Fraction, Field(gt=0), FROM_TEXT] | None = None
    """Step size of the training attack; by default 5/8 of epsilon with 1 or 2 steps (5/255 for 8/255), 1/4 with more (2/255)."""
    epsilon_ramp: Share = 0.0
    """Share of the epochs over which the radius of the training attack rises linearly from 0 to epsilon."""
    steps_ramp: Share = 0.0
    """Share of the epochs, at the end, in which the training attack takes at least 5 steps."""

    @property
    def step(self) -> float:
        """The step in use: `step_size`, or its default in proportion to epsilon (appendix, tables A1 and A2)."""
        return self.step_size if self.step_size is not None else self.epsilon * (5 / 8 if self.num_steps <= 2 else 1 / 4)


class TrainingConfig(Section):
    """How the parameters are learned. The names of the loss and of the gates are checked when a run starts."""

    loss: str = "trades"
    """Robust loss: trades or pgd_at; the method `standard` has none and trains on clean images."""
    beta: Rate = 6.0
    """TRADES: weight of the KL term."""
    epochs: Count = 100
    """Passes over the training set, per phase."""
    batch_size: Count = 128
    """Images per batch, for each level."""
    lr: Rate = 0.1
    """Initial learning rate of the weights (cosine decay to 0)."""
    router_lr: Rate = 0.1
    """Initial learning rate of the routers."""
    momentum: BelowOne = 0.9
    """SGD momentum."""
    weight_decay: Rate = 5e-4
    """SGD weight decay."""
    tied_share: Share = 0.0
    """MoE methods: share of the epochs, at the start, in which the experts of a layer are tied: their filters and their norms'
    weights are kept equal (0 in the paper)."""
    tied_statistics: Literal["own", "shared"] = "own"
    """Batch norm of tied experts, with norms per_expert. own: each has the statistics of its images, so their outputs differ;
    shared: all have the statistics of all images, so their outputs are equal."""
    router_gate: str = "straight_through"
    """Gate in the routers' updates, and in all updates of at_moe: hard, straight_through, scaled or soft."""
    router_attack_gate: str = "straight_through"
    """Gate in the attack of the routers' updates, and of all updates of at_moe."""
    level_order: Literal["routers_first", "weights_first"] = "routers_first"
    """advmoe: which level is updated first in an iteration."""
    balance: Literal["none", "switch", "importance", "entropy"] = "none"
    """Load-balance term in the loss of every update that changes routers."""
    balance_weight: Rate = 0.01
    """Weight of the load-balance term."""
    router_warmup: Share = 0.0
    """Share of the routers' schedule, at its start, in which the learning rate is multiplied by a factor that rises from 0 to 1."""
    router_schedule: Literal["phase", "untied"] = "phase"
    """Cosine and warm-up of the routers' learning rate. phase: over the whole phase, so that little is left after tied_share;
    untied: over the part after it."""
    router_statistics: Literal["augmented", "plain"] = "augmented"
    """What the routers' statistics are after an epoch: those of the augmented training images, or means over plain ones."""
    init_from: str | None = None
    """at_sparse: folder of an at_dense run to start from instead of a fresh dense network."""
    router_steps: Count = 1
    """advmoe: updates of the routers per iteration."""
    weight_steps: Count = 1
    """advmoe: updates of the weights per iteration."""
    ema: BelowOne = 0.0
    """Decay of an exponential moving average of all weights, which is evaluated and exported in their place; 0: no average."""
    label_smoothing: BelowOne = 0.0
    """Share of each label that is spread evenly over the classes, in the cross-entropy."""
    soft_labels: Literal["none", "adr"] = "none"
    """adr: labels are mixed with the moving average's predictions (ADR); needs ema."""
    teacher: str | None = None
    """Folder of a run, or file of advmoe.save_file. In trades, its probabilities replace the labels and the network's clean
    prediction (RSLAD)."""
    awp: Rate = 0.0
    """Adversarial weight perturbation: its size relative to each weight tensor's norm (0.005 in the paper of AWP); 0: none."""
    awp_from: BelowOne = 0.0
    """Share of the epochs, at the start, without adversarial weight perturbation."""
    awp_routers: bool = False
    """Adversarial weight perturbation of the routers' weights too, in the updates that change routers."""
    level_batches: Literal["different", "same"] = "different"
    """advmoe: whether the two levels of an iteration see different batches or the same one."""
    weight_attack_gate: Literal["hard", "straight_through", "alternate"] = "hard"
    """advmoe: gate in the attack of the weights' updates; alternate: the two others in turn."""
    router_every: Count = 1
    """advmoe: the routers are updated once in this many iterations."""
    router_loss: Literal["task", "target"] = "task"
    """advmoe: routers learn from the network's loss and the router terms below (task), or from these terms alone (target)."""
    router_target: Literal["none", "label_mod_n", "confusion"] = "none"
    """Adds the cross-entropy of the routers' logits against a group of classes: label_mod_n is the label modulo the number of
    experts; confusion puts classes together that are confused under attack in the first tenth of the epochs."""
    router_target_weight: Rate = 1.0
    """Weight of the router target."""
    router_consistency: Rate = 0.0
    """Weight of KL(router(x) || router(x')), summed over the layers; x' is the attacked image."""
    router_margin: Rate = 0.0
    """Weight of a hinge on the gap between the two largest router logits on x', summed over the layers."""
    runner_up_consistency: Rate = 0.0
    """Weight of the KL term between the logits on x' with the chosen expert and with the second choice in one random layer."""
    sync_norm: bool = True
    """With several processes: batch norms and routers compute statistics over the whole batch, not over each process's part."""
    on_nonfinite: Literal["stop", "restore"] = "stop"
    """On a NaN or infinity: stop, or go back to the last good checkpoint and halve the routers' learning rate (every rate while no
    router learns), at most 3 times."""


OF_LEVELS = (  # the training settings of methods that train the routers in a separate level (advmoe)
    "level_order", "level_batches", "weight_attack_gate", "router_steps", "weight_steps", "router_every", "router_loss",
)  # fmt: skip


class ComputeConfig(Section):
    """Where and how networks are computed."""

    device: str = "auto"
    """Torch device; auto uses CUDA if there is a CUDA device."""
    threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    """CPU threads; 0 keeps torch's choice."""
    precision: Precision = "float32"
    """bfloat16 runs the convolutions and the classifier in bf16 (losses and the routers' linear layers stay float32). auto uses it
    on CPUs with AVX-512 BF16, and on CUDA devices of compute capability 8.0 or higher. In an evaluation only the attacks' gradients
    use it: images are judged in float32."""
    dispatch: Dispatch = "auto"
    """How each image is convolved with the filters of its expert. All ways give the same values up to rounding; auto
    follows a rule that was measured on a CPU, and a training on CUDA times them at its start (docs/performance.md)."""
    deterministic: bool = False
    """Use only operations that give the same bits each time on one machine; some are slower, and CUDA lacks a few."""


class RuntimeConfig(ComputeConfig):
    """Where and how a run is trained. A run can be resumed with other values, except of `--precision`."""

    compile: Compile = "none"
    """Compile the forward and backward passes of training at the start: graphs records CUDA graphs (CUDA only); inductor uses
    torch.compile, which takes minutes, and needs a C++ compiler on the CPU. Rounding differs."""
    save_minutes: Rate = 15.0
    """Minutes of training after which a checkpoint is saved within an epoch."""


class RunConfig(Section):
    """Everything that defines a run."""

    method: str = "advmoe"
    """Training method: standard, at_dense, at_small_dense, at_sparse, at_moe or advmoe."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialisation, data order, augmentation and attack noise."""
    model: ModelConfig = Field(default_factory=ModelConfig, strict=False)
    data: DataConfig = Field(default_factory=DataConfig, strict=False)
    attack: AttackConfig = Field(default_factory=AttackConfig, strict=False)
    training: TrainingConfig = Field(default_factory=TrainingConfig, strict=False)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, strict=False)
