"""The result of an evaluation: figures, attacks, routing, checks."""

import math
from dataclasses import dataclass, field

from advmoe.evaluation.record_evaluation import AttackTotals, Check, Difference, EvaluationResult, RoutingFigures
from advmoe.files import JsonObject

Z = 1.959964  # the 0.975 quantile of the normal distribution, for 95 % intervals


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Figures are in percent of all images.

    - `worst`: an image counts as robust only if no attack that was run broke it.
    - `complete`: AutoAttack was run (with fewer than four classes, with `apgd_t` in place of its targeted APGD) and, on a network
      that routes, a full attack on the routing, in their present versions. If not, `worst` is over fewer attacks.
    - `rows`: the numbers of the images in x, all of them or those of a part.
    - `attacks`, `broken`: the totals of each attack and the rows of the images that it broke. Attacks of earlier plans in the same
      store are included if they were run on every shard, because they count in `worst`.
    - `left_out`: for each attack of the preset that was never run, the reason.
    - `ever`: the rows that any attack broke, including attacks of earlier plans in the same store.
    - `partly_run`: for each attack of an earlier plan that was run on some shards only, on how many: "1 of 4 shards".
    """

    sa: float
    figures: dict[str, float]
    worst: float
    complete: bool
    attacks: dict[str, AttackTotals]
    routing: RoutingFigures | None
    checks: list[Check]
    rows: list[int] = field(repr=False)
    correct: list[int] = field(repr=False)
    broken: dict[str, list[int]] = field(repr=False)
    left_out: dict[str, str]
    ever: list[int] = field(repr=False)
    partly_run: dict[str, str]

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.rows)

    def interval(self, percent: float) -> tuple[float, float]:
        """95 % Wilson interval of a percentage of the images, in percent."""
        return wilson(percent / 100, self.images)

    def routed_figures(self) -> dict[str, float]:
        """RA-router, RA-expert and the fixed experts' accuracies; empty if PGD-50 was not run or the network does not route."""
        if self.routing is None:
            return {}
        figures = {"ra_router": self.routing.ra_router, "ra_expert": self.routing.ra_expert}
        for kind in ("fixed_expert_sa", "fixed_expert_ra", "fixed_expert_ra_worst"):
            figures |= {f"{kind}_{expert}": share for expert, share in enumerate(getattr(self.routing, kind))}
        return figures

    def result(self) -> EvaluationResult:
        """The section `evaluation` of a Record."""
        robust = set(self.correct) - set(self.ever)
        named = {"ra_worst" if self.complete else "ra_worst_quick": self.worst, "sa": self.sa, **self.figures}
        return EvaluationResult(
            images=self.images, figures=named, complete=self.complete,
            intervals={name: self.interval(value) for name, value in {**named, **self.routed_figures()}.items()},
            attacks=self.attacks, left_out=self.left_out, routing=self.routing, checks=self.checks,
            flags="".join("1" if row in robust else "0" for row in self.rows), broken=self.broken,
            partly_run=self.partly_run,
        )  # fmt: skip

    def to_dict(self) -> JsonObject:
        """The same as a dict that can be written as JSON."""
        return self.result().model_dump()


def paired(gained: int, lost: int, count: int) -> Difference:
    """The difference of two percentages of the same `count` images, in percentage points.

    `gained` images count only for the first percentage, `lost` images only for the second. The interval is Wald's with the
    correction of Agresti and Min (2005): half an image is added to each of the four cells.
    """
    return mean_difference(gained - lost, gained + lost, count)


def mean_difference(total: int, squares: int, count: int, pairs: int = 1) -> Difference:
    """The mean of `paired` over several `pairs` of networks on the same `count` images.

    `total` and `squares` are the sum, over the images, of each image's difference and of its square. An image's difference is the
    number of pairs in which it counts only for the first network, minus the number in which it counts only for the second. The
    interval is over the images: the pairs of one image are not independent, so they do not count as more images.
    """
    n = count + 2
    middle, half = total / n, Z * math.sqrt(max(squares + pairs**2 - total**2 / n, 0.0)) / n
    value, low, high = (100 * share / pairs for share in (total / max(count, 1), middle - half, middle + half))
    return Difference(value=value, low=low, high=high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a binomial proportion (Wilson 1927), in percent."""
    if count == 0:
        return 0.0, 100.0
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)
