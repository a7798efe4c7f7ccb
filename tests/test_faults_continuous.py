"""The fault catalogue of continuous MAR: every mistake shows, is the derivative, and is found."""

import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from marref import continuous, optim, trees
from marref.continuous import diffusion, training
from marref.training import State
from marref.verify import diagnose, faults, golden_continuous, measure, names, search
from marref.verify.comparison import Golden
from marref.verify.faults.continuous import CATALOGUE, SHARED, STAGES
from marref.verify.faults.page import differences, part_on_continuous

from .test_golden_continuous import port

TINY = golden_continuous.TINY
MISTAKES = Path(__file__).parents[1] / "docs" / "mistakes.md"
every_fault = pytest.mark.parametrize("name", CATALOGUE)

SECTIONS = {
    "masks": ("masking/",),
    "noise schedule": ("noise_schedule/", "activations/noisy", "loss/rows/bound"),
    "diffusion loss": ("loss", "activation_gradients/output"),
    "weight decay": ("adamw/",),
    "sampling": ("sampling/",),
}
BACKWARD = {"z-detached", "bound-not-detached"}
"""What is wrong in the gradients alone."""


@pytest.fixture(scope="module")
def vectors():
    return Golden(*golden_continuous.make(TINY))


def stages_of(vectors):
    return golden_continuous.stages(TINY, vectors.params, vectors.batch)


@pytest.fixture(scope="module")
def first_stages(vectors):
    """What each fault computes in the first stage in which it shows, and where that is."""
    found = {}
    for name, fault in CATALOGUE.items():
        with fault.applied():
            changing = {k: s for k, s in stages_of(vectors).items() if search.can_change(fault, k)}
            for key, stage in changing.items():
                wrong = stage()
                differing = differences(wrong, {n: vectors.arrays[n] for n in wrong})
                if differing:
                    found[name] = key, next(iter(differing.items())), wrong
                    break
    return found


def test_the_catalogue_is_apart_from_that_of_discrete_mar():
    assert len(CATALOGUE) >= 25
    assert not CATALOGUE.keys() & faults.CATALOGUE.keys()
    listed = faults.of_model(TINY)
    assert listed[: len(CATALOGUE)] == list(CATALOGUE.values())
    shared = {fault.name for fault in listed[len(CATALOGUE) :]}
    assert {"gelu-tanh", "layer-norm-epsilon-1e-5", "adam-decay-in-gradient"} <= shared
    assert not any(name.startswith(("attention", "embedding", "head")) for name in shared)


@every_fault
def test_a_fault_has_a_name_a_paragraph_and_patches_that_fit(name):
    fault = CATALOGUE[name]
    assert re.fullmatch(r"[a-z][a-z0-9.]*(-[a-z0-9.]+)*", name)
    assert fault.summary.endswith((".", ".)"))
    assert fault.summary == " ".join(fault.summary.split())
    for patch in fault.patches:
        parameters = inspect.signature(patch.seam.pristine).parameters.values()
        keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        values = [None] * (len(parameters) - len(keywords))
        inspect.signature(patch.function).bind(
            *([] if patch.replaces else [None]), *values, **keywords
        )
        assert patch.seam.function.__module__.startswith("marref.continuous") or (
            patch.seam.function in SHARED
        )


@every_fault
def test_a_fault_changes_golden_vectors_and_first_those_of_its_stage(name, first_stages):
    stage = next(stage for stage, entries in STAGES.items() if CATALOGUE[name] in entries)
    _, (first, _), _ = first_stages[name]
    expected = ("gradients/",) if name == "z-detached" else SECTIONS.get(stage, ("activations/",))
    assert first.startswith(expected)


def test_no_two_faults_compute_the_same_where_they_show(first_stages, vectors):
    """So that diagnosis, given what a stage computes, can tell which it is."""
    for name, (key, _, wrong) in first_stages.items():
        for other, (theirs, _, arrays) in first_stages.items():
            if theirs == key and other != name:
                assert any(
                    array.shape != arrays[n].shape
                    or measure.difference(array, arrays[n]) > 1e-9 * measure.largest(array)
                    for n, array in wrong.items()
                ), f"{name} and {other}"


