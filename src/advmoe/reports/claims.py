"""Conclusions from the runs: the verdict in a few sentences, and a judgement of each claim of the appendix."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from advmoe.evaluation.record import Record
from advmoe.paper import Cell as PrintedCell
from advmoe.paper import cells as printed_cells
from advmoe.reports.attacks import points
from advmoe.reports.cells import Summary, alike, attacks_in_words, by_setting, span, summarise, worst_name
from advmoe.reports.collect import FULL_SCALE, OF_METHODS, ROUTED, Cell, cell_of, differing, settings, short_value
from advmoe.reports.control import CONTROL, NO_CONTROL, same_images, worst_case_difference
from advmoe.reports.measures import BY_NAME, WORST, label
from advmoe.reports.panels import in_words, method_style, style_of
from advmoe.reports.paper_tables import is_run_of

Judgement = Literal["supported", "contradicted", "not shown"]
Outcome = Literal["ahead", "behind", "not apart", "one seed"]
PAPER_EPOCHS = 100
STEADY = 1.0  # points of held-out RA between the last tenth of the epochs and the tenth before
SAME_COST = ("at_small_dense", "at_sparse", "at_moe")
COMPARISONS = {  # measure -> the baselines of the claim about it
    "ra_50": ("at_dense", *SAME_COST),
    "sa": SAME_COST,
}
BY = "95 % intervals over seeds and over images"
INTERVALS = (
    "In brackets: the smallest interval that contains the mean's 95 % interval over n seeds, mean ± t(n - 1, 0.975) s / sqrt(n), "
    "and its Wilson interval on the test images. A single seed is not ranked."
)


@dataclass(frozen=True)
class Claim:
    """A claim of the appendix in one setting, the verdict of our runs, and the reasons."""

    text: str
    verdict: Judgement
    detail: str


def judge(records: Iterable[Record]) -> list[Claim]:
    """The appendix's claims, first in the paper's setting (even without runs in it), then in every other setting with runs of
    AdvMoE and of a baseline.

    A method is ahead of another only if both have several seeds, all settings that are no part of a method are equal, and their
    intervals (`advmoe.reports.cells.span`) do not overlap. The verdict is "supported" if AdvMoE is ahead of every baseline at every
    model scale, "contradicted" if a baseline is ahead of it, and "not shown" otherwise.
    """
    records = list(records)
    summaries = summarise(records)
    paper = [summary for summary in summaries if any(is_run_of(summary, cell) for cell in printed_cells())]
    others = by_setting(summary for summary in summaries if summary not in paper)
    claims = [_comparison(name, "in the paper's setting", paper, _printed_exceptions(name)) for name in COMPARISONS]
    for setting, group in others.items():
        if _compared(group):
            claims += [_comparison(name, f"in our setting ({_words(setting)})", group, "") for name in COMPARISONS]
    return [*claims, *CHOICE.judge(summaries, records), _convergence(records), *BATCHES.judge(summaries, records)]


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
        groups = by_setting(summary for summary in summaries if summary.cell.method in ROUTED)
        claims = [claim for setting, group in groups.items() if (claim := self._in(setting, group, records)) is not None]
        return claims or [Claim(self.claim, "not shown", self.without_pairs)]

    def _in(self, setting: Cell, group: Sequence[Summary], records: Sequence[Record]) -> Claim | None:
        outcomes: list[Outcome | None] = []
        sentences = []
        for summary in group:
            other = next((other for cell in self.find(summary.cell) for other in group if other.cell == cell), None)
            if other is None:
                continue
            name = next((name for name in WORST if name in summary.figures and name in other.figures), None)
            if name is None or summary.attacks[name] != other.attacks[name]:
                outcomes.append(None)
                sentences.append(f"{_title(summary)} and {self.counterpart} were attacked differently.")
                continue
            difference = self._difference(summary.cell, other.cell, records)
            outcomes.append(None if difference else _outcome(summary, other, name))
            against = f"{self.counterpart} {_against(summary, other, name, difference)}"
            paired = "" if difference else _paired(summary.cell, other.cell, records)
            sentences.append(f"{_title(summary)}: {label(name)} {_interval(summary, name)}, {against}.{paired}")
        if not outcomes:
            return None
        single = ["One seed."] if "one seed" in outcomes else []
        return Claim(f"{self.claim}, in {_words(setting)}", _judgement(outcomes), " ".join([*single, *sentences, INTERVALS]))

    def _difference(self, cell: Cell, other: Cell, records: Sequence[Record]) -> str:
        """The settings that differ in a pair although they should be equal."""
        values, others = (settings(next(record for record in records if cell_of(record) == one)) for one in (cell, other))
        for name in self.may_differ:
            values.pop(name, None)
            others.pop(name, None)
        return differing(others, values)


def _with_one_expert(cell: Cell) -> list[Cell]:
    """The same method with one expert, or AT (MoE): with one expert AdvMoE's routers have nothing to learn."""
    if cell.num_experts == 1:
        return []
    return [replace(cell, method=method, num_experts=1, same_batches=False) for method in (cell.method, "at_moe")]


