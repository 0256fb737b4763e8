"""The blocks of docs/choices.md and docs/ingredients.md: what the choice of an expert gains, and what each option gains."""

from collections.abc import Iterable
from statistics import fmean

from advmoe.evaluation.record import Record
from advmoe.reports.cell import cell_of
from advmoe.reports.choice import differences_from_control
from advmoe.reports.control import compared, worst_case_difference
from advmoe.reports.styles import network_title
from advmoe.reports.summaries import summarise
from docs_blocks.markdown import table
from docs_blocks.sources import by_network, main_records, paired_seeds, records

PAIRS = (  # runs of the sweeps at the size of five_methods.yaml, each with the one that it is compared with
    ("at_dense", "at_small_dense"),
    ("at_sparse", "at_small_dense"),
    ("at_moe", "at_small_dense"),
    ("advmoe", "at_small_dense"),
    ("at_moe-n1", "at_small_dense"),
    ("at_moe-n1-half_images", "at_moe-n1"),
    ("at_moe", "at_moe-n1-half_images"),
    ("advmoe", "at_moe-n1-half_images"),
    ("advmoe-plus", "advmoe"),
    ("at_moe-plus", "at_moe"),
    ("at_moe-n1-plus", "at_moe-n1"),
    ("at_small_dense-plus", "at_small_dense"),
    ("advmoe-plus", "at_small_dense"),
    ("advmoe-plus", "at_small_dense-plus"),
    ("advmoe-plus", "at_dense"),
    ("advmoe-plus-tied_statistics", "advmoe-plus"),
    ("advmoe-plus-tied_statistics", "at_moe-n1-plus"),
    ("advmoe-r0.8-overlap", "at_small_dense"),
    ("advmoe-r0.8-overlap", "at_moe-n1"),
    ("advmoe-r0.8-overlap", "advmoe"),
    ("advmoe-r0.8-plus-overlap", "at_moe-n1-plus"),
    ("advmoe-r0.8-plus-overlap", "advmoe-plus"),
    ("advmoe-r0.2", "at_small_dense-r0.2"),
    ("advmoe-r0.2-plus", "advmoe-r0.2"),
    ("at_moe-r0.8", "at_small_dense-r0.8"),
    ("advmoe-r0.8", "at_small_dense-r0.8"),
    ("advmoe-r0.8", "at_moe-r0.8"),
)

OF_ANOTHER_SETTING = {"half_images": ", half of the images", "overlap": ", width 10"}  # file of results/choices -> what differs


def choice(evaluated: list[Record]) -> str:
    """The methods over seeds, and each routed network's difference from its control."""
    differences = differences_from_control(evaluated)
    rows = []
    for summary in summarise(evaluated):
        figures = [summary.figures[name].text(1) for name in ("sa", "ra_50", "ra_worst_quick")]
        against = str(differences.get(summary.cell, ""))
        rows.append([network_title(summary.cell), f"{summary.figures['gmacs'].mean:.4f}", *figures, str(summary.n), against])
    columns = ["network", "GMACs", "SA", "RA-50", "RA-worst (quick)", "seeds", "against one expert, image by image"]
    return table(columns, rows)


def pairs() -> str:
    """The differences of the `PAIRS` in the worst case, over the seeds that both have. The name of a run in one of the files
    `OF_ANOTHER_SETTING` ends with the file's."""

    def title(network: str, record: Record) -> str:
        return network_title(cell_of(record)) + OF_ANOTHER_SETTING.get(network.rpartition("-")[2], "")

    runs = by_network([*main_records(), *records("results/choices/tied_statistics.json")])
    for file in OF_ANOTHER_SETTING:
        runs |= {f"{network}-{file}": seeds for network, seeds in by_network(records(f"results/choices/{file}.json")).items()}
    rows = []
    for networks in PAIRS:
        both = compared(paired_seeds(runs, *networks))
        if difference := worst_case_difference(both):
            titles = [title(name, record) for name, record in zip(networks, both[0], strict=True)]
            rows.append([*titles, difference.words, ", ".join(str(record.seed) for record, _ in both)])
    return table(["network", "compared with", "RA-worst (quick), image by image", "seeds"], rows, texts=2)


def gains(evaluated: Iterable[tuple[str, Record]]) -> str:
    """What choosing an expert gains over each expert in every layer, in the worst case, of each named Record that measured it."""
    rows = []
    for name, record in evaluated:
        routing = record.evaluation.routing
        if routing is None or len(routing.choice_gain_worst) < 2:
            continue
        alone = ", ".join(f"{value:.1f}" for value in routing.fixed_expert_ra_worst)
        either = "" if routing.any_expert_ra_worst is None else f"{routing.any_expert_ra_worst:.1f}"
        over = "; ".join(f"{gain.value:+.1f} ({bound(gain.low)} to {bound(gain.high)})" for gain in routing.choice_gain_worst)
        rows.append([name, str(record.seed), f"{record.worst:.1f}", alone, either, over])
    columns = ["network", "seed", "RA-worst (quick)", "each expert alone", "at least one of them", "gain over each, points"]
    return table(columns, rows)


def bound(value: float) -> str:
    """'+1.3'; near 0 with one significant digit, which says on which side it is: '-0.03'."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else f"{value:+.1g}"


def gains_of_networks(evaluated: list[Record]) -> str:
    """The gains by choosing an expert, each run with the name of its network."""
    return gains((network_title(cell_of(record)), record) for record in evaluated)


def gains_of_ingredients() -> str:
    """The gains by choosing an expert in the runs of the ingredients."""
    runs = by_network(records("results/choices/ingredients.json"))
    return gains((f"`{variant}`", record) for variant, seeds in runs.items() for record in seeds.values())


def ingredients() -> str:
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

    rows = []
    for variant, seeds in runs.items():
        network = "at_moe-n1" if variant.startswith("at_moe-n1-") else variant.partition("-")[0]
        of_seeds = [(record.sa, expert_alone(record), record.ra["10"], record.ra["50"], record.worst) for record in seeds.values()]
        means = map(mean_text, zip(*of_seeds, strict=True))
        differences = [against(variant, f"{network}-base"), against(variant, variant.replace(network, "at_moe-n1"))]
        rows.append([f"`{variant}`", ", ".join(map(str, sorted(seeds))), *means, *differences])
    columns = ["run", "seeds", "SA", "RA-10 of an expert alone", "RA-10", "RA-50", "RA-worst (quick)"]
    return table([*columns, "minus its base", "minus the control"], rows, texts=2)
