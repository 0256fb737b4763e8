"""Judgements by the runs: whether choosing an expert helps, and each claim of the appendix."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from advmoe.evaluation.record import Record
from advmoe.paper import PrintedCell, printed_cells
from advmoe.reports.cell import OF_METHODS, SAME_BATCHES, Cell, cell_of, is_full_scale, is_routed
from advmoe.reports.control import CONTROL, NO_CONTROL, worst_case_difference
from advmoe.reports.measures import WORST, label
from advmoe.reports.paper_tables import is_run_of
from advmoe.reports.settings import differing, settings
from advmoe.reports.styles import method_style, network_title, setting_text
from advmoe.reports.summaries import Outcome, Summary, by_setting, interval, outcome, summarise

Judgement = Literal["supported", "contradicted", "not shown"]
PAPER_EPOCHS = 100
STEADY = 1.0  # points of held-out RA between the last tenth of the epochs and the tenth before
SAME_COST = ("at_small_dense", "at_sparse", "at_moe")
COMPARISONS = {  # measure -> the baselines of the claim about it
    "ra_50": ("at_dense", *SAME_COST),
    "sa": SAME_COST,
}
INTERVALS = (
    "Accuracies are percent of the test images, means over n seeds. In brackets: the smallest interval that contains the mean's "
    "95 % interval over the seeds, mean ± t(n - 1, 0.975) s / sqrt(n), and its Wilson interval on the test images. Two networks "
    "are not apart if these intervals overlap. A network with one seed is not ranked. A difference on the same images has a 95 % "
    "interval over the images only: it says nothing about other seeds, so it decides no claim."
)


@dataclass(frozen=True)
class Claim:
    """A claim of the appendix in one setting, the verdict of our runs, and the reasons."""

    text: str
    verdict: Judgement
    detail: str


def judge(records: Iterable[Record]) -> list[Claim]:
    """The claim that choosing an expert helps, then the appendix's claims: in the paper's setting (last if it has no runs), and in
    every other setting with runs of AdvMoE and of a baseline. `INTERVALS` explains the figures in their details.

    A method is ahead of another only if both have several seeds, all settings that are no part of a method are equal, and their
    intervals (`summaries.interval`) do not overlap. The verdict is "supported" if AdvMoE is ahead of every baseline at every model
    scale, "contradicted" if a baseline is ahead of it, and "not shown" otherwise.
    """
    records = list(records)
    summaries = summarise(records)
    paper = [summary for summary in summaries if any(is_run_of(summary, cell) for cell in printed_cells())]
    others = by_setting(summary for summary in summaries if summary not in paper)
    printed = [_comparison(name, "in the paper's setting", paper, _printed_exceptions(name)) for name in COMPARISONS]
    ours = [
        _comparison(name, f"in our setting ({setting_text(setting)})", group, "")
        for setting, group in others.items()
        if _compared(group)
        for name in COMPARISONS
    ]
    compared = [*printed, *ours] if paper else [*ours, *printed]
    return [*CHOICE.judge(summaries, records), *compared, _convergence(records), *BATCHES.judge(summaries, records)]


@dataclass(frozen=True)
class Ablation:
    """A claim about pairs of networks that differ in one thing. `counterpart` is what the other network of a pair is called;
    `find` returns the cells that it may have, the preferred one first, or none if the claim is not about the given cell.
    `may_differ` are the settings that need not be equal in a pair."""

    claim: str
    counterpart: str
    without_pairs: str
    find: Callable[[Cell], list[Cell]]
    may_differ: tuple[str, ...]

    def judge(self, summaries: Sequence[Summary], records: Sequence[Record]) -> list[Claim]:
        """The claim in every setting that has a pair."""
        groups = by_setting(summary for summary in summaries if is_routed(summary.cell.method))
        claims = [claim for setting, group in groups.items() if (claim := self._in(setting, group, records)) is not None]
        return claims or [Claim(self.claim, "not shown", self.without_pairs)]

    def _in(self, setting: Cell, group: Sequence[Summary], records: Sequence[Record]) -> Claim | None:
        outcomes: list[Outcome | None] = []
        sentences = []
        by_cell = {summary.cell: summary for summary in group}
        for summary in group:
            cell = self.other_of(summary.cell, by_cell)
            if cell is None:
                continue
            other = by_cell[cell]
            name = next((name for name in WORST if name in summary.figures and name in other.figures), None)
            if name is None or summary.attacks[name] != other.attacks[name]:
                outcomes.append(None)
                sentences.append(f"{network_title(summary.cell)} and {self.counterpart} were attacked differently.")
                continue
            difference = self.unequal_settings(summary.cell, other.cell, records)
            outcomes.append(None if difference else outcome(summary, other, name))
            against = f"{self.counterpart} {_against(summary, other, name, difference)}"
            paired = "" if difference else _paired(summary.cell, other.cell, records)
            sentences.append(
                f"{network_title(summary.cell)}: {label(name)} {_mean_with_interval(summary, name)}, {against}.{paired}"
            )
        if not outcomes:
            return None
        return Claim(f"{self.claim}, in {setting_text(setting)}", _judgement(outcomes), " ".join(sentences))

    def other_of(self, cell: Cell, cells: Container[Cell]) -> Cell | None:
        """The other network of a pair, among `cells`; None if it was not run."""
        return next((other for other in self.find(cell) if other in cells), None)

    def unequal_settings(self, cell: Cell, other: Cell, records: Sequence[Record]) -> str:
        """The settings that differ in a pair although they should be equal."""
        values, others = (settings(next(record for record in records if cell_of(record) == one)) for one in (cell, other))
        for name in self.may_differ:
            values.pop(name, None)
            others.pop(name, None)
        return differing(others, values)


def _with_one_expert(cell: Cell) -> list[Cell]:
    """The same method with one expert, or AT (MoE): with one expert AdvMoE's routers have nothing to learn. The ingredients are the
    same; the variant, which is one of routers and experts, may be."""
    if cell.num_experts == 1:
        return []
    variants = dict.fromkeys((cell.variant, ""))
    return [
        replace(cell, method=method, num_experts=1, variant=variant, choice="")
        for variant in variants
        for method in (cell.method, "at_moe")
    ]


def _with_same_batches(cell: Cell) -> list[Cell]:
    plain = cell.method == "advmoe" and cell.num_experts > 1 and not cell.variant and not cell.ingredients
    return [replace(cell, variant=SAME_BATCHES)] if plain else []


def _paired(cell: Cell, control: Cell, records: Sequence[Record]) -> str:
    """The difference in the worst case over the seeds that both have, on the same images; "" without flags to compare."""
    runs = {record.seed: record for record in records if cell_of(record) == cell}
    controls = {record.seed: record for record in records if cell_of(record) == control}
    difference = worst_case_difference((runs[seed], controls[seed]) for seed in runs if seed in controls)
    return "" if difference is None else f" Difference on the same images: {difference.words}."


CHOICE = Ablation(
    "Choosing an expert helps: a routed network is more robust than the control with one expert", CONTROL, NO_CONTROL,
    _with_one_expert, OF_METHODS,
)  # fmt: skip
BATCHES = Ablation(
    "Different batches for the two levels help: AdvMoE is more robust than with the same batches", "the same batches",
    "No counterpart was run: AdvMoE with --level-batches same.", _with_same_batches,
    ("training.level_batches",),
)  # fmt: skip


def _compared(group: Sequence[Summary]) -> bool:
    """Whether both AdvMoE and a baseline were run."""
    methods = {summary.cell.method for summary in group if summary.cell.is_of_the_paper}
    return "advmoe" in methods and bool(methods & {"at_dense", *SAME_COST})


def _is_advmoe(cell: Cell) -> bool:
    """Whether the runs are of the full method."""
    return cell.method == "advmoe" and cell.is_of_the_paper


def _comparison(name: str, where: str, group: Sequence[Summary], more: str) -> Claim:
    """AdvMoE against the baselines in one figure, at every model scale."""
    baselines = COMPARISONS[name]
    text = f"AdvMoE beats {', '.join(method_style(method).title for method in baselines)} in {label(name)}, {where}"
    routed = [summary for summary in group if _is_advmoe(summary.cell) and name in summary.figures]
    if not routed:
        return Claim(text, "not shown", " ".join(part for part in ("No AdvMoE run.", more) if part))
    outcomes: list[Outcome | None] = []
    sentences = []
    for summary in routed:
        others = {method: _baseline(summary, method, name, group) for method in baselines}
        outcomes += [
            outcome(summary, other, name) if other and not _difference(summary, other, name) else None for other in others.values()
        ]
        sentences.append(_sentence(summary, others, name))
    return Claim(text, _judgement(outcomes), " ".join([*sentences, more]).strip())


def _judgement(outcomes: Sequence[Outcome | None]) -> Judgement:
    if "behind" in outcomes:
        return "contradicted"
    return "supported" if all(each == "ahead" for each in outcomes) else "not shown"


def _baseline(summary: Summary, method: str, name: str, group: Sequence[Summary]) -> Summary | None:
    """The run of `method` as published to compare with: of the same setting and, if the method has them, of the same scale and
    number of experts."""
    cell = summary.cell
    return next(
        (
            other for other in group
            if other.cell.method == method and other.cell.is_of_the_paper
            and other.cell.setting == cell.setting and name in other.figures
            and (is_full_scale(method) or other.cell.model_scale == cell.model_scale)
            and (not is_routed(method) or other.cell.num_experts == cell.num_experts)
        ),
        None,
    )  # fmt: skip


def _difference(summary: Summary, other: Summary, name: str) -> str:
    """The settings that differ although they are no part of a method. Of the attacks' versions only that of the figure's attack
    counts: of PGD-50 for RA-50, of none for SA."""
    attack, values = name.replace("ra", "pgd"), dict(other.shared)
    if summary.older.get(attack) == other.older.get(attack):
        values["evaluated"] = summary.shared["evaluated"]
    return differing(values, summary.shared)


def _sentence(summary: Summary, others: Mapping[str, Summary | None], name: str) -> str:
    cell = summary.cell
    against = [
        f"{method_style(method).title} {_against(summary, other, name, _difference(summary, other, name)) if other else 'not run'}"
        for method, other in others.items()
    ]
    where = f"{cell.backbone}, {cell.attack_steps} attack steps, r {cell.model_scale:g}, N {cell.num_experts}"
    return f"{where}: AdvMoE {_mean_with_interval(summary, name)}, against {', '.join(against)}."


def _against(summary: Summary, other: Summary, name: str, difference: str) -> str:
    """'50.1 (49.1 to 51.1; n = 2) ahead' if `summary` is ahead of `other`; not compared if their settings have a `difference`."""
    relation = f"not comparable ({difference})" if difference else outcome(summary, other, name)
    return _mean_with_interval(other, name) + (f" {relation}" if relation != "one seed" else "")


def _mean_with_interval(summary: Summary, name: str) -> str:
    (low, high), figure = interval(summary, name), summary.figures[name]
    return f"{figure.mean:.1f} " + (f"({low:.1f} to {high:.1f}; n = {figure.n})" if figure.n > 1 else "(one seed)")


def _printed_exceptions(name: str) -> str:
    """The cells of the printed tables in which a baseline is ahead of AdvMoE."""
    field = name.removesuffix("_50")
    cells = [(cell, rival) for cell in printed_cells() if cell.method == "advmoe" for rival in _rivals(cell, COMPARISONS[name])]
    texts = [
        f"{method_style(rival.method).title} {getattr(rival, field):g} against {getattr(cell, field):g} "
        f"(table {cell.table}, {cell.model}, r {cell.model_scale:g})"
        for cell, rival in cells
        if getattr(rival, field) > getattr(cell, field)
    ]
    return f"In the printed tables a baseline is ahead: {', '.join(texts)}." if texts else ""


def _rivals(cell: PrintedCell, methods: Sequence[str]) -> list[PrintedCell]:
    return [
        other for other in printed_cells()
        if other.method in methods and (other.table, other.model) == (cell.table, cell.model)
        and (is_full_scale(other.method) or other.model_scale == cell.model_scale)
    ]  # fmt: skip


def _convergence(records: Iterable[Record]) -> Claim:
    """Judged by held-out RA at the end of runs of 100 epochs: whether it still rises, falls, or is no better than chance.

    Needs several seeds of one cell. If the runs disagree, the verdict is "not shown".
    """
    text = f"AdvMoE converges within {PAPER_EPOCHS} epochs"
    long = [record for record in records if _is_advmoe(cell_of(record)) and cell_of(record).epochs == PAPER_EPOCHS]
    long = [record for record in long if len(record.history) == PAPER_EPOCHS and record.classes]
    if not long:
        return Claim(text, "not shown", f"No AdvMoE run of {PAPER_EPOCHS} epochs whose Record holds its epochs.")
    ends = [_end(record) for record in long]
    seeds = max(Counter(cell_of(record) for record in long).values())
    agreed = seeds > 1 and len({converged for converged, _ in ends}) == 1
    verdict: Judgement = "not shown" if not agreed else "supported" if ends[0][0] else "contradicted"
    detail = (
        f"Held-out RA in epochs 91-100, and its change from epochs 81-90 in points: {'; '.join(words for _, words in ends)}. "
        f"Converged: a change of at most {STEADY:g} point, and RA above chance."
    )
    return Claim(text, verdict, detail if seeds > 1 else f"One seed. {detail}")


def _end(record: Record) -> tuple[bool, str]:
    """Whether a run's held-out RA has converged, and its end in words."""
    values = [row.val_ra for row in record.history]
    tenth, chance = len(values) // 10, 100 / len(record.classes)
    level = fmean(values[-tenth:])
    change = level - fmean(values[-2 * tenth : -tenth])
    above = level > chance
    state = "converged" if above else f"not above chance ({chance:.1f} %)"
    if change > STEADY:
        state = "still rises"
    elif change < -STEADY:
        state = "falls: robust overfitting" + ("" if above else f", to no more than chance ({chance:.1f} %)")
    return above and abs(change) <= STEADY, f"{level:.1f} %, {change:+.1f}: {state}"
