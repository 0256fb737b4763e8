"""The figures of an evaluation, from its shards."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from advmoe.attacks import autoattack
from advmoe.attacks.presets import GROUPS, Preset, plan
from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record_evaluation import AttackTotals, Difference, RoutingFigures
from advmoe.evaluation.results import Evaluation, paired
from advmoe.evaluation.routing import FIXED_ATTACK, is_counted, total
from advmoe.evaluation.store import Shard
from advmoe.evaluation.target import Target

FULL_REROUTE = {"reroute", "reroute_full"}  # a full evaluation of a network that routes needs one of these
REROUTE = {"reroute_quick", *FULL_REROUTE}  # they move images to other pathways, so hidden gradients do not stop them


def summarise(target: Target, preset: Preset, shards: Sequence[Shard]) -> Evaluation:
    """All figures of an evaluation, without the checks. Attacks of earlier plans in the same store count in the worst case, so they
    are listed too: with the others if they were run on every shard, else separately. Figures are those of all stored attacks."""
    rows = [row for shard in shards for row in shard.rows]
    correct = [row for shard in shards for row in shard.correct or []]
    obstacles = {name: reason for name in preset.attacks if (reason := ATTACKS[name].obstacle(target.setting))}
    replaced = {
        name: f"{ATTACKS[name].obstacle(target.setting)}; {other} was run instead" for name, other in preset.replaced.items()
    }
    times = Counter(name for shard in shards for name in shard.attacks)
    partly_run = {name: f"{number} of {len(shards)} shards" for name, number in times.items() if number < len(shards)}
    able = [name for name in preset.attacks if name not in obstacles]
    names = [name for name in dict.fromkeys([*able, *times]) if name not in partly_run]
    broken = {name: sorted(row for shard in shards for row in shard.broken([name])) for name in names}
    ever = {row for shard in shards for row in shard.ever}
    known = plan([*GROUPS, *ATTACKS]).for_classes(target.num_classes)
    figures = {
        figure: _percent(correct, {row for name in members for row in broken[name]}, rows)
        for figure, members in {**preset.figures, **known.figures, **preset.figures}.items()  # in the preset's order
        if shards and all(_has_figure(shard, members) for shard in shards)
    }
    figures |= _over_pathways(target, shards, correct, ever)
    return Evaluation(
        _percent(correct, set(), rows), figures, _percent(correct, ever, rows), _complete(target, shards),
        {name: _totals(shards, name) for name in broken}, _routing(shards, set(correct) - ever), [], rows, correct, broken,
        {name: reason for name, reason in {**replaced, **obstacles}.items() if name not in broken}, sorted(ever), partly_run,
    )  # fmt: skip


def _has_figure(shard: Shard, members: Sequence[str]) -> bool:
    """Whether the attacks of a figure, in their present versions, were run on all images of the shard that none of them broke.

    An attack of another plan may have been run on fewer images: those that survived attacks that are not of this figure.
    """
    runs = [run for name in members if (run := shard.attacks.get(name)) is not None and run.version == ATTACKS[name].version]
    unbroken = set(shard.correct or []) - shard.broken(members)
    return len(runs) == len(members) and all(unbroken <= set(run.rows) for run in runs)


def _over_pathways(target: Target, shards: Sequence[Shard], correct: Sequence[int], ever: set[int]) -> dict[str, float]:
    """RA-paths; empty with a budget of 0, or if the pathways were not attacked on every shard with one budget."""
    runs = [run for shard in shards if (run := shard.attacks.get("paths")) is not None]
    held = [run.held for run in runs if run.held is not None and run.version == ATTACKS["paths"].version]
    budgets = {run.pathway_budget or 0 for run in runs}
    if target.pathway_budget == 0 or len(held) < len(shards) or len(budgets) != 1:
        return {}
    name = "ra_paths" if target.num_pathways <= budgets.pop() else "ra_paths_sampled"
    return {name: _percent(correct, ever.union(*held), [row for shard in shards for row in shard.rows])}


def _percent(correct: Sequence[int], broken: set[int], rows: Sequence[int]) -> float:
    return 100 * (len(correct) - len(broken)) / max(len(rows), 1)


def _complete(target: Target, shards: Sequence[Shard]) -> bool:
    """Whether AutoAttack (with few classes, with its substitute) and, where the network routes, a full attack on the routing were
    run, each as `_was_run` says."""
    if target.hides_routing or not shards:
        return False
    rerouted = not target.routed or any(_was_run(shards, name) for name in FULL_REROUTE)
    return rerouted and all(_was_run(shards, name) for name in autoattack.standard(target.num_classes))


def _was_run(shards: Sequence[Shard], name: str) -> bool:
    """Whether the present version of an attack was run on all images that no attack broke."""
    return all(
        (run := shard.attacks.get(name)) is not None
        and run.version == ATTACKS[name].version
        and set(shard.correct or []) - set(shard.ever) <= set(run.rows)
        for shard in shards
    )


def _totals(shards: Sequence[Shard], name: str) -> AttackTotals:
    """The totals of an attack over the shards, with the oldest version, the smallest pathway budget, and all networks that images
    were transferred from."""
    runs = [run for shard in shards if (run := shard.attacks.get(name)) is not None]
    return AttackTotals(
        attacked=sum(len(run.rows) for run in runs), broken=sum(len(run.broken) for run in runs),
        seconds=sum(run.seconds for run in runs), version=min((run.version for run in runs), default=1),
        pathway_budget=min((run.pathway_budget for run in runs if run.pathway_budget is not None), default=None),
        transfer=", ".join(sorted({run.transfer for run in runs if run.transfer is not None})) or None,
    )  # fmt: skip


def _routing(shards: Sequence[Shard], robust: set[int]) -> RoutingFigures | None:
    """The routing figures; None if a shard has none of the present versions. `robust` are the rows that no attack broke in the
    routed network."""
    parts = [shard.routing for shard in shards if is_counted(shard.routing)]
    if not parts or len(parts) < len(shards):
        return None
    counts = total(parts)
    images, correct = counts.images, max(counts.correct, 1)
    return RoutingFigures(
        ra_router=100 * counts.router / images,
        ra_expert=100 * counts.expert / images,
        flip_rate=100 * counts.flipped / correct,
        overlap=[100 * value / correct for value in counts.overlap],
        load=counts.load,
        load_adv=counts.load_adv,
        fixed_expert_sa=[100 * value / images for value in counts.fixed],
        fixed_expert_ra=[100 * value / images for value in counts.fixed_robust],
        choice_gain=[paired(gained, lost, images) for gained, lost in zip(counts.gained, counts.lost, strict=True)],
        fixed_expert_ra_worst=[100 * len(rows) / images for rows in counts.kept],
        any_expert_ra_worst=100 * len(set(chain.from_iterable(counts.kept))) / images,
        choice_gain_worst=[_difference(robust, set(rows), images) for rows in (counts.kept if _comparable(shards) else ())],
    )


def _comparable(shards: Sequence[Shard]) -> bool:
    """Whether the attacks on the routed network suffice to compare its worst case with that of a fixed expert: they have the
    attack on the fixed expert, and one that gradients hidden by the routing do not stop."""
    return _was_run(shards, FIXED_ATTACK) and any(_was_run(shards, name) for name in REROUTE)


def _difference(rows: set[int], others: set[int], images: int) -> Difference:
    return paired(len(rows - others), len(others - rows), images)
