import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marref import trees

names = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=3)
leaves = st.builds(lambda n: np.arange(n), st.integers(1, 3))
nested = st.dictionaries(
    names,
    st.recursive(
        leaves,
        lambda inner: (
            st.dictionaries(names, inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=12)
        ),
        max_leaves=15,
    ),
    max_size=3,
)


@given(tree=nested)
def test_unflatten_undoes_flatten(tree):
    flat = trees.flatten(tree)
    rebuilt = trees.unflatten(flat)
    again = trees.flatten(rebuilt)
    assert list(again) == list(flat)
    assert all(again[name] is flat[name] for name in flat)
    assert repr(rebuilt) == repr(tree)


@given(tree=nested)
def test_map_leaves_keeps_the_structure(tree):
    doubled = trees.flatten(trees.map_leaves(lambda a, b: a + b, tree, tree))
    for name, leaf in trees.flatten(tree).items():
        np.testing.assert_array_equal(doubled[name], 2 * leaf)


def test_absent_leaves_are_left_out():
    assert list(trees.flatten({"a": None, "b": np.ones(1)})) == ["b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a.b"], "lies below another leaf"),
        (["a.b", "a"], "lies above another leaf"),
        (["a..b"], "empty part"),
        (["a.0", "a.2"], "positions 0 to 1, received 0, 2"),
        (["a.0", "a.b"], "positions 0 to 1, received 0, b"),
    ],
)
def test_names_that_are_no_tree_are_rejected(names, message):
    with pytest.raises(ValueError, match=message):
        trees.unflatten({name: np.ones(1) for name in names})
