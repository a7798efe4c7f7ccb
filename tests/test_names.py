"""Ports under their own names and layouts, as they are found out there, compared with marref."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from marref import cli, files, interop, training, trees
from marref.interop import maps
from marref.verify import golden
from marref.verify.comparison import Golden, compare
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
    """Layers counted from 1."""
    mine = {}
    for name, array in leaves.items():
        for i in reversed(range(model.num_layers)):
            name = name.replace(f"blocks.{i}.", f"layer_{i + 1}.")
        name = name.replace("scale", "gamma").replace("norm.bias", "norm.beta")
        mine[f"mar/{name.replace('.', '/')}:0"] = array
    return mine


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


def test_numbers_of_blocks_are_written_once_also_if_they_count_from_1(tiny):
    (head, *_) = rename(tiny, saved(tiny, keras), "auto").name_map.entries[1:]
    assert head.yours == ("mar/layer_{i+1}/attention_norm/gamma:0",)
    assert head.ours == ("blocks.{i}.attention_norm.scale",)
    entries = rename(tiny, saved(tiny, scanned), "auto").name_map.entries
    assert len(entries) == len(scanned(leaves_of(tiny, "params/"), tiny.model))


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
        ("net.core.", "net.core."),
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
    if names != "auto" or params != gradients:
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


@pytest.mark.parametrize(
    "layout",
    [nano_gpt, LAYOUTS["interleaved [heads, 3, head_dim]"], flax_dense_general, scanned_fused],
)
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


def test_a_constant_kernel_has_no_layout_to_be_told_by():
    name = "params/blocks.0.attention.output.kernel"
    vectors = changed(made("tiny"), lambda other, array: array * 0 if other == name else array)
    renamed = rename(vectors, saved(vectors, nano_gpt), "auto")
    assert name not in renamed.arrays
    assert any("cannot be told" in note and name[7:] in note for note in renamed.notes)


def test_the_map_of_the_page_is_read_and_applied(tiny, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "interop.md").read_text("utf-8")
    whole, based = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "names.json").write_text(whole, "utf-8")
    leaves = leaves_of(tiny, "params/")
    mine = {"wte.weight": leaves["embedding.table"]}
    for i in range(2):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        mine[f"{theirs}ln_1.weight"] = leaves[f"{ours}attention_norm.scale"]
        mine[f"{theirs}attn.c_attn.weight"] = np.concatenate(qkv(leaves, ours), 1).T
        heads = np.split(leaves[f"{ours}attention.output.kernel"].T, 2, 1)
        for head, piece in enumerate(heads):
            mine[f"{theirs}attn.heads.{head}.out.weight"] = piece
    up = [leaves[f"blocks.{i}.feed_forward.up.kernel"] for i in range(2)]
    mine["mlp.up.kernel"] = np.stack(up)
    renamed = rename(tiny, mine, str(tmp_path / "names.json"))
    assert len(renamed.arrays) == 1 + 2 * 6
    for name, array in renamed.arrays.items():
        np.testing.assert_array_equal(array, tiny.arrays[name], err_msg=name)
    (tmp_path / "based.json").write_text(based, "utf-8")
    assert maps.read(tmp_path / "based.json").base == "torch"


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


def test_the_command_tells_what_it_found_and_keeps_the_map(tiny, tmp_path, capsys):
    arrays = saved(tiny, nano_gpt, sections=["params/", "gradients/"])
    files.save(tmp_path / "mine.npz", arrays, {})
    arguments = ["compare", "tiny", str(tmp_path / "mine.npz"), "--names"]
    kept = tmp_path / "names.json"
    assert cli.main([*arguments, "auto", "--write-names", str(kept)]) == 0
    printed = capsys.readouterr()
    assert "all 74 arrays agree" in printed.out
    assert printed.err.startswith(
        "names: 29 of your arrays are 37 of 37 parameters, by content\n"
        "names: transformer.h.{i}.attn.c_attn.weight = "
        "blocks.{i}.attention.{query, key, value}.kernel: split 0, transpose\n"
    )
    assert json.loads(kept.read_text("utf-8"))["transformer.wte.weight"] == "embedding.table"
    assert cli.main([*arguments, str(kept)]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*arguments, "torch", "--write-names", str(kept)]) == 2


def test_files_may_be_several_or_folders_of_shards(tiny, tmp_path, capsys):
    arrays = saved(tiny, nano_gpt, sections=["params/", "gradients/"])
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(arrays)
    files.save(folder / "model-1-of-2.npz", {n: arrays[n] for n in names[:20]}, {})
    files.save(folder / "model-2-of-2.npz", {n: arrays[n] for n in names[20:40]}, {})
    (folder / "gradients").mkdir()
    for name in names[40:]:
        np.save(folder / f"{name}.npy", arrays[name])
    index = {"weight_map": {"a": "model-1-of-2.npz", "b": "model-2-of-2.npz"}}
    (folder / "model.index.json").write_text(json.dumps(index))
    files.save(tmp_path / "loss.npz", {"loss": tiny.arrays["loss"]}, {})
    paths = [str(folder), str(tmp_path / "loss.npz")]
    assert cli.main(["compare", "tiny", *paths, "--names", "auto"]) == 0
    assert "all 75 arrays agree" in capsys.readouterr().out

    assert cli.main(["compare", "tiny", *paths, paths[1], "--names", "auto"]) == 2
    assert "has loss, which another file has too" in capsys.readouterr().err
    (folder / "model-2-of-2.npz").unlink()
    assert cli.main(["compare", "tiny", *paths, "--names", "auto"]) == 2
    assert "names model-2-of-2.npz, which is not there" in capsys.readouterr().err


def test_an_array_of_nothing_is_named(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", **{"loss": np.ones(()), "gradients/wpe": np.array(None)})
    assert cli.main(["compare", "tiny", str(tmp_path / "mine.npz")]) == 2
    printed = capsys.readouterr().err
    assert "gradients/wpe holds Python objects" in printed
    assert printed.count("\n") == 1


def test_all_misshapen_arrays_are_listed(tiny, tmp_path, capsys):
    arrays = {n: a.T for n, a in tiny.arrays.items() if n.startswith("gradients/")}
    files.save(tmp_path / "mine.npz", arrays, {})
    assert cli.main(["compare", "tiny", str(tmp_path / "mine.npz")]) == 2
    printed = capsys.readouterr().err
    assert "up.kernel has shape [24, 6], expected [6, 24]: transposed?" in printed
    assert printed.count("transposed?") == 6


@pytest.fixture
def checkpoint(tmp_path):
    """A trained model's file, as PyTorch, Flax or marref would have written it."""
    model = golden.PRESETS["tiny"]
    params, _ = golden.draw(model, seed=3)

    def write(names):
        path = tmp_path / f"{names}.npz"
        if names == "save_model":
            training.save_model(path, model, params)
        elif names == "flax":
            state = trees.flatten(interop.flax.to_variables(params, model.num_heads))
            files.save(path, state, {})
        elif names == "torch":
            files.save(path, interop.torch.to_state_dict(params), {})
        else:
            files.save(path, trees.flatten(params), {})
        return path

    return model, params, write


