"""The resumable runner: images in shards, attacks one after another, a file after each.

A shard's result depends on its images, the network, the plan and the seed alone, so shards may be worked off in any
order, by any number of processes, with any number of interruptions.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from advmoe.attacks import Norm
from advmoe.errors import UserError
from advmoe.evaluation.routing import routing_counts
from advmoe.evaluation.suite import ATTACKS, Job, Preset
from advmoe.files import drafted, write_json

SHARD_SIZE = 64
SLACK = 1e-6  # how far outside the ball an image may lie by rounding
Told = Callable[[str, int, "Shard"], None]  # after an attack: its name, the shard's number, the shard so far


@dataclass
class Shard:
    """What is known of one shard: rows are numbers in the test set."""

    rows: list[int]
    correct: list[int] | None = None
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    routing: dict[str, Any] | None = None
    ever: list[int] = field(default_factory=list)  # broken by anything that was ever run, under whatever plan

    def broken(self, names: Sequence[str]) -> set[int]:
        """Rows that any of the attacks broke."""
        return {row for name in names if name in self.attacks for row in self.attacks[name]["broken"]}


@dataclass(frozen=True)
class Bench:
    """The network and images under test. `x` [n, C, H, W] in [0, 1], `y` [n]; `search` may be a faster twin of
    `model` for attacks to climb with; `model` alone decides what fools."""

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


@dataclass(frozen=True)
class Worker:
    """Works on shard `number`: `save` is called after every attack, `told` hears of it, `keep` takes the x'."""

    bench: Bench
    shard: Shard
    number: int
    save: Callable[[Shard], None]
    told: Told
    keep: Path | None = None

    def run(self, preset: Preset) -> None:
        """Do what is missing of the shard."""
        bench, shard = self.bench, self.shard
        if shard.correct is None:
            shard.correct = _standing(bench, shard.rows, bench.x[shard.rows])
            self.save(shard)
        for names in preset.figures.values():
            self._chain(names, ())
        base = next((names for figure, names in preset.figures.items() if figure.startswith("ra_aa")), ())
        self._chain(preset.survivors, base or tuple(name for names in preset.figures.values() for name in names))
        if bench.routed and shard.routing is None and "pgd_50" in shard.attacks:
            shard.routing = routing_counts(bench.model, _job(bench, shard.rows, self.number), shard.correct)
            self.save(shard)

    def _chain(self, names: Sequence[str], before: Sequence[str]) -> None:
        """Attacks one after another, each on what `before` and those ahead of it left standing."""
        shard, done = self.shard, list(before)
        for name in names:
            if obstacle(self.bench, name):
                continue
            gone = shard.broken(done)
            rows = [row for row in shard.correct or [] if row not in gone]
            if not self._is_done(name, rows):
                shard.attacks[name] = _attack(self.bench, name, rows, self.number, self.keep)
                shard.ever = sorted({*shard.ever, *shard.attacks[name]["broken"]})
                self.save(shard)
                self.told(name, self.number, shard)
            done.append(name)

    def _is_done(self, name: str, rows: list[int]) -> bool:
        """Whether the shard holds what `name` does to these rows: another plan may have given it others."""
        known = self.shard.attacks.get(name, {})
        kept = self.keep is None or not rows or _images_path(self.keep, name, self.number).exists()
        return kept and known.get("rows") == rows and known.get("transfer") == _source(self.bench, name)


def obstacle(bench: Bench, name: str) -> str:
    """Why an attack makes no sense for this network and norm; "" where it does."""
    attack = ATTACKS[name]
    if attack.needs == "routing" and not bench.routed:
        return "the network does not route"
    if bench.norm not in attack.norms:
        return f"written for {' and '.join(attack.norms)} alone"
    if attack.needs == "transfer" and bench.transfer is None:
        return "no network to transfer from was given"
    return f"needs {attack.min_classes} classes" if bench.num_classes < attack.min_classes else ""


def _source(bench: Bench, name: str) -> str | None:
    return bench.transfer_digest if ATTACKS[name].needs == "transfer" else None


def _attack(bench: Bench, name: str, rows: list[int], number: int, keep: Path | None) -> dict[str, Any]:
    """Run one attack on `rows`; count only what fools the true network from inside the ball."""
    started = time.perf_counter()
    broken: list[int] = []
    outside = 0
    if rows:
        job = _job(bench, rows, number)
        x_adv = ATTACKS[name].run(job).detach()
        if bench.search is not bench.model:
            x_adv = _search_again(bench, name, job, x_adv)
        inside = _inside(x_adv, job.x, bench)
        x_adv, outside = torch.where(inside[:, None, None, None], x_adv, job.x), int((~inside).sum())
        standing = set(_standing(bench, rows, x_adv))
        broken = [row for row in rows if row not in standing]
        if keep is not None:
            _save_images(_images_path(keep, name, number), rows, x_adv)
    seconds = time.perf_counter() - started
    return {"rows": rows, "transfer": _source(bench, name), "broken": broken, "outside": outside, "seconds": seconds}


