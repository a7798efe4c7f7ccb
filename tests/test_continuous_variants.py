"""The paper's variants: gradients, what each place sees, and what is generated."""

import dataclasses

import numpy as np
import pytest

from marref import continuous, optim, trees
from marref.continuous import variants
from marref.continuous.layers import block
from marref.continuous.variants import CausalMAR, CrossEntropy, Diffusion, SquaredError, Variant
from marref.verify.gradients import check_gradients

from .continuous_oracle import exact, mp

SIZES = {
    "image_size": 4,
    "encoder_dim": 4,
    "encoder_layers": 1,
    "decoder_dim": 4,
    "decoder_layers": 1,
    "num_heads": 2,
    "mlp_ratio": 2,
    "buffer_size": 2,
    "num_classes": 3,
}
MASKED, CAUSAL = continuous.build(**SIZES), CausalMAR(**SIZES)
CODES = np.random.default_rng(7).normal(size=(5, 4))
HEADS = {
    "diffusion": Diffusion(4, features=4, num_blocks=1, num_steps=5),
    "cross-entropy": CrossEntropy(CODES),
    "squared error": SquaredError(4),
}
BACKBONES = {"masked": MASKED, "causal": CAUSAL}
every_variant = pytest.mark.parametrize(
    ("backbone", "head"), [(b, h) for b in BACKBONES for h in HEADS]
)


def made(backbone, head, order="random", seed=0):
    """A variant, parameters of which none is 0, a batch, and what is random."""
    variant = Variant(BACKBONES[backbone], HEADS[head], order)
    rng = np.random.default_rng(seed)
    params = trees.map_leaves(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), variant.init(rng)
    )
    return variant, params, rng.normal(size=(3, 1, 4, 4)), [0, 2, 2], variant.draw(rng, 3)


@every_variant
def test_gradients_are_complex_step_derivatives(backbone, head):
    variant, params, *batch = made(backbone, head)
    _, grads = variant.loss_and_grads(params, *batch)
    errors = check_gradients(
        lambda p: variant.loss_and_grads(p, *batch)[0],
        params,
        grads,
        max_entries=6,
        rng=np.random.default_rng(1),
    )
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("order", ["raster", "random"])
def test_a_causal_condition_depends_on_what_comes_before_it_alone(order):
    rng = np.random.default_rng(0)
    orders = np.arange(4)[np.newaxis] if order == "raster" else np.array([[2, 0, 3, 1]])
    params = trees.map_leaves(lambda x: rng.normal(size=x.shape), CAUSAL.init(rng))
    tokens = rng.normal(size=(1, 4, 4))
    z, _ = CAUSAL.forward(params, tokens, np.array([1]), orders)
    for place, position in enumerate(orders[0]):
        changed = tokens.copy()
        changed[0, position] += 1.0
        moved, _ = CAUSAL.forward(params, changed, np.array([1]), orders)
        differs = (moved != z).any(axis=2)[0]
        assert not differs[orders[0, : place + 1]].any()
        assert differs[orders[0, place + 1 :]].all()


def test_a_block_that_sees_everything_is_the_block():
    rng = np.random.default_rng(0)
    params = block.init(rng, 4, 8)
    x = rng.normal(size=(2, 3, 4))
    options = {"num_heads": 2, "epsilon": 1e-6}
    all_of_it, _ = block.forward(params, x, visible=np.ones((3, 3), bool), **options)
    np.testing.assert_array_equal(all_of_it, block.forward(params, x, **options)[0])


