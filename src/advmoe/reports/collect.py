"""Records below a folder, one for each cell and seed."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from advmoe.config import OF_MACHINE, RunConfig, to_dict
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import checked_record, read_json, with_gallery
from advmoe.files import JsonObject
from advmoe.models import MODELS
from advmoe.recipes import PLUS, method_traits
from advmoe.reports.measures import ATTACK_DEFAULTS, PRESENT, attack_settings, evaluated
from advmoe.training.methods import METHODS

logger = logging.getLogger("advmoe")
RecordFile = tuple[Path, Record]
Key = TypeVar("Key")
Runs = TypeVar("Runs")  # a Record, or a Summary of several
# settings that do not change a run's result, or that its cell already holds
NOT_COMPARED = (*OF_MACHINE, "schema", "method", "seed", "data.limit_train", "data.limit_test")
IN_CELL = (  # settings that a cell already holds, with the precision and the data's fingerprint
    *(f"model.{name}" for name in ("backbone", "width", "model_scale", "num_experts")),
    "data.dataset", "attack.num_steps", "training.epochs", "runtime.precision", "fingerprint",
)  # fmt: skip
SAME_BATCHES, OFFICIAL, WITH_PLUS = "same batches", "variant of the public code", "with -plus"
OF_OFFICIAL = {  # what distinguishes the recipes with the suffix -official
    "model.routers": "per_network", "model.bank": "disjoint", "training.level_batches": "same", "training.router_loss": "target",
    "training.router_target": "label_mod_n", "training.router_consistency": 6.0,
}  # fmt: skip
OF_VARIANTS = (  # choices of routers and experts that make a network one of its own
    "model.routers",
    "model.bank",
    *(f"training.{name}" for name in ("level_batches", "weight_attack_gate", "awp_routers", "router_loss", "router_target")),
    *(f"training.{name}" for name in ("router_consistency", "router_margin", "router_every", "router_schedule")),
    *(f"training.{name}" for name in ("router_statistics", "runner_up_consistency")),
)
OF_ROUTERS = (
    *OF_VARIANTS, "model.num_experts", "model.norms", "training.router_steps", "training.weight_steps", "training.level_order",
    *(f"training.{name}" for name in ("router_lr", "router_warmup", "router_gate", "router_attack_gate", "router_target_weight")),
    *(f"training.{name}" for name in ("tied_share", "balance", "balance_weight")),
)  # fmt: skip
OF_METHODS = (*OF_ROUTERS, "model.model_scale", "training.init_from")
INGREDIENTS = (  # the same for networks without routers too
    "model.activation", "data.augment", "attack.epsilon_ramp", "attack.steps_ramp",
    *(f"training.{name}" for name in ("loss", "ema", "label_smoothing", "soft_labels", "awp")),
)  # fmt: skip


def _flat(tree: JsonObject) -> dict[str, object]:
    """'section.field' -> value, of a configuration's sections and its fields outside of them."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


DEFAULTS = _flat(to_dict(RunConfig()))


def is_routed(method: str) -> bool:
    """Whether the method's networks have experts. A method that is not registered here counts as one with experts and with a model
    scale, so that runs that may differ in them are never averaged."""
    return method not in METHODS or method_traits(method).routed


def is_full_scale(method: str) -> bool:
    """Whether the method ignores the model scale."""
    return method in METHODS and not method_traits(method).scaled


