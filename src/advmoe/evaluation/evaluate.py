"""What a network really withstands: `evaluate`, for this project's networks and for any other."""

import hashlib
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks import Norm, frozen
from advmoe.errors import UserError, lookup
from advmoe.evaluation.checks import Check, check_figures, check_network
from advmoe.evaluation.search import LowPrecision
from advmoe.evaluation.shards import SHARD_SIZE, Bench, Shard, Store, Told, Worker, split, true_network
from advmoe.evaluation.suite import PRESETS, Preset, plan

SCHEMA = 1


@dataclass(frozen=True)
class Evaluation:
    """All figures in percent of all pictures; `worst` counts a picture as robust only if nothing that was run broke it.

    `complete`: AutoAttack was run and, on a network that routes, attacks on the routing; else `worst` is "quick".
    """

    pictures: int
    sa: float
    figures: dict[str, float]
    worst: float
    complete: bool
    attacks: dict[str, dict[str, Any]]  # name -> attacked, broken, seconds
    routing: dict[str, Any] | None
    checks: list[Check]
    correct: list[int]
    broken: dict[str, list[int]]  # attack -> rows of the pictures it broke

    def interval(self, percent: float) -> tuple[float, float]:
        """95 % Wilson interval of a share of the pictures, in percent."""
        return wilson(percent / 100, self.pictures)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `flags` has a 1 for each picture that stood everything."""
        gone = {row for rows in self.broken.values() for row in rows}
        named = {"sa": self.sa, **self.figures, "ra_worst": self.worst}
        return {
            "pictures": self.pictures, **named, "complete": self.complete,
            "intervals": {name: self.interval(value) for name, value in named.items()},
            "attacks": self.attacks, "routing": self.routing, "checks": [check.__dict__ for check in self.checks],
            "flags": "".join("1" if row in set(self.correct) - gone else "0" for row in range(self.pictures)),
            "broken": self.broken,
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
    """Attack `model` on pictures x [n, C, H, W] in [0, 1] with labels y [n].

    `model` maps pixels to logits; one that also offers `forward_routed` (see `advmoe.attacks.surrogate.Routed`) is
    attacked on its routing too. `preset` names one of PRESETS or lists attacks. With `store`, results are kept there
    after every attack on a shard, and what is there already is not run again; `part` (i, k) runs only every k-th shard
    from i on. `transfer` is a network to transfer attacks from. bf16 may search; only float32 counts.

    Raises UserError on pixels outside [0, 1], labels out of range, a network that returns NaN, or a store that holds
    results of another network, data, threat or seed.
    """
    chosen = lookup(PRESETS, preset, "preset") if isinstance(preset, str) else plan(preset)
    if model.training:
        warnings.warn("the model is in train mode: evaluated in eval mode, then restored", stacklevel=2)
    with frozen(model), true_network(model):
        bench = _bench(model, x, y, epsilon, norm, seed, transfer, bf16_search)
        folder = Store(store, {**_key(bench), "shard_size": shard_size})
        keep = store / "adversarial" if store is not None and save_adversarial else None
        shards = []
        for number, rows in enumerate(split(len(x), shard_size)):
            shard = folder.load(number, rows)
            if number % part[1] == part[0]:
                Worker(bench, shard, number, folder.saver(number), told, keep).run(chosen)
            shards.append(shard)
        shards = [shard for shard in shards if shard.correct is not None]
        return _summary(bench, chosen, shards, folder if part[1] == 1 else None)


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


def _bench(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: Norm, seed: int, transfer: nn.Module | None, bf16: bool
) -> Bench:
    if norm not in ("Linf", "L2"):
        raise UserError(f"norm must be Linf or L2, not {norm}")
    if len(x) == 0 or len(x) != len(y):
        raise UserError(f"{len(x)} pictures and {len(y)} labels")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise UserError(f"pixels must be in [0, 1], not [{low:g}, {high:g}]: normalisation belongs inside the network")
    with torch.no_grad():
        logits = model(x[:1])
    classes = logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"labels must be 0 to {classes - 1} for {classes} logits, not {int(y.min())} to {int(y.max())}")
    routed = _routes(model, x[:1])
    bench = Bench(
        model, LowPrecision(model) if bf16 else model, x, y, classes, routed, epsilon, norm, seed, transfer,
    )  # fmt: skip
    _finite(bench)
    return bench


@torch.no_grad()
def _routes(model: Any, x: Tensor) -> bool:
    return hasattr(model, "forward_routed") and len(model.forward_routed(x)[1]) > 0


@torch.no_grad()
def _finite(bench: Bench) -> None:
    for start in range(0, len(bench.x), 256):
        bad = ~torch.isfinite(bench.model(bench.x[start : start + 256])).all(dim=1)
        if bad.any():
            raise UserError(f"the network returns NaN or infinity for picture {start + int(bad.int().argmax())}")


def _key(bench: Bench) -> dict[str, Any]:
    """What a stored result depends on; file names carry the rest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(bench.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    data = hashlib.sha256(bench.x.cpu().contiguous().numpy().tobytes() + bench.y.cpu().numpy().tobytes())
    low = bench.search is not bench.model
    return {
        "schema": SCHEMA, "network": digest.hexdigest(), "data": data.hexdigest(), "epsilon": bench.epsilon,
        "norm": bench.norm, "seed": bench.seed, "search": "bfloat16" if low else "float32",
    }  # fmt: skip


def _summary(bench: Bench, preset: Preset, shards: list[Shard], store: Store | None) -> Evaluation:
    """All figures; the checks only with a `store` to keep them, that is, not for a part of the shards."""
    total = sum(len(shard.rows) for shard in shards)
    correct = [row for shard in shards for row in shard.correct or []]
    names = [name for names in (*preset.figures.values(), preset.survivors) for name in names]
    broken = {name: sorted(row for shard in shards for row in shard.broken([name])) for name in names if _was_run(shards, name)}

    def left(attacks: Sequence[str]) -> float:
        gone = {row for name in attacks for row in broken.get(name, [])}
        return 100 * (len(correct) - len(gone)) / max(total, 1)

    figures = {figure: left(members) for figure, members in preset.figures.items()}
    worst, routing = left(list(broken)), _routing_summary(shards)
    routed_too = not bench.routed or any(name.startswith("reroute") for name in broken)
    complete = any(name.startswith("aa_") for name in broken) and routed_too
    checks = []
    if store is not None:
        checks = check_network(bench, preset.checks, store) + check_figures(bench, shards, figures, worst, routing)
    attacks = {name: _totals(shards, name) for name in broken}
    ordered = sorted(checks, key=lambda check: check.number)
    return Evaluation(total, left([]), figures, worst, complete, attacks, routing, ordered, correct, broken)


def _was_run(shards: Sequence[Shard], name: str) -> bool:
    return any(name in shard.attacks for shard in shards)


def _totals(shards: Sequence[Shard], name: str) -> dict[str, Any]:
    runs = [shard.attacks[name] for shard in shards if name in shard.attacks]
    broken = sum(len(run["broken"]) for run in runs)
    return {"attacked": sum(run["attacked"] for run in runs), "broken": broken, "seconds": sum(run["seconds"] for run in runs)}


def _routing_summary(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Shares over all pictures, in percent; `overlap`, `load` and `load_adv` per layer."""
    counts: list[Mapping[str, Any]] = [shard.routing for shard in shards if shard.routing is not None]
    if not counts:
        return None
    pictures, correct = (sum(count[name] for count in counts) for name in ("pictures", "correct"))

    def added(name: str) -> list[Any]:
        return torch.tensor([count[name] for count in counts]).sum(dim=0).tolist()

    return {
        "ra_router": 100 * sum(count["router"] for count in counts) / pictures,
        "ra_expert": 100 * sum(count["expert"] for count in counts) / pictures,
        "flip_rate": 100 * sum(count["flipped"] for count in counts) / max(correct, 1),
        "overlap": [100 * value / max(correct, 1) for value in added("overlap")],
        "load": added("load"),
        "load_adv": added("load_adv"),
        "fixed_expert_sa": [100 * value / pictures for value in added("fixed")],
        "fixed_expert_ra": [100 * value / pictures for value in added("fixed_robust")],
    }
