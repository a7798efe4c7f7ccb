"""The exercises, by name, in the order of the pages."""

from marref import checks
from marref.teach.exercise import Exercise
from marref.teach.exercises import (
    attention,
    block,
    continuous,
    decoding,
    embedding,
    gelu,
    layer_norm,
    linear,
    model,
    training,
)

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        linear.LINEAR,
        layer_norm.LAYER_NORM,
        layer_norm.LAYER_NORM_BACKWARD,
        gelu.GELU,
        attention.SOFTMAX,
        attention.ATTENTION,
        attention.HEADS,
        embedding.EMBEDDING,
        embedding.POSITIONS,
        block.DROPOUT,
        block.BLOCK,
        model.MODEL,
        training.LOSS,
        training.ADAM,
        training.MASK_RATIO,
        decoding.REVEAL_COUNTS,
        decoding.DECODING_STEP,
        training.BOUND,
        continuous.DIFFUSION_LOSS,
    )
}


def by_name(name: str) -> Exercise:
    """Give an exercise, or raise ValueError with the nearest names."""
    if name not in EXERCISES:
        raise ValueError(f"exercise {checks.unknown_name(name, EXERCISES)}")
    return EXERCISES[name]
