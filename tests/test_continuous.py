"""Continuous MAR, held to numbers of its published code, and its gradients to complex steps.

The check vector is that of the code published with Li et al. 2024 (LTH14/mar at fe470ac), run in
float64: parameters, images, times and noise are sines and cosines of their place.
"""

import dataclasses

import numpy as np
import pytest

from marref import continuous, optim, trees
from marref.continuous import diffusion, sampling, tokens
from marref.continuous.layers import network
from marref.continuous.loss import masked_by
from marref.interop import mar
from marref.verify import check_continuous

from . import continuous_oracle as oracle

MODEL = continuous.build(
    image_size=4,
    channels=1,
    patch_size=2,
    encoder_dim=4,
    encoder_layers=1,
    decoder_dim=4,
    decoder_layers=1,
    num_heads=2,
    mlp_ratio=2,
    buffer_size=2,
    num_classes=3,
    diffusion_dim=4,
    diffusion_layers=1,
    diffusion_batch_mul=1,
)
ORDER = [
    "fake_latent",
    "encoder_pos_embed_learned",
    "mask_token",
    "decoder_pos_embed_learned",
    "diffusion_pos_embed_learned",
    "class_emb.weight",
]
BLOCK = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
MODULES = [
    "z_proj",
    "z_proj_ln",
    *(f"encoder_blocks.0.{name}" for name in BLOCK),
    "encoder_norm",
    "decoder_embed",
    *(f"decoder_blocks.0.{name}" for name in BLOCK),
    "decoder_norm",
    "diffloss.net.time_embed.mlp.0",
    "diffloss.net.time_embed.mlp.2",
    "diffloss.net.cond_embed",
    "diffloss.net.input_proj",
    "diffloss.net.res_blocks.0.in_ln",
    "diffloss.net.res_blocks.0.mlp.0",
    "diffloss.net.res_blocks.0.mlp.2",
    "diffloss.net.res_blocks.0.adaLN_modulation.1",
    "diffloss.net.final_layer.linear",
    "diffloss.net.final_layer.adaLN_modulation.1",
]
ORDER += [f"{module}.{kind}" for module in MODULES for kind in ("weight", "bias")]
IMAGES = np.cos(0.37 * np.arange(32)).reshape(2, 1, 4, 4)
LABELS = np.array([2, 0])
DRAWS = {
    "orders": np.array([[2, 0, 3, 1], [1, 3, 0, 2]]),
    "num_masked": 3,
    "label_dropped": np.zeros(2, bool),
    "timesteps": np.array([0, 1, 10, 250, 500, 750, 998, 999]),
    "noise": np.sin(0.53 * np.arange(32) + 0.2).reshape(8, 4),
}
MASK = masked_by(DRAWS["orders"], 3)


def check_vector_params():
    shapes = {name: array.shape for name, array in mar.to_state_dict(_zeros(), MODEL).items()}
    state = {}
    for j, name in enumerate(ORDER):
        size = int(np.prod(shapes[name]))
        state[name] = (0.3 * np.sin(1 + np.arange(size) + 0.7 * j)).reshape(shapes[name])
    return mar.to_params(state, MODEL)


def _zeros():
    return trees.map_leaves(np.zeros_like, MODEL.init(np.random.default_rng(0)))


@pytest.fixture(scope="module")
def params():
    return check_vector_params()


@pytest.fixture(scope="module")
def found(params):
    return continuous.loss_and_grads(MODEL, params, IMAGES, LABELS, DRAWS, return_parts=True)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_the_forward_pass_is_that_of_the_published_code(params):
    clean = tokens.from_images(IMAGES, 2)
    close(
        clean[0, 1],
        [0.7384685587295879, 0.44466151674170695, -0.6045522710579293, -0.8516909814865656],
    )
    z, cache = MODEL.forward(params, clean, LABELS, MASK)
    encoded, _ = MODEL.encode(params, clean, LABELS, cache["kept"], None)
    close(
        encoded[0, 2],
        [-0.3895256787771984, 0.26981737319099297, 0.0750562496939032, 0.45816098179832326],
    )
    close(
        z[0, 0],
        [0.05108225379186221, -0.433256075419054, -0.23266538762481004, -0.014061380345459118],
    )
    close(
        z[1, 3],
        [0.21715650529786576, -0.4104725528868798, -0.319903081050267, -0.16827011973083442],
    )