def test_pytorch_agrees_on_the_causal_model():
    """Stock layers, and attention with is_causal."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(3)
    params = trees.map_leaves(lambda x: rng.normal(size=x.shape), CAUSAL.init(rng))
    tokens, labels = rng.normal(size=(2, 4, 4)), np.array([1, 3])
    orders = np.array([[2, 0, 3, 1], [0, 1, 2, 3]])
    leaves = {
        name: torch.tensor(x, requires_grad=True) for name, x in trees.flatten(params).items()
    }
    t = trees.unflatten(leaves)

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)

    def attention(p, x):
        heads = [
            linear(p[name], x).reshape(2, -1, 2, 2).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        context = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return linear(p["output"], context.transpose(1, 2).reshape(x.shape))

    shifted = []
    for row, order in enumerate(orders):
        given = [
            t["class_embedding"]["table"][labels[row]] + t["positions"]["table"][i] for i in (0, 1)
        ]
        for position in order[:-1]:
            token = torch.tensor(tokens[row, position])
            place = t["positions"]["table"][2 + int(position)]
            given.append(linear(t["token_projection"], token) + place)
        for step, position in enumerate(order):
            given[1 + step] = given[1 + step] + t["targets"]["table"][int(position)]
        shifted.append(torch.stack(given))
    h = norm(t["token_norm"], torch.stack(shifted))
    for p in t["blocks"]:
        h = h + attention(p["attention"], norm(p["attention_norm"], h))
        up = functional.gelu(linear(p["feed_forward"]["up"], norm(p["feed_forward_norm"], h)))
        h = h + linear(p["feed_forward"]["down"], up)
    h = norm(t["norm"], h)[:, 1:]
    z = torch.stack([h[row, np.argsort(order)] for row, order in enumerate(orders)])
    z = z + t["diffusion_positions"]["table"]
    found, cache = CAUSAL.forward(params, tokens, labels, orders)
    np.testing.assert_allclose(found, z.detach(), rtol=0, atol=1e-12)
    dz = rng.normal(size=found.shape)
    z.backward(torch.tensor(dz))
    grads = trees.flatten(CAUSAL.backward(params, dz, cache))
    for name, leaf in leaves.items():
        scale = max(1.0, float(leaf.grad.abs().max()))
        np.testing.assert_allclose(grads[name], leaf.grad, rtol=0, atol=1e-11 * scale, err_msg=name)


def test_cross_entropy_is_that_of_the_nearest_code_in_fifty_digits():
    head, rng = HEADS["cross-entropy"], np.random.default_rng(2)
    params, z = head.init(rng, 3, np.float64), rng.normal(size=(2, 3))
    x = CODES[[4, 1]] + 0.01
    value, _, _ = head.loss_and_grads(params, z, x, {})
    logits = [
        [
            sum(a * b for a, b in zip(row, column, strict=True))
            for column in zip(*kernel, strict=True)
        ]
        for kernel in [exact(params["kernel"])]
        for row in exact(z)
    ]
    expected = [
        mp.log(sum(mp.exp(v) for v in row)) - row[code]
        for row, code in zip(logits, (4, 1), strict=True)
    ]
    assert value == pytest.approx(float(sum(expected) / 2), rel=1e-14)


def test_codes_are_drawn_as_often_as_the_softmax_says():
    """Within 4 standard deviations of a share over 40,000 draws; the seed is fixed."""
    head = CrossEntropy(CODES, temperature=0.5)
    logits = np.array([0.0, 0.5, 1.0, -1.0, 0.2])
    params = {"kernel": logits[np.newaxis], "bias": np.zeros(5)}
    drawn = head.sample(params, np.ones((40_000, 1)), np.random.default_rng(0))
    shares = np.bincount(head.nearest(drawn), minlength=5) / 40_000
    p = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    assert (np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_the_squared_error_learns_the_mean_and_has_no_variance():
    """Of tokens that are 1 or -1, given nothing: 0."""
    variant = Variant(MASKED, HEADS["squared error"])
    rng = np.random.default_rng(0)
    params = variant.init(rng)
    images = np.where(rng.random((64, 1, 1, 1)) < 0.5, 1.0, -1.0) * np.ones((1, 1, 4, 4))
    state = optim.init(params)
    for _ in range(60):
        draws = {**variant.draw(rng, 64), "num_masked": 4}
        _, grads = variant.loss_and_grads(params, images, None, draws)
        params, state = optim.step(params, grads, state, 0.01)
    made = [variant.sample(params, None, np.random.default_rng(s), num_steps=1) for s in (0, 1)]
    np.testing.assert_array_equal(*made)
    assert np.abs(made[0]).max() < 0.5


@every_variant
@pytest.mark.parametrize("order", ["raster", "random"])
def test_samples_depend_on_the_generator_alone(backbone, head, order):
    variant, params, *_ = made(backbone, head, order)
    first, again, other = (
        variant.sample(params, [1, 3], np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first.shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(first, again)
    if head != "squared error" or order == "random":
        assert (first != other).any()


def test_in_raster_order_the_first_token_is_generated_first_and_learnt_from_nothing():
    variant, params, *_ = made("causal", "squared error", "raster")
    asked = []

    class Noting(SquaredError):
        def sample(self, params, z, rng):
            asked.append(z.copy())
            return super().sample(params, z, rng)

    noting = dataclasses.replace(variant, head=Noting(4))
    found = continuous.tokens.from_images(noting.sample(params, [1], np.random.default_rng(0)), 2)
    z, _ = CAUSAL.forward(params, found, np.array([1]), np.arange(4)[np.newaxis])
    np.testing.assert_allclose(np.concatenate(asked), z[0], rtol=0, atol=1e-12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="decoder_dim: received 6, expected 4"):
        CausalMAR(**{**SIZES, "decoder_dim": 6})
    with pytest.raises(ValueError, match="order"):
        Variant(MASKED, HEADS["diffusion"], "spiral")
    with pytest.raises(ValueError, match="head: token_dim 5, expected 4"):
        Variant(MASKED, SquaredError(5))
    with pytest.raises(ValueError, match="temperature"):
        CrossEntropy(CODES, temperature=0.0)
    with pytest.raises(ValueError, match="codes: shape"):
        CrossEntropy(CODES[0])
    for changed in ({"clip": -1.0}, {"schedule": "sine"}, {"num_steps": 0}, {"copies": 0}):
        with pytest.raises(ValueError, match=r"clip|schedule|steps|copies"):
            Diffusion(4, **changed)
    variant, params, *_ = made("causal", "squared error")
    with pytest.raises(ValueError, match="num_steps: received 2, expected 4"):
        variant.sample(params, [1], np.random.default_rng(0), num_steps=2)
    for tokens, num_codes in ((np.ones(3), 1), (np.ones((3, 2)), 4), (np.full((3, 2), np.nan), 1)):
        with pytest.raises(ValueError, match=r"tokens|num_codes"):
            variants.codebook(tokens, num_codes, np.random.default_rng(0))


def test_a_codebook_has_the_centres_of_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    tokens = np.repeat(centres, 20, axis=0) + 0.1 * rng.normal(size=(60, 2))
    codes = variants.codebook(tokens, 3, rng)
    order = np.argsort(codes @ [1.0, 2.0])
    np.testing.assert_allclose(codes[order], centres, atol=0.2)
