"""Measure what makes generated digits digits, and what makes them blobs.

    python -m benchmarks.digits [--seed N]

Trains the demo's model, and generates with each of its settings changed in turn: how often a
nearest-neighbour classifier sees the digit that was asked for, and the two-sample statistic against
held-out digits.  Then it changes how the model is trained.
"""

import argparse
import dataclasses
import functools
from typing import Any

import numpy as np

from marref import chance, demo, fast
from marref.demo import quality
from marref.model import MAR
from marref.trees import Array, Tree

NUM_OF_EACH = 30
DECODING: dict[str, dict[str, Any]] = {
    "as the demo": {},
    "no guidance": {"guidance_scale": 1.0},
    "guidance 4": {"guidance_scale": 4.0},
    "no class": {"guidance_scale": 1.0, "labels": None},
    "16 steps": {"num_steps": 16},
    "8 steps": {"num_steps": 8},
    "temperature 0.7": {"temperature": 0.7},
    "most confident first": {"order": "confidence"},
    "the same, noise 4.5": {"order": "confidence", "choice_temperature": 4.5},
    "the same, noise 30": {"order": "confidence", "choice_temperature": 30.0},
    "no class, noise 30, temperature 0.7": {
        "guidance_scale": 1.0,
        "labels": None,
        "order": "confidence",
        "choice_temperature": 30.0,
        "temperature": 0.7,
    },
}
TRAINING: dict[str, dict[str, Any]] = {
    "a fifth of the steps": {"num_steps": demo.DEFAULT.config.num_steps // 5},
    "large mask ratios (cosine)": {"mask_schedule": "cosine"},
    "no average": {"average_decay": 0.0},
}


_digits = functools.cache(demo.digits)


def row(name: str, model: MAR, params: Tree, seed: int, **changed: Any) -> None:
    """Generate and print what comes of it."""
    asked = np.repeat(np.arange(demo.NUM_CLASSES), NUM_OF_EACH)
    options = {
        "num_steps": demo.DEFAULT.decode_steps,
        "temperature": demo.DEFAULT.temperature,
        "guidance_scale": demo.DEFAULT.guidance_scale,
        "order": "random",
        "labels": asked,
        "batch_size": len(asked),
        **changed,
    }
    rng = chance.generator(seed, "sample")
    generated = fast.iterative_decode(model, params, rng=rng, **options)
    print(
        f"| {name} | {judged(generated, asked, options['labels'] is not None, seed)} |", flush=True
    )


def judged(generated: Array, asked: Array, is_asked: bool, seed: int) -> str:
    """Write the columns of a row."""
    (examples, classes), (real, _) = map(demo.rows_and_labels, _digits())
    seen = quality.nearest_neighbour_classes(generated, examples, classes)
    found = quality.two_samples(generated, real, chance.generator(seed, "validation"))
    agreement = f"{(seen == asked).mean():.0%}" if is_asked else ""
    return f"{agreement} | {found.statistic:.4f} ± {found.noise:.4f}"


def trained(seed: int, **changed: Any) -> tuple[MAR, Tree]:
    """Train as the demo does, but for what is changed."""
    train, _ = _digits()
    config = dataclasses.replace(demo.DEFAULT.config, seed=seed, **changed).resolved(train)
    model = config.model(train.vocab_size, demo.NUM_CLASSES)
    return model, demo.train_on(config, model, train, lambda _: None)[0]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    print("| what differs | of the class asked for | MMD² |\n| --- | ---: | ---: |")
    model, params = trained(seed)
    for name, changed in DECODING.items():
        row(name, model, params, seed, **changed)
    examples, classes = demo.rows_and_labels(_digits()[0])
    chosen = chance.generator(seed, "batch").choice(len(examples), 10 * NUM_OF_EACH, replace=False)
    columns = judged(examples[chosen], classes[chosen], False, seed)
    print(f"| real training digits | {columns} |")
    for name, changed in TRAINING.items():
        row(f"trained with {name}", *trained(seed, **changed), seed)


if __name__ == "__main__":
    main()
