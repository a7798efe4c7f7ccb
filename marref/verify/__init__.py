"""Proofs that an implementation is right.

`check_gradients` and `check_layer` hold gradients to numerical derivatives.  `golden.make` writes
golden vectors; `compare`, `crosscheck` and `diagnose` hold another implementation to them.
"""

from marref.verify import golden
from marref.verify.comparison import Comparison, Golden, Row, compare, crosscheck
from marref.verify.diagnosis import Diagnosis, diagnose
from marref.verify.gradients import check_gradients, check_layer
from marref.verify.search import Explanation, Partial

__all__ = [
    "Comparison",
    "Diagnosis",
    "Explanation",
    "Golden",
    "Partial",
    "Row",
    "check_gradients",
    "check_layer",
    "compare",
    "crosscheck",
    "diagnose",
    "golden",
]
