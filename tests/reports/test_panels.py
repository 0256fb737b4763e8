"""Parts of figures: files and names from data."""

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from advmoe.reports.panels import save, short

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-"}


def figure(title=""):
    """A figure with a title."""
    figure = Figure()
    figure.suptitle(title)
    return figure


@pytest.mark.parametrize("kind", MAGIC)
def test_the_suffix_is_the_files_kind(tmp_path, kind):
    path = tmp_path / f"curves.{kind}"
    save(figure(), path)
    assert path.read_bytes().startswith(MAGIC[kind])
    assert list(tmp_path.iterdir()) == [path]


def test_png_can_be_read(tmp_path):
    save(figure(), tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[0] > 100


def test_failed_figure_leaves_neither_draft_nor_damage(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(self, draft, **_):
        draft.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        save(figure(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["$\\frac$", "<script>", "two\nlines", "long " * 200], ids=["$", "tag", "lines", "long"])
def test_names_from_data_are_drawn_literally(tmp_path, name):
    title = short(name)
    assert title.startswith(" ".join(name.split())[:20])
    assert "\n" not in title
    assert len(title) < 40
    save(figure(title), tmp_path / "curves.png")
