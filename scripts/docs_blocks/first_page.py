"""The blocks of README.md: the methods, the networks of the package, the verdict and its image; and that of the demo."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from advmoe import networks
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import read_record
from advmoe.files import drafted
from advmoe.reports.answers import answers
from advmoe.reports.cell import Cell, cell_of
from advmoe.reports.choice import differences_from_control
from advmoe.reports.control import worst_case_difference
from advmoe.reports.measures import Measure, measured
from advmoe.reports.plots import frontier
from advmoe.reports.styles import in_words, radius, style_of
from advmoe.reports.summaries import summarise
from advmoe.reports.verdict import check_lines, verdict
from advmoe.wording import number_of
from docs_blocks.markdown import table
from docs_blocks.sources import MORE_IMAGES, ROOT, RUN_PREFIX, by_network, main_records, records

COST_COLUMNS = ("GMACs", "against dense")
FLAGSHIP = "cifar10-w32"
IMAGE = "docs/images/robustness.png"
DIGEST = "records"  # name of the PNG's text


def accuracies(evaluated: list[Record]) -> list[Measure]:
    """The columns of a table of these Records."""
    return [measure for measure in measured(evaluated) if measure.summary]


def title(cell: Cell) -> str:
    """'AT (MoE), one expert': a network's name without its model scale and number of experts."""
    return style_of(cell).title + ", one expert" * cell.has_one_expert


def record_row(record: Record, measures: list[Measure]) -> list[str]:
    """One Record as a row; a measure that it lacks is blank."""
    low, high = record.worst_interval
    values = [measure.value(record) for measure in measures]
    worst, *others = ["" if value is None else f"{value:.1f}" for value in values]
    reduction = "" if record.gmacs == record.gmacs_dense else f"{-record.reduction:+.0f} %"
    return [title(cell_of(record)), f"{worst} ({low:.0f} to {high:.0f})", *others, f"{record.gmacs:.4f}", reduction]


def record_table(evaluated: list[Record]) -> str:
    """Records that were attacked alike as a Markdown table, with a sentence that describes them."""
    first, measures = evaluated[0], accuracies(evaluated)
    config = first.config
    caption = (
        f"ResNet-18 of width {config.model.width}, {first.train_images} training images of {first.dataset}, "
        f"{config.training.epochs} epochs, one seed; {first.test_images} test images, {radius(first.epsilon)}, "
        f"`--{'quick' if first.ra_worst is None else 'standard'}`; percent, 95 % interval in brackets."
    )
    columns = ["network", *(measure.label for measure in measures), *COST_COLUMNS]
    return f"{table(columns, (record_row(record, measures) for record in evaluated))}\n\n{caption}"


def standard() -> str:
    """The networks under --standard, and the self-checks that they failed."""
    evaluated = records("results/evaluation/cifar10_standard.json")
    failed = [
        f"{title(cell_of(record))}, check {check.number} ({check.detail.partition(';')[0].removesuffix('.')})"
        for record in evaluated
        for check in record.evaluation.checks
        if check.status == "fail"
    ]
    checks = f"[Self-checks](docs/evaluation.md#self-checks) that failed, so RA-50 or RA-AA may be too high: {'; '.join(failed)}."
    return f"{record_table(evaluated)}\n\n{checks}"


def demo() -> str:
    """The figures of a demo, and its answers."""
    demonstrated = records("results/demo/records.json")
    statements = (f"**{statement.answer}** {statement.figures}".strip() for statement in answers(demonstrated))
    return "\n\n".join([record_table(demonstrated), *statements])


def packaged_networks() -> str:
    """The networks of the package, the most robust one of each data set first; and how FLAGSHIP compares."""
    packaged = {name: read_record(networks.record_file(name)) for name in networks.names()}
    rows = []
    for name, record in sorted(packaged.items(), key=lambda item: (item[1].dataset, -item[1].worst)):
        bound = "at most " if record.ra_worst is None else ""
        low, high = record.worst_interval
        size = networks.weights(name).stat().st_size / 1e6
        figures = [f"{bound}{record.worst:.1f} ({low:.0f} to {high:.0f})", f"{record.sa:.1f}", f"{record.gmacs:.4f}", f"{size:.1f}"]
        rows.append([f"`{name}`", record.dataset, title(cell_of(record)), *figures])
    difference = worst_case_difference([(packaged[FLAGSHIP], packaged[f"{FLAGSHIP}-small-dense"])])
    assert difference is not None  # both were evaluated on the same images
    columns = ["name", "data", "method", "RA-worst (95 % interval)", "SA", "GMACs", "MB"]
    against = (
        f"`{FLAGSHIP}` against the small dense network of about the same cost, in the worst case on the same images: "
        f"{difference.words}."
    )
    return f"{table(columns, rows, texts=3)}\n\n{against}"


