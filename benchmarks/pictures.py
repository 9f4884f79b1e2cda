"""Make the images of the docs, docs/images/*.png: two of a finished run, the others of the committed comparisons.

  python recipes/sft_vlm.py
  python benchmarks/pictures.py outputs/demo_vlm

It needs Chromium, as the tests of the pages do. Look at the images before you commit them.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from grades_trl.recipe import comparison_page
from grades_trl.recipe.comparison import draw

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from chromium import Browser  # noqa: E402
from results_page import TITLES, read  # noqa: E402

IMAGES = ROOT / "docs" / "images"
PAGE_OF = "demo_vlm"  # the comparison whose page is shown
WIDTH, HEIGHT = 1120, 1400  # pixels of a page that the docs show, at most


def photograph(browser: Browser, page: Path, image: Path) -> None:
    """Saves the first sections of a page, as many as fit."""
    browser.open(page, WIDTH)
    sections = "[...document.querySelectorAll('main > *')].map(part => part.getBoundingClientRect().bottom)"
    browser.screenshot(image, 16 + max(end for end in browser.evaluate(sections) if end < HEIGHT))
    palette = Image.Quantize.MAXCOVERAGE  # a third of the bytes, and rare colors stay
    Image.open(image).convert("RGB").quantize(256, palette, dither=Image.Dither.NONE).save(image, optimize=True)


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:
        shutil.copy(run / "grades" / "gain.png", IMAGES)
        photograph(browser, run / "grades" / "report.html", IMAGES / "report_page.png")
        for name in TITLES:
            record, figure = read(name), IMAGES / f"compare_{name}.png"
            draw(record | {"jobs": None}, figure)  # no times: the machine did other work beside these runs, too
            if name == PAGE_OF:
                page = Path(folder) / "compare.html"
                comparison_page.write(record, figure, page)
                photograph(browser, page, IMAGES / "comparison_page.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
