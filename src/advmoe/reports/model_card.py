"""The model card of a published network, written from its Record: the figures, worst case first, and their limits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from advmoe import hub
from advmoe.config import OF_MACHINE, RunConfig
from advmoe.config.choices import BACKBONES
from advmoe.evaluation.record import Record
from advmoe.reports.markup import Entry, Table, markdown
from advmoe.reports.measures import label, with_intervals, worst_of

TAGS = ["adversarial-robustness", "mixture-of-experts", "advmoe"]
USE = """```python
import advmoe

model = advmoe.load("{name}")  # {where}
logits = model(pixels)  # [B, C, H, W] in [0, 1]
```"""


def model_card(record: Record, name: str, classes: Sequence[str], input_size: Sequence[int], license: str | None = None) -> str:
    """README.md of the network `name` (owner/name) for images of `input_size` (C, H, W); texts of the Record are escaped."""
    escaped = Record.model_validate(_harmless(record.without_images().to_json()))
    parts = (
        f"---\n{yaml.safe_dump(_head(record, name, license), sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        _summary(escaped),
        USE.format(name=name, where='pip install "advmoe[hub]"' if hub.is_name(name) else "comes with the package advmoe"),
        *(markdown(table) for table in (_figures(record), _attacks(record), _checks(record))),
        "### Training",
        _training(escaped),
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
    figures = [{"type": "accuracy", "name": title, "value": round(value, 2)} for title, value, _ in with_intervals(record)]
    result = {
        "task": {"type": "image-classification"}, "dataset": {"name": record.dataset, "type": record.dataset},
        "metrics": figures,
    }  # fmt: skip
    index = [{"name": name.rpartition("/")[2], "results": [result]}]
    named = {} if license is None else {"license": license}
    return {**named, "library_name": "advmoe", "pipeline_tag": "image-classification", "tags": TAGS, "model-index": index}


def _threat(record: Record) -> str:
    return f"{record.norm} perturbations of up to {record.epsilon:.4g} (pixels in [0, 1])"


def _summary(record: Record) -> str:
    more_or_fewer = "fewer" if record.reduction > 0 else "more"
    saving = f", {abs(record.reduction):.0f} % {more_or_fewer} than the dense network's {record.gmacs_dense:.4f}"
    lines = [
        f"An image classifier ({record.backbone}, trained by `{record.method}` on {record.dataset}{_experts(record)}) of",
        f"{record.gmacs:.4f} GMACs an image{saving if round(record.reduction) else ''}.",
        "",
        f"Under {_threat(record)} **{record.worst:.1f} %** of {record.test_images} test images withstand",
        f"everything that was tried. Of the clean ones {record.sa:.1f} % are classified correctly.",
    ]
    if record.ra_worst is None:
        lines.append("The first figure is an upper bound, because AutoAttack or an attack on the routing was not run.")
    if record.backbone not in BACKBONES:
        lines.append(f"The backbone `{record.backbone}` is not part of advmoe: add it to `advmoe.models.MODELS` before loading.")
    return "\n".join(lines)


def _experts(record: Record) -> str:
    model = record.config.model
    routed = record.evaluation.routing is not None
    return f", {model.num_experts} experts a layer at model scale {model.model_scale:g}" if routed else ""


def _figures(record: Record) -> Table:
    rows = tuple(
        (Entry(title), Entry(f"{value:.1f}", value), Entry(f"{low:.1f} to {high:.1f}"))
        for title, value, (low, high) in with_intervals(record)
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


def _training(record: Record) -> str:
    """The settings that differ from the defaults, as a file for `advmoe train --config`."""
    recorded, settings = record.config.model_dump(mode="json"), {"method": record.method, "seed": record.seed}
    for section, defaults in RunConfig().model_dump(mode="json").items():
        values = recorded.get(section)
        if isinstance(defaults, dict) and isinstance(values, dict):
            changed = {
                name: values[name]
                for name in defaults
                if f"{section}.{name}" not in OF_MACHINE and values.get(name, defaults[name]) != defaults[name]
            }
            settings |= {section: changed} if changed else {}
    return (
        "All settings other than the defaults, but not the precision of the training if the evaluation read a saved file, which "
        "does not hold it. As a file they train such a network again "
        f"(`advmoe train --config FILE.yaml --data-dir DIR --out RUN`):\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"
    )


def _limits(record: Record, classes: Sequence[str], input_size: Sequence[int]) -> Iterator[str]:
    evaluation, (channels, height, width) = record.evaluation, input_size
    yield f"The figures hold for {_threat(record)}; nothing follows for larger or other changes, such as rotation, blur or patches."
    yield f"No attack proves robustness, and a stronger one may break more: {label('ra_worst')} is an upper bound."
    yield f"Images are {height} x {width} with {channels} channels, and each is taken for one of {len(classes)} classes."
    if record.ra_worst is None:
        figure = f"{worst_of(record).label} was found without AutoAttack or without attacks on the routing"
        yield f"{figure}: {label('ra_worst')} is usually lower."
    if evaluation.autoattack_unreliable:
        yield "RA-AA stands further above RA-worst than it should: AutoAttack's figure is not to be trusted for this network."
    for check in evaluation.checks:
        if check.status in ("warn", "fail"):
            yield f"Check {check.number} ({check.name}) ended with {check.status}: {check.detail}."
    for attack, reason in evaluation.left_out.items():
        yield f"`{attack}` was not run: {reason}."
    for attack, part in evaluation.partly_run.items():
        yield f"`{attack}` was run on {part} only: the images that it broke count."


def _origin(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (record.versions or {}).items())
    images = f"{record.train_images or 'an unknown number of'} images"
    lines = [
        f"Measured by advmoe {record.advmoe or '?'} (commit {record.commit or 'unknown'}; {versions}) at",
        f"{record.time}: epoch {record.epoch} of seed {record.seed}, trained on {images}.",
        *([f"Trained by {record.trained_by_words}."] if record.trained_by else []),
        f"Fingerprint of the data: `{record.fingerprint}`. Everything else is in record.json.",
    ]
    return "\n".join(lines)
