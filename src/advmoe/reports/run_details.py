"""A Record as the report's page shows it: figures, checks, images with their routes, configuration, provenance."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import Check
from advmoe.reports.gallery import Gallery, gallery_of
from advmoe.reports.markup import Entry, Table
from advmoe.reports.measures import PRESENT, evaluated, with_intervals, worst_of
from advmoe.reports.routing_facts import choice_gains, routing_bounds
from advmoe.reports.styles import attack_title, run_title
from advmoe.reports.tables import caught_alone
from advmoe.wording import number_of

COLUMNS = {"epoch": "epoch", "phase": "phase", "val_sa": "SA, %", "val_ra": "RA, %", "loss": "loss"}  # of the table of epochs


@dataclass(frozen=True)
class Run:
    """A Record as the page shows it. `facts` and `provenance` are pairs of a name and a text."""

    name: str
    method: str
    title: str
    headline: str
    facts: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    tables: tuple[Table, ...]
    config: str
    provenance: tuple[tuple[str, str], ...]
    gallery: Gallery | None


def run_of(record: Record) -> Run:
    """The content of a Record of any schema as texts and tables."""
    return Run(
        name=record.run or "", method=record.method, title=run_title(record), headline=_headline(record),
        facts=tuple(_facts(record)), checks=tuple(record.evaluation.checks),
        tables=tuple(_tables(record)), config=yaml.safe_dump(record.config.model_dump(), sort_keys=False),
        provenance=tuple(_provenance(record)),
        gallery=gallery_of(record),
    )  # fmt: skip


def _headline(record: Record) -> str:
    """'RA-worst 49.0 %, SA 79.0 %; 1 check failed'."""
    worst = f"{worst_of(record).label} {record.worst:.1f} %"
    failed = sum(check.status == "fail" for check in record.evaluation.checks)
    return f"{worst}, SA {record.sa:.1f} %" + (f"; {number_of(failed, 'check')} failed" if failed else "")


def _facts(record: Record) -> Iterable[tuple[str, str]]:
    """Accuracies with their intervals, routing, cost."""
    evaluation = record.evaluation
    for name, value, (low, high) in with_intervals(record):
        yield name, f"{value:.1f} % (95 % interval {low:.1f} to {high:.1f})"
    if ends := routing_bounds(record):
        yield "accuracy under any attack on the routing, estimated", ends
    routing = evaluation.routing
    if routing:
        yield "RA-router, RA-expert", f"{routing.ra_router:.1f} %, {routing.ra_expert:.1f} %"
        yield "correctly classified images that PGD-50 reroutes", f"{routing.flip_rate:.1f} %"
    if text := choice_gains(evaluation):
        yield "gain by choosing an expert", text
    if parts := evaluation.partly_run:
        yield "attacks on a part of the images", ", ".join(f"{name} ({part})" for name, part in parts.items())
    against = f" ({abs(record.reduction):.0f} % {'less' if record.reduction > 0 else 'more'} than dense)"
    yield "GMACs", f"{record.gmacs:.4f}{against if round(record.reduction) else ''}"
    yield "parameters", f"{record.params:,}"
    yield "best epoch", str(record.epoch)


def _provenance(record: Record) -> Iterable[tuple[str, str]]:
    hardware, versions = record.hardware or {}, record.versions or {}
    yield "advmoe", f"{record.advmoe or 'unknown'}, commit {record.commit or 'unknown'}"
    if record.trained_by is not None:
        yield "trained by", record.trained_by_words
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "hardware", ", ".join(f"{name} {value}" for name, value in hardware.items() if value is not None)
    yield "data", f"{record.dataset}, fingerprint {record.fingerprint}"
    if record.teacher is not None:
        yield "teacher", f"{record.teacher.path}, digest {record.teacher.weights}"
    yield "seeds", f"{record.seed} in training, {record.attack_seed} in evaluation"
    if record.attack_precision is not None:
        yield "attack gradients", record.attack_precision
    how = evaluated(record)
    yield "evaluated", how if how == PRESENT else f"{how}: not compared with newer evaluations"
    trained = f"trained in {record.train_seconds:.0f} s, " if record.train_seconds else ""
    yield "time", f"{trained}evaluated in {record.evaluate_seconds:.0f} s; {record.time}"
    yield "record", f"schema {record.from_schema or record.schema_number}"


def _tables(record: Record) -> Iterable[Table]:
    """Tables of attacks, of accuracies at other radii and of epochs, as far as the Record has them."""
    attacks, alone = record.evaluation.attacks, caught_alone(record.evaluation)
    yield _table("Attacks", ("attack", "attacked", "broken", "broken by it only", "seconds", "what it does"), [
        (name, run.attacked, run.broken, alone.get(name, 0), round(run.seconds, 1), ATTACKS[name].words if name in ATTACKS else "")
        for name, run in attacks.items()
    ])  # fmt: skip
    curve = record.epsilon_curve
    if curve:
        title = f"Accuracy of {number_of(curve.images, 'image')} under {attack_title(curve.attack)}, by radius"
        yield _table(title, ("radius", "accuracy, %"), [
            (float(f"{at:.4g}"), round(ra, 1)) for at, ra in zip(curve.epsilons, curve.ra, strict=True)
        ])  # fmt: skip
    history = record.history
    if history:
        rows = [tuple("" if (value := getattr(row, name)) is None else round(value, 2) for name in COLUMNS) for row in history]
        yield _table("Epochs, on held-out images", tuple(COLUMNS.values()), rows)


def _table(title: str, columns: tuple[str, ...], rows: Iterable[Sequence[object]]) -> Table:
    entries = (tuple(Entry(str(cell), cell if isinstance(cell, int | float) else None) for cell in row) for row in rows)
    return Table("", title, columns, tuple(entries))
