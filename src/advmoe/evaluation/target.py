"""The target of an evaluation, and the options of the evaluation."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks import ImageDraws, Norm
from advmoe.attacks.job import Job, Setting
from advmoe.attacks.pathways import num_pathways
from advmoe.attacks.pgd import forward_backward
from advmoe.config.choices import BATCH_SIZE, PATHWAY_BUDGET, SHARD_SIZE
from advmoe.errors import UserError, check_count, reason_of
from advmoe.evaluation.store import Shard, StoreKey
from advmoe.evaluation.wrappers import CopiedInput, LowPrecision, copying, gradient_network
from advmoe.models.routed import RoutedConv2d
from advmoe.moe import MoEConv2d, RoutedNetwork, check_routings
from advmoe.moe.convert.prepare import unwrapped

SCHEMA = 2  # of stored results; raise it if the key changes, or what counts as broken (`advmoe.evaluation.shards`)
ANSWERS = 32  # images of `_answers`
NOISE = 8 / 255  # largest change of a pixel there
logger = logging.getLogger("advmoe")
OnAttack = Callable[[str, int, Shard], None]  # called after an attack: its name, the shard's number, the shard so far


def ignore(attack: str, number: int, shard: Shard) -> None:
    """A progress function that does nothing."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `advmoe.evaluation.evaluate`. Raises UserError on values outside their range."""

    epsilon: float
    norm: Norm = "Linf"
    preset: str | Sequence[str] = "standard"
    seed: int = 0
    shard_size: int = SHARD_SIZE
    store: Path | None = None
    part: tuple[int, int] = (0, 1)
    transfer: nn.Module | None = None
    bf16_search: bool = False
    save_adversarial: bool = False
    progress: OnAttack = ignore
    batch_size: int = BATCH_SIZE
    pathway_budget: int = PATHWAY_BUDGET
    quiet: bool = False  # leave out the warnings before the attacks: another call for the same evaluation gives them

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UserError(f"norm must be {' or '.join(get_args(Norm))}, not {self.norm}")
        if not isinstance(self.epsilon, Real):
            raise UserError(f"epsilon must be a number, not {self.epsilon!r}")
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"epsilon must be at least 0 and finite, not {self.epsilon:g}")
        if self.norm == "Linf" and self.epsilon > 1:
            raise UserError(f"epsilon must be at most 1 in Linf, not {self.epsilon:g}: pixels are in [0, 1]; 8 of 255 is 8/255")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), not {self.seed}")
        for name in ("shard_size", "batch_size"):
            check_count(name, getattr(self, name))
        if self.pathway_budget < 0:
            raise UserError(f"pathway_budget must be at least 0, not {self.pathway_budget}")
        if not 0 <= self.part[0] < self.part[1]:
            raise UserError(f"part must be (i, k) with 0 <= i < k, not {tuple(self.part)}")


@dataclass(frozen=True)
class Target:
    """The frozen network under attack, the images x [n, C, H, W] in [0, 1] with labels y [n], and the threat model.

    Attacks take gradients from `search`, which may be a faster copy of `model`. Only `model` decides which images fool it.
    `transfer` is a network to transfer attacks from. `hides_routing`: the network has no `forward_routed`, but contains
    MoE layers or a network that has it. At most `batch_size` images go through a network at once. `pathway_budget` is the number of
    pathways up to which all are attacked.
    """

    model: Any
    search: Any
    x: Tensor
    y: Tensor
    num_classes: int
    routed: bool
    epsilon: float
    norm: Norm
    seed: int
    transfer: Any = None
    transfer_digest: str | None = None
    num_pathways: int = 1
    hides_routing: bool = False
    batch_size: int = BATCH_SIZE
    pathway_budget: int = PATHWAY_BUDGET

    @property
    def setting(self) -> Setting:
        """What decides which attacks can run."""
        channels, height, width = self.x.shape[1:]
        return Setting(
            self.norm, self.num_classes, (channels, height, width), self.routed, self.transfer is not None, self.pathway_budget
        )  # fmt: skip

    def in_batches(self, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`run` on at most `batch_size` images of the tensors [B, ...] at once. Its results are joined."""
        return torch.cat([run(*parts) for parts in zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)])

    def job(self, rows: Sequence[int], shard: int) -> Job:
        """The job for an attack on the images `rows` of shard number `shard`."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.x.device)  # rows may be empty
        return Job(
            self.search, self.x[index], self.y[index], rows, self.epsilon, self.norm, self.seed, shard, self.num_classes,
            self.transfer, self.pathway_budget, self.batch_size,
        )  # fmt: skip


def make_target(network: nn.Module, x: Tensor, y: Tensor, options: EvaluationOptions) -> Target:
    """The Target of a frozen network and its test images x [n, C, H, W] in [0, 1] with labels y [n] int64.

    Raises UserError if images, labels or logits have wrong shapes, dtypes or values.
    """
    _check_images(x, y)
    x, y = x.detach().contiguous(), y.detach().to(x.device).contiguous()
    model: Any = copying(network, x[:1])
    classes = _num_classes(model, x[:1], "the network")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"labels must be 0 to {classes - 1} for {classes} logits, not {int(y.min())} to {int(y.max())}")
    if hasattr(model, "forward_routed"):
        check_routings(model, x[:1])
    routed = _routes(model, x[:1])
    hidden = not routed and any(_can_route(module) for module in network.modules() if module is not network)
    transfer = None if options.transfer is None else _transfer(options.transfer, x[:1], classes)
    return Target(
        model=model, search=gradient_network(model, bf16=options.bf16_search), x=x, y=y, num_classes=classes, routed=routed,
        epsilon=options.epsilon, norm=options.norm, seed=options.seed, transfer=transfer,
        transfer_digest=None if options.transfer is None else _digest(options.transfer),
        num_pathways=num_pathways(model, x) if routed else 1, hides_routing=hidden, batch_size=options.batch_size,
        pathway_budget=options.pathway_budget,
    )  # fmt: skip


