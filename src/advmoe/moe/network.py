"""The base class of networks with routed layers: it gives training the MoE layers, and the parameters of each level."""

from typing import Any

import torch
from torch import Tensor, nn

from advmoe.config.choices import Dispatch
from advmoe.entries import check_accepts
from advmoe.errors import UserError
from advmoe.moe.channels import ChannelMask
from advmoe.moe.conv import MoEConv2d, Routings
from advmoe.moe.guards import TRAIN_MODE, in_transform
from advmoe.moe.norm import ExpertNorm
from advmoe.moe.routing import HARD, FixedGate, ForcedGate, Gate, Routing


class RoutedNetwork(nn.Module):
    """Base class of networks that route. Layers without routers share `router`, or one of `stage_routers` in each stage.

    `masks` mask channels.
    """

    router: nn.Module | None
    masks: nn.ModuleList
    num_classes: int
    min_size = 1  # smallest height and width of an image, in pixels

    def __init__(self) -> None:
        super().__init__()
        self.stage_routers = nn.ModuleList()

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their routings; empty for a dense network."""
        return [module for module in self.modules() if isinstance(module, MoEConv2d)]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes] of images [B, C, H, W], and the Routings of the MoE layers. Subclasses implement it."""
        raise NotImplementedError

    def routers(self) -> list[nn.Module]:
        """The routers in the order of their Routings; empty for a dense network."""
        routers = (self.router, *self.stage_routers, *(layer.router for layer in self.moe_layers()))
        return [router for router in routers if router is not None]

    def choose(self, x: Tensor, gate: Gate) -> tuple[Gate, Tensor | None, Routings]:
        """The gate and the logits [B, N] or None that the layers get for images `x`, and the Routings of the network's router.

        A network without such a router has no Routings here.
        """
        return (gate, None, ()) if self.router is None else shared_choice(self.router, 0, x, gate)

    def check_mode(self) -> None:
        """Raises RuntimeError if a torch.func transform calls a network with MoE layers in train mode."""
        if self.training and in_transform() and self.moe_layers():
            raise RuntimeError(TRAIN_MODE)

    def set_dispatch(self, name: Dispatch) -> None:
        """Set how the MoE layers run their experts: one of `advmoe.moe.DISPATCHES`, or auto."""
        for layer in self.moe_layers():
            layer.dispatch = name

    def tie_norms(self, wanted: bool) -> None:
        """Set whether expert norms, in train mode, normalise every image as an image of expert 0 (`ExpertNorm.tied`)."""
        for module in self.modules():
            if isinstance(module, ExpertNorm):
                module.tied = wanted

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters phi of the lower level: those of the routers."""
        return [parameter for router in self.routers() for parameter in router.parameters()]

    def mask_parameters(self) -> list[nn.Parameter]:
        """The scores of the channel masks; empty for a network without masks."""
        return [mask.scores for mask in self.masks if isinstance(mask, ChannelMask)]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters w of the upper level: all but those of the routers and masks."""
        others = {id(parameter) for parameter in (*self.router_parameters(), *self.mask_parameters())}
        return [parameter for parameter in self.parameters() if id(parameter) not in others]


def shared_choice(router: nn.Module, number: int, x: Tensor, gate: Gate) -> tuple[Gate, Tensor, Routings]:
    """The gate and the logits [B, N] that the layers of router `number` get, and its Routing, from its input `x`.

    It chooses once, so that all these layers run the experts of its Routing, also under a random gate.
    """
    logits: Tensor = router(x)
    chosen = gate.weights(logits, number)
    return FixedGate(chosen), logits, (Routing(logits, chosen.experts),)


@torch.no_grad()
def check_routings(model: Any, x: Tensor) -> None:
    """Raises UserError if attacks on the routing of a network in eval mode would miss it. `x` [1, C, H, W] is an image.

    `forward_routed` must run the experts that the gate gives each layer, and return a Routing of each layer in order; in a
    `RoutedNetwork`, of all `routers()`. Through the hard gate it must give the logits of `forward`. The image is sent
    along a few routes; no two layers have equal experts in all of them.
    """
    is_ours = isinstance(model, RoutedNetwork)
    routers, network = model.routers() if is_ours else [], type(model).__name__ if is_ours else "the network"
    check_accepts(f"{network}: forward_routed", model.forward_routed, "x", "gate")
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        logits, routings = model.forward_routed(x, HARD)
        torch.manual_seed(0)  # for a random network
        expected = model(x)
    count = len(routers) or len(routings)
    if len(routings) != count:
        raise UserError(f"{network}: forward_routed returns {len(routings)} routings for {count} routers: one of each is needed")
    if not routings:
        return
    experts = torch.tensor([routing.logits.shape[1] for routing in routings], device=x.device)
    route = _distinguishing(count, x.device).minimum(experts - 1)
    routings = model.forward_routed(x.repeat(len(route), 1, 1, 1), ForcedGate(route))[1]
    for number, forced in enumerate(route.T):
        if len(routings) != count or not torch.equal(routings[number].experts, forced):
            advice = (
                "create the layers in the order in which they run, and give each of them the gate of forward_routed" if routers else
                "forward_routed must call gate.weights(logits, layer) in each layer, with the layers' numbers from 0, run the "
                "experts that it returns, and return them in the layer's Routing"
            )  # fmt: skip
            raise UserError(f"{network}: routing {number} is not the one that the gate gives MoE layer {number}: {advice}")
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(f"{network}: forward and forward_routed give different logits, so attacks on the routing would miss it")


def _distinguishing(count: int, device: torch.device) -> Tensor:
    """Routes [B, count] of experts 0 and 1 in which no two layers are equal, and no layer has one expert only."""
    numbers = torch.arange(count, device=device)
    bits = torch.stack([numbers >> bit & 1 for bit in range(max(count - 1, 1).bit_length())])
    return torch.cat([bits, 1 - bits[:1]])
