"""The base class of networks with routed layers: it gives training the MoE layers, and the parameters of each level."""

import torch
from torch import Tensor, nn

from advmoe.config.choices import Dispatch
from advmoe.errors import UserError
from advmoe.moe.channels import ChannelMask
from advmoe.moe.conv import MoEConv2d, Routings
from advmoe.moe.guards import TRAIN_MODE, in_transform
from advmoe.moe.norm import ExpertNorm
from advmoe.moe.routing import HARD, FixedGate, ForcedGate, Gate, Routing


class RoutedNetwork(nn.Module):
    """Base class of networks that route. `router` is the router of all layers, if the layers have none. `masks` mask channels."""

    router: nn.Module | None
    masks: nn.ModuleList
    num_classes: int
    min_size = 1  # smallest height and width of an image, in pixels

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their routings; empty for a dense network."""
        return [module for module in self.modules() if isinstance(module, MoEConv2d)]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes] of images [B, C, H, W], and the Routings of the MoE layers. Subclasses implement it."""
        raise NotImplementedError

    def choose(self, x: Tensor, gate: Gate) -> tuple[Gate, Tensor | None, Routings]:
        """The gate and the logits [B, N] or None that the layers get for images `x`, and the Routings of the network's router.

        The router chooses once, so that all layers run the experts of its Routing, also under a random gate. A network without such
        a router has no Routings here.
        """
        if self.router is None:
            return gate, None, ()
        logits: Tensor = self.router(x)
        chosen = gate.weights(logits, 0)
        return FixedGate(chosen), logits, (Routing(logits, chosen.experts),)

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
        routers = [self.router, *(layer.router for layer in self.moe_layers())]
        return [parameter for router in routers if router is not None for parameter in router.parameters()]

    def mask_parameters(self) -> list[nn.Parameter]:
        """The scores of the channel masks; empty for a network without masks."""
        return [mask.scores for mask in self.masks if isinstance(mask, ChannelMask)]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters w of the upper level: all but those of the routers and masks."""
        others = {id(parameter) for parameter in (*self.router_parameters(), *self.mask_parameters())}
        return [parameter for parameter in self.parameters() if id(parameter) not in others]


@torch.no_grad()
def check_routings(model: RoutedNetwork, x: Tensor) -> None:
    """Raises UserError if `forward_routed` of a network in eval mode does not return the Routing of every MoE layer in the order
    of `moe_layers()`, or if a layer does not follow the gate. Attacks on the routing would then miss it.

    `x` [1, C, H, W] is an image. It is sent along a few routes; the layers have different experts in at least one of them.
    """
    layers, network = model.moe_layers(), type(model).__name__
    if not layers:
        return
    count = len(layers) if model.router is None else 1
    route = _distinguishing(count, x.device) % layers[0].num_experts
    routings = model.forward_routed(x.repeat(len(route), 1, 1, 1), ForcedGate(route))[1]
    if len(routings) != count:
        raise UserError(f"{network}: forward_routed returns {len(routings)} routings for {count} MoE layers: one of each is needed")
    for number, (routing, forced) in enumerate(zip(routings, route.T, strict=True)):
        if not torch.equal(routing.experts, forced):
            raise UserError(
                f"{network}: routing {number} is not the one that the gate gives MoE layer {number}: create the layers in the "
                "order in which they run, and give each of them the gate of forward_routed"
            )


def _distinguishing(count: int, device: torch.device) -> Tensor:
    """Routes [B, count] of experts 0 and 1 in which no two layers are equal, and no layer has one expert only."""
    numbers = torch.arange(count, device=device)
    bits = torch.stack([numbers >> bit & 1 for bit in range(max(count - 1, 1).bit_length())])
    return torch.cat([bits, 1 - bits[:1]])