@pytest.mark.parametrize("names", ["save_model", "torch", "flax", "own"])
def test_golden_vectors_of_a_checkpoint_and_a_batch(checkpoint, names, tmp_path, capsys):
    model, params, write = checkpoint
    tokens = np.random.default_rng(0).integers(1, 7, (3, 5))
    np.save(tmp_path / "tokens.npy", tokens)
    out = tmp_path / "golden.npz"
    options = ["--names", names] if names in ("torch", "flax") else []
    if names in ("torch", "own"):
        options += ["--config", '{"num_heads": 2}']
    options += ["--params", str(write(names)), "--tokens", str(tmp_path / "tokens.npy")]
    options += ["--activations", "logits", "blocks.0.*"]
    status = cli.main(["golden", str(out), *options])
    assert status == 0, capsys.readouterr().err
    vectors = Golden(*files.load(out))
    assert vectors.model == model
    np.testing.assert_array_equal(vectors.arrays["input/targets"], tokens)
    np.testing.assert_array_equal(vectors.arrays["input/mask"].sum(axis=1), [4, 2, 1])
    logits, _ = model.forward(params, vectors.arrays["input/tokens"])
    np.testing.assert_array_equal(vectors.arrays["activations/logits"], logits)
    kept = [name for name in vectors.arrays if name.startswith("activations/")]
    assert len(kept) == 13
    assert all("blocks.0." in name or name.endswith("logits") for name in kept)
    forward = {n: a for n, a in vectors.arrays.items() if n in kept or n == "loss"}
    assert compare(vectors, forward).agrees


