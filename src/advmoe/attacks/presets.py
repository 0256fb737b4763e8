"""The attacks that an evaluation runs: presets by name, or a plan made from a list of attacks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from advmoe.attacks import autoattack
from advmoe.attacks.registry import ATTACKS, SURROGATES, lookup_attack
from advmoe.errors import UserError, nearest

RA_FIGURES: dict[str, tuple[str, ...]] = {"ra_10": ("pgd_10",), "ra_20": ("pgd_20",), "ra_50": ("pgd_50",)}
GROUPS = {
    "autoattack": ("ra_aa", autoattack.STANDARD),
    "autoattack_plus": ("ra_aa_plus", autoattack.PLUS),
    "autoattack_rand": ("ra_aa_rand", autoattack.RAND),
}


@dataclass(frozen=True)
class Preset:
    """The attacks of an evaluation.

    `figures`: name -> attacks. The attacks of a figure run one after another, each on the correctly classified images that the
    earlier ones did not break. `survivors`: attacks on the images that AutoAttack, or without it all figures, did not break.
    `checks`: run all self-checks. `replaced`: an attack that needs more classes than the network has -> the one in its place.
    """

    figures: dict[str, tuple[str, ...]]
    survivors: tuple[str, ...]
    checks: bool = False
    replaced: dict[str, str] = field(default_factory=dict)

    def for_classes(self, num_classes: int) -> "Preset":
        """The preset for a network with `num_classes` classes. With two or three, AutoAttack and AutoAttack plus have substitutes
        for the attacks that cannot run, and the figures' names end in `_few_classes`."""
        figures, replaced = dict[str, tuple[str, ...]](), dict[str, str]()
        for figure, names in self.figures.items():
            others = autoattack.substitutes(names, num_classes)
            figures[f"{figure}_few_classes" if others else figure] = tuple(others.get(name, name) for name in names)
            replaced |= others
        if not replaced:
            return self
        survivors = tuple(name for name in self.survivors if name not in replaced.values())
        return replace(self, figures=figures, survivors=survivors, replaced=replaced)

    @property
    def attacks(self) -> list[str]:
        """All attacks, each once, in the order in which they run."""
        return list(dict.fromkeys(name for names in (*self.figures.values(), self.survivors) for name in names))

    def passes(self, *, routed: bool, survivor_share: float) -> float:
        """Passes per correctly classified image, if a share `survivor_share` of the images survives a figure's first attack."""
        able = ("", "routing") if routed else ("",)
        chains = [
            sum(ATTACKS[name].passes * (1 if number == 0 else survivor_share) for number, name in enumerate(names))
            for names in self.figures.values() if not ATTACKS[names[0]].path
        ]  # fmt: skip
        survivors = [ATTACKS[name].passes for name in self.survivors if ATTACKS[name].needs in able]
        path = max((ATTACKS[name].path for names in self.figures.values() for name in names), default=0)
        return path + sum(chains) + survivor_share * sum(survivors)


PRESETS = {
    "quick": Preset(RA_FIGURES, ("apgd_margin_t", "apgd_scaled", "straight_through_margin", "reroute_quick")),
    "standard": Preset(
        {**RA_FIGURES, "ra_aa": autoattack.STANDARD},
        (
            "apgd_margin_t", "pma", "gama", "straight_through_margin", "straight_through_5", "soft_1", "margin_-1", "margin_+1",
            "second_route", "reroute", "paths", "transfer",
        ),
        checks=True,
    ),
    "full": Preset(
        {**RA_FIGURES, "ra_aa": autoattack.STANDARD, "ra_aa_plus": autoattack.PLUS},
        (
            "apgd_margin_t", "apgd_scaled", "pma", "gama", *SURROGATES, "apgd_ce", "apgd_dlr", "apgd_t", "apgd_t_straight_through",
            "apgd_t_soft", "pgd_200", "pgd_50x10", "reroute_full", "paths", "transfer",
        ),
        checks=True,
    ),
}  # fmt: skip


def resolve(preset: str | Sequence[str]) -> Preset:
    """The preset of that name, or a plan made from a list of attacks. Raises UserError on unknown names or a missing extra."""
    chosen = _preset(preset) if isinstance(preset, str) else plan(preset)
    kinds = [lookup_attack(name).kind for name in chosen.attacks]
    if any(kind.startswith("AutoAttack") for kind in kinds):
        autoattack.require()
    return chosen


def preset_or_attacks(names: Sequence[str]) -> str | Sequence[str]:
    """What a user's list means: the name of a preset, if it has only one name and that is no attack; otherwise names of attacks."""
    return names[0] if len(names) == 1 and names[0] not in (*ATTACKS, *GROUPS) else names


def _preset(name: str) -> Preset:
    if name in PRESETS:
        return PRESETS[name]
    attacks = [*ATTACKS, *GROUPS]
    if name in attacks:
        raise UserError(f"{name} is an attack and no preset: give a list of attacks")
    similar = get_close_matches(name, [*PRESETS, *attacks])
    presets = "the presets are quick, standard and full; attacks may be named instead, such as pgd_50 and reroute"
    hint = f"did you mean {' or '.join(similar)}?" if similar else presets
    raise UserError(f"unknown preset or attack '{name}': {hint}")


def plan(names: Sequence[str]) -> Preset:
    """A preset made from attack names. A PGD or AutoAttack name becomes a figure; the other attacks run on survivors.

    `autoattack`, `autoattack_plus` and `autoattack_rand` mean all their attacks. Each attack runs once: one of a figure does not
    run on survivors again. Raises UserError on unknown names and on an empty list.
    """
    if not names:
        raise UserError("no attack is named: clean accuracy alone says nothing about robustness")
    figures: dict[str, tuple[str, ...]] = {}
    survivors: list[str] = []
    for name in names:
        if name in GROUPS:
            figure, members = GROUPS[name]
            figures[figure] = members
            continue
        if name not in ATTACKS:
            if name in PRESETS:
                raise UserError(f"{name} is a preset and cannot be in a list of attacks (advmoe evaluate --{name} runs it)")
            raise UserError(f"unknown attack '{name}': {nearest(name, [*ATTACKS, *GROUPS])}")
        if re.fullmatch(r"pgd_\d+(x\d+)?", name):  # not every name that starts with pgd_: users add attacks
            figures[f"ra_{name.removeprefix('pgd_')}"] = (name,)
        else:
            survivors.append(name)
    in_figures = {name for members in figures.values() for name in members}
    return Preset(figures, tuple(name for name in dict.fromkeys(survivors) if name not in in_figures))
