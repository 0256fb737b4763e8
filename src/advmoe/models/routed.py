"""The convolutions of a block for inference, plain and routed.

Shapes: B images, C and K channels, N experts.
"""

from torch import Tensor, nn

from advmoe.models.packed import PackedConv2d
from advmoe.moe import Chosen, Gate, MoEConv2d, Routing, Routings
from advmoe.moe.dispatch.split import groups_of, run_groups
from advmoe.moe.guards import check_call, check_untransformed


class UnroutedConv2d(PackedConv2d):
    """The plain convolution of a block, for inference. It ignores the gate."""

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None
    ) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` if given; and no routings."""
        return super().forward(x, None if onto is None else onto.clone()), ()


class RoutedConv2d(nn.Module):
    """A fused MoE layer for inference. Each expert is a separate convolution, which runs on the images that chose it."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.index, self.router = layer.index, layer.router
        self.experts = nn.ModuleList(PackedConv2d(_convolution(layer, e)) for e in range(layer.num_experts))

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` if given; and the layer's Routing if the layer has a router.

        Raises TypeError if the gate runs more than the chosen experts, and RuntimeError as `MoEConv2d` does.
        """
        check_call(x, self.training)
        if self.router is not None:
            logits = self.router(x)
        assert logits is not None
        weights = gate.weights(logits, self.index)
        if type(weights) is not Chosen:
            raise TypeError(
                f"a deployed network takes hard and forced gates, not gates that return {type(weights).__name__}; "
                "advmoe.models.fused takes all"
            )
        y = self.convolve(x, weights.experts, onto)
        return y, () if self.router is None else (Routing(logits, weights.experts),)

    def convolve(self, x: Tensor, experts: Tensor, onto: Tensor | None) -> Tensor:
        """Each image through its expert, plus `onto` if given."""
        check_untransformed("a deployed network", "the network that it was made from")
        groups = groups_of(experts, len(self.experts))
        if onto is None:
            return run_groups(x, groups, lambda images, e: self.experts[e](images))
        if len(groups) == 1:
            onto = onto.clone()  # an expert may overwrite it; the parts of several groups are copies
        return run_groups(x, groups, lambda images, e, part: self.experts[e](images, part), onto)


def is_replaceable(convolution: nn.Module) -> bool:
    """Whether a convolution can be replaced by its form for inference: it has no hooks, and no norm that is not folded in."""
    return getattr(convolution, "norm", None) is None and not (convolution._forward_hooks or convolution._forward_pre_hooks)


def _convolution(layer: MoEConv2d, expert: int) -> nn.Conv2d:
    filters = layer.bank.of_expert(expert)
    width, inputs, size, _ = filters.shape
    convolution = nn.Conv2d(inputs, width, size, layer.stride, layer.bank.padding, bias=layer.bias is not None, device="meta")
    convolution.weight = nn.Parameter(filters.detach().clone())  # a copy: in a file, a view would bring the full bank
    if layer.bias is not None:
        convolution.bias = nn.Parameter(layer.bias[expert].detach().clone())
    return convolution
