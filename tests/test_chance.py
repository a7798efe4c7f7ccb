import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marref import chance

NAMES = st.tuples(
    st.integers(0, 2**128 - 1) | st.integers(0, 3),
    st.sampled_from(chance.PURPOSES),
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=3),
)


def drawn(name):
    seed, purpose, numbers = name
    return tuple(chance.generator(seed, purpose, *numbers).integers(2**63, size=2).tolist())


@given(st.lists(NAMES, min_size=2, max_size=6, unique_by=repr))
def test_a_name_is_one_stream_and_different_names_are_different_streams(names):
    streams = [drawn(name) for name in names]
    assert streams == [drawn(name) for name in names]
    assert len(set(streams)) == len(names)


def test_small_names_that_look_alike_differ():
    """A missing number is not a 0, and a number does not slide into the place of another."""
    numbers = [key for size in range(4) for key in itertools.product(range(3), repeat=size)]
    names = itertools.product([0, 1, 2**32, 2**96], chance.PURPOSES, numbers)
    streams = [drawn(name) for name in names]
    assert len(set(streams)) == len(streams)


def test_streams_are_those_of_the_seed_sequence():
    expected = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(3, 9))).random()
    assert chance.generator(5, "mask", 9).random() == expected


def test_the_purposes_keep_their_places():
    assert chance.PURPOSES[:7] == (
        "parameters",
        "split",
        "batch",
        "mask",
        "dropout",
        "validation",
        "sample",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ((-1, "mask"), "seed: received -1"),
        ((2**128, "mask"), "seed: received"),
        ((0, "weather"), "purpose: received 'weather', expected one of parameters, split"),
        ((0, "mask", 2**32), r"numbers: received 4294967296, expected an integer in \[0"),
        ((0, "mask", 1.0), "numbers: received 1.0, expected an integer"),
    ],
)
def test_what_is_no_name_is_refused(name, message):
    with pytest.raises((TypeError, ValueError), match=message):
        chance.generator(*name)