def _with_same_batches(cell: Cell) -> list[Cell]:
    return [replace(cell, same_batches=True)] if _is_advmoe(cell) else []


def _paired(cell: Cell, control: Cell, records: Sequence[Record]) -> str:
    """The difference in the worst case over the seeds that both have, on the same images; "" without flags to compare."""
    runs = {record.seed: record for record in records if cell_of(record) == cell}
    controls = {record.seed: record for record in records if cell_of(record) == control}
    pairs = [(runs[seed], controls[seed]) for seed in runs if seed in controls]
    difference = worst_case_difference([pair for pair in pairs if same_images(*pair)])
    return "" if difference is None else f" On the same images: {points(difference)}."


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
    methods = {summary.cell.method for summary in group if not summary.cell.is_ablation}
    return "advmoe" in methods and bool(methods & {"at_dense", *SAME_COST})


def _is_advmoe(cell: Cell) -> bool:
    """Whether the runs are of the full method."""
    return cell.method == "advmoe" and not cell.is_ablation


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
            _outcome(summary, other, name) if other and not _difference(summary, other) else None for other in others.values()
        ]
        sentences.append(_sentence(summary, others, name))
    single = ["One seed."] if "one seed" in outcomes else []
    return Claim(text, _judgement(outcomes), " ".join([*single, *sentences, INTERVALS, more]).strip())


def _judgement(outcomes: Sequence[Outcome | None]) -> Judgement:
    if "behind" in outcomes:
        return "contradicted"
    return "supported" if all(outcome == "ahead" for outcome in outcomes) else "not shown"


def _baseline(summary: Summary, method: str, name: str, group: Sequence[Summary]) -> Summary | None:
    """The run of `method` to compare with: of the same setting and, if the method has them, of the same scale and number of
    experts."""
    setting = summary.cell.setting
    return next(
        (
            other for other in group
            if other.cell.method == method and other.cell.setting == setting and name in other.figures
            and (method in FULL_SCALE or other.cell.model_scale == summary.cell.model_scale)
            and (method not in ROUTED or other.cell.num_experts == summary.cell.num_experts)
        ),
        None,
    )  # fmt: skip


def _difference(summary: Summary, other: Summary) -> str:
    """The settings that differ although they are no part of a method."""
    return differing(other.shared, summary.shared)


def _outcome(summary: Summary, other: Summary, name: str) -> Outcome:
    if min(summary.figures[name].n, other.figures[name].n) < 2:
        return "one seed"
    (low, high), (other_low, other_high) = span(summary, name), span(other, name)
    return "ahead" if low > other_high else "behind" if high < other_low else "not apart"


def _sentence(summary: Summary, others: Mapping[str, Summary | None], name: str) -> str:
    cell = summary.cell
    against = [
        f"{method_style(method).title} {_against(summary, other, name, _difference(summary, other)) if other else 'not run'}"
        for method, other in others.items()
    ]
    where = f"{cell.backbone}, {cell.attack_steps} attack steps, r {cell.model_scale:g}, N {cell.num_experts}"
    return f"{where}: AdvMoE {_interval(summary, name)}, against {', '.join(against)}."


def _against(summary: Summary, other: Summary, name: str, difference: str) -> str:
    """'50.1 (49.1 to 51.1; n = 2) ahead' if `summary` is ahead of `other`; not compared if their settings have a `difference`."""
    outcome = f"not comparable ({difference})" if difference else _outcome(summary, other, name)
    return _interval(other, name) + (f" {outcome}" if outcome != "one seed" else "")


def _interval(summary: Summary, name: str) -> str:
    (low, high), figure = span(summary, name), summary.figures[name]
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
        and (other.method in FULL_SCALE or other.model_scale == cell.model_scale)
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


def verdict(records: Iterable[Record]) -> list[str]:
    """Sentences: for every setting, which method is most robust in the worst case and at what cost; then the failed checks.

    Settings with more methods come first, then those with more training. Runs of one setting that cannot be compared have a
    sentence for each comparable group.
    """
    records = list(records)
    groups = by_setting(summarise(records)).values()
    parts = [(_where(part[0], group), part) for group in groups for part in alike(group)]
    parts.sort(key=lambda pair: _weight(pair[1]), reverse=True)
    return [*(_winner(*pair) for pair in parts), *_failures(records)]


