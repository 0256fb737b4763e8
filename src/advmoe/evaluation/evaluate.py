"""What a network really withstands: `evaluate`, for this project's networks and for any other."""

import hashlib
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks import Norm, frozen
from advmoe.errors import UserError, lookup
from advmoe.evaluation.checks import Check, check_figures, check_network
from advmoe.evaluation.search import LowPrecision
from advmoe.evaluation.shards import SHARD_SIZE, Bench, Shard, Store, Told, Worker, obstacle, split, true_network
from advmoe.evaluation.suite import AUTOATTACK, PRESETS, Preset, autoattack, plan
from advmoe.models import fused
from advmoe.moe import RoutedNetwork

SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """All figures in percent of all images; `worst` counts an image as robust only if nothing that was run broke it.

    `complete`: AutoAttack was run and, on a network that routes, attacks on the routing; else `worst` is "quick".
    """

    sa: float
    figures: dict[str, float]
    worst: float
    complete: bool
    attacks: dict[str, dict[str, Any]]  # name -> attacked, broken, seconds
    routing: dict[str, Any] | None
    checks: list[Check]
    rows: list[int]  # numbers of the images in x: all, or those of a part
    correct: list[int]
    broken: dict[str, list[int]]  # attack -> rows of the images it broke
    left_out: dict[str, str]  # attack of the preset that was not run -> why
    ever: list[int] = field(default_factory=list)  # rows that an earlier plan's attacks in the same store broke too

    @property
    def images(self) -> int:
        """How many were evaluated."""
        return len(self.rows)

    def interval(self, percent: float) -> tuple[float, float]:
        """95 % Wilson interval of a share of the images, in percent."""
        return wilson(percent / 100, self.images)

    def routed_figures(self) -> dict[str, float]:
        """RA-router, RA-expert and the fixed experts' accuracies, where PGD-50 was run on a network that routes."""
        if self.routing is None:
            return {}
        fixed = {f"{kind}_{e}": v for kind in ("fixed_expert_sa", "fixed_expert_ra") for e, v in enumerate(self.routing[kind])}
        return {"ra_router": self.routing["ra_router"], "ra_expert": self.routing["ra_expert"], **fixed}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, worst case first; `flags` has a 1 for each image that stood everything."""
        standing = set(self.correct) - {row for rows in (self.ever, *self.broken.values()) for row in rows}
        named = {"ra_worst" if self.complete else "ra_worst_quick": self.worst, "sa": self.sa, **self.figures}
        return {
            "images": self.images, **named, "complete": self.complete,
            "intervals": {name: self.interval(value) for name, value in {**named, **self.routed_figures()}.items()},
            "attacks": self.attacks, "left_out": self.left_out, "routing": self.routing,
            "checks": [check.__dict__ for check in self.checks],
            "flags": "".join("1" if row in standing else "0" for row in self.rows), "broken": self.broken,
        }  # fmt: skip


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: Norm = "Linf",
    preset: str | Sequence[str] = "standard",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    store: Path | None = None,
    part: tuple[int, int] = (0, 1),
    transfer: nn.Module | None = None,
    bf16_search: bool = False,
    save_adversarial: bool = False,
    told: Told = lambda attack, number, shard: None,
) -> Evaluation:
    """Attack `model` on images x [n, C, H, W] in [0, 1] with labels y [n].

    `model` maps pixels to logits; one that also offers `forward_routed` (see `advmoe.attacks.surrogate.Routed`) is
    attacked on its routing too. `preset` names one of PRESETS or lists attacks. With `store`, results are kept there
    after every attack on a shard, and what is there already is not run again; `part` (i, k) runs only every k-th shard
    from i on, and the figures are of these shards' images, without checks. `transfer` is a network to transfer attacks
    from. bf16 may search; only float32 counts.

    Raises UserError on pixels outside [0, 1], labels out of range, a network that returns NaN, a preset of which nothing
    can be run, or a store that holds results of another network, data, threat or seed.
    """
    chosen = resolve(preset)
    _check_options(epsilon, norm, seed, shard_size, part)
    _check_images(x, y)
    if model.training:
        warnings.warn("the model is in train mode: evaluated in eval mode, then restored", stacklevel=2)
    with frozen(model), frozen(nn.Identity() if transfer is None else transfer), true_network(model):
        bench = _bench(model, x.detach(), y, epsilon, norm, seed, transfer, bf16_search)
        _check_plan(bench, chosen)
        folder = Store(store, {**_key(bench), "shard_size": shard_size})
        keep = store / "adversarial" if store is not None and save_adversarial else None
        shards = []
        for number, rows in list(enumerate(split(len(x), shard_size)))[part[0] :: part[1]]:
            shards.append(folder.load(number, rows))
            Worker(bench, shards[-1], number, folder.saver(number), told, keep).run(chosen)
        return _summary(bench, chosen, shards, folder if part[1] == 1 else None)


def resolve(preset: str | Sequence[str]) -> Preset:
    """The preset of that name, or one made of listed attacks. Raises UserError on unknown names or a missing extra."""
    chosen = lookup(PRESETS, preset, "preset") if isinstance(preset, str) else plan(preset)
    if any(name.startswith("aa") for name in chosen.attacks):
        autoattack()
    return chosen


def fresh(store: Path) -> None:
    """Forget what a store holds."""
    shutil.rmtree(store, ignore_errors=True)


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a binomial share (Wilson 1927), in percent."""
    if count == 0:
        return 0.0, 100.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def _check_options(epsilon: float, norm: str, seed: int, shard_size: int, part: tuple[int, int]) -> None:
    if norm not in get_args(Norm):
        raise UserError(f"norm must be {' or '.join(get_args(Norm))}, not {norm}")
    if not 0 <= epsilon < math.inf:
        raise UserError(f"epsilon must be at least 0 and finite, not {epsilon:g}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be in [0, 2**63), not {seed}")
    if shard_size < 1:
        raise UserError(f"shard_size must be at least 1, not {shard_size}")
    if not 0 <= part[0] < part[1]:
        raise UserError(f"part must be (i, k) with 0 <= i < k, not {tuple(part)}")


