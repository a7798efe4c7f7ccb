"""Structure says what an array is where no known mistake explains it, and never what it is not.

Arrays are changed by plain NumPy, or computed again with a mistake, from golden vectors.
"""

import math
import re

import numpy as np
import pytest

from marref import files
from marref.layers import attention
from marref.verify import golden
from marref.verify.comparison import Comparison, Golden, budgets, compare, row_of
from marref.verify.structure import hints

BLOCK = "activations/blocks.0"
QUERY, VALUE = f"{BLOCK}.attention.query", f"{BLOCK}.attention.value"
WEIGHTS, CONTEXT = f"{BLOCK}.attention.weights", f"{BLOCK}.attention.context"
NORM, OUTPUT = f"{BLOCK}.attention_norm", f"{BLOCK}.output"
UP, ACTIVATION = f"{BLOCK}.feed_forward.up", f"{BLOCK}.feed_forward.activation"
DOWN, EMBEDDING, LOGITS = (
    f"{BLOCK}.feed_forward.down",
    "activations/embedding",
    "activations/logits",
)
KERNEL = "gradients/blocks.1.attention.output.kernel"
SECTIONS = ("activations/", "loss", "gradients/", "decode/", "schedule/", "adam/", "adamw/")


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


@pytest.fixture(scope="module")
def allowed(vectors):
    """The budgets of float32, worked out once."""
    names = [name for name in vectors.arrays if name.startswith(SECTIONS)]
    return budgets(vectors, dict.fromkeys(names), "float32")


@pytest.fixture(scope="module")
def say(vectors, allowed):
    """Say what is said of a right float32 program's arrays, some of them changed."""
    rng = np.random.default_rng(0)
    right = {
        name: rounded(array, rng)
        for name, array in vectors.arrays.items()
        if name.startswith(SECTIONS)
    }

    right_rows = {
        name: row_of(name, array, vectors.arrays[name], allowed[name])
        for name, array in right.items()
    }

    def sentences(changed, given=None):
        arrays = {**right, **changed}
        arrays = {
            name: arrays[name]
            for name in vectors.order(arrays)
            if given is None or name in changed or re.fullmatch(given, name)
        }
        rows = tuple(
            row_of(name, array, vectors.arrays[name], allowed[name])
            if name in changed
            else right_rows[name]
            for name, array in arrays.items()
        )
        return hints(vectors, arrays, Comparison(rows, "float32"))

    return sentences


def rounded(array, rng):
    """Move numbers by what float32 rounds off."""
    if array.dtype.kind != "f":
        return array
    noise = rng.normal(size=array.shape)
    return (array * (1.0 + 1e-7 * noise)).astype(np.float32)


def of(vectors, name):
    return np.array(vectors.arrays[name])


def activation(name):
    return f"activations/blocks.0.{name}"


def changed_slice(array, axis, index, change):
    array = array.copy()
    place = (slice(None),) * axis + (index,)
    array[place] = change(array[place])
    return array


# What an array is to the golden one.
RELATIONS = {
    "a number": (CONTEXT, lambda g, v: 0.7311 * g, "times 0.7311"),
    "a number that has a name": (CONTEXT, lambda g, v: math.sqrt(3) * g, "sqrt(head_dim)"),
    "the sign": (CONTEXT, lambda g, v: -g, "times -1"),
    "a constant": (CONTEXT, lambda g, v: g + 0.25, "plus 0.25 in every entry"),
    "zero": (CONTEXT, lambda g, v: 0 * g, "is 0"),
    "a factor for each feature": (
        CONTEXT,
        lambda g, v: g * np.array([1.0, 2, 3, 4, 5, 6]),
        "a number for each feature: 1, 2, 3, 4, 5, 6",
    ),
    "a factor for each head": (
        QUERY,
        lambda g, v: g * np.array([1.5, 0.5])[:, None, None],
        "a number for each head: 1.5, 0.5",
    ),
    "another block": (
        CONTEXT,
        lambda g, v: of(v, "activations/blocks.1.attention.context"),
        "is golden activations/blocks.1.attention.context",
    ),
    "features rolled": (CONTEXT, lambda g, v: np.roll(g, 1, -1), "features rolled"),
    "features reversed": (CONTEXT, lambda g, v: g[..., ::-1], "features reversed"),
    "positions permuted": (CONTEXT, lambda g, v: g[:, [2, 0, 1, 4, 3]], "positions permuted"),
    "heads swapped": (QUERY, lambda g, v: g[:, ::-1], "heads reversed"),
    "axes transposed": (WEIGHTS, lambda g, v: g.swapaxes(-1, -2), "axes in the order"),
    "a kernel's gradient transposed": (KERNEL, lambda g, v: g.T, "axes in the order"),
    "numbers shuffled": (
        CONTEXT,
        lambda g, v: np.random.default_rng(1).permutation(g.ravel()).reshape(g.shape),
        "in another order",
    ),
    "a bias too many": (
        CONTEXT,
        lambda g, v: g + of(v, "params/blocks.0.attention.value.bias"),
        "plus blocks.0.attention.value.bias",
    ),
    "dropout": (
        EMBEDDING,
        lambda g, v: g * (np.random.default_rng(2).random(g.shape) > 0.1) / 0.9,
        "as dropout with p = 0.1",
    ),
    "half of another array too many": (
        CONTEXT,
        lambda g, v: g + 0.5 * of(v, EMBEDDING),
        "plus 0.5 times golden activations/embedding",
    ),
}

