"""The format page of the golden vectors: complete, and its reader in C reads the files."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from marref import cli, files
from marref.verify import golden, trace

DOCS = Path(__file__).parents[1] / "docs"
QUERY = "activations/blocks.0.attention.query"


@pytest.fixture(scope="module")
def vectors():
    return golden.make(golden.PRESETS["tiny"])


@pytest.fixture(scope="module", params=[None, 3], ids=["tiny", "with classes"])
def either(request):
    """Vectors of a model without classes and of one with them."""
    return golden.make(dataclasses.replace(golden.PRESETS["tiny"], num_classes=request.param))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Runs the compiled reader on a file."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    program = tmp_path_factory.mktemp("reader") / "read_golden"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-o", program]
    subprocess.run(["gcc", *flags, DOCS / "read_golden.c", "-lm"], check=True)

    def read(path):
        return subprocess.run([program, path], capture_output=True, text=True, check=False)

    return read


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of the tiny file."""
    pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("golden") / "tiny.safetensors"
    assert cli.main(["golden", str(path), "--preset", "tiny"]) == 0
    return path.read_bytes()


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def with_header(content, header):
    _, start = header_of(content)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[start:]


def test_the_layout_is_the_one_on_the_page(content, vectors):
    """Reads the file with nothing but what the page says."""
    arrays, metadata = vectors
    header, start = header_of(content)
    assert json.loads(header.pop("__metadata__")["marref"]) == json.loads(json.dumps(metadata))
    assert header.keys() == arrays.keys()
    dtypes = {"F64": "<f8", "I64": "<i8", "BOOL": "?"}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found = np.frombuffer(content[start + begin : start + end], dtypes[entry["dtype"]])
        np.testing.assert_array_equal(found, arrays[name].ravel(), err_msg=name)
        assert entry["shape"] == list(arrays[name].shape)


@pytest.mark.parametrize("config", [{}, {"embed_dim": 24, "num_heads": 3, "seq_len": 7}])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reader_finds_rounding_only(tmp_path, reader, config, dtype):
    pytest.importorskip("safetensors")
    path = tmp_path / "golden.safetensors"
    cli.main(["golden", str(path), "--config", json.dumps(config), "--dtype", dtype])
    result = reader(path)
    assert (result.returncode, result.stderr) == (0, "")
    model = dataclasses.replace(golden.PRESETS["tiny"], **config)
    size = 4 * model.seq_len * model.embed_dim
    match = re.fullmatch(
        rf"{QUERY}: {size} numbers, largest difference (\S+), rounding\n", result.stdout
    )
    assert match, result.stdout
    assert float(match[1]) < (1e-13 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("move", [1e-6, -1.0, np.nan, np.inf])
def test_the_reader_finds_one_wrong_number(tmp_path, reader, vectors, move):
    pytest.importorskip("safetensors")
    arrays, metadata = vectors
    wrong = arrays[QUERY].copy()
    wrong[2, 1, 3, 0] += move
    files.save(tmp_path / "x.safetensors", {**arrays, QUERY: wrong}, metadata)
    result = reader(tmp_path / "x.safetensors")
    assert result.returncode == 1
    assert result.stdout.endswith("MORE THAN ROUNDING\n")
    if np.isfinite(move):
        assert f"difference {abs(move):.1e}," in result.stdout


def test_the_reader_tells_a_transposed_kernel_and_swapped_heads(tmp_path, reader, vectors):
    pytest.importorskip("safetensors")
    arrays, metadata = vectors
    kernel = "params/blocks.0.attention.query.kernel"
    for name, wrong in ((kernel, arrays[kernel].T), (QUERY, arrays[QUERY][:, ::-1])):
        files.save(tmp_path / "x.safetensors", {**arrays, name: wrong}, metadata)
        assert reader(tmp_path / "x.safetensors").returncode == 1


def assert_one_line(result):
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"read_golden: .+: .+\n", result.stderr)


