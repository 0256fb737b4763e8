"""The worker for one shard of images. It runs the attacks one after another and saves after each, so it can be resumed.

The result of a shard depends only on its images, the network, the plans that were run and the seed; also on the batch size under
AutoAttack, which draws noise for a batch, and under `paths`, which attacks as many pathways at once as a batch holds. Shards may
therefore run in any order, in any number of processes, and be interrupted at any time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from advmoe.attacks import Norm
from advmoe.attacks.job import Job
from advmoe.attacks.objectives import predicted
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import ATTACKS, follow_path, run_attack
from advmoe.evaluation.routing import is_counted, routing_counts, total
from advmoe.evaluation.store import AttackRun, Shard
from advmoe.evaluation.target import OnAttack, Target, ignore
from advmoe.files import drafted

SLACK = 1e-6  # tolerance of the radius, for rounding
L2_SLACK = 1e-5  # further tolerance in L2, relative to the radius: attacks sum the squares of many pixels in float32


class Verdict(NamedTuple):
    """The rows whose x' is in the ball and fools the true network, and the number of invalid x'. If the attack fixes pathways, also
    the rows whose x' fools the network with a fixed pathway."""

    broken: list[int]
    outside: int
    held: list[int] | None = None


class Time(NamedTuple):
    """Wall time and processor time, in seconds."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> "Time":
        """The time now, for `since`."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, moment: "Time") -> "Time":
        """The time that has passed since `moment`."""
        now = cls.now()
        return cls(now.seconds - moment.seconds, now.cpu_seconds - moment.cpu_seconds)

    def plus(self, other: "Time", share: float) -> "Time":
        """This time plus the fraction `share` of another."""
        return Time(self.seconds + share * other.seconds, self.cpu_seconds + share * other.cpu_seconds)


