"""Training: the loop, evaluation, models and checkpoints on disk, and runs in a folder.

`train` is the loop over arrays in memory.  `marref.training.runs` trains into a folder, from which
a run that was stopped goes on.  Page: docs/training.md.
"""

from marref.training import checkpoints, loop, runs
from marref.training.evaluation import (
    Estimate,
    any_order_bits,
    bits_per_token,
    masked_bits,
    position_log_frequencies,
)
from marref.training.loop import State, StepRecord, train
from marref.training.models import load_model, save_model

__all__ = [
    "Estimate",
    "State",
    "StepRecord",
    "any_order_bits",
    "bits_per_token",
    "checkpoints",
    "load_model",
    "loop",
    "masked_bits",
    "position_log_frequencies",
    "runs",
    "save_model",
    "train",
]
