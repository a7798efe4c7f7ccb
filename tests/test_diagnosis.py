"""Diagnosis names the mistakes of a user who wrote MAR in PyTorch.

The user's program is `benchmarks.ports.faulty`; what it hands over is float32, by golden names.
"""

import numpy as np
import pytest

from marref import files, trees
from marref.layers import attention
from marref.verify import faults, golden
from marref.verify.comparison import Golden, compare
from marref.verify.diagnosis import diagnose
from marref.verify.faults import CATALOGUE, STAGES
from marref.verify.rounding import MIXED, in_precision, round_to
from marref.verify.search import can_change

NORM = "activations/blocks.0.attention_norm"
QUERY = "activations/blocks.0.attention.query"
WEIGHTS = "activations/blocks.0.attention.weights"
GELU = "activations/blocks.0.feed_forward.activation"
SECOND_NORM = "activations/blocks.0.feed_forward_norm"

# A mistake in PyTorch, by the name that diagnosis should find, and what differs first.
FIRST_DIFFERENCE = {
    "embedding-times-root-embed-dim": "activations/embedding",
    "embedding-ids-off-by-one": "activations/embedding",
    "positions-interleaved": "activations/embedding",
    "positions-from-one": "activations/embedding",
    "positions-missing": "activations/embedding",
    "layer-norm-epsilon-1e-6": NORM,
    "layer-norm-epsilon-outside-root": NORM,
    "layer-norm-epsilon-1e-3": NORM,
    "layer-norm-unbiased-epsilon-outside-root": NORM,
    "layer-norm-unbiased-variance": NORM,
    "final-norm-missing": "activations/final_norm",
    "linear-square-kernels-transposed": QUERY,
    "linear-kernels-reshaped": QUERY,
    "head-without-bias": "activations/logits",
    "attention-mask-keys-hidden": WEIGHTS,
    "attention-key-and-value-parameters-swapped": "activations/blocks.0.attention.key",
    "attention-query-and-value-parameters-swapped": QUERY,
    "attention-parameters-read-as-key-value-query": QUERY,
    "attention-parameters-read-as-value-query-key": QUERY,
    "attention-parameters-read-by-head": QUERY,
    "attention-parameters-read-innermost": QUERY,
    "attention-qkv-kernels-transposed": QUERY,
    "attention-output-kernel-transposed": "activations/blocks.0.attention.output",
    "attention-unscaled": WEIGHTS,
    "attention-scaled-by-embed-dim": WEIGHTS,
    "attention-softmax-over-queries": WEIGHTS,
    "attention-causal": WEIGHTS,
    "attention-heads-innermost": QUERY,
    "attention-query-and-key-swapped": WEIGHTS,
    "gelu-tanh": GELU,
    "gelu-relu": GELU,
    "gelu-leaky-relu": GELU,
    "gelu-silu": GELU,
    "residual-around-attention-from-normalised": SECOND_NORM,
    "residual-around-feed-forward-from-normalised": "activations/blocks.0.output",
    "block-parameters-shared": "activations/blocks.1.attention_norm",
    "block-order-reversed": NORM,
    "residual-around-attention-missing": SECOND_NORM,
    "residual-around-feed-forward-missing": "activations/blocks.0.output",
    "loss-over-all-positions": "loss",
    "loss-summed": "loss",
    "loss-averaged-by-sequence": "loss",
    "loss-averaged-by-sequence-without-empty": "loss",
    "loss-over-ratio": "loss",
    "loss-shifted": "loss",
    "loss-base-2": "loss",
    "loss-label-smoothing": "loss",
    "layer-norm-gradient-without-correlation": "gradients/blocks.1.feed_forward.down.bias",
    "residual-gradient-dropped": "gradients/blocks.1.attention.output.bias",
    "embedding-gradient-padding": "gradients/embedding.table",
    "adam-without-bias-correction": "adam/1/embedding.table",
    "adam-epsilon-1e-7": "adam/1/blocks.0.attention.query.kernel",
    "adam-epsilon-1e-6": "adam/1/embedding.table",
    "gradients-not-zeroed": "adam/2/embedding.table",
    "adam-beta2-0.95": "adam/2/blocks.0.attention_norm.scale",
    "adam-decay-in-gradient": "adamw/1/embedding.table",
    "clip-each-array": "clipped/1/embedding.table",
    "clip-each-fused-array": "clipped/1/embedding.table",
}