MSE = [
    0.8615562053923024,
    0.434216661158195,
    0.4566755409770197,
    1.0681541789951023,
    0.4357638364362134,
    0.5415036321274946,
    0.9358290133201674,
    0.40572891475991585,
]
VB = [
    1.506447469949062,
    0.2936421126031243,
    0.04541085642218144,
    0.006669786939755533,
    0.001964283625618003,
    0.003483980322801322,
    2.025178587423879,
    292.3792763024397,
]


def test_the_loss_is_that_of_the_published_code_row_by_row(found):
    loss, _, parts = found
    masked = MASK.ravel()
    np.testing.assert_array_equal(parts["rows"]["index"], np.flatnonzero(masked))
    close(parts["rows"]["squared_error"], np.array(MSE)[masked])
    close(parts["rows"]["bound"], np.array(VB)[masked])
    close(loss, 49.6187724980645)
    close(parts["squared_error"] + parts["bound"], loss)


NORMS = {
    "class_emb.weight": 7.86119286921e-07,
    "z_proj.weight": 1.90857954874e-06,
    "mask_token": 0.00113375670901,
    "encoder_pos_embed_learned": 2.05805820535e-06,
    "decoder_pos_embed_learned": 0.00177434546387,
    "diffusion_pos_embed_learned": 0.00570234658111,
    "encoder_blocks.0.attn.qkv.weight": 9.55404608405e-07,
    "decoder_blocks.0.mlp.fc2.weight": 0.00046241574545,
    "diffloss.net.time_embed.mlp.0.weight": 0.0693250695607,
    "diffloss.net.cond_embed.weight": 0.0157608677065,
    "diffloss.net.res_blocks.0.adaLN_modulation.1.weight": 0.0232359891255,
    "diffloss.net.final_layer.linear.weight": 0.690453248248,
}


def test_gradients_have_the_norms_of_the_published_code(found):
    grads = mar.to_state_dict(found[1], MODEL)
    for name, norm in NORMS.items():
        np.testing.assert_allclose(np.linalg.norm(grads[name]), norm, rtol=2e-11)


def test_sampling_is_that_of_the_published_code(params):
    z, _ = MODEL.forward(params, tokens.from_images(IMAGES, 2), LABELS, MASK)
    rows = z.reshape(8, 4)
    start = np.cos(np.arange(32)).reshape(8, 4)
    plain = _chain(params, start, [rows], 1.0)
    close(
        plain[0], [14607.550135445106, 23063.144370485836, -5900.829558046882, -22674.815482816044]
    )
    guided = _chain(params, start[:4], [rows[:4], rows[4:]], 2.5)
    close(
        guided[0], [14607.68565208461, 23063.117614290168, -5900.930096653166, -22674.65729378309]
    )


def _chain(params, start, conditions, scale):
    draws = {
        "start_noise": start[:, np.newaxis],
        "step_noise": np.zeros((5, len(start), 1, 4)),
    }
    plan = sampling.Plan(draws, [], 1, 0.0, 1.0, "constant", None)
    sampler = sampling.Sampler(MODEL, params, diffusion.process("cosine", 5))
    return sampler.chain(plan, np.ones((len(start), 1), bool), conditions, scale)


def test_the_schedule_has_the_numbers_of_the_published_code():
    steps = diffusion.process("cosine")
    expected = {
        0: 4.128422482196914e-05,
        1: 4.614175273665033e-05,
        500: 0.003155691441585007,
        998: 0.7499993929011166,
    }
    for index, beta in expected.items():
        np.testing.assert_allclose(steps.beta[index], beta, rtol=1e-12)
    bars = {
        0: 0.999958715775178,
        500: 0.492285172448803,
        998: 2.428766907034855e-06,
        999: 2.428766907034857e-09,
    }
    for index, bar in bars.items():
        np.testing.assert_allclose(steps.alpha_bar[index], bar, rtol=1e-12)
    np.testing.assert_allclose(steps.low[:2], -10.734082532465003, rtol=1e-13)
    assert diffusion.respace(5).tolist() == [0, 250, 500, 749, 999]
    hundred = diffusion.respace(100).tolist()
    assert hundred[:11] == [0, 10, 20, 30, 40, 50, 61, 71, 81, 91, 101]
    assert hundred[-6:] == [949, 959, 969, 979, 989, 999]
    all_of_them = diffusion.process("cosine", 1000)
    np.testing.assert_array_equal(all_of_them.timestep, np.arange(1000))


