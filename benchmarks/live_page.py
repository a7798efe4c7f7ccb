"""Measure the live decoder in a browser: how soon it paints, and how long a step takes.

    python -m benchmarks.live_page DECODE.HTML

Prints the medians of nine loads, and of the second step of each: the first is computed before it is
asked for.  Needs the extra browser, and a chromium on the path.
"""

import contextlib
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROUNDS = 9
FIRST_PAINT = "performance.getEntriesByType('paint')[0].startTime"
ONE_STEP = """() => {
    show_at(1);
    const begin = performance.now();
    show_at(2);
    document.body.getBoundingClientRect();
    return performance.now() - begin;
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser, without a window, until the context ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def main(path: str) -> None:
    """Open the page some times, and step."""
    paints, steps = [], []
    with chromium() as browser:
        for _ in range(ROUNDS):
            page = browser.new_page()
            page.goto(Path(path).resolve().as_uri())
            page.wait_for_timeout(200)
            paints.append(page.evaluate(FIRST_PAINT))
            steps.append(page.evaluate(ONE_STEP))
            page.close()
    print(
        f"first paint {statistics.median(paints):.0f} ms, a step {statistics.median(steps):.0f} ms"
    )


if __name__ == "__main__":
    main(sys.argv[1])