PAIRS = [
    ("embedding-times-root-embed-dim", "positions-missing"),
    ("positions-interleaved", "gelu-relu"),
    ("positions-from-one", "loss-summed"),
    ("layer-norm-epsilon-1e-6", "gelu-tanh"),
    ("layer-norm-epsilon-1e-12", "attention-softmax-over-queries"),
    ("layer-norm-epsilon-outside-root", "loss-label-smoothing"),
    ("layer-norm-unbiased-variance", "gelu-silu"),
    ("layer-norm-without-bias", "residual-around-attention-missing"),
    ("linear-square-kernels-transposed", "loss-base-2"),
    ("attention-unscaled", "attention-causal"),
    ("attention-scaled-by-embed-dim", "head-without-bias"),
    ("attention-heads-innermost", "loss-over-all-positions"),
    ("attention-without-qkv-biases", "gelu-sigmoid"),
    ("attention-query-and-key-swapped", "loss-averaged-by-sequence"),
    ("gelu-tanh", "final-norm-missing"),
    ("gelu-tanh", "embedding-gradient-padding"),
    ("feed-forward-without-biases", "residual-gradient-dropped"),
    ("residual-around-feed-forward-missing", "head-without-bias"),
    ("loss-over-all-positions", "loss-label-smoothing"),
    # Two ways to get the same part wrong replace the same function of marref's, and the catalogue
    # has no entry for both at once.
    ("block-parallel", "residual-gradient-dropped"),
]
NOT_FOUND = PAIRS[-1:]

# What marref itself computes with a fault, by the section that shows it.
MADE_BY_MARREF = {
    "positions-cosine-first": "activations/",
    "head-tied": "activations/",
    "attention-heads-reshaped": "activations/",
    "attention-softmax-plus-one": "activations/",
    "block-post-norm": "activations/",
    "block-post-norm-hooked": "activations/",
    "dropout-left-on": "activations/",
    "loss-targets-shifted": "loss",
    "linear-gradient-kernel-not-transposed": "gradients/",
    "linear-gradient-biases-averaged": "gradients/",
    "gelu-gradient-without-density": "gradients/",
    "attention-gradient-query-and-key-swapped": "gradients/",
    "embedding-gradient-assigned": "gradients/",
    "decode-confidence-unscaled": "decode/cold/",
    "decode-temperature-multiplied": "decode/cold/",
    "decode-left-to-right": "decode/cosine-3/",
    "decode-count-off-by-one": "decode/cosine-3/",
    "decode-cosine-linear": "schedule/",
    "decode-cosine-without-minimum": "schedule/",
    "decode-cosine-squared": "schedule/",
}


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


@pytest.fixture(scope="module")
def run_torch(vectors):
    """Run the user's program up to the gradients, and as many steps of the optimisers."""
    pytest.importorskip("torch")
    from benchmarks.ports import faulty, in_torch

    def run(*mistakes, precision="float32", optimisers=()):
        user = faulty.faulty(mistakes)(vectors, in_torch.Style(), precision)
        return user.arrays(("activations", "loss", "gradients", *optimisers))

    return run


def section_of(name):
    return FIRST_DIFFERENCE[name].split("/")[0]


def names_of(explanation):
    return tuple(fault.name for fault in explanation.faults)


# A user's program in PyTorch.


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_a_correct_program_is_never_accused(vectors, run_torch, precision):
    arrays = run_torch(precision=precision, optimisers=golden.OPTIMISERS)
    assert len(arrays) > 350
    diagnosis = diagnose(vectors, arrays, precision)
    assert diagnosis.comparison.agrees, diagnosis.comparison.first
    assert diagnosis.explanations == ()