def methods() -> str:
    """The methods at the paper's usual model scale, mean and sample deviation over seeds."""
    evaluated = main_records()
    measures = accuracies(evaluated)
    recipes = {cell_of(record): name for name, seeds in by_network(evaluated).items() for record in seeds.values()}
    summaries = [summary for summary in summarise(evaluated) if summary.cell.model_scale in (0.5, 1.0)]
    rows = []
    for summary in summaries:
        figures = summary.figures
        cells = [figures[measure.name].text(1) if measure.name in figures else "" for measure in measures]
        reduction = figures["reduction"].mean
        cost = [f"{figures['gmacs'].mean:.4f}", f"{-reduction:+.0f} %" if reduction else "", str(summary.n)]
        rows.append([title(summary.cell), f"`{recipes[summary.cell]}`", *cells, *cost])
    columns = ["network", "recipe", *(measure.label for measure in measures), *COST_COLUMNS, "seeds"]
    caption = (
        f"{in_words(summaries[0].cell)}; mean ± sample deviation over the seeds, percent. AT (Sparse) has as many epochs again, "
        f"before the others, in which it chooses its channels. Recipes begin with `{RUN_PREFIX}`."
    )
    return f"{table(columns, rows, texts=2)}\n\n{caption}"


def robustness() -> str:
    """The image of robustness against cost, with the verdict's answers and the limits of these runs."""
    evaluated = main_records()
    checks = check_lines(evaluated)
    first, choice = [line for line in verdict(evaluated) if line not in checks]
    best, close, others = first.figures.partition(" Not clearly below it ")
    if close:
        by, _, names = others.partition(": ")
        nearest, *more = names.partition(". ")[0].split("; ")
        rest = f", and {number_of(len(more), 'other')}, down to {more[-1]}" if more else ""
        best += f"{close}{by}: {nearest}{rest} ([table](#figures))."
    lines = [f"**{first.answer}** {best}", f"**{choice.answer}** {choice_text(evaluated)}"]
    alt = "Worst-case robust accuracy of each method with its interval (y axis) against GMACs (x axis)"
    return "\n\n".join([f"![{alt}]({IMAGE})", "\n".join(lines), scale_text(evaluated[0])])


def choice_text(evaluated: list[Record]) -> str:
    """How AdvMoE, with and without -plus, compares with its control."""

    def compare(compared: list[Record]) -> str:
        differences = [
            f"{title(cell)} {against.difference.words}"
            for cell, against in differences_from_control(compared).items()
            if cell.method == "advmoe" and cell.model_scale == 0.5 and not cell.variant
        ]
        return "; ".join(differences)

    return (
        "RA-worst (quick) minus that of the control trained with the same options, on the same images: "
        f"{compare(evaluated)}. On 4,000 test images: {compare(records(MORE_IMAGES))}. "
        "These intervals cover the images and not the seeds, so they do not decide the question "
        "([the rule](docs/report.md#which-network-is-ahead), [more comparisons](docs/choices.md#does-choosing-an-expert-help))."
    )


def scale_text(record: Record) -> str:
    """How much smaller the runs are than those of the paper."""
    config = record.config
    size = f"width {config.model.width} instead of 64, {config.training.epochs} epochs instead of 100"
    return (
        f"The scale is small: {size}, {record.train_images:,} training and {record.test_images:,} test images. These runs compare "
        "the networks at this scale only, and cannot confirm the paper's figures. One network is ahead of another only if their "
        "intervals over seeds and images do not overlap, and with so few test images these are about 5 points wide "
        '([the rule](docs/report.md#which-network-is-ahead)): "not ahead" means "not shown", and not "equal".'
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