@dataclass(frozen=True)
class Worker:
    """Works on shard `number`. It calls `save` and `progress` after every attack.

    The folder `images` holds only x' of results in the shard. With `keep_images`, x' is written there.
    """

    target: Target
    shard: Shard
    number: int = 0
    save: Callable[[Shard], None] = lambda shard: None
    progress: OnAttack = ignore
    images: Path | None = None
    keep_images: bool = False

    def run(self, preset: Preset) -> None:
        """Run the attacks of the preset that the shard does not have yet."""
        target, shard = self.target, self.shard
        if shard.correct is None:
            shard.correct = correct_rows(target, shard.rows, target.x[shard.rows])
            self.save(shard)
        self._follow_path([names[0] for names in preset.figures.values() if len(names) == 1])
        for names in preset.figures.values():
            self._chain(names, ())
        base = next((names for figure, names in preset.figures.items() if figure.startswith("ra_aa")), ())
        self._chain(preset.survivors, base or tuple(name for names in preset.figures.values() for name in names))

    def _follow_path(self, names: Sequence[str]) -> None:
        """The PGD figures, which are points of one path of iterates, and the routing figures at PGD-50, from a single ascent."""
        target, shard = self.target, self.shard
        correct = shard.correct or []
        marks = {name: ATTACKS[name].path for name in names if ATTACKS[name].path}
        routed = target.routed and not is_counted(shard.routing) and "pgd_50" in marks
        missing = sorted((name for name in marks if not self._is_done(name, correct)), key=marks.__getitem__)
        if not (missing or routed):
            return
        rows = shard.rows if routed else correct
        steps = sorted({*(marks[name] for name in missing), *((10, 50) if routed else ())})
        started, jobs = Time.now(), self._jobs(rows)
        paths = [dict(zip(steps, follow_path(job, steps), strict=True)) for job in jobs]
        ascent, before = Time.since(started), 0
        index_of = {row: index for index, row in enumerate(rows)}
        chosen = torch.tensor([index_of[row] for row in correct], device=target.x.device, dtype=torch.long)
        for name in missing:
            began, mark = Time.now(), marks[name]
            x_adv = torch.cat([path[mark] for path in paths])[chosen] if correct else target.x[:0]
            verdict, x_adv = self._judged(name, correct, x_adv)
            share, before = (mark - before) / steps[-1], mark
            self._keep(name, self._result(name, correct, verdict, Time.since(began).plus(ascent, share)), x_adv)
        if routed:
            counts = []
            for job, path in zip(jobs, paths, strict=True):
                pgd_10, pgd_50 = (_attack_disputed(target, f"pgd_{mark}", job, path[mark]) for mark in (10, 50))
                counts.append(routing_counts(target.model, job, correct, pgd_10, pgd_50))
            shard.routing = total(counts)
            self.save(shard)

    def _chain(self, names: Sequence[str], before: Sequence[str]) -> None:
        """Attacks one after another, each on the images that `before` and the earlier ones did not break."""
        shard, done = self.shard, list(before)
        for name in names:
            if ATTACKS[name].obstacle(self.target.setting):
                continue
            broken = shard.broken(done)
            rows = [row for row in shard.correct or [] if row not in broken]
            if not self._is_done(name, rows):
                known = self._known(name)
                if known is not None and not self._has_images(name, known):
                    known = self._attack(name, known.rows)
                if known is None or set(rows) - set(known.rows):
                    self._attack(name, rows, known)
            done.append(name)

    def _attack(self, name: str, rows: list[int], known: AttackRun | None = None) -> AttackRun:
        """Attack the `rows` that the stored result `known` lacks, and add them to it.

        The known rows are not attacked again: figures of other plans use them, and AutoAttack, which draws noise for a batch, could
        break other images."""
        started = Time.now()
        rows = [row for row in rows if known is None or row not in known.rows]
        points = [run_attack(name, job, self.target.model) for job in self._jobs(rows)]
        verdict, x_adv = self._judged(name, rows, torch.cat([self.target.x[:0], *points]))
        run = self._result(name, rows, verdict, Time.since(started))
        path = self._images_path(name)
        if known is not None:
            run = known.plus(run)
            if self.keep_images and path is not None and known.rows:
                x_adv = torch.cat([load_file(path)["x_adv"].to(x_adv), x_adv])
        self._keep(name, run, x_adv)
        return run

    def _jobs(self, rows: list[int]) -> list[Job]:
        """The images `rows` in batches. A shard's batches share the seed of attacks that draw noise for a batch."""
        size = self.target.batch_size
        return [self.target.job(rows[start : start + size], self.number) for start in range(0, len(rows), size)]

    def _result(self, name: str, rows: list[int], verdict: Verdict, spent: Time) -> AttackRun:
        return AttackRun(
            rows=rows, transfer=self._source(name), pathway_budget=self._budget(name), version=ATTACKS[name].version,
            **spent._asdict(), **verdict._asdict(),
        )  # fmt: skip

    def _keep(self, name: str, run: AttackRun, x_adv: Tensor) -> None:
        """Store the result, and then its x'. The old x' are removed first, so that a process that is stopped at any time leaves
        no x' of another result."""
        shard, path = self.shard, self._images_path(name)
        if path is not None:
            path.unlink(missing_ok=True)
        shard.attacks[name] = run
        shard.ever = sorted({*shard.ever, *run.broken})
        self.save(shard)
        if path is not None and self.keep_images and run.rows:
            _save_images(path, run.rows, x_adv)
        self.progress(name, self.number, shard)

    def _judged(self, name: str, rows: list[int], x_adv: Tensor) -> tuple[Verdict, Tensor]:
        """The verdict on x' [B, C, H, W] of the images `rows`, and x' without the invalid ones, which are replaced by the image."""
        target, held = self.target, ATTACKS[name].held
        judged, broken, outside, on_pathway = [x_adv[:0]], list[int](), 0, list[int]()
        for job, points in zip(self._jobs(rows), x_adv.split(target.batch_size), strict=False):
            part = _attack_disputed(target, name, job, points)
            inside = is_valid(part, job.x, target.epsilon, target.norm)
            part = torch.where(inside[:, None, None, None], part, job.x)
            correct = set(correct_rows(target, job.images, part))
            broken += [row for row in job.images if row not in correct]
            outside += int((~inside).sum())
            if held is not None:
                flags = held(replace(job, predict=target.model), part).tolist()
                on_pathway += [row for row, flag in zip(job.images, flags, strict=True) if flag]
            judged.append(part)
        return Verdict(broken, outside, None if held is None else on_pathway), torch.cat(judged)

    def _is_done(self, name: str, rows: list[int]) -> bool:
        """Whether the shard has the result of `name` for these rows, and its images if they are wanted."""
        known = self._known(name)
        return known is not None and set(rows) <= set(known.rows) and self._has_images(name, known)

    def _known(self, name: str) -> AttackRun | None:
        """The result of `name`, if the shard has it. Another plan may have run it on more, or on other, rows."""
        run, expected = self.shard.attacks.get(name), (self._source(name), self._budget(name), ATTACKS[name].version)
        if run is None or (run.transfer, run.pathway_budget, run.version) != expected:
            return None
        return run

    def _has_images(self, name: str, run: AttackRun) -> bool:
        """Whether the x' of a stored result are there, or not wanted."""
        path = self._images_path(name)
        if path is None or not self.keep_images or not run.rows:
            return True
        return path.exists()

    def _images_path(self, name: str) -> Path | None:
        return None if self.images is None else self.images / f"{name}-{self.number:05d}.safetensors"

    def _source(self, name: str) -> str | None:
        return self.target.transfer_digest if ATTACKS[name].needs == "transfer" else None

    def _budget(self, name: str) -> int | None:
        return self.target.pathway_budget if ATTACKS[name].held else None


