"""Write the figures that results/ and benchmarks/results/ hold into README.md and docs/, between their markers.

python scripts/update_docs.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.reports.cells import Figure, summarise
from advmoe.reports.costs import profile_markdown
from advmoe.reports.panels import in_words

ROOT = Path(__file__).parents[1]
COLUMNS = ("RA-worst", "SA", "RA-50", "RA-AA", "GMACs", "against dense")


def row(record: dict[str, Any]) -> str:
    """One Record as a line of the table."""
    figures = [record["ra_worst"], record["sa"], record["ra"]["50"], record["ra_aa"]]
    low, high = record["evaluation"]["intervals"]["ra_worst"]
    cells = [f"{figures[0]:.1f} ({low:.0f} to {high:.0f})", *(f"{value:.1f}" for value in figures[1:])]
    reduction = "" if record["gmacs"] == record["gmacs_dense"] else f"{-record['reduction']:+.0f} %"
    return " | ".join(["", f"`{record['method']}`", *cells, f"{record['gmacs']:.4f}", reduction, ""]).strip()


def table(records: list[dict[str, Any]]) -> str:
    """Records as a Markdown table, with the sentence that says what they are."""
    first = records[0]
    head = ["| method | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    config = first["config"]
    said = (
        f"ResNet-18 of width {config['model']['width']}, {first['train_images']} training images of {first['dataset']}, "
        f"{config['training']['epochs']} epochs, one seed; {first['test_images']} test images, epsilon {first['epsilon']:g}, "
        "`--standard`; percent, 95 % interval in brackets.\nIt shows that the parts work together, not what the method is worth."
    )
    return "\n".join([*head, *(row(record) for record in records), "", said])


def read(path: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((ROOT / path).read_text())


def benchmark_table(path: str, suites: tuple[str, ...]) -> str:
    """The rows of some suites in a benchmark's file."""
    found = read(path)
    lines = ["| what | found (rounds) | target |", "| --- | ---: | ---: |"]
    for each in (each for each in found["rows"] if each["suite"] in suites):
        low, high = each["spread"]
        target = f"{each['target']}{'' if each['met'] else ' **missed**'}" if each["target"] else ""
        lines.append(f"| {each['name']} | {each['ratio']:.2f} ({low:.2f} to {high:.2f}) | {target} |")
    machine = found["machine"]
    said = f"{machine['threads']} threads of {machine['cpu']}, {machine['memory'] / 2**30:.0f} GiB, torch {machine['torch']}."
    return "\n".join([*lines, "", said])


def embedded_table() -> str:
    """The five methods on embedded images, mean and sample deviation over seeds."""
    summaries = summarise(read("results/embedded/records.json"))
    names = {"ra_worst_quick": "RA-worst (quick)", "sa": "SA", "ra_50": "RA-50"}
    lines = [f"| method | {' | '.join(names.values())} | GMACs | against dense |", "| --- |" + " ---: |" * (len(names) + 2)]
    for own in summaries:
        cells = [spread(own.figures[name]) for name in names]
        saved = own.figures["reduction"].mean
        cost = [f"{own.figures['gmacs'].mean:.4f}", f"{-saved:+.0f} %" if saved else ""]
        lines.append(f"| `{own.cell.method}` | {' | '.join([*cells, *cost])} |")
    first = summaries[0]
    said = (
        f"{in_words(first.cell)}; {first.n} seeds, mean ± sample deviation, percent.\n"
        "Small images, a narrow network, minutes a run: differences within the deviations show nothing, "
        "and none of it speaks of the paper's figures."
    )
    return "\n".join([*lines, "", said])


def spread(figure: Figure) -> str:
    """Mean and sample deviation."""
    return f"{figure.mean:.1f}" + ("" if figure.std is None else f" ± {figure.std:.1f}")


