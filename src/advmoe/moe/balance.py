"""Load-balance terms. They are added to the loss so that all experts of a layer stay in use.

Shapes: B images, N experts. q is the softmax of the routing logits, c_e is the share of images that chose expert e, and P_e is the
mean of q_e. Both are taken over the images of all ranks. Each term is a scalar, and 0 at perfect balance.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from advmoe.distributed import gather_rows
from advmoe.moe.conv import Routings
from advmoe.moe.routing import Routing


def switch(routing: Routing) -> Tensor:
    """N * sum_e c_e P_e - 1 (Fedus et al. 2022, equation 4, minus its value at perfect balance)."""
    num_experts = routing.logits.shape[1]
    shares = one_hot(routing.experts, num_experts).float().mean(dim=0)
    return num_experts * (shares * routing.logits.softmax(dim=1).mean(dim=0)).sum() - 1


def importance(routing: Routing) -> Tensor:
    """The squared coefficient of variation of the P_e (Shazeer et al. 2017, equation 7)."""
    means = routing.logits.softmax(dim=1).mean(dim=0)
    return means.var(correction=0) / means.mean().square()


def entropy(routing: Routing) -> Tensor:
    """log N minus the entropy of P."""
    images, num_experts = routing.logits.shape
    log_means = routing.logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(images)  # in logarithms, so that gradients exist at 0
    return math.log(num_experts) + (log_means.exp() * log_means).sum()


BALANCE: dict[str, Callable[[Routing], Tensor]] = {"switch": switch, "importance": importance, "entropy": entropy}


def balance(term: str, routings: Routings) -> Tensor:
    """The mean of the term named `term` over the routed layers, a scalar."""
    of_all_ranks = [Routing(gather_rows(routing.logits), gather_rows(routing.experts)) for routing in routings]
    terms: Tensor = torch.stack([BALANCE[term](routing) for routing in of_all_ranks])
    return terms.mean()
