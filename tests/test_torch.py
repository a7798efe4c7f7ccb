"""marref against stock PyTorch: the committed golden files, and PyTorch itself if installed."""

import json
from pathlib import Path

import numpy as np
import pytest

import marref
from marref import trees

from .strategies import both_ways

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("erf-concatenated", "tanh-interleaved")
TOLERANCE = 1e-12

CONFIGS = {
    "one head, erf, concatenated": {
        "vocab_size": 7,
        "embed_dim": 12,
        "num_layers": 1,
        "num_heads": 1,
        "seq_len": 9,
        "layer_norm_epsilon": 1e-5,
        "gelu": "erf",
        "positions": "concatenated",
    },
    "four heads, tanh, interleaved": {
        "vocab_size": 30,
        "embed_dim": 16,
        "num_layers": 3,
        "num_heads": 4,
        "seq_len": 20,
        "layer_norm_epsilon": 1e-3,
        "gelu": "tanh",
        "positions": "interleaved",
    },
    "heads of one feature, erf, interleaved": {
        "vocab_size": 9,
        "embed_dim": 4,
        "num_layers": 2,
        "num_heads": 4,
        "seq_len": 5,
        "layer_norm_epsilon": 1e-6,
        "gelu": "erf",
        "positions": "interleaved",
    },
    "two features, tanh, concatenated": {
        "vocab_size": 5,
        "embed_dim": 6,
        "num_layers": 2,
        "num_heads": 3,
        "seq_len": 33,
        "layer_norm_epsilon": 1e-5,
        "gelu": "tanh",
        "positions": "concatenated",
    },
}


@pytest.fixture(params=NAMES)
def golden(request):
    return read_golden(request.param)


# The committed files; PyTorch is not needed.


def test_logits_are_those_of_pytorch(golden):
    model, params = golden_model(golden)
    logits, _ = model.forward(params, golden["tokens"])
    assert_close({"logits": logits}, {"logits": golden["logits"]})
    assert_close({"logits": model(params, golden["tokens"])}, {"logits": golden["logits"]})


@both_ways
def test_loss_and_every_gradient_are_those_of_pytorch(way, golden):
    model, params = golden_model(golden)
    batch = [golden[name] for name in ("tokens", "targets", "mask")]
    loss, grads = way.loss_and_grads(model, params, *batch)
    assert_close({"loss": loss}, {"loss": golden["loss"]})
    assert_gradients_close(trees.flatten(grads), leaves_of(golden, "gradients"))


def test_forward_loss_and_backward_one_by_one_give_the_gradients_of_pytorch(golden):
    model, params = golden_model(golden)
    logits, cache = model.forward(params, golden["tokens"])
    loss, loss_cache = marref.loss.forward(logits, golden["targets"], golden["mask"])
    grads = model.backward(params, marref.loss.backward(loss_cache), cache)
    assert_close({"loss": loss}, {"loss": golden["loss"]})
    assert_gradients_close(trees.flatten(grads), leaves_of(golden, "gradients"))


@both_ways
@pytest.mark.parametrize("kind", ["adam", "adamw", "clipped"])
def test_ten_optimiser_steps_lead_where_those_of_pytorch_do(way, golden, kind):
    model, params = golden_model(golden)
    batch = [golden[name] for name in ("tokens", "targets", "mask")]
    training = decoded(golden["training"])
    state = marref.optim.init(params)
    for _ in range(training["steps"]):
        _, grads = way.loss_and_grads(model, params, *batch)
        grads = hold_key_biases(grads)
        if kind == "clipped":
            grads, norm = marref.optim.clip_by_global_norm(grads, training["max_norm"])
            assert norm > 2 * training["max_norm"]
        weight_decay = training["weight_decay"] if kind == "adamw" else 0.0
        params, state = way.adam_step(
            params, grads, state, training["learning_rate"], weight_decay=weight_decay
        )
    assert_close(trees.flatten(params), leaves_of(golden, kind))


# PyTorch itself.


def test_pytorch_reproduces_the_golden_files():
    pytest.importorskip("torch")
    from . import make_golden

    made = make_golden.make()
    assert set(made) == set(NAMES) == {path.stem for path in GOLDEN.glob("*.npz")}
    for name, arrays in made.items():
        committed = read_golden(name)
        assert list(arrays) == list(committed)
        gradients = leaves_of(arrays, "gradients"), leaves_of(committed, "gradients")
        assert_gradients_close(*gradients)
        others = [key for key in arrays if not key.startswith("gradients/")]
        for key in others:
            if arrays[key].dtype != np.float64:
                np.testing.assert_array_equal(arrays[key], committed[key], strict=True)
            else:
                assert_close({key: arrays[key]}, {key: committed[key]})


@both_ways
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("missing", [0, 1, 3], ids="{} short".format)
def test_any_model_agrees_with_pytorch(way, name, missing):
    model, torch_model, params, batch = fresh(name, missing)
    torch_loss, torch_logits = torch_model.loss_and_logits(*batch)
    torch_loss.backward()

    loss, grads = way.loss_and_grads(model, params, *batch)
    assert_close(
        {"loss": loss, "logits": model(params, batch[0])},
        {"loss": torch_loss.detach().numpy(), "logits": torch_logits.detach().numpy()},
    )
    assert_gradients_close(trees.flatten(grads), torch_model.gradients())


@both_ways
def test_label_smoothing_agrees_with_pytorch(way):
    torch = pytest.importorskip("torch")
    model, torch_model, params, batch = fresh(next(iter(CONFIGS)), 1)
    _, logits = torch_model.loss_and_logits(*batch)
    mask = torch.tensor(batch[2])
    torch_loss = torch.nn.functional.cross_entropy(
        logits[mask], torch.tensor(batch[1])[mask], label_smoothing=0.15
    )
    torch_loss.backward()
    loss, grads = way.loss_and_grads(model, params, *batch, label_smoothing=0.15)
    assert_close({"loss": loss}, {"loss": torch_loss.detach().numpy()})
    assert_gradients_close(trees.flatten(grads), torch_model.gradients())


