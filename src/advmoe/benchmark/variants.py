"""The networks and calls that are compared. All variants of one comparison are prepared in the same way.

Inference runs on deployed networks (advmoe.models.deployed) in torch.inference_mode. Routes are random and even, which is the
hardest case for a dispatch. Iterations are those of `advmoe train`, always on the same batches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from advmoe.attacks import ImageDraws, Pgd, frozen, pgd
from advmoe.benchmark.setup import Scale
from advmoe.config import ModelConfig, RunConfig
from advmoe.config.schema import Compile
from advmoe.data import Images, ImageSpec
from advmoe.models import Classifier, build_model, deployed, fused
from advmoe.moe import HARD, DenseKind, ForcedGate, MoEKind
from advmoe.recipes import recipe
from advmoe.training import start
from advmoe.training.batches import batches
from advmoe.training.methods import METHODS
from advmoe.training.trial import trial

Call = Callable[[], object]
WARM_UP = 20  # random routes; oneDNN compiles a kernel for every new group size, which takes 0.2 to 0.4 ms once per process
CLASSES = tuple(str(number) for number in range(10))
KINDS = {
    "dense": DenseKind(),
    "small dense": DenseKind(0.5),
    "MoE": MoEKind(0.5, 2),
    "16 experts": MoEKind(0.5, 16, "disjoint"),
}
METHOD = {"AdvMoE": "advmoe", "AT (Dense)": "at_dense", "AT (S-Dense)": "at_small_dense"}


def spec(side: int) -> ImageSpec:
    """Colour images of ten classes."""
    return ImageSpec(CLASSES, (3, side, side), (0.5,) * 3, (0.25,) * 3)


def settled(model: Classifier, side: int, device: torch.device) -> Classifier:
    """Make the experts different, set the batch norms' statistics to those of one batch, and move to `device` in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.05)
        model.train()(torch.rand(32, *spec(side).shape))
    return model.to(device).eval()


def network(kind: str, backbone: str, scale: Scale, device: torch.device) -> Classifier:
    """A network of one of KINDS, prepared by `settled`."""
    model = build_model(ModelConfig(backbone=backbone, width=scale.width), KINDS[kind], spec(scale.side))
    return settled(model, scale.side, device)


def fused_network(kind: str, scale: Scale, device: torch.device) -> Classifier:
    """A ResNet-18 of one of KINDS with batch norms folded in, channels last. It supports every gate and dispatch."""
    model = fused(network(kind, "resnet18", scale, device))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def forward(model: Callable[..., tuple[Tensor, object]], x: Tensor, choices: tuple[int, int] | None, bf16: bool = False) -> Tensor:
    """Logits of images x. They take random routes; `choices` is (experts, layers). With None, the routers choose."""
    gate = HARD if choices is None else ForcedGate(torch.randint(0, choices[0], (len(x), choices[1]), device=x.device))
    with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
        return model(x, gate)[0]


def route_choices(model: Classifier) -> tuple[int, int] | None:
    """The numbers of experts and of MoE layers of a network; None without MoE layers."""
    layers = model.moe_layers()
    return (layers[0].num_experts, len(layers)) if layers else None


def inference(kind: str, scale: Scale, device: torch.device, backbone: str, batch: int) -> partial[Tensor]:
    """A forward pass of one of KINDS. For a single image the routers choose, because every route costs the same."""
    model = network(kind, backbone, scale, device)
    choices = route_choices(model) if batch > 1 else None
    call = partial(forward, deployed(model).forward_routed, channels_last(batch, scale, device), choices)
    for _ in range(0 if choices is None else WARM_UP):
        call()
    return call


def to_one_expert(call: partial[Tensor]) -> partial[Tensor]:
    """An inference call with all images on expert 0, which needs no gather or scatter."""
    model, x, choices = call.args
    if choices is None:
        return call
    return partial(forward, model, x, (1, choices[1]))  # a choice of one expert: the random routes are all of expert 0


def in_bf16(call: partial[Tensor]) -> partial[Tensor]:
    """An inference call with its convolutions in bfloat16."""
    return partial(call, bf16=True)


def compiled(kind: str, scale: Scale, device: torch.device) -> Call:
    """A forward pass of ResNet-18 with torch.compile, as one graph.

    It uses the dispatch wide, which has static shapes. The dispatch split would break the graph at every layer and compile again
    for every route.
    """
    model = fused_network(kind, scale, device)
    model.set_dispatch("wide")
    quick = torch.compile(model.forward_routed, dynamic=False, fullgraph=True)
    return partial(forward, quick, channels_last(scale.batch, scale, device), route_choices(model))


def channels_last(batch: int, scale: Scale, device: torch.device) -> Tensor:
    """Random images."""
    return torch.rand(batch, *spec(scale.side).shape).to(device).contiguous(memory_format=torch.channels_last)


def configuration(method: str, scale: Scale) -> RunConfig:
    """The recipe of a method for images like those of CIFAR-10, with the width and batch size of `scale`."""
    config = recipe(f"cifar10-resnet18-{METHOD[method]}")
    training = config.training.replace(batch_size=scale.training_batch)
    return config.replace(model=config.model.replace(width=scale.width), training=training)


def bf16(config: RunConfig) -> RunConfig:
    """The same run with its convolutions in bfloat16."""
    return config.replace(runtime=config.runtime.replace(precision="bfloat16"))


def compiled_run(config: RunConfig, mode: Compile) -> RunConfig:
    """The same run with its passes compiled."""
    return config.replace(runtime=config.runtime.replace(compile=mode))


def iteration(config: RunConfig, side: int, device: torch.device) -> Call:
    """One training iteration, as in `advmoe train` near the end of a run. It does not change the weights."""
    model = settled(start.network(config, spec(side)), side, device)
    return trial(config, model, spec(side), METHODS[config.method].phases[0])


def loading(config: RunConfig, scale: Scale, device: torch.device) -> Call:
    """The loading of one iteration's pixels and labels in `advmoe train`, from images in memory."""
    levels = len(METHODS[config.method].phases[0].levels)
    images = torch.randint(0, 256, (scale.images, *spec(scale.side).shape), dtype=torch.uint8)
    source = Images(images, torch.randint(0, 10, (scale.images,))).to(device)
    endless = _endless(config, source, levels)
    return lambda: [(batch.pixels(), batch.labels) for batch in next(endless)]


def _endless(config: RunConfig, source: Images, levels: int) -> Iterator[tuple[Images, ...]]:
    for epoch in count():
        yield from batches(config, source, epoch, levels)


def attack(kind: str, scale: Scale, device: torch.device, *, folded: bool = True) -> Call:
    """PGD through the hard gate, on a network with or without `folded` batch norms."""
    model = network(kind, "resnet18", scale, device)
    x, y = torch.rand(scale.attack_batch, *spec(scale.side).shape), torch.randint(0, 10, (scale.attack_batch,))
    settings, draws = Pgd(8 / 255, 2 / 255, scale.attack_steps), ImageDraws(0, range(scale.attack_batch))
    return partial(_attacked, fused(model) if folded else model, x.to(device), y.to(device), settings, draws)


def _attacked(model: Classifier, x: Tensor, y: Tensor, settings: Pgd, draws: ImageDraws) -> Tensor:
    with frozen(model):
        return pgd(model, x, y, settings, draws)
