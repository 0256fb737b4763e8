"""What the runs say: the verdict in a few sentences, and the appendix's claims judged."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from advmoe.paper import Cell as PrintedCell
from advmoe.paper import cells as printed_cells
from advmoe.reports.cells import Summary, by_setting, span, summarise, worst_name
from advmoe.reports.collect import FULL_SCALE, ROUTED, Cell, cell_of
from advmoe.reports.panels import in_words, look
from advmoe.reports.paper_tables import is_run_of

Judgement = Literal["supported", "contradicted", "not shown"]
Outcome = Literal["ahead", "behind", "not apart"]
PAPER_EPOCHS = 100
STILL_RISING = 1.0  # points of held-out RA between the last tenth of the epochs and the tenth before
SAME_COST = ("at_small_dense", "at_sparse", "at_moe")
COMPARISONS = {  # figure -> what it is called, and the baselines that the claim is about
    "ra_50": ("RA (PGD-50)", ("at_dense", *SAME_COST)),
    "sa": ("SA", SAME_COST),
}
WORST = {"ra_worst": "RA-worst", "ra_worst_quick": "RA-worst (quick: an upper bound)"}


@dataclass(frozen=True)
class Claim:
    """A claim of the appendix in one setting, what our runs say of it, and why."""

    text: str
    verdict: Judgement
    detail: str


def judge(records: Iterable[Mapping[str, Any]]) -> list[Claim]:
    """The appendix's claims, in its own setting first (also where nothing was run in it), then in every other one in which AdvMoE
    and a baseline were run.

    One method is ahead of another only where their intervals (`advmoe.reports.cells.span`) do not meet. "supported" needs every
    baseline, each behind at every model scale; one that is ahead contradicts.
    """
    records = list(records)
    summaries = summarise(records)
    paper = [own for own in summaries if any(is_run_of(own, cell) for cell in printed_cells())]
    others = by_setting(own for own in summaries if own not in paper)
    claims = [_comparison(name, "in the paper's setting", paper, _printed_exceptions(name)) for name in COMPARISONS]
    for setting, group in others.items():
        if _compared(group):
            claims += [_comparison(name, f"in our setting ({_words(setting)})", group, "") for name in COMPARISONS]
    return [*claims, _convergence(records), BATCHES]


BATCHES = Claim(
    "Different batches for the two levels help", "not shown",
    "No run: every AdvMoE run draws a batch of its own for each level, none the same one for both.",
)  # fmt: skip


def _compared(group: Sequence[Summary]) -> bool:
    methods = {own.cell.method for own in group}
    return "advmoe" in methods and bool(methods & {"at_dense", *SAME_COST})


def _comparison(name: str, where: str, group: Sequence[Summary], more: str) -> Claim:
    """AdvMoE against the baselines in one figure, at every model scale."""
    title, baselines = COMPARISONS[name]
    text = f"AdvMoE beats {', '.join(look(method).title for method in baselines)} in {title}, {where}"
    routed = [own for own in group if own.cell.method == "advmoe" and name in own.figures]
    if not routed:
        return Claim(text, "not shown", " ".join(part for part in ("No AdvMoE run.", more) if part))
    outcomes: list[Outcome | None] = []
    sentences = []
    for own in routed:
        found = {method: _baseline(own, method, name, group) for method in baselines}
        outcomes += [_outcome(own, other, name) if other else None for other in found.values()]
        sentences.append(_sentence(own, found, name))
    return Claim(text, _judgement(outcomes), " ".join([*sentences, more]).strip())


def _judgement(outcomes: Sequence[Outcome | None]) -> Judgement:
    if "behind" in outcomes:
        return "contradicted"
    return "supported" if all(outcome == "ahead" for outcome in outcomes) else "not shown"


def _baseline(own: Summary, method: str, name: str, group: Sequence[Summary]) -> Summary | None:
    """The run of `method` in the same place: of the same backbone, steps and scale, unless it has none."""
    place = own.cell.setting
    return next(
        (
            other for other in group
            if other.cell.method == method and other.cell.setting == place and name in other.figures
            and (method in FULL_SCALE or other.cell.model_scale == own.cell.model_scale)
            and (method not in ROUTED or other.cell.num_experts == own.cell.num_experts)
        ),
        None,
    )  # fmt: skip


def _outcome(own: Summary, other: Summary, name: str) -> Outcome:
    (low, high), (other_low, other_high) = span(own, name), span(other, name)
    return "ahead" if low > other_high else "behind" if high < other_low else "not apart"


def _sentence(own: Summary, found: Mapping[str, Summary | None], name: str) -> str:
    cell = own.cell
    against = [
        f"{look(method).title} {_interval(other, name)} {_outcome(own, other, name)}" if other else f"{look(method).title} not run"
        for method, other in found.items()
    ]
    place = f"{cell.backbone}, {cell.attack_steps} attack steps, r {cell.model_scale:g}, N {cell.num_experts}"
    return f"{place}: AdvMoE {_interval(own, name)}, against {', '.join(against)}."


def _interval(own: Summary, name: str) -> str:
    low, high = span(own, name)
    return f"{own.figures[name].mean:.1f} ({low:.1f} to {high:.1f})"


def _printed_exceptions(name: str) -> str:
    """Where the printed tables themselves have a baseline ahead."""
    field = name.removesuffix("_50")
    cells = [(cell, rival) for cell in printed_cells() if cell.method == "advmoe" for rival in _rivals(cell, COMPARISONS[name][1])]
    texts = [
        f"{look(rival.method).title} {getattr(rival, field):g} against {getattr(cell, field):g} "
        f"(table {cell.table}, {cell.model}, r {cell.model_scale:g})"
        for cell, rival in cells
        if getattr(rival, field) > getattr(cell, field)
    ]
    return f"The printed tables themselves have a baseline ahead: {', '.join(texts)}." if texts else ""


def _rivals(cell: PrintedCell, methods: Sequence[str]) -> list[PrintedCell]:
    return [
        other for other in printed_cells()
        if other.method in methods and (other.table, other.model) == (cell.table, cell.model)
        and (other.method in FULL_SCALE or other.model_scale == cell.model_scale)
    ]  # fmt: skip


def _convergence(records: Iterable[Mapping[str, Any]]) -> Claim:
    """Judged by how far held-out RA still rises at the end of runs of 100 epochs."""
    text = f"AdvMoE converges within {PAPER_EPOCHS} epochs"
    long = [record for record in records if record["method"] == "advmoe" and cell_of(record).epochs == PAPER_EPOCHS]
    rises = [_rise(record["history"]) for record in long if len(record["history"]) == PAPER_EPOCHS]
    if not rises:
        return Claim(text, "not shown", f"No AdvMoE run of {PAPER_EPOCHS} epochs whose Record holds its epochs.")
    still = [rise for rise in rises if rise > STILL_RISING]
    verdict: Judgement = "supported" if not still else "contradicted" if len(still) == len(rises) else "not shown"
    shown = ", ".join(f"{rise:+.1f}" for rise in rises)
    return Claim(
        text, verdict, f"Held-out RA from epochs 81-90 to 91-100, in points: {shown}; converged: at most {STILL_RISING:+g}."
    )


def _rise(history: Sequence[Mapping[str, Any]]) -> float:
    values = [row["val_ra"] for row in history]
    tenth = len(values) // 10
    return fmean(values[-tenth:]) - fmean(values[-2 * tenth : -tenth])


def verdict(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences: for every setting, those with most methods and then most training first, which method is most robust at worst and
    at what cost; then what failed its checks."""
    records = list(records)
    groups = sorted(by_setting(summarise(records)).items(), key=lambda item: _weight(*item), reverse=True)
    return [*(_winner(setting, group) for setting, group in groups), *_failures(records)]


