"""``marref evaluate``: how many bits a run's model needs for tokens that it never saw."""

import argparse
import functools
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from marref import chance, data, fast, training
from marref.cli import arguments
from marref.training import pool, runs
from marref.training.checkpoints import discrete
from marref.training.evaluation import Predict
from marref.trees import Array

_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_EXAMPLES = arguments.examples(
    "marref evaluate run", "marref evaluate run another-book.txt --num 1000"
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run on held-out data",
        description="Measure the best checkpoint of a run: bits per masked token by mask ratio, "
        "and the any-order bound on the likelihood.",
        epilog=_EXAMPLES,
    )
    evaluate.add_argument("run_folder", metavar="RUN", type=Path, help="the folder of marref train")
    evaluate.add_argument("data", nargs="*", help="default: what the run set aside of its data")
    evaluate.add_argument(
        "--num", type=arguments.positive, default=256, help="sequences at most, default: 256"
    )
    arguments.add_processes(evaluate)
    evaluate.add_argument("--seed", type=arguments.not_negative, default=0, help="default: 0")
    evaluate.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    with pool.workers(parsed.processes) as (is_first, executor):
        if is_first:
            _evaluate(parsed, executor)
    return 0


def _evaluate(parsed: argparse.Namespace, executor: Executor | None) -> None:
    checkpoint = runs.best(parsed.run_folder)
    config, model = discrete(checkpoint, "evaluate")
    tokens, labels = _sequences(parsed, config)
    what = "given" if parsed.data else "held-out"
    has_classes = model.num_classes is not None
    told = ", told no class" if has_classes and labels is None else ""
    print(
        f"{len(tokens):,} {what} sequences of {tokens.shape[1]} tokens{told}, checkpoint of step "
        f"{checkpoint.step:,}\n\n  mask ratio    bits per masked token    standard error"
    )
    predict = functools.partial(
        fast.logits, model, checkpoint.state.averaged, num_threads=config.num_threads
    )
    measure = functools.partial(
        _measured, predict, tokens, parsed.seed, {"batch_size": config.batch_size, "labels": labels}
    )
    found = pool.in_order(measure, range(len(_RATIOS) + 1), executor)
    for ratio, (bits, error) in zip(_RATIOS, found, strict=False):
        print(f"  {ratio:>10.0%}    {bits:21.3f}    {error:14.3f}", flush=True)
    bits, error = next(found)
    print(f"\nany-order bound: at most {bits:.3f} bits per token, standard error {error:.3f}")


def _measured(
    predict: Predict, tokens: Array, seed: int, options: dict[str, Any], index: int
) -> training.Estimate:
    """Measure at one of the mask ratios or, behind them, the any-order bound."""
    rng = chance.generator(seed, "validation", index)
    if index < len(_RATIOS):
        return training.masked_bits(predict, tokens, _RATIOS[index], rng, **options)
    return training.any_order_bits(predict, tokens, rng, **options)


def _sequences(parsed: argparse.Namespace, config: runs.Config) -> tuple[Array, Array | None]:
    """Read sequences that do not overlap, evenly spread over the data, and their labels."""
    dataset: data.Dataset = runs.read_dataset(parsed.run_folder, parsed.data)
    if not parsed.data:
        if not config.validation_fraction:
            raise ValueError("data: received none, and the run has set none aside")
        _, dataset = dataset.split(config.validation_fraction, config.seed)
    apart = len(dataset)
    if dataset.is_stream:
        apart = dataset.tokens.size // dataset.length
    index = runs.spread_index(dataset, min(apart, parsed.num))
    return dataset.rows(index), dataset.labels_at(index)
