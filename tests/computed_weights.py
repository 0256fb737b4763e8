"""Ways to compute a layer's weight in each forward pass."""

from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm parametrization": parametrizations.weight_norm,
    "spectral_norm parametrization": parametrizations.spectral_norm,
    "another parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}
