"""The paper's tables A1 and A2 beside our runs, and tables of their own for runs of other settings."""

import re
from collections.abc import Iterable, Sequence

from advmoe.config import ModelConfig
from advmoe.evaluation.record import Record
from advmoe.paper import Cell as PrintedCell
from advmoe.recipes import recipe
from advmoe.reports.cells import Figure, Summary, attacks_in_words, by_setting, summarise
from advmoe.reports.collect import FULL_SCALE, ROUTED, Cell
from advmoe.reports.costs import Judged, judged_cells
from advmoe.reports.markup import Entry, Table
from advmoe.reports.measures import BY_NAME, COSTS, SUMMARY, WORST, label
from advmoe.reports.panels import in_words, look

BACKBONES = {
    "resnet18": "ResNet-18", "wrn28_10": "WRN-28-10", "vgg16_bn": "VGG-16", "densenet40": "DenseNet-40",
    "densenet121": "DenseNet-121",
}  # fmt: skip
TITLES = {
    "A1": "Table A1: training attack of 10 steps, CIFAR-10",
    "A2": "Table A2: model scales, training attack of 2 steps, CIFAR-10",
}
COMPARED = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")
CIFAR10 = (49_000, 10_000)  # training images less the 2 % held out, and test images
PRINTED_AS = {"ra": BY_NAME["ra_50"], "ra_aa": BY_NAME["ra_aa"], "sa": BY_NAME["sa"]}  # field of the printed table -> measure
KINDS = ("printed", "ours", "difference")
NOT_RUN, NOT_MEASURED, BLANK = Entry("not run"), Entry("not measured"), Entry("")
MIXED = "The seeds' runs were attacked by different attacks: their worst cases are no one figure."
PRINTED = (
    "Runs of the printed setting alone stand here; a numbered note says why a printed cell cannot be right. The difference is ours "
    "less the printed figure."
)
MEANING = (
    "Accuracies in percent, mean ± sample deviation over n seeds. RA-50 is under PGD-50, RA-worst over the union of everything "
    "that was run, AutoAttack and the attacks on routing among it; without these two it is called quick where the preset quick "
    "was run, and else that of listed attacks. An order is claimed only between means of several seeds whose intervals do not "
    "meet: 95 % over n seeds, t(n - 1, 0.975) s / sqrt(n) to either side, joined with the Wilson interval on the test images."
)
UNRELIABLE = "RA-AA stands above RA-worst by more than half a point: AutoAttack alone flatters this network."


