"""A plain PyTorch CNN in its MoE form: traced (trace), checked (convert), narrowed (narrow)."""

from advmoe.moe.convert.convert import Converted, convert

__all__ = ["Converted", "convert"]
