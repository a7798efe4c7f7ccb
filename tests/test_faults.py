"""The fault catalogue: every known mistake shows, has its right gradient, and is caught."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import inspect
import itertools
import re
import sys
import threading
import time
import types
from pathlib import Path

import mpmath
import numpy as np
import pytest

import marref
from marref import continuous, files, trees
from marref.layers import gelu, layer_norm
from marref.verify import faults, golden, samplers, self_check
from marref.verify.faults import CATALOGUE, OF_CLASSES, STAGES
from marref.verify.faults.page import differences, first_difference, first_differences, page

from . import oracle, strategies
from .test_decoding import rule as decoding_rule
from .test_decoding import with_logits
from .test_golden_samplers import of_sampler, port_of
from .test_torch import (
    NAMES,
    assert_close,
    assert_gradients_close,
    decoded,
    golden_model,
    hold_key_biases,
    leaves_of,
    read_golden,
)

TINY = golden.PRESETS["tiny"]
CLASSES = dataclasses.replace(TINY, num_classes=3)
MISTAKES = Path(__file__).parents[1] / "docs" / "mistakes.md"

every_fault = pytest.mark.parametrize("name", CATALOGUE)

# What the tiny golden vectors cannot show, and where it shows instead.
OTHER_MODELS = {
    "positions-concatenated": {"positions": "interleaved"},
    "gelu-erf": {"gelu": "tanh"},
    "layer-norm-epsilon-1e-5": {"layer_norm_epsilon": 1e-6},
    "layer-norm-clipped-variance": {"layer_norm_epsilon": 1e-2},
}
WITHOUT_ARRAYS = {fault.name for fault in STAGES["masking"]}


def tiny_of(fault):
    """The tiny model that may have a fault."""
    return CLASSES if fault in OF_CLASSES else TINY


@functools.cache
def drawn(model):
    params, batch = golden.draw(model, seed=0)
    return params, batch, golden.compute(model, params, batch)


@pytest.fixture(scope="module")
def first_in_tiny():
    return first_differences()


# The catalogue.


def test_the_catalogue_has_every_fault_of_every_stage_once():
    listed = [fault.name for stage in STAGES.values() for fault in stage]
    assert list(CATALOGUE) == listed
    assert len(listed) == len(set(listed)) >= 60
    summaries = [fault.summary for fault in CATALOGUE.values()]
    assert len(set(summaries)) == len(summaries)


@every_fault
def test_a_fault_has_a_kebab_case_name_a_paragraph_and_patches(name):
    fault = CATALOGUE[name]
    assert fault.name == name
    assert re.fullmatch(r"[a-z][a-z0-9.]*(-[a-z0-9.]+)*", name), "a name is in kebab-case"
    assert fault.patches, f"{name} decorates no function"
    assert fault.summary.endswith("."), f"{name} owes a paragraph: a docstring, or says()"
    assert fault.summary == " ".join(fault.summary.split())


@every_fault
def test_a_patch_takes_the_arguments_of_its_seam(name):
    for patch in CATALOGUE[name].patches:
        parameters = inspect.signature(patch.seam.pristine).parameters.values()
        keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        old = [] if patch.replaces else [None]
        values = [None] * (len(parameters) - len(keywords))
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            inspect.signature(patch.function).bind(*old, *values, **keywords)


# Faults go in, act where they should, and come out.

ANOTHER_NAME = gelu.gate
ROOT = CATALOGUE["embedding-times-root-embed-dim"]
RELU, SILU = CATALOGUE["gelu-relu"], CATALOGUE["gelu-silu"]
CAUSAL = CATALOGUE["attention-causal"]


def attributes():
    """Everything that can be called in the package's modules and classes."""
    modules = [module for key, module in sys.modules.items() if key.split(".")[0] == "marref"]
    classes = {kind for module in modules for kind in vars(module).values() if is_own_class(kind)}
    return {
        (owner, name): value
        for owner in [*modules, *classes]
        for name, value in vars(owner).items()
        if callable(value)
    }


def is_own_class(value):
    return isinstance(value, type) and value.__module__.split(".")[0] == "marref"


def codes():
    """The code of every function of the package, the seams among them."""
    return {
        value: value.__code__
        for value in attributes().values()
        if isinstance(value, types.FunctionType)
    }