def test_the_page_of_classic_mistakes_has_them(first_stages):
    first = {name: symptom for name, (_, symptom, _) in first_stages.items()}
    assert MISTAKES.read_text("utf-8").endswith("\n\n" + part_on_continuous(first)), (
        "docs/mistakes.md is not that of the catalogue: "
        "run python -m marref.verify.faults > docs/mistakes.md"
    )


IN_TRAINING = [
    fault.name
    for stage in ("tokens", "masks", "encoder and decoder", "diffusion network")
    for fault in STAGES[stage]
] + [fault.name for stage in ("noise schedule", "diffusion loss") for fault in STAGES[stage]]


@pytest.mark.parametrize("name", IN_TRAINING)
def test_the_gradient_of_a_fault_is_the_derivative_of_its_forward_pass(name, vectors):
    """Along one direction of all parameters, by a complex step; and float32 stays float32."""
    rng = np.random.default_rng(5)
    params, batch = vectors.params, vectors.batch
    given = batch["images"], batch["labels"], {**batch, "num_masked": int(batch["num_masked"])}
    direction = trees.map_leaves(lambda leaf: rng.normal(size=leaf.shape), params)
    moved = trees.map_leaves(lambda leaf, d: leaf + 1e-30j * d, params, direction)
    narrow = trees.map_leaves(lambda leaf: leaf.astype(np.float32), params)
    with CATALOGUE[name].applied():
        _, grads = continuous.loss_and_grads(TINY, params, *given)
        value, _ = continuous.loss_and_grads(TINY, moved, *given)
        of_float32 = continuous.loss_and_grads(TINY, narrow, *given)
    assert {of_float32[0].dtype, *(a.dtype for a in trees.flatten(of_float32[1]).values())} == {
        np.dtype(np.float32)
    }
    pairs = zip(trees.flatten(grads).values(), trees.flatten(direction).values(), strict=True)
    along = sum((leaf * d).sum() for leaf, d in pairs)
    is_derivative = abs(value.imag / 1e-30 - along) < 1e-11 * abs(along)
    assert is_derivative == (name not in BACKWARD)


def test_e_that_is_not_detached_has_the_gradient_of_the_whole_loss():
    rng = np.random.default_rng(0)
    steps, index = diffusion.process("cosine"), np.array([0, 0, 0, 1, 500, 999])
    clean = np.clip(2.0 * rng.normal(size=(6, 4)), -1.0, 1.0)
    noise = rng.normal(size=(6, 4))
    output = np.concatenate([noise + 0.3 * rng.normal(size=(6, 4)), rng.normal(size=(6, 4))], 1)

    def rows(moved):
        return np.add(*diffusion.loss_forward(steps, moved, clean, index, noise)[:2])

    with CATALOGUE["bound-not-detached"].applied():
        *_, cache = diffusion.loss_forward(steps, output, clean, index, noise)
    found = diffusion.loss_backward(cache, np.ones(6))
    for column in range(8):
        step = 1e-6 * np.eye(8)[column]
        expected = (rows(output + step) - rows(output - step)) / 2e-6
        np.testing.assert_allclose(found[:, column], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sampling-noise-in-the-last-step", "guidance-one-plus-scale"])
def test_a_fault_of_sampling_keeps_float32(name, vectors):
    narrow = trees.map_leaves(lambda leaf: leaf.astype(np.float32), vectors.params)
    options = {"num_steps": 2, "num_diffusion_steps": 2, "guidance_scale": 2.0}
    with CATALOGUE[name].applied():
        rng = np.random.default_rng(0)
        made = continuous.sample(TINY, narrow, [0, 1], rng, **options)
    assert made.dtype == np.float32


# Diagnosis.


def computed(vectors, fault, prefixes):
    """What marref computes with a fault, in float32: arrays whose names begin so."""
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), vectors.params)
    given = [name for name in vectors.arrays if name.startswith(prefixes)]
    with fault.applied():
        arrays = {}
        for stage in vectors.stages(dict.fromkeys(given), params).values():
            arrays |= stage()
    return {name: arrays[name] for name in given}


