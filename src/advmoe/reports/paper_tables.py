"""The paper's tables A1 and A2 beside our runs, and one more table for each other setting."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from advmoe.config import ModelConfig
from advmoe.evaluation.record import Record
from advmoe.paper import PAPER_METHODS, PrintedCell, printed_cells
from advmoe.recipes import recipe
from advmoe.reports.cell import Cell, is_full_scale, is_routed
from advmoe.reports.markup import Entry, Table
from advmoe.reports.measures import BY_NAME, COSTS, SUMMARY, WORST, label
from advmoe.reports.paper_costs import Judged, judged_cells
from advmoe.reports.styles import Style, method_style, setting_text, style_of
from advmoe.reports.summaries import Summary, attacks_in_words, by_setting, summarise

BACKBONES = {
    "resnet18": "ResNet-18", "wrn28_10": "WRN-28-10", "vgg16_bn": "VGG-16", "densenet40": "DenseNet-40",
    "densenet121": "DenseNet-121",
}  # fmt: skip
TITLES = {
    "A1": "Table A1: training attack of 10 steps, CIFAR-10",
    "A2": "Table A2: model scales, training attack of 2 steps, CIFAR-10",
}
CIFAR10 = (49_000, 10_000)  # training images less the 2 % held out, and test images
PRINTED_AS = {"ra": BY_NAME["ra_50"], "ra_aa": BY_NAME["ra_aa"], "sa": BY_NAME["sa"]}  # field of the printed table -> measure
COLUMNS = ("printed", "ours", "difference")
NOT_RUN, NOT_MEASURED, BLANK = Entry("not run"), Entry("not measured"), Entry("")
MIXED = "The runs of the seeds were attacked by different attacks, so their worst cases have no common mean."
PRINTED = (
    "Only runs of the printed setting are listed; a numbered note says why a printed cell cannot be right. The difference is our "
    "figure minus the printed one."
)
MEANING = (
    "Accuracies in percent, mean ± sample deviation over n seeds. RA-50 is the accuracy under PGD-50. RA-worst counts the "
    "images that no attack broke, including AutoAttack and the attacks on routing; with fewer attacks the column is called quick "
    "(the preset quick) or listed attacks (any others). Two networks are ranked only if both have several seeds and their "
    "intervals do not overlap. Such an interval contains the 95 % interval over n seeds, mean ± t(n - 1, 0.975) s / sqrt(n), and "
    "the Wilson interval on the test images."
)
UNRELIABLE = "RA-AA is more than half a point above RA-worst: AutoAttack alone overestimates the robustness of this network."


class Notes:
    """Numbered notes of a table. `uneven` are the worst cases for which the table's `runs` were attacked differently, and that
    of listed attacks: each such figure gets a note with its attacks."""

    def __init__(self, runs: Iterable[Summary]) -> None:
        self.texts: list[str] = []
        plans = {name: {run.attacks[name] for run in runs if name in run.attacks} for name in WORST}
        self.uneven = {name for name, sets in plans.items() if len(sets) > 1} | {"ra_worst_listed"}

    def mark(self, *texts: str) -> tuple[int, ...]:
        """The numbers of these notes; a new note is appended."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return tuple(sorted(self.texts.index(text) + 1 for text in texts))


def tables(records: Iterable[Record]) -> list[Table]:
    """Tables A1 and A2, then one for every other setting that was run, whose rows have the order of the Records (see `collect`)."""
    summaries = summarise(records)
    others = [summary for summary in summaries if not any(is_run_of(summary, cell) for cell in printed_cells())]
    everything, names = by_setting(summaries), list[str]()
    our_tables = []
    for setting, group in by_setting(others).items():
        names.append(_unused(_file_name(setting), names))
        our_tables.append(_our_table(names[-1], setting, group, _missing(everything[setting])))
    return [*(_paper_table(name, summaries) for name in TITLES), *our_tables]


def is_run_of(summary: Summary, printed: PrintedCell) -> bool:
    """Whether a cell of our runs has exactly the printed setting, with all of the data."""
    return summary.cell == _expected(printed) and not summary.departures