# Where it differs, and what it is there.
PLACES = {
    "one head": (QUERY, lambda g, v: changed_slice(g, 1, 0, np.sin), "only in head 0"),
    "a head that is another": (
        QUERY,
        lambda g, v: changed_slice(g, 1, 0, lambda _: g[:, 1]),
        "head 0 is golden 1",
    ),
    "the last position": (CONTEXT, lambda g, v: changed_slice(g, 1, 4, np.sin), "the last"),
    "masked positions": (
        CONTEXT,
        lambda g, v: np.where(v.batch["mask"][..., None] == 1, 0.0, g),
        "at masked positions; there it is 0",
    ),
    "a sequence": (CONTEXT, lambda g, v: changed_slice(g, 0, 1, np.sin), "only in sequence 1"),
    "one entry": (
        CONTEXT,
        lambda g, v: g + 0.5 * (np.arange(g.size) == 17).reshape(g.shape),
        "in one entry only, [0, 2, 5]",
    ),
    "not a number": (CONTEXT, lambda g, v: changed_slice(g, 0, 1, lambda x: x * np.nan), "is NaN"),
    "row 0 of the table": (
        "gradients/embedding.table",
        lambda g, v: changed_slice(g, 0, 0, np.sin),
        "in row 0, that of [MASK]",
    ),
}


def normalised(v, x, epsilon=1e-5, ddof=0):
    scale, bias = (of(v, f"params/blocks.0.attention_norm.{leaf}") for leaf in ("scale", "bias"))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, ddof=ddof, keepdims=True) + epsilon) * scale + bias


def made(v, layer, x, bias=1.0):
    kernel, b = (of(v, f"params/blocks.0.{layer}.{leaf}") for leaf in ("kernel", "bias"))
    return x @ kernel + bias * b


def scores(v):
    return of(v, QUERY) @ of(v, f"{BLOCK}.attention.key").mT / math.sqrt(3)


