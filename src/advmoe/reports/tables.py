"""Records as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import EvaluationResult
from advmoe.evaluation.result_checks import AUTOATTACK
from advmoe.reports.cell import cell_of
from advmoe.reports.measures import BY_NAME, Measure, measured, with_intervals
from advmoe.reports.routing_facts import choice_gains, routing_bounds

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": ""}  # of a check's status


def record_table(records: Sequence[Record], title: str) -> Table:
    """One row a Record, worst case first: accuracies in percent, cost against dense. A measure that a Record lacks is blank."""
    table = Table(title=f"{title}; SA and RA in %", title_justify="left")
    table.add_column("method", no_wrap=True)
    measures = measured(records)
    for column in (*(measure.label for measure in measures), "GMACs", "against dense"):
        table.add_column(column, justify="right", min_width=4)
    for record in records:
        reduction = f"{-record.reduction:+.0f} %" if record.gmacs != record.gmacs_dense else "1 x"
        table.add_row(cell_of(record).label, *(_text(record, measure) for measure in measures), f"{record.gmacs:.4f}", reduction)
    return table


def _text(record: Record, measure: Measure) -> str:
    """A figure as text; the one of AutoAttack is marked as unreliable if it is too far above RA-worst."""
    value = measure.value(record)
    judged = next((name for name in AUTOATTACK if BY_NAME[name].value(record) is not None), "")  # by check 5
    doubtful = measure.name == judged and record.evaluation.autoattack_unreliable
    return "" if value is None else f"{value:.1f}{' (unreliable)' * doubtful}"


def caught_alone(evaluation: EvaluationResult) -> dict[str, int]:
    """Attack -> number of images that it broke and no other attack did.

    An attack runs only on images that the earlier attacks of its chain did not break.
    """
    times = Counter(row for rows in evaluation.broken.values() for row in rows)
    return {name: sum(times[row] == 1 for row in rows) for name, rows in evaluation.broken.items()}


def evaluation_lines(record: Record) -> list[str]:
    """Intervals, attacks with their times, and routing, one line each."""
    evaluation, intervals = record.evaluation, with_intervals(record)
    width = max((len(label) for label, _, _ in intervals), default=0)
    lines = [f"{label:{width}} {value:5.1f} %  95 % interval {low:.1f} to {high:.1f}" for label, value, (low, high) in intervals]
    if ends := routing_bounds(record):
        lines.append(f"accuracy under any attack on the routing: estimated {ends}")
    alone = caught_alone(evaluation)
    lines += [
        f"{name:24} broke {run.broken:4} of {run.attacked:4}, {alone.get(name, 0):4} only by it, in {run.seconds:.1f} s"
        for name, run in evaluation.attacks.items()
    ]
    lines += [f"left out, {reason}: {', '.join(names)}" for reason, names in _by_text(evaluation.left_out).items()]
    lines += [
        f"run on {part} only; what they broke counts, and a preset or --attacks with them completes them: {', '.join(names)}"
        for part, names in _by_text(evaluation.partly_run).items()
    ]
    routing = evaluation.routing
    if routing:
        lines += [
            f"RA-router {routing.ra_router:.1f} %, RA-expert {routing.ra_expert:.1f} %; "
            f"routes of {routing.flip_rate:.1f} % of the correctly classified images change under PGD-50",
            "correctly classified images that keep their expert, per layer: "
            + " ".join(f"{value:.0f}" for value in routing.overlap) + " %",
            f"load of the experts, per layer: {_loads(routing.load)} %; under attack: {_loads(routing.load_adv)} %",
            "expert 0, 1, ... in every layer: SA " + " ".join(f"{value:.1f}" for value in routing.fixed_expert_sa)
            + ", RA-10 " + " ".join(f"{value:.1f}" for value in routing.fixed_expert_ra)
            + ", worst case " * bool(routing.fixed_expert_ra_worst)
            + " ".join(f"{value:.1f}" for value in routing.fixed_expert_ra_worst)
            + ("" if routing.any_expert_ra_worst is None else f" (at least one of them: {routing.any_expert_ra_worst:.1f})"),
            *(f"gain by choosing an expert: {text}" for text in [choice_gains(evaluation)] if text),
        ]  # fmt: skip
    return lines


def check_lines(evaluation: EvaluationResult) -> list[Text]:
    """The checks, one line each, with the status in colour."""
    return [
        Text.assemble(f"({check.number:2}) ", (f"{check.status:7}", COLOURS[check.status]), f" {check.name}: {check.detail}")
        for check in evaluation.checks
    ]


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Each text with the names that have it."""
    by_text: dict[str, list[str]] = {}
    for name, text in texts.items():
        by_text.setdefault(text, []).append(name)
    return by_text


def _loads(layers: Sequence[Sequence[int]]) -> str:
    return " ".join("/".join(f"{100 * count / max(sum(layer), 1):.0f}" for count in layer) for layer in layers)
