"""``python -m marref.verify.faults > docs/mistakes.md``."""

import sys

from marref.verify.faults.page import (
    first_differences,
    first_differences_of_continuous,
    page,
    part_on_continuous,
)

parts = page(first_differences()), part_on_continuous(first_differences_of_continuous())
sys.stdout.buffer.write("\n".join(parts).encode())
