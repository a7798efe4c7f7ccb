"""The samplers of the golden vectors: a port in plain Python agrees, and mistakes are named."""

import dataclasses
import json

import numpy as np
import pytest

import marref
from benchmarks.ports import sampler
from marref import decoding, files, trees
from marref.verify import comparison, golden, samplers
from marref.verify.comparison import Golden, compare
from marref.verify.diagnosis import diagnose
from marref.verify.faults import CATALOGUE, STAGES, page
from marref.verify.search import Search

TINY = golden.PRESETS["tiny"]
MODELS = [
    {},
    {"seq_len": 9, "vocab_size": 5},
    {"seq_len": 16, "vocab_size": 4, "num_classes": 2},
    {"seq_len": 2, "vocab_size": 2},
]

every_sampler = pytest.mark.parametrize("name", samplers.settings(TINY))


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


def of_sampler(arrays, name):
    """The arrays of one sampler, by the rest of their names."""
    prefix = f"samplers/{name}/"
    return {
        full.removeprefix(prefix): array
        for full, array in arrays.items()
        if full.startswith(prefix)
    }


def port_of(arrays, options):
    """What the port computes of a sampler's numbers and logits: its steps, rows along axis 1."""
    drawn = {key[6:]: array for key, array in arrays.items() if key.endswith("uniforms")}
    rows = []
    for row, start in enumerate(arrays["start"]):
        numbers = {key: array[:, row].tolist() for key, array in drawn.items()}
        logits = arrays["steps/logits"][:, row].tolist()
        of_row = sampler.sample(options, start.tolist(), numbers, lambda k, _, z=logits: z[k])
        rows.append({f"steps/{key}": np.array(steps) for key, steps in of_row.items()})
    return {key: np.stack([row[key] for row in rows], axis=1) for key in rows[0]}


@pytest.mark.parametrize("config", MODELS, ids=str)
def test_a_port_in_plain_python_takes_the_same_steps(config):
    arrays, metadata = golden.make(dataclasses.replace(TINY, **config), seed=len(config))
    for name, options in json.loads(json.dumps(metadata["samplers"])).items():
        right = of_sampler(arrays, name)
        for key, array in port_of(right, options).items():
            assert (array.dtype.kind == "f") == (right[key].dtype.kind == "f")
            np.testing.assert_allclose(
                array, right[key], rtol=1e-12, atol=1e-13, err_msg=f"{name} {key}"
            )


@every_sampler
def test_the_decoder_takes_these_steps_if_it_draws_these_numbers(vectors, monkeypatch, name):
    arrays = of_sampler(vectors.arrays, name)
    rule = samplers.rule_of(samplers.settings(TINY)[name])
    drawn = {key: arrays.get(f"steps/{key}") for key in ("uniforms", "noise", "remask_uniforms")}
    if rule.order == "random":
        drawn["noise"] = arrays["steps/order_uniforms"]
    count = iter(range(100))

    def draw(rule, view, rng):
        step = next(count)
        return decoding.Chance(
            *(None if x is None else x[min(step, len(x) - 1)] for x in drawn.values())
        )

    monkeypatch.setattr(decoding.Chance, "draw", draw)
    params = vectors.params
    if name == "certain":
        params = {**params, "head": golden._saturated(params["head"], 1000.0)}
    options = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    tokens, steps = marref.decoding.iterative_decode(
        TINY,
        params,
        tokens=arrays["start"],
        rng=np.random.default_rng(0),
        return_steps=True,
        **options,
    )
    num_steps = min(len(steps["mask"]), len(arrays["steps/mask"]))
    for key in ("score", "count", "revealed", "taken_back", "replaced", "tokens", "mask"):
        np.testing.assert_allclose(
            steps[key][:num_steps], arrays[f"steps/{key}"][:num_steps], rtol=1e-9, err_msg=key
        )
    assert not arrays["steps/revealed"][num_steps:].any(), "what is complete stays as it is"
    np.testing.assert_array_equal(arrays["tokens"], arrays["steps/tokens"][-1])
    if len(steps["mask"]) == num_steps:
        np.testing.assert_array_equal(arrays["tokens"], tokens)


