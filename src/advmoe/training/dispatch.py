"""`--dispatch auto` on CUDA: measured at the start of a run, and kept with the run.

On the CPU a fixed rule decides (advmoe.moe.dispatch), so that a run stays the same to the bit.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from advmoe import distributed
from advmoe.config import RunConfig
from advmoe.config.choices import Dispatch
from advmoe.config.schema import Compile
from advmoe.data import ImageSpec
from advmoe.errors import UserError, reason_of
from advmoe.files import bounded_text, write_atomically
from advmoe.models import Classifier
from advmoe.moe import ForcedGate, synchronise
from advmoe.moe.copies import copied
from advmoe.moe.dispatch import DISPATCHES, STATIC, available
from advmoe.training.methods import METHODS
from advmoe.training.precision import autocast_dtype, in_precision
from advmoe.training.trial import trial

log = logging.getLogger("advmoe")
FILE = "dispatch.json"
SECONDS = 10.0  # after this time no further candidate is tried
COMPILED_SECONDS = 120.0  # the same if passes are compiled
REPETITIONS = 3
IMAGES = 8  # number of images on which the values of a candidate are checked
REFERENCE: Dispatch = "split"  # plain convolutions


class Measured(BaseModel):
    """The `dispatch` that a run uses, the name of the device, and the seconds of an iteration with each candidate.

    `compile` is the setting under which they were measured.
    """

    model_config = ConfigDict(frozen=True)

    dispatch: Dispatch
    device: str
    seconds: dict[Dispatch, float]
    compile: Compile = "none"


def set_fastest(config: RunConfig, folder: Path, model: Classifier, spec: ImageSpec) -> None:
    """Set the dispatch of `model`, if the configuration says `auto` and `auto` is measured on the device.

    The first start of the run in `folder` measures and writes the result. Later starts read it.
    """
    device, compiled = next(model.parameters()).device, config.runtime.compile
    if config.runtime.dispatch != "auto" or not model.moe_layers() or not is_measured(device):
        return
    file = folder / FILE
    choice = distributed.on_rank_zero(lambda: read(file))
    if choice is None or choice.compile != compiled or choice.dispatch not in available(device):  # as on a machine without Triton
        names = [name for name in available(device) if name in (DISPATCHES if compiled == "none" else STATIC)]
        limit = SECONDS if compiled == "none" else COMPILED_SECONDS
        choice = distributed.broadcast(measure(config, model, spec, names, limit))
        text = choice.model_dump_json() + "\n"
        distributed.on_rank_zero(lambda: write_atomically(file, text))
        log.info("dispatch auto: %s", choice.dispatch)
    model.set_dispatch(choice.dispatch)


def is_measured(device: torch.device) -> bool:
    """Whether `auto` is measured on this device."""
    return device.type == "cuda"


def read(file: Path) -> Measured | None:
    """The choice stored with a run; None if there is none or it cannot be read."""
    try:
        return Measured.model_validate_json(bounded_text(file, 2**16))
    except (OSError, ValueError, UserError):  # damaged JSON and text that is not UTF-8 raise a ValueError
        return None


def measure(config: RunConfig, model: Classifier, spec: ImageSpec, names: Sequence[Dispatch], limit: float = SECONDS) -> Measured:
    """Time an iteration of the run with each dispatch in `names`, on copies of `model`. Takes about `limit` seconds.

    A dispatch is skipped, with one line in the log, if it raises an error, if its values differ from those of `split`, or if
    `limit` seconds have passed. Raises UserError if an iteration fails while there are several ranks: the others wait in it.
    """
    device, started = next(model.parameters()).device, time.monotonic()
    expected = _values(config, model, spec, REFERENCE)
    seconds: dict[Dispatch, float] = {}
    for name in names:
        if distributed.broadcast(time.monotonic() - started > limit):
            log.warning("dispatch auto: %s is skipped: %g s have passed", name, limit)
            continue
        reason = ""
        try:
            _check(_values(config, model, spec, name), expected, config)
            if distributed.world_size() > 1:
                _rehearse(config, model, spec, name)
        except Exception as error:  # a compiler or a kernel can raise any exception
            reason = reason_of(error)
        if not distributed.maximum(bool(reason)):
            try:
                seconds[name] = _iteration_seconds(config, model, spec, name)
                continue
            except Exception as error:
                reason = reason_of(error)
                if distributed.world_size() > 1:
                    raise UserError(f"dispatch auto: {name} failed ({reason}); give --dispatch {REFERENCE}") from error
        log.warning("dispatch auto: %s is skipped: %s", name, reason or "it fails in another process")
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    fastest = min(seconds, key=seconds.__getitem__, default=REFERENCE)
    return Measured(dispatch=fastest, device=title, seconds=seconds, compile=config.runtime.compile)


def _values(config: RunConfig, model: Classifier, spec: ImageSpec, name: Dispatch) -> tuple[Tensor, Tensor]:
    """Logits of random images over a random route, and a gradient to the images, of a copy whose experts differ."""
    device = next(model.parameters()).device
    network, random = copied(model).eval(), torch.Generator(device).manual_seed(0)
    network.set_dispatch(name)
    for layer in network.moe_layers():
        layer.filters.data.normal_(std=0.05, generator=random)
    x = torch.rand(IMAGES, *spec.shape, device=device, generator=random).requires_grad_()
    layers = network.moe_layers()
    route = torch.randint(layers[0].num_experts, (IMAGES, len(layers)), device=device, generator=random)
    with in_precision(device, autocast_dtype(config.runtime.precision, device)):
        logits = network.forward_routed(x, ForcedGate(route))[0].float()
    (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), x)
    return logits.detach(), gradient


def _check(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], config: RunConfig) -> None:
    """Raises ValueError if values differ by more than the rounding of the convolutions."""
    device = expected[0].device
    exact = device.type == "cpu" and autocast_dtype(config.runtime.precision, device) is None
    limit = 1e-3 if exact else 0.1  # bf16, TF32
    for value, expected_value in zip(result, expected, strict=True):
        if not (value - expected_value).norm() <= limit * expected_value.norm():
            raise ValueError(f"its values differ from those of {REFERENCE}")


def _rehearse(config: RunConfig, model: Classifier, spec: ImageSpec, name: Dispatch) -> None:
    """A pass over this rank's part of a batch, forward and backward, without the other ranks: it fails where an iteration would,
    for example by lack of memory."""
    device, network = next(model.parameters()).device, copied(model).train()
    network.set_dispatch(name)
    synchronise(network, False)
    images = distributed.local_size(config.training.batch_size)
    with in_precision(device, autocast_dtype(config.runtime.precision, device)):
        logits = network(torch.rand(images, *spec.shape, device=device, generator=torch.Generator(device).manual_seed(0)))
    logits.float().logsumexp(dim=1).sum().backward()


def _iteration_seconds(config: RunConfig, model: Classifier, spec: ImageSpec, name: Dispatch) -> float:
    """The median time of the run's iterations on random images. The first one warms up."""
    device, network = next(model.parameters()).device, copied(model)
    network.set_dispatch(name)
    step = trial(config, network, spec, METHODS[config.method].phases[0])
    times = []
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])
