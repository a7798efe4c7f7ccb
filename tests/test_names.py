"""Ports under their own names and layouts, as they are found out there, compared with marref."""

import numpy as np
import pytest

from marref import files
from marref.interop import maps
from marref.verify import golden
from marref.verify.comparison import Golden
from marref.verify.names import rename

SECTIONS = ("params/", "gradients/", "adam/1/", "clipped/10/")


@pytest.fixture(scope="module", params=["tiny", "small"])
def vectors(request):
    return made(request.param)


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
                mine[pattern.format(i=i, part=part, p=part[0]) + theirs] = array.T
    return mine


def bert(leaves, model):
    return unfused(leaves, model, "encoder.layer.{i}.attention.self.{part}.")


def x_transformers(leaves, model):
    return unfused(leaves, model, "attn_layers.layers.{i}.1.to_{p}.")


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
