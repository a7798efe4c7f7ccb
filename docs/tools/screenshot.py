"""Draw docs/watch.png: the demo's page while it fills in the lower half of a three.

    python docs/tools/screenshot.py DECODE.HTML

Needs the extra browser, and a chromium on the path.
"""

import sys
from pathlib import Path

from benchmarks import live_page, pictures

PICTURE = Path(__file__).parents[1] / "watch.png"


def main(page_of_the_demo: str) -> None:
    """Mask half of a real three, take four steps, look at a blank."""
    with live_page.chromium() as browser:
        page = browser.new_page(viewport={"width": 1220, "height": 710})
        page.goto(Path(page_of_the_demo).resolve().as_uri())
        page.get_by_label("An example").select_option("a real 3")
        page.get_by_role("button", name="lower half masked").click()
        page.get_by_label("Class").select_option("3")
        for _ in range(4):
            page.get_by_role("button", name="Forward").click()
        page.locator("#grid .cell").nth(44).click()
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=PICTURE)
    pictures.stamp(PICTURE, f"python docs/tools/screenshot.py {page_of_the_demo}")


if __name__ == "__main__":
    main(sys.argv[1])
