"""What the schedule says before anything is predicted: blocks, steps and counts.

With a block length B, a sequence is cut into blocks of B positions from its first masked position
on, what lies before it going with the first block, and blocks are filled from left to right.  The
K steps are shared out evenly over the blocks that have something masked, the first ones getting
one more where K does not divide; within a block the schedule is asked.  Without one, all is one
block.  LLaDA (Nie et al. 2025, arXiv 2502.09992), which asks that all divides.
"""

import functools
from typing import NamedTuple

import numpy as np

from marref.decoding.rule import Rule
from marref.schedules import SCHEDULES, Schedule
from marref.trees import Array


class Plan(NamedTuple):
    """How many tokens each sequence is to reveal in each step."""

    counts: Array
    """int64 [batch, steps + 1]; zeros after the last step of a sequence."""
    num_rounds: Array
    """int64 [batch]; the steps of each sequence."""
    block: Array
    """int64 [batch, length]; the block of each position."""
    first: Array
    """int64 [batch, blocks]; the first step of each block, as planned."""

    def look(self, masked: Array, planned: Array) -> tuple[Array, Array, Array]:
        """Find the present block of each sequence, the first that has something masked.

        Parameters
        ----------
        masked : bool array [batch, length]
        planned : int64 array [batch]
            How many steps of the plan are behind each sequence.

        Returns
        -------
        masked : bool array [batch, length]
            Where the present block has something masked.
        index : int64 array [batch]
            The step of the plan that comes next: what is left of a block that is done is skipped.
        quota : int64 array [batch]
            What it reveals.
        """
        rows, last = np.arange(len(masked)), self.first.shape[1] - 1
        present = np.where(masked, self.block, last).min(axis=1)
        index = np.maximum(planned, self.first[rows, present])
        quota = self.counts[rows, np.minimum(index, self.counts.shape[1] - 1)]
        return masked & (self.block == present[:, np.newaxis]), index, quota


def make(rule: Rule, masked: Array) -> Plan:
    """Share out the steps, and ask the schedule, if the rule does.

    Raises
    ------
    ValueError
        There are fewer steps than blocks, or the schedule's counts are not as `iterative_decode`
        says.
    """
    block = blocks(rule.block_length, masked)
    shape = len(masked), int(block.max(initial=0)) + 1
    if not rule.asks_schedule:
        zeros = np.zeros(shape, np.int64)
        return Plan(zeros, zeros[:, 0], block, zeros)
    in_block = (block == np.arange(shape[1])[:, np.newaxis, np.newaxis]) & masked
    ask = functools.cache(functools.partial(_ask, rule))
    asked = [reveal_counts(rule, of_blocks, ask) for of_blocks in in_block.sum(axis=2).T]
    lengths = np.array([[len(counts) for counts in of_blocks] for of_blocks in asked])
    num_rounds = lengths.sum(axis=1)
    counts = np.zeros((len(masked), num_rounds.max() + 1), np.int64)
    for padded, of_blocks in zip(counts, asked, strict=True):
        joined = np.concatenate(of_blocks)
        padded[: len(joined)] = joined
    return Plan(counts, num_rounds, block, np.cumsum(lengths, axis=1) - lengths)


def blocks(block_length: int | None, masked: Array) -> Array:
    """Say in which block each position is: int64 [batch, length]."""
    if block_length is None:
        return np.zeros(masked.shape, np.int64)
    start = masked.argmax(axis=1)
    place = np.arange(masked.shape[1]) - start[:, np.newaxis]
    number: Array = np.maximum(place, 0) // block_length
    return number


def reveal_counts(rule: Rule, num_masked: Array, ask: Schedule) -> list[Array]:
    """Ask how many tokens each block of a sequence reveals in each of its steps.

    Parameters
    ----------
    rule : Rule
    num_masked : integer array [blocks]
    ask : callable
        The schedule.

    Returns
    -------
    list of int64 arrays
    """
    to_fill = np.flatnonzero(num_masked)
    if rule.num_steps < len(to_fill):
        raise ValueError(
            f"num_steps: received {rule.num_steps}, expected at least one for each of the "
            f"{len(to_fill)} blocks of block_length {rule.block_length}"
        )
    counts = [np.zeros(0, np.int64)] * len(num_masked)
    for number, index in enumerate(to_fill):
        steps = rule.num_steps // len(to_fill) + (number < rule.num_steps % len(to_fill))
        counts[index] = ask(int(num_masked[index]), steps)
    return counts


def _ask(rule: Rule, num_masked: int, num_steps: int) -> Array:
    schedule = rule.schedule if callable(rule.schedule) else SCHEDULES[rule.schedule]
    counts = np.asarray(schedule(num_masked, num_steps))
    check_counts(counts, num_masked, num_steps)
    return counts


def check_counts(counts: Array, num_masked: int, num_steps: int) -> None:
    """Raise unless every step reveals something, and all is revealed in time."""
    integers = counts.ndim == 1 and counts.dtype.kind in "iu" and len(counts) <= num_steps
    if not integers or (counts < 1).any() or counts.sum() != num_masked:
        raise ValueError(
            f"schedule: returned {counts!r} for {num_masked} masked positions, "
            f"expected at most {num_steps} integers >= 1 with the sum {num_masked}"
        )