def test_every_gradient_agrees_with_numerical_derivatives():
    rows = list(check_continuous.run())
    assert [row for row in rows if not row.passed] == []
    checked = {row.name for row in rows if row.part in ("transformer", "model")}
    assert checked == set(check_continuous.MODEL.parameter_shapes)
    in_transformer = [row for row in rows if row.part == "transformer"]
    assert all(row.errors["central"] > 0 for row in in_transformer), "none is 0 for nothing"


def test_at_the_start_a_gradient_check_would_prove_nothing():
    params, images = MODEL.init(np.random.default_rng(0)), IMAGES
    state, moved = optim.init(params), []
    for _ in range(3):
        _, grads = continuous.loss_and_grads(MODEL, params, images, LABELS, DRAWS)
        leaves = trees.flatten(grads)
        moved.append({name for name, leaf in leaves.items() if leaf.any()})
        params, state = optim.step(params, grads, state, 1e-3)
    output = {"diffusion.output.kernel", "diffusion.output.bias"}
    modulated = {f"diffusion.final_modulation.{kind}" for kind in ("kernel", "bias")}
    modulated |= {f"diffusion.blocks.0.modulation.{kind}" for kind in ("kernel", "bias")}
    into = {f"diffusion.input.{kind}" for kind in ("kernel", "bias")}
    assert moved[0] <= output
    assert moved[1] <= output | modulated | into
    assert "mask_vector" in moved[2]


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_loss_of_a_row_is_that_of_the_oracle(t, schedule):
    rng = np.random.default_rng(t)
    clean = np.array([-1.0, 0.25, 1.0, -0.3])
    noise, v = rng.normal(size=4), rng.normal(size=4)
    e = noise + 0.3 * rng.normal(size=4)
    output = np.concatenate([e, v])
    rows = clean[np.newaxis], np.array([t]), noise[np.newaxis]
    steps = diffusion.process(schedule)
    squared, bound, _ = diffusion.loss_forward(steps, output[np.newaxis], *rows)
    expected = oracle.row_loss(*map(oracle.exact, (output, clean, noise)), t, schedule)
    np.testing.assert_allclose([squared[0], bound[0]], [float(x) for x in expected], rtol=1e-10)
    noisy = rng.normal(size=4)
    back = diffusion.step_back(
        steps, output[np.newaxis], noisy[np.newaxis], t, noise[np.newaxis], 0.7, None
    )
    exact = map(oracle.exact, (output, noisy))
    expected = oracle.step_back(*exact, t, oracle.exact(noise), oracle.mp.mpf(0.7), schedule)
    np.testing.assert_allclose(back[0], [float(x) for x in expected], rtol=1e-10)


@pytest.mark.parametrize("num_masked", [1, 3, 4])
def test_the_forward_pass_and_the_loss_are_those_of_the_oracle(num_masked):
    """Of two channels, with an encoder and a decoder that differ, on two copies of the batch."""
    model = dataclasses.replace(
        MODEL,
        channels=2,
        decoder_dim=6,
        decoder_layers=2,
        diffusion_dim=5,
        diffusion_layers=2,
        diffusion_batch_mul=2,
        layer_norm_epsilon=1e-5,
        noise_schedule="linear",
    )
    rng = np.random.default_rng(num_masked)
    params = trees.map_leaves(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), model.init(rng)
    )
    images, labels = rng.normal(size=(2, 2, 4, 4)), np.array([1, 3])
    draws = {**model.draw(rng, 2), "num_masked": num_masked, "label_dropped": np.zeros(2, bool)}
    draws["timesteps"][:8] = [0, 1, 999, 500, 998, 2, 0, 0]
    of_model = {"num_heads": 2, "buffer_size": 2, "epsilon": model.layer_norm_epsilon}
    digits = oracle.exact(params)

    masked = masked_by(draws["orders"], num_masked)
    clean = tokens.from_images(images, 2)
    z, _ = model.forward(params, clean, labels, masked)
    for row, label in enumerate(labels):
        patches = oracle.tokens_of(oracle.exact(images[row]), 2)
        expected = oracle.conditions(digits, patches, label, masked[row], **of_model)
        assert_near(z[row], expected)
    noise, times = rng.normal(size=(3, 8)), np.array([0, 321, 999])
    output, _ = network.forward(params["diffusion"], noise, times, z[0, :3])
    for row, t in enumerate(times.tolist()):
        given = oracle.exact(noise[row]), t, oracle.exact(z[0, row])
        assert_near(output[row], oracle.network(digits["diffusion"], *given))
    value, _ = continuous.loss_and_grads(model, params, images, labels, draws)
    exact_draws = {
        **{name: draws[name].tolist() for name in ("orders", "timesteps")},
        "num_masked": num_masked,
        "noise": oracle.exact(draws["noise"]),
    }
    sizes = {"patch_size": 2, "copies": 2, "schedule": "linear"}
    expected = oracle.loss(
        digits, oracle.exact(images), labels.tolist(), exact_draws, **sizes, **of_model
    )
    np.testing.assert_allclose(value, float(expected), rtol=1e-11)