def logits(*_):
    params, batch, _ = drawn(TINY)
    return TINY(params, batch["tokens"])


def logits_with(*applied):
    with faults.applied(*applied):
        return logits()


def in_another_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture
def nothing_is_left():
    """After a test that uses it, marref is as it was before, and computes the same bits."""
    params, batch, right = drawn(TINY)
    attributes_before, codes_before = attributes(), codes()
    yield
    attributes_after, codes_after = attributes(), codes()
    assert attributes_after.keys() == attributes_before.keys()
    for key, value in attributes_before.items():
        assert attributes_after[key] is value, key
    for function, code in codes_before.items():
        assert codes_after[function] is code, function
    again = golden.compute(TINY, params, batch)
    assert again.keys() == right.keys()
    for name, array in right.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


FAST_WAY = {
    marref.fast.loss_and_grads,
    marref.fast.adam_step,
    marref.fast.logits,
    marref.fast.iterative_decode,
    continuous.sample,
    continuous.training.loss_and_grads,
}


@every_fault
def test_a_fault_is_applied_and_then_gone(name):
    attributes_before, before = attributes(), codes()
    seams = {patch.seam.function for patch in CATALOGUE[name].patches}
    with CATALOGUE[name].applied():
        during = codes()
        assert attributes() == attributes_before
    changed = {function for function in before if during[function] is not before[function]}
    assert changed == seams | FAST_WAY
    assert codes() == before
    assert all(function.__code__ is code for function, code in before.items())


@pytest.mark.usefixtures("nothing_is_left")
def test_faults_are_gone_after_an_error_too():
    pair = CATALOGUE["gelu-tanh"], CATALOGUE["layer-norm-epsilon-1e-6"]
    with pytest.raises(ZeroDivisionError), faults.applied(*pair):
        raise ZeroDivisionError


def test_two_faults_together_are_both_there():
    params, batch, _ = drawn(TINY)
    both = dataclasses.replace(TINY, gelu="tanh", layer_norm_epsilon=1e-6)
    for pair in (
        ("gelu-tanh", "layer-norm-epsilon-1e-6"),
        ("layer-norm-epsilon-1e-6", "gelu-tanh"),
    ):
        with faults.applied(*(CATALOGUE[name] for name in pair)):
            found = golden.compute(TINY, params, batch)
        assert differences(found, golden.compute(both, params, batch)) == {}


def test_a_wrap_goes_around_a_replacement_whatever_the_order():
    guarded = CATALOGUE["attention-softmax-sum-plus-1e-5"]
    both = logits_with(guarded, CAUSAL)
    np.testing.assert_array_equal(logits_with(CAUSAL, guarded), both)
    assert (both != logits_with(guarded)).any()
    assert (both != logits_with(CAUSAL)).any()


@pytest.mark.usefixtures("nothing_is_left")
def test_faults_that_replace_the_same_function_exclude_each_other():
    assert not faults.compatible(RELU, SILU)
    with pytest.raises(ValueError, match="gelu-relu, gelu-silu"), faults.applied(RELU, SILU):
        pass
    with (
        RELU.applied(),
        pytest.raises(ValueError, match="gelu-relu, gelu-silu"),
        SILU.applied(),
    ):
        pass
    assert faults.compatible(RELU, CATALOGUE["attention-unscaled"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attention-scaled-by-embed-dim", "attention-scaled-without-root"),
        ("gelu-tanh", "gelu-relu"),
        ("layer-norm-epsilon-1e-12", "layer-norm-epsilon-1e-6"),
        ("loss-over-batch-times-length", "loss-summed"),
    ],
)
def test_two_settings_of_one_choice_exclude_each_other(one, other):
    one, other = CATALOGUE[one], CATALOGUE[other]
    assert not faults.compatible(one, other)
    assert faults.compatible(one, one)
    with (
        pytest.raises(ValueError, match=f"{one.name}, {other.name} exclude each other"),
        faults.applied(one, other),
    ):
        pass


@pytest.mark.usefixtures("nothing_is_left")
def test_a_fault_that_is_applied_twice_acts_once_and_to_the_end():
    once = logits_with(ROOT)
    np.testing.assert_array_equal(logits_with(ROOT, ROOT), once)
    with ROOT.applied():
        np.testing.assert_array_equal(logits_with(ROOT), once)
        np.testing.assert_array_equal(logits(), once)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("order", list(itertools.permutations([ROOT, CAUSAL, RELU])))
