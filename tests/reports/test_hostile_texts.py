"""Records in which every text is hostile: pages, tables and cards show them as text."""

import copy
import csv
import io
import re

import pytest
from records import content, sound
from test_html import Page, page

from advmoe.reports.markup import csv_text, latex, markdown
from advmoe.reports.model_card import model_card
from advmoe.reports.paper_tables import tables
from advmoe.reports.run_details import run_of

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'"
    "&amp; ![x](javascript:alert(3)) `\\input{/etc/passwd}` $|\n=1+1"
)
CHECKED = ("png", "status")  # fields that are checked when the Record is read
NAMED = ("attacks", "left_out", "versions", "hardware")  # objects whose names come from the file, too


def filled(tree, text, above=""):
    """The tree with every text, and every name that a file may choose, replaced."""
    if isinstance(tree, str):
        return tree if above in CHECKED else text
    if isinstance(tree, list):
        return [filled(item, text, above) for item in tree]
    if isinstance(tree, dict):
        return {f"{text}{name}" if above in NAMED else name: filled(value, text, name) for name, value in tree.items()}
    return tree


def with_notes(text, **fields):
    """A Record with every part that a report shows, its texts replaced by `text`."""
    filled_content = copy.deepcopy(content("advmoe", depth=2, epochs=2))
    filled_content["evaluation"]["left_out"] = {"square": "takes too long"}
    return sound(filled(filled_content, text) | fields)


def shape(text):
    """The page's elements with the names of their attributes, in order."""
    return [(tag, tuple(sorted(attributes))) for tag, attributes in Page(text).elements]


@pytest.mark.parametrize("fields", [{}, {"method": "advmoe", "backbone": "resnet18", "dataset": "fashion-mnist"}])
def test_a_page_of_hostile_texts_has_the_elements_of_a_harmless_one(fields):
    evil, harmless = with_notes(EVIL, **fields), with_notes("harmless" * 10, **fields)
    text = page([evil])
    assert shape(text) == shape(page([harmless]))
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert not any("javascript:" in (link.get("href") or "") for link in parsed.all("a"))
    assert parsed.text.count("<script>alert(1)</script>") >= 20


def test_every_table_of_hostile_texts_is_a_table():
    evil = [with_notes(EVIL, method=method, backbone=backbone) for method in ("advmoe", EVIL) for backbone in ("resnet18", EVIL)]
    for table in [*tables(evil), *(table for run in evil for table in run_of(run).tables)]:
        for line in markdown(table).splitlines():
            assert not re.search(r"(?<!\\)[<`\[]", line)
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown(table).splitlines() if line.startswith("| ")}
        assert len(bars) == 1
        assert "\\input" not in latex(table)
        rows = list(csv.reader(io.StringIO(csv_text(table))))
        assert len({len(row) for row in rows}) == 1
        assert not any(re.match(r"[=+@]|-(?![\d.])", field) for row in rows for field in row)


def test_a_card_of_hostile_texts_holds_no_element():
    card = model_card(with_notes(EVIL), "owner/name", [EVIL], (3, 32, 32))
    head, _, prose = card.removeprefix("---\n").partition("---\n\n#")
    assert "library_name: advmoe" in head
    prose = re.sub(r"```python.*?```", "", prose, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", prose)
    assert not re.search(r"(?<!\\)\[x", prose)
