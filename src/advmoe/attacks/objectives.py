"""The objectives that attacks maximise: (logits [B, classes], target) -> [B], one value per image.

For an untargeted objective `target` is the labels [B] int64; for a targeted one it is [B, 2] int64, label and target class.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Objective = Callable[[Tensor, Tensor], Tensor]


def predicted(logits: Tensor) -> Tensor:
    """The predicted classes [B] int64; -1 if a logit is not finite: the argmax of NaN would be a class, and could be the label."""
    return logits.argmax(dim=1).where(torch.isfinite(logits).all(dim=1), -1)


def full(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it already is. Losses are never computed in lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label); labels [B] int64."""
    return F.cross_entropy(full(logits), labels, reduction="none")


def kl_divergence(logits: Tensor, log_probs: Tensor) -> Tensor:
    """KL(p || q) with `log_probs` = log p [B, classes] and q = softmax(logits) (Zhang et al. 2019, TRADES).

    Both are log-probabilities, so a probability that underflows to 0 gives 0, not NaN.
    """
    return F.kl_div(full(logits).log_softmax(dim=1), log_probs, reduction="none", log_target=True).sum(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit minus the label's. Positive if the image is misclassified. labels [B] int64; 2 classes or more."""
    logits = full(logits)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.max(dim=1).values - _of(logits, labels)


def targeted_margin(logits: Tensor, target: Tensor) -> Tensor:
    """The target class's logit minus the label's; target [B, 2] int64, label and target class."""
    logits = full(logits)
    return _of(logits, target[:, 1]) - _of(logits, target[:, 0])


def probability_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other probability minus the label's (PMA; Xie, Zheng, Huang, Ye and Ma 2024,
    arXiv:2411.15210); labels [B] int64; 2 classes or more."""
    return margin(full(logits).softmax(dim=1), labels)


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits divided by the difference of the two largest ones (scaling of Yamamura et al. 2022).

    The divisor is a constant for the gradient. However far apart the logits are, the softmax does not saturate, so the gradient
    does not vanish. labels [B] int64.
    """
    logits = full(logits)
    top = logits.detach().topk(2, dim=1).values
    return F.cross_entropy(logits / (top[:, :1] - top[:, 1:]).clamp_min(1e-6), labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_1 - z_3), z_1 >= z_2 >= ... sorted (Croce & Hein 2020, eq. 6).

    labels [B] int64. The formula needs 3 classes. For 2 classes there is no equivalent: a function of two logits that ignores
    their shift and scale is constant on each side of the decision boundary, so its gradient is 0. With 2 classes the
    denominator is therefore 1, and the loss is the margin. Rescaling the logits then changes the values of the loss, but neither
    their order nor the direction of the gradient.
    """
    ranked = _ranked(logits)
    return _ratio(margin(logits, labels), ranked[:, 0] - ranked[:, 2]) if ranked.shape[1] > 2 else margin(logits, labels)


def targeted_dlr(logits: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), z_1 >= z_2 >= ... sorted (Croce & Hein 2020, eq. 7).

    target [B, 2] int64, label y and target class t. With 3 classes z_2 and z_3 replace z_3 and z_4: divided by z_1 - z_3, the
    loss towards the last class would be -1 everywhere. With 2 classes the denominator is 1 (see `dlr`).
    """
    ranked, difference = _ranked(logits), targeted_margin(logits, target)
    return _ratio(difference, ranked[:, 0] - ranked[:, -2:].mean(dim=1)) if ranked.shape[1] > 2 else difference


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _ranked(logits: Tensor) -> Tensor:
    """The four largest logits, or all if there are fewer, descending."""
    return full(logits).topk(min(4, logits.shape[1]), dim=1).values


def _ratio(difference: Tensor, spread: Tensor) -> Tensor:
    """`difference` / `spread`. If the spread is 0, the ratio is large or 0; its gradient has the right sign."""
    return difference / spread.clamp_min(1e-12)
