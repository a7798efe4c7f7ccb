"""Compare the variants of the continuous model, and what its sampler can be told, on the digits.

    python -m benchmarks.paper [--steps N] [--folds N] [--seed N] [--processes N]
    python -m benchmarks.paper --plot OUT.png

Every digit is held out once: each fold trains every variant on the others, generates 400 digits of
the classes of held-out ones, and compares them with all that are held out.  The first row compares
400 digits that the fold trains on in their place: what cannot be told from that, this cannot tell
apart.

    class      how many a small classifier sees as what was asked for
    MMD²       the unbiased estimate of `marref.demo.quality.two_samples`, in thousandths, of the
               pixels and of the classifier's hidden features
    Fréchet    |μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) of the features (Dowson and Landau 1982)

all of them means over the folds, ± half of what the folds differ by.  ``--plot`` draws the standard
deviation of tokens along the chain of the published sampler, and of three cures.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from sklearn.neural_network import MLPClassifier

from benchmarks import pictures
from marref import chance, continuous, data, optim, trees
from marref.continuous import tokens, variants
from marref.continuous.pixels import Scale
from marref.continuous.variants import CausalMAR, CrossEntropy, Diffusion, SquaredError, Variant
from marref.data import Dataset
from marref.demo import quality
from marref.fast import memory
from marref.fast.optim import run_step
from marref.training import pool
from marref.trees import Array, Tree

STEPS, BATCH, PEAK, NUM_CODES, GENERATED = 1000, 64, 2e-3, 256, 400
SIZES = continuous.CONFIGURATIONS["digits"]
DIFFUSION = Diffusion(4, copies=2, num_steps=25)
MASKED, CAUSAL = continuous.build(**SIZES), CausalMAR(**SIZES)


class Fold(NamedTuple):
    """What a fold trains on, and what it holds out: images scaled, labels, levels."""

    train: Array
    train_labels: Array
    train_levels: Array
    labels: Array
    levels: Array


def folds_of(whole: Dataset, scale: Scale, count: int, seed: int) -> Iterator[Fold]:
    """Deal the digits out."""
    assert whole.labels is not None
    order = np.random.default_rng(seed).permutation(len(whole))
    for fold in range(count):
        held_out = order[fold::count]
        train = np.setdiff1d(order, held_out)
        rows = whole.rows(train)
        yield Fold(
            scale.to_images(rows),
            whole.labels[train],
            rows - 1,
            whole.labels[held_out],
            whole.rows(held_out) - 1,
        )


def fit(variant: Variant, fold: Fold, num_steps: int, seed: int) -> Tree:
    """Train, and return the average of the parameters."""
    rng = np.random.default_rng(seed)
    params = variant.init(rng, np.float32)
    average, state = trees.map_leaves(np.copy, params), optim.init(params)
    for number in range(num_steps):
        chosen = rng.integers(len(fold.train), size=BATCH)
        draws = variant.draw(rng, BATCH, "cosine")
        _, grads = variant.loss_and_grads(
            params, fold.train[chosen], fold.train_labels[chosen], draws
        )
        rate = optim.warmup_cosine(
            number, peak=PEAK, warmup_steps=num_steps // 20, total_steps=num_steps
        )
        state, _ = run_step(
            params,
            grads,
            state,
            average,
            rate,
            beta2=0.95,
            max_norm=3.0,
            weight_decay=0.02,
            decay="matrices",
            average_decay=min(0.9999, (number + 1) / (number + 10)),
        )
    return average


class Judge:
    """A small classifier, trained on what a fold trains on, and what a fold holds out."""

    def __init__(self, fold: Fold, seed: int) -> None:
        self.fold = fold
        self.net = MLPClassifier((32,), max_iter=2000, random_state=seed)
        self.net.fit(fold.train_levels / 16, fold.train_labels)

    def features(self, levels: Array) -> Array:
        """Compute the hidden layer."""
        hidden = levels / 16 @ self.net.coefs_[0] + self.net.intercepts_[0]
        return np.maximum(hidden, 0.0)

    def measure(self, levels: Array, seed: int) -> Array:
        """Compare digits with those that are held out: the columns of the table."""
        right = (self.net.predict(levels / 16) == self.fold.labels[:GENERATED]).mean()
        mmd = [
            1e3 * quality.two_samples(x, y, np.random.default_rng(seed)).statistic
            for x, y in (
                (levels, self.fold.levels),
                (self.features(levels), self.features(self.fold.levels)),
            )
        ]
        apart = frechet(self.features(levels), self.features(self.fold.levels))
        return np.array([100 * right, *mmd, apart])


def frechet(x: Array, y: Array) -> float:
    """Compute the Fréchet distance of two normal distributions with the moments of samples."""
    means, covariances = zip(*((a.mean(axis=0), np.cov(a.T)) for a in (x, y)), strict=True)
    # The eigenvalues of a product of covariances are real and none is below 0, but for rounding.
    eigenvalues = scipy.linalg.eigvals(covariances[0] @ covariances[1]).real
    root = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    squared = ((means[0] - means[1]) ** 2).sum()
    return float(squared + np.trace(covariances[0] + covariances[1]) - 2.0 * root)


def trained_variants(scale: Scale, fold: Fold, seed: int) -> dict[str, Variant]:
    """List what is trained."""
    patches = tokens.from_images(fold.train, MASKED.patch_size).reshape(-1, MASKED.token_dim)
    codes = variants.codebook(patches, NUM_CODES, np.random.default_rng(seed))
    return {
        "masked": Variant(MASKED, DIFFUSION),
        "causal, raster order": Variant(CAUSAL, DIFFUSION, "raster"),
        "causal, random order": Variant(CAUSAL, DIFFUSION),
        f"cross-entropy, {NUM_CODES} codes": Variant(MASKED, CrossEntropy(codes)),
        "squared error": Variant(MASKED, SquaredError(4)),
    }


def settings(name: str) -> dict[str, tuple[dict[str, Any], int | None]]:
    """List the settings of the sampler for a variant: changes of its head, and the steps."""
    if name == "masked":
        counts = {f"masked, {k} steps": ({}, k) for k in (16, 8, 4, 2, 1)}
        chains = {f"{k} diffusion steps": ({"num_steps": k}, 4) for k in (5, 100)}
        cold = {f"temperature {t}": ({"temperature": t}, 4) for t in (0.8, 0.9)}
        return {**counts, **chains, **cold}
    if name.startswith("causal"):
        return {name: ({}, None)}
    return {f"{name}, {k} steps": ({}, k) for k in (16, 4)}


def study(fold: Fold, scale: Scale, num_steps: int, seed: int) -> dict[str, Array]:
    """Train and measure on a fold: a row of the table for each setting."""
    memory.keep_by_default()
    judge = Judge(fold, seed)
    rows = {"real": judge.measure(fold.train_levels[_of_classes(fold, seed)], seed)}
    asked = fold.labels[:GENERATED]
    for name, variant in trained_variants(scale, fold, seed).items():
        params = fit(variant, fold, num_steps, seed)
        for setting, (changes, steps) in settings(name).items():
            head = dataclasses.replace(variant.head, **changes)  # type: ignore[type-var]
            changed = dataclasses.replace(variant, head=head)
            rng = chance.generator(seed, "sample")
            images = changed.sample(params, asked, rng, num_steps=steps)
            rows[setting] = judge.measure(scale.to_tokens(images) - 1, seed)
    return rows


def _of_classes(fold: Fold, seed: int) -> Array:
    """Choose digits to train on that are of the classes that are generated, one for each."""
    rng = np.random.default_rng(seed)
    asked = fold.labels[:GENERATED]
    chosen = np.empty(len(asked), np.int64)
    for label in np.unique(asked):
        places = np.flatnonzero(asked == label)
        pool = rng.permutation(np.flatnonzero(fold.train_labels == label))
        chosen[places] = np.resize(pool, len(places))
    return chosen


def plot(path: Path, num_steps: int, seed: int) -> None:
    """Draw the standard deviation of tokens along the chain, for four samplers."""
    from matplotlib.figure import Figure

    whole = data.load("digits")
    scale = Scale.of(whole)
    fold = next(folds_of(whole, scale, 2, seed))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for schedule, samplers in (
        (
            "cosine",
            {
                "published: 100 steps": (100, None),
                "clip 3": (100, 3.0),
                "all 1,000 steps": (1000, None),
            },
        ),
        ("linear", {"linear schedule": (100, None)}),
    ):
        head = dataclasses.replace(DIFFUSION, schedule=schedule)
        params = fit(Variant(MASKED, head), fold, num_steps, seed)
        for name, (count, clip) in samplers.items():
            sampler = dataclasses.replace(head, num_steps=count, clip=clip)
            deviations = deviations_of(sampler, params, fold.labels)
            taken = np.arange(1, count + 1) / count
            axes.plot(taken, deviations, label=f"{name} ({deviations[-1]:.3g} at the end)")
    axes.set(xlabel="share of the chain", ylabel="standard deviation of tokens", yscale="log")
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=110)


def deviations_of(head: Diffusion, params: Tree, labels: Array) -> list[float]:
    """Generate all tokens at once, and note the standard deviation after each diffusion step."""
    nothing = np.zeros((len(labels), MASKED.length, MASKED.token_dim), np.float32)
    z, _ = MASKED.forward(params, nothing, labels, np.ones(nothing.shape[:2], np.bool_))
    conditions = z.reshape(-1, MASKED.decoder_dim)
    after = head.chain(params["head"], conditions, np.random.default_rng(0))
    return [float(x.std()) for x in after]


def report(folds: list[dict[str, Array]]) -> None:
    """Print a row for each setting: means, and half of what the folds differ by."""
    columns = ("class", "MMD² of pixels", "MMD² of features", "Fréchet")
    print(f"| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name in folds[0]:
        of_folds = [rows[name] for rows in folds]
        means = np.mean(of_folds, axis=0)
        halves = np.ptp(of_folds, axis=0) / 2
        cells = [
            f"{mean:.{digits}f} ± {half:.{digits}f}"
            for mean, half, digits in zip(means, halves, (1, 2, 2, 2), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print, or draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, help="each takes folds; see docs/scaling.md")
    parser.add_argument("--plot", type=Path, metavar="OUT.png")
    parsed = parser.parse_args()
    if parsed.plot:
        plot(parsed.plot, parsed.steps, parsed.seed)
        pictures.stamp(parsed.plot, pictures.command_of("python -m benchmarks.paper"))
        return
    whole = data.load("digits")
    scale = Scale.of(whole)
    folds = folds_of(whole, scale, parsed.folds, parsed.seed)
    of_fold = functools.partial(study, scale=scale, num_steps=parsed.steps, seed=parsed.seed)
    with pool.workers(parsed.processes) as (is_first, executor):
        if is_first:
            report(list(pool.in_order(of_fold, folds, executor)))


if __name__ == "__main__":
    main()
