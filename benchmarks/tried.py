"""Measure what marref does beside what was tried in its place and did not pay.

    python -m benchmarks.tried

Prints, for each, the time as a ratio to marref's, the median of 9 interleaved rounds, with
memory kept and a BLAS of one thread.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import ndtr

import marref
from marref import decoding, memory, normal, optim, parallel, shares, trees
from marref.layers import attention, embedding, gelu
from marref.model import block_forward

ROUNDS = 9
SEED = marref.build(vocab_size=8192, dropout=0.0)
SMALL = marref.build(
    vocab_size=18, embed_dim=64, num_layers=2, num_heads=8, seq_len=64, dropout=0.0
)

Ways = Mapping[str, Callable[[], object]]


def compare(what: str, ways: Ways) -> None:
    """Print the ratio of every way to the first, which is marref's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(ways))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times[1:], seconds[first][1:], strict=True)]
        milliseconds = 1e3 * statistics.median(times[1:])
        print(f"| {what} | {name} | {statistics.median(ratios):.2f} | {milliseconds:.3g} |")


def gelu_slope() -> Ways:
    """GELU of the hidden layer of two sequences, and its gradient."""
    x = np.random.default_rng(0).standard_normal((512, 1024), np.float32)

    def with_value() -> None:
        _, cache = gelu.forward(x, "erf")
        gelu.backward(x, cache, "erf")

    def from_input() -> None:
        gate, _ = normal.distribution_and_density(x)
        x * gate
        density = np.exp(-0.5 * (x * x)) / math.sqrt(2 * math.pi)
        x * (gate + x * density)

    return {"with the value": with_value, "in the backward pass, from the input": from_input}


def gelu_gate() -> Ways:
    """Φ of the hidden layer of two sequences."""
    x = np.random.default_rng(0).standard_normal((512, 1024), np.float32)

    def in_chunks(rows: int) -> None:
        for start in range(0, len(x), rows):
            normal.distribution_and_density(x[start : start + rows])

    return {
        "in passes over the array": lambda: normal.distribution_and_density(x),
        "in passes over 2¹⁴ numbers at a time": lambda: in_chunks(16),
        "in passes over 2¹⁶": lambda: in_chunks(64),
        "scipy.special.ndtr": lambda: ndtr(x),
    }


def attention_scores() -> Ways:
    """Q Kᵀ and softmax of two sequences."""
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, 256, 8, 32), np.float32).swapaxes(1, 2) for _ in range(2))

    def less_maximum() -> None:
        weights = query @ key.mT
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights @ np.ones((256, 1), np.float32)

    return {
        "heads where they lie": lambda: attention._softmax(query @ key.mT),
        "the maximum always subtracted": less_maximum,
        "heads copied side by side": lambda: attention._softmax(query.copy() @ key.copy().mT),
        "queries along the last axis of memory": lambda: attention._softmax((key @ query.mT).mT),
    }


def embedding_gradient() -> Ways:
    """Gradient of the table from two sequences."""
    rng = np.random.default_rng(0)
    params = {"table": np.zeros((8192, 256), np.float32)}
    tokens = np.where(rng.random((2, 256)) < 0.5, 0, rng.integers(8192, size=(2, 256)))
    dx = rng.standard_normal((2, 256, 256), np.float32)

    def add_at() -> None:
        np.add.at(np.zeros_like(params["table"]), tokens, dx)

    def sorted_sums() -> None:
        table = np.zeros_like(params["table"])
        order = np.argsort(tokens, axis=None, kind="stable")
        ids, starts = np.unique(tokens.ravel()[order], return_index=True)
        table[ids] = np.add.reduceat(dx.reshape(-1, 256)[order], starts, axis=0)

    return {
        "sparse product": lambda: embedding.backward(params, dx, tokens),
        "np.add.reduceat after sorting": sorted_sums,
        "np.add.at": add_at,
    }


def adam() -> Ways:
    """Step on the parameters of the seed configuration, in two threads."""
    params = SEED.init(np.random.default_rng(0), np.float32)
    state = optim.init(params)

    def step(piece: int, num_threads: int = 2) -> Callable[[], None]:
        def run() -> None:
            default, trees._PIECE = trees._PIECE, piece
            optim.step(params, params, state, 1e-3, in_place=True, num_threads=num_threads)
            trees._PIECE = default

        return run

    return {
        "pieces of 2¹⁸ numbers": step(2**18),
        "pieces of 2¹⁵": step(2**15),
        "one piece an array": step(2**40),
        "pieces of 2¹⁸, one thread": step(2**18, 1),
    }


def logits_at_once() -> Ways:
    """Decode the seed configuration, batch 1, two threads."""
    params = SEED.init(np.random.default_rng(0), np.float32)

    def decode(count: int, num_threads: int = 2) -> Callable[[], None]:
        def run() -> None:
            default, decoding._LOGITS_AT_ONCE = decoding._LOGITS_AT_ONCE, count
            marref.iterative_decode(SEED, params, num_threads=num_threads)
            decoding._LOGITS_AT_ONCE = default

        return run

    return {
        "2²⁰ logits at once": decode(2**20),
        "2¹⁷ at once": decode(2**17),
        "all at once": decode(2**40),
    }