def assert_near(found, expected):
    """To 450 epsilons of the largest entry, as of the discrete model; see tests.test_oracle."""
    expected = np.array(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-13 * np.abs(expected).max())


def test_tokens_hold_channel_row_and_column_in_this_order():
    images = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    found = tokens.from_images(images, 2)
    assert found.shape == (2, 4, 12)
    for ch, u, v in np.ndindex(3, 2, 2):
        assert found[1, 2, (ch * 2 + u) * 2 + v] == images[1, ch, 2 + u, v]
    np.testing.assert_array_equal(tokens.to_images(found, 2, 3, 4), images)


def test_parameters_go_to_the_published_names_and_back():
    params = MODEL.init(np.random.default_rng(0))
    there = mar.to_state_dict(params, MODEL)
    back = trees.flatten(mar.to_params(there, MODEL))
    for name, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(back[name], leaf)
    assert there["encoder_blocks.0.attn.qkv.weight"].shape == (12, 4)
    del there["fake_latent"]
    with pytest.raises(ValueError, match="fake_latent missing, nothing not expected"):
        mar.to_params(there, MODEL)


def test_rows_that_are_not_masked_count_nothing(params):
    moved = {**DRAWS, "noise": DRAWS["noise"].copy(), "timesteps": DRAWS["timesteps"].copy()}
    moved["noise"][~MASK.ravel()] = 100.0
    moved["timesteps"][~MASK.ravel()] = 3
    before = continuous.loss_and_grads(MODEL, params, IMAGES, LABELS, DRAWS)
    after = continuous.loss_and_grads(MODEL, params, IMAGES, LABELS, moved)
    assert before[0] == after[0]


def test_what_is_masked_is_not_seen(params):
    images = tokens.from_images(IMAGES, 2)
    z, _ = MODEL.forward(params, images, LABELS, MASK)
    images[MASK] = 1e6
    np.testing.assert_array_equal(MODEL.forward(params, images, LABELS, MASK)[0], z)


def test_mask_ratios_are_those_of_the_paper():
    model = continuous.build(image_size=64, patch_size=1)
    rng = np.random.default_rng(0)
    ratios = np.array([model.draw(rng, 1)["num_masked"] for _ in range(300)]) / 4096
    assert ratios.min() >= 0.7
    assert ratios.max() <= 1.0
    # The standard deviation of the distribution is 0.085, of the mean of 300 0.005.
    assert abs(ratios.mean() - 0.86702) < 0.02


def test_clipping_bounds_what_the_published_sampler_lets_explode(params):
    options = {"num_diffusion_steps": 5, "num_steps": 2}
    labels = np.arange(3)
    clipped = continuous.sample(MODEL, params, labels, np.random.default_rng(0), **options)
    published = continuous.sample(
        MODEL, params, labels, np.random.default_rng(0), clip=None, **options
    )
    assert np.abs(clipped).max() < 10 < 1e4 < np.abs(published).max()


