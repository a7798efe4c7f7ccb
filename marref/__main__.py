"""``python -m marref``: the command line."""

import sys

from marref.cli import main

sys.exit(main())
