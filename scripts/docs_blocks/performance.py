"""The blocks of docs/performance.md and docs/cost.md: figures of `advmoe benchmark`, and counted costs, also of all recipes."""

from collections.abc import Iterable

from advmoe.benchmark.machine import Machine
from advmoe.benchmark.rows import Row, number
from advmoe.benchmark.suites.low_precision import ATTACKED, IMAGES
from advmoe.export import CALIBRATION
from advmoe.recipes import RECIPES, recipe
from advmoe.reports.measures import label
from advmoe.reports.recipe_list import less
from advmoe.runs.cost import dense_estimate, estimate
from docs_blocks.markdown import table
from docs_blocks.sources import report

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
BACKBONES = (
    *(f"cifar10-{backbone}" for backbone in ("resnet18", "wrn28_10", "vgg16_bn", "densenet40")),
    *(f"imagenet-{backbone}" for backbone in ("resnet18", "wrn28_10", "vgg16_bn", "densenet121")),
)
KINDS = {"dense": "at_dense", "small dense": "at_small_dense", "MoE": "advmoe"}


def glance() -> str:
    """The most important ratios."""
    rows = []
    for file, case, what, question in GLANCE:
        row = pivot(report(file).rows)[case][what]
        rows.append([question, ratio_text(row), target_text(row)])
    return f"{table(['question', 'ratio (rounds)', 'target'], rows)}\n\n{machine_text(report('inference').machine)}"


def ratios(name: str, suites: tuple[str, ...], targets: bool = True) -> str:
    """The ratios and exponents of some suites in a benchmark's file."""
    source = report(name)
    rows = [
        [row.name, ratio_text(row), target_text(row) if targets else ""]
        for row in source.rows
        if row.suite in suites and row.unit in ("ratio", "exponent") and row.value is not None and row.spread is not None
    ]
    return f"{table(['what', 'measured (rounds)', 'target'], rows)}\n\n{machine_text(source.machine)}"


def exports() -> str:
    """The ratios of the benchmark of exports: a line for each comparison, a column for each batch and number of threads."""
    source = report("export")
    cases = pivot(row for row in source.rows if row.unit == "ratio")
    rows = [
        [what, *(", ".join(filter(None, (ratio_text(of[what]), target_text(of[what])))) for of in cases.values())]
        for what in next(iter(cases.values()))
    ]
    columns = ["ratio (rounds), target", *(case.partition(" (")[0] for case in cases)]
    return f"{table(columns, rows)}\n\n{machine_text(source.machine)}"


def low_precision() -> str:
    """Exported networks in each precision: clean accuracy, and robust accuracy of the first one."""
    columns = ("SA", "same class", "same route", "RA: transferred", "RA: attacked itself", "RA: both", "size")
    rows = [
        [case, *(number(of[name].value, of[name].unit) if name in of else "" for name in columns)]
        for case, of in pivot(report("low_precision").rows).items()
    ]
    caption = (
        f"{IMAGES} test images of the embedded data set, percent; RA is {label('ra_worst_quick')} on {ATTACKED} of them; "
        f"int8 calibrated on {CALIBRATION} training images."
    )
    return f"{table(['network, file', *columns[:-1], f'{columns[-1]} (MB)'], rows)}\n\n{caption}"


def parts(name: str) -> str:
    """The milliseconds that each part takes, from a benchmark's file."""
    cases = pivot(row for row in report(name).rows if row.unit == "s")
    *_, last = cases
    kinds, title = list(cases[last]), last.removesuffix("all")
    rows = [[case.removeprefix(title), *(number(of[kind].value, of[kind].unit) for kind in kinds)] for case, of in cases.items()]
    return table(["part", *kinds], rows)


def costs() -> str:
    """Parameters and GMACs of every backbone, dense, small dense and with experts, at r = 0.5 and N = 2."""
    rows = []
    for name in BACKBONES:
        for title, method in KINDS.items():
            config = recipe(f"{name}-{method}")
            network, dense = estimate(config), dense_estimate(config)
            versus = "" if network == dense else f"{-less(network.gmacs, dense.gmacs):+.1f} %"
            rows.append([name.replace("-", ", ", 1), title, f"{network.params / 1e6:.2f} M", f"{network.gmacs:.3f}", versus])
    return table(["images, backbone", "network", "parameters", "GMACs", "against dense"], rows, texts=2)


def recipe_table(names: Iterable[str]) -> str:
    """The costs of these recipes as CSV, counted on the networks' shapes."""
    costs = {name: (estimate(RECIPES[name]), dense_estimate(RECIPES[name])) for name in names}
    rows = (f"{name},{network.params},{network.gmacs!r},{dense.params},{dense.gmacs!r}" for name, (network, dense) in costs.items())
    return "\n".join(["recipe,params,gmacs,params_dense,gmacs_dense", *rows]) + "\n"


def ratio_text(row: Row) -> str:
    """'2.07 (1.44 to 3.71)'; of small ratios four decimals."""
    assert row.value is not None
    assert row.spread is not None
    digits = 4 if row.unit == "ratio" and row.value < 0.01 else 2
    return f"{row.value:.{digits}f} ({row.spread[0]:.{digits}f} to {row.spread[1]:.{digits}f})"


def target_text(row: Row) -> str:
    """'>= 2.0', '>= 3.0 **missed**', or nothing."""
    return f"{row.target}{'' if row.met else ' **missed**'}" if row.target else ""


def machine_text(machine: Machine) -> str:
    """'2 threads of AMD EPYC, 24 GiB, torch 2.13.0.'"""
    memory = "" if machine.memory is None else f", {machine.memory / 2**30:.0f} GiB"
    return f"{machine.threads} threads of {machine.cpu}{memory}, torch {machine.libraries['torch']}."


def pivot(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case and then by variant."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.what] = row
    return cases
