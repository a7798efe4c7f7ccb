"""The live decoder: its JavaScript computes what marref does, and its page does what it says."""

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr

import marref
from marref import decoding, demo, files, schedules
from marref.decoding import grid
from marref.teach import watch
from marref.verify import golden
from marref.verify.comparison import Golden, compare

NODE = shutil.which("node")
HARNESS = Path(__file__).with_name("watch_in_node.js")
DEFAULTS = {
    "temperature": 1.0,
    "schedule": "cosine",
    "order": "confidence",
    "choice_temperature": 0.0,
    "exclude_mask_token": True,
}
MODELS = {
    "shipped": {},
    "otherwise": {
        "gelu": "tanh",
        "positions": "interleaved",
        "layer_norm_epsilon": 1e-3,
        "num_classes": 3,
        "seq_len": 9,
    },
}
DRAWN = ("uniforms", "order_uniforms", "noise")
KEYS = ("score", "count", "revealed", "tokens", "mask", "confidence")
OFFERED = (
    "confidence",
    "gumbel",
    "margin",
    "entropy",
    "random",
    "left-to-right",
    "halton",
    "threshold",
)

in_node = pytest.mark.skipif(NODE is None, reason="needs node, to run the page's JavaScript")


def node(jobs, model=None, params=None):
    """Let Node do jobs, and return what it answers to each; null is NaN or an infinity."""
    scripts = [watch.PAGE / name for name in ("mar.js", "decoder.js")]
    packed = None if model is None else watch.packed(model, params)
    request = json.dumps({"model": packed, "jobs": jobs}, allow_nan=False)
    done = subprocess.run(
        [NODE, HARNESS, *scripts], input=request, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers(array):
    """What JSON can hold of an array: null where it is no number."""
    return None if array is None else [x if math.isfinite(x) else None for x in array.tolist()]


@pytest.fixture(scope="module", params=MODELS)
def vectors(request):
    """Golden vectors of a small model: those that ship, and others in their likeness."""
    if request.param == "shipped":
        return Golden(*files.load(golden.shipped("tiny")))
    model = dataclasses.replace(golden.PRESETS["tiny"], **MODELS[request.param])
    return Golden(*golden.make(model, seed=3))


@in_node
def test_compare_accepts_every_activation_as_float32(vectors):
    labels = vectors.batch.get("labels", np.full(golden.BATCH, -1)).tolist()
    jobs = [
        {"do": "forward", "tokens": tokens, **({"label": label} if label >= 0 else {})}
        for tokens, label in zip(vectors.batch["tokens"].tolist(), labels, strict=True)
    ]
    answers = node(jobs, vectors.model, vectors.params)
    names = [f"activations/{name}" for name in answers[0]]
    assert set(names) == {name for name in vectors.arrays if name.startswith("activations/")}
    arrays = {
        name: np.array([answer[name.removeprefix("activations/")] for answer in answers])
        .reshape(vectors.arrays[name].shape)
        .astype(np.float32)
        for name in names
    }
    compared = compare(vectors, arrays, "float32")
    assert compared.agrees, compared.as_table()


def compared_decoders(vectors, settings, params=None):
    """Let Node decode as golden vectors did, with their numbers for chance, and compare."""
    jobs = []
    for prefix, options in settings.items():
        options = {**DEFAULTS, **options}
        scale = options.pop("guidance_scale", 1)
        steps = {key: vectors.arrays.get(f"{prefix}/steps/{key}") for key in DRAWN}
        noise = steps["order_uniforms"] if steps["noise"] is None else steps["noise"]
        for row, tokens in enumerate(vectors.arrays[f"{prefix}/start"].tolist()):
            job = {"do": "decode", "tokens": tokens, "rule": options, "guidance_scale": scale}
            if f"{prefix}/labels" in vectors.arrays:
                job["label"] = int(vectors.arrays[f"{prefix}/labels"][row])
            if steps["uniforms"] is not None:
                job["drawn"] = drawn_for(row, steps["uniforms"], noise)
            jobs.append(job)
    answers = iter(node(jobs, vectors.model, vectors.params if params is None else params))
    arrays = {}
    for prefix in settings:
        rows = [next(answers) for _ in vectors.arrays[f"{prefix}/start"]]
        arrays |= of_rows(vectors, prefix, rows)
    compared = compare(vectors, arrays, "float32")
    assert compared.agrees, compared.as_table()
    return [row.name for row in compared.rows if row.verdict == "undecided"]


@pytest.fixture(scope="module")
def demo_model():
    """The demo's model with parameters drawn so wide that nothing is nearly a tie."""
    model = demo.DEFAULT.config.resolved(demo.digits()[0]).model(18, demo.NUM_CLASSES)
    return model, model.init(np.random.default_rng(5), dtype=np.float32, std=0.3)


def drawn_for(row, uniforms, noise):
    """The numbers of one row, a step after the other."""
    return [
        {
            "uniforms": numbers(uniforms[k, row]),
            "noise": noise if noise is None else numbers(noise[k, row]),
        }
        for k in range(len(uniforms))
    ]


def of_rows(vectors, prefix, rows):
    """Name what Node decoded, the rows of a setting together, as golden vectors do."""
    found = {}
    for key in KEYS:
        name = f"{prefix}/steps/{key}"
        if name not in vectors.arrays:
            continue
        expected = vectors.arrays[name]
        # A row that is done stays as it is while others go on.
        padded = [steps + [steps[-1]] * (len(expected) - len(steps)) for steps in rows]
        array = np.array([[step[key] for step in steps] for steps in padded], float).swapaxes(0, 1)
        if key == "score":
            array[np.isnan(array)] = -np.inf
        dtype = np.float32 if expected.dtype.kind == "f" else expected.dtype
        found[name] = array.astype(dtype)
    return {**found, f"{prefix}/tokens": found[f"{prefix}/steps/tokens"][-1]}


@in_node
def test_compare_accepts_the_decoder_token_for_token(vectors):
    settings = {f"decode/{name}": options for name, options in golden.DECODINGS.items()}
    if vectors.model.num_classes is not None:
        settings |= {f"guidance/{name}": golden.GUIDANCE[name] for name in ("class", "constant")}
    assert compared_decoders(vectors, settings) == []


@in_node
def test_of_equals_the_lower_position_and_the_lower_id_come_first(vectors):
    settings = {f"ties/{name}": options for name, options in golden.TIES.items()}
    bias = np.zeros(vectors.model.vocab_size)
    bias[:2] = 400.0, 200.0
    head = {"kernel": np.zeros_like(vectors.params["head"]["kernel"]), "bias": bias}
    assert compared_decoders(vectors, settings, {**vectors.params, "head": head}) == []


@in_node
def test_with_the_numbers_of_chance_the_decoder_draws_the_tokens_of_the_golden_samplers(vectors):
    settings = {
        f"samplers/{name}": options
        for name, options in vectors.metadata["samplers"].items()
        if name in OFFERED
    }
    assert len(settings) >= len(OFFERED) - 1  # 5 positions are no square grid for halton
    assert compared_decoders(vectors, settings) == []


@in_node
def test_a_model_like_the_demos_decodes_as_marref_does_from_the_numbers_that_it_drew(demo_model):
    model, params = demo_model
    jobs, expected = [], []
    for order in decoding.ORDERS:
        noisy = {"choice_temperature": 4.5} if order == "confidence" else {}
        rule = {"num_steps": 7, "temperature": 0.8, "order": order, "schedule": "linear", **noisy}
        _, steps = marref.iterative_decode(
            model,
            params,
            labels=[7],
            guidance_scale=1.5,
            rng=np.random.default_rng(5),
            return_steps=True,
            **rule,
        )
        expected.append(steps)
        drawn = drawn_for(0, steps["uniforms"], steps.get("noise"))
        job = {"do": "decode", "tokens": [0] * model.seq_len, "drawn": drawn}
        jobs.append({**job, "label": 7, "guidance_scale": 1.5, "rule": {**DEFAULTS, **rule}})
    for found, steps in zip(node(jobs, model, params), expected, strict=True):
        assert [step["tokens"] for step in found] == steps["tokens"][:, 0].tolist()
        assert [step["revealed"] for step in found] == steps["revealed"][:, 0].tolist()
        confidence = np.array([step["confidence"] for step in found])
        np.testing.assert_allclose(confidence, steps["confidence"][:, 0], atol=1e-5)


@in_node
def test_reveal_counts_are_those_of_the_schedules():
    asked = [
        {"do": "schedule", "name": name, "num_masked": masked, "num_steps": steps}
        for name in ("cosine", "linear")
        for masked in (*range(1, 70), 256, 784)
        for steps in (1, 2, 3, 6, 8, 9, 12, 33, 64, 256)
    ]
    for job, counts in zip(asked, node(asked), strict=True):
        expected = schedules.SCHEDULES[job["name"]](job["num_masked"], job["num_steps"])
        assert counts == expected.tolist(), job


@in_node
def test_the_normal_distribution_keeps_the_digits_of_its_tails():
    x = np.linspace(-12, 12, 4801)
    (found,) = node([{"do": "normal_distribution", "x": x.tolist()}])
    np.testing.assert_allclose(found, ndtr(x), rtol=1e-12)


@in_node
def test_halton_visits_a_grid_in_marrefs_order():
    jobs = [{"do": "halton", "length": side * side} for side in range(1, 29)]
    for job, order in zip(jobs, node(jobs), strict=True):
        assert order == grid.halton(job["length"]).tolist()


@in_node
def test_uniform_numbers_are_uniform_and_depend_on_seed_step_and_purpose_alone():
    asked = {"do": "uniforms", "seed": 0, "step": 1, "purpose": 0, "length": 4000}
    others = [{**asked, name: asked[name] + 1} for name in ("seed", "step", "purpose")]
    first, again, *rest = (np.array(answer) for answer in node([asked, asked, *others]))
    assert (first == again).all()
    for drawn in (first, *rest):
        assert ((drawn >= 0) & (drawn < 1)).all()
        assert np.abs(np.bincount((drawn * 10).astype(int)) - 400).max() < 80  # 4 of 19
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
    for drawn in rest:
        assert abs(np.corrcoef(first, drawn)[0, 1]) < 0.06
