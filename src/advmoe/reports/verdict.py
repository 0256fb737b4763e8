"""The verdict of a report: which networks are most robust in the worst case, at what cost, and whether choosing an expert helps."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import Check
from advmoe.reports.cell import grouped
from advmoe.reports.choice import Against, choice_answers, differences_from_control
from advmoe.reports.markup import Entry, Statement, Table
from advmoe.reports.measures import BY_NAME, label
from advmoe.reports.paper_tables import Notes, ours
from advmoe.reports.styles import network_title, run_title, setting_text
from advmoe.reports.summaries import (
    Summary,
    attacks_in_words,
    by_setting,
    comparable_groups,
    differing_settings,
    interval,
    outcome,
    summarise,
    worst_name,
)
from advmoe.wording import number_of

LISTED = 3  # networks or runs in a sentence
BY = "95 % intervals over seeds and over images"


def verdict(records: Iterable[Record]) -> list[Statement]:
    """For every setting, which method is most robust in the worst case and at what cost; after the first of them,
    whether choosing an expert helps, for every setting with a control; at the end the self-checks (`check_lines`).

    Settings with more methods come first, then those with more training. Runs of one setting that cannot be compared have a
    statement for each comparable group.
    """
    records = list(records)
    rankings = [_winner(*pair) for pair in _parts(records)]
    return [*rankings[:1], *choice_answers(records), *rankings[1:], *check_lines(records)]


def networks_table(records: Sequence[Record]) -> Table:
    """The networks of the setting that the verdict names first, those with the highest worst case first, with their cost and, for
    routed networks, the difference of this worst case from the control's. A note says which figures come from other attacks."""
    where, group = _parts(records)[0]
    name, notes, differences = worst_name(group), Notes(group), differences_from_control(records)
    columns = ("network", label(name), "95 % interval", "GMACs (of dense)", "minus the control", "n")
    by_figure = sorted(group, key=lambda summary: -summary.figures[name].mean if name in summary.figures else 0.0)
    rows = tuple(_network_row(summary, name, notes, differences.get(summary.cell)) for summary in by_figure)
    about = (
        f"On {group[0].cell.dataset}: {where}. Accuracies in percent; their interval covers seeds and images, with one seed only "
        "images. Differences in points, on the same images; their interval covers images only. n: seeds. One seed does not rank a "
        "network."
    )
    return Table("networks", "Networks", columns, rows, about, tuple(notes.texts))


def _network_row(summary: Summary, name: str, notes: Notes, against: Against | None) -> tuple[Entry, ...]:
    worst, between, difference, n = ours(summary, name, notes), Entry(""), Entry(""), summary.n
    if name in summary.figures:
        worst, (low, high) = replace(worst, text=summary.figures[name].text(1)), interval(summary, name)
        between, n = Entry(f"{low:.1f} to {high:.1f}", low), summary.figures[name].n
    if against is not None and against.figure == label(name):
        difference = Entry(against.difference.words.replace(" points", ""), against.difference.value)
    gmacs, share = summary.figures["gmacs"].mean, 100 - summary.figures["reduction"].mean
    return (
        Entry(network_title(summary.cell)), worst, between, Entry(f"{gmacs:.4f} ({share:.0f} %)", gmacs), difference,
        Entry(str(n), n),
    )  # fmt: skip


def _parts(records: Sequence[Record]) -> list[tuple[str, Sequence[Summary]]]:
    """The groups of comparable networks, each with its setting as text, in the order of the verdict."""
    groups = by_setting(summarise(records)).values()
    parts = [(_where(part[0], group), part) for group in groups for part in comparable_groups(group)]
    return sorted(parts, key=lambda pair: _weight(pair[1]), reverse=True)


def _weight(part: Sequence[Summary]) -> tuple[int, int]:
    setting = part[0].cell
    return len({summary.cell.method for summary in part}), setting.epochs * setting.train_images


def _where(summary: Summary, group: Sequence[Summary]) -> str:
    """The setting as text without the data set, with the settings in which the run differs from others of `group`."""
    setting = setting_text(summary.cell.setting).removeprefix(f"{summary.cell.dataset}, ")
    return ", ".join([setting, *differing_settings(summary, group)])