def training(model: marref.MAR, batch: int, num_threads: int) -> Callable[[], object]:
    """Loss and gradients of a batch."""
    params = model.init(np.random.default_rng(0), np.float32)
    rng = np.random.default_rng(1)
    targets = rng.integers(1, model.vocab_size, (batch, model.seq_len))
    tokens, mask = marref.mask_tokens(targets, 0.5, rng)
    return lambda: marref.loss_and_grads(
        model, params, tokens, targets, mask, num_threads=num_threads
    )


def threads(model: marref.MAR, batch: int) -> Ways:
    """Train in two threads and in one."""
    return {"two threads": training(model, batch, 2), "one thread": training(model, batch, 1)}


def training_shares() -> Ways:
    """Loss and gradients of the seed configuration, batch 8, two threads."""
    step = training(SEED, 8, 2)

    def train(features: int, logits: int = 2**21) -> Callable[[], None]:
        def run() -> None:
            defaults = shares._SHARE, shares._LOGITS_AT_ONCE
            shares._SHARE, shares._LOGITS_AT_ONCE = features, logits
            step()
            shares._SHARE, shares._LOGITS_AT_ONCE = defaults

        return run

    return {
        "4 sequences, 2²¹ logits at once": train(2**18),
        "2 sequences": train(2**17),
        "1 sequence": train(2**16),
        "4 sequences, 2²⁰ logits at once": train(2**18, 2**20),
        "4 sequences, all logits at once": train(2**18, 2**40),
    }


def one_sequence() -> Ways:
    """Decode one sequence with the seed configuration in two threads."""
    params = SEED.init(np.random.default_rng(0), np.float32)

    def positions_of_block(model, block_params, x, rows, run, num_threads):  # type: ignore
        """Share the positions alone: every thread computes the keys and values of all."""
        if rows is ...:
            rows = np.arange(1)[:, np.newaxis], np.arange(x.shape[1])[np.newaxis]
        parts = parallel.split(rows[1].shape[1], num_threads)

        def output(part):  # type: ignore
            return block_forward(model, block_params, x, None, (rows[0], rows[1][:, part]))[0]

        return np.concatenate(run(output, parts), axis=1)

    def decode() -> None:
        marref.iterative_decode(SEED, params, num_threads=2)

    def decode_by_positions() -> None:
        default, shares._shared_block = shares._shared_block, positions_of_block
        decode()
        shares._shared_block = default

    return {
        "heads, then positions": decode,
        "positions, all keys and values in each thread": decode_by_positions,
    }


def switch_interval() -> Ways:
    """Decode the small configuration, batch 16, in two threads."""
    params = SMALL.init(np.random.default_rng(0), np.float32)

    def decode() -> None:
        marref.iterative_decode(SMALL, params, batch_size=16, num_threads=2)

    def decode_with_default() -> None:
        default, parallel._quick_switches = parallel._quick_switches, contextlib.nullcontext
        decode()
        parallel._quick_switches = default

    return {"0.1 ms": decode, "5 ms, Python's": decode_with_default}


def decoding_shares() -> Ways:
    """Decode the small configuration, batch 16, in shares of some sequences."""
    params = SMALL.init(np.random.default_rng(0), np.float32)

    def decode(size: int) -> Callable[[], None]:
        split = parallel.split

        def smaller(length: int, num_shares: int) -> list[slice]:
            return split(length, length // size if length == 16 else num_shares)

        def run() -> None:
            parallel.split = smaller
            marref.iterative_decode(SMALL, params, batch_size=16, num_threads=2)
            parallel.split = split

        return run

    return {"8 sequences": decode(8), "4": decode(4), "2": decode(2), "1": decode(1)}


def main() -> None:
    """Compare everything."""
    memory.keep_freed()
    print("| what | how | time / marref | milliseconds |")
    print("| --- | --- | ---: | ---: |")
    with parallel._controller().limit(limits=1, user_api="blas"):
        compare("slope of GELU", gelu_slope())
        compare("Φ in float32", gelu_gate())
        compare("attention weights", attention_scores())
        compare("embedding gradient", embedding_gradient())
        compare("Adam", adam())
        compare("logits in decoding", logits_at_once())
        compare("a thread's share in training, batch 8", training_shares())
        compare("a thread's share in decoding, small, batch 16", decoding_shares())
        compare("one sequence in two threads", one_sequence())
        compare("switch interval of the interpreter", switch_interval())
        for model in (SMALL, dataclasses.replace(SMALL, embed_dim=32)):
            for batch in (8, 16, 32):
                work = f"training, width {model.embed_dim}, {batch * model.seq_len:,} positions"
                compare(work, threads(model, batch))


if __name__ == "__main__":
    main()
