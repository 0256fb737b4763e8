"""TinyImageNet (Stanford CS231n): 200 classes of ImageNet at 64 x 64, from its folder or straight from its zip."""

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from advmoe.config import DataConfig
from advmoe.data.decode import decode, decode_all
from advmoe.data.images import Images, ImageSpec, Splits, divided, from_arrays, in_content_order
from advmoe.data.place import place_of, readable
from advmoe.errors import UserError

SIZE = 64
NAME = "tiny-imagenet-200"
FORMS = f"{NAME} (folder) or {NAME}.zip"
WNIDS, ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def spec(config: DataConfig) -> ImageSpec:
    """Classes are the sorted WordNet ids of `wnids.txt`; without `data_dir` they have placeholders for names."""
    if config.data_dir is None:
        return _spec([f"class-{number:03d}" for number in range(200)])
    with readable(config), _opened(place_of(config, FORMS)) as tree:
        return _spec(_wnids(tree))


def _spec(classes: Sequence[str]) -> ImageSpec:
    return ImageSpec(tuple(classes), (3, SIZE, SIZE), MEAN, STD)


def load(config: DataConfig) -> Splits:
    """TinyImageNet from `data_dir`. The reported test part is the official val part: the official test part has no labels.

    The part that selects the best epoch is held out of the training part. Raises UserError, with the file and line, where
    something is missing, damaged or without a label.
    """
    with readable(config), _opened(place_of(config, FORMS)) as tree:
        wnids = _wnids(tree)
        train, test = _train(tree, wnids), _val(tree, wnids)
    return divided("tinyimagenet", _spec(wnids), train, test, config)


@dataclass(frozen=True)
class _Tree:
    """A folder's files or an archive's: `folders` holds the names of the visible files in each, sorted."""

    place: str
    folders: dict[str, list[str]]
    read: Callable[[str], bytes]

    def where(self, name: str) -> str:
        return f"{self.place}/{name}"

    def lines(self, name: str) -> list[str]:
        """Lines of a text file, without their ends."""
        folder, _, file = name.rpartition("/")
        if file not in self.folders.get(folder, ()):
            raise UserError(f"{self.place}: holds no {name}; give a place that holds {FORMS}")
        try:
            return self.read(name).decode().splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{self.where(name)}: not a text file") from None


def _tree(place: str, names: Sequence[str], read: Callable[[str], bytes]) -> _Tree:
    folders = defaultdict(list)
    for name in sorted(set(names)):
        folder, _, file = name.rpartition("/")
        if not file.startswith("."):
            folders[folder].append(file)
    return _Tree(place, dict(folders), read)


@contextmanager
def _opened(place: Path) -> Iterator[_Tree]:
    inner = next((path for path in (place / NAME, place / f"{NAME}.zip") if path.exists()), place)
    if inner.is_dir():
        found = [path for pattern in (WNIDS, "train/*/images/*", "val/*", "val/images/*") for path in inner.glob(pattern)]
        names = [path.relative_to(inner).as_posix() for path in found if path.is_file()]
        yield _tree(str(inner), names, lambda name: (inner / name).read_bytes())
        return
    with inner.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # a damaged archive raises nearly anything
            raise UserError(f"{inner}: not a whole zip archive ({' '.join(str(error).split())[:120]})") from None
        yield _zip_tree(inner, archive)


def _zip_tree(path: Path, archive: zipfile.ZipFile) -> _Tree:
    """Members are read, never unpacked: nothing is written, wherever they point."""
    members = [name for name in archive.namelist() if not name.endswith("/")]
    root = next((name.removesuffix(WNIDS) for name in members if name.rpartition("/")[2] == WNIDS), "")
    lock = Lock()  # an archive has one place to read from, the decoding threads are many

    def read(name: str) -> bytes:
        try:
            with lock:
                return archive.read(root + name)
        except Exception as error:
            raise UserError(f"{path}/{name}: damaged in the archive ({' '.join(str(error).split())[:120]})") from None

    return _tree(str(path), [name.removeprefix(root) for name in members if name.startswith(root)], read)


def _wnids(tree: _Tree) -> list[str]:
    wnids = [line.strip() for line in tree.lines(WNIDS) if line.strip()]
    twice = next((wnid for number, wnid in enumerate(wnids) if wnid in wnids[:number]), None)
    if twice is not None or not wnids:
        raise UserError(f"{tree.where(WNIDS)}: {'is empty' if twice is None else f'{twice} is listed twice'}")
    return sorted(wnids)


def _train(tree: _Tree, wnids: Sequence[str]) -> Images:
    names: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        folder = f"train/{wnid}/images"
        if folder not in tree.folders:
            raise UserError(f"{tree.where(folder)}: holds no image")
        names += [f"{folder}/{file}" for file in tree.folders[folder]]
        labels += [label] * len(tree.folders[folder])
    for folder in tree.folders:
        parts = folder.split("/")
        if parts[0] == "train" and parts[2:] == ["images"] and parts[1] not in wnids:
            raise UserError(f"{tree.where(f'train/{parts[1]}')}: {parts[1]} is not in {WNIDS}")
    return _decoded(tree, names, labels, len(wnids))


def _val(tree: _Tree, wnids: Sequence[str]) -> Images:
    files, where = tree.folders.get("val/images", []), tree.where(ANNOTATIONS)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for number, line in enumerate(tree.lines(ANNOTATIONS), 1):
        if not line.strip():
            continue
        file, wnid = _annotation(line, f"{where}: line {number}")
        if wnid not in label_of:
            raise UserError(f"{where}: line {number}: {wnid!r} is not in {WNIDS}")
        if file in labels:
            raise UserError(f"{where}: line {number}: {file} is listed twice")
        labels[file] = label_of[wnid]
    _check_all_labelled(tree, files, labels)
    return _decoded(tree, [f"val/images/{file}" for file in files], [labels[file] for file in files], len(wnids))


def _annotation(line: str, where: str) -> tuple[str, str]:
    """File and WordNet id; the box that follows is not used."""
    fields = line.split("\t")
    if len(fields) < 2 or not fields[0]:
        raise UserError(f"{where}: {line[:60]!r} is not a file, a WordNet id and a box, separated by tabs")
    return fields[0], fields[1].strip()


def _check_all_labelled(tree: _Tree, files: Sequence[str], labels: dict[str, int]) -> None:
    missing, unlabelled = sorted(labels.keys() - set(files)), sorted(set(files) - labels.keys())
    if missing:
        raise UserError(f"{tree.where(f'val/images/{missing[0]}')}: no such file, but it is listed in {ANNOTATIONS}")
    if unlabelled:
        raise UserError(f"{tree.where(f'val/images/{unlabelled[0]}')}: has no line in {ANNOTATIONS}")


def _decoded(tree: _Tree, names: Sequence[str], labels: Sequence[int], num_classes: int) -> Images:
    def image(row: int) -> np.ndarray:
        return decode(tree.read(names[row]), SIZE, tree.where(names[row]))

    return in_content_order(from_arrays(decode_all(len(names), SIZE, image), labels, num_classes, tree.place))
