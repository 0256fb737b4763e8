import unicodedata
from pathlib import Path

import pytest
from refusal import refusal

from advmoe.data.paths import class_folders
from advmoe.errors import UserError


def test_class_names_are_in_one_unicode_form_and_sorted() -> None:
    paths = [Path("x", unicodedata.normalize(form, name)) for form, name in (("NFD", "é"), ("NFC", "f"), ("NFD", "Å"))]
    assert class_folders(paths) == {"f": paths[1], "Å": paths[2], "é": paths[0]}
    assert all(unicodedata.is_normalized("NFC", name) for name in class_folders(paths))


@pytest.mark.parametrize(("name", "escaped"), [("caf\udcff", r"caf\udcff"), ("a\x1b[2J", r"a\x1b[2J"), ("a\x85b", "a b")])
def test_names_that_cannot_be_written_are_refused_and_escaped(name: str, escaped: str) -> None:
    text = refusal(class_folders, [Path("x", name)])
    assert text.startswith(f"x/{escaped}: the name of a class folder must be UTF-8 text")


def test_two_forms_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two folders have this class name"):
        class_folders([Path(unicodedata.normalize(form, "é")) for form in ("NFC", "NFD")])
