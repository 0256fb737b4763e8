"""The measures that tables, page, model card, plots, claims and `advmoe watch` show: name, label, unit, and value in a Record.

A new column is one entry of MEASURES. The columns have the order of the entries, worst case first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from advmoe.attacks.presets import PRESETS
from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record import Record

PRESENT = "by the present version of every attack"
QUICK = frozenset(PRESETS["quick"].attacks)
QUICK_OF_VERSION_0_1 = frozenset({"pgd_10", "pgd_20", "pgd_50", "straight_through_1", "reroute_quick"})  # Records of that version
ATTACK_DEFAULTS: dict[str, object] = {"attack gradients": "float32"}
PLANS = {"ra_worst_quick": QUICK, "ra_worst_former_quick": QUICK_OF_VERSION_0_1}


@dataclass(frozen=True)
class Measure:
    """A figure of a Record.

    `value` reads it from a Record; None if the Record lacks it. `unit` is "%" for accuracies. `robust`: an accuracy under attack,
    which plots draw. `worst`: a worst case over several attacks; compare it only under the same attacks. `upper_bound`: more
    attacks can only lower it. `summary`: whether tables over seeds have a column for it. `digits`: decimal places in these tables.
    `meaning` explains it on the page; it is empty if another measure's explanation covers it.
    """

    name: str
    label: str
    value: Callable[[Record], float | None]
    unit: Literal["%", "GMACs", "% less than dense"] = "%"
    robust: bool = True
    worst: bool = False
    upper_bound: bool = False
    summary: bool = True
    digits: int = 2
    meaning: str = ""

    @property
    def column(self) -> str:
        """The column's title: the label, or the unit if that is neither percent of the images nor the label itself."""
        return self.label if self.unit in ("%", self.label) else self.unit.removeprefix("% ") + ", %"


def attacks_of(record: Record) -> frozenset[str]:
    """The attacks behind a Record's worst case: those that were run and, for a network that does not route, the attacks on routing
    that were left out. On a network that routes, these are left out for another reason: the norm, or a pathway budget of 0.

    An attack that was run on some shards only, whose broken images count too, is in it as 'soft_1 (1 of 4 shards)'.
    """
    evaluation = record.evaluation
    inapplicable = [] if _routes(record) else [name for name in evaluation.left_out if _needs_routing(name)]
    partly_run = [f"{name} ({part})" for name, part in evaluation.partly_run.items()]
    return frozenset([*evaluation.attacks, *inapplicable, *partly_run])


def _routes(record: Record) -> bool:
    """Whether the network routes. A Record of a dense network has neither layers nor figures nor attacks of routing."""
    evaluation = record.evaluation
    return bool(record.layers) or evaluation.routing is not None or any(map(_needs_routing, evaluation.attacks))


def _needs_routing(attack: str) -> bool:
    return attack in ATTACKS and ATTACKS[attack].needs == "routing"


def evaluated(record: Record) -> str:
    """How the Record was evaluated: `PRESENT`, or 'by an older version of pgd_50 (1)', with the number of that version.

    Records that differ in it are not compared.
    """
    older = older_versions(record)
    if not older:
        return PRESENT
    return f"by an older version of {', '.join(f'{name} ({version})' for name, version in sorted(older.items()))}"


def older_versions(record: Record) -> dict[str, int]:
    """The attacks that the Record has in an older version, with the number of that version."""
    return {
        name: totals.version for name, totals in record.evaluation.attacks.items()
        if name in ATTACKS and totals.version < ATTACKS[name].version
    }  # fmt: skip


def attack_settings(record: Record) -> dict[str, object]:
    """The settings of the evaluation that change its attacks, as in `ATTACK_DEFAULTS`; the default if the Record has none.

    Records that differ in one are not compared.
    """
    values = {"attack gradients": record.attack_precision}
    return {name: default if values[name] is None else values[name] for name, default in ATTACK_DEFAULTS.items()}


def _pgd(steps: int, summary: bool = False, meaning: str = "") -> Measure:
    name = str(steps)
    return Measure(f"ra_{name}", f"RA-{name}", lambda record: record.ra.get(name), summary=summary, meaning=meaning)


def _partial(name: str) -> Callable[[Record], float | None]:
    """A worst case over fewer attacks: over those of the plan `name`, or, if that is no plan, over any others."""

    def value(record: Record) -> float | None:
        attacks = attacks_of(record)
        matches = attacks == PLANS[name] if name in PLANS else attacks not in PLANS.values()
        return record.ra_worst_quick if matches else None

    return value


