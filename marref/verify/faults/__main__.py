"""``python -m marref.verify.faults > docs/mistakes.md``."""

import sys

from marref.verify.faults.page import first_differences, page

sys.stdout.buffer.write(page(first_differences()).encode())
