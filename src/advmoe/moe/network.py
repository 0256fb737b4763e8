"""What training asks of any network with routed layers: its MoE layers, and its parameters by level."""

from torch import nn

from advmoe.moe.channels import ChannelMask
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.dispatch import Dispatch


class RoutedNetwork(nn.Module):
    """Base of networks that route. `router` serves every layer where the layers have none; `masks` are over channels."""

    router: nn.Module | None
    masks: nn.ModuleList
    num_classes: int
    min_size = 1  # least height and width of an image, in pixels

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their routings; none in a dense network."""
        return [module for module in self.modules() if isinstance(module, MoEConv2d)]

    def set_dispatch(self, name: Dispatch) -> None:
        """How the MoE layers run their experts: one of `advmoe.moe.DISPATCHES`, or auto."""
        for layer in self.moe_layers():
            layer.dispatch = name

    def router_parameters(self) -> list[nn.Parameter]:
        """The lower level's parameters p."""
        routers = [self.router, *(layer.router for layer in self.moe_layers())]
        return [parameter for router in routers if router is not None for parameter in router.parameters()]

    def mask_parameters(self) -> list[nn.Parameter]:
        """The scores of the channel masks; none where nothing is masked."""
        return [mask.scores for mask in self.masks if isinstance(mask, ChannelMask)]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The upper level's parameters w: everything but the routers and masks."""
        others = {id(parameter) for parameter in (*self.router_parameters(), *self.mask_parameters())}
        return [parameter for parameter in self.parameters() if id(parameter) not in others]
