"""Convert a plain PyTorch CNN to an MoE network: trace it (trace), narrow its layers (narrow), check the result (convert)."""

from advmoe.moe.convert.convert import Converted, convert

__all__ = ["Converted", "convert"]
