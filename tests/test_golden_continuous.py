"""Golden vectors of continuous MAR, and comparison, with a port in PyTorch that is right."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from marref import cli, continuous, files, trees
from marref.continuous import diffusion, sampling, tokens
from marref.continuous.loss import masked_by
from marref.continuous.training import decayed
from marref.fast.optim import run_step
from marref.interop import mar
from marref.verify import compare, crosscheck, golden_continuous, names, rounding, trace_continuous
from marref.verify.comparison import Golden

TINY = golden_continuous.TINY
PAGE = Path(__file__).parents[1] / "docs" / "golden-continuous.md"


@pytest.fixture(scope="module")
def tiny():
    return golden_continuous.make(TINY)


@pytest.fixture(scope="module")
def vectors(tiny):
    return Golden(*tiny)


def draws_of(batch):
    return {**batch, "num_masked": int(batch["num_masked"])}


def test_golden_vectors_are_what_the_public_functions_compute(vectors):
    arrays, params, batch = vectors.arrays, vectors.params, vectors.batch
    value, grads, parts = continuous.loss_and_grads(
        TINY, params, batch["images"], batch["labels"], draws_of(batch), return_parts=True
    )
    assert arrays["loss"] == value
    np.testing.assert_array_equal(arrays["loss/rows/bound"], parts["rows"]["bound"])
    for name, leaf in trees.flatten(grads).items():
        np.testing.assert_array_equal(arrays[f"gradients/{name}"], leaf)
    for part in ("encoder_blocks", "decoder_blocks"):
        for block in grads[part]:
            block["attention"]["key"]["bias"][:] = 0.0
    stepped = trees.map_leaves(np.copy, params)
    options = dict(golden_continuous.OPTIMISERS["clipped"])
    rate = options.pop("learning_rate"), options.pop("epsilon")
    run_step(
        stepped,
        grads,
        continuous.training.optim.init(params),
        None,
        rate[0],
        decay=decayed(params, "published"),
        average_decay=0.0,
        **options,
    )
    for name, leaf in trees.flatten(stepped).items():
        np.testing.assert_allclose(arrays[f"clipped/1/{name}"], leaf, rtol=0, atol=1e-13)
    draws = {
        "orders": batch["orders"][:2],
        "start_noise": batch["start_noise"],
        "step_noise": batch["step_noise"][:5],
    }
    images = sampling.sample(
        TINY,
        params,
        batch["labels"][:2],
        draws=draws,
        num_steps=3,
        num_diffusion_steps=5,
        guidance_scale=3.0,
        guidance="linear",
    )
    np.testing.assert_array_equal(arrays["sampling/linear/images"], images)
    np.testing.assert_array_equal(
        tokens.to_images(arrays["sampling/linear/steps/tokens"][-1], 2, 2, 6), images
    )


def test_nothing_hides(tiny, vectors):
    arrays, metadata = tiny
    for name, array in arrays.items():
        if name.startswith("params/"):
            assert (array != 0).all(), name
        if name.startswith(("params/", "input/")) and array.dtype.kind == "f":
            np.testing.assert_array_equal(rounding.round_to(array, "bfloat16"), array)
        if name.startswith("activations/"):
            assert 0.05 < np.abs(array).max() < 20, name
    labels, dropped = arrays["input/labels"], arrays["input/label_dropped"]
    assert labels[0] == labels[2] not in (labels[1], labels[3])
    assert dropped.tolist() == [False, False, False, True]
    masked = arrays["masking/masked"]
    assert (masked.sum(axis=1) == arrays["input/num_masked"]).all()
    times = arrays["input/timesteps"][: masked.size][masked.ravel()]
    assert {0, 1, 500, 998, 999} <= set(times.tolist())
    clean = arrays["activations/tokens"][masked][times == 0]
    assert (clean < -0.999).any()
    assert (clean > 0.999).any()
    assert (np.abs(clean) < 0.999).any()
    for part, place in (("encoder", 1e-2), ("decoder", 2e-2)):
        first = "encoder_input" if part == "encoder" else "decoder_blocks.0.input"
        assert arrays[f"activations/{first}"].var(axis=-1).min() < place
    assert metadata["order"] == list(arrays)
    assert (arrays["sampling/unclipped/images"] != arrays["sampling/class/images"]).any()


def test_the_command_writes_what_is_made(tmp_path, tiny, capsys):
    path = tmp_path / "golden.npz"
    assert cli.main(["golden", str(path), "--continuous", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{path}: {len(tiny[0])} arrays of float32\n"
    arrays, metadata = files.load(path)
    assert metadata == json.loads(json.dumps(tiny[1]))
    assert metadata["model"] == "continuous"
    for name, array in tiny[0].items():
        expected = array.astype(np.float32) if array.dtype.kind == "f" else array
        np.testing.assert_array_equal(arrays[name], expected)
        if name.startswith("input/"):
            np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "small"], "--preset: of discrete MAR"),
        (["--params", "x.npz", "--names", "torch"], "--params, --names: of discrete MAR"),
        (["--config", '{"patch_size": 4}'], "image_size: received 6, expected a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, arguments, message):
    assert cli.main(["golden", str(tmp_path / "x.npz"), "--continuous", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_classes_has_golden_vectors_too():
    model = dataclasses.replace(TINY, num_classes=None, encoder_layers=1)
    arrays, metadata = golden_continuous.make(model)
    assert "input/labels" not in arrays
    assert list(metadata["sampling"]) == ["no-class"]
    given = {name: arrays[name] for name in ("activations/z", "loss")}
    assert compare(Golden(arrays, metadata), given).agrees


# The page.


def test_the_page_names_every_array_and_the_shape_of_every_activation(tiny):
    text = PAGE.read_text("utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (?:`\[)?([^|`]+?)(?:\]`)? \|", text, re.MULTILINE))
    patterns = {
        re.compile(re.sub(r"<\w+>", r"[^/.]+", name.replace(".", r"\."))): name for name in rows
    }
    sizes = {
        "batch": 4,
        "length": TINY.length,
        "token_dim": TINY.token_dim,
        "rows": 2 * 4 * 6,
        "num_heads": 2,
        "diffusion_dim": 8,
        "256": 256,
    }
    in_code = re.findall(r"^ +``([\w.<>]+)`` +\[", trace_continuous.passes.__doc__, re.MULTILINE)
    assert [name for name in rows if name in in_code] == in_code
    for name, array in tiny[0].items():
        short = name.removeprefix("activations/")
        if name.startswith("activations/"):
            (row,) = (row for pattern, row in patterns.items() if pattern.fullmatch(short))
            part = "encoder" if short.startswith("encoder") else "decoder"
            width = TINY.encoder_dim if part == "encoder" else TINY.decoder_dim
            own = {
                "places": TINY.buffer_size + (3 if part == "encoder" else TINY.length),
                "width": width,
                "hidden": 2 * width,
                "head_dim": width // 2,
                "encoder_dim": TINY.encoder_dim,
                "decoder_dim": TINY.decoder_dim,
            }
            assert array.shape == tuple({**sizes, **own}[axis] for axis in rows[row].split(", "))
        else:
            whole = re.sub(r"^((params|gradients|adamw/\d|clipped/\d)/).*", r"\1leaf", name)
            assert any(pattern.fullmatch(whole) for pattern in patterns), name


def test_the_page_names_every_member_of_the_metadata(tiny):
    text = PAGE.read_text("utf-8")
    assert [name for name in tiny[1] if f"`{name}`" not in text] == []


# A port in PyTorch.


def port(vectors, dtype, twin=None, settings=(), optimiser=None):
    """Compute golden arrays with PyTorch, by the published names where these have one."""
    torch = pytest.importorskip("torch")
    from .torch_continuous import Published

    batch = {
        name: torch.tensor(array, dtype=dtype if array.dtype.kind == "f" else None)
        for name, array in vectors.batch.items()
    }
    state = {
        name: torch.tensor(array, dtype=dtype, requires_grad=True)
        for name, array in mar.to_state_dict(vectors.params, TINY).items()
    }
    mine = (twin or Published)(TINY, state)
    clean = torch.tensor(tokens.from_images(vectors.batch["images"], 2), dtype=dtype)
    labels = torch.where(batch["label_dropped"], -1, batch["labels"])
    mask = torch.tensor(masked_by(vectors.batch["orders"], 6))

    def loss():
        return mine.loss(clean, labels, mask, batch["timesteps"], batch["noise"])

    value = loss()
    value.backward()
    # As the published code it computes all rows; golden are those of the masked tokens.
    rows = np.tile(mask.numpy().ravel(), 2)
    arrays = {
        name: array[rows] if "network" in name else array for name, array in mine.seen.items()
    }
    arrays["loss"] = value.detach().numpy()
    arrays |= {f"gradients/{name}": leaf.grad.numpy().copy() for name, leaf in state.items()}
    for schedule in diffusion.SCHEDULES:
        arrays |= tables(schedule, 1000) | tables(schedule, 5)
    for name in settings:
        arrays |= sampled(vectors, mine, batch, name)
    if optimiser:
        arrays |= stepped(state, loss, optimiser)
    return arrays


def tables(schedule, num_steps):
    from .torch_continuous import Steps

    found = Steps(schedule, None if num_steps == 1000 else diffusion.respace(num_steps)).tables
    names_of = {"log_variance_low": "low", "log_variance_high": "high"}
    return {
        f"noise_schedule/{schedule}/{num_steps}/{ours}": found[theirs].numpy()
        for ours, theirs in names_of.items()
    }


def sampled(vectors, mine, batch, name):
    import torch

    options = vectors.metadata["sampling"][name]
    found = mine.sample(
        batch["labels"][:2] if options["labels"] else None,
        batch["orders"][:2],
        batch["start_noise"],
        batch["step_noise"],
        *(vectors.arrays[f"sampling/{name}/{key}"].tolist() for key in ("counts", "scales")),
        options["clip"],
        options["temperature"],
        diffusion.respace(options["num_diffusion_steps"]),
    )
    assert isinstance(found, torch.Tensor)
    return {f"sampling/{name}/images": tokens.to_images(found.numpy(), 2, 2, 6)}


def stepped(state, loss, name):
    import torch

    options = dict(golden_continuous.OPTIMISERS[name])
    decays, others = [], []
    for leaf_name, leaf in state.items():
        to_decay = leaf.ndim > 1 and not leaf_name.startswith("diffloss")
        (decays if to_decay else others).append(leaf)
    optimiser = torch.optim.AdamW(
        [{"params": decays, "weight_decay": options["weight_decay"]}, {"params": others}],
        lr=options["learning_rate"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["epsilon"],
        weight_decay=0.0,
    )
    arrays = {}
    for step in golden_continuous.OPTIMISER_STEPS:
        optimiser.zero_grad()
        loss().backward()
        for leaf_name, leaf in state.items():
            if leaf_name.endswith("qkv.bias"):
                width = len(leaf) // 3
                leaf.grad[width : 2 * width] = 0.0
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_(state.values(), options["max_norm"])
        optimiser.step()
        for leaf_name, leaf in state.items():
            arrays[f"{name}/{step}/{leaf_name}"] = leaf.detach().numpy().copy()
    return arrays


@pytest.mark.parametrize(
    ("dtype", "settings", "optimiser"),
    [
        ("float64", ("unclipped",), None),
        ("float32", ("linear",), "clipped"),
    ],
)
def test_a_right_port_is_accused_of_nothing(vectors, dtype, settings, optimiser):
    torch = pytest.importorskip("torch")
    arrays = port(vectors, getattr(torch, dtype), settings=settings, optimiser=optimiser)
    renamed = names.rename(vectors, arrays, "mar")
    assert renamed.notes == ()
    num_trees = 3 if optimiser else 1
    assert len(renamed.arrays) == num_trees * len(TINY.parameter_shapes) + len(settings) + 23
    comparison = compare(vectors, renamed.arrays)
    assert comparison.differing == []
    assert comparison.precision == dtype
    assert not any(row.verdict == "undecided" for row in comparison.rows)


def test_names_that_are_not_known_are_said(vectors):
    z = vectors.arrays["activations/z"]
    renamed = names.rename(vectors, {"activations/z": z, "gradients/nets.0.weight": z})
    assert list(renamed.arrays) == ["activations/z"]
    assert renamed.notes == ("ignored, since their names are not known: gradients/nets.0.weight",)
    with pytest.raises(ValueError, match="names: received torch, expected mar"):
        names.rename(vectors, {"activations/z": z}, "torch")
    with pytest.raises(ValueError, match="activations/zz"):
        names.rename(vectors, {"activations/zz": z})


def test_a_function_is_called_with_parameters_and_all_inputs(vectors):
    def forward(params, inputs):
        masked = masked_by(inputs["orders"], int(inputs["num_masked"]))
        labels = np.where(inputs["label_dropped"], 3, inputs["labels"])
        clean = tokens.from_images(inputs["images"], 2)
        return {"activations/z": TINY.forward(params, clean, labels, masked)[0]}

    assert crosscheck(forward, vectors).agrees


def test_golden_vectors_that_lack_an_input_or_have_a_bad_config_are_refused(tiny):
    arrays, metadata = tiny
    with pytest.raises(ValueError, match="input/noise is missing"):
        Golden({n: a for n, a in arrays.items() if n != "input/noise"}, metadata)
    with pytest.raises(ValueError, match="golden: config"):
        Golden(arrays, {**metadata, "config": {"colour": 1}})


def test_tables_that_are_computed_in_other_ways_are_right(vectors):
    u = np.arange(1001) / 1000
    f = 0.5 + 0.5 * np.cos((u + 0.008) / 1.008 * np.pi)
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    bar = np.exp(np.cumsum(np.log1p(-beta)))
    low = np.log(beta[1:]) + np.log1p(-bar[:-1]) - np.log1p(-bar[1:])
    of_schedule = {
        "beta": beta,
        "alpha_bar": bar,
        "log_variance_low": np.append(low[0], low),
        "log_variance_high": np.log(beta),
    }
    named = {f"noise_schedule/cosine/1000/{name}": table for name, table in of_schedule.items()}
    assert compare(vectors, named).differing == []

    rows = np.tile(vectors.arrays["masking/masked"].ravel(), 2)
    times = vectors.batch["timesteps"][rows].astype(np.float32)
    frequencies = np.exp(-np.log(np.float32(10000)) * np.arange(128, dtype=np.float32) / 128)
    angles = times[:, np.newaxis] * frequencies
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    comparison = compare(vectors, {"activations/network.time_features": features})
    assert comparison.differing == []
    assert comparison.precision == "float32"


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match=r"dtype: received .*, expected float64 or float32"):
        golden_continuous.make(TINY, dtype=np.complex128)
