"""The resumable worker: one shard of images, attacks one after another, saved after each.

A shard's result depends only on its images, the network, the plan and the seed. So shards may run in any order, in any
number of processes, with any number of interruptions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from advmoe.attacks.job import Job
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import ATTACKS, follow_path
from advmoe.evaluation.routing import routing_counts
from advmoe.evaluation.store import AttackRun, Shard
from advmoe.evaluation.target import Progress, Target, ignore
from advmoe.files import drafted

SLACK = 1e-6  # how far outside the ball an image may lie by rounding


class Verdict(NamedTuple):
    """The rows whose x' fools the true network from inside the ball, how many x' are invalid, and (where the attack holds a
    pathway) the rows whose x' fools the network held on one."""

    broken: list[int]
    outside: int
    held: list[int] | None = None


def _discard(shard: Shard) -> None:
    """Save nothing."""


@dataclass(frozen=True)
class Worker:
    """Works on shard `number`: calls `save` and `progress` after every attack; writes x' to the folder `images`, if any."""

    target: Target
    shard: Shard
    number: int = 0
    save: Callable[[Shard], None] = _discard
    progress: Progress = ignore
    images: Path | None = None

    def run(self, preset: Preset) -> None:
        """Do what is missing of the shard."""
        target, shard = self.target, self.shard
        if shard.correct is None:
            shard.correct = right_rows(target, shard.rows, target.x[shard.rows])
            self.save(shard)
        self._follow_path([names[0] for names in preset.figures.values() if len(names) == 1])
        for names in preset.figures.values():
            self._chain(names, ())
        base = next((names for figure, names in preset.figures.items() if figure.startswith("ra_aa")), ())
        self._chain(preset.survivors, base or tuple(name for names in preset.figures.values() for name in names))

    def _follow_path(self, names: Sequence[str]) -> None:
        """PGD figures that are points of one path of iterates, and the routing figures at PGD-50, from a single ascent."""
        target, shard = self.target, self.shard
        correct = shard.correct or []
        marks = {name: ATTACKS[name].path for name in names if ATTACKS[name].path}
        routed = target.routed and shard.routing is None and "pgd_50" in marks
        missing = sorted((name for name in marks if not self._is_done(name, correct)), key=marks.__getitem__)
        if not (missing or routed):
            return
        rows = shard.rows if routed else correct
        steps = sorted({*(marks[name] for name in missing), *((10, 50) if routed else ())})
        started, job = time.perf_counter(), target.job(rows, self.number)
        points = dict(zip(steps, follow_path(job, steps), strict=True)) if rows else {}
        seconds, before = time.perf_counter() - started, 0
        place = {row: index for index, row in enumerate(rows)}
        chosen = torch.tensor([place[row] for row in correct], device=target.x.device, dtype=torch.long)
        for name in missing:
            began, x_adv = time.perf_counter(), points[marks[name]][chosen] if correct else target.x[:0]
            verdict = self._judged(name, correct, x_adv) if correct else Verdict([], 0)
            share = seconds * (marks[name] - before) / steps[-1]
            before = marks[name]
            self._keep(name, correct, verdict, share + time.perf_counter() - began)
        if routed:
            shard.routing = routing_counts(target.model, job, correct, points[10], points[50])
            self.save(shard)

    def _chain(self, names: Sequence[str], before: Sequence[str]) -> None:
        """Attacks one after another, each on what `before` and the earlier ones left standing."""
        shard, done = self.shard, list(before)
        for name in names:
            if ATTACKS[name].obstacle(self.target.setting):
                continue
            broken = shard.broken(done)
            rows = [row for row in shard.correct or [] if row not in broken]
            if not self._is_done(name, rows):
                self._attack(name, rows)
            done.append(name)

    def _attack(self, name: str, rows: list[int]) -> None:
        started, verdict = time.perf_counter(), Verdict([], 0, [] if ATTACKS[name].held else None)
        if rows:
            verdict = self._judged(name, rows, ATTACKS[name].run(self.target.job(rows, self.number)).detach())
        self._keep(name, rows, verdict, time.perf_counter() - started)

    def _keep(self, name: str, rows: list[int], verdict: Verdict, seconds: float) -> None:
        shard = self.shard
        shard.attacks[name] = AttackRun(
            rows=rows, transfer=self._source(name), seconds=seconds, version=ATTACKS[name].version, **verdict._asdict()
        )
        shard.ever = sorted({*shard.ever, *verdict.broken})
        self.save(shard)
        self.progress(name, self.number, shard)

    def _judged(self, name: str, rows: list[int], x_adv: Tensor) -> Verdict:
        target, job = self.target, self.target.job(rows, self.number)
        if target.search is not target.model:
            x_adv = _search_again(target, name, job, x_adv)
        inside = _inside(x_adv, job.x, target)
        x_adv = torch.where(inside[:, None, None, None], x_adv, job.x)
        if self.images is not None:
            _save_images(_images_path(self.images, name, self.number), rows, x_adv)
        right, held = set(right_rows(target, rows, x_adv)), ATTACKS[name].held
        flags = None if held is None else held(replace(job, predict=target.model), x_adv).tolist()
        return Verdict(
            [row for row in rows if row not in right], int((~inside).sum()),
            None if flags is None else [row for row, flag in zip(rows, flags, strict=True) if flag],
        )  # fmt: skip

    def _is_done(self, name: str, rows: list[int]) -> bool:
        """Whether the shard holds what `name` does to these rows: another plan may have given it other rows."""
        run = self.shard.attacks.get(name)
        if run is None or (run.rows, run.transfer, run.version) != (rows, self._source(name), ATTACKS[name].version):
            return False
        return self.images is None or not rows or _images_path(self.images, name, self.number).exists()

    def _source(self, name: str) -> str | None:
        return self.target.transfer_digest if ATTACKS[name].needs == "transfer" else None


