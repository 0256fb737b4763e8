"""The cost of a preset in words, counted from its attacks."""

from collections import Counter
from collections.abc import Sequence

from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import ATTACKS


def budget(preset: Preset) -> str:
    """It leaves out the routing figures of a network that routes."""
    chains = _passes([name for names in preset.figures.values() for name in names])
    parts = [f"at most {chains} an image"] if chains else []
    if preset.survivors:
        parts.append(f"at most {_passes(preset.survivors)} on survivors")
    return "; ".join([*parts, *(["all self-checks"] if preset.checks else [])])


def _passes(names: Sequence[str]) -> str:
    """'150 PGD and 100 APGD passes', in the order of the attacks. The points of one PGD path cost as much as its last point."""
    attacks, totals = [ATTACKS[name] for name in names], Counter[str]()
    totals["PGD"] = max((attack.path for attack in attacks), default=0)
    for attack in attacks:
        if not attack.path:
            totals[attack.kind] += attack.passes
    parts = [f"{passes:,} {kind}" for kind, passes in totals.items() if passes]
    return f"{', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]} passes" if parts else ""