def test_every_rule_has_a_sampler():
    square = dataclasses.replace(TINY, seq_len=16)
    rules = [samplers.rule_of(options) for options in samplers.settings(square).values()]
    assert {rule.order for rule in rules} == set(decoding.ORDERS)
    for key, kinds in (("reveal", decoding.REVEALS), ("remask", decoding.REMASKS)):
        found = {type(getattr(rule, key)) for rule in rules} - {type(None)}
        assert found == set(kinds.values())
    plain = samplers.rule_of({"num_steps": 3})
    for field in dataclasses.fields(plain):
        if field.name not in {*SHARED, "reveal", "remask"}:
            values = {str(getattr(rule, field.name)) for rule in rules}
            assert values - {str(getattr(plain, field.name))}, field.name


SHARED = {"mask_token_id", "schedule", "exclude_mask_token", "guidance_scale", "guidance"}
"""What other sections are about."""


def test_a_length_that_is_no_square_has_no_halton():
    assert "halton" not in samplers.settings(TINY)
    assert "halton" in samplers.settings(golden.PRESETS["small"])


@pytest.mark.parametrize(
    ("precision", "prefixes"),
    [("float64", ("samplers/certain", "samplers/gumbel")), ("float32", "samplers/")],
)
def test_marref_s_own_samplers_agree_and_all_are_decided(vectors, precision, prefixes):
    names = dict.fromkeys(name for name in vectors.arrays if name.startswith(prefixes))
    params = trees.map_leaves(lambda leaf: leaf.astype(precision), vectors.params)
    arrays = {}
    for stage in vectors.stages(names, params).values():
        arrays |= stage()
    found = compare(vectors, arrays)
    assert found.agrees, found.first
    assert found.precision == precision
    assert not found.wider
    assert all(np.isfinite(row.budget) for row in found.rows)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("steps/revealed", lambda x: ~x),
        ("steps/count", lambda x: x + 1),
        ("steps/score", lambda x: np.where(np.isneginf(x), 0.0, x)),
        ("steps/score", lambda x: np.where(np.isneginf(x), np.inf, x)),
        ("steps/confidence", lambda x: x * 1.001),
        ("steps/noise", lambda x: x.astype(np.float32) * np.float32(1.001)),
    ],
)
def test_what_differs_in_a_sampler_differs(vectors, key, change):
    name = f"samplers/gumbel/{key}"
    found = compare(vectors, {name: change(vectors.arrays[name])}, "float32")
    assert [row.name for row in found.differing] == [name]


def test_scores_of_nothing_are_equal_and_have_no_size(vectors):
    name = "samplers/gumbel/steps/score"
    score = vectors.arrays[name]
    assert np.isneginf(score).any()
    (row,) = compare(vectors, {name: score}).rows
    assert (row.difference, row.verdict) == (0.0, "equal")
    assert 0 < row.budget < 1e-10


@pytest.mark.parametrize("offset", [0.0, 0.01])
def test_a_draw_near_the_bound_of_an_id_is_undecided(monkeypatch, offset):
    """The uniform number of a position is put where the cumulative probability passes on."""
    arrays, _ = golden.make(TINY)
    z = arrays["samplers/left-to-right/steps/logits"][0, 0, 0].copy()
    z[0] = -np.inf
    p = np.exp(z - z.max())
    bound = np.cumsum(p / p.sum())[3] + offset
    draw = samplers.draw

    def drawn(name, rule, shape):
        numbers = draw(name, rule, shape)
        numbers["uniforms"][0, 0, 0] = bound
        return numbers

    monkeypatch.setattr(samplers, "draw", drawn)
    made = Golden(*golden.make(TINY))
    name = "samplers/left-to-right/steps/tokens"
    (row,) = compare(made, {name: made.arrays[name] + 1}, "float32").rows
    assert row.verdict == ("undecided" if offset == 0 else "DIFFERS")