def _expected(printed: PrintedCell) -> Cell:
    """The cell that runs of the printed setting have."""
    config = recipe(printed.recipe)
    return Cell(
        printed.dataset, printed.model, None, printed.method, printed.model_scale,
        config.model.num_experts if is_routed(printed.method) else 1, printed.attack_steps, config.attack.epsilon, "Linf",
        config.training.epochs, *CIFAR10,
    )  # fmt: skip


def _paper_table(name: str, summaries: Sequence[Summary]) -> Table:
    judged = [judged_cell for judged_cell in judged_cells() if judged_cell.cell.table == name]
    runs = [next((summary for summary in summaries if is_run_of(summary, judged_cell.cell)), None) for judged_cell in judged]
    printed = [field for field in PRINTED_AS if any(getattr(judged_cell.cell, field) is not None for judged_cell in judged)]
    existing = [run for run in runs if run is not None]
    worst = ["ra_worst", *(name for name in WORST[1:] if any(name in (*run.figures, *run.mixed) for run in existing))]
    notes = Notes(existing)
    columns = [
        "backbone", "r", "method", "n", *(f"{PRINTED_AS[field].label}, {column}" for field in printed for column in COLUMNS),
        *([] if "ra_aa" in printed else [f"{label('ra_aa')}, ours"]), *(f"{label(name)}, ours" for name in worst),
        *(f"{title}, {column}" for title in (measure.column for measure in COSTS) for column in COLUMNS[:2]),
    ]  # fmt: skip
    pairs = sorted(zip(judged, runs, strict=True), key=lambda pair: pair[1] is None)  # cells that were run first
    rows = tuple(_paper_row(judged_cell, run, printed, worst, notes) for judged_cell, run in pairs)
    about, not_run = f"{PRINTED} {MEANING}", runs.count(None)
    return Table(f"table_{name.lower()}", TITLES[name], tuple(columns), rows, about, tuple(notes.texts), not_run)


def _paper_row(
    judged: Judged, run: Summary | None, printed: Sequence[str], worst: Sequence[str], notes: Notes
) -> tuple[Entry, ...]:
    cell = judged.cell
    accuracies = [entry for field in printed for entry in _compared(cell, field, run, notes)]
    extra = [] if "ra_aa" in printed else [ours(run, "ra_aa", notes)]
    marks = notes.mark(*judged.reasons)
    cost = [Entry(f"{cell.gflops:.2f}", cell.gflops, marks=marks), ours(run, "gmacs", notes)]
    reduction = BLANK if cell.reduction is None else Entry(f"{cell.reduction:.0f}", cell.reduction, marks=marks)
    return (
        *_model_entries(cell.model, cell.model_scale, method_style(cell.method)), _seeds(run, notes) if run else NOT_RUN,
        *accuracies, *extra, *(ours(run, name, notes) for name in worst), *cost, reduction, ours(run, "reduction", notes),
    )  # fmt: skip


def _seeds(run: Summary, notes: Notes) -> Entry:
    """The number of seeds, with a note if they were trained by different code."""
    by = run.trained_by
    marks = notes.mark(f"The seeds were trained by different code: {'; '.join(by)}.") if len(by) > 1 else ()
    return Entry(str(run.n), run.n, marks=marks)


def _compared(cell: PrintedCell, field: str, run: Summary | None, notes: Notes) -> tuple[Entry, Entry, Entry]:
    """An accuracy: printed, ours, and ours minus the printed one."""
    value, std = getattr(cell, field), getattr(cell, f"{field}_std")
    figure = ours(run, PRINTED_AS[field].name, notes)
    difference = BLANK if figure.value is None else Entry(f"{figure.value - value:+.2f}", figure.value - value)
    return Entry(f"{value:.2f} ± {std:.2f}", value, std), figure, difference


