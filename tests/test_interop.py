"""The names and layouts of other frameworks: exact both ways, and equal to the frameworks' own."""

import importlib
import re

import numpy as np
import pytest
from hypothesis import given

import marref
from marref import interop, trees
from tests import strategies

TOLERANCE = 1e-12
MODEL = marref.build(vocab_size=9, embed_dim=12, num_layers=2, num_heads=3, seq_len=6, dropout=0.0)

# Each framework: its module, and how its names are written from parameters and number of heads.
WRITERS = {
    "torch": (interop.torch, lambda params, heads: interop.torch.to_state_dict(params)),
    "linen": (interop.flax, interop.flax.to_variables),
    "nnx": (interop.flax, interop.flax.to_pure_dict),
    "axon": (interop.axon, lambda params, heads: interop.axon.to_model_state(params)),
}
every_framework = pytest.mark.parametrize(("module", "write"), WRITERS.values(), ids=WRITERS)


def flat(state, separator="."):
    """The arrays of a nested dict by joined names."""
    if not isinstance(state, dict):
        return {"": state}
    return {
        f"{key}{separator}{name}".rstrip(separator): array
        for key, child in state.items()
        for name, array in flat(child, separator).items()
    }


@pytest.fixture
def params():
    return strategies.random_params(MODEL, np.random.default_rng(1))


@pytest.fixture
def batch():
    rng = np.random.default_rng(2)
    targets = rng.integers(1, MODEL.vocab_size, (3, 5))
    tokens, mask = marref.mask_tokens(targets, 0.6, rng)
    return tokens, targets, mask