@dataclass(frozen=True)
class Cell:
    """What identifies the runs behind one figure; they differ only in their seeds.

    `width` is None for the published width. A dense network has model scale 1, and a network without routers one expert.
    `epsilon` and `norm` are those of the evaluation; `attack_steps` is the number of steps of the training attack. `variant` says
    in which of `OF_VARIANTS` the routers and experts differ from the default: `SAME_BATCHES` if AdvMoE's two levels were trained on
    the same batches, `OFFICIAL` for the recipes with the suffix -official, 'router target confusion'. `ingredients` does the same
    for `INGREDIENTS`: `WITH_PLUS` for all that the suffix -plus adds, 'ema 0.999'. Both are empty for the methods of the paper.
    """

    dataset: str
    backbone: str
    width: int | None
    method: str
    model_scale: float
    num_experts: int
    attack_steps: int
    epsilon: float
    norm: str
    epochs: int
    train_images: int
    test_images: int
    variant: str = ""
    ingredients: str = ""

    @property
    def has_one_expert(self) -> bool:
        """Whether a routed method was trained with one expert: the control, whose routers choose nothing."""
        return is_routed(self.method) and self.num_experts == 1

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the runs are of their method as published: with a choice between experts, and without other options."""
        return not (self.has_one_expert or self.variant or self.ingredients)

    @property
    def label(self) -> str:
        """The method's name, and what differs from it: 'at_moe, one expert', 'advmoe, same batches'."""
        return self.method + ", one expert" * self.has_one_expert + self.options

    @property
    def words(self) -> str:
        """'advmoe, r 0.5, N 2, resnet18, fashion-mnist'."""
        return f"{self.method}{self.size}{self.options}, {self.backbone}, {self.dataset}"

    @property
    def size(self) -> str:
        """', r 0.5, N 2', as far as the method has a model scale and experts."""
        scale = "" if is_full_scale(self.method) else f", r {self.model_scale:g}"
        return scale + (f", N {self.num_experts}" if is_routed(self.method) else "")

    @property
    def options(self) -> str:
        """', same batches, ema 0.995', or empty."""
        return options_text(self.variant, self.ingredients)

    @property
    def setting(self) -> "Cell":
        """The fields that cells must share to be compared: all but method, model scale, number of experts and options."""
        return replace(self, method="", model_scale=1.0, num_experts=0, variant="", ingredients="")


def options_text(variant: str, ingredients: str) -> str:
    """', same batches, ema 0.995', ' with -plus', or empty."""
    return "".join(f"{'' if part.startswith(WITH_PLUS) else ','} {part}" for part in (variant, ingredients) if part)


def grouped(runs: Iterable[Runs], key: Callable[[Runs], Key]) -> dict[Key, list[Runs]]:
    """Records or summaries by `key`, in order of first occurrence."""
    groups: dict[Key, list[Runs]] = {}
    for one in runs:
        groups.setdefault(key(one), []).append(one)
    return groups


CELL_FIELDS = tuple(field.name for field in fields(Cell))


def cell_of(record: Record) -> Cell:
    """The cell that a Record belongs to."""
    method, config, backbone = record.method, record.config, record.backbone
    width, published = config.model.width, MODELS[backbone][1] if backbone in MODELS else None
    return Cell(
        dataset=record.dataset, backbone=backbone, width=None if width == published else width,
        method=method, model_scale=1.0 if is_full_scale(method) else config.model.model_scale,
        num_experts=config.model.num_experts if is_routed(method) else 1, attack_steps=config.attack.num_steps,
        epsilon=record.epsilon, norm=record.norm, epochs=config.training.epochs,
        train_images=record.train_images, test_images=record.test_images,
        variant=_variant(record) if is_routed(method) else "", ingredients=_ingredients(record),
    )  # fmt: skip


def _variant(record: Record) -> str:
    options = _options(record, OF_VARIANTS)
    if options.items() >= OF_OFFICIAL.items():
        others = {name: value for name, value in options.items() if name not in OF_OFFICIAL}
        return ", ".join([OFFICIAL, *_in_words(others)])
    return ", ".join(_in_words(options))


def _ingredients(record: Record) -> str:
    options, plus = _options(record, INGREDIENTS), _plus(record)
    others = {name: value for name, value in options.items() if name not in plus}
    return ", ".join([*([WITH_PLUS] if plus else []), *_in_words(others)])


def _plus(record: Record) -> JsonObject:
    """The settings of the suffix -plus, if the run has all of them; else empty."""
    plus = {name: value for name, value in _flat(PLUS).items() if is_routed(record.method) or name not in OF_ROUTERS}
    return plus if _options(record, plus) == plus else {}


