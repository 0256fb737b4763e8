"""A convolution for inference whose filters are stored in the layout that the CPU library (oneDNN) computes with.

Shapes: B images, C and K channels.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.forward_ad import unpack_dual

from advmoe.moe.guards import in_transform


class PackedConv2d(nn.Conv2d):
    """Computes the same as `convolution`, whose parameters it shares, up to rounding; then a ReLU if `relu` is set.

    oneDNN converts the filters of an ordinary convolution in every call. This class converts them in the first call, and oneDNN
    adds and applies the ReLU while it writes the output. For this it uses private operators of torch, as torch.compile does. The
    plain convolution runs instead if they are missing or disagree with it, on anything but float32 on the CPU, and under autograd,
    autocast, torch.func, torch.compile and tracers.

    The converted filters are not in the state dict. They are converted again in the first call after a change of the weight. Two
    changes are not noticed, because torch does not count them: through `weight.data`, and of a weight from inference mode.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        assert getattr(convolution, "norm", None) is None, "the norm must be folded in first"
        c = convolution
        super().__init__(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.bias is not None,  # type: ignore[arg-type]
            c.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias = convolution.weight, convolution.bias
        self.relu = False
        self._cache: tuple[Tensor, int | None, Tensor | None] | None = None  # weight, its version, its converted filters

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` [B, K, H', W'] if given, through the ReLU if `relu` is set.

        It may overwrite the memory of `onto`.
        """
        packed = self._packed() if _suit(x, onto, self.weight, self.bias) and x.dim() == 4 else None
        return self._plain(x, onto) if packed is None else self._run(packed, x, onto)

    def _plain(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if onto is None else y.add_(onto)
        return y.relu_() if self.relu else y

    def _run(self, packed: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
        x, operators = x.contiguous(memory_format=torch.channels_last), torch.ops.mkldnn
        window = self.padding, self.stride, self.dilation, self.groups
        y: Tensor
        if onto is None:
            y = operators._convolution_pointwise(x, packed, self.bias, *window, "relu" if self.relu else "none", [], "")
        else:
            onto, relu = onto.contiguous(memory_format=torch.channels_last), "relu" if self.relu else None
            y = operators._convolution_pointwise_.binary(onto, x, packed, self.bias, *window, "add", None, relu, [], None)
        return y

    def _packed(self) -> Tensor | None:
        """The converted filters of the present weight; None if only the plain convolution can run."""
        version = None if self.weight.is_inference() else self.weight._version
        if self._cache is None or self._cache[0] is not self.weight or self._cache[1] != version:
            self._cache = (self.weight, version, self._converted())
        return self._cache[2]

    def _converted(self) -> Tensor | None:
        """The converted filters, if the private operators agree with the plain convolution on two images."""
        if self.padding_mode != "zeros":  # which the private operators would use
            return None
        side = 2 * max(self.dilation) * max(self.kernel_size)
        # not torch's default dtype and device, which the user may have changed
        ramp = torch.linspace(-1, 1, 2 * self.in_channels * side**2, dtype=self.weight.dtype, device=self.weight.device)
        x = ramp.sin().view(2, self.in_channels, side, side)
        onto = -self._plain(x).flip(1)
        try:
            packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups
            )
            pairs = [(self._plain(x, added), self._run(packed, x, added)) for added in (None, onto)]
        except (AttributeError, RuntimeError, TypeError):  # another build or version of torch, or padding="same"
            return None
        return packed if all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in pairs) else None

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedConv2d":
        self._cache = None  # `to` changes weights without counting
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}  # converted filters cannot be copied or saved


def _suit(*tensors: Tensor | None) -> bool:
    """Whether the private operators support the tensors, and nothing else must see the call: autograd, autocast or a tracer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform() or torch.is_autocast_enabled("cpu"):  # type: ignore[attr-defined, no-untyped-call]
        return False
    given = [t for t in tensors if t is not None]
    if any(isinstance(t, fx.Proxy) or unpack_dual(t).tangent is not None for t in given):  # torch.fx, forward-mode autograd
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return not differentiated and all(t.is_cpu and t.dtype == torch.float32 and t.numel() > 0 for t in given)
