"""Records as tables."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from advmoe.evaluation.record import EvaluationResult, Record

MARKS = {"pass": "[green]pass   [/]", "warn": "[yellow]warn   [/]", "fail": "[red]fail   [/]", "skipped": "skipped"}


def record_table(records: Sequence[Record], title: str) -> Table:
    """One row a Record, worst case first: accuracies in percent, cost against dense. A figure that was not measured is blank."""
    table = Table(title=f"{title}; SA and RA in %", title_justify="left")
    table.add_column("method", no_wrap=True)
    rows = [_figures(record) for record in records]
    steps = sorted(
        {name for row in rows for name in row if name.startswith("RA-") and name[3:].isdigit()}, key=lambda s: int(s[3:])
    )
    order = ["RA-worst", "RA-worst (quick)", "SA", *steps, "RA-AA", "RA-AA-PLUS", "RA-AA-RAND"]
    titles = [name for name in order if any(name in row for row in rows)]
    for name in (*titles, "GMACs", "vs dense"):
        table.add_column(name, justify="right", min_width=4)
    for record, row in zip(records, rows, strict=True):
        reduction = f"{-record.reduction:+.0f} %" if record.gmacs != record.gmacs_dense else "1 x"
        cost = [f"{record.gmacs:.4f}", reduction]
        table.add_row(record.method, *(row.get(name, "") for name in titles), *cost)
    return table


def _figures(record: Record) -> dict[str, str]:
    """Column -> figure as text; RA-AA is marked where RA-worst shows that it cannot be trusted."""
    worst = "RA-worst" if record.ra_worst is not None else "RA-worst (quick)"
    figures = {worst: record.worst, "SA": record.sa, **{f"RA-{steps}": value for steps, value in record.ra.items()}}
    autoattack = {"RA-AA": record.ra_aa, "RA-AA-PLUS": record.ra_aa_plus, "RA-AA-RAND": record.ra_aa_rand}
    figures |= {name: value for name, value in autoattack.items() if value is not None}
    texts = {name: f"{value:.1f}" for name, value in figures.items()}
    if "RA-AA" in texts and record.evaluation.autoattack_unreliable:
        texts["RA-AA"] += " (unreliable)"
    return texts


def evaluation_lines(evaluation: EvaluationResult) -> list[str]:
    """Intervals, attacks with their times, routing, and the checks, one line each."""
    intervals, attacks = evaluation.intervals.items(), evaluation.attacks.items()
    lines = [
        f"{name:14} {evaluation.figures[name]:5.1f} %  95 % interval {low:.1f} to {high:.1f}"
        for name, (low, high) in intervals
        if name in evaluation.figures
    ]
    lines += [f"{name:20} broke {run.broken:4} of {run.attacked:4} in {run.seconds:.1f} s" for name, run in attacks]
    reasons = dict.fromkeys(evaluation.left_out.values())
    lines += [f"left out, {reason}: {', '.join(_having(evaluation.left_out, reason))}" for reason in reasons]
    routing = evaluation.routing
    if routing:
        lines += [
            f"RA-router {routing.ra_router:.1f} %, RA-expert {routing.ra_expert:.1f} %; "
            f"routes of {routing.flip_rate:.1f} % of the images change under PGD-50",
            "kept their expert, per layer: " + " ".join(f"{value:.0f}" for value in routing.overlap) + " %",
            f"load of the experts, per layer: {_loads(routing.load)} %; under attack: {_loads(routing.load_adv)} %",
            "one expert in every layer: SA " + " ".join(f"{value:.1f}" for value in routing.fixed_expert_sa)
            + ", RA-10 " + " ".join(f"{value:.1f}" for value in routing.fixed_expert_ra),
        ]  # fmt: skip
    checks = evaluation.checks
    return lines + [f"({check.number:2}) {MARKS[check.status]} {check.name}: {escape(check.detail)}" for check in checks]


def _having(left_out: Mapping[str, str], reason: str) -> list[str]:
    return [name for name, own in left_out.items() if own == reason]


def _loads(layers: Sequence[Sequence[int]]) -> str:
    return " ".join("/".join(f"{100 * count / max(sum(layer), 1):.0f}" for count in layer) for layer in layers)
