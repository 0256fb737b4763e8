"""What an attack maximises: (logits [B, classes], target) -> [B]. Rows of `target` belong to rows of the logits."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label); labels [B] int64."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def kl_divergence(logits: Tensor, log_probs: Tensor) -> Tensor:
    """KL(p || q) of reference log-probabilities log p [B, classes] and q = softmax(logits) (TRADES).

    Log-probabilities on both sides: a probability that underflows to 0 gives 0, never a NaN.
    """
    return F.kl_div(logits.float().log_softmax(dim=1), log_probs, reduction="none", log_target=True).sum(dim=1)


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy}