def test_contexts_may_end_in_any_order(order):
    left = [order[index + 1 :] for index in range(3)]
    expected = [logits_with(*faults_left) for faults_left in left]
    contexts = {fault: fault.applied() for fault in (ROOT, CAUSAL, RELU)}
    for context in contexts.values():
        context.__enter__()
    for fault, right in zip(order, expected, strict=True):
        contexts[fault].__exit__(None, None, None)
        np.testing.assert_array_equal(logits(), right)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_context_may_end_in_another_thread():
    right = logits()
    context = RELU.applied()
    context.__enter__()
    assert (logits() != right).any()
    in_another_thread(lambda: context.__exit__(None, None, None))
    np.testing.assert_array_equal(logits(), right)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_context_that_nobody_ends_ends_with_its_last_reference():
    context = RELU.applied()
    context.__enter__()
    del context
    gc.collect()


@pytest.mark.usefixtures("nothing_is_left")
def test_other_threads_compute_the_pristine_bits_meanwhile():
    params, batch, right = drawn(TINY)
    with faults.applied(ROOT, RELU, CATALOGUE["decode-cosine-linear"]):
        found = in_another_thread(lambda: golden.compute(TINY, params, batch))
        value, _ = in_another_thread(lambda: marref.loss_and_grads(TINY, params, **batch))
        assert (logits() != right["activations/logits"]).any()
    for name, array in right.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert float(value) == pytest.approx(float(right["loss"]), rel=1e-14)


def test_each_thread_has_its_own_faults():
    expected = {fault: logits_with(fault) for fault in (RELU, SILU, CAUSAL)}
    both_are_in = threading.Barrier(2)

    def compute(fault):
        with fault.applied():
            both_are_in.wait(10)
            found = logits()
            both_are_in.wait(10)
        return found

    for pair in itertools.permutations(expected, 2):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for fault, found in zip(pair, pool.map(compute, pair), strict=True):
                np.testing.assert_array_equal(found, expected[fault])


def test_threads_that_marref_starts_have_the_faults_of_their_caller():
    pytest.importorskip("threadpoolctl")
    expected = logits_with(RELU)
    with RELU.applied(), marref.parallel.threads(2) as run:
        for found in run(logits, range(8)):
            np.testing.assert_array_equal(found, expected)


def test_an_importer_under_another_name_sees_the_fault():
    x = np.array([-1.0, 2.0])
    cosine = marref.schedules.SCHEDULES["cosine"]
    with faults.applied(RELU, CATALOGUE["decode-cosine-linear"]):
        np.testing.assert_array_equal(ANOTHER_NAME(x, "erf")[0], [0.0, 1.0])
        assert cosine(256, 8).tolist() == [32] * 8
    assert (ANOTHER_NAME(x, gelu="erf")[0] != [0.0, 1.0]).all()


@pytest.mark.usefixtures("nothing_is_left")
def test_under_a_fault_the_public_face_computes_by_the_definition():
    params, batch, _ = drawn(TINY)
    state = marref.optim.init(params)
    with RELU.applied():
        expected = marref.model.loss_and_grads(TINY, params, **batch)
        found = marref.loss_and_grads(TINY, params, **batch, num_threads=2)
        tokens = marref.iterative_decode(TINY, params, num_steps=3, num_threads=2)
        right_tokens = marref.decoding.iterative_decode(TINY, params, num_steps=3)
        grads = expected[1]
        before = trees.map_leaves(np.copy, params)
        stepped, _ = marref.adam_step(
            params, grads, state, 0.01, weight_decay=0.1, in_place=True, num_threads=2
        )
        right_step, _ = marref.optim.step(params, grads, state, 0.01, weight_decay=0.1)
    assert found[0] == expected[0]
    np.testing.assert_array_equal(tokens, right_tokens)
    pairs = ((found[1], expected[1]), (stepped, right_step), (params, before))
    for tree, right in pairs:
        for name, leaf in trees.flatten(right).items():
            np.testing.assert_array_equal(trees.flatten(tree)[name], leaf, err_msg=name)


