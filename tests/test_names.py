"""Ports under their own names and layouts, as they are found out there, compared with marref."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from marref import files, interop, trees
from marref.interop import maps
from marref.verify import golden
from marref.verify.comparison import Golden
from marref.verify.names import rename
from marref.verify.rounding import round_to

SECTIONS = ("params/", "gradients/", "adam/1/", "clipped/10/")


@pytest.fixture(scope="module", params=["tiny", "small"])
def vectors(request):
    return made(request.param)


@functools.cache
def made(preset):
    return Golden(*golden.make(golden.PRESETS[preset], seed=0))


@pytest.fixture(scope="module")
def tiny():
    return Golden(*files.load(golden.shipped("tiny")))


def qkv(leaves, prefix, kind="kernel"):
    return [leaves[f"{prefix}attention.{part}.{kind}"] for part in ("query", "key", "value")]


def nano_gpt(leaves, model):
    """[out, in], query, key and value along the first axis."""
    mine = {"transformer.wte.weight": leaves["embedding.table"]}
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        mine |= {
            f"{theirs}ln_1.weight": leaves[f"{ours}attention_norm.scale"],
            f"{theirs}ln_1.bias": leaves[f"{ours}attention_norm.bias"],
            f"{theirs}attn.c_attn.weight": np.concatenate(qkv(leaves, ours), 1).T,
            f"{theirs}attn.c_attn.bias": np.concatenate(qkv(leaves, ours, "bias")),
            f"{theirs}attn.c_proj.weight": leaves[f"{ours}attention.output.kernel"].T,
            f"{theirs}attn.c_proj.bias": leaves[f"{ours}attention.output.bias"],
            f"{theirs}ln_2.weight": leaves[f"{ours}feed_forward_norm.scale"],
            f"{theirs}ln_2.bias": leaves[f"{ours}feed_forward_norm.bias"],
            f"{theirs}mlp.c_fc.weight": leaves[f"{ours}feed_forward.up.kernel"].T,
            f"{theirs}mlp.c_fc.bias": leaves[f"{ours}feed_forward.up.bias"],
            f"{theirs}mlp.c_proj.weight": leaves[f"{ours}feed_forward.down.kernel"].T,
            f"{theirs}mlp.c_proj.bias": leaves[f"{ours}feed_forward.down.bias"],
        }
    return mine | {
        "transformer.ln_f.weight": leaves["final_norm.scale"],
        "transformer.ln_f.bias": leaves["final_norm.bias"],
        "lm_head.weight": leaves["head.kernel"].T,
        "lm_head.bias": leaves["head.bias"],
    }


def gpt_2(leaves, model):
    """Conv1D: [in, out]."""
    mine = nano_gpt(leaves, model)
    linear = [name for name in mine if name.endswith("weight") and ".h." in name]
    return {name: array.T if name in linear else array for name, array in mine.items()}


def replaced(leaves, model, pairs):
    """Other names for nanoGPT's."""
    mine = {}
    for name, array in nano_gpt(leaves, model).items():
        for old, new in pairs.items():
            name = name.replace(old, new)
        mine[name] = array
    return mine


