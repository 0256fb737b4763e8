"""Names and numbers that flags show, apart from the code that they stand for, so that help needs no torch."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["Linf", "L2"]
Stem = Literal["cifar", "imagenet"]
Bank = Literal["backbone", "disjoint"]
Routers = Literal["per_layer", "per_stage", "per_network"]
Norms = Literal["shared", "per_expert"]
Activation = Literal["relu", "silu"]
Dispatch = Literal["auto", "split", "wide", "grouped", "triton"]
Dtype = Literal["float32", "bfloat16", "int8"]
PlacementName = Literal["local", "ray", "slurm"]
TrackerName = Literal["tensorboard", "wandb"]
SHARD_SIZE = 256  # images whose results an evaluation keeps in one file: enough that its survivors fill a batch
BATCH_SIZE = 64  # images that an evaluation attacks at once
PATHWAY_BUDGET = 64  # up to so many pathways, an evaluation attacks the network on each of them
MAX_SEEDS = 1000  # of a sweep
BACKBONES = ("resnet18", "wrn28_10", "vgg16_bn", "densenet40", "densenet121")  # those of advmoe.models.MODELS


@dataclass(frozen=True)
class MethodTraits:
    """What a recipe has to know of a method: whether its network has a model scale and experts, whether it is trained under
    attack, whether it has one loss only, whether routers are a level, and its number of phases."""

    scaled: bool = False
    routed: bool = False
    attacked: bool = True
    fixed_loss: bool = False
    two_levels: bool = False
    phases: int = 1


METHOD_TRAITS = {  # the traits of the methods in advmoe.training.methods.METHODS
    "standard": MethodTraits(attacked=False, fixed_loss=True),
    "at_dense": MethodTraits(),
    "at_small_dense": MethodTraits(scaled=True),
    "at_sparse": MethodTraits(scaled=True, phases=2),
    "at_moe": MethodTraits(scaled=True, routed=True),
    "advmoe": MethodTraits(scaled=True, routed=True, two_levels=True),
}