def _num_classes(model: Any, x: Tensor, name: str) -> int:
    """The number of logits for an image of x [1, C, H, W]. Raises UserError, which names the network `name`, if it gives no logits
    of two classes or more, or logits without a gradient."""
    try:
        with torch.enable_grad():
            logits = model(x.clone().requires_grad_(True))
    except (RuntimeError, ValueError) as error:
        shape = " x ".join(map(str, x.shape[1:]))
        raise UserError(f"{name} does not take images of {shape}: {reason_of(error)}") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(f"{name} must give logits [n, classes] for images [n, C, H, W]")
    if not logits.requires_grad:
        raise UserError(f"the logits of {name} have no gradient with respect to the pixels, which attacks need")
    classes = logits.shape[1]
    if classes < 2:
        raise UserError(f"{name} gives {classes} logit for an image: it needs one for each of 2 classes or more")
    return classes


def _transfer(network: nn.Module, x: Tensor, classes: int) -> nn.Module:
    """The network to transfer attacks from. Raises UserError if it has another number of classes than the attacked one."""
    model, name = copying(network, x), "the network to transfer from"
    if (number := _num_classes(model, x, name)) != classes:
        raise UserError(
            f"{name} gives {number} logits for an image, and the attacked network {classes}: both need the same classes"
        )
    return model


def routed_inside(model: nn.Module) -> nn.Module:
    """The network inside wrappers of PyTorch that compute the same and hide its routing, if it routes; else `model`."""
    inner = unwrapped(model)
    return inner if hasattr(inner, "forward_routed") else model


def store_key(target: Target, shard_size: int) -> StoreKey:
    """The key of stored results of the target. Raises UserError if logits are not finite."""
    data = hashlib.sha256(target.x.cpu().numpy().data)
    data.update(target.y.cpu().numpy().data)
    low = isinstance(target.search, LowPrecision)
    model = target.model.model if isinstance(target.model, CopiedInput) else target.model
    return StoreKey(
        schema=SCHEMA, network=f"{type(model).__qualname__} {_digest(model)}", data=data.hexdigest(),
        predictions=_prediction_digest(target), answers=_answers(target), epsilon=target.epsilon, norm=target.norm,
        seed=target.seed, search="bfloat16" if low else "float32", shard_size=shard_size,
    )  # fmt: skip


def _check_images(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise UserError(f"images and labels must be tensors, not {type(x).__name__} and {type(y).__name__}")
    if len(x) == 0 or len(x) != len(y):
        raise UserError(f"{len(x)} images and {len(y)} labels")
    if x.ndim != 4 or y.ndim != 1:
        raise UserError(f"images must be [n, C, H, W] and labels [n], not {list(x.shape)} and {list(y.shape)}")
    if x.dtype != torch.float32 or y.dtype != torch.int64:
        raise UserError(f"images must be float32 and labels int64, not {x.dtype} and {y.dtype}")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise UserError(f"pixels must be in [0, 1], not [{low:g}, {high:g}]: normalisation belongs inside the network")


def _can_route(module: nn.Module) -> bool:
    """Whether a part of a network is an MoE layer, or a network of another package that implements routing.

    Networks of this package and what contains them have `forward_routed` even if they are dense; only their layers count.
    """
    if isinstance(module, MoEConv2d | RoutedConv2d):
        return True
    contains = any(hasattr(part, "forward_routed") for part in module.modules() if part is not module)
    return hasattr(module, "forward_routed") and not isinstance(module, RoutedNetwork) and not contains


@torch.no_grad()
def _routes(model: Any, x: Tensor) -> bool:
    return hasattr(model, "forward_routed") and len(model.forward_routed(x)[1]) > 0


def _digest(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of parameters and buffers, of any dtype. Other state of a module is left out."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _prediction_digest(target: Target) -> str:
    """SHA-256 of the predicted classes. Networks with equal weights can still predict different classes."""
    logits = target.in_batches(target.model, target.x)
    bad = ~torch.isfinite(logits).all(dim=1)
    if bad.any():
        raise UserError(f"the network returns NaN or infinity for image {int(bad.int().argmax())}")
    return hashlib.sha256(logits.argmax(dim=1).cpu().numpy().tobytes()).hexdigest()


def _answers(target: Target) -> list[list[float]]:
    """What the network computes near some images: logits at the image with noise, and how far its gradient would move a weighted
    sum of them. Networks with equal weights and predictions can still differ there, as one that rounds its input does.

    The numbers are far above rounding errors, for `advmoe.evaluation.store` to compare them with a tolerance.
    """
    count = min(ANSWERS, len(target.x))
    rows = torch.arange(count) * len(target.x) // count
    x = target.x[rows.to(target.x.device)]
    noisy = (x + NOISE * ImageDraws(0, rows.tolist()).uniform(x)).clamp(0, 1)
    factors = torch.linspace(-1, 1, target.num_classes, device=x.device)

    def answers(x: Tensor, noisy: Tensor) -> Tensor:
        logits, _, gradient = forward_backward(target.model, noisy, factors, lambda logits, factors: (logits * factors).sum(dim=1))
        rise = gradient.flatten(1).norm(dim=1) * (noisy - x).flatten(1).norm(dim=1)
        return torch.cat([logits, rise[:, None]], dim=1).nan_to_num()

    return [[float(f"{value:.5g}") for value in row] for row in target.in_batches(answers, x, noisy).tolist()]