def _options(record: Record, names: Collection[str]) -> dict[str, object]:
    """Those of the settings `names` that differ from the default. A field that the Record is too old to have is left out."""
    recorded = _flat(record.config.model_dump())
    return {name: recorded[name] for name in names if recorded.get(name, DEFAULTS[name]) != DEFAULTS[name]}


def _in_words(options: Mapping[str, object]) -> list[str]:
    """['same batches', 'router target confusion']."""
    texts = [f"{name.partition('.')[2].replace('_', ' ')} {short_value(value)}" for name, value in options.items()]
    return [SAME_BATCHES if text == "level batches same" else text for text in texts]


def collect(folder: Path) -> list[Record]:
    """The Records below `folder`, ordered by cell and seed.

    Reads every record.json, and every other JSON file outside of run folders that holds a Record or a list of Records. There is one
    warning for each file that is skipped because it is broken or holds no Record, and one for each Record with a damaged part that
    is dropped. If runs of one cell have different settings, or the same seed twice, the newest run and those with its settings are
    kept, with a warning for each other. A run that was evaluated before its end counts as older than all that were not. There is
    also a warning for each method that is not registered here. Raises UserError if there is no Record.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    pairs = [pair for path in _files(folder) for pair in _read(path)]
    if not pairs:
        raise UserError(f"{folder}: holds no Record; advmoe evaluate RUN writes one, RUN/record.json")
    once = {record.model_dump_json(): (path, record) for path, record in reversed(pairs)}  # copies of a Record are one
    cells: dict[Cell, list[RecordFile]] = defaultdict(list)
    for path, record in sorted(once.values(), key=lambda pair: (_epochs_trained(pair[1]) == "all", pair[1].time), reverse=True):
        cells[cell_of(record)].append((path, record))
    for method in sorted({cell.method for cell in cells} - set(METHODS)):
        logger.warning(
            "method '%s' is not registered here, so its runs are listed with a model scale and a number of experts, even if it has "
            "none; ADVMOE_EXTENSION=SCRIPT.py loads the script that registers it", method,
        )  # fmt: skip
    return [record for cell in sorted(cells, key=_order) for record in _of_one_setting(cell, cells[cell])]


def _files(folder: Path) -> Iterator[Path]:
    """Of a run's folder only record.json is read, not its checkpoints. Neither are the results of evaluations (the folders with
    key.json) and, beside a Record, its images (gallery.json)."""
    for parent, folders, names in os.walk(folder):
        is_run, is_store = "config.yaml" in names, "key.json" in names
        images = {name.removesuffix("record.json") + "gallery.json" for name in names if name.endswith("record.json")}
        folders[:] = [] if is_run or is_store else sorted(name for name in folders if not name.startswith("."))
        for name in [] if is_store else sorted(set(names) - images):
            of_records = "record.json" if "record.json" in names else ".json"  # a hub's folder, too, has other JSON files
            if name == "record.json" or (not is_run and name.endswith(of_records) and not name.startswith(".")):
                yield Path(parent, name)


def _read(path: Path) -> list[RecordFile]:
    """The Records of a file, with one warning if the file or entries of it cannot be read."""
    try:
        tree = with_gallery(read_json(path), path)
    except UserError as error:
        logger.warning("left out, %s", error)
        return []
    several = isinstance(tree, list)
    entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(tree, 1)] if several else [(str(path), tree)]
    records, reasons = [], []
    for where, entry in entries:
        try:
            records.append((path, checked_record(entry, where)))
        except UserError as error:
            reasons.append(str(error))
    if reasons or not records:
        logger.warning("left out, %s", "; ".join(reasons) or f"{path}: an empty list")
    return records


def settings(record: Record) -> dict[str, object]:
    """All settings that can change a run's result, except its seed: 'section.field' -> value, of the fields that its method uses,
    with the data's fingerprint, the settings and versions of the attacks, and the epochs trained. A field that the Record is too
    old to have gets its default."""
    method = record.method
    ignored = {
        *NOT_COMPARED,
        *(() if is_routed(method) else OF_ROUTERS),
        *(("model.model_scale",) if is_full_scale(method) else ()),
    }
    flat = DEFAULTS | _flat(record.config.model_dump()) | {"fingerprint": record.fingerprint}
    flat |= attack_settings(record) | {"evaluated": evaluated(record), "epochs trained": _epochs_trained(record)}
    return {name: value for name, value in flat.items() if name not in ignored}


def _epochs_trained(record: Record) -> str:
    """'all', or '3 of 6' for a run that was evaluated before its end."""
    phases = len(METHODS[record.method].phases) if record.method in METHODS else 1
    trained, epochs = len(record.history), phases * record.config.training.epochs
    return f"{trained} of {epochs}" if 0 < trained < epochs else "all"


def shared_settings(record: Record) -> dict[str, object]:
    """The `settings` that must be equal to compare runs of different methods: all but those of routers, experts and methods, and
    the ingredients, which belong to the network's name."""
    return {name: value for name, value in settings(record).items() if name not in (*OF_METHODS, *INGREDIENTS)}