# What a layer made.
LAYERS = {
    "another epsilon": (NORM, lambda g, v: normalised(v, of(v, EMBEDDING), 1e-6), "epsilon 1e-06"),
    "an epsilon of one's own": (
        NORM,
        lambda g, v: normalised(v, of(v, EMBEDDING), 3.3e-4),
        "epsilon 0.00033",
    ),
    "n - 1": (NORM, lambda g, v: normalised(v, of(v, EMBEDDING), ddof=1), "by n - 1"),
    "a kernel transposed": (
        VALUE,
        lambda g, v: attention.split_heads(
            of(v, NORM) @ of(v, "params/blocks.0.attention.value.kernel").T
            + of(v, "params/blocks.0.attention.value.bias"),
            2,
        ),
        "its kernel transposed",
    ),
    "no bias": (
        UP,
        lambda g, v: made(v, "feed_forward.up", of(v, f"{BLOCK}.feed_forward_norm"), 0),
        "without its bias",
    ),
    "an input that is not normalised": (
        QUERY,
        lambda g, v: attention.split_heads(made(v, "attention.query", of(v, EMBEDDING)), 2),
        "of embedding in place of blocks.0.attention_norm",
    ),
    "a temperature": (
        WEIGHTS,
        lambda g, v: attention.softmax(0.8 * scores(v)),
        "softmax of query times key times 0.4619, 0.8 times 1/sqrt(head_dim)",
    ),
    "a mask": (
        WEIGHTS,
        lambda g, v: attention.softmax(
            np.where((v.batch["tokens"] == 0)[:, None, None, :], -1e9, scores(v))
        ),
        "keys that are [MASK] left out",
    ),
    "tanh": (ACTIVATION, lambda g, v: np.tanh(of(v, UP)), "is tanh of feed_forward.up"),
    "a function": (
        ACTIVATION,
        lambda g, v: np.sin(of(v, UP)),
        "is a function of feed_forward.up alone",
    ),
    "a residual twice": (
        OUTPUT,
        lambda g, v: g + of(v, EMBEDDING),
        "has the input of the block twice",
    ),
    "a layer that was not given": (
        DOWN,
        lambda g, v: made(v, "feed_forward.down", np.maximum(of(v, UP), 0)),
        "if blocks.0.feed_forward.activation is ReLU",
    ),
    "positions from one": (
        EMBEDDING,
        lambda g, v: 1.7 * of(v, "params/embedding.table")[v.batch["tokens"]],
        "is 1.7 times table[tokens], without positions",
    ),
}


@pytest.mark.parametrize("kind", [*RELATIONS, *PLACES, *LAYERS])
def test_it_says_what_the_array_is(vectors, say, kind):
    name, change, fragment = {**RELATIONS, **PLACES, **LAYERS}[kind]
    arrays = {name: change(of(vectors, name), vectors).astype(np.float32)}
    given = r"activations/.*(norm|up|down|embedding)" if "not given" in kind else None
    sentences = say(arrays, given)
    assert sentences
    assert fragment in sentences[0], sentences


@pytest.mark.parametrize("factor", [1 / 7, 7.0, 0.25])
def test_a_common_factor_of_all_gradients_is_named(vectors, say, factor):
    changed = {
        name: (factor * array).astype(np.float32)
        for name, array in vectors.arrays.items()
        if name.startswith("gradients/")
    }
    (sentence,) = say(changed)
    assert f"times {factor:.4g}" in sentence
    assert sentence.endswith("so are all 37 gradients given")


def test_gradients_are_looked_at_from_the_head_backwards(vectors, say):
    names = ("gradients/embedding.table", "gradients/head.kernel")
    (sentence,) = say({name: 2 * vectors.arrays[name] for name in names})
    assert sentence.startswith("your gradients/head.kernel is the golden array times 2")


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_is_found_in_a_table_and_a_random_one_is_not(vectors, say, seed):
    logits = of(vectors, LOGITS)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    every = -np.take_along_axis(logs, vectors.batch["targets"][..., None], -1)[..., 0]
    (sentence,) = say({"loss": np.float32(every.sum() / 4)})
    assert "summed over all positions and divided by the batch" in sentence
    random = np.random.default_rng(seed).uniform(0.3, 3.0)
    assert say({"loss": np.float32(random * vectors.arrays["loss"])}) == ()


def test_the_steps_of_an_optimiser_are_taken_again(vectors, say):
    def stepped(rate):
        return {
            f"adam/1/{name.removeprefix('params/')}": start
            + rate * (vectors.arrays[f"adam/1/{name.removeprefix('params/')}"] - start)
            for name, start in vectors.arrays.items()
            if name.startswith("params/")
        }

    assert "took a step of the golden one times 0.35" in say(stepped(0.35))[0]
    assert "is the parameter before the step" in say(stepped(0.0))[0]
    plain = {
        name.replace("adam/", "adamw/"): array
        for name, array in vectors.arrays.items()
        if name.startswith("adam/1/")
    }
    assert "is golden adam/1" in say(plain)[0]


def test_what_a_decoder_does_is_said(vectors, say):
    name = "decode/linear-3/steps/mask"
    one = of(vectors, "decode/cosine-3/steps/mask")
    assert (
        "1, 2, 2 tokens in its steps, where 2, 1, 2 is expected: the counts of the cosine"
        in (say({name: one})[0])
    )
    known = of(vectors, "decode/known/tokens")
    assert (
        "changes 1 of 4 tokens that were known"
        in (say({"decode/known/tokens": changed_slice(known, 0, 0, lambda row: row % 4)})[0])
    )
    sure = of(vectors, "decode/hot/steps/confidence")
    assert "outside [0, 1]" in say({"decode/hot/steps/confidence": 4 * sure})[0]
    counts = {
        name: vectors.arrays[name.replace("linear", "cosine")]
        for name in vectors.arrays
        if name.startswith("schedule/linear")
    }
    assert "the counts of the cosine schedule, as have all 17" in say(counts)[0]


