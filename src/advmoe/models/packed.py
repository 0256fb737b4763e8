"""A convolution for inference whose filters are stored in the layout that the CPU library (oneDNN) computes with.

Shapes: B images, C and K channels.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from advmoe.moe.guards import in_transform


class PackedConv2d(nn.Conv2d):
    """A convolution for inference, optionally with a ReLU and with a tensor to add to.

    oneDNN converts the filters of an ordinary convolution in every call. This class converts them once, and oneDNN adds and applies
    the ReLU while it writes the output. It uses private operators of torch, as torch.compile does. If they are missing
    or disagree with the plain convolution, or the input is not float32 on the CPU, the plain convolution runs instead.

    The converted filters are not in the state dict. They follow `load_state_dict`, `to` and `copy.deepcopy`. After any other change
    of the weights, call `pack`.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        c = convolution
        super().__init__(
            c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.bias is not None,  # type: ignore[arg-type]
            c.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias = convolution.weight, convolution.bias
        self.pack()

    def forward(self, x: Tensor, relu: bool = False, onto: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, K, H', W']. With `onto` [B, K, H', W'], the sum is written into `onto`, which is returned."""
        if self._packed is not None and _suits(x) and (onto is None or _suits_output(onto)):
            return self._run(self._packed, x, relu, onto)
        y = super().forward(x)
        if onto is not None:
            y = onto.add_(y)
        return y.relu_() if relu else y

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """(K, H', W') for images x [B, C, H, W]."""
        sides = (
            (side + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for side, size, padding, dilation, stride in zip(
                x.shape[2:], self.kernel_size, cast(tuple[int, int], self.padding), self.dilation, self.stride, strict=True
            )
        )
        return (self.out_channels, *sides)

    def _run(self, packed: Tensor, x: Tensor, relu: bool, onto: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor
        if onto is None:
            run = torch.ops.mkldnn._convolution_pointwise.default
            y = run(x, packed, self.bias, *self._settings, "relu" if relu else "none", [], "")
        else:
            run = torch.ops.mkldnn._convolution_pointwise_.binary
            y = run(onto, x, packed, self.bias, *self._settings, "add", None, "relu" if relu else None, [], None)
        return y

    @torch.no_grad()
    def pack(self) -> None:
        """Convert the filters again, after their values have changed."""
        self._packed: Tensor | None = None
        if (
            not self.weight.is_cpu
            or self.weight.dtype != torch.float32
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
        ):
            return
        self._settings = ([*self.padding], [*self.stride], [*self.dilation], self.groups)
        try:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._settings)
            agrees = self._agrees(packed)
        except (AttributeError, RuntimeError, TypeError):  # another build or version of torch
            return
        self._packed = packed if agrees else None

    def _agrees(self, packed: Tensor) -> bool:
        """Whether the private operators compute the same as the plain convolution, on two images."""
        side = 2 * max(self.dilation) * max(self.kernel_size)
        x = torch.linspace(-1, 1, 2 * self.in_channels * side**2).sin().view(2, self.in_channels, side, side)
        x = x.contiguous(memory_format=torch.channels_last)
        plain = super().forward(x)
        onto = plain.flip(1).contiguous(memory_format=torch.channels_last)
        expected = (plain + onto).relu()
        given = self._run(packed, x, False, None), self._run(packed, x, True, onto.clone(memory_format=torch.channels_last))
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(given, (plain, expected), strict=True))

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedConv2d":
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()


def _suits(x: Tensor) -> bool:
    """Whether the private operators can read `x`, and nothing else wants to see the call: autograd, autocast or a tracer."""
    return (
        x.dtype == torch.float32 and x.is_cpu and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not (torch.compiler.is_compiling() or in_transform())
    )  # fmt: skip


def _suits_output(onto: Tensor) -> bool:
    """Whether the private operators can add to `onto` in place."""
    return _suits(onto) and onto.is_contiguous(memory_format=torch.channels_last)
