"""The section `evaluation` of a Record: figures, attacks, routing and checks."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from advmoe.evaluation.record_fields import Counts, NotNegative, Number, Part, Percent, Size, Text, Whole, Words

Status = Literal["pass", "warn", "fail", "skipped"]


class AttackTotals(Part):
    """What one attack did to all images: how many it attacked and broke, in how many seconds. `version` is the attack's."""

    attacked: Whole
    broken: Whole
    seconds: NotNegative
    version: Size = 1


@dataclass(frozen=True)
class Check:
    """One self-check of the evaluation; `number` is the one in docs/evaluation.md."""

    number: Whole
    name: Text
    status: Annotated[Status, Words("pass, warn, fail or skipped")]
    detail: Text


class Difference(Part):
    """A difference in points and its 95 % interval."""

    value: Number
    low: Number
    high: Number


class RoutingFigures(Part):
    """Shares of all images in percent, but `flip_rate` and `overlap` [L]: of the correct ones. Loads are counts [L, N].

    `ra_router`: right on the clean image over the adversarial image's route; `ra_expert`: right on the adversarial image over
    the clean image's route; `fixed_expert_*` [N]: clean, and under PGD-10, with expert e in every layer. `choice_gain` [N] is
    what choosing an expert is worth: RA-10 of the routed network less that of the fixed expert e, on the same images.
    """

    ra_router: Percent
    ra_expert: Percent
    flip_rate: Percent
    overlap: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    load: Annotated[list[Counts], Field(fail_fast=True)] = Field([])
    load_adv: Annotated[list[Counts], Field(fail_fast=True)] = Field([])
    fixed_expert_sa: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    fixed_expert_ra: Annotated[list[Percent], Field(fail_fast=True)] = Field([])
    choice_gain: Annotated[list[Difference], Field(fail_fast=True)] = Field([])


class EvaluationResult(Part):
    """What an evaluation found on its images. `figures` in percent, worst case first, `intervals` their 95 % Wilson intervals.

    `complete`: AutoAttack was run and, on a network that routes, attacks on the routing. `left_out`: attack -> why it was not run.
    `flags` has a 1 for each image that nothing broke; `broken`: attack -> rows of the images that it broke.
    """

    images: Whole
    figures: dict[Text, Percent]
    complete: bool = False
    intervals: dict[Text, tuple[Percent, Percent]]
    attacks: dict[Text, AttackTotals] = Field({})
    left_out: dict[Text, Text] = Field({})
    routing: RoutingFigures | None = None
    checks: Annotated[list[Check], Field(fail_fast=True)]
    flags: Text = ""
    broken: dict[Text, Counts] = Field({})

    @property
    def autoattack_unreliable(self) -> bool:
        """Whether check 5 found RA-AA too far above RA-worst to be trusted."""
        return any(check.number == 5 and check.status == "fail" for check in self.checks)