def departures(record: Record) -> tuple[str, ...]:
    """'training.lr 0.05 (0.1)': settings that are no field of the cell and differ from the default, which is given in brackets."""
    defaults = DEFAULTS | ATTACK_DEFAULTS | {"evaluated": PRESENT, "epochs trained": "all"}
    as_trained = ("attack.epsilon",) if record.config.attack.epsilon == record.epsilon else ()
    in_cell = (*IN_CELL, *OF_VARIANTS, *INGREDIENTS, *_plus(record))
    others = {name: value for name, value in settings(record).items() if name not in (*in_cell, *as_trained)}
    return tuple(
        f"{name} {short_value(value)} ({short_value(defaults.get(name))})"
        for name, value in others.items()
        if value != defaults.get(name)
    )


def _of_one_setting(cell: Cell, runs: list[RecordFile]) -> list[Record]:
    """One run for each seed, with the settings of the first run; `runs` are sorted, the newest first."""
    first, first_settings = runs[0][0], settings(runs[0][1])
    others: dict[tuple[Path, str], list[int]] = defaultdict(list)
    by_seed: dict[int, RecordFile] = {}
    for path, record in runs:
        difference = differing(settings(record), first_settings)
        if difference:
            others[path, difference].append(record.seed)
        elif record.seed not in by_seed:
            by_seed[record.seed] = path, record
        elif record.evaluation != by_seed[record.seed][1].evaluation:
            newer = by_seed[record.seed][0]
            logger.warning("left out, %s: seed %d of %s: %s holds a newer run of it", path, record.seed, cell.words, newer)
    for (path, difference), seeds in others.items():
        numbers = ", ".join(str(seed) for seed in sorted(set(seeds)))
        reason = f"other settings than the run in {first} ({difference})"
        logger.warning("left out, %s: seed %s of %s: %s", path, numbers, cell.words, reason)
    return [by_seed[seed][1] for seed in sorted(by_seed)]


def differing(values: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """'training.lr: 0.05, not 0.1': the settings that differ from the expected ones; empty if none does."""
    names = [name for name in {**values, **expected} if values.get(name) != expected.get(name)]
    return "; ".join(f"{name}: {short_value(values.get(name))}, not {short_value(expected.get(name))}" for name in names)


def short_value(value: Any) -> str:
    """A setting's value as text. A long one without spaces, such as a fingerprint, is cut."""
    text = f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
    return text if len(text) <= 20 or " " in text else f"{text[:12]}..."


def _order(cell: Cell) -> tuple[Any, ...]:
    """Sort key: by setting, then by method in the order of METHODS, then by rising scale."""
    methods = list(METHODS)
    rank = methods.index(cell.method) if cell.method in METHODS else len(methods)
    values = [0 if getattr(cell, name) is None else getattr(cell, name) for name in CELL_FIELDS]
    by_name = dict(zip(CELL_FIELDS, values, strict=True)) | {"method": (rank, cell.method)}
    last = ("method", "model_scale", "num_experts", "variant", "ingredients")
    return tuple(by_name[name] for name in (*(name for name in CELL_FIELDS if name not in last), *last))
