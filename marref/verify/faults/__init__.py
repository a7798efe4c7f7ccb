"""The fault catalogue: known ways to get MAR wrong, and other conventions, each with a name.

`applied` takes several faults at once.  The reference itself knows nothing of them: they replace
its functions from outside.

Examples
--------
>>> import dataclasses
>>> from marref.verify import golden
>>> from marref.verify.faults import CATALOGUE
>>> model = golden.PRESETS["tiny"]
>>> params, batch = golden.draw(model, seed=0)
>>> right = model(params, batch["tokens"])
>>> with CATALOGUE["gelu-tanh"].applied():
...     wrong = model(params, batch["tokens"])
>>> float(abs(wrong - right).max()) > 1e-5
True
>>> tanh = dataclasses.replace(model, gelu="tanh")
>>> bool((wrong == tanh(params, batch["tokens"])).all())
True
"""

from typing import Any

from marref.continuous.model import ContinuousMAR
from marref.verify.faults import (
    attention,
    block,
    classes,
    continuous,
    decoding,
    embedding,
    feed_forward,
    gradients,
    layer_norm,
    loss,
    optimiser,
    samplers,
)
from marref.verify.faults.fault import Fault, applied, compatible

__all__ = ["CATALOGUE", "OF_CLASSES", "STAGES", "Fault", "applied", "compatible", "of_model"]

STAGES: dict[str, tuple[Fault, ...]] = {
    "embedding and head": tuple(embedding.fault),
    "classes": tuple(classes.fault),
    "layer norm": tuple(layer_norm.fault),
    "linear layers": tuple(feed_forward.linear_fault),
    "attention": tuple(attention.fault),
    "feed-forward": tuple(feed_forward.fault),
    "block": tuple(block.fault),
    "loss": tuple(loss.fault),
    "gradients": tuple(gradients.fault),
    "optimiser": tuple(optimiser.fault),
    "decoding": tuple(decoding.fault),
    "guidance": tuple(classes.guidance_fault),
    "samplers": tuple(samplers.fault),
    "masking": tuple(decoding.mask_fault),
}
"""The faults by stage, in the order of the pipeline."""

OF_CLASSES = frozenset((*classes.fault, *classes.guidance_fault))
"""The faults that models without classes cannot have."""

CATALOGUE: dict[str, Fault] = {fault.name: fault for faults in STAGES.values() for fault in faults}
"""Every fault by its name, in the order of the pipeline."""


def of_model(model: Any) -> list[Fault]:
    """List the faults that a model, of either kind, can have, in the order of the pipeline."""
    if isinstance(model, ContinuousMAR):
        return [*continuous.CATALOGUE.values(), *_shared()]
    has_classes = model.num_classes is not None
    return [fault for fault in CATALOGUE.values() if has_classes or fault not in OF_CLASSES]


def _shared() -> list[Fault]:
    """List the faults of discrete MAR that lie in functions of both models alone."""
    return [
        fault
        for fault in CATALOGUE.values()
        if {patch.seam.function for patch in fault.patches} <= continuous.SHARED
    ]