def _check_images(x: Tensor, y: Tensor) -> None:
    if len(x) == 0 or len(x) != len(y):
        raise UserError(f"{len(x)} images and {len(y)} labels")
    if x.ndim != 4 or y.ndim != 1:
        raise UserError(f"images must be [n, C, H, W] and labels [n], not {list(x.shape)} and {list(y.shape)}")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise UserError(f"pixels must be in [0, 1], not [{low:g}, {high:g}]: normalisation belongs inside the network")
    if x.dtype != torch.float32 or y.dtype != torch.int64:
        raise UserError(f"images must be float32 and labels int64, not {x.dtype} and {y.dtype}")


def _check_plan(bench: Bench, preset: Preset) -> None:
    reasons = [obstacle(bench, name) for name in preset.attacks]
    if all(reasons):
        raise UserError(f"nothing can be run of {', '.join(preset.attacks)}: {'; '.join(dict.fromkeys(reasons))}")


def _bench(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: Norm, seed: int, transfer: nn.Module | None, bf16: bool
) -> Bench:
    with torch.enable_grad():
        logits = model(x[:1].detach().requires_grad_(True))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError("the network must give logits [n, classes] for images [n, C, H, W]")
    if not logits.requires_grad:
        raise UserError("the network's logits have no gradient with respect to the pixels: attacks would see nothing")
    classes = logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"labels must be 0 to {classes - 1} for {classes} logits, not {int(y.min())} to {int(y.max())}")
    routed = _routes(model, x[:1])
    return Bench(
        model, _search(model, bf16), x, y, classes, routed, epsilon, norm, seed, transfer,
        None if transfer is None else _digest(transfer),
    )  # fmt: skip


def _search(model: nn.Module, bf16: bool) -> nn.Module:
    """The network that attacks climb: `model` itself, or the same in less time."""
    faster = fused(model) if isinstance(model, RoutedNetwork) else model
    return LowPrecision(faster) if bf16 else faster


@torch.no_grad()
def _routes(model: Any, x: Tensor) -> bool:
    return hasattr(model, "forward_routed") and len(model.forward_routed(x)[1]) > 0