@pytest.mark.parametrize("name", FIRST_DIFFERENCE)
def test_a_mistake_is_located_and_named(vectors, run_torch, name):
    assert name in CATALOGUE
    optimisers = {section_of(name)} & set(golden.OPTIMISERS)
    diagnosis = diagnose(vectors, run_torch(name, optimisers=optimisers), most_together=1)
    assert diagnosis.comparison.precision == "float32"
    assert diagnosis.comparison.first.name == FIRST_DIFFERENCE[name]
    assert [names_of(found) for found in diagnosis.explanations] == [(name,)]
    assert diagnosis.explanations[0].ratio < 1


def test_optax_s_clipping_is_named_in_float64(vectors, run_torch):
    arrays = run_torch("clip-without-1e-6", precision="float64", optimisers=["clipped"])
    diagnosis = diagnose(vectors, arrays, most_together=1)
    assert diagnosis.comparison.first.name.startswith("clipped/")
    assert [names_of(found) for found in diagnosis.explanations] == [("clip-without-1e-6",)]


@pytest.mark.parametrize("optimiser", ["adamw", "clipped"])
def test_gradients_that_add_up_are_named_with_decay_and_clipping(vectors, run_torch, optimiser):
    diagnosis = diagnose(
        vectors, run_torch("gradients-not-zeroed", optimisers=[optimiser]), most_together=1
    )
    assert diagnosis.comparison.first.name == f"{optimiser}/2/embedding.table"
    assert [names_of(found) for found in diagnosis.explanations] == [("gradients-not-zeroed",)]


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_two_mistakes_are_named_together(vectors, run_torch, pair):
    diagnosis = diagnose(vectors, run_torch(*pair))
    assert not diagnosis.comparison.agrees
    best = [set(names_of(found)) for found in diagnosis.explanations[:1]]
    assert best == ([] if pair in NOT_FOUND else [set(pair)])


def test_a_mistake_in_the_loss_and_one_in_the_gradients_are_named_together(vectors, run_torch):
    pair = ("loss-over-batch-times-length", "attention-gradient-through-values-only")
    diagnosis = diagnose(vectors, run_torch(*pair))
    assert [set(names_of(found)) for found in diagnosis.explanations] == [set(pair)]


# Diagnosis by itself.


@pytest.mark.parametrize("name", MADE_BY_MARREF)
def test_what_marref_computes_with_a_fault_is_explained_by_it(vectors, name):
    with CATALOGUE[name].applied(), np.errstate(all="ignore"):
        arrays = vectors.compute({MADE_BY_MARREF[name]: None})
    diagnosis = diagnose(vectors, in_float32(arrays), "float32", most_together=1)
    assert not diagnosis.comparison.agrees
    assert [names_of(found) for found in diagnosis.explanations[:1]] == [(name,)]


def test_a_fault_that_makes_nan_is_explained_by_it(vectors):
    with CATALOGUE["adam-step-from-zero"].applied(), np.errstate(all="ignore"):
        arrays = vectors.compute({"adam/": None})
    diagnosis = diagnose(vectors, in_float32(arrays), most_together=1)
    assert [names_of(found) for found in diagnosis.explanations] == [("adam-step-from-zero",)]


def in_float32(arrays):
    return {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }


def test_what_nothing_explains_is_located_all_the_same(vectors):
    arrays = in_float32(vectors.compute({"activations/": None}))
    name = "activations/blocks.1.attention.context"
    arrays[name] = np.roll(arrays[name], 1, axis=-1)
    diagnosis = diagnose(vectors, arrays)
    assert diagnosis.explanations == ()
    assert diagnosis.comparison.first.name == name
    assert len(diagnosis.comparison.differing) == 1


def test_a_mistake_in_one_block_only_has_no_explanation_but_a_place(vectors):
    right = vectors.compute({"activations/": None})
    with CATALOGUE["gelu-relu"].applied():
        wrong = vectors.compute({"activations/": None})
    second = {name: wrong[name] if "blocks.1" in name else right[name] for name in right}
    diagnosis = diagnose(vectors, in_float32(second), most_together=1)
    assert diagnosis.explanations == ()
    assert diagnosis.comparison.first.name.startswith("activations/blocks.1.")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_arrays_that_agree_need_no_explanation(vectors, dtype):
    arrays = {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for name, array in vectors.arrays.items()
    }
    diagnosis = diagnose(vectors, arrays)
    assert diagnosis.comparison.agrees
    assert diagnosis.explanations == ()