def timm(leaves, model):
    return replaced(
        leaves,
        model,
        {"transformer.h": "blocks", "ln_1": "norm1", "ln_2": "norm2", "c_attn": "qkv"}
        | {"attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        | {"transformer.ln_f": "norm", "lm_head": "head", "transformer.wte": "tok_embed"},
    )


def unfused(leaves, model, pattern):
    """Query, key and value apart, [out, in]."""
    mine = {name: a for name, a in timm(leaves, model).items() if "qkv" not in name}
    for i in range(model.num_layers):
        for part in ("query", "key", "value"):
            for theirs, kind in (("weight", "kernel"), ("bias", "bias")):
                array = leaves[f"blocks.{i}.attention.{part}.{kind}"]
                mine[pattern.format(i=i, j=2 * i, part=part, p=part[0]) + theirs] = array.T
    return mine


def bert(leaves, model):
    return unfused(leaves, model, "encoder.layer.{i}.attention.self.{part}.")


def x_transformers(leaves, model):
    return unfused(leaves, model, "attn_layers.layers.{j}.1.to_{p}.")


def interleaved(leaves, model, axis):
    """Query, key and value interleaved by head: [heads, 3, head_dim] or [heads, head_dim, 3]."""
    mine = timm(leaves, model)
    for i in range(model.num_layers):
        for theirs, kind in (("weight", "kernel"), ("bias", "bias")):
            parts = [
                part.T.reshape(model.num_heads, -1, *part.T.shape[1:])
                for part in qkv(leaves, f"blocks.{i}.", kind)
            ]
            name = f"blocks.{i}.attn.qkv.{theirs}"
            mine[name] = np.stack(parts, axis).reshape(mine[name].shape)
    return mine


def flax_dense_general(leaves, model):
    mine = {}
    for name, array in leaves.items():
        if ".attention." in name and not name.endswith("output.bias"):
            heads = (model.num_heads, -1)
            shape = (*heads, model.embed_dim) if "output" in name else (*array.shape[:-1], *heads)
            array = array.reshape(shape)
        name = name.replace("blocks.", "encoderblock_").replace("attention.", "SelfAttention_0.")
        mine[f"params/{name.replace('.', '/')}"] = array
    return mine


def scanned(leaves, model):
    """What a scan stacks: all blocks in one array."""
    flax = flax_dense_general(leaves, model)
    first = "params/encoderblock_0/"
    mine = {name: array for name, array in flax.items() if "encoderblock" not in name}
    for name in [name for name in flax if name.startswith(first)]:
        stacked = [flax[name.replace("_0/", f"_{i}/", 1)] for i in range(model.num_layers)]
        mine[name.replace("encoderblock_0", "encoder")] = np.stack(stacked)
    return mine


def scanned_fused(leaves, model):
    """Stacked, with query, key and value along the last axis."""
    mine = {name: a for name, a in nano_gpt(leaves, model).items() if ".h." not in name}
    gpt = gpt_2(leaves, model)
    for name in [name for name in gpt if ".h.0." in name]:
        arrays = [gpt[name.replace(".h.0.", f".h.{i}.")] for i in range(model.num_layers)]
        mine[name.replace(".h.0.", ".h.")] = np.stack(arrays)
    return mine


def keras(leaves, model):
    return {
        "mar/"
        + name.replace("blocks.", "layer_")
        .replace("scale", "gamma")
        .replace("norm.bias", "norm.beta")
        .replace(".", "/")
        + ":0": array
        for name, array in leaves.items()
    }


def per_head(leaves, model):
    """A list of heads, each with a query, key and value of its own, [head_dim, embed_dim]."""
    mine = {name: a for name, a in timm(leaves, model).items() if "qkv" not in name}
    for i in range(model.num_layers):
        for part in ("query", "key", "value"):
            for theirs, kind in (("weight", "kernel"), ("bias", "bias")):
                array = leaves[f"blocks.{i}.attention.{part}.{kind}"].T
                for head, piece in enumerate(np.split(array, model.num_heads)):
                    mine[f"blocks.{i}.attn.heads.{head}.{part}.{theirs}"] = piece
    return mine


def per_head_fused(leaves, model):
    """A list of heads, each with query, key and value in one array, and its output."""
    mine = {name: a for name, a in timm(leaves, model).items() if "attn" not in name}
    for i in range(model.num_layers):
        prefix = f"blocks.{i}."
        for theirs, kind in (("weight", "kernel"), ("bias", "bias")):
            parts = [np.split(p.T, model.num_heads) for p in qkv(leaves, prefix, kind)]
            for head, pieces in enumerate(zip(*parts, strict=True)):
                mine[f"{prefix}heads.{head}.qkv.{theirs}"] = np.concatenate(pieces)
        output = np.split(leaves[f"{prefix}attention.output.kernel"].T, model.num_heads, 1)
        for head, piece in enumerate(output):
            mine[f"{prefix}heads.{head}.out.weight"] = piece
        mine[f"{prefix}out.bias"] = leaves[f"{prefix}attention.output.bias"]
    return mine


def value_first(leaves, model):
    """Fused in another order, and the embedding transposed."""
    mine = timm(leaves, model)
    for i in range(model.num_layers):
        for theirs, kind in (("weight", "kernel"), ("bias", "bias")):
            parts = qkv(leaves, f"blocks.{i}.", kind)[::-1]
            mine[f"blocks.{i}.attn.qkv.{theirs}"] = np.concatenate([p.T for p in parts])
    return mine | {"tok_embed.weight": leaves["embedding.table"].T}


def einsum(leaves, model):
    """Heads first, [heads, embed_dim, head_dim], and query and the rest fused apart."""
    mine = {name: a for name, a in timm(leaves, model).items() if "qkv" not in name}
    for i in range(model.num_layers):
        prefix = f"blocks.{i}."
        by_head = [
            part.reshape(model.embed_dim, model.num_heads, -1).transpose(1, 0, 2)
            for part in qkv(leaves, prefix)
        ]
        mine |= {f"{prefix}wq": by_head[0], f"{prefix}wkv": np.stack(by_head[1:])}
        for part, array in zip("qkv", qkv(leaves, prefix, "bias"), strict=True):
            mine[f"{prefix}b{part}"] = array
    return mine


LAYOUTS = {
    "nanoGPT": nano_gpt,
    "GPT-2 Conv1D": gpt_2,
    "timm": timm,
    "BERT": bert,
    "x-transformers": x_transformers,
    "interleaved [heads, 3, head_dim]": lambda leaves, model: interleaved(leaves, model, 1),
    "interleaved [heads, head_dim, 3]": lambda leaves, model: interleaved(leaves, model, 2),
    "Flax DenseGeneral": flax_dense_general,
    "Flax scan": scanned,
    "scan of fused": scanned_fused,
    "Keras": keras,
    "heads apart": per_head,
    "fused heads apart": per_head_fused,
    "value, key, query": value_first,
    "einsum": einsum,
}


def leaves_of(vectors, section):
    return {
        name: vectors.arrays[section + name]
        for name in vectors.model.parameter_shapes
        if section + name in vectors.arrays
    }


def saved(vectors, layout, dtype=np.float64, sections=SECTIONS):
    return {
        section + name: array.astype(dtype)
        for section in sections
        for name, array in layout(leaves_of(vectors, section), vectors.model).items()
    }


def assert_golden(vectors, renamed, sections=SECTIONS, dtype=np.float64):
    expected = {
        section + name: array.astype(dtype)
        for section in sections
        for name, array in leaves_of(vectors, section).items()
    }
    assert renamed.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(renamed.arrays[name], array, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_found_by_content_and_kept_in_a_file(vectors, layout, tmp_path):
    arrays = saved(vectors, layout)
    renamed = rename(vectors, arrays, "auto")
    assert_golden(vectors, renamed)
    path = tmp_path / "names.json"
    maps.write(path, renamed.name_map)
    assert maps.read(path) == renamed.name_map
    assert_golden(vectors, rename(vectors, arrays, str(path)))


def test_sections_without_biases_or_gradients_are_compared_as_far_as_they_go(tiny):
    arrays = {
        name: array for name, array in saved(tiny, nano_gpt).items() if not name.endswith("bias")
    }
    del arrays["gradients/lm_head.weight"]
    renamed = rename(tiny, arrays, "auto")
    assert "gradients/blocks.1.attention.value.kernel" in renamed.arrays
    assert "gradients/head.kernel" not in renamed.arrays
    assert not any(name.endswith("bias") for name in renamed.arrays)
    assert any(note.startswith("not found among yours: blocks.0.") for note in renamed.notes)


def test_names_without_a_section_are_parameters(tiny):
    arrays = saved(tiny, nano_gpt, sections=["params/"])
    bare = {name.removeprefix("params/"): array for name, array in arrays.items()}
    bare |= saved(tiny, nano_gpt, sections=["gradients/"])
    assert_golden(tiny, rename(tiny, bare, "auto"), ["params/", "gradients/"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parameters_in_a_narrower_dtype_are_found(dtype):
    vectors = made("small")
    arrays = saved(vectors, nano_gpt, dtype, ["params/"])
    arrays |= saved(vectors, nano_gpt, np.float64, ["gradients/"])
    renamed = rename(vectors, arrays, "auto")
    gradients = {n: a for n, a in renamed.arrays.items() if n.startswith("gradients/")}
    assert_golden(vectors, dataclasses.replace(renamed, arrays=gradients), ["gradients/"])


def test_a_checkpoint_in_float32_is_found_in_bfloat16():
    """Parameters that are no bfloat16 numbers, rounded to it by the port."""
    vectors = changed(made("tiny"), lambda name, array: array * (1 + 2.0**-12))
    arrays = {n: round_to(a, "bfloat16") for n, a in saved(vectors, nano_gpt).items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert len(rename(vectors, arrays, "auto").arrays) == len(SECTIONS) * 37


def changed(vectors, change):
    """Golden vectors with other parameters; what follows from them is not computed anew."""
    arrays = {
        name: change(name, array) if name.startswith("params/") else array
        for name, array in vectors.arrays.items()
    }
    return Golden(arrays, vectors.metadata)


@pytest.mark.parametrize(
    ("params", "gradients"),
    [
        ("module.", ""),
        ("", "module."),
        ("_orig_mod.module.", "model."),
        ("state_dict/", ""),
        ("params/params/", "params/"),
    ],
)
@pytest.mark.parametrize("names", ["auto", "torch", None])
def test_prefixes_do_not_matter_and_are_said(tiny, names, params, gradients):
    def layout(leaves, model):
        if names != "torch":
            return nano_gpt(leaves, model) if names else leaves
        return interop.torch.to_state_dict(trees.unflatten(leaves))

    arrays = {
        f"{section}{prefix}{name.removeprefix(section)}": array
        for section, prefix in (("params/", params), ("gradients/", gradients))
        for name, array in saved(tiny, layout, sections=[section]).items()
    }
    renamed = rename(tiny, arrays, names)
    assert_golden(tiny, renamed, ["params/", "gradients/"])
    for prefix in filter(None, (params, gradients)):
        assert any(prefix in note for note in renamed.notes)


def test_a_tied_head_is_found_and_its_gradients_are_left_out():
    tiny = made("tiny")
    table = tiny.arrays["params/embedding.table"]
    tied = changed(tiny, lambda name, array: table.T if name == "params/head.kernel" else array)
    once = saved(tied, nano_gpt, sections=["params/", "gradients/"])
    del once["params/lm_head.weight"], once["gradients/lm_head.weight"]
    renamed = rename(tied, once, "auto")
    np.testing.assert_array_equal(renamed.arrays["params/head.kernel"], table.T)
    assert "gradients/embedding.table" not in renamed.arrays
    assert any("tied" in note for note in renamed.notes)

    # A port that has two arrays has two gradients.
    apart = saved(tied, nano_gpt, sections=["params/", "gradients/"])
    assert_golden(tied, rename(tied, apart, "auto"), ["params/", "gradients/"])


@pytest.mark.parametrize("layout", [nano_gpt, LAYOUTS["interleaved [heads, 3, head_dim]"]])
def test_biases_that_are_all_0_have_the_layout_of_what_is_beside_them(layout):
    """And norms' biases too; arrays of ones and zeros alone cannot be told."""
    vectors = changed(
        made("tiny"), lambda name, array: array * 0 if name.endswith("bias") else array
    )
    renamed = rename(vectors, saved(vectors, layout), "auto")
    assert_golden(vectors, renamed)


def test_constant_arrays_with_nothing_to_be_told_by_are_listed():
    def fresh(name, array):
        if name.endswith("bias"):
            return array * 0
        return array * 0 + 1 if name.endswith("scale") else array

    vectors = changed(made("tiny"), fresh)
    renamed = rename(vectors, saved(vectors, nano_gpt), "auto")
    assert "params/blocks.0.attention.query.bias" in renamed.arrays
    assert "params/blocks.0.attention_norm.scale" not in renamed.arrays
    assert any("transformer.h.0.ln_1.weight" in note for note in renamed.notes)
    assert any("cannot be told" in note for note in renamed.notes)


def test_arrays_of_unknown_names_are_ignored_with_a_warning(tiny):
    arrays = saved(tiny, nano_gpt, sections=["params/"])
    arrays["params/transformer.h.0.attn.bias"] = np.tril(np.ones((5, 5)))
    arrays["params/num_batches_tracked"] = np.array(7)
    renamed = rename(tiny, arrays, "auto")
    assert_golden(tiny, renamed, ["params/"])
    assert renamed.notes[-1] == (
        "ignored, since their names are not known: "
        "params/transformer.h.0.attn.bias, params/num_batches_tracked"
    )


def test_a_parameter_that_was_loaded_wrongly_is_listed(tiny):
    arrays = saved(tiny, nano_gpt)
    arrays["params/transformer.wte.weight"] = arrays["params/transformer.wte.weight"][::-1] * 2
    notes = rename(tiny, arrays, "auto").notes
    assert any(note == "not found among yours: embedding.table" for note in notes)


def test_activations_are_guessed_by_shape_and_nearness_and_it_is_said(tiny):
    arrays = saved(tiny, nano_gpt, sections=["params/"])
    up = tiny.arrays["activations/blocks.0.feed_forward.up"]
    logits = tiny.arrays["activations/logits"]
    arrays |= {"activations/h.0.c_fc": up * 1.001, "my_logits": logits, "noise": up[::-1] + 9}
    renamed = rename(tiny, arrays, "auto")
    np.testing.assert_array_equal(
        renamed.arrays["activations/blocks.0.feed_forward.up"], up * 1.001
    )
    np.testing.assert_array_equal(renamed.arrays["activations/logits"], logits)
    guessed = [note for note in renamed.notes if note.startswith("guessed: ")]
    assert len(guessed) == 2
    assert "noise" in renamed.notes[-1]


def test_an_activation_that_two_arrays_could_be_is_left_out(tiny):
    arrays = saved(tiny, nano_gpt, sections=["params/"])
    up = tiny.arrays["activations/blocks.0.feed_forward.up"]
    arrays |= {"a": up * 1.001, "b": up * 1.002}
    renamed = rename(tiny, arrays, "auto")
    assert "activations/blocks.0.feed_forward.up" not in renamed.arrays
    assert "a and b are both near to activations/blocks.0.feed_forward.up: left out" in (
        renamed.notes
    )


def test_auto_needs_the_golden_parameters(tiny):
    with pytest.raises(ValueError, match="none of your arrays holds a golden parameter"):
        rename(tiny, saved(tiny, nano_gpt, sections=["gradients/"]), "auto")


def test_a_map_may_lead_to_a_frameworks_names(tiny, tmp_path):
    def layout(leaves, model):
        state = interop.torch.to_state_dict(trees.unflatten(leaves))
        mine = {
            name.replace("encoder.layers", "h").replace("self_attn", "attn"): array
            for name, array in state.items()
        }
        mine["h.0.attn.in_proj_weight"] = mine["h.0.attn.in_proj_weight"].T
        return mine

    path = tmp_path / "names.json"
    entries = {
        f"h.{{i}}.{name}": f"encoder.layers.{{i}}.{name.replace('attn', 'self_attn')}"
        for layer in ("norm1", "norm2", "linear1", "linear2", "attn.out_proj")
        for name in (f"{layer}.weight", f"{layer}.bias")
    }
    entries["h.{i}.attn.in_proj_bias"] = "encoder.layers.{i}.self_attn.in_proj_bias"
    entries["h.0.attn.in_proj_weight"] = {
        "ours": "encoder.layers.0.self_attn.in_proj_weight",
        "steps": [{"transpose": True}],
    }
    entries["h.1.attn.in_proj_weight"] = "encoder.layers.1.self_attn.in_proj_weight"
    path.write_text(json.dumps({"base": "torch", **entries}))
    assert_golden(tiny, rename(tiny, saved(tiny, layout), str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "received list, expected an object"),
        ('{"base": "tensorflow"}', "base: received 'tensorflow'"),
        ('{"a": 3}', "entry 'a': received 3, expected a name or an object"),
        ('{"a": {"steps": []}}', "entry 'a': received steps, expected"),
        ('{"a": {"ours": []}}', "entry 'a': ours: received []"),
        ('{"a": {"ours": "b", "step": []}}', "entry 'a': received ours, step"),
        ('{"a": {"ours": "b", "steps": [{"turn": 1}]}}', "entry 'a': step {'turn': 1}"),
        ('{"a": {"ours": "b", "steps": [{"split": [1]}]}}', "entry 'a': step {'split': [1]}"),
        ('{"a": {"ours": "b", "steps": [{"reshape": 2}]}}', "expected a list of integers"),
        ('{"a": {"ours": "b", "steps": {"split": 1}}}', "steps: received {'split': 1}"),
    ],
)
def test_a_malformed_map_is_one_line_that_names_the_entry(tmp_path, content, message):
    path = tmp_path / "names.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^names") as caught:
        maps.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"steps": [{"reshape": [5, 5]}]}, "reshape [5, 5] of [7, 6]"),
        ({"steps": [{"transpose": [0, 2]}]}, "transpose [0, 2] of [7, 6]"),
        ({"steps": [{"concatenate": 4}]}, "concatenate 4 of [7, 6]"),
        ({"ours": ["embedding.table", "head.bias"]}, "1 arrays for 2 names"),
        ({"ours": ["a", "b"], "steps": [{"split": 9}]}, "split 9 of [7, 6]"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_entry(tiny, tmp_path, entry, message):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"wte": {"ours": "embedding.table", **entry}}))
    with pytest.raises(ValueError, match=r"^names: wte: ") as caught:
        rename(tiny, {"wte": tiny.arrays["params/embedding.table"]}, str(path))
    assert message in str(caught.value)


def test_two_of_yours_that_are_one_of_marrefs_are_an_error(tiny, tmp_path):
    path = tmp_path / "names.json"
    path.write_text('{"a": "head.bias", "b": "head.bias"}')
    arrays = dict.fromkeys("ab", tiny.arrays["params/head.bias"])
    with pytest.raises(ValueError, match=r"two of them are head\.bias"):
        rename(tiny, arrays, str(path))