@both_ways
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.3},
        {"beta1": 0.7, "beta2": 0.95, "epsilon": 1e-4},
        # Adam magnifies the rounding of a small gradient g by 1/(|g| + epsilon); clipped ones
        # are small.
        {"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3, "max_norm": 0.1},
    ],
    ids=str,
)
def test_each_adam_step_agrees_with_pytorch(way, name, settings):
    torch = pytest.importorskip("torch")
    model, torch_model, params, batch = fresh(name, missing=1)
    settings = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0} | settings
    max_norm = settings.pop("max_norm", None)
    optimiser = torch.optim.AdamW(
        torch_model.parameters(),
        0.01,
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["epsilon"],
        weight_decay=settings["weight_decay"],
    )
    state = marref.optim.init(params)
    for _ in range(5):
        optimiser.zero_grad()
        torch_model.loss_and_logits(*batch)[0].backward()
        torch_model.hold_key_biases()
        grads = hold_key_biases(way.loss_and_grads(model, params, *batch)[1])
        if max_norm is not None:
            torch_norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), max_norm)
            grads, norm = marref.optim.clip_by_global_norm(grads, max_norm)
            assert_close({"norm": norm}, {"norm": torch_norm.numpy()})
            assert_close(trees.flatten(grads), torch_model.gradients())
        optimiser.step()
        params, state = way.adam_step(params, grads, state, 0.01, **settings)

        assert_close(trees.flatten(params), torch_model.read())
        for ours, theirs in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
            moment = torch_model.read(lambda parameter, key=theirs: optimiser.state[parameter][key])
            assert_close(trees.flatten(state[ours]), moment)


@pytest.mark.parametrize("positions", ["concatenated", "interleaved"])
@pytest.mark.parametrize("embed_dim", [2, 4, 10, 256])
def test_sinusoidal_table_agrees_with_one_written_in_pytorch(positions, embed_dim):
    pytest.importorskip("torch")
    from . import torch_mar

    table = torch_mar.sinusoidal_table(256, embed_dim, positions).numpy()
    assert_close({"table": marref.sinusoidal_table(256, embed_dim, positions)}, {"table": table})


@pytest.mark.parametrize("warmup_steps", [1, 7])
def test_warmup_cosine_is_linear_lr_followed_by_cosine_annealing_lr(warmup_steps):
    torch = pytest.importorskip("torch")
    peak, total_steps = 0.3, 40
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], peak)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(
        optimiser,
        [
            schedules.LinearLR(optimiser, 1 / (warmup_steps + 1), total_iters=warmup_steps),
            schedules.CosineAnnealingLR(optimiser, total_steps - warmup_steps),
        ],
        milestones=[warmup_steps],
    )
    expected = []
    for _ in range(total_steps + 1):
        expected.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    rates = [
        marref.optim.warmup_cosine(
            step, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps
        )
        for step in range(total_steps + 1)
    ]
    assert_close({"rates": np.array(rates)}, {"rates": np.array(expected)})


def read_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def decoded(array):
    return json.loads(array.tobytes())


def leaves_of(golden, tree):
    """Take the arrays of one tree from a golden file, by dotted name."""
    prefix = f"{tree}/"
    return {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}


def golden_model(golden):
    return marref.build(**decoded(golden["config"])), trees.unflatten(leaves_of(golden, "params"))


def fresh(name, missing):
    """Build one model twice, and a batch that is ``missing`` positions shorter than seq_len."""
    pytest.importorskip("torch")
    from .make_golden import draw_parameters
    from .torch_mar import TorchMAR

    config = CONFIGS[name]
    rng = np.random.default_rng(20)
    torch_model = TorchMAR(**config)
    leaves = draw_parameters(torch_model, rng)
    torch_model.load(leaves)

    shape = (4, config["seq_len"] - missing)
    targets = rng.integers(0, config["vocab_size"], shape)
    mask = rng.random(shape) < 0.4
    mask[0, 0] = True
    batch = np.where(mask, 0, targets), targets, mask
    return marref.build(**config), torch_model, trees.unflatten(leaves), batch


def is_key_bias(name):
    return name.endswith(".attention.key.bias")


def hold_key_biases(grads):
    """Set the gradients of the key biases to 0, which they are but for rounding.

    A bias added to every key moves all scores of a query alike, and softmax ignores it.  Adam
    divides a gradient by its own size, and would turn that rounding into full-size steps of
    random sign, which no two programs share.
    """
    leaves = trees.flatten(grads)
    return trees.unflatten(
        {name: np.zeros_like(leaf) if is_key_bias(name) else leaf for name, leaf in leaves.items()}
    )


def assert_gradients_close(actual, expected):
    """Hold gradients to each array's largest entry, those of key biases to the largest of all."""
    assert set(actual) == set(expected)
    keys = {name for name in expected if is_key_bias(name)}
    assert keys
    others = set(expected) - keys
    assert_close({name: actual[name] for name in others}, {name: expected[name] for name in others})

    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name in keys:
        assert actual[name].shape == expected[name].shape
        for noise in (actual[name], expected[name]):
            assert np.abs(noise).max() <= TOLERANCE * largest, name


def assert_close(actual, expected):
    """Hold every array to its largest entry, and name all that fail."""
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert not {name: error for name, error in errors.items() if not error <= TOLERANCE}


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == np.float64
    difference = np.abs(actual - expected).max()
    return 0.0 if difference == 0.0 else difference / np.abs(expected).max()
