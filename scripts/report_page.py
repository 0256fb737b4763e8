"""Make the report's page from the Records in results/, and the screenshot of its first screen.

python scripts/report_page.py FILE.html     the page alone; the site's build calls this
python scripts/report_page.py               docs/images/report.png, by Chromium
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
SCREENSHOT = Path(__file__).parents[1] / "docs/images/report.png"
FOLDERS = ("cifar10-jpeg", "embedded")  # the page starts with the first
SIZE = "1200,900"


def page_records() -> list[Record]:
    """The Records in FOLDERS; a missing folder is skipped."""
    return [record for name in FOLDERS if any((RESULTS / name).glob("*.json")) for record in collect(RESULTS / name, print)]


def write_page(file: Path) -> None:
    """Write the page to `file`."""
    with tempfile.TemporaryDirectory() as folder:
        write_report(page_records(), Path(folder), print)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "report.html", file)


def take_screenshot() -> None:
    """Write docs/images/report.png."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_page(file)
        flags = ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE}", f"--screenshot={SCREENSHOT}")
        subprocess.run(["chromium", *flags, file.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    write_page(Path(sys.argv[1])) if len(sys.argv) > 1 else take_screenshot()
