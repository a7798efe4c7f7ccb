import importlib.util
import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest

import marref
from marref import cli, files
from marref.layers import layer_norm
from marref.verify import golden, measure
from marref.verify.comparison import Golden, compare, crosscheck
from marref.verify.names import rename

# What takes longest to compute again, for the budgets of all arrays.
SLOW = ("adam", "clipped", "decode", "ties", "samplers")


@pytest.fixture(scope="module")
def vectors():
    return Golden(*files.load(golden.shipped("tiny")))


def everything(vectors, dtype=np.float64, but=()):
    """All golden arrays but those of some sections."""
    return {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for name, array in vectors.arrays.items()
        if not name.startswith(but)
    }


def test_marref_agrees_with_itself_in_float64_and_float32(vectors):
    assert compare(vectors, everything(vectors)).agrees
    narrow = compare(vectors, everything(vectors, np.float32))
    assert narrow.precision == "float32"
    assert narrow.agrees


def test_rows_come_in_the_order_of_computation(vectors):
    names = ["loss", "activations/logits", "activations/embedding", "params/head.bias"]
    comparison = compare(vectors, {name: vectors.arrays[name] for name in names})
    assert [row.name for row in comparison.rows] == names[::-1]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_first_difference_is_found(vectors, dtype):
    arrays = everything(vectors, dtype, but=SLOW)
    for name in ("activations/blocks.1.attention.weights", "activations/blocks.1.output", "loss"):
        arrays[name] = arrays[name] * dtype(1.001)
    comparison = compare(vectors, arrays)
    assert not comparison.agrees
    assert comparison.first.name == "activations/blocks.1.attention.weights"
    assert len(comparison.differing) == 3
    table = comparison.as_table()
    assert "DIFFERS   <- first difference" in table
    assert table.splitlines()[-1] == (
        f"3 of {len(arrays)} arrays differ by more than the rounding of {np.dtype(dtype)}; "
        "the first is activations/blocks.1.attention.weights"
    )


def test_one_wrong_integer_differs(vectors):
    tokens = vectors.arrays["decode/hot/tokens"].copy()
    tokens[0, 0] = tokens[0, 0] % 6 + 1
    assert compare(vectors, {"decode/hot/tokens": tokens}).first.difference >= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_differs(vectors, value):
    logits = vectors.arrays["activations/logits"].copy()
    logits[0, 0, 0] = value
    comparison = compare(vectors, {"activations/logits": logits})
    assert str(comparison.first.difference) == str(value)
    assert f" {value} " in comparison.as_table()


@pytest.mark.parametrize(
    ("actual", "expected", "difference", "relative"),
    [
        ([1.0, -4.5], [1.5, -4.0], 0.5, 0.125),
        ([0.25, 0.0], [0.0, 0.0], 0.25, 0.25),
        ([True, False], [False, False], 1.0, 1.0),
        ([np.nan, 0.0], [2.0, 0.0], np.inf, np.inf),
        ([2.0, 0.0], [np.nan, 0.0], np.inf, np.inf),
        ([np.inf], [np.inf], np.inf, np.inf),
        ([], [], 0.0, 0.0),
    ],
)
def test_a_difference_is_relative_to_the_largest_entry(actual, expected, difference, relative):
    actual, expected = np.array(actual), np.array(expected)
    distance = measure.difference(actual, expected)
    assert distance == difference
    assert measure.relative(distance, measure.largest(expected)) == relative


def test_an_array_that_should_be_0_is_off_by_its_difference(vectors):
    name = "decode/hot/start"
    (row,) = compare(vectors, {name: vectors.arrays[name] + 3}).rows
    assert (row.difference, row.relative, row.verdict) == (3.0, 3.0, "DIFFERS")


