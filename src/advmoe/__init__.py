"""AdvMoE: robust mixture-of-experts training for convolutional networks, and an evaluation that can be trusted."""

__version__ = "0.1.0"
