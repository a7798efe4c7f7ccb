"""Measure what marref does beside what was tried in its place and did not pay.

    python -m benchmarks.tried

Prints, for each, the time as a ratio to marref's, the median of 9 interleaved rounds, with
memory kept and a BLAS of one thread.  The last groups are what the number of threads that marref
chooses is derived from; see docs/performance.md.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
from scipy.sparse import csr_array
from scipy.special import ndtr

import marref
from marref.fast import gelu, kernels, memory, parallel, pieces, training
from marref.layers import attention, embedding

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


def with_setting(module: ModuleType, name: str, value: object, run: Callable[[], object]) -> None:
    """Run something while a module has another value."""
    default = getattr(module, name)
    setattr(module, name, value)
    run()
    setattr(module, name, default)


def activation() -> Ways:
    """GELU and its slope for the hidden layer of two sequences, in float32."""
    x = np.random.default_rng(0).standard_normal((512, 1024), np.float32)

    def run() -> None:
        gelu.value_and_slope(x.copy(), "erf")

    def from_scipy() -> None:
        gate = ndtr(x)
        density = np.exp(-0.5 * x * x) / np.float32(np.sqrt(2 * np.pi))
        x * gate, gate + x * density

    return {
        "a polynomial, 2¹⁵ numbers at a time": run,
        "2¹³ numbers at a time": lambda: with_setting(gelu, "_CHUNK", 2**13, run),
        "2¹⁷ numbers at a time": lambda: with_setting(gelu, "_CHUNK", 2**17, run),
        "all at once": lambda: with_setting(gelu, "_CHUNK", 2**40, run),
        "scipy.special.ndtr": from_scipy,
    }


def attention_core() -> Ways:
    """Attention of two sequences, forward and backward."""
    rng = np.random.default_rng(0)
    shape = (2, 256, 8, 32)
    query, key, value, dcontext = (
        rng.standard_normal(shape, np.float32).swapaxes(1, 2) for _ in range(4)
    )
    context, out = np.empty_like(query), tuple(np.empty_like(query) for _ in range(3))

    def fast() -> None:
        attended = kernels.attend(query, key, value, context, keep=True)
        kernels.attend_backward(dcontext.copy(), attended, context, out)

    def copied() -> None:
        heads = query.copy(), key.copy(), value.copy()
        attended = kernels.attend(*heads, context, keep=True)
        kernels.attend_backward(dcontext.copy(), attended, context, out)

    def definition() -> None:
        _, cache = attention.attend(query, key, value)
        attention.attend_backward(dcontext, cache)

    return {
        "no maximum, no division of weights, tiles of 2¹⁸": fast,
        "all weights at once": lambda: with_setting(kernels, "_TILE", 2**40, fast),
        "heads copied side by side": copied,
        "the definition": definition,
    }


def embedding_gradient() -> Ways:
    """Gradient of the table from two sequences."""
    rng = np.random.default_rng(0)
    params = {"table": np.zeros((8192, 256), np.float32)}
    tokens = np.where(rng.random((2, 256)) < 0.5, 0, rng.integers(8192, size=(2, 256)))
    dx = rng.standard_normal((2, 256, 256), np.float32)

    def sparse_product() -> None:
        ids, rows = tokens.ravel(), np.arange(tokens.size + 1)
        one_hot = csr_array((np.ones(tokens.size, dx.dtype), ids, rows), (tokens.size, 8192))
        one_hot.T @ dx.reshape(tokens.size, -1)

    return {
        "np.add.reduceat after sorting": lambda: training._table_gradient(
            params["table"], tokens, dx
        ),
        "sparse product": sparse_product,
        "np.add.at, the definition": lambda: embedding.backward(params, dx, {"tokens": tokens}),
    }


def adam() -> Ways:
    """Step on the parameters of the seed configuration, in two threads."""
    params = SEED.init(np.random.default_rng(0), np.float32)
    state = marref.optim.init(params)

    def step(num_threads: int = 2, in_place: bool = True) -> None:
        options = {"num_threads": num_threads, "in_place": in_place}
        marref.adam_step(params, params, state, 1e-3, **options)

    return {
        "pieces of 2¹⁸ numbers": step,
        "pieces of 2¹⁵": lambda: with_setting(pieces, "_PIECE", 2**15, step),
        "one piece an array": lambda: with_setting(pieces, "_PIECE", 2**40, step),
        "new arrays": lambda: step(in_place=False),
        "the definition": lambda: marref.optim.step(params, params, state, 1e-3),
    }


def decoding(model: marref.MAR, batch: int, num_threads: int) -> Callable[[], object]:
    """Generate a batch."""
    params = model.init(np.random.default_rng(0), np.float32)
    return lambda: marref.iterative_decode(model, params, batch_size=batch, num_threads=num_threads)


def logits_at_once() -> Ways:
    """Decode the seed configuration, batch 1, two threads."""
    run = decoding(SEED, 1, 2)
    return {
        "2²¹ logits at once": run,
        "2¹⁷ at once": lambda: with_setting(kernels, "LOGITS_AT_ONCE", 2**17, run),
        "all at once": lambda: with_setting(kernels, "LOGITS_AT_ONCE", 2**40, run),
    }


def one_sequence() -> Ways:
    """Decode one sequence with the seed configuration."""
    alone = decoding(SEED, 1, 1)

    def threaded_blas() -> None:
        # Without threadpoolctl nothing holds the BLAS to one thread.
        with parallel._blas_limit(2):
            with_setting(parallel, "threadpoolctl", None, alone)

    return {
        "two threads, which share the positions": decoding(SEED, 1, 2),
        "one thread over a BLAS of two": threaded_blas,
        "one thread": alone,
    }


def train(model: marref.MAR, batch: int, num_threads: int) -> Callable[[], object]:
    """Loss and gradients of a batch."""
    params = model.init(np.random.default_rng(0), np.float32)
    rng = np.random.default_rng(1)
    targets = rng.integers(1, model.vocab_size, (batch, model.seq_len))
    tokens, mask = marref.mask_tokens(targets, 0.5, rng)
    return lambda: marref.loss_and_grads(
        model, params, tokens, targets, mask, num_threads=num_threads
    )


def training_slices() -> Ways:
    """Loss and gradients of the seed configuration, batch 8, two threads."""
    run = train(SEED, 8, 2)

    def sequences(features: int) -> Callable[[], None]:
        return lambda: with_setting(training, "_FEATURES_AT_ONCE", features, run)

    def logits(count: int) -> Callable[[], None]:
        return lambda: with_setting(kernels, "LOGITS_AT_ONCE", count, run)

    return {
        "4 sequences, 2²¹ logits at once": run,
        "2 sequences": sequences(2**17),
        "1 sequence": sequences(2**16),
        "2²⁰ logits at once": logits(2**20),
        "all logits at once": logits(2**40),
    }


def switch_interval() -> Ways:
    """Decode the small configuration, batch 16, in two threads."""
    run = decoding(SMALL, 16, 2)
    return {
        "0.1 ms": run,
        "5 ms, Python's": lambda: with_setting(
            parallel, "_switches", parallel._Shared(contextlib.nullcontext), run
        ),
    }


def number_of_threads() -> None:
    """Compare two threads with one, for work of several sizes."""
    for width in (32, 64, 128, 256):
        model = dataclasses.replace(SMALL, embed_dim=width)
        for exponent in (13, 14, 15, 16, 17):
            batch = 2**exponent // (width * model.seq_len)
            for what, run in (("training", train), ("decoding", decoding)):
                if batch:
                    ways = {"one thread": run(model, batch, 1), "two": run(model, batch, 2)}
                    compare(f"{what}, width {width}, 2^{exponent} features", ways)
    for exponent in (17, 18, 19, 20):
        params = {"leaf": np.ones(2**exponent, np.float32)}
        state = marref.optim.init(params)
        step = functools.partial(marref.adam_step, params, params, state, 1e-3)
        ways = {
            "one thread": functools.partial(step, num_threads=1),
            "two": functools.partial(step, num_threads=2),
        }
        compare(f"Adam, 2^{exponent} parameters", ways)


def main() -> None:
    """Compare everything."""
    memory.keep_freed()
    print("| what | how | time / marref | milliseconds |")
    print("| --- | --- | ---: | ---: |")
    with parallel._blas_limit(1):
        compare("GELU and its slope", activation())
        compare("attention, forward and backward", attention_core())
        compare("embedding gradient", embedding_gradient())
        compare("Adam", adam())
        compare("logits in decoding", logits_at_once())
        compare("a thread's slice in training, batch 8", training_slices())
        compare("one sequence, decoding", one_sequence())
        compare("switch interval of the interpreter", switch_interval())
        number_of_threads()


if __name__ == "__main__":
    main()