def test_crosscheck_calls_a_function_with_the_golden_inputs(vectors):
    model = vectors.model
    assert crosscheck(lambda params, tokens: model(params, tokens), vectors).agrees
    assert crosscheck(lambda params, tokens: model(params, tokens), vectors, "float32").agrees
    wrong = crosscheck(lambda params, tokens: model(params, tokens) * 1.01, vectors)
    assert wrong.first.name == "activations/logits"

    def several(params, tokens):
        x, _ = marref.layers.embedding.forward(params["embedding"], tokens, model.positions)
        return {"activations/embedding": x}

    assert crosscheck(several, vectors).agrees


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "arrays: none"),
        ({"activations/logit": np.ones(3)}, "unknown; nearest: activations/logits"),
        ({"loss": np.ones(3)}, "arrays: loss has shape [3], expected []"),
        ({"loss": np.array("x")}, "arrays: loss has dtype <U1"),
    ],
)
def test_arrays_that_cannot_be_compared(vectors, arrays, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        compare(vectors, arrays)
    assert message in str(caught.value)


def test_what_a_precision_cannot_decide_is_said_to_be_undecided(vectors):
    # In float16 Adam's epsilon, 1e-8, is 0, and so is the root of a small second moment.
    name = "adam/10/head.bias"
    comparison = compare(vectors, {name: vectors.arrays[name] + 1}, "float16")
    assert comparison.rows[0].verdict == "undecided"
    assert "1 undecided" in comparison.as_table()


def test_a_right_float16_program_may_divide_by_an_epsilon_that_is_0(vectors):
    """Where the square of a gradient underflows; what is left are the bfloat16 numbers given."""
    name = "clipped/1/final_norm.bias"
    stepped = vectors.params["final_norm"]["bias"].astype(np.float16)
    stepped[1::2] = np.inf
    arrays = {
        key: array.astype(np.float16)
        for key, array in vectors.arrays.items()
        if key.startswith(("activations/", "gradients/"))
    }
    comparison = compare(vectors, {**arrays, name: stepped})
    assert comparison.precision == comparison.precision_of(name) == "float16"
    assert [row.verdict for row in comparison.rows if row.name == name] == ["undecided"]


@pytest.fixture
def yours(vectors, tmp_path):
    """A function that writes arrays to a file and compares it from the command line."""

    def run(arrays, *options, name="yours.npz"):
        files.save(tmp_path / name, arrays, {})
        return cli.main(["compare", "tiny", str(tmp_path / name), *options])

    return run


def test_exit_status_and_table(yours, vectors, capsys):
    arrays = {"activations/logits": vectors.arrays["activations/logits"]}
    assert yours(arrays) == 0
    assert "all 1 arrays agree" in capsys.readouterr().out
    assert yours({"activations/logits": arrays["activations/logits"] + 1}) == 1
    assert "\x1b" not in capsys.readouterr().out
    assert yours({"activations/logitz": np.ones(1)}) == 2
    assert "nearest: activations/logits" in capsys.readouterr().err


def test_json_is_for_machines(yours, vectors, capsys):
    logits = vectors.arrays["activations/logits"].copy()
    logits[0, 0, 0] = np.nan
    assert yours({"activations/logits": logits}, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first"] == "activations/logits"
    assert report["rows"][0]["verdict"] == "DIFFERS"
    assert report["rows"][0]["difference"] is None


def test_the_precision_may_be_told(yours, vectors, capsys):
    logits = (vectors.arrays["activations/logits"] * (1 + 1e-6)).astype(np.float64)
    assert yours({"activations/logits": logits}) == 1
    assert yours({"activations/logits": logits}, "--dtype", "float32") == 0


def test_bfloat16_in_safetensors_says_so_itself(vectors, tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    logits = torch.from_numpy(vectors.arrays["activations/logits"]).bfloat16()
    save_file({"activations/logits": logits}, tmp_path / "x.safetensors")
    arrays, metadata = files.load(tmp_path / "x.safetensors")
    assert metadata == {"precision": "bfloat16"}
    np.testing.assert_array_equal(arrays["activations/logits"], logits.float().numpy())
    assert cli.main(["compare", "tiny", str(tmp_path / "x.safetensors")]) == 0


def test_a_folder_of_npy_files(vectors, tmp_path):
    for name in ("activations/logits", "loss"):
        path = tmp_path / "yours" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors.arrays[name])
    assert cli.main(["compare", "tiny", str(tmp_path / "yours")]) == 0


def test_names_may_be_mapped_by_a_file(vectors, tmp_path):
    table = tmp_path / "names.json"
    table.write_text('{"out": "activations/logits"}')
    logits = vectors.arrays["activations/logits"]
    mapped = rename(vectors, {"out": logits, "loss": vectors.arrays["loss"]}, str(table))
    assert sorted(mapped.arrays) == ["activations/logits", "loss"]


def hostile_files(whole):
    """Files that somebody might have made, by what is wrong with them."""
    yield "empty", b""
    yield "truncated", whole[: len(whole) // 2]
    yield "no zip", b"\x80\x04K\x01."
    header = struct.pack("<Q", 2**63)
    yield "header of 2^63 bytes.safetensors", header + b"{}"
    yield "no JSON.safetensors", struct.pack("<Q", 2) + b"[["
    beyond = b'{"loss":{"dtype":"F64","shape":[9],"data_offsets":[0,72]}}'
    yield "beyond the end.safetensors", struct.pack("<Q", len(beyond)) + beyond

    def zipped(*members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return buffer.getvalue()

    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()

    yield "pickled", zipped(("loss.npy", npy(np.array([print], object))))
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    huge += b"{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904,), }".ljust(
        118
    )
    yield "shape of 2^62", zipped(("loss.npy", huge))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped(("loss.npy", npy(np.ones(()))), ("loss.npy", npy(np.zeros(()))))
    yield "duplicate names", twice


def test_hostile_files_are_one_clear_line_and_status_2(tmp_path, capsys):
    whole = golden.shipped("tiny").read_bytes()
    for name, content in hostile_files(whole):
        path = tmp_path / (name if "." in name else f"{name}.npz")
        path.write_bytes(content)
        if path.suffix == ".safetensors":
            pytest.importorskip("safetensors")
        for arguments in (["tiny", str(path)], [str(path), str(path)]):
            assert cli.main(["compare", *arguments]) == 2, name
            printed = capsys.readouterr()
            assert printed.err.startswith("marref: ")
            assert printed.err.count("\n") == 1, name
            assert printed.out == ""


def test_big_endian_arrays_are_read_as_the_numbers_they_are(yours, vectors):
    logits = vectors.arrays["activations/logits"]
    assert yours({"activations/logits": logits.astype(">f8")}) == 0


def test_ten_thousand_mutated_files_never_raise_anything_else(vectors, tmp_path):
    """Through the reader and the comparison's checks; what is still whole may pass."""
    names = ("activations/logits", "loss", "decode/hot/tokens")
    contents = {}
    suffixes = ["npz"]
    if importlib.util.find_spec("safetensors"):
        suffixes.append("safetensors")
    for suffix in suffixes:
        path = tmp_path / f"whole.{suffix}"
        files.save(path, {name: vectors.arrays[name] for name in names}, {"seed": 0})
        contents[suffix] = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(10_000):
        suffix = suffixes[trial % len(suffixes)]
        garbled = bytearray(contents[suffix])
        kind = rng.integers(4)
        if kind == 0:
            del garbled[rng.integers(len(garbled)) :]
        elif kind == 1:
            start, length = rng.integers(len(garbled)), rng.integers(1, 40)
            garbled[start : start + length] = rng.bytes(length)
        else:
            for place in rng.integers(len(garbled), size=rng.integers(1, 6)):
                garbled[place] = rng.integers(256)
        path = tmp_path / f"mutated.{suffix}"
        path.write_bytes(garbled)
        try:
            arrays, _ = files.load(path)
            vectors.check(arrays)
            outcomes["read"] += 1
        except (ValueError, TypeError):
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes
    assert not os.path.exists("exploded")


def test_tensors_of_frameworks_are_taken_as_they_are(vectors):
    torch = pytest.importorskip("torch")
    logits = torch.tensor(vectors.arrays["activations/logits"], requires_grad=True)
    assert crosscheck(lambda params, tokens: logits, vectors, "float64").agrees
    narrow = logits.detach().to(torch.bfloat16)
    assert crosscheck(lambda params, tokens: narrow, vectors, "bfloat16").agrees


def test_fail_fast_compares_no_further_than_the_first_stage_that_differs(vectors):
    sections = ("input/", "activations/", "loss", "gradients/")
    arrays = {name: a for name, a in vectors.arrays.items() if name.startswith(sections)}
    for name in ("loss", "gradients/head.bias"):
        arrays[name] = arrays[name] * 1.5
    whole = compare(vectors, arrays)
    fast = compare(vectors, arrays, fail_fast=True)
    assert fast.first == whole.first
    assert fast.first.name == "loss"
    assert fast.rows == whole.rows[: len(fast.rows)]
    assert fast.rows[-1].name == "loss"


def test_what_is_computed_beside_the_first_difference_is_said(vectors):
    query, key = (f"activations/blocks.0.attention.{part}" for part in ("query", "key"))
    arrays = everything(vectors, but=SLOW)
    for name in (query, key, "activations/blocks.0.attention.weights"):
        arrays[name] = arrays[name] * 1.5
    comparison = compare(vectors, arrays)
    assert comparison.first.name == query
    assert comparison.beside == [key]
    assert f"computed beside it, not from it: {key}" in comparison.as_table()


def test_what_is_wider_than_its_inputs_is_said(vectors):
    names = [name for name in vectors.arrays if name.startswith(("activations/", "loss"))]
    arrays = {name: vectors.arrays[name].astype(np.float32) for name in names}
    arrays["loss"] = np.float64(arrays["loss"]) + 1e-9
    comparison = compare(vectors, arrays)
    assert comparison.agrees
    assert comparison.wider == ("loss",)
    assert "wider than what they were computed from: loss" in comparison.as_table()


def test_a_norm_of_two_features_may_be_differentiated_in_another_order(monkeypatch):
    """Its derivative all but vanishes; programs that do not centre first keep less of it."""
    model = marref.build(11, embed_dim=2, num_layers=1, num_heads=1, seq_len=16)
    vectors = Golden(*golden.make(model, 27))
    named = {name: a for name, a in vectors.arrays.items() if name.startswith("gradients/")}

    def backward(params, dy, cache):
        normalised, s = cache["normalised"], cache["inverse_std"]
        x = normalised / s + 3.0
        dnormalised = params["scale"] * dy
        a, b = (z.sum(axis=-1, keepdims=True) for z in (dnormalised * x, dnormalised))
        slope = (b * 3.0 - a) * s**3 / 2
        dx = s * dnormalised + slope * x - slope * 3.0 - b * s / 2
        return dx, layer_norm_backward(params, dy, cache)[1]

    layer_norm_backward = layer_norm.backward
    monkeypatch.setattr(layer_norm, "backward", backward)
    arrays = vectors.compute(named)
    monkeypatch.undo()
    found = compare(vectors, {name: arrays[name] for name in named}, "float64")
    assert found.agrees
    assert max(row.difference / row.budget for row in found.rows if row.budget) > 0.01


def test_an_optimiser_is_judged_where_gradients_are_undecided(vectors):
    """In bfloat16 some gradients may be anything; their steps may then be whole ones."""
    arrays = {n: a for n, a in vectors.arrays.items() if n.startswith(("gradients/", "adam/1/"))}
    comparison = compare(vectors, arrays, "bfloat16")
    assert comparison.agrees
    assert all(not np.isnan(row.budget) for row in comparison.rows)