def test_a_threshold_near_a_confidence_is_undecided(monkeypatch):
    name = "samplers/threshold/steps/confidence"
    arrays, _ = golden.make(TINY)
    chosen = samplers.settings

    def nearly(model):
        found = chosen(model)
        found["threshold"]["reveal"]["probability"] = np.sort(arrays[name][0, 0])[-2] + 1e-8
        return found

    monkeypatch.setattr(samplers, "settings", nearly)
    made = Golden(*golden.make(TINY))
    for precision, verdict in (("float32", "undecided"), ("float64", "DIFFERS")):
        (row,) = compare(made, {name: made.arrays[name] * 2.0}, precision).rows
        assert row.verdict == verdict


def test_a_file_without_samplers_is_compared_as_before(vectors):
    arrays = {n: a for n, a in vectors.arrays.items() if not n.startswith("samplers/")}
    metadata = {k: v for k, v in vectors.metadata.items() if k != "samplers"}
    old = Golden(arrays, metadata)
    given = {n: arrays[n] for n in ("decode/hot/tokens", "activations/logits")}
    assert compare(old, given).agrees
    assert compare(vectors, given).agrees


def test_numbers_of_chance_stay_float64_in_a_float32_file():
    arrays, _ = golden.make(TINY, dtype=np.float32)
    drawn = {name for name, array in arrays.items() if array.dtype == np.float64}
    assert drawn == {name for name in arrays if golden.is_drawn(name)}
    assert {name.split("/")[-1] for name in drawn} == {
        "uniforms",
        "order_uniforms",
        "noise",
        "remask_uniforms",
    }
    assert arrays["samplers/gumbel/steps/order_uniforms"].max() > 1 - 2**-24


def test_many_logits_of_a_sampler_are_left_out(monkeypatch):
    monkeypatch.setattr(golden, "MOST_SAMPLER_LOGITS", 3 * 2 * TINY.seq_len * TINY.vocab_size)
    arrays, metadata = golden.make(TINY)
    kept = {name for name in metadata["samplers"] if f"samplers/{name}/steps/logits" in arrays}
    assert "top-k" in kept
    assert "p2" not in kept
    assert metadata["order"] == list(arrays)
    vectors = Golden(arrays, metadata)
    name = "samplers/p2/steps/confidence"
    assert compare(vectors, {name: arrays[name]}).agrees
    assert not compare(vectors, {name: arrays[name] * 1.01}).agrees


# Diagnosis.

# The samplers whose arrays are handed over, of which the first shows the mistake.
SHOWN = {
    "sampler-confidence-tempered": ["untempered"],
    "sampler-ids-not-excluded": ["excluded"],
    "sampler-excluded-after-softmax": ["excluded"],
    "sampler-cut-not-renormalised": ["min-p"],
    "sampler-top-p-without-crossing": ["top-p"],
    "sampler-top-p-one-more": ["top-p"],
    "sampler-top-p-untempered": ["top-p"],
    "sampler-top-p-after-top-k": ["top-k-top-p", "top-p"],
    "sampler-min-p-absolute": ["min-p"],
    "sampler-revealed-drawn-again": ["left-to-right"],
    "sampler-noise-a-step-late": ["gumbel"],
    "sampler-noise-not-annealed": ["gumbel"],
    "sampler-gumbel-float32": ["drawn-order"],
    "sampler-gumbel-clipped": ["gumbel"],
    "sampler-positions-by-log-score": ["drawn-order"],
    "sampler-entropy-reversed": ["entropy"],
    "sampler-entropy-in-bits": ["entropy-bounded"],
    "sampler-margin-of-logits": ["margin"],
    "sampler-blocks-look-ahead": ["blocks"],
    "sampler-blocks-with-all-steps": ["blocks"],
    "sampler-threshold-strict": ["certain"],
    "sampler-threshold-without-progress": ["threshold"],
    "sampler-quota-ignored": ["quota", "confidence"],
    "sampler-factor-over-r": ["factor"],
    "sampler-entropy-bound-on-all": ["entropy-bounded"],
    "sampler-independent-constant": ["independent"],
    "sampler-remdm-uncompensated": ["remdm-rescale"],
    "sampler-remdm-new-taken-back": ["remdm-cap"],
    "sampler-remdm-conf-sign": ["remdm-conf"],
    "sampler-p2-not-scored-again": ["p2"],
    "sampler-edit-of-known": ["edit"],
    "sampler-edit-without-bound": ["edit"],
}


