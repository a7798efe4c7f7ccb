import importlib.util
import json

import numpy as np
import pytest

import marref
from marref import cli, files, trees
from marref.verify import golden, measure, rounding
from marref.verify.comparison import Golden

TINY = golden.PRESETS["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return golden.make(TINY)


def test_jittered_operations_err_by_a_unit_and_show_what_cancels():
    x = np.random.default_rng(0).normal(size=(200, 3))
    unit = np.finfo(float).eps
    jittered = rounding.jittered(x, np.random.default_rng(1))
    for found, exact in ((jittered * 3.0, x * 3.0), (np.exp(jittered), np.exp(x))):
        errors = np.abs(np.asarray(found) / exact - 1.0)
        assert 0.5 * unit < errors.max() < 2.5 * unit
    # 1e8 - 1e8 + 1: what is moved is 1e8.
    sums = np.asarray(rounding.jittered(np.tile([1e8, -1e8, 1.0], (200, 1)), jittered.rng).sum(1))
    assert 0.1e8 * unit < np.abs(sums - 1.0).max() < 3e8 * unit


def test_golden_vectors_are_what_the_public_functions_compute(tiny):
    arrays, metadata = tiny
    vectors = Golden(arrays, metadata)
    model, params, batch = vectors.model, vectors.params, vectors.batch
    assert model == TINY
    loss, grads = marref.loss_and_grads(model, params, **batch)
    assert arrays["loss"] == pytest.approx(float(loss), rel=1e-13)
    for name, leaf in trees.flatten(grads).items():
        np.testing.assert_allclose(arrays[f"gradients/{name}"], leaf, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(arrays["activations/logits"], model(params, batch["tokens"]))
    tokens = marref.iterative_decode(model, params, num_steps=3, temperature=2.0)
    np.testing.assert_array_equal(arrays["decode/hot/tokens"], tokens)
    state = marref.optim.init(params)
    for block in grads["blocks"]:
        block["attention"]["key"]["bias"][:] = 0
    stepped, _ = marref.optim.step(params, grads, state, 0.01, weight_decay=0.1)
    np.testing.assert_allclose(
        arrays["adamw/1/head.kernel"], stepped["head"]["kernel"], rtol=0, atol=1e-14
    )


def test_gradients_of_the_residual_stream_are_derivatives_of_the_loss(tiny):
    """Moving a token's row of the table moves the embedding wherever the token stands."""
    arrays, metadata = tiny
    vectors = Golden(arrays, metadata)
    tokens = vectors.batch["tokens"]
    at_embedding = arrays["activation_gradients/embedding"]
    for token in range(TINY.vocab_size):
        expected = at_embedding[tokens == token].sum(axis=0)
        np.testing.assert_allclose(
            arrays["gradients/embedding.table"][token], expected, rtol=0, atol=1e-14
        )
    head = arrays["activation_gradients/logits"].sum(axis=(0, 1))
    np.testing.assert_allclose(arrays["gradients/head.bias"], head, rtol=0, atol=1e-14)
    last = f"activation_gradients/blocks.{TINY.num_layers - 1}.output"
    down = arrays[last].sum(axis=(0, 1))
    name = f"gradients/blocks.{TINY.num_layers - 1}.feed_forward.down.bias"
    np.testing.assert_allclose(arrays[name], down, rtol=0, atol=1e-14)


def test_nothing_hides(tiny):
    arrays, _ = tiny
    for name, array in arrays.items():
        if name.startswith("params/"):
            assert (array != 0).all(), name
            assert (np.abs(array - 1) > 1e-3).any(), name
            np.testing.assert_array_equal(rounding.round_to(array, "bfloat16"), array)
            np.testing.assert_array_equal(array.astype(np.float32), array)
        if name.startswith("activations/"):
            assert 0.05 < np.abs(array).max() < 20, name
    assert sorted(arrays["input/mask"].sum(axis=1)) == [0, 1, 2, 4]
    tokens = arrays["input/tokens"]
    assert len(np.unique(tokens)) < tokens.size
    variance = arrays["activations/embedding"].var(axis=-1)
    assert variance.min() < 0.01


def test_the_order_is_that_of_the_file(tiny):
    arrays, metadata = tiny
    assert metadata["order"] == list(arrays)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_seed_is_a_file_to_the_byte(tmp_path, suffix, capsys):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    for name in ("a", "b"):
        assert cli.main(["golden", str(tmp_path / f"{name}.{suffix}")]) == 0
    assert "arrays of float64" in capsys.readouterr().out
    first = tmp_path / f"a.{suffix}"
    assert first.read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    cli.main(["golden", str(tmp_path / f"b.{suffix}"), "--seed", "1"])
    assert first.read_bytes() != (tmp_path / f"b.{suffix}").read_bytes()

    arrays, metadata = files.load(first)
    expected, expected_metadata = golden.make(TINY)
    assert metadata == json.loads(json.dumps(expected_metadata))
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_the_shipped_file_is_the_tiny_preset(tiny, capsys):
    assert cli.main(["golden", "tiny", "--where"]) == 0
    path = capsys.readouterr().out.strip()
    assert str(golden.shipped("tiny")) == path
    assert golden.shipped("tiny").stat().st_size < 450_000
    arrays, metadata = files.load(path)
    expected, _ = tiny
    assert metadata["order"] == list(expected)
    for name, array in expected.items():
        scale = max(measure.largest(array), 1e-3)
        assert measure.difference(arrays[name], array) <= 1e-12 * scale, name


def test_float32_files_hold_the_float64_results_rounded(tmp_path, tiny):
    cli.main(["golden", str(tmp_path / "x.npz"), "--dtype", "float32"])
    arrays, _ = files.load(tmp_path / "x.npz")
    for name, array in tiny[0].items():
        if array.dtype.kind == "f" and not golden.is_drawn(name):
            np.testing.assert_array_equal(arrays[name], array.astype(np.float32))


def test_config_changes_hyper_parameters(tmp_path):
    config = '{"gelu": "tanh", "num_layers": 1}'
    cli.main(["golden", str(tmp_path / "x.npz"), "--config", config])
    _, metadata = files.load(tmp_path / "x.npz")
    assert metadata["config"]["gelu"] == "tanh"
    assert metadata["config"]["num_layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", '{"colour": 1}'], "colour"),
        (["--config", "{"], "Expecting property name"),
        (["--config", '{"num_heads": 4}'], "embed_dim: received 6, expected a multiple"),
    ],
)
def test_bad_golden_arguments_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    assert cli.main(["golden", str(tmp_path / "x.npz"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.pt", "x.npz.gz", "tiny"])
def test_a_file_of_another_format_is_refused_before_anything_is_computed(
    tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(golden, "make", lambda *_: pytest.fail("computed"))
    assert cli.main(["golden", str(tmp_path / name)]) == 2
    assert "expected a name that ends in .npz or .safetensors" in capsys.readouterr().err


def test_safetensors_that_are_not_installed_are_missed_before_anything_is_computed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(golden, "make", lambda *_: pytest.fail("computed"))
    assert cli.main(["golden", str(tmp_path / "x.safetensors")]) == 2
    assert 'pip install ".[interop]"' in capsys.readouterr().err


def test_rounding_to_bfloat16_is_that_of_half_of_the_bits():
    # 1 + 2⁻⁸ lies halfway between 1 and 1 + 2⁻⁷: to even. 1 + 3·2⁻⁸ goes up.
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 1002.0, 0.0])
    expected = [1.0, 1 + 2**-6, -1 - 2**-7, 1000.0, 0.0]
    np.testing.assert_allclose(rounding.round_to(x, "bfloat16"), expected, rtol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_every_operation_of_a_rounded_array_is_rounded(precision):
    rng = np.random.default_rng(0)
    x = rounding.in_precision(rng.normal(size=(3, 4)), precision)
    y = x * 3.0
    y += x
    results = [x @ x.T, y, np.exp(x), x.sum(axis=0), x.mean(axis=1), x[1] / 3.0, np.sqrt(x * x)]
    np.add.at(y, [0, 0], x[1:])
    for result in [*results, y]:
        plain = np.asarray(result)
        assert plain.dtype == np.float32
        np.testing.assert_array_equal(rounding.round_to(plain, precision), plain)