def assert_same_bits(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    scale = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert np.abs(found[name] - array).max() <= TOLERANCE * scale, name


# Exact both ways


@every_framework
@given(case=strategies.cases(dtype=np.float32))
def test_writing_and_reading_back_gives_the_same_bits(module, write, case):
    assert_same_bits(module.to_params(write(case.params, case.model.num_heads)), case.params)


@every_framework
@pytest.mark.parametrize("separator", [".", "/"])
def test_flat_names_are_read_as_well_as_nested_ones(module, write, separator, params):
    state = flat(write(params, MODEL.num_heads), separator)
    assert_same_bits(module.to_params(state), params)
    assert_same_bits(trees.unflatten(module.to_names(state)), module.to_params(state))


@every_framework
def test_any_subset_of_the_names_can_be_mapped(module, write, params):
    leaves, mapped = trees.flatten(params), {}
    for name, array in flat(write(params, MODEL.num_heads)).items():
        mapped |= module.to_names({name: array})
    assert mapped.keys() == leaves.keys()
    assert all(np.array_equal(mapped[name], leaves[name]) for name in leaves)
    assert module.to_names({}) == {}


@every_framework
def test_what_is_returned_shares_no_memory_with_what_was_given(module, write, params):
    state = write(params, MODEL.num_heads)
    read = module.to_params(state)
    for array in flat(state).values():
        array[...] = np.nan
    assert all(np.isfinite(array).all() for array in trees.flatten(read).values())
    assert all(np.isfinite(array).all() for array in trees.flatten(params).values())


def test_without_its_params_level_a_linen_tree_is_read_too(params):
    state = interop.flax.to_variables(params, MODEL.num_heads)["params"]
    assert_same_bits(interop.flax.to_params(state), params)


def test_every_number_of_heads_gives_the_same_parameters(params):
    for num_heads in (1, 2, 4, 12):
        state = interop.flax.to_variables(params, num_heads)
        assert state["params"]["blocks_0"]["attention"]["query"]["kernel"].shape[1] == num_heads
        assert_same_bits(interop.flax.to_params(state), params)


def test_more_than_ten_blocks_keep_their_order():
    model = marref.build(vocab_size=2, embed_dim=2, num_layers=12, num_heads=1, seq_len=1)
    params = strategies.random_params(model, np.random.default_rng(0))
    for module, write in WRITERS.values():
        names = sorted(flat(write(params, 1)).items())
        assert_same_bits(module.to_params(dict(names)), params)


# The names and orientations that the frameworks have


def test_torch_fuses_the_projections_and_transposes_the_kernels(params):
    state = interop.torch.to_state_dict(params)
    attention = params["blocks"][1]["attention"]
    parts = [attention[name] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(
        state["encoder.layers.1.self_attn.in_proj_weight"],
        np.vstack([part["kernel"].T for part in parts]),
    )
    np.testing.assert_array_equal(
        state["encoder.layers.1.self_attn.in_proj_bias"],
        np.concatenate([part["bias"] for part in parts]),
    )
    np.testing.assert_array_equal(state["head.weight"], params["head"]["kernel"].T)


def test_axon_counts_its_layers_from_one_and_calls_scale_gamma(params):
    state = interop.axon.to_model_state(params)
    first = params["blocks"][0]
    assert sorted(state) == sorted(
        ["token_embed", "final_norm", "lm_head"]
        + [
            f"layer_{number}_{part}"
            for number in (1, 2)
            for part in (
                *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_out"),
                *("ffn_norm", "ffn_up", "ffn_down"),
            )
        ]
    )
    assert state["layer_1_attn_norm"].keys() == {"gamma", "beta"}
    np.testing.assert_array_equal(
        state["layer_1_attn_k"]["kernel"], first["attention"]["key"]["kernel"]
    )


def test_the_embedding_that_edifice_computes_counts_row_by_row(params):
    table = interop.axon.fixed_embedding(3, 4, np.float64)
    np.testing.assert_array_equal(table, [[0, 0.5, 1, 1.5], [2, 2.5, 3, 3.5], [4, 4.5, 5, 5.5]])
    assert interop.axon.fixed_embedding(3, 4).dtype == np.float32
    state = interop.axon.to_model_state(params)
    del state["token_embed"]
    with pytest.raises(ValueError, match=r"token_embed\.kernel is missing"):
        interop.axon.to_params(state)
    kernel = interop.axon.fixed_embedding(MODEL.vocab_size, MODEL.embed_dim, np.float64)
    read = interop.axon.to_params({**state, "token_embed": {"kernel": kernel}})
    np.testing.assert_array_equal(read["embedding"]["table"], kernel)


# PyTorch itself


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def torch_model(torch):
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(MODEL.vocab_size, MODEL.embed_dim)
            layer = nn.TransformerEncoderLayer(
                MODEL.embed_dim,
                MODEL.num_heads,
                4 * MODEL.embed_dim,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(
                layer,
                MODEL.num_layers,
                norm=nn.LayerNorm(MODEL.embed_dim),
                enable_nested_tensor=False,
            )
            self.head = nn.Linear(MODEL.embed_dim, MODEL.vocab_size)
            self.double()

        def forward(self, tokens):
            positions = torch.tensor(marref.sinusoidal_table(tokens.shape[1], MODEL.embed_dim))
            return self.head(self.encoder(self.embedding(tokens) + positions))

    return Model()


def test_a_torch_model_loads_the_state_dict_strictly_and_computes_the_same(
    torch, torch_model, params, batch
):
    state = interop.torch.to_state_dict(params)
    torch_model.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    logits = torch_model(torch.from_numpy(batch[0]))
    assert_close({"logits": logits.detach().numpy()}, {"logits": MODEL(params, batch[0])})


def test_a_torch_model_can_be_read_and_run(torch, torch_model, batch):
    params = interop.torch.to_params(torch_model.state_dict())
    logits = torch_model(torch.from_numpy(batch[0]))
    assert_close({"logits": MODEL(params, batch[0])}, {"logits": logits.detach().numpy()})


def test_gradients_and_stepped_parameters_of_torch_are_those_of_marref(torch, torch_model, batch):
    params = interop.torch.to_params(torch_model.state_dict())
    tokens, targets, mask = (torch.from_numpy(array) for array in batch)
    optimiser = torch.optim.SGD(torch_model.parameters(), lr=0.5)
    torch.nn.functional.cross_entropy(torch_model(tokens)[mask], targets[mask]).backward()
    optimiser.step()

    _, grads = marref.loss_and_grads(MODEL, params, *batch)
    stepped = trees.map_leaves(lambda leaf, grad: leaf - 0.5 * grad, params, grads)
    found = interop.torch.to_params({n: p.grad for n, p in torch_model.named_parameters()})
    assert_close(trees.flatten(found), trees.flatten(grads))
    named = interop.torch.to_names(torch_model.state_dict())
    assert_close(named, trees.flatten(stepped))


def test_bfloat16_of_torch_is_widened_exactly(torch, torch_model):
    torch_model.to(torch.bfloat16)
    leaves = trees.flatten(interop.torch.to_params(torch_model.state_dict()))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    expected = torch_model.head.weight.detach().double().numpy().T
    np.testing.assert_array_equal(leaves["head.kernel"], expected)


# Flax itself


@pytest.fixture
def jax():
    pytest.importorskip("flax")
    jax = importlib.import_module("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def linen_model(jax):
    from flax import linen

    double = {"dtype": np.float64, "param_dtype": np.float64}

    class Block(linen.Module):
        def setup(self):
            self.attention_norm = linen.LayerNorm(epsilon=1e-5, **double)
            self.attention = linen.MultiHeadDotProductAttention(MODEL.num_heads, **double)
            self.feed_forward_norm = linen.LayerNorm(epsilon=1e-5, **double)
            self.up = linen.Dense(4 * MODEL.embed_dim, **double)
            self.down = linen.Dense(MODEL.embed_dim, **double)

        def __call__(self, x):
            x = x + self.attention(self.attention_norm(x))
            hidden = linen.gelu(self.up(self.feed_forward_norm(x)), approximate=False)
            return x + self.down(hidden)

    class Model(linen.Module):
        def setup(self):
            self.embedding = linen.Embed(MODEL.vocab_size, MODEL.embed_dim, **double)
            self.blocks = [Block() for _ in range(MODEL.num_layers)]
            self.final_norm = linen.LayerNorm(epsilon=1e-5, **double)
            self.head = linen.Dense(MODEL.vocab_size, **double)

        def __call__(self, tokens):
            x = self.embedding(tokens)
            x = x + marref.sinusoidal_table(tokens.shape[1], MODEL.embed_dim)
            for block in self.blocks:
                x = block(x)
            return self.head(self.final_norm(x))

    return Model()


@pytest.fixture
def nnx_model(jax):
    from flax import nnx

    double = {"dtype": np.float64, "param_dtype": np.float64, "rngs": nnx.Rngs(0)}

    # nnx's own goes through jax.nn.dot_product_attention, whose softmax is always in float32.
    def attention_fn(query, key, value, **options):
        scores = jax.numpy.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return jax.numpy.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)

    class Block(nnx.Module):
        def __init__(self):
            features = MODEL.embed_dim
            self.attention_norm = nnx.LayerNorm(features, epsilon=1e-5, **double)
            self.attention = nnx.MultiHeadAttention(
                MODEL.num_heads, features, decode=False, attention_fn=attention_fn, **double
            )
            self.feed_forward_norm = nnx.LayerNorm(features, epsilon=1e-5, **double)
            self.up = nnx.Linear(features, 4 * features, **double)
            self.down = nnx.Linear(4 * features, features, **double)

        def __call__(self, x):
            x = x + self.attention(self.attention_norm(x))
            return x + self.down(nnx.gelu(self.up(self.feed_forward_norm(x)), approximate=False))

    class Model(nnx.Module):
        def __init__(self):
            self.embedding = nnx.Embed(MODEL.vocab_size, MODEL.embed_dim, **double)
            self.blocks = nnx.List([Block() for _ in range(MODEL.num_layers)])
            self.final_norm = nnx.LayerNorm(MODEL.embed_dim, epsilon=1e-5, **double)
            self.head = nnx.Linear(MODEL.embed_dim, MODEL.vocab_size, **double)

        def __call__(self, tokens):
            x = self.embedding(tokens)
            x = x + marref.sinusoidal_table(tokens.shape[1], MODEL.embed_dim)
            for block in self.blocks:
                x = block(x)
            return self.head(self.final_norm(x))

    return Model()


def flax_loss(jax, logits, targets, mask):
    chosen = jax.nn.log_softmax(logits)[mask]
    return -chosen[np.arange(len(chosen)), targets[mask]].mean()


def test_a_linen_model_takes_the_variables_and_computes_the_same(jax, linen_model, params, batch):
    tokens, targets, mask = batch
    variables = interop.flax.to_variables(params, MODEL.num_heads)
    own = linen_model.init(jax.random.key(0), tokens)
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, variables)
    logits = linen_model.apply(variables, tokens)
    assert_close({"logits": np.asarray(logits)}, {"logits": MODEL(params, tokens)})

    grads = jax.grad(
        lambda variables: flax_loss(jax, linen_model.apply(variables, tokens), targets, mask)
    )(variables)
    _, expected = marref.loss_and_grads(MODEL, params, *batch)
    assert_close(trees.flatten(interop.flax.to_params(grads)), trees.flatten(expected))
    assert_close(interop.flax.to_names(flat(grads, "/")), trees.flatten(expected))


def test_an_nnx_model_takes_the_pure_dict_and_computes_the_same(jax, nnx_model, params, batch):
    from flax import nnx

    tokens, targets, mask = batch
    state = nnx.state(nnx_model, nnx.Param)
    pure = interop.flax.to_pure_dict(params, MODEL.num_heads)
    assert jax.tree.map(np.shape, nnx.to_pure_dict(state)) == jax.tree.map(np.shape, pure)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(nnx_model, state)
    assert_close({"logits": np.asarray(nnx_model(tokens))}, {"logits": MODEL(params, tokens)})
    assert_same_bits(interop.flax.to_params(nnx.state(nnx_model, nnx.Param)), params)

    grads = nnx.grad(lambda model: flax_loss(jax, model(tokens), targets, mask))(nnx_model)
    _, expected = marref.loss_and_grads(MODEL, params, *batch)
    assert_close(trees.flatten(interop.flax.to_params(grads)), trees.flatten(expected))


def test_bfloat16_of_jax_is_widened_exactly(jax):
    array = jax.numpy.asarray([0.1, 2.5], jax.numpy.bfloat16)
    read = interop.flax.to_names({"head.bias": array})["head.bias"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.asarray(array.astype(np.float32)))


# Errors


@pytest.mark.parametrize(
    ("module", "name", "nearest"),
    [
        (interop.torch, "encoder.layers.3.self_atn.out_proj.weight", "3.self_attn.out_proj.weight"),
        (interop.torch, "module.head.weight", "head.weight"),
        (interop.torch, "encoder.layers.01.norm1.bias", "norm1.bias"),
        (interop.torch, "encoder.layers.<i>.norm1.bias", "encoder.layers.<i>.norm1.bias"),
        (interop.flax, "params/blocks_5/attention/output/kernel", "blocks_5.attention.out.kernel"),
        (interop.flax, "blocks.5.attention.output.kernel", "blocks.5.attention.out.kernel"),
        (interop.axon, "layer_2_attn_query.kernel", "layer_2_attn_q.kernel"),
        (interop.axon, "layer_0_ffn_up.bias", "layer_1_ffn_up.bias"),
        (interop.axon, "lm_haed.bias", "lm_head.bias"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(module, name, nearest):
    with pytest.raises(ValueError, match=f"is unknown; nearest: .*{re.escape(nearest)}"):
        module.to_names({name: np.ones(2)})


@every_framework
def test_missing_unexpected_and_misshapen_arrays_are_named_together(module, write, params):
    state = flat(write(params, MODEL.num_heads))
    renamed, cut = [name for name in state if name.endswith("bias")][:2]
    state[f"{renamed}s"] = state.pop(renamed)
    state[cut] = state[cut][:1]
    with pytest.raises(ValueError, match=r"^state: ") as error:
        module.to_params(state)
    shown = [name.removeprefix("params.") for name in (renamed, cut)]
    assert f"{shown[0]} is missing (nearest: {shown[0]}s)" in str(error.value)
    assert f"{shown[0]}s is not expected (nearest: {shown[0]})" in str(error.value)
    assert f"{shown[1]} is misshapen (shape [" in str(error.value)


@every_framework
def test_a_long_list_of_faults_is_cut_short(module, write, params):
    state = {f"x{name}": array for name, array in flat(write(params, MODEL.num_heads)).items()}
    with pytest.raises(ValueError, match=r"\d+ more are missing;.*\d+ more are not expected$"):
        module.to_params(state)


@every_framework
def test_a_tree_that_is_not_one_of_parameters_is_not_written(module, write, params):
    del params["blocks"][0]["attention"]["key"]["bias"]
    with pytest.raises(ValueError, match=r"^params: blocks\.0\.attention\.key\.bias is missing"):
        write(params, MODEL.num_heads)


@every_framework
def test_a_block_that_was_left_out_is_missed(module, write, params):
    state = flat(write(params, MODEL.num_heads))
    first = "1" if module is interop.axon else "0"
    state = {name: a for name, a in state.items() if not re.search(f"[._]{first}[._]", name)}
    with pytest.raises(ValueError, match="is missing"):
        module.to_params(state)


def test_sizes_that_no_model_has_are_refused():
    state = interop.torch.to_state_dict(strategies.random_params(MODEL, np.random.default_rng(0)))
    for shape, message in {(9,): "expected .vocab_size, embed_dim", (9, 7): "even"}.items():
        with pytest.raises(ValueError, match=message):
            interop.torch.to_params({**state, "embedding.weight": np.ones(shape)})


@pytest.mark.parametrize("shape", [(), (7,), (7, 3), (6, 3, 1)])
def test_a_fused_projection_without_three_parts_is_refused(shape):
    for name in ("in_proj_weight", "in_proj_bias"):
        with pytest.raises(ValueError, match=r"expected \[3\*embed_dim"):
            interop.torch.to_names({f"encoder.layers.0.self_attn.{name}": np.ones(shape)})


def test_attention_whose_heads_are_already_merged_is_refused_in_flax_names():
    with pytest.raises(ValueError, match="heads and head_dim apart"):
        interop.flax.to_names({"blocks_0.attention.query.kernel": np.ones((4, 4))})


@pytest.mark.parametrize("num_heads", [0, 5, 2.0])
def test_a_number_of_heads_that_does_not_divide_is_refused(num_heads, params):
    with pytest.raises((TypeError, ValueError), match=r"^num_heads: received"):
        interop.flax.to_variables(params, num_heads)


@pytest.mark.parametrize("value", ["text", None, [{}], [[1.0], [1.0, 2.0]]])
def test_what_is_no_array_of_numbers_is_refused_by_name(value):
    for module in (interop.torch, interop.flax):
        with pytest.raises((TypeError, ValueError), match=r"arrays: head\.bias"):
            module.to_names({"head.bias": value})


def test_two_spellings_of_one_name_are_refused():
    two = np.ones(2)
    with pytest.raises(ValueError, match=r"two arrays are called head\.bias"):
        interop.flax.to_names({"head.bias": two, "params/head/bias": two})
    with pytest.raises(ValueError, match="two of them are blocks"):
        interop.flax.to_names({"blocks_0.up.bias": two, "blocks.0.up.bias": two})
    with pytest.raises(TypeError, match="received list, expected a mapping"):
        interop.torch.to_params([two])