class Notes:
    """Notes of a table, each numbered once. `uneven` are the worst cases that not all of the table's `runs` owe to the same
    attacks: each such figure has a note that names its own, and so has every one of listed attacks."""

    def __init__(self, runs: Iterable[Summary]) -> None:
        self.texts: list[str] = []
        plans = {name: {run.attacks[name] for run in runs if name in run.attacks} for name in WORST}
        self.uneven = {name for name, own in plans.items() if len(own) > 1} | {"ra_worst_listed"}

    def mark(self, *texts: str) -> tuple[int, ...]:
        """Numbers of the notes, new ones appended."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return tuple(sorted(self.texts.index(text) + 1 for text in texts))


def tables(records: Iterable[Record]) -> list[Table]:
    """Tables A1 and A2, then one for every other setting that was run."""
    summaries = summarise(records)
    printed = [cell for judged in judged_cells() for cell in [judged.cell]]
    others = [summary for summary in summaries if not any(is_run_of(summary, cell) for cell in printed)]
    everything, names = by_setting(summaries), list[str]()
    own = []
    for setting, group in by_setting(others).items():
        names.append(_unused(_file_name(setting), names))
        own.append(_own_table(names[-1], setting, group, _missing(everything[setting])))
    return [*(_paper_table(name, summaries) for name in TITLES), *own]


def is_run_of(summary: Summary, printed: PrintedCell) -> bool:
    """Whether our runs are of the printed setting: all of it, on all of the data."""
    config, cell = recipe(printed.recipe), summary.cell
    wanted = Cell(
        printed.dataset, printed.model, None, printed.method, printed.model_scale,
        config.model.num_experts if printed.method in ROUTED else 1, printed.attack_steps, config.attack.epsilon, "Linf",
        config.training.epochs, *CIFAR10,
    )  # fmt: skip
    return cell == wanted and not summary.departures


def _paper_table(name: str, summaries: Sequence[Summary]) -> Table:
    judged = [one for one in judged_cells() if one.cell.table == name]
    runs = [next((own for own in summaries if is_run_of(own, one.cell)), None) for one in judged]
    printed = [field for field in PRINTED_AS if any(getattr(one.cell, field) is not None for one in judged)]
    existing = [run for run in runs if run is not None]
    worst = ["ra_worst", *(name for name in WORST[1:] if any(name in (*run.figures, *run.mixed) for run in existing))]
    notes = Notes(existing)
    columns = [
        "backbone", "r", "method", "n", *(f"{PRINTED_AS[field].label}, {kind}" for field in printed for kind in KINDS),
        *([] if "ra_aa" in printed else [f"{label('ra_aa')}, ours"]), *(f"{label(name)}, ours" for name in worst),
        *(f"{title}, {kind}" for title in (measure.column for measure in COSTS) for kind in KINDS[:2]),
    ]  # fmt: skip
    pairs = sorted(zip(judged, runs, strict=True), key=lambda pair: pair[1] is None)  # what was run stands first
    rows = tuple(_paper_row(one, run, printed, worst, notes) for one, run in pairs)
    about, not_run = f"{PRINTED} {MEANING}", runs.count(None)
    return Table(f"table_{name.lower()}", TITLES[name], tuple(columns), rows, about, tuple(notes.texts), not_run)


def _paper_row(
    judged: Judged, run: Summary | None, printed: Sequence[str], worst: Sequence[str], notes: Notes
) -> tuple[Entry, ...]:
    cell = judged.cell
    accuracies = [entry for field in printed for entry in _compared(cell, field, run, notes)]
    extra = [] if "ra_aa" in printed else [_ours(run, "ra_aa", notes)]
    marks = notes.mark(*judged.reasons)
    cost = [Entry(f"{cell.gflops:.2f}", cell.gflops, marks=marks), _ours(run, "gmacs", notes)]
    reduction = BLANK if cell.reduction is None else Entry(f"{cell.reduction:.0f}", cell.reduction, marks=marks)
    return (
        *_who(cell.model, cell.model_scale, cell.method), Entry(str(run.n), run.n) if run else NOT_RUN, *accuracies, *extra,
        *(_ours(run, name, notes) for name in worst), *cost, reduction, _ours(run, "reduction", notes),
    )  # fmt: skip


def _compared(cell: PrintedCell, field: str, run: Summary | None, notes: Notes) -> tuple[Entry, Entry, Entry]:
    """An accuracy as printed, ours, and ours less the printed one."""
    value, std = getattr(cell, field), getattr(cell, f"{field}_std")
    ours = _ours(run, PRINTED_AS[field].name, notes)
    difference = BLANK if ours.value is None else Entry(f"{ours.value - value:+.2f}", ours.value - value)
    return Entry(f"{value:.2f} ± {std:.2f}", value, std), ours, difference


def _ours(run: Summary | None, name: str, notes: Notes) -> Entry:
    if run is None:
        return NOT_RUN
    if name in run.mixed:
        return Entry("not shown", marks=notes.mark(MIXED))
    if name not in run.figures:
        return NOT_MEASURED
    texts = [UNRELIABLE] if name == "ra_aa" and run.unreliable else []
    if name in run.attacks and name in notes.uneven:
        texts.append(f"The worst case over {attacks_in_words(run.attacks[name])}; compare it with those of the same attacks only.")
    return figure_entry(run.figures[name], name, run.n, notes.mark(*texts))


def figure_entry(figure: Figure, name: str, runs: int, marks: tuple[int, ...] = ()) -> Entry:
    """'36.20 ± 0.50', with the number of seeds where not all of the cell's `runs` measured it."""
    digits = BY_NAME[name].digits
    spread = figure.std if BY_NAME[name].unit == "%" else None
    text = f"{figure.mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
    return Entry(text + (f" (n = {figure.n})" if figure.n != runs else ""), figure.mean, spread, marks)


