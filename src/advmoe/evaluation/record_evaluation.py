"""The section `evaluation` of a Record: figures, attacks, routing and checks."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from advmoe.evaluation.record_fields import (
    CountList,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Percent,
    RecordModel,
    Size,
    Text,
    ValidValues,
)

Status = Literal["pass", "warn", "fail", "skipped"]


class AttackTotals(RecordModel):
    """The totals of one attack: the number of images that it attacked and broke, and its seconds. `version` is the attack's.

    `pathway_budget`: the number of pathways up to which an attack on fixed pathways attacked all. `transfer`: digest of the network
    that images were transferred from. Older Records do not say them.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"pathway_budget", "transfer"})
    attacked: NonNegativeInt
    broken: NonNegativeInt
    seconds: NonNegativeFloat
    version: Size = 1
    pathway_budget: NonNegativeInt | None = None
    transfer: Text | None = None


@dataclass(frozen=True)
class Check:
    """One self-check of the evaluation. `number` is its number in docs/evaluation.md."""

    number: NonNegativeInt
    name: Text
    status: Annotated[Status, ValidValues("pass, warn, fail or skipped")]
    detail: Text


class Difference(RecordModel):
    """A difference in percentage points, and its 95 % interval."""

    value: Number
    low: Number
    high: Number

    @property
    def words(self) -> str:
        """'+2.0 points (-1.3 to +5.2)'."""
        return f"{self.value:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"


class RoutingFigures(RecordModel):
    """Percentages of all images, except `flip_rate` and `overlap` [L]: percentages of the correct ones. Loads are counts [L, N].

    `ra_router`: correct on the clean image with the adversarial image's route. `ra_expert`: correct on the adversarial image with
    the clean image's route. `fixed_expert_sa`, `fixed_expert_ra`, `fixed_expert_ra_worst` [N]: accuracy with expert e in every
    layer, clean, under PGD-10, and under PGD-10 and then APGD on the targeted margin. `any_expert_ra_worst`: images that at least
    one of these networks keeps in the worst case, which only a choice that knows the label and cannot be attacked would reach.

    The gain from choosing an expert, on the same images: `choice_gain_worst` [N] is the worst case of the routed network, over all
    attacks that were run, minus `fixed_expert_ra_worst`. It needs APGD on the targeted margin and a rerouting attack.
    `choice_gain` [N] is RA-10 of the routed network minus `fixed_expert_ra`: usually too high, because routing hides gradients from
    PGD-10.
    """

    ra_router: Percent
    ra_expert: Percent
    flip_rate: Percent
    overlap: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    load: Annotated[list[CountList], Field(fail_fast=True)] = Field([])
    load_adv: Annotated[list[CountList], Field(fail_fast=True)] = Field([])
    fixed_expert_sa: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    fixed_expert_ra: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    choice_gain: Annotated[list[Difference], Field(fail_fast=True)] = Field([])
    fixed_expert_ra_worst: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    any_expert_ra_worst: Percent | None = None
    choice_gain_worst: Annotated[list[Difference], Field(fail_fast=True)] = Field([])


class EvaluationResult(RecordModel):
    """The results of an evaluation. `figures` are in percent, worst case first; `intervals` are their 95 % Wilson intervals.

    `complete`: AutoAttack was run and, on a network that routes, attacks on the routing. `left_out`: attack -> why it was not run.
    `flags` has a 1 for each image that no attack broke. `broken`: attack -> rows of the images that it broke. `partly_run`: attack
    -> on how many shards it was run, if not on all. It is not in `attacks`, but the images that it broke count in the worst case.
    """

    images: NonNegativeInt
    figures: dict[Text, Percent]
    complete: bool = False
    intervals: dict[Text, tuple[Percent, Percent]]
    attacks: dict[Text, AttackTotals] = Field({})
    left_out: dict[Text, Text] = Field({})
    routing: RoutingFigures | None = None
    checks: Annotated[list[Check], Field(fail_fast=True)]
    flags: Text = ""
    broken: dict[Text, CountList] = Field({})
    partly_run: dict[Text, Text] = Field({})

    @property
    def autoattack_unreliable(self) -> bool:
        """Whether RA-AA is too far above RA-worst to be trusted, according to check 5."""
        return any(check.number == 5 and check.status == "fail" for check in self.checks)