def test_the_comparison_is_that_of_compare(vectors):
    arrays = {"activations/logits": 2 * vectors.arrays["activations/logits"]}
    diagnosis = diagnose(vectors, arrays, "float32", most_together=1)
    assert diagnosis.comparison == compare(vectors, arrays, "float32")


def test_a_mistake_is_named_from_the_logits_alone(vectors):
    with CATALOGUE["attention-causal"].applied():
        logits = vectors.model(vectors.params, vectors.batch["tokens"])
    diagnosis = diagnose(
        vectors, {"activations/logits": logits.astype(np.float32)}, most_together=1
    )
    assert [names_of(found) for found in diagnosis.explanations] == [("attention-causal",)]


def test_what_cannot_be_told_apart_is_all_named_best_first(vectors):
    """Transposed scores give the same logits whichever way query and key were swapped."""
    names = [
        ("attention-query-and-key-swapped",),
        ("attention-query-and-key-parameters-swapped",),
    ]
    with CATALOGUE[names[0][0]].applied():
        logits = vectors.model(vectors.params, vectors.batch["tokens"])
    diagnosis = diagnose(
        vectors, {"activations/logits": logits.astype(np.float32)}, most_together=1
    )
    assert sorted(map(names_of, diagnosis.explanations)) == sorted(names)
    ratios = [explanation.ratio for explanation in diagnosis.explanations]
    assert ratios == sorted(ratios)


def test_transposed_kernels_that_only_the_query_shows_are_one_explanation(vectors, run_torch):
    query = {QUERY: run_torch("attention-qkv-kernels-transposed")[QUERY]}
    diagnosis = diagnose(vectors, query, most_together=1)
    assert {names_of(found) for found in diagnosis.explanations} == {
        ("linear-square-kernels-transposed",),
        ("linear-kernels-reshaped",),
        ("attention-qkv-kernels-transposed",),
    }
    assert [len(found.same) for found in diagnosis.explanations] == [2, 2, 2]
    assert diagnosis.as_table().count("your arrays are what marref computes") == 1


def test_a_precision_accuses_nobody_of_what_it_cannot_show(vectors):
    with CATALOGUE["attention-softmax-sum-plus-1e-8"].applied():
        arrays = vectors.compute({"activations/": None})
    wide = diagnose(vectors, arrays, most_together=1)
    assert names_of(wide.explanations[0]) == ("attention-softmax-sum-plus-1e-8",)
    assert diagnose(vectors, in_float32(arrays), most_together=1).comparison.agrees


def test_faults_are_undone_after_a_diagnosis(vectors):
    before = vectors.compute({"activations/": None})
    diagnose(vectors, {"activations/logits": before["activations/logits"] + 1.0}, most_together=1)
    after = vectors.compute({"activations/": None})
    assert all((before[name] == after[name]).all() for name in before)


# Nobody is accused of what they did not do.


def golden_in(vectors, precision, sections=("activations/", "loss", "gradients/")):
    """What a right program in a precision computes."""
    params = trees.map_leaves(lambda leaf: in_precision(leaf, precision), vectors.params)
    names = [name for name in vectors.arrays if name.startswith(sections)]
    arrays = {}
    for stage in vectors.stages(dict.fromkeys(names), params).values():
        arrays |= stage()
    return {name: np.array(arrays[name]) for name in names}


@pytest.mark.parametrize("size", [2e-4, 5e-4, 2e-3])
def test_one_wrong_logit_is_no_known_mistake(vectors, size):
    arrays = golden_in(vectors, "float32")
    arrays["activations/logits"][0, 1, 2] += np.float32(size)
    diagnosis = diagnose(vectors, arrays)
    assert not diagnosis.comparison.agrees
    assert diagnosis.explanations == ()


def test_a_bias_gradient_too_large_in_bfloat16_is_no_known_mistake(vectors):
    arrays = golden_in(vectors, "bfloat16")
    arrays["gradients/blocks.0.feed_forward.up.bias"] *= np.float32(1.5)
    assert diagnose(vectors, arrays, "bfloat16").explanations == ()


