"""Publish a network on the Hugging Face hub: its file, its Record, and a model card.

The card is written from the Record: the figures, worst case first, and their limits.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from advmoe import hub
from advmoe.config import dump_yaml
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.files import write_atomically, write_json
from advmoe.reports.markup import Entry, Table, markdown
from advmoe.reports.measures import WORST, label, worst_of
from advmoe.runs.load import FILE, load, portable, save_file
from advmoe.runs.loaded import Loaded

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,63}")
TAGS = ["adversarial-robustness", "mixture-of-experts", "advmoe"]

USE = """```python
import advmoe

model = advmoe.load("{name}")  # {where}
logits = model(pixels)  # [B, C, H, W] in [0, 1]
```"""


def push_to_hub(run: str | Path, name: str, *, license: str | None = None, private: bool = False, images: bool = False) -> str:
    """Publish an evaluated network (whatever `load` takes) as `name` (owner/name) on the hub; return its address.

    The repository contains model.safetensors, config.yaml, record.json and a model card (README.md) written from the Record.
    `license` is the hub's identifier of a licence, such as "mit"; without it the card names none. The Record's test images are
    published only if `images` is true. Raises UserError if there is no Record, or if the hub refuses.
    """
    if not hub.is_name(name):
        raise UserError(f"'{name}' is not a name on the hub: it must be owner/name")
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f"license must be an identifier of the hub, such as mit, apache-2.0 or other, not '{license}'")
    model = load(run)
    if model.record is None:
        raise UserError(f"{run}: has no Record of its best epoch, so its robust accuracy is unknown; run advmoe evaluate {run}")
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(model, model.record, Path(folder), name, license=license, images=images)
        return hub.publish(Path(folder), name, private)


def write_hub_folder(
    model: Loaded, record: Record, folder: Path, name: str, *, license: str | None = None, images: bool = False, half: bool = False
) -> None:
    """Write the files of a repository on the hub: model.safetensors, config.yaml, record.json and README.md, the model card."""
    record = record if images else record.without_images()
    save_file(model, folder / FILE, images=images, half=half)
    write_atomically(folder / "config.yaml", dump_yaml(portable(model.config)))
    write_json(folder / "record.json", record.to_json(), indent=1)
    write_atomically(folder / "README.md", model_card(record, name, model.classes, model.input_size, license))


def model_card(record: Record, name: str, classes: Sequence[str], input_size: Sequence[int], license: str | None = None) -> str:
    """README.md of the network `name` (owner/name) for images of `input_size` (C, H, W); texts of the Record are escaped."""
    escaped = Record.model_validate(_harmless(record.without_images().to_json()))
    parts = (
        f"---\n{yaml.safe_dump(_head(record, name, license), sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        _summary(escaped),
        USE.format(name=name, where='pip install "advmoe[hub]"' if hub.is_name(name) else "comes with the package advmoe"),
        *(markdown(table) for table in (_figures(record), _attacks(record), _checks(record))),
        "### Limits",
        "\n".join(f"- {line}" for line in _limits(escaped, classes, input_size)),
        _origin(escaped),
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _harmless(tree: Any) -> Any:
    """The same tree, its texts without anything that Markdown or HTML would interpret (elements, links, line ends, code spans)."""
    if isinstance(tree, str):
        return " ".join(tree.split()).replace("<", "&lt;").replace("`", "'").replace("[", "(").replace("]", ")")
    if isinstance(tree, Mapping):
        return {_harmless(name): _harmless(value) for name, value in tree.items()}
    return [_harmless(value) for value in tree] if isinstance(tree, list) else tree


def _head(record: Record, name: str, license: str | None) -> dict[str, object]:
    """The metadata that the hub reads: tags, and the figures as a model index."""
    figures = [{"type": "accuracy", "name": title, "value": round(value, 2)} for title, value in _measured(record)]
    result = {
        "task": {"type": "image-classification"}, "dataset": {"name": record.dataset, "type": record.dataset},
        "metrics": figures,
    }  # fmt: skip
    index = [{"name": name.rpartition("/")[2], "results": [result]}]
    named = {} if license is None else {"license": license}
    return {**named, "library_name": "advmoe", "pipeline_tag": "image-classification", "tags": TAGS, "model-index": index}


def _measured(record: Record) -> list[tuple[str, float]]:
    """Titles and percentages, worst case first."""
    figures = record.evaluation.figures
    return [
        (worst_of(record).label if name in WORST else label(name), figures[name])
        for name in record.evaluation.intervals
        if name in figures
    ]


def _threat(record: Record) -> str:
    return f"{record.norm} perturbations of up to {record.epsilon:.4g} (pixels in [0, 1])"


def _summary(record: Record) -> str:
    saving = f"{record.reduction:.0f} % fewer than the dense network's {record.gmacs_dense:.4f}"
    lines = [
        f"An image classifier ({record.backbone}, trained by `{record.method}` on {record.dataset}{_experts(record)}) of",
        f"{record.gmacs:.4f} GMACs an image, {saving}.",
        "",
        f"Under {_threat(record)} **{record.worst:.1f} %** of {record.test_images} test images withstand",
        f"everything that was tried. Of the clean ones {record.sa:.1f} % are classified correctly.",
    ]
    if record.ra_worst is None:
        lines.append("The first figure is a quick one, from above: AutoAttack and the attacks on routing were not all run.")
    return "\n".join(lines)


def _experts(record: Record) -> str:
    model = record.config.model
    routed = record.evaluation.routing is not None
    return f", {model.num_experts} experts a layer at model scale {model.model_scale:g}" if routed else ""


def _figures(record: Record) -> Table:
    intervals = record.evaluation.intervals
    spans = [intervals[name] for name in intervals if name in record.evaluation.figures]
    rows = tuple(
        (Entry(title), Entry(f"{value:.1f}", value), Entry(f"{low:.1f} to {high:.1f}"))
        for (title, value), (low, high) in zip(_measured(record), spans, strict=True)
    )
    return Table("figures", "Accuracy on the test set", ("measure", "%", "95 % interval"), rows)


def _attacks(record: Record) -> Table:
    rows = tuple(
        (Entry(name), Entry(str(run.attacked), run.attacked), Entry(str(run.broken), run.broken))
        for name, run in record.evaluation.attacks.items()
    )
    return Table("attacks", "Attacks", ("attack", "images attacked", "broken"), rows)


def _checks(record: Record) -> Table:
    rows = tuple(
        tuple(Entry(str(text)) for text in (check.number, check.name, check.status, check.detail))
        for check in record.evaluation.checks
    )
    about = "" if rows else "None was made: the standard and full evaluations make them."
    return Table("checks", "Checks of the evaluation itself", ("number", "check", "verdict", "detail"), rows, about)


def _limits(record: Record, classes: Sequence[str], input_size: Sequence[int]) -> Iterator[str]:
    evaluation, (channels, height, width) = record.evaluation, input_size
    yield f"The figures hold for {_threat(record)}; nothing follows for larger or other changes, such as rotation, blur or patches."
    yield f"No attack proves robustness, and a stronger one may break more: {label('ra_worst')} is an upper bound."
    yield f"Images are {height} x {width} with {channels} channels, and each is taken for one of {len(classes)} classes."
    if record.ra_worst is None:
        figure = f"{worst_of(record).label} was found without AutoAttack or without attacks on the routing"
        yield f"{figure}: {label('ra_worst')} can only be lower."
    if evaluation.autoattack_unreliable:
        yield "RA-AA stands further above RA-worst than it should: AutoAttack's figure is not to be trusted for this network."
    for check in evaluation.checks:
        if check.status in ("warn", "fail"):
            yield f"Check {check.number} ({check.name}) ended with {check.status}: {check.detail}."
    for attack, reason in evaluation.left_out.items():
        yield f"`{attack}` was not run: {reason}."


def _origin(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (record.versions or {}).items())
    lines = [
        f"Measured by advmoe {record.advmoe or '?'} (commit {record.commit or 'unknown'}; {versions}) at",
        f"{record.time}: epoch {record.epoch} of seed {record.seed}, trained on {record.train_images} images.",
        f"Fingerprint of the data: `{record.fingerprint}`. Everything else is in record.json.",
    ]
    return "\n".join(lines)