MEASURES = (
    Measure(
        "ra_worst", "RA-worst", lambda record: record.ra_worst, worst=True,
        meaning="an image counts as robust only if no attack broke it, including AutoAttack and the attacks on the routing",
    ),
    Measure(
        "ra_worst_quick", "RA-worst (quick)", _partial("ra_worst_quick"), worst=True, upper_bound=True,
        meaning="the same under the preset quick: no AutoAttack, and a short attack on the routing. RA-worst is usually lower",
    ),
    Measure(
        "ra_worst_former_quick", "RA-worst (quick of 0.1)", _partial("ra_worst_former_quick"), worst=True, upper_bound=True,
        meaning="the same under the preset quick of version 0.1, which lacked attacks on the margin: it is some points too high",
    ),
    Measure(
        "ra_worst_listed", "RA-worst (listed attacks)", _partial("ra_worst_listed"), worst=True, upper_bound=True,
        meaning="an image counts as robust only if none of the listed attacks broke it. They are not those of a preset, and lack "
        "AutoAttack or the full attack on the routing",
    ),
    Measure("sa", "SA", lambda record: record.sa, robust=False, meaning="accuracy on clean images"),
    _pgd(10),
    _pgd(20),
    _pgd(50, True, "accuracy under PGD on cross-entropy with a random start and 50 steps; likewise RA-10 and RA-20"),
    Measure("ra_aa", "RA-AA", lambda record: record.ra_aa, meaning="accuracy under AutoAttack, standard version"),
    Measure(
        "ra_aa_few_classes", "RA-AA (few classes)", lambda record: record.evaluation.figures.get("ra_aa_few_classes"),
        summary=False, meaning="accuracy under AutoAttack for two or three classes: its targeted APGD cannot run, so that of this "
        "package replaces it. It is not the figure of standard AutoAttack",
    ),
    Measure("ra_aa_plus", "RA-AA-plus", lambda record: record.ra_aa_plus, summary=False),
    Measure(
        "ra_aa_plus_few_classes", "RA-AA-plus (few classes)",
        lambda record: record.evaluation.figures.get("ra_aa_plus_few_classes"), summary=False,
        meaning="the same for AutoAttack plus, with APGD on the DLR replaced, too, if there are two classes",
    ),
    Measure("ra_aa_rand", "RA-AA-rand", lambda record: record.ra_aa_rand, summary=False),
    Measure(
        "ra_paths", "RA-paths", lambda record: record.evaluation.figures.get("ra_paths"), summary=False,
        meaning="an image counts as robust only if no attack breaks it on any pathway, with the network fixed on each in turn. It "
        "estimates a lower bound of the accuracy under any attack on the routing; RA-worst is an upper bound",
    ),
    Measure(
        "ra_paths_sampled", "RA-paths (sampled)", lambda record: record.evaluation.figures.get("ra_paths_sampled"), summary=False,
        meaning="the same over a sample of pathways, if there are too many to try all",
    ),
    Measure(
        "gmacs", "GMACs", lambda record: record.gmacs, "GMACs", robust=False, digits=4,
        meaning="billions of multiply-accumulates of one image",
    ),
    Measure("reduction", "less than dense", lambda record: record.reduction, "% less than dense", robust=False, digits=0),
)  # fmt: skip
BY_NAME = {measure.name: measure for measure in MEASURES}
WORST = tuple(measure.name for measure in MEASURES if measure.worst)
SUMMARY = tuple(measure for measure in MEASURES if measure.summary)
COSTS = tuple(measure for measure in MEASURES if measure.unit != "%")


def label(name: str) -> str:
    """A measure's label; for a figure that is no measure, such as 'ra_50x10', the name in capitals: 'RA-50X10'."""
    return BY_NAME[name].label if name in BY_NAME else name.upper().replace("_", "-")


def worst_of(record: Record) -> Measure:
    """The measure of a Record's worst case."""
    return next(measure for measure in MEASURES if measure.worst and measure.value(record) is not None)


def with_intervals(record: Record) -> list[tuple[str, float, tuple[float, float]]]:
    """Label, percentage and 95 % interval of every accuracy that has an interval, worst case first."""
    figures = record.evaluation.figures
    return [
        (worst_of(record).label if name in WORST else label(name), figures[name], interval)
        for name, interval in record.evaluation.intervals.items()
        if name in figures
    ]


def measured(records: Iterable[Record]) -> list[Measure]:
    """Accuracies that any of the Records has, in order; PGD with other numbers of steps comes after the listed ones."""
    records = list(records)
    accuracies = [measure for measure in MEASURES if measure.unit == "%"]
    others = {int(steps) for record in records for steps in record.ra if steps.isdecimal() and f"ra_{steps}" not in BY_NAME}
    last = max(index for index, measure in enumerate(accuracies) if measure.name.removeprefix("ra_").isdecimal())
    listed = [*accuracies[: last + 1], *(_pgd(steps) for steps in sorted(others)), *accuracies[last + 1 :]]
    return [measure for measure in listed if any(measure.value(record) is not None for record in records)]
