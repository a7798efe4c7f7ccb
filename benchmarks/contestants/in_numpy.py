"""marref, without settings and as fast as its settings make it; and NumPy's product."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

import marref
from benchmarks.cases import CONFIGS, LEARNING_RATE, NUM_STEPS, Case

Array = npt.NDArray[np.generic]


def tiny_operation() -> None:
    """Make NumPy load its BLAS."""
    np.ones((8, 8)) @ np.ones((8, 8))


def _build(case: Case, arrays: Mapping[str, Array]) -> tuple[marref.MAR, marref.trees.Tree]:
    config = CONFIGS[case.config]
    model = marref.build(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        seq_len=case.seq_len,
        dropout=case.dropout,
    )
    names = [name for name in arrays if name.startswith("params/")]
    leaves = {name.removeprefix("params/"): arrays[name] for name in names}
    return model, marref.trees.unflatten(leaves)


class Training:
    """Gradients and a step of Adam."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        self.threads: dict[str, int] = {}
        self.in_place: dict[str, bool] = {}
        if variant == "best":
            marref.memory.keep_freed()
            self.threads = {"num_threads": case.num_threads}
            self.in_place = {"in_place": True}
        self.model, self.params = _build(case, arrays)
        self.state = marref.optim.init(self.params)
        self.batch = arrays["tokens"], arrays["targets"], arrays["mask"]
        self.rng = np.random.default_rng(0) if case.dropout else None

    def run(self) -> None:
        """Take one step."""
        _, grads = marref.loss_and_grads(
            self.model, self.params, *self.batch, self.rng, **self.threads
        )
        self.params, self.state = marref.adam_step(
            self.params, grads, self.state, LEARNING_RATE, **self.in_place, **self.threads
        )

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss, and gradients by marref's names."""
        loss, grads = marref.loss_and_grads(self.model, self.params, *self.batch, **self.threads)
        return float(loss), marref.trees.flatten(grads)


class Decoding:
    """Generate from nothing."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        self.threads: dict[str, int] = {}
        if variant == "best":
            marref.memory.keep_freed()
            self.threads = {"num_threads": case.num_threads}
        self.model, self.params = _build(case, arrays)
        self.batch_size = case.batch

    def run(self) -> Array:
        """Decode once."""
        return marref.iterative_decode(
            self.model,
            self.params,
            num_steps=NUM_STEPS,
            batch_size=self.batch_size,
            **self.threads,
        )


class Product:
    """The product of two square matrices."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        rng = np.random.default_rng(0)
        shape = (2, case.seq_len, case.seq_len)
        self.left, self.right = rng.random(shape).astype(case.dtype)

    def run(self) -> None:
        """Multiply once."""
        self.left @ self.right


TASKS = {"training": Training, "decoding": Decoding, "product": Product}
