"""What is measured: the configurations, the contestants, and the cases."""

import dataclasses
import math
import os
from collections.abc import Sequence

NUM_STEPS = 8
LEARNING_RATE = 1e-3
MASK_RATIO = 0.5
MASK_TOKEN = 0

# Of the loop: the mean of the ratios 1 - cos(πu/2) that it draws; its length, which the learning
# rate's schedule and the average follow from; the sequences that it draws from; and the steps that
# contestants are checked by.
LOOP_MASK_RATIO = 1 - 2 / math.pi
LOOP_STEPS = 1000
LOOP_SEQUENCES = 1024
CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    seq_len: int


CONFIGS = {
    "seed": Config(vocab_size=8192, embed_dim=256, num_layers=6, num_heads=8, seq_len=256),
    "small": Config(vocab_size=18, embed_dim=64, num_layers=2, num_heads=8, seq_len=64),
    "tiny": Config(vocab_size=18, embed_dim=16, num_layers=1, num_heads=2, seq_len=16),
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A module of `benchmarks.contestants`, and which of its variants to run."""

    module: str
    variant: str


EAGER = "PyTorch eager"
GATHERED = "PyTorch gathered"
FUSED = "PyTorch gathered, fused Adam"
COMPILED = "torch.compile"
COMPILED_GATHERED = "torch.compile, gathered"
AUTOTUNED = "torch.compile, max-autotune"
JAX = "JAX jit"
MARREF = "marref"
BEST = "marref, best setting"
NUMPY = "NumPy"

CONTESTANTS = {
    EAGER: Contestant("in_torch", "plain"),
    GATHERED: Contestant("in_torch", "gathered"),
    FUSED: Contestant("in_torch", "fused"),
    COMPILED: Contestant("in_torch", "compiled"),
    COMPILED_GATHERED: Contestant("in_torch", "compiled_gathered"),
    AUTOTUNED: Contestant("in_torch", "autotuned"),
    JAX: Contestant("in_jax", "jit"),
    MARREF: Contestant("in_numpy", "default"),
    BEST: Contestant("in_numpy", "best"),
    NUMPY: Contestant("in_numpy", "product"),
}

# In training "torch.compile" is gathered too.
IN_TRAINING = (EAGER, GATHERED, FUSED, COMPILED, AUTOTUNED, JAX, MARREF, BEST)
IN_DECODING = (EAGER, GATHERED, COMPILED, COMPILED_GATHERED, AUTOTUNED, JAX, MARREF, BEST)
IN_LOOP = (EAGER, GATHERED, MARREF)
IN_FLOAT64 = (EAGER, GATHERED, MARREF, BEST)
THREE = (EAGER, MARREF, BEST)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that several contestants do.

    Parameters
    ----------
    section : {"training", "loop", "decoding", "length", "batch", "neighbour", "product"}
        Where the report shows it.
    name : str
    task : {"training", "loop", "decoding", "product"}
        Gradients and Adam; all that a step of a training loop does; a whole decode; or the product
        of two square matrices.
    contestants : sequence of str
    config : str
        A key of `CONFIGS`.
    seq_len : int
        For a product, the side of the matrices.
    batch : int
    dtype : {"float32", "float64"}
    dropout : float
    num_threads : int
        What marref is told to use at its best setting.
    calls : int
        The calls that one measurement is the mean of; several where one is short.
    """

    section: str
    name: str
    task: str
    contestants: Sequence[str]
    config: str
    seq_len: int
    batch: int
    dtype: str = "float32"
    dropout: float = 0.0
    num_threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    calls: int = 1


def all_cases() -> list[Case]:
    """List the cases in the order in which they run."""
    cases = [_product(dtype, 4096) for dtype in ("float32", "float64")]
    for config, batch, dtype in (
        ("seed", 4, "float32"),
        ("seed", 16, "float32"),
        ("small", 64, "float32"),
        ("seed", 4, "float64"),
        ("small", 64, "float64"),
    ):
        cases += [_training(config, batch, dtype, dropout) for dropout in (0.0, 0.1)]
    for config, batch in (("seed", 4), ("seed", 16), ("small", 64)):
        cases += [_loop(config, batch, dropout) for dropout in (0.0, 0.1)]
    for dtype in ("float32", "float64"):
        for config in ("seed", "small"):
            for batch in (1, 16):
                cases.append(_decoding(config, batch, dtype))
    cases += [_growth("length", "seed", length, 4) for length in (64, 128, 256, 512, 1024)]
    cases += [_growth("batch", "seed", 256, batch) for batch in (1, 2, 4, 8, 16, 32)]
    return [*cases, _neighbour("seed", 4)]


def quick_cases() -> list[Case]:
    """List a few cases of a tiny model, which exercise what `all_cases` does.

    Tuning takes long to compile for any model, and is done in decoding alone.
    """
    training = _training("tiny", 2, "float32", 0.1)
    untuned = tuple(name for name in training.contestants if name != AUTOTUNED)
    return [
        _product("float32", 512),
        _product("float64", 512),
        dataclasses.replace(training, contestants=untuned),
        _training("tiny", 2, "float64", 0.0),
        _loop("tiny", 2, 0.1),
        _decoding("tiny", 2, "float32"),
        _decoding("tiny", 2, "float64"),
        _growth("length", "tiny", 8, 2),
        _growth("batch", "tiny", 16, 1),
        _neighbour("tiny", 2),
    ]


def _product(dtype: str, side: int) -> Case:
    name = f"product, {dtype}"
    return Case("product", name, "product", (NUMPY, EAGER), "", side, 1, dtype)


def _training(config: str, batch: int, dtype: str, dropout: float) -> Case:
    return Case(
        section="training",
        name=f"training, {config}, batch {batch}, {dtype}, dropout {dropout:g}",
        task="training",
        contestants=IN_TRAINING if dtype == "float32" else IN_FLOAT64,
        config=config,
        seq_len=CONFIGS[config].seq_len,
        batch=batch,
        dtype=dtype,
        dropout=dropout,
        calls=1 if config == "seed" else 4,
    )


def _loop(config: str, batch: int, dropout: float) -> Case:
    training = _training(config, batch, "float32", dropout)
    name = training.name.replace("training", "loop")
    return dataclasses.replace(
        training, section="loop", name=name, task="loop", contestants=IN_LOOP
    )


def _decoding(config: str, batch: int, dtype: str) -> Case:
    case = Case(
        section="decoding",
        name=f"decoding, {config}, batch {batch}, {dtype}",
        task="decoding",
        contestants=IN_DECODING if dtype == "float32" else IN_FLOAT64,
        config=config,
        seq_len=CONFIGS[config].seq_len,
        batch=batch,
        dtype=dtype,
        calls=1 if config == "seed" else 8,
    )
    # The matrices of a single short sequence are too small to share between threads.
    return dataclasses.replace(case, num_threads=1) if config != "seed" and batch == 1 else case


def _growth(section: str, config: str, length: int, batch: int) -> Case:
    grown = length if section == "length" else batch
    name = f"growth, {section} {grown}"
    return Case(section, name, "training", THREE, config, length, batch)


def _neighbour(config: str, batch: int) -> Case:
    length = CONFIGS[config].seq_len
    return Case("neighbour", "busy neighbour", "training", THREE, config, length, batch)


def needed_flops(case: Case, num_masked: int, reveal_counts: Sequence[int]) -> float:
    """Count the floating-point operations that a case cannot do without.

    A product of matrices [m, k] and [k, n] takes 2·m·n·k of them; nothing else is counted.  The
    head, and the query, output and feed-forward of the last block, are needed at the masked
    positions only, since nothing else reaches the loss or the prediction.  In the first
    step of decoding all sequences are the same, and one is enough.  A backward pass takes twice
    what the forward does.

    Parameters
    ----------
    case : Case
    num_masked : int
        Masked positions of a sequence in training, on average.
    reveal_counts : sequence of int
        What each step of decoding reveals.
    """
    if case.task == "product":
        return 2.0 * case.seq_len**3
    if case.task in ("training", "loop"):
        return 3.0 * _forward_flops(case, num_masked)
    first, *others = (sum(reveal_counts[step:]) for step in range(len(reveal_counts)))
    return _forward_flops(dataclasses.replace(case, batch=1), first) + sum(
        _forward_flops(case, masked) for masked in others
    )


def _forward_flops(case: Case, num_masked: int) -> float:
    config = CONFIGS[case.config]
    features = config.embed_dim
    positions, rows = case.batch * case.seq_len, case.batch * num_masked

    def block(needed: int) -> float:
        """Key and value at every position, everything else at those that are needed."""
        kernels = 2.0 * features**2 * (2 * positions + 2 * needed + 8 * needed)
        return kernels + 4.0 * needed * case.seq_len * features

    head = 2.0 * rows * features * config.vocab_size
    return (config.num_layers - 1) * block(positions) + block(rows) + head
