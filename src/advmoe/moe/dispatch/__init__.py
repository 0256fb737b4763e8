"""Ways to run each image through the filters of its chosen expert. All compute the same; `choice` selects one."""

from advmoe.moe.dispatch.choice import DISPATCHES, STATIC, available, check_dispatch, fastest, run_chosen

__all__ = ["DISPATCHES", "STATIC", "available", "check_dispatch", "fastest", "run_chosen"]
