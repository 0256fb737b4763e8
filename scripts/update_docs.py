"""Write the figures in results/ into README.md and docs/, between their markers.

python scripts/update_docs.py
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from advmoe import migrations, networks
from advmoe.attacks.registry import ATTACKS
from advmoe.benchmark.machine import Machine
from advmoe.benchmark.rows import Report, Row, number
from advmoe.benchmark.suites.low_precision import ATTACKED, IMAGES
from advmoe.evaluation.record import Record, record_schema
from advmoe.evaluation.record_file import checked_record, read_record
from advmoe.export import CALIBRATION
from advmoe.files import drafted, write_atomically
from advmoe.reports.answers import answers
from advmoe.reports.cell import Cell, cell_of
from advmoe.reports.choice import differences_from_control
from advmoe.reports.collect import collect
from advmoe.reports.control import compared, worst_case_difference
from advmoe.reports.costs import profile_markdown
from advmoe.reports.markup import Statement
from advmoe.reports.measures import Measure, label, measured
from advmoe.reports.plots import frontier
from advmoe.reports.styles import in_words, network_title, radius, style_of
from advmoe.reports.summaries import summarise
from advmoe.reports.verdict import check_lines, verdict
from advmoe.wording import number_of

ROOT = Path(__file__).parents[1]
COST_COLUMNS = ("GMACs", "against dense")
FLAGSHIP = "cifar10-w32"
MORE_IMAGES = "results/evaluation/cifar10_quick_4000.json"  # 4,000 test images instead of 1,000
RUN_PREFIX = "cifar10-resnet18-"  # of the runs and recipes in results/cifar10-jpeg and results/choices
IMAGE = "docs/images/robustness.png"
DIGEST = "records"  # name of the PNG's text


def accuracies(records: list[Record]) -> list[Measure]:
    """The columns of a table of these Records."""
    return [measure for measure in measured(records) if measure.summary]


def title(cell: Cell) -> str:
    """'AT (MoE), one expert': a network's name without its model scale and number of experts."""
    return style_of(cell).title + ", one expert" * cell.has_one_expert


def row(record: Record, measures: list[Measure]) -> str:
    """One Record as a line of the table; a measure that it lacks is blank."""
    low, high = record.worst_interval
    worst, *others = ["" if (value := measure.value(record)) is None else f"{value:.1f}" for measure in measures]
    reduction = "" if record.gmacs == record.gmacs_dense else f"{-record.reduction:+.0f} %"
    cells = [title(cell_of(record)), f"{worst} ({low:.0f} to {high:.0f})", *others, f"{record.gmacs:.4f}", reduction]
    return f"| {' | '.join(cells)} |"


