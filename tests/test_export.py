"""What `marref export` writes is marref's model, in PyTorch and in ONNX."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from marref import cli, data, files, trees
from marref.interop import torch as torch_names
from marref.training import export, runs
from tests.test_runs import without_pictures

KINDS = [("erf", "concatenated"), ("tanh", "interleaved")]
PAGE = (Path(__file__).parents[1] / "docs" / "interop.md").read_text("utf-8")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def run(request, tmp_path_factory):
    """A run of a few large steps, whose average is not its parameters."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "text.txt").write_text(TEXT)
    dataset = data.load(folder / "text.txt", kind="characters", length=12)
    gelu, positions = request.param
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_steps": 6, "batch_size": 4}
    options = {"learning_rate": 0.03, "average_decay": 0.5, "num_threads": 1, "validate_every": 6}
    config = runs.Config(**sizes, **options, gelu=gelu, positions=positions)
    with without_pictures():
        runs.start(dataset, folder / "run", config)
    return folder / "run"


@pytest.fixture(scope="module")
def onnx_file(run):
    pytest.importorskip("onnx")
    assert cli.main(["export", str(run), str(run / "model.onnx")]) == 0
    return run / "model.onnx"


def model_of(run):
    checkpoint = runs.best(run)
    return checkpoint.config.model(checkpoint.vocab_size), checkpoint.state.averaged


def some_tokens(model, batch, length):
    return np.random.default_rng(length).integers(0, model.vocab_size, (batch, length))


def error_of(logits, model, params, tokens):
    """Relative to what marref computes in float64."""
    wide = trees.map_leaves(lambda leaf: leaf.astype(np.float64), params)
    expected = model(wide, tokens)
    assert logits.shape == expected.shape
    return np.abs(logits - expected).max() / np.abs(expected).max()


