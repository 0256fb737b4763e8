"""A faster twin of a network for attacks to climb with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.moe import HARD, Gate


class LowPrecision(nn.Module):
    """The same network under bf16 autocast; its logits are float32 again."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Sequence[Any]]:
        """As the network's own."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits, routings = self.model.forward_routed(x, gate)
        return logits.float(), routings
