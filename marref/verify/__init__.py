"""Proofs that an implementation is right.

`check_gradients` and `check_layer` hold gradients to numerical derivatives.  `golden.make` writes
golden vectors, of a `checkpoint` of yours too, and `golden_continuous.make` those of continuous
MAR; `compare`, `crosscheck` and `diagnose` hold another implementation to them, whose arrays
`rename` takes under names and in layouts of its own.
"""

from marref.verify import checkpoint, golden, golden_continuous
from marref.verify.comparison import Comparison, Golden, Row, compare, crosscheck
from marref.verify.diagnosis import Diagnosis, diagnose
from marref.verify.gradients import check_gradients, check_layer
from marref.verify.names import Renamed, rename
from marref.verify.search import Explanation, Partial

__all__ = [
    "Comparison",
    "Diagnosis",
    "Explanation",
    "Golden",
    "Partial",
    "Renamed",
    "Row",
    "check_gradients",
    "check_layer",
    "checkpoint",
    "compare",
    "crosscheck",
    "diagnose",
    "golden",
    "golden_continuous",
    "rename",
]