def test_the_reader_refuses_truncated_files(tmp_path, reader, content):
    header, start = header_of(content)
    bias = start + header["params/blocks.0.attention.query.bias"]["data_offsets"][1]
    path = tmp_path / "x.safetensors"
    for length in (0, 1, 7, 8, 9, 1000, start - 1, start, start + 1, bias - 1):
        path.write_bytes(content[:length])
        assert_one_line(reader(path))


def test_the_reader_refuses_garbled_files(tmp_path, reader, content):
    path = tmp_path / "x.safetensors"
    header, _ = header_of(content)
    entry = header[QUERY]
    begin, end = entry["data_offsets"]
    for changes in (
        {"dtype": "F8"},
        {"dtype": "F32"},
        {"dtype": 1},
        {"shape": [2**62, 2, 2**62, 3]},
        {"shape": [4, 2, 5]},
        {"shape": [4, 2, 5, 3, 1]},
        {"shape": [2, 4, 5, 3]},
        {"shape": [4, 2, 5, -3]},
        {"shape": [0, 2, 5, 3]},
        {"shape": "x"},
        {"data_offsets": [end, begin]},
        {"data_offsets": [begin, 2**64]},
        {"data_offsets": [2**63, 2**63 + end - begin]},
        {"data_offsets": [begin]},
    ):
        path.write_bytes(with_header(content, {**header, QUERY: {**entry, **changes}}))
        assert_one_line(reader(path))
    for prefix in (2**63, 2**64 - 1, 2**64 - 8, len(content) - 7):
        path.write_bytes(prefix.to_bytes(8, "little") + content[8:])
        assert_one_line(reader(path))
    for text in (b"", b"{", b'{"', b'{"a', b'{"a":', b'{"a":1', b"[]", b"}" * 9, b"\0" * 9):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert_one_line(reader(path))
    assert_one_line(reader(tmp_path / "absent"))
    assert_one_line(reader(tmp_path))


def test_the_reader_is_not_misled_by_names_inside_strings(tmp_path, reader, content):
    header, _ = header_of(content)
    decoy = {"__metadata__": {"x": f'\\"{QUERY}": {{}}, "{QUERY}": [1, "]'}}
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(content, {**decoy, **header, **decoy}))
    assert reader(path).returncode == 0


def documented():
    """The names in the first column of the page's tables, as patterns."""
    page = (DOCS / "golden-vectors.md").read_text("utf-8")
    names = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    return [re.compile(re.sub(r"<\w+>", r"[^/]+", name.replace(".", r"\."))) for name in names]


def test_the_page_names_every_array(either):
    patterns = documented()
    for name in either[0]:
        assert any(pattern.fullmatch(name) for pattern in patterns), name


def test_the_page_names_every_activation_with_its_shape(either):
    arrays, metadata = either
    page = (DOCS / "golden-vectors.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w.<>]+)` \| `\[([^`]*)\]` \|", page, re.MULTILINE))
    config = metadata["config"]
    sizes = {
        "batch": 4,
        "length": config["seq_len"],
        "vocab": config["vocab_size"],
        "embed_dim": config["embed_dim"],
        "4·embed_dim": 4 * config["embed_dim"],
        "num_heads": config["num_heads"],
        "head_dim": config["embed_dim"] // config["num_heads"],
    }
    in_code = re.findall(r"^ +``([\w.<>]+)`` +\[", trace.activations.__doc__, re.MULTILINE)
    assert list(rows) == in_code
    for name, array in arrays.items():
        if name.startswith("activations/"):
            row = re.sub(r"blocks\.\d+", "blocks.<i>", name.removeprefix("activations/"))
            assert array.shape == tuple(sizes[axis] for axis in rows[row].split(", ")), name


def test_the_page_names_every_member_of_the_metadata_and_every_preset(either):
    patterns = documented()
    for name in (*either[1], *golden.PRESETS):
        assert any(pattern.fullmatch(name) for pattern in patterns), name
