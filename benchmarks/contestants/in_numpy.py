"""marref, without settings and as fast as its settings make it; and NumPy's product."""

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

import marref
from benchmarks.cases import CONFIGS, LEARNING_RATE, NUM_STEPS, Case
from marref import data
from marref.training import loop
from marref.training.runs import Config

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


class Loop:
    """A step of a run: `marref.training.runs` adds to it a line of history, and checkpoints."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        self.model, params = _build(case, arrays)
        self.config = Config.from_dict(json.loads(str(arrays["options"])))
        codec = data.Ids(CONFIGS[case.config].vocab_size - 1)
        self.dataset = data.Dataset(arrays["ids"], codec, length=case.seq_len)
        average = marref.trees.map_leaves(np.copy, params)
        self.state = loop.State(params, marref.optim.init(params), average)
        self.batch = arrays["tokens"], arrays["targets"], arrays["mask"]
        self.number = 0

    def run(self) -> None:
        """Take one step."""
        self.given_step(self.number)

    def given_step(self, number: int) -> None:
        """Take the step of a number, which says what it draws."""
        self.state, _ = loop.step(self.config, self.model, self.dataset, self.state, number)
        self.number = number + 1

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss, and gradients by marref's names."""
        loss, grads = marref.loss_and_grads(self.model, self.state.params, *self.batch)
        return float(loss), marref.trees.flatten(grads)

    def losses(self) -> list[float]:
        """Loss of the parameters, and of their average."""
        pair = self.state.params, self.state.average
        return [float(marref.loss_and_grads(self.model, tree, *self.batch)[0]) for tree in pair]


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


TASKS = {"training": Training, "loop": Loop, "decoding": Decoding, "product": Product}
