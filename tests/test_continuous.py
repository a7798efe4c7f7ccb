"""Continuous MAR, held to numbers of its published code, and its gradients to complex steps.

The check vector is that of the code published with Li et al. 2024 (LTH14/mar at fe470ac), run in
float64: parameters, images, times and noise are sines and cosines of their place.
"""

import numpy as np
import pytest

from marref import continuous, trees
from marref.continuous import diffusion, tokens
from marref.continuous.loss import masked_by
from marref.interop import mar

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
    encoded, _ = MODEL._encode(params, clean, LABELS, cache["kept"], None)
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
    chain = _chain(params, start)
    everywhere = np.ones((8, 1), bool)
    plain = chain.run(everywhere, [rows], 1.0)
    close(
        plain[0], [14607.550135445106, 23063.144370485836, -5900.829558046882, -22674.815482816044]
    )
    chain = _chain(params, start[:4])
    guided = chain.run(everywhere[:4], [rows[:4], rows[4:]], 2.5)
    close(
        guided[0], [14607.68565208461, 23063.117614290168, -5900.930096653166, -22674.65729378309]
    )


def _chain(params, start):
    draws = {
        "start_noise": start[:, np.newaxis],
        "step_noise": np.zeros((5, len(start), 1, 4)),
    }
    return continuous.sampling.Chain(
        params["diffusion"], diffusion.process("cosine", 5), draws, 0.0, None
    )


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
