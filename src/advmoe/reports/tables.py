"""Records as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

MARKS = {"pass": "[green]pass[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]", "skipped": "skipped"}


def record_table(records: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row a Record, worst case first: accuracies in percent, cost against dense."""
    table = Table(title=f"{title}; SA and RA in %", title_justify="left")
    table.add_column("method", no_wrap=True)
    complete = all("ra_worst" in record for record in records)
    autoattack = [name for name in ("ra_aa", "ra_aa_plus", "ra_aa_rand") if all(name in record for record in records)]
    worst = "RA-worst" if complete else "RA-worst (quick)"
    steps = list(records[0]["ra"])
    titles = [worst, "SA", *(f"RA-{n}" for n in steps), *(name.upper().replace("_", "-") for name in autoattack)]
    for name in (*titles, "GMACs", "vs dense", "params"):
        table.add_column(name, justify="right")
    for record in records:
        figures = [worst_of(record), record["sa"], *record["ra"].values(), *(record[name] for name in autoattack)]
        reduction = f"{-record['reduction']:+.0f} %" if record["gmacs"] != record["gmacs_dense"] else "1 x"
        cost = [f"{record['gmacs']:.4f}", reduction, f"{record['params']:,}"]
        table.add_row(record["method"], *(f"{value:.1f}" for value in figures), *cost)
    return table


def worst_of(record: Mapping[str, Any]) -> float:
    """RA-worst, or RA-worst (quick) where the full suite was not run."""
    value: float = record["ra_worst"] if "ra_worst" in record else record["ra_worst_quick"]
    return value


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Intervals, attacks with their times, routing, and the checks, one line each."""
    intervals, attacks = evaluation["intervals"].items(), evaluation["attacks"].items()
    lines = [f"{name:12} {evaluation[name]:5.1f} %  95 % interval {low:.1f} to {high:.1f}" for name, (low, high) in intervals]
    lines += [f"{name:20} broke {run['broken']:4} of {run['attacked']:4} in {run['seconds']:.1f} s" for name, run in attacks]
    routing = evaluation["routing"]
    if routing:
        lines += [
            f"RA-router {routing['ra_router']:.1f} %, RA-expert {routing['ra_expert']:.1f} %; "
            f"routes of {routing['flip_rate']:.1f} % of the pictures change under PGD-50",
            "kept their expert, per layer: " + " ".join(f"{value:.0f}" for value in routing["overlap"]) + " %",
            "first expert's load, per layer: " + " ".join(f"{100 * layer[0] / sum(layer):.0f}" for layer in routing["load"]) + " %",
            "one expert in every layer: SA " + " ".join(f"{value:.1f}" for value in routing["fixed_expert_sa"])
            + ", RA-10 " + " ".join(f"{value:.1f}" for value in routing["fixed_expert_ra"]),
        ]  # fmt: skip
    checks = evaluation["checks"]
    return lines + [f"({check['number']:2}) {MARKS[check['status']]:7} {check['name']}: {check['detail']}" for check in checks]
