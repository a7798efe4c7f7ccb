"""The iterative decoder, and the rules that it can follow.

A step is four questions, each with a module that answers it: what each masked position would be
(`predicting`), which come first (`ordering`), how many now (`revealing`, `planning` and
`marref.schedules`), and what is taken back (`remasking`).  `state` puts a step together, and
`decoder` the steps.  Page: docs/decoding.md.
"""

from marref.decoding.decoder import (
    PredictAt,
    check_params,
    decode,
    iterative_decode,
    start,
)
from marref.decoding.grid import halton
from marref.decoding.ordering import choose, draw_noise, rank, score
from marref.decoding.planning import check_counts, reveal_counts
from marref.decoding.predicting import (
    Prediction,
    guide,
    keep,
    over_temperature,
    predict,
    scale_at,
)
from marref.decoding.remasking import (
    P2,
    REMASKS,
    Edit,
    Remask,
    ReMDMCap,
    ReMDMConf,
    ReMDMLoop,
    ReMDMRescale,
)
from marref.decoding.revealing import (
    REVEALS,
    EntropyBounded,
    Factor,
    Independent,
    QuotaOrThreshold,
    Reveal,
    Step,
    Threshold,
)
from marref.decoding.rule import GUIDANCES, ORDERS, Rule
from marref.decoding.state import Chance, State, View

__all__ = [
    "GUIDANCES",
    "ORDERS",
    "P2",
    "REMASKS",
    "REVEALS",
    "Chance",
    "Edit",
    "EntropyBounded",
    "Factor",
    "Independent",
    "PredictAt",
    "Prediction",
    "QuotaOrThreshold",
    "ReMDMCap",
    "ReMDMConf",
    "ReMDMLoop",
    "ReMDMRescale",
    "Remask",
    "Reveal",
    "Rule",
    "State",
    "Step",
    "Threshold",
    "View",
    "check_counts",
    "check_params",
    "choose",
    "decode",
    "draw_noise",
    "guide",
    "halton",
    "iterative_decode",
    "keep",
    "over_temperature",
    "predict",
    "rank",
    "reveal_counts",
    "scale_at",
    "score",
    "start",
]
