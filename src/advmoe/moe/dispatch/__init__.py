"""How each image gets through the filters of its expert: several ways to compute the same, and the choice between them."""

from advmoe.moe.dispatch.choice import DISPATCHES, Dispatch, add_chosen, available, check_dispatch, fastest, run_chosen

__all__ = ["DISPATCHES", "Dispatch", "add_chosen", "available", "check_dispatch", "fastest", "run_chosen"]