def test_a_state_dict_of_the_average_gives_its_logits_in_torch(run, capsys):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    from tests.torch_mar import TorchMAR

    out = run / "model.safetensors"
    assert cli.main(["export", str(run), str(out)]) == 0
    assert capsys.readouterr().out == (
        f"Wrote {out}, the model of step 6; read back, every number is the run's.\n"
    )
    model, params = model_of(run)
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    sizes = {name: value for name, value in vars(model).items() if name in model.__match_args__}
    del sizes["dropout"]
    witness = TorchMAR(**sizes)
    names = {"encoder.layers.": "blocks.", "encoder.norm.": "final_norm."}
    renamed = {
        re.sub("|".join(names), lambda found: names[found[0]], name): tensor.double()
        for name, tensor in state.items()
    }
    missing = witness.load_state_dict(renamed, strict=False)
    assert missing.missing_keys == ["positions"]
    assert missing.unexpected_keys == []
    tokens = some_tokens(model, 3, 12)
    with torch.no_grad():
        logits = witness(torch.from_numpy(tokens)).numpy()
    assert error_of(logits, model, params, tokens) < 1e-12


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A run on data with three classes."""
    tokens = np.random.default_rng(0).integers(0, 5, (30, 6))
    dataset = data.Dataset(tokens, data.codecs.Ids(5), 6, labels=np.arange(30) % 3)
    folder = tmp_path_factory.mktemp("classes") / "run"
    config = runs.Config(embed_dim=16, num_layers=1, num_heads=2, num_steps=4, batch_size=4)
    with without_pictures():
        runs.start(dataset, folder, config)
    return folder


def test_a_graph_with_classes_takes_labels(classes):
    pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    assert cli.main(["export", str(classes), str(classes / "model.onnx")]) == 0
    checkpoint = runs.best(classes)
    tokens, labels = some_tokens(checkpoint.model, 4, 6), np.arange(4)
    run = reference.ReferenceEvaluator(str(classes / "model.onnx")).run
    (logits,) = run(None, {"tokens": tokens, "labels": labels})
    expected = checkpoint.model(checkpoint.state.averaged, tokens, labels)
    assert np.abs(logits - expected).max() < 1e-5
    assert np.abs(expected - checkpoint.model(checkpoint.state.averaged, tokens)).max() > 1e-3


def test_a_state_dict_with_classes_gives_marrefs_logits_in_the_program_of_the_page(classes):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert cli.main(["export", str(classes), str(classes / "model.safetensors")]) == 0
    checkpoint = runs.best(classes)
    program = re.search(r"^```py\n(.*?)^with safe_open", PAGE, re.MULTILINE | re.DOTALL)[1]
    names = {}
    exec(program, names)
    model = names["MAR"](**export.metadata(checkpoint)["model"]).eval()
    model.load_state_dict(load_file(classes / "model.safetensors"))
    tokens, labels = some_tokens(checkpoint.model, 4, 6), np.arange(4)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), torch.from_numpy(labels)).numpy()
    expected = checkpoint.model(checkpoint.state.averaged, tokens, labels)
    assert np.abs(logits - expected).max() < 1e-5


@pytest.mark.parametrize(("batch", "length"), [(3, 12), (1, 7), (2, 1)])
def test_a_graph_gives_marrefs_logits_for_every_batch_and_length(run, onnx_file, batch, length):
    reference = pytest.importorskip("onnx.reference")
    model, params = model_of(run)
    tokens = some_tokens(model, batch, length)
    (logits,) = reference.ReferenceEvaluator(str(onnx_file)).run(None, {"tokens": tokens})
    assert logits.dtype == np.float32
    assert error_of(logits, model, params, tokens) < 1e-5


@pytest.mark.parametrize(("batch", "length"), [(3, 12), (1, 7), (2, 1)])
def test_onnxruntime_gives_marrefs_logits(run, onnx_file, batch, length):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, params = model_of(run)
    tokens = some_tokens(model, batch, length)
    session = onnxruntime.InferenceSession(onnx_file)
    (logits,) = session.run(["logits"], {"tokens": tokens})
    assert error_of(logits, model, params, tokens) < 1e-5


def test_both_files_say_what_they_are(run, onnx_file):
    onnx = pytest.importorskip("onnx")
    checkpoint = runs.best(run)
    told = export.metadata(checkpoint)
    properties = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    assert json.loads(properties["marref"]) == told
    assert data.codec_from_dict(told["codec"]).decode([[2]]) == [" "]
    pytest.importorskip("safetensors")
    export.export(run, run / "model.safetensors")
    arrays, metadata = files.load(run / "model.safetensors")
    assert metadata == told
    found = trees.flatten(torch_names.to_params(arrays))
    for name, leaf in trees.flatten(checkpoint.state.averaged).items():
        np.testing.assert_array_equal(found[name], leaf)


def test_a_graph_says_how_far_it_is_from_marref(run, tmp_path, capsys):
    pytest.importorskip("onnx")
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx")]) == 0
    said = capsys.readouterr().out
    found = re.fullmatch(
        r"Wrote .*m\.onnx, the model of step 6; run by onnx\.reference, logits differ from "
        r"marref's by (\S+), (\S+) allowed\.\n",
        said,
    )
    assert 0 < float(found[1]) < float(found[2]) < 1e-4


def test_what_is_not_marrefs_model_gets_no_name(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx")
    from marref.interop import onnx as graphs

    monkeypatch.setattr(graphs, "_gelu_erf", graphs._gelu_tanh)
    monkeypatch.setattr(graphs, "_gelu_tanh", lambda graph, x: graph.node("Relu", x))
    old = tmp_path / "m.onnx"
    old.write_bytes(b"old")
    assert cli.main(["export", str(run), str(old)]) == 1
    assert "its logits differ from marref's by" in capsys.readouterr().err
    assert old.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_state_dict_that_lost_a_bit_gets_no_name(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    written = torch_names.to_state_dict

    def off_by_a_bit(params):
        state = written(params)
        state["head.bias"][0] = np.nextafter(state["head.bias"][0], np.float32(9))
        return state

    monkeypatch.setattr(export.torch, "to_state_dict", off_by_a_bit)
    assert cli.main(["export", str(run), str(tmp_path / "m.safetensors")]) == 1
    assert capsys.readouterr().err == (
        "marref: head.bias: the file holds other numbers than the run\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """A folder with a run on bytes, both of its files, and what the commands of the page said."""
    for name in ("torch", "safetensors", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    dataset = data.load("text.txt", length=24)
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_steps": 40, "batch_size": 4}
    config = runs.Config(**sizes, learning_rate=0.01, num_threads=1, validate_every=40)
    runs.start(dataset, "run", config)
    for command in re.findall(r"^marref (export .*)$", PAGE, re.MULTILINE):
        assert cli.main(shlex.split(command)) == 0
    return capsys.readouterr().out


def test_the_programs_of_the_page_give_marrefs_logits(exported, tmp_path, capsys):
    model, params = model_of(tmp_path / "run")
    for program in re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        scope = {}
        exec(program, scope)
        tokens = np.asarray(scope["tokens"])
        assert error_of(np.asarray(scope["logits"]), model, params, tokens) < 1e-5
        known = model(params, tokens)
        known[..., 0] = -np.inf
        ids = np.where(tokens == 0, known.argmax(-1), tokens) - 1
        assert capsys.readouterr().out == bytes(ids[0].tolist()).decode(errors="replace") + "\n"
    assert scope["metadata"].startswith('{"format": "marref-export-1"')


def test_the_commands_of_the_page_say_what_it_shows(exported):
    shown = re.search(r"^```text\n(Wrote .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    number = r"\d\.\de-\d\d"
    assert re.sub(number, "…", exported) == re.sub(number, "…", shown)


@pytest.mark.parametrize(
    ("run_folder", "name", "message"),
    [
        (".", "model.pt", "expected a name that ends in .safetensors or .onnx"),
        ("nowhere", "model.safetensors", "holds no run, since it has no config.json"),
        (".", "missing/model.safetensors", "No such file or directory"),
        (".", "folder.safetensors", "no regular file"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(run, tmp_path, capsys, run_folder, name, message):
    pytest.importorskip("safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert cli.main(["export", str(run / run_folder), str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("marref: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_without_onnx_it_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert cli.main(["export", str(run), str(tmp_path / "m.onnx")]) == 2
    assert 'pip install ".[onnx]"' in capsys.readouterr().err


def test_a_graph_that_onnx_has_no_room_for_is_refused(run, monkeypatch):
    pytest.importorskip("onnx")
    from marref.interop import onnx as graphs

    monkeypatch.setattr(graphs, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"params: [\d,]+ bytes, expected less than 1,000 in ONNX"):
        graphs.to_model(*model_of(run))
