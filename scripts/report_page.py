"""Make the report's page from the Records in results/, and the screenshots of it.

python scripts/report_page.py FILE.html     the page alone; the site's build calls this
python scripts/report_page.py               docs/images/report.png and gallery.png, by Chromium
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from advmoe.evaluation.record import Record
from advmoe.reports.collect import collect
from advmoe.reports.write import write_report

RESULTS = Path(__file__).parents[1] / "results"
IMAGES = Path(__file__).parents[1] / "docs/images"
FOLDERS = ("cifar10-jpeg", "embedded")  # the page starts with the first
SCREENSHOTS = {"report.png": ("", "1200,900"), "gallery.png": ("#images-1", "1000,1066")}  # file -> part of the page, and size
FRAME = '<style>body {{ margin: 0 }} iframe {{ border: 0; width: 100vw; height: 100vh }}</style><iframe src="{source}"></iframe>'


def page_records() -> list[Record]:
    """The Records in FOLDERS; a missing folder is skipped."""
    return [record for name in FOLDERS if any((RESULTS / name).glob("*.json")) for record in collect(RESULTS / name)]


def write_page(file: Path) -> None:
    """Write the page to `file`."""
    with tempfile.TemporaryDirectory() as folder:
        write_report(page_records(), Path(folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "report.html", file)


def take_screenshots() -> None:
    """Write the images of SCREENSHOTS."""
    with tempfile.TemporaryDirectory() as folder:
        page, frame = Path(folder) / "report.html", Path(folder) / "frame.html"
        write_page(page)
        for name, (part, size) in SCREENSHOTS.items():
            frame.write_text(FRAME.format(source=page.name + part))  # a screenshot of a page itself cannot begin at a part of it
            flags = ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--force-prefers-reduced-motion")
            output = (f"--window-size={size}", f"--screenshot={IMAGES / name}")
            subprocess.run(["chromium", *flags, *output, frame.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    write_page(Path(sys.argv[1])) if len(sys.argv) > 1 else take_screenshots()
