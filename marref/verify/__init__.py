"""Proofs that an implementation is right.

`check_gradients` and `check_layer` hold gradients to numerical derivatives; `diagnose_layer` finds
the mistake in one layer.  `golden.make` writes
golden vectors, of a `checkpoint` of yours too, and `golden_continuous.make` those of continuous
MAR; `compare`, `crosscheck` and `diagnose` hold another implementation to them, whose arrays
`rename` takes under names and in layouts of its own.
"""

from marref.verify import checkpoint, golden, golden_continuous
from marref.verify.comparison import Comparison, Golden, Row, compare, crosscheck
from marref.verify.diagnosis import Diagnosis, diagnose
from marref.verify.gradients import check_gradients, check_layer
from marref.verify.layers import LayerDiagnosis, diagnose_layer
from marref.verify.names import Renamed, rename
from marref.verify.search import Explanation, Partial

__all__ = [
    "Comparison",
    "Diagnosis",
    "Explanation",
    "Golden",
    "LayerDiagnosis",
    "Partial",
    "Renamed",
    "Row",
    "check_gradients",
    "check_layer",
    "checkpoint",
    "compare",
    "crosscheck",
    "diagnose",
    "diagnose_layer",
    "golden",
    "golden_continuous",
    "rename",
]