def test_a_mask_of_ones_own_is_kept(checkpoint, tmp_path):
    _, _, write = checkpoint
    mask = np.array([[True, False, True, False, False]])
    tokens = np.array([[1, 2, 3, 4, 5]])
    files.save(tmp_path / "batch.npz", {"tokens": tokens, "mask": mask}, {})
    out = tmp_path / "golden.npz"
    arguments = ["--params", str(write("save_model")), "--tokens", str(tmp_path / "batch.npz")]
    assert cli.main(["golden", str(out), *arguments]) == 0
    arrays, _ = files.load(out)
    np.testing.assert_array_equal(arrays["input/mask"], mask)
    np.testing.assert_array_equal(arrays["input/tokens"], [[0, 2, 0, 4, 5]])


def test_a_map_that_was_found_serves_the_checkpoint_that_was_trained(tmp_path, tiny, checkpoint):
    model, params, _ = checkpoint
    found = rename(tiny, saved(tiny, per_head_fused), "auto").name_map
    maps.write(tmp_path / "names.json", found)
    trained = per_head_fused(trees.flatten(params), model)
    wrapped = {f"module.{name}": array for name, array in trained.items() if "norm" not in name}
    wrapped |= {f"module.{name}": array for name, array in trained.items() if "norm" in name}
    files.save(tmp_path / "trained.npz", wrapped, {})
    config = ["--config", '{"num_heads": 2, "seq_len": 5}']
    arguments = ["--params", str(tmp_path / "trained.npz"), *config]
    out = tmp_path / "golden.npz"
    names = ["--names", str(tmp_path / "names.json")]
    assert cli.main(["golden", str(out), *arguments, *names]) == 0
    arrays, _ = files.load(out)
    for name, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(arrays[f"params/{name}"], leaf)


def test_absent_biases_are_0_and_an_absent_head_is_tied(checkpoint, tmp_path, capsys):
    _, params, _ = checkpoint
    leaves = {n: a for n, a in trees.flatten(params).items() if not n.endswith("bias")}
    del leaves["head.kernel"]
    files.save(tmp_path / "bare.npz", leaves, {})
    out = tmp_path / "golden.npz"
    config = ["--config", '{"num_heads": 2, "seq_len": 5}']
    assert cli.main(["golden", str(out), "--params", str(tmp_path / "bare.npz"), *config]) == 0
    arrays, _ = files.load(out)
    assert not arrays["params/blocks.0.attention.query.bias"].any()
    np.testing.assert_array_equal(arrays["params/head.kernel"], leaves["embedding.table"].T)
    assert "head.kernel (tied to the embedding's table)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", "auto"], "received auto, which matches golden parameters"),
        ([], "config: num_heads is missing"),
        (["--config", '{"num_heads": 2}'], "config: seq_len is missing"),
        (["--config", '{"num_heads": 4, "seq_len": 5}'], "expected a multiple of num_heads"),
        (["--config", '{"num_heads": 2, "seq_len": 5, "num_layers": 3}'], "blocks.2."),
        (["--names", "torch"], "not known: embedding.table, blocks.0."),
        (["--config", '{"num_heads": 2, "seq_len": 5}', "--activations", "x"], "activations"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_told_why(
    checkpoint, tmp_path, capsys, options, message
):
    _, _, write = checkpoint
    out = tmp_path / "golden.npz"
    assert cli.main(["golden", str(out), "--params", str(write("own")), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()


def test_golden_vectors_are_not_written_under_the_name_of_another_format(tmp_path, capsys):
    assert cli.main(["golden", str(tmp_path / "x.pt")]) == 2
    assert "expected a name that ends in .npz or .safetensors" in capsys.readouterr().err
    assert cli.main(["golden", str(tmp_path / "x.npz"), "--tokens", "t.npy"]) == 2
    assert "expected --params" in capsys.readouterr().err