@pytest.mark.parametrize("seed", range(8))
def test_a_random_loss_is_no_known_mistake(vectors, seed):
    factor = np.random.default_rng(seed).uniform(0.3, 3.0)
    loss = {"loss": np.float32(vectors.arrays["loss"] * factor)}
    assert diagnose(vectors, loss).explanations == ()


def test_two_mistakes_seen_in_logits_only_are_found_together(vectors, run_torch):
    pair = ("layer-norm-epsilon-1e-6", "gelu-tanh")
    arrays = run_torch(*pair)
    logits = {"activations/logits": arrays["activations/logits"]}
    found = diagnose(vectors, logits).explanations
    assert found
    assert {*names_of(found[0])} == {*pair}


def test_a_loss_that_went_through_item_is_float32(vectors, run_torch):
    arrays = run_torch()
    arrays["loss"] = np.float64(arrays["loss"])
    assert compare(vectors, arrays).agrees


def test_one_bfloat16_array_does_not_excuse_another(vectors, run_torch):
    arrays = run_torch()
    name, other = "activations/embedding", "gradients/head.kernel"
    arrays[name] = round_to(arrays[name], "bfloat16")
    comparison = compare(vectors, arrays)
    assert comparison.agrees
    assert comparison.precision_of(name) == "bfloat16"
    arrays[other] = arrays[other] * np.float32(1.08)
    assert [row.name for row in compare(vectors, arrays).differing] == [other]


@pytest.mark.parametrize("precision", MIXED)
def test_rounding_in_products_only_is_said_first(vectors, precision):
    arrays = golden_in(vectors, precision)
    assert compare(vectors, arrays, precision).agrees
    assert not compare(vectors, arrays).agrees
    diagnosis = diagnose(vectors, arrays)
    assert diagnosis.explanations == ()
    assert diagnosis.coarser in MIXED
    assert "within the rounding of" in diagnosis.as_table()


def test_what_is_near_is_said_to_be_no_finding(vectors):
    arrays = golden_in(vectors, "float32", ("activations/logits",))
    budget = compare(vectors, arrays).rows[0].budget
    with CATALOGUE["positions-missing"].applied():
        arrays = golden_in(vectors, "float32", ("activations/logits",))
    arrays["activations/logits"][0, 1, 2] += np.float32(3 * budget)
    diagnosis = diagnose(vectors, arrays, most_together=1)
    assert diagnosis.explanations == ()
    assert "no finding, but near: positions-missing" in diagnosis.as_table()


def test_a_mistake_within_a_coarse_precision_is_not_called_that_precision(vectors):
    arrays = golden_in(vectors, "float32")
    arrays["activations/logits"] = arrays["activations/logits"] * np.float32(1.02)
    assert compare(vectors, arrays, "bf16-mixed").agrees
    assert diagnose(vectors, arrays, most_together=1).coarser is None


def test_coarse_budgets_let_no_explanation_move_what_was_right(vectors):
    """In bfloat16 the budget of this loss is a third of it: less than bits for nats make of it."""
    arrays = golden_in(vectors, "bfloat16", ("loss", "gradients/"))
    arrays |= {name: 1.44 * a for name, a in arrays.items() if name.startswith("gradients/")}
    assert diagnose(vectors, arrays, "bfloat16", most_together=1).explanations == ()


# Several mistakes, and what is left of them.

TRIPLES = [
    ("layer-norm-epsilon-1e-6", "gelu-tanh", "loss-averaged-by-sequence"),
    ("positions-interleaved", "gelu-silu", "final-norm-missing"),
]


@pytest.mark.parametrize("sections", [("activations/", "loss"), ("activations/logits", "loss")])
@pytest.mark.parametrize("triple", TRIPLES, ids=" + ".join)
def test_three_mistakes_are_named_together(vectors, run_torch, triple, sections):
    arrays = {n: a for n, a in run_torch(*triple).items() if n.startswith(sections)}
    found = diagnose(vectors, arrays).explanations
    assert [{*names_of(one)} for one in found] == [{*triple}]