def test_nothing_is_said_where_nothing_differs(say):
    assert say({}) == ()


# No false sentence: what is random is nothing.

_PLACES_ONLY = re.compile(r"differs (only|in one entry)|is off by .* a jump|has rows that sum to")


def drawn_name(vectors, rng):
    names = [
        name
        for name, array in vectors.arrays.items()
        if name.startswith(("activations/", "gradients/")) and array.size >= 20
    ]
    return names[rng.integers(len(names))]


@pytest.mark.parametrize("seed", range(40))
def test_noise_of_any_size_is_nothing(vectors, allowed, say, seed):
    rng = np.random.default_rng(seed)
    name = drawn_name(vectors, rng)
    yours = of(vectors, name)
    size = allowed[name] * 10 ** rng.uniform(0.3, 4)
    where = rng.random(yours.shape) < rng.choice([0.05, 0.3, 1.0])
    sentences = say({name: (yours + size * where * rng.normal(size=yours.shape))})
    assert all(_PLACES_ONLY.search(sentence) for sentence in sentences), sentences


@pytest.mark.parametrize("seed", range(25))
def test_another_matrix_is_nothing(vectors, say, seed):
    rng = np.random.default_rng(seed)
    name = drawn_name(vectors, rng)
    yours = of(vectors, name)
    mixed = yours @ np.linalg.qr(rng.normal(size=(yours.shape[-1],) * 2))[0]
    sentences = say({name: mixed})
    assert all(_PLACES_ONLY.search(sentence) for sentence in sentences), sentences


@pytest.mark.parametrize("seed", range(25))
def test_a_random_factor_is_that_factor(vectors, say, seed):
    rng = np.random.default_rng(seed)
    name, factor = drawn_name(vectors, rng), rng.choice([-1, 1]) * np.exp(rng.normal())
    (sentence,) = say({name: factor * of(vectors, name)})
    assert f"the golden array times {factor:.4g}" in sentence or "temperature" in sentence


@pytest.mark.parametrize("seed", range(25))
def test_a_random_place_is_that_place(vectors, allowed, say, seed):
    rng = np.random.default_rng(seed)
    name = drawn_name(vectors, rng)
    yours = of(vectors, name)
    axis = int(rng.integers(yours.ndim))
    index = int(rng.integers(yours.shape[axis]))
    size = 1e3 * allowed[name]
    yours = changed_slice(yours, axis, index, lambda x: x + size * rng.normal(size=x.shape))
    said = say({name: yours})
    sentences = [one for one in said if not re.search("a jump|rows that sum", one)]
    for sentence in sentences:
        assert re.search("differs (only|in one entry)", sentence)
        assert "there it" not in sentence
        assert re.search(rf"\b{index}\b|\[MASK\]|last|masked|occur|diagonal|tokens", sentence)


def test_key_biases_that_were_stepped_are_no_mistake(vectors):
    arrays = {name: a for name, a in vectors.arrays.items() if name.startswith("adam/")}
    rng = np.random.default_rng(0)
    for name in arrays:
        if name.endswith("key.bias"):
            count = int(name.split("/")[1])
            arrays[name] = arrays[name] + 0.01 * count * rng.choice([-1.0, 1.0], arrays[name].shape)
    comparison = compare(vectors, arrays)
    assert not comparison.agrees
    (sentence,) = hints(vectors, arrays, comparison)
    assert "to step them is no mistake" in sentence


@pytest.mark.parametrize("seed", range(10))
def test_what_differs_by_little_fits_too_much_to_be_anything(vectors, allowed, say, seed):
    rng = np.random.default_rng(seed)
    name = drawn_name(vectors, rng)
    yours = of(vectors, name)
    yours += 1.8 * allowed[name] * rng.uniform(-1, 1, yours.shape)
    assert not any("golden" in sentence for sentence in say({name: yours}))