def low_precision_table() -> str:
    """Exported networks in each precision: what they say and, of the first, what they withstand."""
    found = read("results/low_precision.json")
    columns = ("SA", "same class", "same route", "RA: transferred", "RA: attacked itself", "RA: both", "MB")
    lines = [f"| network | file | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    for run in found["runs"]:
        for dtype, own in run["files"].items():
            percents = (own.get(f"ra_{name}") for name in ("transfer", "white_box", "both"))
            cells = [percent(value) for value in (own["sa"], own["classes"], own["routes"], *percents)]
            network = f"{run['backbone']}, `{run['method']}`, width {run['width']}, {run['epochs']} epochs"
            lines.append(f"| {network} | {own['format']}, {dtype} | {' | '.join(cells)} | {own['bytes'] / 1e6:.1f} |")
    first = found["runs"][0]
    said = (
        f"{first['images']} test images of {first['dataset']}, percent; RA is RA-worst (quick) on {first['attacked']} of them, "
        f"epsilon {first['epsilon']:g}; int8 calibrated on {found['calibration']} training images."
    )
    return "\n".join([*lines, "", said])


def percent(value: float | None) -> str:
    """A cell; empty where there is nothing to say."""
    return "" if value is None else f"{value:.1f}"


def profile_table() -> str:
    """Where an inference pass spends its time."""
    found = read("benchmarks/results/profile.json")["milliseconds"]
    lines = [f"| part | {' | '.join(found)} |", "| --- |" + " ---: |" * len(found)]
    lines += [f"| {part} | {' | '.join(f'{parts[part]:.1f}' for parts in found.values())} |" for part in found["MoE"]]
    return "\n".join(lines)


def faults_table() -> str:
    """What was done to running processes, and how often the run came through."""
    found = read("results/faults.json")
    lines = ["| fault | methods | done | survived |", "| --- | ---: | ---: | ---: |"]
    for fault in dict.fromkeys(row["fault"] for row in found["faults"]):
        rows = [row for row in found["faults"] if row["fault"] == fault]
        done, survived = (sum(row[name] for row in rows) for name in ("tried", "survived"))
        lines.append(f"| {fault} | {len(rows)} | {done} | {survived}{'' if survived == done else ' **fewer**'} |")
    said = f"`{found['command']}`, seed {found['seed']}, {in_versions(found['versions'])}."
    return "\n".join([*lines, "", said])


def fuzz_table() -> str:
    """How many hostile inputs each reader was given."""
    found = read("results/fuzz.json")
    lines = ["| reader | inputs | seconds | failures |", "| --- | ---: | ---: | ---: |"]
    for row in found["readers"]:
        lines.append(f"| {row['reader']} | {row['inputs']:,} | {row['seconds']:.0f} | {row['failures']} |")
    return "\n".join([*lines, "", f"`{found['command']}`, {in_versions(found['versions'])}."])


def in_versions(versions: dict[str, str]) -> str:
    """'python 3.11.7, torch 2.13.0'."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"embedded": embedded_table},
    "docs/start.md": {"demo": lambda: table(read("results/demo/records.json"))},
    "docs/cost.md": {"profile": profile_markdown},
    "docs/reliability.md": {
        "scaling": lambda: benchmark_table("benchmarks/results/scaling.json", ("scaling",)),
        "faults": faults_table,
        "fuzz": fuzz_table,
    },
    "docs/performance.md": {
        "inference": lambda: benchmark_table("benchmarks/results/inference.json", ("inference",)),
        "benchmark": lambda: benchmark_table("benchmarks/results/speed.json", ("training", "attack", "data")),
        "growth": lambda: benchmark_table("benchmarks/results/speed.json", ("growth",)),
        "profile": profile_table,
        "export": lambda: benchmark_table("results/export.json", ("export",)),
        "low precision": low_precision_table,
    },
}


def main() -> None:
    """Rewrite the pages."""
    for page, blocks in BLOCKS.items():
        text = (ROOT / page).read_text()
        for block, content in blocks.items():
            parts = re.split(rf"(?<=<!-- {block} -->\n).*?(?=<!-- /{block} -->)", text, flags=re.S)
            text = f"{content()}\n".join(parts)
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