def _weight(setting: Cell, group: Sequence[Summary]) -> tuple[int, int]:
    return len({own.cell.method for own in group}), setting.epochs * setting.train_pictures


def _winner(setting: Cell, group: Sequence[Summary]) -> str:
    """The ranking is by one figure: a quick worst case is never set beside a full one."""
    name = worst_name(group)
    ranked = sorted((own for own in group if name in own.figures), key=lambda own: -own.figures[name].mean)
    first, *rest = ranked
    left = [_title(own) for own in group if name not in own.figures]
    tail = f" Not attacked in full, so not ranked: {'; '.join(left)}." if left else ""
    if not rest:
        return f"{_words(setting)}: alone is {_title(first)}, {_share(first, name)}.{tail}"
    close = [_title(own) for own in rest if _outcome(first, own, name) == "not apart"]
    apart = f"these runs do not tell apart from it: {'; '.join(close)}" if close else "all others lie clearly below"
    others = f"next is {_title(rest[0])} with {rest[0].figures[name].mean:.1f} %; {apart}"
    return f"{_words(setting)}: most robust at worst is {_title(first)}, {_share(first, name)}; {others}.{tail}"


def _share(own: Summary, name: str) -> str:
    """'RA-worst 36.2 ± 0.5 % (3 seeds) at 27 % of the dense network's cost (0.0078 GMACs)'."""
    figure = own.figures[name]
    spread = f" ± {figure.std:.1f}" if figure.std is not None else ""
    share = f"{WORST[name]} {figure.mean:.1f}{spread} % ({figure.n} seed{'s' * (figure.n > 1)})"
    cost = f"{100 - own.figures['reduction'].mean:.0f} % of the dense network's cost ({own.figures['gmacs'].mean:.4f} GMACs)"
    return f"{share} at {cost}"


def _title(own: Summary) -> str:
    """'AdvMoE, r 0.5, N 2'."""
    scale = "" if own.cell.method in FULL_SCALE else f", r {own.cell.model_scale:g}"
    return look(own.cell.method).title + scale + (f", N {own.cell.num_experts}" if own.cell.method in ROUTED else "")


def _failures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every run whose evaluation failed a self-check, or one that none did."""
    lines = []
    for record in records:
        failed = [check for check in record["evaluation"]["checks"] if check["status"] == "fail"]
        if failed:
            names = "; ".join(f"({check['number']}) {check['name']}: {check['detail']}" for check in failed)
            lines.append(f"Failed its checks: {cell_of(record).words}, seed {record['seed']}: {names}.")
    return lines or ["No run failed a check of its evaluation."]


def _words(setting: Cell) -> str:
    return " ".join(in_words(setting).split())
