"""The figures of an evaluation, from its shards."""

from collections.abc import Sequence

from advmoe.attacks import autoattack
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record_evaluation import AttackTotals, Difference, RoutingFigures
from advmoe.evaluation.results import Evaluation, paired
from advmoe.evaluation.routing import total
from advmoe.evaluation.store import RoutingCounts, Shard
from advmoe.evaluation.target import Target

FULL_REROUTE = {"reroute", "reroute_full"}  # a full evaluation of a network that routes needs one of these


def summarise(target: Target, preset: Preset, shards: Sequence[Shard]) -> Evaluation:
    """All figures of an evaluation, without the checks."""
    rows = [row for shard in shards for row in shard.rows]
    correct = [row for shard in shards for row in shard.correct or []]
    left_out = {name: reason for name in preset.attacks if (reason := ATTACKS[name].obstacle(target.setting))}
    broken = {
        name: sorted(row for shard in shards for row in shard.broken([name])) for name in preset.attacks if name not in left_out
    }
    figures = {
        figure: _percent(correct, {row for name in names for row in broken[name]}, rows)
        for figure, names in preset.figures.items()
        if not left_out.keys() & set(names)
    }
    ever = {row for shard in shards for row in shard.ever}
    fooled_on_pathways = [run.held for shard in shards if (run := shard.attacks.get("paths")) is not None and run.held is not None]
    if "paths" in broken and len(fooled_on_pathways) == len(shards):
        name = "ra_paths" if target.num_pathways <= target.pathway_budget else "ra_paths_sampled"
        figures[name] = _percent(correct, ever | {row for fooled in fooled_on_pathways for row in fooled}, rows)
    return Evaluation(
        _percent(correct, set(), rows), figures, _percent(correct, ever, rows), _complete(target, shards),
        {name: _totals(shards, name) for name in broken}, _routing(shards), [], rows, correct, broken, left_out, sorted(ever),
    )  # fmt: skip


def _percent(correct: Sequence[int], broken: set[int], rows: Sequence[int]) -> float:
    return 100 * (len(correct) - len(broken)) / max(len(rows), 1)


def _complete(target: Target, shards: Sequence[Shard]) -> bool:
    """Whether AutoAttack and, where the network routes, a full attack on the routing were run on every shard."""
    ran = set.intersection(*(set(shard.attacks) for shard in shards)) if shards else set()
    if target.hides_routing:
        return False
    return set(autoattack.STANDARD) <= ran and (not target.routed or bool(ran & FULL_REROUTE))


def _totals(shards: Sequence[Shard], name: str) -> AttackTotals:
    runs = [shard.attacks[name] for shard in shards]
    return AttackTotals(
        attacked=sum(len(run.rows) for run in runs), broken=sum(len(run.broken) for run in runs),
        seconds=sum(run.seconds for run in runs), version=ATTACKS[name].version,
    )  # fmt: skip


def _routing(shards: Sequence[Shard]) -> RoutingFigures | None:
    parts = [shard.routing for shard in shards if shard.routing is not None]
    if not parts:
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
        choice_gain=_choice_gain(counts),
    )


def _choice_gain(counts: RoutingCounts) -> list[Difference]:
    """The accuracy of the routed network minus that of each fixed expert; empty if a shard of an older version did not count it."""
    if counts.gained is None or counts.lost is None:
        return []
    return [paired(more, less, counts.images) for more, less in zip(counts.gained, counts.lost, strict=True)]
