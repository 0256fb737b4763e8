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

    The converted filters are not in the state dict. They are converted again in the first call after a change of the weight. If
    torch does not count the change (through `weight.data`, or of a weight from inference mode), call `pack`.
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
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` [B, K, H', W'] if given.

        Without autograd, the sum is written into `onto`, which is returned.
        """
        if _suits(x) and not _differentiated(self.weight) and (onto is None or _suits_output(onto)):
            packed = self._filters()
            if packed is not None:
                return self._run(packed, x, relu, onto)
        y = super().forward(x)
        if onto is not None:
            y = y.add_(onto) if _differentiated(y) or _differentiated(onto) else onto.add_(y)
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

    def pack(self) -> None:
        """Convert the filters again."""
        self._cache: tuple[Tensor, int | None, Tensor | None] | None = (self.weight, _version(self.weight), self._converted())

    def _filters(self) -> Tensor | None:
        """The converted filters of the present weight; None if only the plain convolution can run."""
        if self._cache is None or self._cache[0] is not self.weight or self._cache[1] != _version(self.weight):
            self.pack()
        assert self._cache is not None
        return self._cache[2]

    @torch.no_grad()
    def _converted(self) -> Tensor | None:
        """The converted filters, if the private operators can run them and agree with the plain convolution."""
        if (
            not self.weight.is_cpu
            or self.weight.dtype != torch.float32
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
        ):
            return None
        self._settings = ([*self.padding], [*self.stride], [*self.dilation], self.groups)
        try:
            packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._settings)
            with torch.autocast("cpu", enabled=False):
                return packed if self._agrees(packed) else None
        except (AttributeError, RuntimeError, TypeError):  # another build or version of torch
            return None

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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}


def _suits(x: Tensor) -> bool:
    """Whether the private operators can read `x`, and nothing else wants to see the call: autograd, autocast or a tracer."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform())  # type: ignore[attr-defined, no-untyped-call]
        and x.dtype == torch.float32 and x.is_cpu and x.dim() == 4 and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not _differentiated(x)
    )  # fmt: skip


def _suits_output(onto: Tensor) -> bool:
    """Whether the private operators can add to `onto` in place."""
    return _suits(onto) and onto.is_contiguous(memory_format=torch.channels_last)


def _differentiated(x: Tensor) -> bool:
    """Whether autograd records the operations on `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def _version(x: Tensor) -> int | None:
    """The number of changes in place; None if torch does not count them."""
    return None if x.is_inference() else x._version