@pytest.mark.parametrize("guidance", ["constant", "linear"])
def test_sampling_depends_on_what_is_handed_in_alone(params, guidance):
    draws = continuous.draw(MODEL, np.random.default_rng(3), 2, 4)
    options = {"num_steps": 3, "num_diffusion_steps": 4, "guidance": guidance}
    images = [
        continuous.sample(MODEL, params, [1, 2], draws=draws, guidance_scale=scale, **options)
        for scale in (1.0, 1.0, 2.0)
    ]
    assert images[0].shape == (2, 1, 4, 4)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_pytorch_agrees_on_loss_gradients_and_a_chain(schedule):
    torch = pytest.importorskip("torch")
    from .torch_continuous import Published, Steps

    model = dataclasses.replace(
        check_continuous.MODEL, dropout=0.0, noise_schedule=schedule, decoder_layers=2
    )
    rng = np.random.default_rng(1)
    params = trees.map_leaves(lambda leaf: rng.normal(0.0, 0.3, leaf.shape), model.init(rng))
    draws = model.draw(rng, 3) | {"num_masked": 3, "label_dropped": np.array([0, 1, 0], bool)}
    draws["timesteps"][:6] = [0, 0, 1, 999, 998, 0]
    images, labels = rng.normal(size=(3, 1, 4, 4)), np.array([0, 1, 2])
    loss, grads = continuous.loss_and_grads(model, params, images, labels, draws)

    state = {
        name: torch.tensor(array, requires_grad=True)
        for name, array in mar.to_state_dict(params, model).items()
    }
    twin = Published(model, state)
    clean = torch.tensor(tokens.from_images(images, 2))
    mask = torch.tensor(masked_by(draws["orders"], 3))
    times, noise = torch.tensor(draws["timesteps"]), torch.tensor(draws["noise"])
    theirs = twin.loss(clean, torch.tensor([0, -1, 2]), mask, times, noise)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-12)
    theirs.backward()
    largest = max(np.abs(leaf).max() for leaf in trees.flatten(grads).values())
    found = mar.to_params({name: x.grad for name, x in state.items()}, model)
    for name, leaf in trees.flatten(grads).items():
        np.testing.assert_allclose(
            leaf, trees.flatten(found)[name], rtol=1e-9, atol=1e-12 * largest, err_msg=name
        )

    kept = diffusion.respace(20)
    steps, x = Steps(schedule, kept), torch.tensor(draws["noise"][:5])
    z = torch.tensor(rng.normal(size=(5, model.decoder_dim)))
    step_noise = rng.normal(size=(20, 5, 1, model.token_dim))
    start = {"start_noise": x.numpy()[:, np.newaxis], "step_noise": step_noise}
    plan = sampling.Plan(start, [], 1, 0.9, 1.0, "constant", 3.0)
    sampler = sampling.Sampler(model, params, diffusion.process(schedule, 20))
    ours = sampler.chain(plan, np.ones((5, 1), bool), [z.numpy()], 1.0)
    with torch.no_grad():
        for index in range(19, -1, -1):
            t = torch.full((5,), index)
            e, v = twin.network(x, torch.full((5,), float(kept[index])), z).chunk(2, dim=1)
            mean = steps.mean(steps.clean(e, x, t).clamp(-3.0, 3.0), x, t)
            deviation = torch.exp(steps.log_variance(v, t) / 2)
            drawn = torch.tensor(step_noise[19 - index][:, 0])
            x = mean + (0.9 * deviation * drawn if index else 0.0)
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-9, atol=1e-11)


BAD = {
    "images: shape": ({"images": IMAGES[:, :, :3]}, r"images: shape \[2, 1, 3, 4\], expected"),
    "images: integers": ({"images": IMAGES.astype(int)}, "images: dtype int64"),
    "images: NaN": ({"images": IMAGES * np.nan}, "images: nan at"),
    "labels: range": ({"labels": [0, 4]}, r"class 4 at \[1\] is not in \[0, 3\]"),
    "labels: length": ({"labels": [0]}, r"labels: shape \[1\], expected \[2\]"),
    "draws: times": (
        {"timesteps": np.full(8, 1000)},
        r"timesteps, expected integers in \[0, 999\]",
    ),
    "draws: orders": ({"orders": np.zeros((2, 4), int)}, "orders, expected permutations"),
    "draws: noise": ({"noise": np.zeros((8, 3))}, r"draws: noise: shape \[8, 3\]"),
    "draws: none masked": ({"num_masked": 0}, "draws: num_masked: received 0"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(params, changed, message):
    given = {"images": IMAGES, "labels": LABELS, **DRAWS, **changed}
    images, labels = given.pop("images"), given.pop("labels")
    with pytest.raises((TypeError, ValueError), match=message):
        continuous.loss_and_grads(MODEL, params, images, labels, given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 9}, "image_size: received 9, expected a multiple of patch_size = 2"),
        ({"encoder_dim": 6}, "encoder_dim: received 6, expected a multiple of num_heads = 4"),
        ({"noise_schedule": "sqrt"}, "noise_schedule: received 'sqrt'"),
        ({"label_drop": 1.5}, "label_drop: received 1.5"),
    ],
)
def test_bad_hyper_parameters_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        continuous.build(**changed)


def test_images_that_are_not_scaled_are_told_by_how_much(params):
    with pytest.warns(UserWarning, match=r"standard deviation 69\.6, .* divide by 69\.6"):
        continuous.loss_and_grads(MODEL, params, 100.0 * IMAGES, LABELS, DRAWS)
