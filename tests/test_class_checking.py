"""Golden vectors, comparison, diagnosis and names of models with classes."""

import dataclasses

import numpy as np
import pytest

import marref
from marref import cli, files, interop, trees
from marref.verify import faults, golden, search
from marref.verify.comparison import Golden, compare, crosscheck
from marref.verify.diagnosis import diagnose
from marref.verify.faults import CATALOGUE, OF_CLASSES
from marref.verify.names import rename

from . import strategies
from .test_interop import WRITERS, assert_same_bits, flat

TINY = golden.PRESETS["tiny"]
MODEL = dataclasses.replace(TINY, num_classes=3)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "classes.npz"
    assert cli.main(["golden", str(path), "--config", '{"num_classes": 3}']) == 0
    return Golden(*files.load(path))


# Golden vectors.


def test_a_golden_file_with_classes_is_what_the_public_functions_compute(vectors):
    assert vectors.model == MODEL
    params, batch, arrays = vectors.params, vectors.batch, vectors.arrays
    labels = batch["labels"]
    first = int(labels[0])
    assert labels.tolist() == [first, first, 3, (first + 1) % 3]
    loss, grads = marref.loss_and_grads(MODEL, params, **batch)
    assert arrays["loss"] == pytest.approx(float(loss), rel=1e-13)
    table = grads["class_embedding"]["table"]
    np.testing.assert_allclose(arrays["gradients/class_embedding.table"], table, atol=1e-14)
    added = params["class_embedding"]["table"][labels]
    np.testing.assert_array_equal(arrays["activations/class_embedding"], added)
    of_sequences = arrays["activation_gradients/embedding"].sum(axis=1)
    np.testing.assert_allclose(table[3], of_sequences[2], rtol=0, atol=1e-14)
    for name, options in golden.GUIDANCE.items():
        start = arrays[f"guidance/{name}/start"]
        found = marref.iterative_decode(
            MODEL, params, tokens=start, labels=labels[: len(start)], **options
        )
        np.testing.assert_array_equal(arrays[f"guidance/{name}/tokens"], found)
        np.testing.assert_array_equal(arrays[f"guidance/{name}/labels"], labels[: len(start)])


def test_no_two_settings_of_guidance_are_the_same(vectors):
    names = [f"guidance/{name}/steps/confidence" for name in ("class", "constant", "linear")]
    first = [vectors.arrays[name].ravel() for name in ("decode/cosine-3/steps/confidence", *names)]
    for index, one in enumerate(first):
        for other in first[index + 1 :]:
            assert np.abs(one - other).max() > 1e-3


def test_classes_add_arrays_and_rename_none(vectors):
    plain, metadata = golden.make(TINY)
    added = vectors.arrays.keys() - plain.keys()
    assert not plain.keys() - vectors.arrays.keys()
    assert "guidance" not in metadata
    assert "num_classes" not in metadata["config"]
    assert {name for name in added if not name.startswith(("guidance/", "ad", "clipped/"))} == {
        "params/class_embedding.table",
        "input/labels",
        "activations/class_embedding",
        "gradients/class_embedding.table",
    }


def test_golden_vectors_without_labels_are_refused(vectors):
    arrays = {name: array for name, array in vectors.arrays.items() if name != "input/labels"}
    with pytest.raises(ValueError, match="golden: input/labels is missing"):
        Golden(arrays, vectors.metadata)


# Another implementation.


def test_a_program_in_pytorch_agrees_and_is_handed_the_labels(vectors):
    torch = pytest.importorskip("torch")
    from .torch_mar import TorchMAR

    config = {name: value for name, value in MODEL.as_dict().items() if name != "dropout"}
    program = TorchMAR(**config)

    def forward(params, tokens, labels):
        program.load(
            {name: leaf.astype(np.float64) for name, leaf in trees.flatten(params).items()}
        )
        program.zero_grad()
        batch = vectors.batch
        mask = batch["mask"].astype(bool)
        loss, logits = program.loss_and_logits(tokens, batch["targets"], mask, labels)
        loss.backward()
        return {
            "activations/logits": logits,
            "activations/class_embedding": program.class_embedding(torch.from_numpy(labels)),
            "loss": loss,
            **{f"gradients/{name}": grad for name, grad in program.gradients().items()},
        }

    found = crosscheck(forward, vectors)
    assert found.agrees, found.as_table()
    assert len(found.rows) == 3 + len(MODEL.parameter_shapes)
    assert crosscheck(lambda p, t, labels: MODEL(p, t, labels), vectors, "float32").agrees


def test_budgets_of_guided_decoding_let_the_rounding_of_float32_pass(vectors):
    names = [name for name in vectors.arrays if name.startswith(("guidance/", "activations/"))]
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), vectors.params)
    computed = {}
    for stage in vectors.stages(names, params).values():
        computed |= stage()
    assert compare(vectors, computed, "float32").agrees


def of_a_fault(vectors, name, *sections):
    """The arrays of a program with a mistake, in float32."""
    params = trees.map_leaves(lambda leaf: leaf.astype(np.float32), vectors.params)
    arrays = {}
    with CATALOGUE[name].applied():
        for stage in vectors.stages(dict.fromkeys(sections), params).values():
            arrays |= stage()
    return {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in arrays.items()}


@pytest.mark.parametrize("name", ["class-first-position-only", "class-none-zero"])
def test_mistakes_with_classes_are_named(vectors, name):
    arrays = of_a_fault(vectors, name, "activations/logits", "loss")
    found = diagnose(vectors, {key: arrays[key] for key in ("activations/logits", "loss")})
    assert [fault.name for fault in found.explanations[0].faults] == [name]