def test_what_an_explanation_leaves_over_is_said(vectors):
    arrays = golden_in(vectors, "float32", ("activations/",))
    with CATALOGUE["gelu-tanh"].applied():
        arrays = golden_in(vectors, "float32", ("activations/",))
    arrays["activations/logits"] = arrays["activations/logits"] * np.float32(1.1)
    diagnosis = diagnose(vectors, arrays, most_together=1)
    assert diagnosis.explanations == ()
    assert [fault.name for fault in diagnosis.partial.faults] == ["gelu-tanh"]
    assert diagnosis.partial.left.first.name == "activations/logits"
    assert "up to activations/final_norm" in diagnosis.as_table()
    assert "the first left over is activations/logits" in diagnosis.as_table()


def test_a_mistake_of_one_block_alone_makes_nobody_accuse_another(vectors):
    """Where block 1 is right, and marref with the mistake in all blocks is not."""
    with CATALOGUE["attention-key-and-value-parameters-swapped"].applied():
        faulty = vectors.compute({"activations/": None})
    block, inputs = vectors.params["blocks"][1], faulty["activations/blocks.1.attention_norm"]
    names = [name for name in faulty if "blocks.0" in name or name.endswith("1.attention_norm")]
    arrays = {name: faulty[name] for name in names}
    heads = [
        attention.split_heads(
            inputs @ block["attention"][part]["kernel"] + block["attention"][part]["bias"], 2
        )
        for part in ("key", "value")
    ]
    for part, array in zip(("key", "value"), heads, strict=True):
        arrays[f"activations/blocks.1.attention.{part}"] = array
    diagnosis = diagnose(vectors, arrays, most_together=2)
    assert diagnosis.explanations == ()
    assert diagnosis.partial.left.first.name == "activations/blocks.1.attention.key"
    (sentence,) = diagnosis.hints
    assert "is golden activations/blocks.1.attention.value" in sentence


def test_an_array_is_named_that_tells_explanations_apart(vectors):
    with CATALOGUE["attention-query-and-key-swapped"].applied():
        logits = vectors.model(vectors.params, vectors.batch["tokens"])
    diagnosis = diagnose(vectors, {"activations/logits": logits}, most_together=1)
    assert {found.decides for found in diagnosis.explanations} == {QUERY}
    assert f"{QUERY} would tell them apart" in diagnosis.as_table()


@pytest.mark.parametrize("name", ["embedding-times-root-embed-dim", "decode-least-confident-first"])
def test_decoded_tokens_alone_accuse_nothing_but_the_decoder(vectors, name):
    with CATALOGUE[name].applied():
        arrays = vectors.compute({n: None for n in vectors.arrays if n.startswith("decode/")})
    tokens = {n: a for n, a in arrays.items() if n.endswith("tokens")}
    diagnosis = diagnose(vectors, tokens)
    assert not diagnosis.comparison.agrees
    named = {fault.name for found in diagnosis.explanations for fault in found.faults}
    assert named <= {fault.name for fault in STAGES["decoding"]}
    assert diagnosis.thin
    assert "the evidence is thin" in diagnosis.as_table()


def test_what_is_tried_is_reported(vectors):
    calls = []
    logits = {"activations/logits": vectors.arrays["activations/logits"] + 1.0}
    diagnose(vectors, logits, most_together=2, progress=lambda *call: calls.append(call))
    num_tried = len(faults.of_model(vectors.model)) - len(STAGES["samplers"])
    assert calls[0] == ("single mistakes", 0, num_tried)
    assert {what for what, _, _ in calls} >= {"single mistakes", "pairs"}
    assert all(done < total for _, done, total in calls)


def test_faults_change_no_section_but_those_of_their_stage(vectors):
    """The search takes what a fault cannot change from the right model."""
    sections = ("activations/", "loss", "gradients/", "schedule/", "decode/")
    names = dict.fromkeys(name for name in vectors.arrays if name.startswith(sections))
    for stage in ("loss", "gradients", "optimiser", "decoding"):
        for fault in STAGES[stage]:
            with fault.applied(), np.errstate(all="ignore"):
                computed = vectors.compute(names)
            changed = {n for n, a in computed.items() if not np.array_equal(a, vectors.arrays[n])}
            untouched = [n for n in vectors.stages(names) if not can_change(fault, n)]
            assert not [n for n in changed for prefix in untouched if n.startswith(prefix)], fault