def _who(backbone: str, model_scale: float, method: str) -> tuple[Entry, Entry, Entry]:
    return Entry(BACKBONES.get(backbone, backbone)), Entry(f"{model_scale:g}", model_scale), Entry(look(method).title)


def _own_table(name: str, setting: Cell, summaries: Sequence[Summary], missing: Sequence[tuple[float, str]]) -> Table:
    """Cells of a setting that the paper does not print, and as `missing` the scales and methods that were not run in it."""
    shared = [text for text in summaries[0].departures if all(text in own.departures for own in summaries)]
    figures = [one.name for one in SUMMARY if any(one.name in (*own.figures, *own.mixed) for own in summaries)]
    words, notes = " ".join(in_words(setting).split()), Notes(summaries)
    blanks = (BLANK, *(NOT_RUN for _ in ("n", *figures)))
    rows = [(own.cell.method, own.cell.model_scale, _own_row(own, figures, shared, notes)) for own in summaries]
    rows += [(method, scale, (*_who(setting.backbone, scale, method), *blanks)) for scale, method in missing]
    absent = [entries for *_, entries in rows[len(summaries) :]]
    rows.sort(key=lambda row: (row[2] in absent, _rank(row[0]), row[1]))
    columns = ("backbone", "r", "method", "N", "n", *(BY_NAME[name].column for name in figures))
    about = f"Not what the paper printed, and not to be read beside its figures: {'; '.join([words, *shared])}. {MEANING}"
    return Table(name, f"Our setting: {words}", columns, tuple(row for *_, row in rows), about, tuple(notes.texts), len(missing))


def _own_row(own: Summary, figures: Sequence[str], shared: Sequence[str], notes: Notes) -> tuple[Entry, ...]:
    backbone, scale, method = _who(own.cell.backbone, own.cell.model_scale, own.cell.method)
    apart = [text for text in own.departures if text not in shared]
    marks = notes.mark("In this row also: " + "; ".join(apart) + ".") if apart else ()
    experts = Entry(str(own.cell.num_experts), own.cell.num_experts) if own.cell.method in ROUTED else BLANK
    return (
        backbone, scale, Entry(method.text, marks=marks), experts, Entry(str(own.n), own.n),
        *(_ours(own, name, notes) for name in figures),
    )  # fmt: skip


def _missing(summaries: Sequence[Summary]) -> list[tuple[float, str]]:
    """Model scale and method of the cells that the paper's comparison has and these lack."""
    ran = {(own.cell.model_scale, own.cell.method) for own in summaries}
    scales = sorted({scale for scale, method in ran if method not in FULL_SCALE} or {ModelConfig().model_scale})
    wanted = [(1.0 if method in FULL_SCALE else scale, method) for scale in scales for method in COMPARED]
    return [cell for cell in dict.fromkeys(wanted) if cell not in ran]


def _rank(method: str) -> int:
    """The method's place in the paper's tables; others go before."""
    return COMPARED.index(method) if method in COMPARED else -1


def _file_name(setting: Cell) -> str:
    """'ours-fashion-mnist-resnet18-w16-6_epochs', of letters that any file system takes."""
    width = f"-w{setting.width}" if setting.width else ""
    return re.sub(r"[^\w.-]+", "_", f"ours-{setting.dataset}-{setting.backbone}{width}-{setting.epochs}_epochs")[:100]


def _unused(name: str, taken: Sequence[str]) -> str:
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)