def _weight(part: Sequence[Summary]) -> tuple[int, int]:
    setting = part[0].cell
    return len({summary.cell.method for summary in part}), setting.epochs * setting.train_images


def _where(summary: Summary, group: Sequence[Summary]) -> str:
    """The setting as text, with the settings in which the run differs from others of `group`."""
    names = [name for name in summary.shared if any(other.shared.get(name) != summary.shared[name] for other in group)]
    return ", ".join([_words(summary.cell.setting), *(f"{name} {short_value(summary.shared[name])}" for name in names)])


def _winner(where: str, group: Sequence[Summary]) -> str:
    """The ranking by one figure, over runs of several seeds under the same attacks; then the runs that are not ranked, and why."""
    name = worst_name(group)
    attacked = [summary for summary in group if name in summary.figures]
    plan = next(iter(Counter(summary.attacks[name] for summary in attacked).most_common(1)), (frozenset[str](), 0))[0]
    equal = [summary for summary in attacked if summary.attacks[name] == plan]
    ranked = sorted((summary for summary in equal if summary.figures[name].n > 1), key=lambda summary: -summary.figures[name].mean)
    single = [summary for summary in equal if summary not in ranked]
    mixed = [summary for summary in group if summary.mixed and summary not in attacked]
    incomplete = [summary for summary in group if name == "ra_worst" and summary not in (*attacked, *mixed)]
    unranked = {
        "Not ranked, because their seeds were attacked differently": mixed,
        "Not ranked, because attacks are missing": incomplete,
        f"Not ranked, because not attacked by {attacks_in_words(plan)}": [
            summary for summary in group if summary not in (*equal, *mixed, *incomplete)
        ],
    }
    sentences = [f"{where}: {_ranking(ranked, name)}."] if ranked else []
    if single:
        shares = "; ".join(f"{_title(summary)} {summary.figures[name].mean:.1f} %" for summary in single)
        bound = ", an upper bound" if BY_NAME[name].upper_bound else ""
        beginning = "One seed" if sentences else f"{where}: one seed"
        sentences.append(f"{beginning}, so not ranked by {label(name)}{bound}: {shares}.")
    tails = [f"{reason}: {'; '.join(_title(summary) for summary in those)}." for reason, those in unranked.items() if those]
    return " ".join([*(sentences or [f"{where}: no worst case to compare."]), *tails])


def _ranking(ranked: Sequence[Summary], name: str) -> str:
    first, *rest = ranked
    if not rest:
        return f"only one network is ranked: {_title(first)}, {_share(first, name)}"
    close = [_title(summary) for summary in rest if _outcome(first, summary, name) == "not apart"]
    apart = f"not clearly below it: {'; '.join(close)}" if close else f"all others are clearly below ({BY})"
    return (
        f"most robust in the worst case is {_title(first)}, {_share(first, name)}; next is {_title(rest[0])} with "
        f"{rest[0].figures[name].mean:.1f} %; {apart}"
    )


def _share(summary: Summary, name: str) -> str:
    """'RA-worst 36.2 ± 0.5 % (3 seeds) at 27 % of the dense network's cost (0.0078 GMACs)'."""
    figure = summary.figures[name]
    spread = f" ± {figure.std:.1f}" if figure.std is not None else ""
    bound = "an upper bound; " if BY_NAME[name].upper_bound else ""
    share = f"{label(name)} {figure.mean:.1f}{spread} % ({bound}{figure.n} seed{'s' * (figure.n > 1)})"
    cost = (
        f"{100 - summary.figures['reduction'].mean:.0f} % of the dense network's cost ({summary.figures['gmacs'].mean:.4f} GMACs)"
    )
    return f"{share} at {cost}"


def _title(summary: Summary) -> str:
    """'AdvMoE, r 0.5, N 2'."""
    scale = "" if summary.cell.method in FULL_SCALE else f", r {summary.cell.model_scale:g}"
    return style_of(summary.cell).title + scale + (f", N {summary.cell.num_experts}" if summary.cell.method in ROUTED else "")


def _failures(records: Sequence[Record]) -> list[str]:
    """One line for every run whose evaluation failed a self-check, or one line that says that none did."""
    lines = []
    for record in records:
        failed = [check for check in record.evaluation.checks if check.status == "fail"]
        if failed:
            names = "; ".join(f"({check.number}) {check.name}: {check.detail}" for check in failed)
            lines.append(f"Failed its checks: {cell_of(record).words}, seed {record.seed}: {names}.")
    return lines or ["No run failed a check of its evaluation."]


def _words(setting: Cell) -> str:
    return " ".join(in_words(setting).split())