@torch.no_grad()
def correct_rows(target: Target, rows: Sequence[int], x: Tensor) -> list[int]:
    """The `rows` that the true network classifies correctly at `x` [B, C, H, W]. Logits that are not finite count as wrong."""
    index = torch.as_tensor(rows, dtype=torch.int64, device=target.y.device)
    correct = predicted(target.in_batches(target.model, x)) == target.y[index]
    return [row for row, flag in zip(rows, correct.tolist(), strict=True) if flag]


@torch.no_grad()
def _attack_disputed(target: Target, name: str, job: Job, x_adv: Tensor) -> Tensor:
    """Attack once more, on the true network, the images that fooled only the faster copy, because the attack stopped there.

    An attack that fixes pathways also stops at an image that fools the copy with a fixed pathway.
    """
    if target.search is target.model:
        return x_adv
    true_job, held = replace(job, predict=target.model), ATTACKS[name].held
    stopped = predicted(target.search(x_adv)) != job.y
    if held is not None:
        stopped |= held(job, x_adv) & ~held(true_job, x_adv)
    disputed = (stopped & (predicted(target.model(x_adv)) == job.y)).nonzero()[:, 0]
    if len(disputed):
        rows = [job.images[row] for row in disputed.tolist()]
        true_job = replace(true_job, x=job.x[disputed], y=job.y[disputed], images=rows)
        x_adv = x_adv.index_copy(0, disputed, run_attack(name, true_job))
    return x_adv


def is_valid(x_adv: Tensor, x: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """Which x' are finite, in [0, 1] and in the ball around x: [B] bool."""
    flat = (x_adv.double() - x.double()).flatten(1)
    distance = flat.abs().amax(dim=1) if norm == "Linf" else flat.norm(dim=1)
    radius = epsilon * (1 if norm == "Linf" else 1 + L2_SLACK) + SLACK
    inside = (distance <= radius) & torch.isfinite(flat).all(dim=1)
    return inside & (x_adv.flatten(1).amin(dim=1) >= 0) & (x_adv.flatten(1).amax(dim=1) <= 1)


def _save_images(path: Path, rows: Sequence[int], x_adv: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path) as draft:
        draft.write_bytes(save({"rows": torch.as_tensor(rows, dtype=torch.int64), "x_adv": x_adv.cpu().contiguous()}))