def table(records: list[Record]) -> str:
    """Records that were attacked alike as a Markdown table, with a sentence that describes them."""
    first, measures = records[0], accuracies(records)
    columns = [*(measure.label for measure in measures), *COST_COLUMNS]
    head = ["| network | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    config = first.config
    caption = (
        f"ResNet-18 of width {config.model.width}, {first.train_images} training images of {first.dataset}, "
        f"{config.training.epochs} epochs, one seed; {first.test_images} test images, {radius(first.epsilon)}, "
        f"`--{'quick' if first.ra_worst is None else 'standard'}`; percent, 95 % interval in brackets."
    )
    return "\n".join([*head, *(row(record, measures) for record in records), "", caption])


def standard() -> str:
    """The networks under --standard, and the self-checks that they failed."""
    evaluated = records("results/evaluation/cifar10_standard.json")
    failed = [
        f"{title(cell_of(record))}, check {check.number} ({check.detail.partition(';')[0].removesuffix('.')})"
        for record in evaluated
        for check in record.evaluation.checks
        if check.status == "fail"
    ]
    checks = f"[Self-checks](docs/evaluation.md#self-checks) that failed, so RA-50 or RA-AA is too high: {'; '.join(failed)}."
    return f"{table(evaluated)}\n\n{checks}"


def in_bold(statement: Statement) -> str:
    """A statement of the verdict in Markdown, with its answer in bold."""
    return f"**{statement.answer}** {statement.figures}".strip()


def demo() -> str:
    """The figures of a demo, and its answers."""
    demonstrated = records("results/demo/records.json")
    return "\n\n".join([table(demonstrated), *map(in_bold, answers(demonstrated))])


def networks_table() -> str:
    """The networks of the package, the most robust one of each data set first; and how FLAGSHIP compares."""
    records = [(name, read_record(networks.record_file(name))) for name in networks.names()]
    lines = ["| name | data | method | RA-worst (95 % interval) | SA | GMACs | MB |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name, record in sorted(records, key=lambda pair: (pair[1].dataset, -pair[1].worst)):
        bound = "at most " if record.ra_worst is None else ""
        size = networks.weights(name).stat().st_size / 1e6
        low, high = record.worst_interval
        figures = f"{bound}{record.worst:.1f} ({low:.0f} to {high:.0f}) | {record.sa:.1f} | {record.gmacs:.4f} | {size:.1f}"
        lines.append(f"| `{name}` | {record.dataset} | {title(cell_of(record))} | {figures} |")
    compared = dict(records)
    difference = worst_case_difference([(compared[FLAGSHIP], compared[f"{FLAGSHIP}-small-dense"])])
    assert difference is not None  # both were evaluated on the same images
    against = (
        f"`{FLAGSHIP}` against the small dense network of about the same cost, in the worst case on the same images: "
        f"{difference.words}."
    )
    return "\n".join([*lines, "", against])


def read(path: str) -> Any:
    """A JSON file of the repository."""
    return migrations.renamed(json.loads((ROOT / path).read_text()))


def records(path: str) -> list[Record]:
    """The Records of a file of the repository."""
    return [checked_record(content, path) for content in read(path)]


def report(name: str) -> Report:
    """A file that `advmoe benchmark --json` wrote."""
    return Report.read(ROOT / "results/benchmarks" / f"{name}.json")


def benchmark_table(name: str, suites: tuple[str, ...], targets: bool = True) -> str:
    """The ratios and exponents of some suites in a benchmark's file."""
    source = report(name)
    lines = ["| what | measured (rounds) | target |", "| --- | ---: | ---: |"]
    for row in source.rows:
        if row.suite in suites and row.unit in ("ratio", "exponent") and row.value is not None and row.spread is not None:
            lines.append(f"| {row.name} | {ratio_text(row)} | {target_text(row) if targets else ''} |")
    return "\n".join([*lines, "", machine_text(source.machine)])


def ratio_text(row: Row) -> str:
    """'2.07 (1.44 to 3.71)'; of small ratios four decimals."""
    assert row.value is not None
    assert row.spread is not None
    digits = 4 if row.unit == "ratio" and row.value < 0.01 else 2
    return f"{row.value:.{digits}f} ({row.spread[0]:.{digits}f} to {row.spread[1]:.{digits}f})"


def target_text(row: Row) -> str:
    """'>= 2.0', '>= 3.0 **missed**', or nothing."""
    return f"{row.target}{'' if row.met else ' **missed**'}" if row.target else ""


GLANCE = (  # the most important rows: file, case, variant, question
    ("inference", "ResNet-18, batch 64", "dense / MoE", "How much faster than the dense network, batch 64, PyTorch"),
    ("inference", "ResNet-18, batch 1", "dense / MoE", "How much faster than the dense network, one image, PyTorch"),
    ("inference", "ResNet-18, batch 64", "MoE / small dense", "How much slower than the small dense network of about equal cost"),
    ("export", "batch 1, 2 threads", "dense, ONNX / routed, ONNX", "How much faster than dense, one image, ONNX Runtime"),
    ("training", "iteration, ResNet-18, batch 128", "AdvMoE / AT (Dense)", "Time of an AdvMoE iteration, relative to AT (Dense)"),
    ("memory", "peak memory, iteration, ResNet-18, batch 128", "AdvMoE / AT (Dense)", "Peak memory, relative to AT (Dense)"),
    (
        "scaling",
        "advmoe, ResNet-18 of width 16, batch 64 a process",
        "2 processes / 1 process",
        "Images per second, two processes relative to one",
    ),
)


def glance_table() -> str:
    """The most important ratios."""
    lines = ["| question | ratio (rounds) | target |", "| --- | ---: | ---: |"]
    for file, case, what, question in GLANCE:
        row = pivot(report(file).rows)[case][what]
        lines.append(f"| {question} | {ratio_text(row)} | {target_text(row)} |")
    return "\n".join([*lines, "", machine_text(report("inference").machine)])


def machine_text(machine: Machine) -> str:
    """'2 threads of AMD EPYC, 24 GiB, torch 2.13.0.'"""
    memory = "" if machine.memory is None else f", {machine.memory / 2**30:.0f} GiB"
    return f"{machine.threads} threads of {machine.cpu}{memory}, torch {machine.libraries['torch']}."


def pivot(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case and then by variant."""
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row.case, {})[row.what] = row
    return table


def main_records() -> list[Record]:
    """The Records that README shows."""
    return collect(ROOT / "results/cifar10-jpeg")


def methods_table() -> str:
    """The methods at the paper's usual model scale, mean and sample deviation over seeds."""
    measures = accuracies(main_records())
    columns = [*(measure.label for measure in measures), *COST_COLUMNS, "seeds"]
    lines = [f"| network | recipe | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    summaries = [summary for summary in summarise(main_records()) if summary.cell.model_scale in (0.5, 1.0)]
    recipes = {cell_of(record): name for name, seeds in by_network(main_records()).items() for record in seeds.values()}
    for summary in summaries:
        figures = summary.figures
        cells = [figures[measure.name].text(1) if measure.name in figures else "" for measure in measures]
        reduction = figures["reduction"].mean
        cost = [f"{figures['gmacs'].mean:.4f}", f"{-reduction:+.0f} %" if reduction else "", str(summary.n)]
        lines.append(f"| {title(summary.cell)} | `{recipes[summary.cell]}` | {' | '.join([*cells, *cost])} |")
    caption = f"{in_words(summaries[0].cell)}; mean ± sample deviation over the seeds, percent. Recipes begin with `{RUN_PREFIX}`."
    return "\n".join([*lines, "", caption])


def robustness() -> str:
    """The image of robustness against cost, with the verdict's answers and the limits of these runs."""
    checks = check_lines(main_records())
    first, choice = [line for line in verdict(main_records()) if line not in checks]
    best, close, others = first.figures.partition(" Not clearly below it ")
    if close:
        by, _, names = others.partition(": ")
        nearest, *more = names.partition(". ")[0].split("; ")
        rest = f", and {number_of(len(more), 'other')}, down to {more[-1]}" if more else ""
        best += f"{close}{by}: {nearest}{rest} ([table](#figures))."
    lines = [f"**{first.answer}** {best}", f"**{choice.answer}** {choice_text()}"]
    alt = "Worst-case robust accuracy of each method with its interval (y axis) against GMACs (x axis)"
    return "\n\n".join([f"![{alt}]({IMAGE})", "\n".join(lines), scale_text(main_records()[0])])


def choice_text() -> str:
    """How AdvMoE, with and without -plus, compares with its control, for README."""

    def compare(evaluated: list[Record]) -> str:
        differences = [
            f"{title(cell)} {against.difference.words}"
            for cell, against in differences_from_control(evaluated).items()
            if cell.method == "advmoe" and cell.model_scale == 0.5 and not cell.variant
        ]
        return "; ".join(differences)

    return (
        "RA-worst (quick) minus that of the control trained with the same options, on the same images: "
        f"{compare(main_records())}. On 4,000 test images: {compare(records(MORE_IMAGES))}. "
        "These intervals cover the images and not the seeds, so they do not decide the question "
        "([the rule](docs/report.md#which-network-is-ahead), [more comparisons](docs/choices.md#does-choosing-an-expert-help))."
    )


def choice_table(evaluated: list[Record]) -> str:
    """The methods over seeds, and each routed network's difference from its control."""
    differences = differences_from_control(evaluated)
    lines = ["| network | GMACs | SA | RA-50 | RA-worst (quick) | seeds | against one expert, image by image |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for summary in summarise(evaluated):
        figures = [summary.figures[name].text(1) for name in ("sa", "ra_50", "ra_worst_quick")]
        against = str(differences.get(summary.cell, ""))
        cells = [network_title(summary.cell), f"{summary.figures['gmacs'].mean:.4f}", *figures, str(summary.n), against]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PAIRS = (  # runs of the sweeps at the size of five_methods.yaml, each with the one that it is compared with
    ("at_dense", "at_small_dense"),
    ("at_sparse", "at_small_dense"),
    ("at_moe", "at_small_dense"),
    ("advmoe", "at_small_dense"),
    ("at_moe-n1", "at_small_dense"),
    ("at_moe-n1-half", "at_moe-n1"),
    ("at_moe", "at_moe-n1-half"),
    ("advmoe", "at_moe-n1-half"),
    ("advmoe-plus", "advmoe"),
    ("at_moe-plus", "at_moe"),
    ("at_moe-n1-plus", "at_moe-n1"),
    ("at_small_dense-plus", "at_small_dense"),
    ("advmoe-plus", "at_small_dense"),
    ("advmoe-plus", "at_small_dense-plus"),
    ("advmoe-plus", "at_dense"),
    ("advmoe-r0.2", "at_small_dense-r0.2"),
    ("advmoe-r0.2-plus", "advmoe-r0.2"),
)


def by_network(evaluated: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Network -> seed -> Record: the run cifar10-resnet18-advmoe-plus-s0 is seed 0 of the network advmoe-plus."""
    runs: dict[str, dict[int, Record]] = {}
    for record in evaluated:
        assert record.run is not None  # a sweep names its runs
        runs.setdefault(record.run.removeprefix(RUN_PREFIX).removesuffix(f"-s{record.seed}"), {})[record.seed] = record
    return runs


def paired_seeds(runs: dict[str, dict[int, Record]], network: str, other: str) -> list[tuple[Record, Record]]:
    """The Records of two networks, for each seed that both have."""
    return [(record, runs[other][seed]) for seed, record in runs.get(network, {}).items() if seed in runs.get(other, {})]


def pairs_table() -> str:
    """The differences of the `PAIRS` in the worst case, over the seeds that both have."""

    def title(network: str, record: Record) -> str:
        return network_title(cell_of(record)) + (", half of the images" if network.endswith("-half") else "")

    half = by_network(records("results/choices/half_images.json"))
    runs = by_network(main_records()) | {f"{network}-half": seeds for network, seeds in half.items()}
    lines = ["| network | compared with | RA-worst (quick), image by image | seeds |", "| --- | --- | ---: | --- |"]
    for network, other in PAIRS:
        pairs = compared(paired_seeds(runs, network, other))
        if difference := worst_case_difference(pairs):
            names = [title(name, record) for name, record in zip((network, other), pairs[0], strict=True)]
            lines.append(f"| {' | '.join(names)} | {difference.words} | {', '.join(str(record.seed) for record, _ in pairs)} |")
    return "\n".join(lines)


def bound(value: float) -> str:
    """'+1.3'; near 0 with one significant digit, which says on which side it is: '-0.03'."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else f"{value:+.1g}"


def gains_table(evaluated: Iterable[tuple[str, Record]]) -> str:
    """What choosing an expert gains over each expert in every layer, in the worst case, of each named Record that measured it."""
    lines = ["| network | seed | RA-worst (quick) | each expert alone | at least one of them | gain over each, points |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, record in evaluated:
        routing = record.evaluation.routing
        if routing is None or len(routing.choice_gain_worst) < 2:
            continue
        alone = ", ".join(f"{value:.1f}" for value in routing.fixed_expert_ra_worst)
        either = "" if routing.any_expert_ra_worst is None else f"{routing.any_expert_ra_worst:.1f}"
        gains = "; ".join(f"{gain.value:+.1f} ({bound(gain.low)} to {bound(gain.high)})" for gain in routing.choice_gain_worst)
        lines.append(f"| {' | '.join([name, str(record.seed), f'{record.worst:.1f}', alone, either, gains])} |")
    return "\n".join(lines)


def gains_of_networks(evaluated: list[Record]) -> str:
    """The gains by choosing an expert, each run with the name of its network."""
    return gains_table((network_title(cell_of(record)), record) for record in evaluated)


def gains_of_ingredients() -> str:
    """The gains by choosing an expert in the runs of the ingredients."""
    runs = by_network(records("results/choices/ingredients.json"))
    return gains_table((f"`{variant}`", record) for variant, seeds in runs.items() for record in seeds.values())


def ingredients_table() -> str:
    """Each variant of results/choices/ingredients.json, mean over its seeds, with its differences from two runs: the same network
    without the ingredient, and the control with the same ingredient. RA-10 is also that of its experts alone, their mean."""
    runs = by_network(records("results/choices/ingredients.json"))

    def against(variant: str, other: str) -> str:
        difference = None if variant == other else worst_case_difference(paired_seeds(runs, variant, other))
        return "" if difference is None else difference.words

    def expert_alone(record: Record) -> float | None:
        routing = record.evaluation.routing
        if routing is None or len(routing.fixed_expert_ra) == 1:
            return None
        return fmean(routing.fixed_expert_ra)

    def mean_text(of_seeds: Iterable[float | None]) -> str:
        values = [value for value in of_seeds if value is not None]
        return f"{fmean(values):.1f}" if values else ""

    columns = ["RA-10 of an expert alone", "RA-10", "RA-50", "RA-worst (quick)", "minus its base", "minus the control"]
    lines = [f"| run | seeds | SA | {' | '.join(columns)} |", "| --- | --- | ---: |" + " ---: |" * len(columns)]
    for variant, seeds in runs.items():
        network = "at_moe-n1" if variant.startswith("at_moe-n1-") else variant.partition("-")[0]
        rows = [(record.sa, expert_alone(record), record.ra["10"], record.ra["50"], record.worst) for record in seeds.values()]
        means = map(mean_text, zip(*rows, strict=True))
        differences = [against(variant, f"{network}-base"), against(variant, variant.replace(network, "at_moe-n1"))]
        lines.append(f"| {' | '.join([f'`{variant}`', ', '.join(map(str, sorted(seeds))), *means, *differences])} |")
    return "\n".join(lines)


def scale_text(record: Record) -> str:
    """How much smaller the runs are than those of the paper."""
    config = record.config
    size = f"width {config.model.width} instead of 64, {config.training.epochs} epochs instead of 100"
    return (
        f"The scale is small: {size}, {record.train_images:,} training and {record.test_images:,} test images. These runs compare "
        "the networks at this scale only, and cannot confirm the paper's figures. One network is ahead of another only if their "
        "intervals over seeds and images do not overlap ([the rule](docs/report.md#which-network-is-ahead))."
    )


def draw_image() -> None:
    """Draw docs/images/robustness.png, with the digest of its Records inside."""
    text = PngInfo()
    text.add_text(DIGEST, records_digest())
    with TemporaryDirectory() as folder, drafted(ROOT / IMAGE) as draft:
        frontier(main_records(), Path(folder, "image.png"))
        with Image.open(Path(folder, "image.png")) as image:
            image.save(draft, "PNG", pnginfo=text, optimize=True)


def records_digest() -> str:
    """SHA-256 of the Records behind the image."""
    return hashlib.sha256("".join(record.model_dump_json() for record in main_records()).encode()).hexdigest()


def low_precision_table() -> str:
    """Exported networks in each precision: clean accuracy, and robust accuracy of the first one."""
    columns = ("SA", "same class", "same route", "RA: transferred", "RA: attacked itself", "RA: both", "size")
    lines = [f"| network, file | {' | '.join(columns)} (MB) |", "| --- |" + " ---: |" * len(columns)]
    for case, rows in pivot(report("low_precision").rows).items():
        cells = [number(rows[name].value, rows[name].unit) if name in rows else "" for name in columns]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    caption = (
        f"{IMAGES} test images of the embedded data set, percent; RA is {label('ra_worst_quick')} on {ATTACKED} of them; "
        f"int8 calibrated on {CALIBRATION} training images."
    )
    return "\n".join([*lines, "", caption])


def export_table() -> str:
    """The ratios of the benchmark of exports: a line for each comparison, a column for each batch and number of threads."""
    source = report("export")
    cases = pivot(row for row in source.rows if row.unit == "ratio")
    titles = [case.partition(" (")[0] for case in cases]
    lines = [f"| ratio (rounds), target | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for what in next(iter(cases.values())):
        cells = [", ".join(filter(None, (ratio_text(rows[what]), target_text(rows[what])))) for rows in cases.values()]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_text(source.machine)])


def parts_table(name: str) -> str:
    """The milliseconds that each part takes, from a benchmark's file."""
    table = pivot(row for row in report(name).rows if row.unit == "s")
    *_, last = table
    kinds, title = list(table[last]), last.removesuffix("all")
    lines = [f"| part | {' | '.join(kinds)} |", "| --- |" + " ---: |" * len(kinds)]
    for case, rows in table.items():
        lines.append(f"| {case.removeprefix(title)} | {' | '.join(number(rows[kind].value, rows[kind].unit) for kind in kinds)} |")
    return "\n".join(lines)


def attacks_table() -> str:
    """Every attack that `advmoe evaluate --attacks` takes."""
    lines = ["| name | attack | passes |", "| --- | --- | ---: |"]
    lines += [f"| `{name}` | {attack.words} | {attack.passes:,} |" for name, attack in ATTACKS.items()]
    return "\n".join(lines)


def faults_table() -> str:
    """The faults injected into running processes, and how often the run survived."""
    results = read("results/faults.json")
    lines = ["| fault | methods | done | survived |", "| --- | ---: | ---: | ---: |"]
    for fault in dict.fromkeys(row["fault"] for row in results["faults"]):
        rows = [row for row in results["faults"] if row["fault"] == fault]
        done, survived = (sum(row[name] for row in rows) for name in ("tried", "survived"))
        lines.append(f"| {fault} | {len(rows)} | {done} | {survived}{'' if survived == done else ' **fewer**'} |")
    versions = in_versions(results["versions"] | {name: results[name] for name in ("advmoe", "commit") if name in results})
    caption = f"`{results['command']}`, seed {results['seed']}, {versions}."
    return "\n".join([*lines, "", caption])


def fuzz_table() -> str:
    """The number of hostile inputs that each reader was tested with."""
    results = read("results/fuzz.json")
    lines = ["| reader | inputs | seconds | failures |", "| --- | ---: | ---: | ---: |"]
    for row in results["readers"]:
        lines.append(f"| {row['reader']} | {row['inputs']:,} | {row['seconds']:.0f} | {row['failures']} |")
    return "\n".join([*lines, "", f"`{results['command']}`, {in_versions(results['versions'])}."])


def in_versions(versions: dict[str, str]) -> str:
    """'python 3.11.7, torch 2.13.0'."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def schema() -> str:
    """docs/record.schema.json."""
    return json.dumps(record_schema(), indent=1) + "\n"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "robustness": robustness,
        "methods": methods_table,
        "networks": networks_table,
        "standard": standard,
    },
    "docs/start.md": {"demo": demo},
    "docs/choices.md": {
        "choice": lambda: choice_table(main_records()),
        "pairs": pairs_table,
        "gains": lambda: gains_of_networks(main_records()),
        "more images": lambda: choice_table(records(MORE_IMAGES)),
        "gains on more images": lambda: gains_of_networks(records(MORE_IMAGES)),
    },
    "docs/ingredients.md": {"ingredients": ingredients_table, "gains": gains_of_ingredients},
    "docs/evaluation.md": {"attacks": attacks_table},
    "docs/cost.md": {"profile": profile_markdown},
    "docs/reliability.md": {
        "scaling": lambda: benchmark_table("scaling", ("scaling",)),
        "faults": faults_table,
        "fuzz": fuzz_table,
    },
    "docs/performance.md": {
        "glance": glance_table,
        "inference": lambda: benchmark_table("inference", ("inference",)),
        "training": lambda: benchmark_table("training", ("training",)),
        "narrow training": lambda: benchmark_table("training_width16", ("training",), targets=False),
        "memory": lambda: benchmark_table("memory", ("memory",)),
        "benchmark": lambda: benchmark_table("speed", ("attack", "data")),
        "waiting": lambda: benchmark_table("waiting", ("waiting",)),
        "growth": lambda: benchmark_table("growth", ("growth",)),
        "operators": lambda: parts_table("operators"),
        "iteration": lambda: parts_table("iteration"),
        "export": export_table,
        "low precision": low_precision_table,
    },
}


def main() -> None:
    """Rewrite the pages. Raises ValueError if a page has no such block."""
    for page, blocks in BLOCKS.items():
        text = (ROOT / page).read_text()
        for block, content in blocks.items():
            parts = re.split(rf"(?<=<!-- {block} -->\n).*?(?=<!-- /{block} -->)", text, flags=re.S)
            if len(parts) == 1:
                raise ValueError(f"{page}: has no block between <!-- {block} --> and <!-- /{block} -->")
            text = f"{content()}\n".join(parts)
        write_atomically(ROOT / page, text)
    write_atomically(ROOT / "docs/record.schema.json", schema())
    draw_image()


if __name__ == "__main__":
    main()