def test_a_mistake_in_guidance_is_named(vectors):
    name = "guidance-linear-from-zero"
    names = [name for name in vectors.arrays if name.startswith("guidance/")]
    found = diagnose(vectors, of_a_fault(vectors, name, *names))
    assert [fault.name for fault in found.explanations[0].faults] == [name]


def test_faults_of_classes_are_tried_on_models_with_classes_only(vectors):
    plain = Golden(*golden.make(TINY))
    for golden_vectors, expected in ((plain, frozenset()), (vectors, OF_CLASSES)):
        logits = golden_vectors.arrays["activations/logits"] + 1.0
        arrays = {"activations/logits": logits}
        comparison = compare(golden_vectors, arrays)
        found = search.Search(golden_vectors, arrays, comparison, lambda *_: None)
        assert OF_CLASSES.intersection(found._candidates()) == expected
        num_known = len(CATALOGUE) - len(OF_CLASSES) + len(expected)
        assert len(faults.of_model(golden_vectors.model)) == num_known
        found = diagnose(golden_vectors, arrays, most_together=1)
        assert f"catalogue of {num_known} known mistakes" in found.as_table()


@pytest.mark.parametrize(
    ("name", "made", "sentence"),
    [
        (
            "activations/class_embedding",
            lambda v: 1.7 * v.arrays["activations/class_embedding"],
            "is the golden array times 1.7",
        ),
        (
            "activations/class_embedding",
            lambda v: v.params["class_embedding"]["table"][v.batch["labels"] - 1],
            "is row label - 1 of the table",
        ),
        (
            "gradients/class_embedding.table",
            lambda v: v.arrays["gradients/class_embedding.table"] / 5,
            "1/(the length)",
        ),
        (
            "activations/blocks.0.attention_norm",
            lambda v: norm_of(v, v.arrays["activations/embedding"]),
            "is the norm of embedding",
        ),
    ],
    ids=["times", "another row", "averaged", "left out"],
)
def test_what_is_in_no_catalogue_is_described(vectors, name, made, sentence):
    found = diagnose(vectors, {name: made(vectors)}, most_together=1)
    said = " ".join([*found.hints, *(f.summary for e in found.explanations for f in e.faults)])
    assert sentence in said


def norm_of(vectors, x):
    params = vectors.params["blocks"][0]["attention_norm"]
    return marref.layers.layer_norm.forward(params, x, MODEL.layer_norm_epsilon)[0]


# Names.


@pytest.mark.parametrize(("module", "write"), WRITERS.values(), ids=WRITERS)
def test_names_of_frameworks_go_both_ways(module, write):
    params = strategies.random_params(MODEL, np.random.default_rng(0), np.float32)
    state = write(params, MODEL.num_heads)
    assert_same_bits(module.to_params(state), params)
    assert_same_bits(module.to_params(flat(state, "/")), params)
    plain = {name: child for name, child in params.items() if name != "class_embedding"}
    assert not any("class" in name for name in flat(write(plain, MODEL.num_heads)))


def test_the_class_table_has_the_names_of_the_frameworks():
    params = strategies.random_params(MODEL, np.random.default_rng(0))
    assert "class_embedding.weight" in interop.torch.to_state_dict(params)
    assert "embedding" in interop.flax.to_variables(params, 2)["params"]["class_embedding"]
    assert "kernel" in interop.axon.to_model_state(params)["class_embed"]
    state = interop.torch.to_state_dict(params)
    state["class_embedding.weight"] = state["class_embedding.weight"][:, :4]
    with pytest.raises(ValueError, match=r"class_embedding.weight is misshapen \(shape \[4, 4\]"):
        interop.torch.to_params(state)


def test_the_class_table_is_found_by_content(vectors):
    yours = {
        f"params/net.{name}": array.T if name == "class_embedding.weight" else array
        for name, array in interop.torch.to_state_dict(vectors.params).items()
    }
    renamed = rename(vectors, yours, "auto")
    assert "params/class_embedding.table" in renamed.arrays
    assert compare(vectors, renamed.arrays).agrees


def test_golden_vectors_of_a_checkpoint_with_classes(tmp_path, vectors):
    files.save(tmp_path / "mine.npz", interop.torch.to_state_dict(vectors.params), {})
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(1, 7, (4, 5)), "labels": np.array([0, 1, 2, 3])}
    files.save(tmp_path / "batch.npz", batch, {})
    options = ["--params", str(tmp_path / "mine.npz"), "--names", "torch"]
    options += ["--config", '{"num_heads": 2, "seq_len": 5}']
    for given in ([], ["--tokens", str(tmp_path / "batch.npz")]):
        out = tmp_path / "golden.npz"
        assert cli.main(["golden", str(out), *options, *given]) == 0
        found = Golden(*files.load(out))
        assert found.model == MODEL
        labels = found.batch["labels"]
        assert labels.shape == (4,)
        assert (labels == 3).any()
        if given:
            assert labels.tolist() == [0, 1, 2, 3]


def test_a_class_does_not_keep_a_token_from_cancelling_its_position():
    """Where the variance is small, epsilon shows."""
    model = marref.build(11, embed_dim=6, num_layers=1, num_heads=2, seq_len=5, num_classes=3)
    arrays, _ = golden.make(model)
    added = arrays["activations/class_embedding"][:, np.newaxis]
    assert (arrays["activations/embedding"] + added).std(axis=-1).min() < 0.2