def _winner(where: str, group: Sequence[Summary]) -> Statement:
    """The ranking by one figure, over runs of several seeds under the same attacks; the runs that are not ranked, and why; the
    setting."""
    name = worst_name(group)
    attacked = [summary for summary in group if name in summary.figures]
    plan = next(iter(Counter(summary.attacks[name] for summary in attacked).most_common(1)), (frozenset[str](), 0))[0]
    equal = [summary for summary in attacked if summary.attacks[name] == plan]
    ranked = sorted((summary for summary in equal if summary.figures[name].n > 1), key=lambda summary: -summary.figures[name].mean)
    single = sorted((summary for summary in equal if summary not in ranked), key=lambda summary: -summary.figures[name].mean)
    mixed = [summary for summary in group if summary.mixed and summary not in attacked]
    incomplete = [summary for summary in group if name == "ra_worst" and summary not in (*attacked, *mixed)]
    by = label(name) + ", an upper bound" * BY_NAME[name].upper_bound
    unranked = {
        f"One seed each, so not ranked by {by}": [_with_mean(summary, name) for summary in single],
        "Not ranked, because their seeds were attacked differently": _titles(mixed),
        "Not ranked, because AutoAttack or an attack on the routing is missing (advmoe evaluate --standard)": _titles(incomplete),
        f"Not ranked, because not attacked by {attacks_in_words(plan)}": _titles(
            [summary for summary in group if summary not in (*equal, *mixed, *incomplete)]
        ),
    }
    tails = [f"{reason}: {_listed(those)}." for reason, those in unranked.items() if those]
    answer, figures = _ranking(ranked, name)
    figures = " ".join([*([figures] if figures else []), *tails, f"Setting: {where}."])
    return Statement(f"On {group[0].cell.dataset}, {answer}", figures)


def _ranking(ranked: Sequence[Summary], name: str) -> Statement:
    if not ranked:
        return Statement("no network is ranked in the worst case.")
    first, *rest = ranked
    title, figures = network_title(first.cell), f"{_share(first, name)}."
    if not rest:
        return Statement("only one network is ranked in the worst case.", f"{title}: {figures}")
    close = [summary for summary in rest if outcome(first, summary, name) == "not apart"]
    if not close:
        following = f"Next is {_with_mean(rest[0], name)}; all others are clearly below ({BY})."
        return Statement(f"{title} is the most robust network in the worst case.", f"{figures} {following}")
    names = "; ".join(_with_mean(summary, name) for summary in close)
    return Statement(
        "no network is clearly the most robust in the worst case.",
        f"Of the networks with several seeds, {title} has the highest mean: {figures} Not clearly below it ({BY}): {names}.",
    )


def _listed(texts: Sequence[str]) -> str:
    """'A; B; C; and 2 more'."""
    more = [f"and {len(texts) - LISTED} more"] if len(texts) > LISTED else []
    return "; ".join([*texts[:LISTED], *more])


def _titles(summaries: Sequence[Summary]) -> list[str]:
    return [network_title(summary.cell) for summary in summaries]


def _with_mean(summary: Summary, name: str) -> str:
    return f"{network_title(summary.cell)} ({summary.figures[name].mean:.1f} %)"


def _share(summary: Summary, name: str) -> str:
    """'RA-worst 36.2 ± 0.5 % (3 seeds) at 27 % of the dense network's cost (0.0078 GMACs)'."""
    figure = summary.figures[name]
    bound = "an upper bound; " if BY_NAME[name].upper_bound else ""
    share = f"{label(name)} {figure.text(1)} % ({bound}{figure.n} seeds)"
    cost = (
        f"{100 - summary.figures['reduction'].mean:.0f} % of the dense network's cost ({summary.figures['gmacs'].mean:.4f} GMACs)"
    )
    return f"{share} at {cost}"


def check_lines(records: Sequence[Record]) -> list[Statement]:
    """What the self-checks of the evaluations say: one statement for every run that failed one, or one that says that none did; one
    for every check that gave a warning; one for those that were skipped."""
    checks = [(record, check) for record in records for check in record.evaluation.checks]
    if not checks:
        return [Statement("No check of the evaluation was made.")]
    failed = [(record, [check for check in record.evaluation.checks if check.status == "fail"]) for record in records]
    warned = grouped((pair for pair in checks if pair[1].status == "warn"), lambda pair: _name(pair[1]))
    lines = [
        Statement(
            f"Failed its checks: {run_title(record)}.",
            " ".join(f"{_name(check)}: {check.detail.removesuffix('.')}." for check in fails),
        )
        for record, fails in failed
        if fails
    ]
    lines = lines or [Statement("No run failed a check of its evaluation.")]
    for name, pairs in warned.items():
        titles = _listed([run_title(record) for record, _ in pairs])
        lines.append(Statement(f"Check with a warning: {name}.", f"{titles}."))
    return [*lines, *_skipped(records)]


def _name(check: Check) -> str:
    return f"({check.number}) {check.name}"


def _skipped(records: Sequence[Record]) -> list[Statement]:
    """How many checks were skipped, and why; nothing if none was."""
    total = len({check.number for record in records for check in record.evaluation.checks})
    by_run = [{check.number: check.detail for check in record.evaluation.checks if check.status == "skipped"} for record in records]
    counts = [len(skipped) for skipped in by_run if skipped]
    if not counts:
        return []
    by_reason: dict[str, set[int]] = {}
    for check, reason in sorted({item for skipped in by_run for item in skipped.items()}):
        by_reason.setdefault(reason, set()).add(check)
    reasons = "; ".join(f"{', '.join(map(str, sorted(numbers)))} ({reason})" for reason, numbers in by_reason.items())
    number = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
    return [Statement(f"Skipped checks: {number} of {total}, in {len(counts)} of {number_of(len(records), 'run')}.", f"{reasons}.")]
