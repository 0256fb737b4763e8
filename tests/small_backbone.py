"""A backbone for tests that need some network: VGG with one convolution a stage, six in all, five of them routed.

It and its relatives are registered in the tests' process. A test that starts other processes takes the fixture `small_processes`,
or a backbone of the package.
"""

from functools import partial

from advmoe.models import MODELS
from advmoe.models.resnet import ResNet
from advmoe.models.vgg import VGG

SMALL = "vgg6_bn"
ROUTED = 5  # its routed convolutions
SMALLEST = "vgg4_bn"  # four convolutions, three of them routed: for exports, whose time is proportional to the layers
SMALL_RESNET = "two_blocks"  # a ResNet of two stages of one block: four routed convolutions and, without the projections, a stem


def register() -> None:
    MODELS[SMALL] = (partial(VGG, convolutions=(2, 1, 1, 1, 1)), 64)
    MODELS[SMALLEST] = (partial(VGG, convolutions=(2, 1, 1, 0, 0)), 64)
    MODELS[SMALL_RESNET] = (partial(ResNet, blocks=(1, 1)), 64)