def _digest(model: nn.Module) -> str:
    """SHA-256 over names and bytes of parameters and buffers, of any type."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _answers(bench: Bench) -> str:
    """What the network says of the images, as a digest: equal weights do not make equal networks.

    Raises UserError where it says nothing finite.
    """
    logits = torch.cat([bench.model(part) for part in bench.x.split(256)])
    bad = ~torch.isfinite(logits).all(dim=1)
    if bad.any():
        raise UserError(f"the network returns NaN or infinity for image {int(bad.int().argmax())}")
    return hashlib.sha256(logits.argmax(dim=1).cpu().numpy().tobytes()).hexdigest()


def _key(bench: Bench) -> dict[str, Any]:
    """What a stored result depends on; file names carry the rest."""
    data = hashlib.sha256(bench.x.cpu().contiguous().numpy().tobytes() + bench.y.cpu().numpy().tobytes())
    low = isinstance(bench.search, LowPrecision)
    return {
        "schema": SCHEMA, "network": f"{type(bench.model).__qualname__} {_digest(bench.model)}", "data": data.hexdigest(),
        "answers": _answers(bench), "epsilon": bench.epsilon, "norm": bench.norm, "seed": bench.seed,
        "search": "bfloat16" if low else "float32",
    }  # fmt: skip


def _summary(bench: Bench, preset: Preset, shards: list[Shard], store: Store | None) -> Evaluation:
    """All figures; the checks only with a `store` to keep them, that is, not for a part of the shards."""
    rows = [row for shard in shards for row in shard.rows]
    correct = [row for shard in shards for row in shard.correct or []]
    left_out = {name: reason for name in preset.attacks if (reason := obstacle(bench, name))}
    names = [name for name in preset.attacks if name not in left_out]
    broken = {name: sorted(row for shard in shards for row in shard.broken([name])) for name in names}

    def left(attacks: Sequence[str]) -> float:
        gone = {row for name in attacks for row in broken.get(name, [])}
        return 100 * (len(correct) - len(gone)) / max(len(rows), 1)

    figures = {figure: left(members) for figure, members in preset.figures.items() if not left_out.keys() & set(members)}
    ever = {row for shard in shards for row in shard.ever}
    worst, routing = 100 * (len(correct) - len(ever)) / max(len(rows), 1), _routing_summary(shards)
    ran = set.intersection(*(set(shard.attacks) for shard in shards)) if shards else set()
    routed_too = not bench.routed or bool(ran & {"reroute", "reroute_full"})
    complete = set(AUTOATTACK) <= ran and routed_too
    checks = []
    if store is not None:
        checks = check_network(bench, preset.checks, store) + check_figures(bench, shards, figures, worst, routing)
    attacks = {name: _totals(shards, name) for name in broken}
    ordered = sorted(checks, key=lambda check: check.number)
    return Evaluation(left([]), figures, worst, complete, attacks, routing, ordered, rows, correct, broken, left_out, sorted(ever))


def _totals(shards: Sequence[Shard], name: str) -> dict[str, Any]:
    runs = [shard.attacks[name] for shard in shards]
    attacked, broken = (sum(len(run[kind]) for run in runs) for kind in ("rows", "broken"))
    return {"attacked": attacked, "broken": broken, "seconds": sum(run["seconds"] for run in runs)}


def _routing_summary(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Shares over all images, in percent; `overlap`, `load` and `load_adv` per layer."""
    counts: list[Mapping[str, Any]] = [shard.routing for shard in shards if shard.routing is not None]
    if not counts:
        return None
    images, correct = (sum(count[name] for count in counts) for name in ("images", "correct"))

    def added(name: str) -> list[Any]:
        return [sum(values) for values in zip(*(count[name] for count in counts), strict=True)]

    def added_per_layer(name: str) -> list[list[int]]:
        layers = zip(*(count[name] for count in counts), strict=True)
        return [[sum(values) for values in zip(*layer, strict=True)] for layer in layers]

    return {
        "ra_router": 100 * sum(count["router"] for count in counts) / images,
        "ra_expert": 100 * sum(count["expert"] for count in counts) / images,
        "flip_rate": 100 * sum(count["flipped"] for count in counts) / max(correct, 1),
        "overlap": [100 * value / max(correct, 1) for value in added("overlap")],
        "load": added_per_layer("load"),
        "load_adv": added_per_layer("load_adv"),
        "fixed_expert_sa": [100 * value / images for value in added("fixed")],
        "fixed_expert_ra": [100 * value / images for value in added("fixed_robust")],
    }
