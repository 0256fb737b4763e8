"""The page needs no other file, is safe against hostile Records, and says what they lack."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from records import changed_record, content, old_record, png, record

from advmoe.reports import html
from advmoe.reports.captions import CAPTIONS
from advmoe.reports.claims import Claim, judge
from advmoe.reports.html import report_html
from advmoe.reports.markup import Statement
from advmoe.reports.measures import MEASURES
from advmoe.reports.paper_tables import tables
from advmoe.reports.plots import FIGURES
from advmoe.reports.styles import METHOD_STYLES
from advmoe.reports.summaries import summarise
from advmoe.reports.verdict import verdict

EVIL = "<script>alert(1)</script>\"'&"
VOID = ("meta", "link", "img", "br", "input")


class Page(HTMLParser):
    """Elements as (tag, attributes), the text outside of style and script, and the tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page(records, claims=None, lines=None, figures=None):
    judged = judge(records) if claims is None else claims
    return report_html(records, tables(records), judged, verdict(records) if lines is None else lines, figures or {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image of 28 x 28 pixels that stands for every figure."""
    path = tmp_path_factory.mktemp("figures") / "figure.png"
    path.write_bytes(base64.b64decode(png(0)))
    return dict.fromkeys(FIGURES, path)


@pytest.fixture(scope="module")
def full_page(pictures):
    return page([record(method, seed) for method in ("at_dense", "at_small_dense", "advmoe") for seed in (0, 1)], figures=pictures)


def test_nothing_is_requested_from_a_network(full_page):
    parsed = Page(full_page)
    assert parsed.open == []
    links = [value for _, attributes in parsed.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert "http" not in re.sub(r"<meta http-equiv", "", full_page)
    assert "@import" not in full_page
    assert "url(" not in full_page


def test_policy_allows_only_the_style_and_script_of_the_page(full_page):
    (policy,) = [meta["content"] for meta in Page(full_page).all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", full_page, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not any("style" in attributes or "onclick" in attributes for _, attributes in Page(full_page).elements)


def test_rows_of_all_runs_say_which_settings_are_unlike_the_default():
    table = html._overview(summarise([record(), changed_record("training", "at_dense", lr=0.05)]))
    (first, *_), (second, *_) = table.rows
    notes = [table.notes[mark - 1] for mark in second.marks]
    assert (first.marks, notes) == ((), ["Settings unlike the default, which is in brackets: training.lr 0.05 (0.1)."])


def test_verdict_comes_first(full_page):
    headings = [tag for tag, _ in Page(full_page).elements if re.fullmatch("h[1-6]", tag)]
    assert headings[:2] == ["h1", "h2"]
    assert re.search(r"<h2[^>]*>(.*?)</h2>", full_page)[1] == "Verdict"
    assert full_page.index('class="lead"') < full_page.index("<table")


def test_headings_skip_no_level(full_page):
    levels = [int(tag[1]) for tag, _ in Page(full_page).elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_are_unique_and_every_reference_has_one(full_page):
    parsed = Page(full_page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in parsed.all("a")} | {
        a["aria-labelledby"] for _, a in parsed.elements if "aria-labelledby" in a
    }
    assert targets <= set(ids)


def test_every_image_is_described_and_scrolling_parts_can_be_reached(full_page):
    parsed = Page(full_page)
    assert all(image["alt"] for image in parsed.all("img"))
    assert all(
        attributes.get("tabindex") == "0" for _, attributes in parsed.elements if "scroll" in attributes.get("class", "").split()
    )


def test_hostile_strings_remain_text(pictures, monkeypatch):
    monkeypatch.setattr("advmoe.reports.gallery.png_pixels", lambda png: np.zeros((2, 2), np.int16))  # of the text below, too
    config = content()["config"] | {"method": EVIL}
    evil = record("advmoe", classes=[EVIL] * 4, run=EVIL, dataset=EVIL, config=config, fingerprint=EVIL, commit=EVIL)
    evil.evaluation.checks[0] = replace(evil.evaluation.checks[0], detail=EVIL)
    evil.gallery[0].clean.png = '" onerror="alert(1)'
    parsed = Page(page([evil], [Claim(EVIL, "not shown", EVIL)], [Statement(EVIL, EVIL)] * 2, pictures))
    assert len(parsed.all("script")) == 1
    assert not any("onerror" in attributes for _, attributes in parsed.elements)
    assert parsed.text.count("<script>alert(1)</script>") >= 10
    assert any(EVIL in image["alt"] for image in parsed.all("img"))


def test_claims_are_shown_with_their_verdict():
    claims = [Claim(f"claim {word}", word, f"why {word}") for word in ("supported", "contradicted", "not shown")]
    text = Page(page([record()], claims)).text
    for mark, word in (("✓", "supported"), ("✗", "contradicted"), ("?", "not shown")):
        assert f"claim {word} {mark} {word} why {word}" in text


def test_long_verdicts_are_folded_past_the_first_lines():
    text = page([record()], lines=[Statement(f"line {number}.") for number in range(12)])
    folded = text[text.index("<details>") : text.index("</details>")]
    assert "4 more" in folded
    assert [line for line in range(12) if f"line {line}." in folded] == [8, 9, 10, 11]


def test_the_page_of_old_records_says_what_is_missing():
    text = Page(page([old_record("advmoe"), old_record("at_dense")])).text
    assert "2 of 2 runs: no images in the Record." in text
    assert "1 of 1 run: no load of the experts by class in the Record." in text  # a dense network has none to record
    assert "2 Records of an older version" in text
    assert "No Record has images." in text
    for caption in CAPTIONS.values():
        assert f"{caption.title}: no run has {caption.needs}." in text


def test_every_figure_has_its_caption(full_page):
    assert set(CAPTIONS) == set(FIGURES)
    described = [image["alt"] for image in Page(full_page).all("img")]
    assert all(caption.alt in described for caption in CAPTIONS.values())
    assert "no run has" not in full_page


def test_figures_are_as_large_as_the_pages_text_needs(full_page):
    (first, *_) = [image for image in Page(full_page).all("img") if image["alt"] == CAPTIONS["fig7"].alt]
    assert (first["width"], first["height"]) == ("20", "20")  # 28 pixels at 150 dots an inch


def test_tables_sort_by_numbers_not_by_their_text(full_page):
    values = [float(cell["data-value"]) for cell in Page(full_page).all("td") if "data-value" in cell]
    assert 49.25 in values  # the mean of two seeds, shown as 49.25 ± 0.35
    assert "49.25 ± 0.35" in Page(full_page).text


def test_every_method_and_measure_is_explained(full_page):
    words = full_page[full_page.index('<h2 id="words">') :]
    labels = [style.title for style in METHOD_STYLES.values()] + [measure.label for measure in MEASURES if measure.meaning]
    assert [label for label in labels if f"<dt>{label}</dt>" not in words] == []


def test_gallery_has_runs_with_routes_first(full_page):
    options = re.findall(r'<option value="\d+">(.*?)</option>', full_page)
    assert len(options) == 6
    assert [option.split(",")[0] for option in options] == ["AdvMoE"] * 2 + ["AT (Dense)"] * 2 + ["AT (S-Dense)"] * 2


def test_colour_images_lead_the_gallery(monkeypatch):
    monkeypatch.setattr("advmoe.reports.gallery.png_pixels", lambda png: np.zeros((2, 2) if png == "grey" else (2, 2, 3), np.int16))
    grey = record("advmoe")
    for image in grey.gallery:
        for view in image.views:
            view.png = "grey"
    text = page([grey, record("at_dense")])
    assert [option.split(",")[0] for option in re.findall(r'<option value="\d+">(.*?)</option>', text)] == ["AT (Dense)", "AdvMoE"]


def test_the_slider_starts_at_the_evaluations_epsilon_and_one_step_of_each_image_is_shown():
    text = page([record("advmoe")])
    (slider,) = Page(text).all("input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "5", "3")
    assert slider["data-radii"].split("|")[3] == "epsilon 0.1"
    steps = [attributes for _, attributes in Page(text).elements if "data-step" in attributes]
    assert len(steps) == 4 * 6 * 3
    assert {step["data-step"] for step in steps if "hidden" not in step} == {"3"}
    assert "The Record has only these radii" not in text


def test_records_without_steps_say_so():
    images = [{name: value for name, value in image.items() if name != "steps"} for image in content()["gallery"]]
    text = page([record(gallery=images)])
    assert "The Record has only these radii; a new evaluation records more." in text
    assert Page(text).all("input")[0]["max"] == "1"


def test_cells_that_were_run_come_first_and_the_others_are_folded():
    text = page([record("at_dense"), record("advmoe")])
    titles = re.findall(r'<h3 id="table-\d+">(.*?)</h3>', text)
    assert titles[0] == "All runs"
    assert titles[1].startswith("Our setting")
    assert [title.partition(":")[0] for title in titles[2:]] == ["Table A1", "Table A2"]
    tables = text[text.index('<h2 id="tables">') :].partition("</section>")[0]
    outside = re.sub(r"<details>.*?</details>", "", tables, flags=re.DOTALL)
    assert "not run" not in Page(outside).text.replace("was not run", "")
    assert "table-2-note" in outside
    assert "table-3-note" not in outside  # the notes of folded rows are folded, too
    assert Page(tables).text.count("RA-50 is the accuracy under PGD-50.") == 1
    assert tables.count("<details>") == 3
    assert "3 cells that were not run" in Page(tables).text
    assert Page(tables).text.count("No cell of this table was run.") == 2
