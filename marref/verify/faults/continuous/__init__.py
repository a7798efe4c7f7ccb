"""The fault catalogue of continuous MAR, beside that of `marref.verify.faults`.

Examples
--------
>>> from marref.verify import golden_continuous
>>> from marref.verify.faults import continuous
>>> model = golden_continuous.TINY
>>> params, batch = golden_continuous.draw(model, seed=0)
>>> stages = golden_continuous.stages(model, params, batch)
>>> right = stages["loss"]()["loss/rows/bound"]
>>> with continuous.CATALOGUE["bound-in-nats"].applied():
...     wrong = golden_continuous.stages(model, params, batch)["loss"]()["loss/rows/bound"]
>>> bool(abs(wrong / right - 0.6931).max() < 1e-4)
True
"""

from marref import optim, schedules
from marref.layers import gelu, layer_norm, linear
from marref.verify.faults.continuous import diffusion, network, sampling, tokens
from marref.verify.faults.fault import Fault

STAGES: dict[str, tuple[Fault, ...]] = {
    "tokens": tuple(tokens.fault),
    "masks": tuple(tokens.mask_fault),
    "encoder and decoder": tuple(tokens.transformer_fault),
    "diffusion network": tuple(network.fault),
    "noise schedule": tuple(diffusion.fault),
    "diffusion loss": tuple(diffusion.loss_fault),
    "weight decay": tuple(sampling.decay_fault),
    "sampling": tuple(sampling.fault),
}
"""The faults by stage, in the order of the pipeline."""

CATALOGUE: dict[str, Fault] = {fault.name: fault for faults in STAGES.values() for fault in faults}
"""Every fault by its name, in the order of the pipeline."""

SHARED = frozenset(
    (
        gelu.gate,
        layer_norm.forward,
        layer_norm.backward,
        linear.forward,
        linear.backward,
        optim.update,
        optim.clip_by_global_norm,
        schedules.cosine,
    )
)
"""Functions that both models have: what is wrong in them can be wrong in either."""