@torch.no_grad()
def right_rows(target: Target, rows: Sequence[int], x: Tensor) -> list[int]:
    """Those of `rows` that the true network classifies correctly at `x`; logits that are not finite classify nothing."""
    logits = target.model(x)
    index = torch.as_tensor(rows, dtype=torch.int64, device=target.y.device)
    right = torch.isfinite(logits).all(dim=1) & (logits.argmax(dim=1) == target.y[index])
    return [row for row, stands in zip(rows, right.tolist(), strict=True) if stands]


@torch.no_grad()
def _search_again(target: Target, name: str, job: Job, x_adv: Tensor) -> Tensor:
    """Attack once more, on the true network, what fooled only the faster copy: the attack stopped there."""
    disputed = ((target.search(x_adv).argmax(dim=1) != job.y) & (target.model(x_adv).argmax(dim=1) == job.y)).nonzero()[:, 0]
    if len(disputed):
        rows = [job.images[row] for row in disputed.tolist()]
        again = replace(job, predict=target.model, x=job.x[disputed], y=job.y[disputed], images=rows)
        x_adv = x_adv.index_copy(0, disputed, ATTACKS[name].run(again).detach())
    return x_adv


def _inside(x_adv: Tensor, x: Tensor, target: Target) -> Tensor:
    """Which images are finite, in [0, 1] and in the ball: [B] bool."""
    flat = (x_adv.double() - x.double()).flatten(1)
    distance = flat.abs().amax(dim=1) if target.norm == "Linf" else flat.norm(dim=1)
    inside = (distance <= target.epsilon + SLACK) & torch.isfinite(flat).all(dim=1)
    return inside & (x_adv.flatten(1).amin(dim=1) >= 0) & (x_adv.flatten(1).amax(dim=1) <= 1)


def _images_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.safetensors"


def _save_images(path: Path, rows: Sequence[int], x_adv: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path) as draft:
        draft.write_bytes(save({"rows": torch.as_tensor(rows, dtype=torch.int64), "x_adv": x_adv.cpu().contiguous()}))


@contextmanager
def true_network(model: nn.Module) -> Iterator[None]:
    """float32 without autocast: the network that judges every success."""
    device = next(iter(model.parameters()), torch.zeros(())).device
    with torch.autocast(device.type, enabled=False):
        yield