@torch.no_grad()
def _search_again(bench: Bench, name: str, job: Job, x_adv: Tensor) -> Tensor:
    """What fooled only the faster twin, which stopped there, is attacked once more on the true network."""
    disputed = ((bench.search(x_adv).argmax(dim=1) != job.y) & (bench.model(x_adv).argmax(dim=1) == job.y)).nonzero()[:, 0]
    if len(disputed):
        rows = [job.images[row] for row in disputed.tolist()]
        again = replace(job, predict=bench.model, x=job.x[disputed], y=job.y[disputed], images=rows)
        x_adv = x_adv.index_copy(0, disputed, ATTACKS[name].run(again).detach())
    return x_adv


def _job(bench: Bench, rows: Sequence[int], number: int) -> Job:
    index = torch.as_tensor(rows, device=bench.x.device)
    return Job(
        bench.search, bench.x[index], bench.y[index], rows, bench.epsilon, bench.norm, bench.seed, number,
        bench.num_classes, bench.transfer,
    )  # fmt: skip


@torch.no_grad()
def _standing(bench: Bench, rows: Sequence[int], x: Tensor) -> list[int]:
    """Those of `rows` that the true network classifies correctly at `x`; logits that are not finite classify nothing."""
    logits = bench.model(x)
    right = torch.isfinite(logits).all(dim=1) & (logits.argmax(dim=1) == bench.y[torch.as_tensor(rows, device=bench.y.device)])
    return [row for row, stands in zip(rows, right.tolist(), strict=True) if stands]


def _inside(x_adv: Tensor, x: Tensor, bench: Bench) -> Tensor:
    """Which images are finite, in [0, 1] and in the ball: [B] bool."""
    flat = (x_adv.double() - x.double()).flatten(1)
    distance = flat.abs().amax(dim=1) if bench.norm == "Linf" else flat.norm(dim=1)
    inside = (distance <= bench.epsilon + SLACK) & torch.isfinite(flat).all(dim=1)
    return inside & (x_adv.flatten(1).amin(dim=1) >= 0) & (x_adv.flatten(1).amax(dim=1) <= 1)


def _images_path(keep: Path, name: str, number: int) -> Path:
    return keep / f"{name}-{number:05d}.safetensors"


def _save_images(path: Path, rows: Sequence[int], x_adv: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path) as draft:
        draft.write_bytes(save({"rows": torch.as_tensor(rows), "x_adv": x_adv.cpu().contiguous()}))


class Store:
    """Shards on disk. `key` names network, data, threat and seed: a folder of another key is refused."""

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        path = folder / "key.json"
        if path.exists():
            _same(_read(path), dict(key), folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, dict(key))

    def load(self, number: int, rows: list[int]) -> Shard:
        """The shard as far as it is done."""
        path = self._path(number)
        if path is None or not path.exists():
            return Shard(rows)
        content = _read(path)
        if set(content) != set(Shard.__dataclass_fields__) or content["rows"] != rows:
            raise UserError(f"{path}: not a shard of these images; remove it to run it anew")
        return Shard(**content)

    def saver(self, number: int) -> Callable[[Shard], None]:
        """What writes shard `number`."""
        path = self._path(number)
        return lambda shard: None if path is None else _write(path, shard.__dict__)

    def checks(self) -> dict[str, dict[str, Any]]:
        """The checks that are done."""
        path = None if self.folder is None else self.folder / "checks.json"
        return _read(path) if path is not None and path.exists() else {}

    def save_checks(self, checks: Mapping[str, Any]) -> None:
        """Keep the checks done so far."""
        if self.folder is not None:
            _write(self.folder / "checks.json", dict(checks))

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"shard-{number:05d}.json"


def stored(folder: Path) -> Iterator[tuple[int, Shard]]:
    """The shards that a store holds so far, with their numbers, whoever works on them."""
    for path in sorted(folder.glob("shard-*.json")):
        yield int(path.stem.removeprefix("shard-")), Shard(**_read(path))


def shard_count(images: int, size: int = SHARD_SIZE) -> int:
    """How many shards so many images make."""
    return -(-images // size)


def split(count: int, size: int) -> list[list[int]]:
    """Rows 0 to count - 1 in shards of `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{folder}: holds shards of another {name} ({found.get(name)}, not {value}); move it away or use --fresh"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to run it anew") from None
    if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
        raise UserError(f"{path}: is damaged (its seal does not fit); remove it to run it anew")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_json(path, {**content, "seal": _seal(content)})


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def true_network(model: nn.Module) -> Iterator[None]:
    """float32 without autocast: what a success is judged by."""
    device = next(iter(model.parameters()), torch.zeros(())).device
    with torch.autocast(device.type, enabled=False):
        yield