@pytest.fixture
def threads_that_take_turns():
    """Let threads interrupt each other every few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("nothing_is_left", "threads_that_take_turns")
def test_ten_threads_may_apply_faults_at_random():
    """Each opens and ends contexts in any order, and computes the bits of those that are open."""
    pool_of_faults = [CATALOGUE[name] for name in CATALOGUE if "epsilon" not in name]
    expected = {fault: logits_with(fault) for fault in pool_of_faults}
    right = logits()

    def work(seed):
        rng = np.random.default_rng(seed)
        contexts = []
        for _ in range(60):
            fault = pool_of_faults[rng.integers(len(pool_of_faults))]
            with contextlib.suppress(ZeroDivisionError), fault.applied():
                found = logits()
                if rng.random() < 0.5:
                    raise ZeroDivisionError
            np.testing.assert_array_equal(found, expected[fault], err_msg=fault.name)
            np.testing.assert_array_equal(logits(), right)
            for other in rng.permutation(pool_of_faults)[:3]:
                with contextlib.suppress(ValueError):
                    contexts.append(other.applied())
                    contexts[-1].__enter__()
            while contexts:
                contexts.pop(rng.integers(len(contexts))).__exit__(None, None, None)
        return True

    with np.errstate(all="ignore"), concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert all(pool.map(work, range(10)))


class SlowList(list):
    """Gives the main thread time to come between."""

    def __iter__(self):
        for item in super().__iter__():
            if threading.current_thread() is not threading.main_thread():
                time.sleep(1e-3)
            yield item


@pytest.mark.usefixtures("nothing_is_left")
def test_a_thread_does_not_take_out_what_another_puts_in_meanwhile():
    x = np.array([-2.0, 3.0])
    values = CATALOGUE["clip-values"]
    slow = dataclasses.replace(values, patches=SlowList(values.patches))
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            with slow.applied():
                time.sleep(2e-3)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(come_and_go)
        found = []
        for _ in range(100):
            time.sleep(1e-3)
            with RELU.applied():
                for _ in range(3):
                    found.append(gelu.gate(x, "erf")[0].tolist())
                    time.sleep(1e-3)
        done.set()
        other.result()
    assert found == [[0.0, 1.0]] * len(found)


def load_again(name):
    """Run a module of the catalogue under another name."""
    spec = importlib.util.find_spec(f"marref.verify.faults.{name}")
    copy = importlib.util.spec_from_file_location("copy_of_" + name, spec.origin)
    copy.loader.exec_module(importlib.util.module_from_spec(copy))


def test_a_missing_seam_is_an_error_when_the_catalogue_loads(monkeypatch):
    load_again("feed_forward")
    monkeypatch.delattr(gelu, "gate")
    with pytest.raises(AttributeError, match=r"marref\.layers\.gelu.*gate"):
        load_again("feed_forward")


def closure(old):
    return lambda *args: old(*args)


@pytest.mark.parametrize("stranger", [np.exp, functools.partial(gelu.gate), closure(gelu.gate)])
def test_a_seam_that_is_no_plain_function_is_an_error_when_the_catalogue_loads(
    monkeypatch, stranger
):
    monkeypatch.setattr(gelu, "gate", stranger)
    with pytest.raises(TypeError, match="expected a function without free variables"):
        load_again("feed_forward")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gelu-tanh", {"gelu": "tanh"}),
        ("positions-interleaved", {"positions": "interleaved"}),
        ("layer-norm-epsilon-1e-6", {"layer_norm_epsilon": 1e-6}),
        ("layer-norm-epsilon-1e-12", {"layer_norm_epsilon": 1e-12}),
    ],
)
def test_a_fault_that_is_an_option_of_the_model_computes_what_the_option_does(name, change):
    params, batch, _ = drawn(TINY)
    expected = golden.compute(dataclasses.replace(TINY, **change), params, batch)
    with CATALOGUE[name].applied():
        found = golden.compute(TINY, params, batch)
    assert differences(found, expected) == {}


# Every fault shows, where it should.


SECTIONS = {
    "loss": ("loss",),
    "gradients": ("activation_gradients/", "gradients/"),
    "optimiser": ("adam/", "adamw/", "clipped/"),
    "decoding": ("decode/", "schedule/", "ties/"),
    "guidance": ("guidance/",),
    "samplers": ("samplers/",),
}


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in WITHOUT_ARRAYS])
def test_a_fault_changes_golden_vectors_and_first_those_of_its_stage(name, first_in_tiny):
    fault = CATALOGUE[name]
    first, _ = first_in_tiny[name]
    if name in OTHER_MODELS:
        model = dataclasses.replace(TINY, **OTHER_MODELS[name])
        first, _ = first_difference(fault, model, *drawn(model))
    stage = next(stage for stage, entries in STAGES.items() if fault in entries)
    assert first, (
        f"{name} changes nothing in golden vectors: name a model that shows it in OTHER_MODELS, or "
        "list it in WITHOUT_ARRAYS and write a test that shows it"
    )
    assert first.startswith(SECTIONS.get(stage, ("activations/",))), (
        f"{name} shows first in {first}, which is not of its stage, {stage}"
    )


@every_fault
def test_a_fault_keeps_float32(name):
    model = tiny_of(CATALOGUE[name])
    params, batch, _ = drawn(model)
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), params)
    with CATALOGUE[name].applied():
        logits, _ = model.forward(params, batch["tokens"])
        value, grads = marref.loss_and_grads(model, params, **batch)
        if model is CLASSES:
            _, steps = marref.iterative_decode(
                model, params, labels=[1], guidance_scale=2.0, guidance="linear", return_steps=True
            )
            assert steps["confidence"].dtype == np.float32
        stepped, _ = marref.optim.step(
            params, grads, marref.optim.init(params), 0.01, weight_decay=0.1
        )
        clipped, _ = marref.optim.clip_by_global_norm(grads, 0.1)
    leaves = [leaf for tree in (grads, stepped, clipped) for leaf in trees.flatten(tree).values()]
    assert {array.dtype for array in (logits, value, *leaves)} == {np.dtype(np.float32)}


def test_the_tiny_golden_vectors_show_all_but_the_named_exceptions(first_in_tiny):
    hidden = {name for name, (first, _) in first_in_tiny.items() if not first}
    assert hidden == {*OTHER_MODELS, *WITHOUT_ARRAYS}


def test_ties_show_how_a_decoder_breaks_them():
    def masks():
        _, steps = marref.iterative_decode(
            *with_logits([0.0, 2.0, 1.0]), num_steps=4, schedule="linear", return_steps=True
        )
        return steps["mask"][:, 0].astype(int).tolist()

    assert masks() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    with CATALOGUE["decode-ties-to-higher-position"].applied():
        assert masks() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with CATALOGUE["decode-ties-together"].applied():
        assert masks() == [[0, 0, 0, 0]] * 4


def test_a_mirrored_mask_ratio_is_maskgit_s():
    with CATALOGUE["mask-ratio-mirrored"].applied():
        found = marref.sample_mask_ratio(np.random.default_rng(0), size=9)
    expected = marref.sample_mask_ratio(np.random.default_rng(0), "cosine", size=9)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mask-count-rounded-up", {0: 1, 0.01: 1, 0.41: 5, 0.49: 5, 1: 10}),
        ("mask-count-may-be-zero", {0: 0, 0.01: 0, 0.41: 4, 0.49: 5, 1: 10}),
    ],
)
def test_masked_positions_are_counted_as_the_fault_says(name, counts):
    tokens = np.ones((1, 10), int)
    with CATALOGUE[name].applied():
        for ratio, count in counts.items():
            masked, mask = marref.mask_tokens(tokens, ratio, np.random.default_rng(0))
            assert mask.sum() == (masked == 0).sum() == count


def test_drawn_counts_scatter_around_the_ratio():
    with CATALOGUE["mask-count-drawn"].applied():
        _, mask = marref.mask_tokens(np.ones((2000, 10), int), 0.3, np.random.default_rng(0))
    counts = mask.sum(axis=1)
    assert counts.mean() == pytest.approx(3.0, abs=0.1)
    assert counts.var() == pytest.approx(10 * 0.3 * 0.7, rel=0.1)


@pytest.mark.parametrize("name", sorted(fault.name for fault in OF_CLASSES))
def test_a_fault_of_classes_changes_nothing_in_a_model_without(name):
    params, batch, right = drawn(TINY)
    with CATALOGUE[name].applied():
        found = golden.compute(TINY, params, batch)
    for name, array in right.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_edifice_s_table_makes_logits_that_ignore_the_tokens():
    params, batch, _ = drawn(TINY)
    with CATALOGUE["embedding-fixed-ramp"].applied():
        logits = TINY(params, batch["tokens"])
    np.testing.assert_allclose(logits[1:], logits[:1].repeat(len(logits) - 1, 0), atol=1e-12)


# The gradients of a faulty forward pass are the derivatives of that forward pass.

SMALL = marref.build(
    vocab_size=5, embed_dim=4, num_layers=1, num_heads=2, seq_len=3, layer_norm_epsilon=1e-3
)


TWO_BLOCKS = dataclasses.replace(SMALL, num_layers=2)


@pytest.mark.parametrize(
    "name",
    [
        fault.name
        for stage, entries in STAGES.items()
        if stage not in {"gradients", "optimiser", "decoding", "guidance", "samplers", "masking"}
        for fault in entries
    ],
)
def test_gradients_under_a_fault_are_the_derivatives_of_the_faulty_loss(name):
    model = TWO_BLOCKS if name.startswith("block-") else SMALL
    if CATALOGUE[name] in OF_CLASSES:
        model = dataclasses.replace(SMALL, num_classes=2)
    labels = None if model.num_classes is None else [1, 2]
    rng = np.random.default_rng(3)
    params = strategies.random_params(model, rng, std=0.7)
    targets = rng.integers(model.vocab_size, size=(2, 3))
    mask = np.array([[1, 1, 0], [0, 1, 0]])
    tokens = np.where(mask, 0, targets)

    def loss_of(moved):
        return marref.mar_loss(model.forward(moved, tokens, labels=labels)[0], targets, mask)

    with CATALOGUE[name].applied():
        value, grads = marref.loss_and_grads(model, params, tokens, targets, mask, labels=labels)
        assert float(value) == pytest.approx(float(loss_of(params)), rel=1e-12)
        errors = marref.check_gradients(
            loss_of, params, grads, method="central", max_entries=3, rng=rng
        )
    # Guards that are no derivatives: the maximum in the softmax counts as a constant.
    bound = 1e-4 if name == "attention-softmax-sum-plus-1e-5" else 1e-6
    assert max(errors.values()) < bound, (
        f"{name} owes the derivative of its forward pass; errors by parameter: {errors}"
    )


def test_hidden_masks_weigh_the_same_where_nothing_else_is_seen():
    params = strategies.random_params(SMALL, np.random.default_rng(3), std=0.7)
    tokens, targets, mask = np.zeros((1, 3), int), np.array([[1, 2, 3]]), np.ones((1, 3), int)

    def loss_of(moved):
        return marref.mar_loss(SMALL.forward(moved, tokens)[0], targets, mask)

    with CATALOGUE["attention-mask-keys-hidden"].applied():
        _, cache = SMALL.forward(params, tokens)
        _, grads = marref.loss_and_grads(SMALL, params, tokens, targets, mask)
        errors = marref.check_gradients(loss_of, params, grads)
        decoded_tokens = marref.iterative_decode(SMALL, params)
    np.testing.assert_allclose(cache["blocks"][0]["attention"]["weights"], 1 / 3, rtol=1e-15)
    assert max(errors.values()) < 1e-12
    assert (decoded_tokens > 0).all()


# Every fault is caught: marref's own witnesses, in fast.


def logits_of_pytorch():
    for name in NAMES:
        file = read_golden(name)
        model, params = golden_model(file)
        for logits in (model(params, file["tokens"]), model.forward(params, file["tokens"])[0]):
            assert_close({"logits": logits}, {"logits": file["logits"]})


def gradients_of_pytorch():
    for name in NAMES:
        file = read_golden(name)
        model, params = golden_model(file)
        batch = [file[key] for key in ("tokens", "targets", "mask")]
        value, grads = marref.loss_and_grads(model, params, *batch)
        assert_close({"loss": value}, {"loss": file["loss"]})
        assert_gradients_close(trees.flatten(grads), leaves_of(file, "gradients"))


def optimisers_of_pytorch():
    file = read_golden(NAMES[0])
    training = decoded(file["training"])
    for kind in ("adam", "adamw", "clipped"):
        model, params = golden_model(file)
        batch = [file[key] for key in ("tokens", "targets", "mask")]
        state = marref.optim.init(params)
        for _ in range(training["steps"]):
            _, grads = marref.loss_and_grads(model, params, *batch)
            grads = hold_key_biases(grads)
            if kind == "clipped":
                grads, _ = marref.optim.clip_by_global_norm(grads, training["max_norm"])
            weight_decay = training["weight_decay"] if kind == "adamw" else 0.0
            params, state = marref.optim.step(
                params, grads, state, training["learning_rate"], weight_decay=weight_decay
            )
        assert_close(trees.flatten(params), leaves_of(file, kind))


def layer_norm_of_small_numbers():
    """Against the oracle, where the variance is around epsilon."""
    rng = np.random.default_rng(0)
    params = {"scale": rng.normal(size=5), "bias": rng.normal(size=5)}
    for size in (1e-4, 1e-3, 1e-2):
        x = size * rng.normal(size=5)
        y, _ = layer_norm.forward(params, x[np.newaxis], 1e-5)
        expected = oracle.layer_norm(oracle.exact(params), oracle.exact(x), mpmath.mpf(1e-5))
        assert_close({"y": y[0]}, {"y": np.array(expected, np.float64)})


def own_gradient_check():
    for row in self_check._check_loss(np.random.default_rng(0)):
        assert row.passed, row
    rng = np.random.default_rng(3)
    params = strategies.random_params(SMALL, rng, std=0.7)
    tokens, targets, mask = [[0, 0, 3]], [[1, 2, 3]], [[1, 1, 0]]
    _, grads = marref.loss_and_grads(SMALL, params, tokens, targets, mask)
    errors = marref.check_gradients(
        lambda moved: marref.mar_loss(SMALL.forward(moved, tokens)[0], targets, mask),
        params,
        grads,
        max_entries=20,
        rng=rng,
    )
    assert max(errors.values()) <= self_check.BOUNDS["complex-step"], errors


def reveal_counts_that_are_known():
    cosine, linear = (marref.schedules.SCHEDULES[name] for name in ("cosine", "linear"))
    assert cosine(256, 8).tolist() == [5, 15, 24, 31, 39, 45, 48, 49]
    assert 256 - cosine(256, 12)[:8].sum() == 128
    assert cosine(5, 5).tolist() == [1] * 5
    assert linear(10, 4).tolist() == [2, 3, 2, 3]


def decoding_of_the_oracle():
    rng = np.random.default_rng(1)
    model = marref.build(5, embed_dim=6, num_layers=1, num_heads=2, seq_len=6, dropout=0.0)
    params = strategies.random_params(model, rng, std=1.0)
    equal = with_logits([0.0, 2.0, 1.0], seq_len=4)
    cases = [
        (model, params, [0, 0, 3, 0, 0, 0], {"temperature": 0.5, "schedule": "linear"}),
        (model, params, [0] * 6, {"temperature": 2.0, "schedule": "cosine"}),
        (
            *with_logits([5.0, 1.0, 0.0], seq_len=3),
            [0] * 3,
            {"temperature": 1.0, "schedule": "linear"},
        ),
        (*equal, [0] * 4, {"temperature": 1.0, "schedule": "cosine"}),
    ]
    for network, leaves, start, options in cases:
        _, steps = marref.iterative_decode(
            network, leaves, tokens=[start], num_steps=4, return_steps=True, **options
        )

        def logits_of(tokens, network=network, leaves=leaves):
            return oracle.exact(network(leaves, np.array([tokens]))[0])

        expected = oracle.decode(logits_of, start, num_steps=4, **options)
        assert len(expected) == len(steps["mask"])
        for step, (tokens, mask, confidence) in enumerate(expected):
            assert steps["tokens"][step, 0].tolist() == tokens
            assert steps["mask"][step, 0].tolist() == mask
            assert_close(
                {"confidence": steps["confidence"][step, 0]},
                {"confidence": np.array(confidence, np.float64)},
            )


def masking_of_the_specification():
    uniform = np.random.default_rng(0).random(20_000)
    ratios = marref.sample_mask_ratio(np.random.default_rng(0), size=20_000)
    np.testing.assert_allclose(ratios, 1 - np.cos(np.pi * uniform / 2), atol=1e-12)
    assert ratios.mean() == pytest.approx(1 - 2 / np.pi, abs=0.01)
    for ratio, count in {0.0: 1, 0.01: 1, 0.41: 4, 0.49: 5, 1.0: 10}.items():
        _, mask = marref.mask_tokens(np.ones((3, 10), int), ratio, np.random.default_rng(0))
        assert mask.sum(axis=1).tolist() == [count] * 3


def classes_of_the_oracle():
    model = dataclasses.replace(SMALL, num_classes=2)
    params = strategies.random_params(model, np.random.default_rng(3), std=0.7)
    tokens, labels = np.array([[0, 2, 3], [0, 1, 0]]), [1, 2]
    options = {"num_heads": 2, "gelu": "erf", "positions": "concatenated", "epsilon": 1e-3}
    expected = np.array(oracle.forward(oracle.exact(params), tokens, labels, **options), float)
    assert_close({"logits": model(params, tokens, labels)}, {"logits": expected})


def guidance_of_the_oracle():
    rng = np.random.default_rng(0)
    of_class, of_none = rng.normal(size=(2, 3, 5))
    scale = np.array([0.0, 1.0, 3.0])
    rows = zip(*map(oracle.exact, (of_class, of_none, scale)), strict=True)
    expected = np.array([oracle.guided(*row) for row in rows], float)
    found = marref.decoding.guide(of_class, of_none, scale)
    assert_close({"logits": found}, {"logits": expected})
    rule = decoding_rule(guidance_scale=3.0, guidance="linear")
    for masked in (4, 5):
        left = np.array(oracle.masked_after_steps(masked, 3, "cosine"))
        expected = np.array(oracle.guidance_scales(masked, 5, 3, "cosine", 3), float)
        found = marref.decoding.scale_at(1.0 - left / 5, rule)
        assert_close({"scale": found}, {"scale": expected})


@functools.cache
def steps_of_the_port():
    """Each sampler of the shipped file, and the steps of a port in plain Python."""
    arrays, metadata = files.load(golden.shipped("tiny"))
    given = {name: of_sampler(arrays, name) for name in metadata["samplers"]}
    return [
        (name, options, given[name], port_of(given[name], options))
        for name, options in metadata["samplers"].items()
    ]


def samplers_of_the_port():
    for name, options, given, expected in steps_of_the_port():
        rule = samplers.rule_of(options)
        drawn = samplers.draw(name, rule, given["start"].shape)
        logits = given["steps/logits"]
        found = samplers.run(rule, given["start"], drawn, lambda step, _, z=logits: z[step])
        for key, right in expected.items():
            array = drawn["noise"] if key == "steps/noise" else found[key.removeprefix("steps/")]
            np.testing.assert_allclose(array, right, rtol=1e-12, atol=1e-13)


WITNESSES = (
    classes_of_the_oracle,
    guidance_of_the_oracle,
    logits_of_pytorch,
    layer_norm_of_small_numbers,
    gradients_of_pytorch,
    reveal_counts_that_are_known,
    decoding_of_the_oracle,
    masking_of_the_specification,
    optimisers_of_pytorch,
    own_gradient_check,
    samplers_of_the_port,
)


@pytest.mark.parametrize("witness", WITNESSES, ids=lambda witness: witness.__name__)
def test_no_witness_accuses_marref(witness):
    witness()


@every_fault
def test_a_fault_is_caught_by_a_witness(name):
    def accuses(witness):
        try:
            witness()
        except AssertionError:
            return True
        return False

    of_samplers = CATALOGUE[name] in STAGES["samplers"]
    witnesses = reversed(WITNESSES) if of_samplers else WITNESSES
    with CATALOGUE[name].applied(), np.errstate(all="ignore"):
        caught = any(accuses(witness) for witness in witnesses)
    assert caught, f"{name} fails no witness: add one to WITNESSES that it fails and marref passes"


@pytest.mark.parametrize("name", [fault.name for fault in STAGES["gradients"]])
def test_a_fault_of_the_backward_fails_the_gradient_check(name):
    with CATALOGUE[name].applied(), pytest.raises(AssertionError):
        own_gradient_check()


# The page.


def test_the_page_of_classic_mistakes_is_that_of_the_catalogue(first_in_tiny):
    text = MISTAKES.read_text("utf-8").partition("## Continuous MAR")[0]
    assert text == page(first_in_tiny) + "\n", (
        "docs/mistakes.md is not that of the catalogue: "
        "run python -m marref.verify.faults > docs/mistakes.md"
    )