def ours(run: Summary | None, name: str, notes: Notes) -> Entry:
    """The figure of the measure `name`: an entry that says so if it was not run, not measured, or has no common mean."""
    if run is None:
        return NOT_RUN
    if name in run.mixed:
        return Entry("not shown", marks=notes.mark(MIXED))
    if name not in run.figures:
        return NOT_MEASURED
    texts = [UNRELIABLE] if name == "ra_aa" and run.unreliable else []
    if name in run.attacks and name in notes.uneven:
        texts.append(f"The worst case over {attacks_in_words(run.attacks[name])}; compare it only with those of the same attacks.")
    figure = run.figures[name]
    if BY_NAME[name].unit != "%":
        figure = replace(figure, std=None)  # the cost does not depend on the seed
    text = figure.text(BY_NAME[name].digits) + (f" (n = {figure.n})" if figure.n != run.n else "")
    return Entry(text, figure.mean, figure.std, notes.mark(*texts))


def _model_entries(backbone: str, model_scale: float, style: Style) -> tuple[Entry, Entry, Entry]:
    return Entry(BACKBONES.get(backbone, backbone)), Entry(f"{model_scale:g}", model_scale), Entry(style.title)


def _our_table(name: str, setting: Cell, summaries: Sequence[Summary], missing: Sequence[tuple[float, str]]) -> Table:
    """Table of a setting that the paper does not print; `missing` are the scales and methods that were not run in it."""
    shared = [text for text in summaries[0].departures if all(text in summary.departures for summary in summaries)]
    figures = [
        measure.name for measure in SUMMARY if any(measure.name in (*summary.figures, *summary.mixed) for summary in summaries)
    ]
    words, notes = setting_text(setting), Notes(summaries)
    blanks = (BLANK, *(NOT_RUN for _ in ("n", *figures)))
    rows = [_our_row(summary, figures, shared, notes) for summary in summaries]
    rows += [(*_model_entries(setting.backbone, scale, method_style(method)), *blanks) for scale, method in missing]
    columns = ("backbone", "r", "method", "N", "n", *(BY_NAME[name].column for name in figures))
    tables_of_setting = {cell.table for cell in printed_cells() if _expected(cell).setting == setting}
    if tables_of_setting and not shared:
        about = f"The setting of table {' and '.join(sorted(tables_of_setting))}, which prints no such cells: {words}. {MEANING}"
    else:
        unusual = f"Settings unlike the default, which is in brackets: {'; '.join(shared)}. " if shared else ""
        about = f"Not a setting of the paper; do not compare with its figures. {unusual}{MEANING}"
    return Table(name, f"Our setting: {words}", columns, tuple(rows), about, tuple(notes.texts), len(missing))


def _our_row(summary: Summary, figures: Sequence[str], shared: Sequence[str], notes: Notes) -> tuple[Entry, ...]:
    cell = summary.cell
    backbone, scale, method = _model_entries(cell.backbone, cell.model_scale, style_of(cell))
    extra = [text for text in summary.departures if text not in shared]
    marks = notes.mark("In this row also: " + "; ".join(extra) + ".") if extra else ()
    experts = Entry(str(cell.num_experts), cell.num_experts) if is_routed(cell.method) else BLANK
    return (
        backbone, scale, Entry(method.text, marks=marks), experts, _seeds(summary, notes),
        *(ours(summary, name, notes) for name in figures),
    )  # fmt: skip


def _missing(summaries: Sequence[Summary]) -> list[tuple[float, str]]:
    """Model scale and method of the cells of the paper's comparison that were not run; runs with other options do not
    count."""
    cells = [summary.cell for summary in summaries]
    ran = {(cell.model_scale, cell.method) for cell in cells if cell.is_of_the_paper}
    scales = sorted({cell.model_scale for cell in cells if not is_full_scale(cell.method)} or {ModelConfig().model_scale})
    expected = [(1.0 if is_full_scale(method) else scale, method) for method in PAPER_METHODS for scale in scales]
    return [cell for cell in dict.fromkeys(expected) if cell not in ran]


def _file_name(setting: Cell) -> str:
    """'ours-fashion-mnist-resnet18-w16-6_epochs', with only letters, digits, '_', '.' and '-'."""
    width = f"-w{setting.width}" if setting.width else ""
    return re.sub(r"[^\w.-]+", "_", f"ours-{setting.dataset}-{setting.backbone}{width}-{setting.epochs}_epochs")[:100]


def _unused(name: str, taken: Sequence[str]) -> str:
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)
