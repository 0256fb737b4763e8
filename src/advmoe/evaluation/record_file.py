"""Read Records from files, with size limits and one-line errors, and write them.

The images of a Record's gallery are in a separate file beside record.json, so that a Record can be shared without them.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advmoe import migrations
from advmoe.errors import UserError, short_repr, truncated
from advmoe.evaluation.record import SCHEMA, Record
from advmoe.files import JsonObject, bounded_text, write_json

logger = logging.getLogger("advmoe")
MAX_BYTES = 2**26  # of a file of Records; real ones have up to 350 thousand
MAX_DEPTH = 12  # levels of nested lists and objects; real Records have 5
RECORD, GALLERY = "record.json", "gallery.json"  # in a run's folder
PARTS = frozenset(  # fields that a report does not need
    {
        "run", "advmoe", "commit", "versions", "hardware", "history", "classes", "layers", "load_by_class", "epsilon_curve",
        "gallery",
    }
)  # fmt: skip
KINDS = {
    "model_type": "an object", "dataclass_type": "an object", "dict_type": "an object", "list_type": "a list",
    "tuple_type": "a pair", "bool_type": "true or false", "bool_parsing": "true or false", "literal_error": f"{SCHEMA}",
}  # fmt: skip


def write_record(path: Path, record: Record, keep_images: bool = False) -> None:
    """Write a Record to a file named record.json or NAME.record.json, and its gallery beside it to (NAME.)gallery.json.

    With `keep_images` the gallery is part of the Record's file.
    """
    gallery = gallery_path(path)
    if keep_images or not record.gallery:
        write_json(path, record.to_json(), indent=1)
        gallery.unlink(missing_ok=True)
        return
    content = record.to_json()
    write_json(gallery, {"time": record.time, "gallery": content.pop("gallery")})
    write_json(path, {**content, "gallery": []}, indent=1)


def gallery_path(record_path: Path) -> Path:
    """The path of the gallery of a record.json or NAME.record.json."""
    return record_path.with_name(record_path.name.removesuffix(RECORD) + GALLERY)


def read_record(path: Path) -> Record:
    """The Record in a file, of this schema or an older one, with its gallery. Raises UserError if the file holds no Record."""
    return checked_record(with_gallery(read_json(path), path), str(path))


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read, has more than MAX_BYTES, or is not JSON."""
    try:
        return json.loads(bounded_text(path, MAX_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


def with_gallery(content: Any, record_path: Path) -> Any:
    """The content of a run's record.json, with the images of the gallery.json beside it if both are of the same evaluation.

    If gallery.json cannot be read, a warning says so, and the content is returned unchanged.
    """
    path, named = gallery_path(record_path), record_path.name == RECORD or record_path.name.endswith(f".{RECORD}")
    if not named or not isinstance(content, dict) or content.get("gallery") or not path.exists():
        return content
    try:
        images = read_json(path)
    except UserError as error:
        logger.warning("%s: the Record is read without its images", error)
        return content
    if not isinstance(images, dict) or images.get("time") != content.get("time"):
        return content
    return {**content, "gallery": images.get("gallery", [])}


def checked_record(content: Any, where: str) -> Record:
    """The Record in a JSON value from the file `where`. Fields that an older schema does not have get their defaults.

    Invalid PARTS get their defaults too, and a warning names them. Raises UserError if the value is not a Record, if its schema is
    newer, or if any other field is invalid.
    """
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{where}: holds no Record (advmoe evaluate writes them to RUN/record.json)")
    schema = content["schema"]
    if type(schema) is not int or schema < 1:
        raise UserError(f"{where}: holds no Record (schema {short_repr(schema)}; 1 to {SCHEMA} are known)")
    check_not_newer(content, where)
    if not is_readable(content):
        raise UserError(f"{where}: holds no Record (nested more than {MAX_DEPTH} deep, or with text that is no Unicode)")
    content = migrations.record(content, SCHEMA)
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        garbled = _garbled_parts(error, where)
    try:
        record = Record.model_validate({name: value for name, value in content.items() if name not in garbled})
    except ValidationError as error:  # a field that depends on a part that was removed
        raise UserError(f"{where}: holds no Record ({_line(error)})") from None
    logger.warning("%s: read without its garbled parts: %s", where, ", ".join(name for name in content if name in garbled))
    return record


def check_not_newer(content: JsonObject, where: str) -> None:
    """Raises UserError if a Record is of a newer schema: this version of the package can neither read nor replace it."""
    schema = content.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise UserError(f"{where}: holds a Record of schema {schema}; this advmoe reads 1 to {SCHEMA}: a newer one is needed")


def _garbled_parts(error: ValidationError, where: str) -> set[str]:
    """The PARTS that an error names. Raises UserError if it names any other field."""
    garbled = {str(each["loc"][0]) if each["loc"] else "" for each in error.errors(include_url=False, include_context=False)}
    if not garbled <= PARTS:
        raise UserError(f"{where}: holds no Record ({_line(error)})") from None
    return garbled


def _line(error: ValidationError) -> str:
    """The first error outside of PARTS, in words: 'sa is 'high', not a number from 0 to 100'."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if not each["loc"] or each["loc"][0] not in PARTS), errors[0])
    name, kind = truncated(".".join(map(str, first["loc"]))), first["type"]
    if kind == "missing":
        return f"{name} is missing"
    if kind == "record":
        return first["msg"]
    return f"{name} is {short_repr(first['input'])}, not {KINDS.get(kind, first['msg'])}"


def is_readable(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether `value` is nested at most `depth` deep, and all of its text can be written as UTF-8 (JSON allows lone surrogates)."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    items: Iterable[Any] = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth > 0 and all(is_readable(item, depth - 1) for item in items)