def named(found):
    return [[fault.name for fault in one.faults] for one in found.explanations]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("masked-count-rounded-down", ("masking/",)),
        ("gelu-tanh", ("activations/z", "loss")),
        ("bound-in-nats", ("loss",)),
        ("sampling-deviation-not-halved", ("activations/z", "sampling/class/")),
    ],
)
def test_diagnosis_names_the_fault(name, given, vectors):
    every = {fault.name: fault for fault in faults.of_model(TINY)}
    found = diagnose(vectors, computed(vectors, every[name], given), most_together=1)
    assert named(found) == [[name]]


def mistaken():
    """Mistakes as one makes them in PyTorch."""
    import torch

    from .torch_continuous import Published

    class SinesFirst(Published):
        def features(self, t):
            return torch.cat(super().features(t).chunk(2, dim=1)[::-1], dim=1)

    class TokensOnly(Published):
        def norm_tokens(self, h):
            size = self.model.buffer_size
            return torch.cat([h[:, :size], super().norm_tokens(h[:, size:])], dim=1)

    class NotDetached(Published):
        def bound(self, steps, e, v, clean, x, times):
            return steps.bound(e, v, clean, x, times)

    class Doubled(Published):
        """Which the catalogue does not have."""

        def z(self, *args):
            return self.saw("z", 2.0 * super().z(*args))

    return {
        "time-sines-first": SinesFirst,
        "token-norm-not-on-the-buffer": TokensOnly,
        "bound-not-detached": NotDetached,
        None: Doubled,
    }


@pytest.mark.parametrize(
    "name", ["time-sines-first", "token-norm-not-on-the-buffer", "bound-not-detached", None]
)
def test_mistakes_made_in_pytorch_are_found(name, vectors):
    torch = pytest.importorskip("torch")
    arrays = names.rename(vectors, port(vectors, torch.float32, mistaken()[name]), "mar").arrays
    found = diagnose(vectors, arrays, most_together=1)
    if name is None:
        assert found.comparison.first.name == "activations/z"
        assert found.explanations == ()
        assert found.hints[0].startswith("your activations/z is the golden array times 2")
    else:
        assert named(found) == [[name]]


def test_two_faults_together_are_found(vectors, monkeypatch):
    """Among those of their stage, which are soon tried."""
    monkeypatch.setattr(faults, "of_model", lambda model: list(STAGES["diffusion loss"]))
    together = CATALOGUE["bound-in-nats"], CATALOGUE["squared-error-summed"]
    with faults.applied(*together):
        mine = {n: a for n, a in stages_of(vectors)["loss"]().items() if n.startswith("loss/rows")}
    found = diagnose(vectors, mine, most_together=2)
    assert {fault.name for fault in found.explanations[0].faults} == {f.name for f in together}


def test_a_model_that_is_as_a_fault_makes_it_has_no_such_fault():
    """An epsilon that the model asks for is right, and the other one is the mistake."""
    model = dataclasses.replace(TINY, layer_norm_epsilon=1e-5)
    params, batch = golden_continuous.draw(TINY, 0)
    with CATALOGUE["transformer-epsilon-1e-5"].applied():
        found = golden_continuous.stages(TINY, params, batch)["activations/"]()
    expected = golden_continuous.stages(model, params, batch)["activations/"]()
    assert differences(found, expected) == {}


def test_the_public_functions_compute_with_a_fault():
    """They take the fast way, and the definition while a fault is applied."""
    params, batch = golden_continuous.draw(TINY, seed=0)
    state = State(params, optim.init(params), None)
    config = training.Config(1, batch_size=4, dtype="float64", average_decay=0.0)

    def computed():
        copy = State(*(trees.map_leaves(np.copy, part) for part in state[:2]), None)
        _, record = training.step(config, TINY, batch["images"], batch["labels"], copy)
        options = {"num_steps": 2, "num_diffusion_steps": 3}
        made = continuous.sample(TINY, params, [1], np.random.default_rng(1), **options)
        return record.bound, made

    right_bound, right = computed()
    with CATALOGUE["bound-in-nats"].applied():
        bound, _ = computed()
    assert bound == pytest.approx(right_bound * np.log(2.0), rel=1e-12)
    with CATALOGUE["sampling-variance-small"].applied():
        _, wrong = computed()
    assert np.abs(wrong - right).max() > 1e-6
    np.testing.assert_array_equal(computed()[1], right)
