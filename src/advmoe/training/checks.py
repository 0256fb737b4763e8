"""What a configuration must fulfil before its run starts."""

from advmoe import distributed
from advmoe.config import DataConfig, RunConfig
from advmoe.config.schema import OF_LEVELS, Section
from advmoe.data import Images, Splits
from advmoe.data.images import check_splits
from advmoe.errors import UserError, lookup
from advmoe.moe import GATES, MoEKind, check_gate
from advmoe.training.compiled import check_compile
from advmoe.training.groups import MAX_CLASSES, resting_share
from advmoe.training.losses import LOSSES, lookup_loss
from advmoe.training.methods import METHODS, lookup_method
from advmoe.training.precision import autocast_dtype
from advmoe.training.steps import LATE_STEPS
from advmoe.training.terms import TERMS

NEEDED = {  # option -> the option without which it would do nothing
    "awp_routers": "awp", "awp_from": "awp", "augment_from": "augment", "generated_share": "generated",
    "balance_weight": "balance", "router_target_weight": "router_target", "tied_statistics": "tied_share",
}  # fmt: skip


WITHOUT_BETA = ("pgd_at", "clean")  # losses of one term


OF_ROUTERS = (  # options of methods with routers that need no attack; without `tied_share`, which recipes of all methods set
    "router_gate", "router_attack_gate", "router_warmup", "router_schedule", "router_statistics", "balance", "tied_statistics",
)  # fmt: skip


def check(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if the configuration cannot be trained on these data. Nothing has been written at this point."""
    lookup_method(config.method)
    lookup_loss(config.training.loss)
    if METHODS[config.method].loss is not None and _changed(config.training, "loss"):
        raise UserError(f"loss is fixed by the method {config.method}, and cannot be {config.training.loss}")
    for name in ("router_gate", "router_attack_gate"):
        lookup(GATES, getattr(config.training, name), name)
        check_gate(getattr(config.training, name), config.model.num_experts)
    check_splits(splits, config.data.dataset)
    _check_ingredients(config, splits)
    _check_router_options(config, splits)
    _check_router_schedule(config)
    _check_sizes(config, splits)
    autocast_dtype(config.runtime.precision, splits.train.labels.device)
    check_compile(config.runtime, splits.train.labels.device)


def _check_ingredients(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if an option is set that does not work with the method, its loss or the other options."""
    training, method = config.training, METHODS[config.method]
    loss_name, level_options = method.loss or training.loss, _changed(training, *OF_LEVELS)
    if level_options and not method.two_levels:
        raise UserError(f"{level_options[0]} is for advmoe, not {config.method}")
    if config.data.augment != "crop_flip" and not isinstance(splits.train, Images):
        raise UserError(f"augment {config.data.augment} is for images in memory, not for {config.data.dataset}")
    for option, needed in NEEDED.items():
        section = config.data if option in DataConfig.model_fields else training
        if _changed(section, option) and not _changed(section, needed):
            raise UserError(f"{option} needs {needed}")
    if config.attack.steps_ramp and config.attack.num_steps >= LATE_STEPS:
        raise UserError(f"steps_ramp raises num_steps to {LATE_STEPS}, and it is {config.attack.num_steps} already")
    padding, size, side = config.data.crop_padding, config.data.image_size, min(splits.spec.shape[1:])
    if size not in (None, side):
        raise UserError(f"image_size {size} is for a folder of images, and {config.data.dataset} has images of {side}")
    if padding >= side and (config.data.augment == "crop_flip" or config.data.augment_from):
        raise UserError(f"crop_padding must be less than {side}, the side of the images, not {padding}")
    for option in _changed(config.attack, "epsilon_ramp", "steps_ramp") if LOSSES[loss_name].attack is None else []:
        raise UserError(f"{option} needs a loss with an attack, not {loss_name}")
    if loss_name in WITHOUT_BETA and _changed(training, "beta"):
        raise UserError(f"beta is for the loss trades, not {loss_name}")
    if training.teacher is not None and loss_name != "trades":
        raise UserError(f"teacher needs the loss trades, not {loss_name}")
    if training.soft_labels == "adr" and not training.ema:
        raise UserError("soft_labels adr needs ema")


def _check_router_options(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if an option of the routers is set that does not work with the method, its loss or the other options."""
    training, method = config.training, METHODS[config.method]
    routed = isinstance(method.kind(config.model), MoEKind)
    loss_name, classes, experts = method.loss or training.loss, len(splits.spec.classes), config.model.num_experts
    attacked = _changed(training, "router_consistency", "router_margin", "runner_up_consistency", "awp_routers", "router_target")
    options = [*attacked, *_changed(training, *OF_ROUTERS)]
    if options and not routed:
        raise UserError(f"{options[0]} is for methods with routers, not {config.method}")
    if options and experts < 2:
        raise UserError(f"{options[0]} needs at least 2 experts")
    if training.tied_statistics == "shared" and config.model.norms != "per_expert":
        raise UserError(f"tied_statistics shared needs norms per_expert, not {config.model.norms}")
    if training.router_consistency and not LOSSES[loss_name].has_clean:
        raise UserError(f"router_consistency needs a loss with clean images, not {loss_name}")
    if attacked and LOSSES[loss_name].attack is None:
        raise UserError(f"{attacked[0]} needs a loss with an attack")
    if training.router_target == "confusion" and classes > MAX_CLASSES:
        raise UserError(f"router_target confusion takes at most {MAX_CLASSES} classes, not {classes}")
    if training.router_target == "confusion" and training.epochs < 2:
        raise UserError("router_target confusion needs at least 2 epochs: in the first, it is counted which classes are confused")
    if training.router_target != "none" and experts > classes:
        raise UserError(f"router_target needs a class for each expert: there are {experts} experts and {classes} classes")
    if routed and method.two_levels and not any(weight(training) for weight, _ in TERMS):
        if training.router_loss == "target":
            raise UserError("router_loss target leaves the routers no loss: all router terms have the weight 0")
        if training.router_gate == "hard":
            raise UserError("router_gate hard passes the routers no gradient, and there is no router term that they learn from")


def _check_router_schedule(config: RunConfig) -> None:
    """Raises UserError if the routers' schedule or warm-up does nothing, because of when the routers begin to learn."""
    training = config.training
    if training.router_schedule == "untied" and not resting_share(config):
        raise UserError("router_schedule untied needs tied_share, or router_loss target with router_target confusion alone")
    if 0 < training.router_warmup <= resting_share(config) and training.router_schedule == "phase":
        raise UserError(
            f"router_warmup {training.router_warmup:g} ends before the routers learn, after {resting_share(config):g} of the "
            "epochs: with router_schedule untied it begins then"
        )


def _changed(section: Section, *names: str) -> list[str]:
    """Those of the settings `names` that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _check_sizes(config: RunConfig, splits: Splits) -> None:
    size, images, processes = config.training.batch_size, len(splits.train), distributed.world_size()
    last = images % size or size
    least = 2 if processes == 1 else processes if config.training.sync_norm else 2 * processes
    if last < least:
        count = "one" if last == 1 else str(last)
        of = "" if processes == 1 else f" of {processes} processes"
        raise UserError(f"batch_size {size} leaves {count} of {images} images for the last batch: too few for batch norm{of}")
    if len(splits.val) < processes:
        raise UserError(f"{len(splits.val)} held-out images are too few for {processes} processes")
    levels = max(len(phase.levels) for phase in METHODS[config.method].phases)
    if levels > 1 and config.training.level_batches == "different" and 2 * size > images:
        raise UserError(f"batch_size must be at most half of the {images} training images for two levels, not {size}")
