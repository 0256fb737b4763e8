"""The base class of networks with routed layers: it gives training the MoE layers, and the parameters of each level."""

from torch import nn

from advmoe.moe.channels import ChannelMask
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.dispatch import Dispatch
from advmoe.moe.guards import TRAIN_MODE, in_transform


class RoutedNetwork(nn.Module):
    """Base class of networks that route. `router` is the router of all layers, if the layers have none. `masks` mask channels."""

    router: nn.Module | None
    masks: nn.ModuleList
    num_classes: int
    min_size = 1  # smallest height and width of an image, in pixels

    def moe_layers(self) -> list[MoEConv2d]:
        """The MoE layers in the order of their routings; empty for a dense network."""
        return [module for module in self.modules() if isinstance(module, MoEConv2d)]

    def check_mode(self) -> None:
        """Raises RuntimeError if a torch.func transform calls a network with MoE layers in train mode."""
        if self.training and in_transform() and self.moe_layers():
            raise RuntimeError(TRAIN_MODE)

    def set_dispatch(self, name: Dispatch) -> None:
        """Set how the MoE layers run their experts: one of `advmoe.moe.DISPATCHES`, or auto."""
        for layer in self.moe_layers():
            layer.dispatch = name

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters p of the lower level: those of the routers."""
        routers = [self.router, *(layer.router for layer in self.moe_layers())]
        return [parameter for router in routers if router is not None for parameter in router.parameters()]

    def mask_parameters(self) -> list[nn.Parameter]:
        """The scores of the channel masks; empty for a network without masks."""
        return [mask.scores for mask in self.masks if isinstance(mask, ChannelMask)]

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters w of the upper level: all but those of the routers and masks."""
        others = {id(parameter) for parameter in (*self.router_parameters(), *self.mask_parameters())}
        return [parameter for parameter in self.parameters() if id(parameter) not in others]