def test_every_mistake_in_a_sampler_is_listed_here():
    assert list(SHOWN) == [fault.name for fault in STAGES["samplers"]]
    assert len(SHOWN) >= 15


@pytest.mark.parametrize("name", SHOWN)
def test_a_mistake_in_a_sampler_is_named_from_its_arrays(vectors, monkeypatch, name):
    monkeypatch.setattr(comparison, "_NUM_RUNS", 2)
    prefixes = tuple(f"samplers/{one}/" for one in SHOWN[name])
    names = [name for name in vectors.arrays if name.startswith(prefixes)]
    with CATALOGUE[name].applied(), np.errstate(all="ignore"):
        wrong = vectors.compute(dict.fromkeys(names))
    changed = page.differences(wrong, {key: vectors.arrays[key] for key in wrong})
    assert {key.split("/")[1] for key in changed} >= {SHOWN[name][0]}
    arrays = {
        key: array.astype(np.float32)
        if array.dtype.kind == "f" and not golden.is_drawn(key)
        else array
        for key, array in wrong.items()
    }
    diagnosis = diagnose(vectors, arrays, most_together=1)
    assert [[one.name for one in found.faults] for found in diagnosis.explanations] == [[name]]


def test_faults_of_samplers_are_tried_only_where_one_is_given(vectors):
    of_samplers = set(STAGES["samplers"])

    def candidates(name):
        arrays = {name: vectors.arrays[name] + 1.0}
        return set(Search(vectors, arrays, compare(vectors, arrays), lambda *_: None)._candidates())

    assert not of_samplers & candidates("activations/logits")
    assert not of_samplers & candidates("decode/hot/steps/confidence")
    assert of_samplers < candidates("samplers/top-k/steps/confidence")


def test_where_the_first_logits_are_right_the_forward_pass_is_not_suspected(vectors):
    arrays = {f"samplers/p2/{k}": a for k, a in of_sampler(vectors.arrays, "p2").items()}
    arrays["samplers/p2/steps/score"] = arrays["samplers/p2/steps/score"] * 1.5
    search = Search(vectors, arrays, compare(vectors, arrays), lambda *_: None)
    assert set(search._candidates()) == {*STAGES["decoding"], *STAGES["samplers"]}
    del arrays["samplers/p2/steps/logits"]
    search = Search(vectors, arrays, compare(vectors, arrays), lambda *_: None)
    assert set(search._candidates()) > set(STAGES["attention"])


def test_the_step_is_said_in_which_a_sampler_differs_first(vectors):
    arrays = {f"samplers/p2/{k}": a.copy() for k, a in of_sampler(vectors.arrays, "p2").items()}
    arrays["samplers/p2/steps/logits"][2:] *= 1.1
    arrays["samplers/p2/steps/revealed"][1, 0] ^= True
    arrays["samplers/p2/steps/mask"][1, 0] ^= True
    diagnosis = diagnose(vectors, arrays, most_together=1)
    assert diagnosis.comparison.first.name == "samplers/p2/steps/logits"
    hint = "your decoder, in samplers/p2, differs first in step 2, in mask"
    assert diagnosis.hints == (hint,)


def test_a_sampler_whose_logits_cannot_be_known_is_undecided(vectors):
    name = "samplers/p2/steps/logits"
    allowed = {name: np.inf}
    assert comparison._chooses_otherwise(TINY, "p2", vectors.arrays, allowed)
