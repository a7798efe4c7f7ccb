"""Bad input: what is said about it names the argument, what was received, what was expected."""

import dataclasses

import numpy as np
import pytest

import marref
from marref import loss, masking, optim, schedules, training, trees
from marref.decoding import (
    P2,
    Edit,
    EntropyBounded,
    Factor,
    Independent,
    QuotaOrThreshold,
    Remask,
    ReMDMCap,
    ReMDMConf,
    ReMDMLoop,
    ReMDMRescale,
    Threshold,
    halton,
)

from .strategies import both_ways

MODEL = marref.build(vocab_size=5, embed_dim=4, num_layers=1, num_heads=2, seq_len=6)
RNG = np.random.default_rng(0)
PARAMS = MODEL.init(np.random.default_rng(0))
TOKENS = np.ones((2, 3), int)
LOGITS = np.zeros((2, 3, 5))
MASK = np.ones((2, 3), bool)
READ_ONLY = trees.map_leaves(lambda leaf: np.broadcast_to(leaf, leaf.shape), PARAMS)
STATE = optim.init(PARAMS)
CLASSES = dataclasses.replace(MODEL, num_classes=3)
CLASS_PARAMS = CLASSES.init(np.random.default_rng(0))


def without(name):
    leaves = trees.flatten(PARAMS)
    del leaves[name]
    return trees.unflatten(leaves)


def with_leaf(name, leaf):
    return trees.unflatten({**trees.flatten(PARAMS), name: leaf})


WITHOUT_LOGITS = with_leaf("head.bias", np.full(5, np.nan))


def filled(shape, place, value):
    array = np.zeros(shape)
    array[place] = value
    return array


def decode(**options):
    return lambda way: way.iterative_decode(MODEL, PARAMS, **options)


def refused(**options):
    """A decoding that would fail otherwise if anything were predicted, since all logits are NaN."""
    return lambda way: way.iterative_decode(MODEL, WITHOUT_LOGITS, **options)


def revealing(count, **options):
    return decode(reveal=lambda step: count, **options)


def guided(**options):
    return lambda way: way.iterative_decode(
        CLASSES, CLASS_PARAMS, labels=[0], guidance_scale=2.0, guidance="linear", **options
    )


class Draws(Remask):
    """A rule of somebody else's that needs chance."""

    needs_rng = True


def decode_classes(**options):
    return lambda way: way.iterative_decode(CLASSES, CLASS_PARAMS, **options)


def labelled(labels):
    return lambda way: way.loss_and_grads(
        CLASSES, CLASS_PARAMS, TOKENS, TOKENS, MASK, labels=labels
    )


def train(**options):
    defaults = {"num_steps": 2, "batch_size": 2, "learning_rate": 0.1, "rng": RNG}
    return lambda: training.train(MODEL, PARAMS, TOKENS, **{**defaults, **options})


def step(**options):
    return lambda way: way.adam_step(PARAMS, PARAMS, STATE, **{"learning_rate": 0.1, **options})


def gradients(**options):
    point = {"x": np.ones(2)}
    return lambda: marref.check_gradients(
        **{"function": lambda p: p["x"].sum(), "point": point, "gradients": point, **options}
    )


BAD_CALLS = {
    # The hyper-parameters.
    "num_classes: received 0, expected an integer >= 1": lambda: marref.build(5, num_classes=0),
    "num_classes: received 2.0, expected an integer": lambda: marref.build(5, num_classes=2.0),
    "labels: class 3 at [0] is not in [0, 2]": lambda: masking.drop_labels([3], 0.1, RNG, 2),
    "rate: received 1.0, expected a number in [0, 1)": lambda: masking.drop_labels(
        [0], 1.0, RNG, 2
    ),
    "vocab_size: received 1, expected an integer >= 2": lambda: marref.build(1),
    "vocab_size: received 5.0, expected an integer": lambda: marref.build(5.0),
    "vocab_size: received True, expected an integer": lambda: marref.build(True),
    "embed_dim: received 0, expected an integer >= 1": lambda: marref.build(5, embed_dim=0),
    "embed_dim: received 9, expected an even number": lambda: marref.build(
        5, embed_dim=9, num_heads=3
    ),
    "embed_dim: received 10, expected a multiple of num_heads = 4": lambda: marref.build(
        5, embed_dim=10, num_heads=4
    ),
    "num_layers: received True, expected an integer": lambda: marref.build(5, num_layers=True),
    "num_layers: received 0": lambda: marref.build(5, num_layers=0),
    "num_heads: received -1": lambda: marref.build(5, num_heads=-1),
    "seq_len: received '8', expected an integer": lambda: marref.build(5, seq_len="8"),
    "dropout: received 1.0, expected a number in [0, 1)": lambda: marref.build(5, dropout=1.0),
    "dropout: received -0.1": lambda: marref.build(5, dropout=-0.1),
    "dropout: received nan": lambda: marref.build(5, dropout=float("nan")),
    "dropout: received None, expected a real number": lambda: marref.build(5, dropout=None),
    "layer_norm_epsilon: received 0, expected a number in (0, inf)": lambda: marref.build(
        5, layer_norm_epsilon=0
    ),
    "gelu: received 'relu', expected one of erf, tanh": lambda: marref.build(5, gelu="relu"),
    "positions: received 'rotary', expected one of concatenated, interleaved": lambda: marref.build(
        5, positions="rotary"
    ),
    # Parameters and tokens.
    "rng: received int, expected a numpy.random.Generator": lambda: MODEL.init(0),
    "dtype: dtype float16, expected float32, float64": lambda: MODEL.init(RNG, np.float16),
    "std: received 0, expected a number in (0, inf)": lambda: MODEL.init(RNG, std=0),
    "params: blocks.0.attention.key.bias is missing": lambda: MODEL(
        without("blocks.0.attention.key.bias"), TOKENS
    ),
    "params: head.extra is not expected": lambda: MODEL(
        with_leaf("head.extra", np.ones(1)), TOKENS
    ),
    "params: head.kernel has shape [5, 4], expected [4, 5]": lambda: MODEL(
        with_leaf("head.kernel", np.ones((5, 4))), TOKENS
    ),
    "params: mixed dtypes float64 (embedding.table), float32 (head.bias)": lambda: MODEL(
        with_leaf("head.bias", np.ones(5, np.float32)), TOKENS
    ),
    "params: dtype int64, expected float32": lambda: MODEL(
        trees.map_leaves(lambda leaf: leaf.astype(int), PARAMS), TOKENS
    ),
    "tree: 'head.bias' is str, expected dict, list or array": lambda: MODEL(
        {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"], "bias": "zero"}}, TOKENS
    ),
    "tree: key 'a.b' under 'the root' is not a name": lambda: trees.flatten({"a.b": TOKENS}),
    "tree: key 3 under 'the root' is not a name": lambda: trees.flatten({3: TOKENS}),
    "tokens: dtype float64, expected integers": lambda: MODEL(PARAMS, np.ones((2, 3))),
    "tokens: shape [3], expected [batch, length]": lambda: MODEL(PARAMS, [1, 2, 3]),
    "tokens: id 9 at [0, 1] is not in [0, 5)": lambda: MODEL(PARAMS, [[1, 9]]),
    "tokens: id -1 at [0, 0] is not in [0, 5)": lambda: MODEL(PARAMS, [[-1, 1]]),
    "tokens: shape [1, 7], expected [batch, length] with batch >= 1 and length in [1,": lambda: (
        MODEL(PARAMS, [[1] * 7])
    ),
    "tokens: shape [0, 3], expected": lambda: MODEL(PARAMS, np.ones((0, 3), int)),
    "rng: received str": lambda: MODEL.forward(PARAMS, TOKENS, "seed"),
    "dlogits: shape [2, 3, 4], expected [2, 3, 5]": lambda: MODEL.backward(
        PARAMS, np.zeros((2, 3, 4)), MODEL.forward(PARAMS, TOKENS)[1]
    ),
    "dlogits: dtype float32, expected float64 as in params": lambda: MODEL.backward(
        PARAMS, LOGITS.astype(np.float32), MODEL.forward(PARAMS, TOKENS)[1]
    ),
    "tokens: received a masked array, expected one without a mask": lambda: MODEL(
        PARAMS, np.ma.masked_equal([[1, -1]], -1)
    ),
    "targets: received a masked array": lambda: marref.mar_loss(
        LOGITS, np.ma.masked_equal(TOKENS, 1), MASK
    ),
    "mask: received a masked array": lambda: marref.mar_loss(
        LOGITS, TOKENS, np.ma.masked_equal(MASK, True)
    ),
    "ratio: received a masked array": lambda: marref.mask_tokens(
        TOKENS, np.ma.masked_greater([0.5, 2.0], 1.0), RNG
    ),
    # The loss.
    "logits: dtype int64, expected float32": lambda: marref.mar_loss(
        LOGITS.astype(int), TOKENS, MASK
    ),
    "logits: shape [], expected [..., vocab_size]": lambda: marref.mar_loss(1.0, 0, True),
    "logits: nan at [1, 2, 3], expected finite numbers": lambda: marref.mar_loss(
        filled((2, 3, 5), (1, 2, 3), np.nan), TOKENS, MASK
    ),
    "logits: -inf at [0, 0, 1], expected finite numbers": lambda: marref.mar_loss(
        filled((2, 3, 5), (0, 0, 1), -np.inf), TOKENS, ~MASK
    ),
    "targets: shape [2, 2], expected [2, 3]": lambda: marref.mar_loss(LOGITS, TOKENS[:, :2], MASK),
    "targets: dtype float64, expected integers": lambda: marref.mar_loss(
        LOGITS, TOKENS.astype(float), MASK
    ),
    "targets: id 5 at [0, 0] is not in [0, 5)": lambda: marref.mar_loss(LOGITS, TOKENS * 5, MASK),
    "targets: id -100 at [0, 0] is not in [0, 5)": lambda: loss.forward(
        LOGITS, TOKENS * -100, ~MASK
    ),
    "mask: shape [1, 3], expected [2, 3]": lambda: marref.mar_loss(LOGITS, TOKENS, MASK[:1]),
    "mask: 0.5 at [0, 0], expected 0 or 1": lambda: marref.mar_loss(LOGITS, TOKENS, MASK * 0.5),
    "mask: dtype complex128, expected booleans": lambda: marref.mar_loss(
        LOGITS, TOKENS, MASK.astype(complex)
    ),
    # Masking.
    "schedule: received 'linear', expected one of one-minus-cosine, cosine, arccos, uniform, "
    "truncated-normal": lambda: marref.sample_mask_ratio(RNG, "linear"),
    "rng: received RandomState": lambda: marref.sample_mask_ratio(np.random.RandomState(0)),
    "size: received -1, expected an integer >= 0": lambda: marref.sample_mask_ratio(RNG, size=-1),
    "ratio: received 1.5, expected numbers in [0, 1]": lambda: marref.mask_tokens(TOKENS, 1.5, RNG),
    "ratio: received nan": lambda: marref.mask_tokens(TOKENS, float("nan"), RNG),
    "ratio: shape [3], expected a scalar or [2]": lambda: marref.mask_tokens(
        TOKENS, [0.1] * 3, RNG
    ),
    "ratio: dtype <U3, expected real numbers": lambda: marref.mask_tokens(TOKENS, "0.5", RNG),
    "rng: received NoneType": lambda: marref.mask_tokens(TOKENS, 0.5, None),
    "mask_token_id: received -1": lambda: marref.mask_tokens(TOKENS, 0.5, RNG, -1),
    "mask_token_id: received 300, expected an integer in [0, 255]": lambda: marref.mask_tokens(
        TOKENS.astype(np.uint8), 0.5, RNG, 300
    ),
    "tokens: shape [2, 0], expected length >= 1": lambda: marref.mask_tokens(
        TOKENS[:, :0], 0.5, RNG
    ),
    # The fast way's own arguments.
    "num_threads: received 0, expected an integer >= 1": lambda: marref.iterative_decode(
        MODEL, PARAMS, num_threads=0
    ),
    "num_threads: received -1": lambda: marref.loss_and_grads(
        MODEL, PARAMS, TOKENS, TOKENS, MASK, num_threads=-1
    ),
    "num_threads: received 1.5": lambda: marref.adam_step(
        PARAMS, PARAMS, STATE, 0.1, num_threads=1.5
    ),
    "params: embedding.table is read-only, expected arrays to write to": lambda: marref.adam_step(
        READ_ONLY, PARAMS, STATE, 0.1, in_place=True
    ),
    "model: received NoneType, expected a marref.MAR": lambda: marref.loss_and_grads(
        None, PARAMS, TOKENS, TOKENS, MASK
    ),
    "model: received str": lambda: marref.save_model("x.npz", "model", PARAMS),
    "cache: expected what this model's forward returned": lambda: MODEL.backward(
        PARAMS, LOGITS, {}
    ),
    "tokens: cannot be made an array": lambda: MODEL(PARAMS, [[1], [1, 2]]),
    "logits: cannot be made an array": lambda: marref.mar_loss([[1.0], [1.0, 2.0]], TOKENS, MASK),
    "length: received -3, expected an integer >= 1": lambda: marref.sinusoidal_table(-3, 4),
    "embed_dim: received 5, expected an even number": lambda: marref.sinusoidal_table(3, 5),
    "positions: received 'bogus', expected one of concatenated": lambda: marref.sinusoidal_table(
        3, 4, "bogus"
    ),
    "params: no leaves, expected at least one array": lambda: optim.init({}),
    "dtype: received 'bogus', expected a dtype": lambda: MODEL.init(RNG, "bogus"),
    "params: dtype complex128, expected float32 or float64 ": lambda: optim.init(
        MODEL.init(RNG, complex)
    ),
    "others: expected the keys a": lambda: trees.map_leaves(np.add, {"a": TOKENS}, {"b": TOKENS}),
    "others: expected trees of the structure": lambda: trees.map_leaves(
        np.add, {"a": TOKENS}, {"a": TOKENS, "b": TOKENS}
    ),
    "function: received NoneType, expected a function": lambda: marref.check_gradients(
        None, {}, {}
    ),
    "tokens: shape [0, 3], expected at least one sequence": lambda: training.bits_per_token(
        MODEL, TOKENS[:0], 0.5, RNG
    ),
    "tokens: id 1, [MASK], at [0, 0]: data must not hold it": train(mask_token_id=1),
    "tokens: id 0, [MASK], at [1, 2]: data must not hold it": lambda: training.train(
        MODEL, PARAMS, [[1, 1, 1], [1, 1, 0]], num_steps=2, batch_size=2, learning_rate=0.1, rng=RNG
    ),
    "tokens: id 0, [MASK], at [0, 3]: data must not hold it": lambda: training.bits_per_token(
        MODEL, [[1, 1, 1, 0]], 0.5, RNG
    ),
    "tokens: id 3, [MASK], at [0, 1]: data must not hold it": lambda: training.bits_per_token(
        MODEL, [[0, 3, 3]], 0.5, RNG, mask_token_id=3
    ),
    # Schedules.
    "num_masked: received -1": lambda: schedules.cosine(-1, 4),
    "num_steps: received 0, expected": lambda: schedules.linear(4, 0),
    # Rules of the decoder.
    "Threshold: probability: received 1.1, expected a number in [0, 1]": lambda: Threshold(1.1),
    "Threshold: probability: received -0.1": lambda: Threshold(-0.1),
    "Threshold: probability: received nan": lambda: Threshold(float("nan")),
    "Threshold: probability: received '0.9', expected a real number": lambda: Threshold("0.9"),
    "QuotaOrThreshold: probability: received 2, expected a number in [0, 1]": lambda: (
        QuotaOrThreshold(2)
    ),
    "Factor: factor: received 0, expected a number in (0, inf)": lambda: Factor(0),
    "Factor: factor: received -1": lambda: Factor(-1),
    "Factor: factor: received inf": lambda: Factor(float("inf")),
    "EntropyBounded: bound: received -0.1, expected a number in [0, inf)": lambda: EntropyBounded(
        -0.1
    ),
    "EntropyBounded: bound: received nan": lambda: EntropyBounded(float("nan")),
    "EntropyBounded: bound: received None, expected a real number": lambda: EntropyBounded(None),
    "ReMDMCap: eta: received -0.1, expected a number in [0, 1]": lambda: ReMDMCap(-0.1),
    "ReMDMRescale: eta: received 1.5, expected a number in [0, 1]": lambda: ReMDMRescale(1.5),
    "ReMDMLoop: eta: received 2, expected a number in [0, 1]": lambda: ReMDMLoop(eta=2),
    "ReMDMLoop: t_on: received 1, expected a number in (0, 1)": lambda: ReMDMLoop(t_on=1),
    "ReMDMLoop: t_off: received 0, expected a number in (0, 1)": lambda: ReMDMLoop(t_off=0),
    "ReMDMLoop: alpha_on: received 1.0, expected a number in (0, 1)": lambda: ReMDMLoop(
        alpha_on=1.0
    ),
    "ReMDMLoop: t_off: received 0.5, expected less than t_on = 0.5": lambda: ReMDMLoop(
        t_on=0.5, t_off=0.5
    ),
    "Edit: bound: received 1.5, expected a number in [0, 1]": lambda: Edit(1.5),
    'order: received "halton" for length 6, expected a square grid': lambda: halton(6),
    # The optimiser.
    "max_norm: received 0": lambda: optim.clip_by_global_norm(PARAMS, 0),
    "warmup_steps: received 9, expected an integer in [0, 8]": lambda: optim.warmup_cosine(
        0, peak=1.0, warmup_steps=9, total_steps=9
    ),
    "step: received 10, expected an integer in [0, 9]": lambda: optim.warmup_cosine(
        10, peak=1.0, warmup_steps=1, total_steps=9
    ),
    # Training and checks.
    "num_steps: received 0": train(num_steps=0),
    "batch_size: received 0, expected an integer >= 1": train(batch_size=0),
    "learning_rate: received 0, expected a number in (0, inf)": train(learning_rate=0),
    "mask_schedule: received 'all', expected one of": train(mask_schedule="all"),
    "warmup_steps: received 2, expected an integer in [0, 1]": train(warmup_steps=2),
    "rng: received NoneType, expected": train(rng=None),
    "on_step: received int, expected a function": train(on_step=5),
    "on_state: received str, expected a function": train(on_state="print"),
    "method: received 'forward', expected one of complex-step, central": gradients(
        method="forward"
    ),
    "gradients: x is missing": gradients(gradients={}),
    "point: dtype float32, expected float64": gradients(point={"x": np.ones(2, np.float32)}),
    "max_entries: received 0": gradients(max_entries=0, rng=RNG),
    "rng: received NoneType, expected a numpy.random.Generator": gradients(max_entries=1),
}

# What the definition and the fast way say alike.
BAD_CALLS_OF_BOTH_WAYS = {
    # Gradients.
    "targets: shape [2, 2], expected [2, 3] ": lambda way: way.loss_and_grads(
        MODEL, PARAMS, TOKENS, TOKENS[:, :2], MASK
    ),
    "mask: 2 at [0, 0], expected 0 or 1": lambda way: way.loss_and_grads(
        MODEL, PARAMS, TOKENS, TOKENS, MASK * 2
    ),
    "label_smoothing: received 1.0, expected a number in [0, 1)": lambda way: way.loss_and_grads(
        MODEL, PARAMS, TOKENS, TOKENS, MASK, label_smoothing=1.0
    ),
    # Decoding.
    "model: received dict, expected a marref.MAR": lambda way: way.iterative_decode({}, PARAMS),
    "vocab_size: received 8192, expected the model's 5": decode(vocab_size=8192),
    "seq_len: received 7, expected an integer in [1, 6]": decode(seq_len=7),
    "num_steps: received 0, expected an integer >= 1": decode(num_steps=0),
    "mask_token_id: received 5, expected an integer in [0, 4]": decode(mask_token_id=5),
    "temperature: received -1, expected a number in [0, inf)": decode(temperature=-1),
    "temperature: received inf": decode(temperature=float("inf")),
    "batch_size: received 0": decode(batch_size=0),
    "tokens: shape [2, 3], expected [4, 3]": decode(tokens=TOKENS, batch_size=4),
    "tokens: shape [2, 3], expected [2, 5]": decode(tokens=TOKENS, seq_len=5),
    "tokens: id 7 at [0, 0] is not in [0, 5)": decode(tokens=TOKENS * 7),
    "schedule: received 'sine', expected one of cosine, linear": decode(schedule="sine"),
    "schedule: returned array([0, 6])": decode(schedule=lambda *_: np.array([0, 6])),
    "expected at most 2 integers >= 1": decode(num_steps=2, schedule=lambda *_: [2, 2, 2]),
    "vocab_size: received 'all', expected an integer": decode(vocab_size="all"),
    "temperature: received 1000000000": decode(temperature=10**400),
    "schedule: returned array([6, 1]) for 6 masked positions": decode(
        schedule=lambda *_: np.array([6, 1])
    ),
    "schedule: returned array([-1,  7]) for 6 masked positions": decode(
        schedule=lambda *_: np.array([-1, 7])
    ),
    "order: received 'surest', expected one of confidence, margin, entropy, random, left-to-right, "
    "halton": decode(order="surest"),
    'rng: received None, but order="random"': decode(order="random"),
    "rng: received None, but ": decode(choice_temperature=1.0),
    "rng: received int, expected": decode(rng=3),
    "choice_temperature: received -1": decode(choice_temperature=-1, rng=RNG),
    'choice_temperature: received 1.0, expected 0 with order="random"': decode(
        choice_temperature=1.0, rng=RNG, order="random"
    ),
    "top_k: received 0, expected an integer >= 1": decode(top_k=0),
    "top_k: received 2.0, expected an integer": decode(top_k=2.0),
    "top_p: received 0, expected a number in (0, 1]": decode(top_p=0),
    "top_p: received 1.5": decode(top_p=1.5),
    "top_p: received nan": decode(top_p=float("nan")),
    "top_p: received '0.9', expected a real number": decode(top_p="0.9"),
    "logits: nan at [0, 0], expected finite numbers": lambda way: way.iterative_decode(
        MODEL, with_leaf("head.bias", np.full(5, np.nan))
    ),
    "params: dtype complex128, expected float32 or float64": lambda way: way.iterative_decode(
        MODEL, MODEL.init(RNG, complex)
    ),
    # What each position would be.
    "min_p: received 0, expected a number in (0, 1]": refused(min_p=0),
    "min_p: received 1.5": refused(min_p=1.5),
    "min_p: received '0.1', expected a real number": refused(min_p="0.1"),
    "exclude_ids: received [1, 2, 3, 4], expected one of 5 ids besides [MASK] to be left": refused(
        exclude_ids=[1, 2, 3, 4]
    ),
    "exclude_ids: received [0, 1, 2, 3, 4], expected one of 5 ids": refused(
        exclude_ids=[0, 1, 2, 3, 4], exclude_mask_token=False
    ),
    "exclude_ids: id 5 at [1] is not in [0, 5)": refused(exclude_ids=[1, 5]),
    "exclude_ids: id -1 at [0] is not in [0, 5)": refused(exclude_ids=[-1]),
    "exclude_ids: received [1.0], expected a sequence of integers": refused(exclude_ids=[1.0]),
    "exclude_ids: received [True], expected a sequence of integers": refused(exclude_ids=[True]),
    "exclude_ids: received '12', expected a sequence of integers": refused(exclude_ids="12"),
    "exclude_ids: received b'1', expected a sequence of integers": refused(exclude_ids=b"1"),
    "exclude_ids: received '', expected a sequence of integers": refused(exclude_ids=""),
    "exclude_ids: received 3, expected a sequence of integers": refused(exclude_ids=3),
    "exclude_ids: received None, expected a sequence of integers": refused(exclude_ids=None),
    "exclude_ids: received [[1]], expected a sequence of integers": refused(exclude_ids=[[1]]),
    "exclude_ids: received <list_iterator": lambda way: way.iterative_decode(
        MODEL, WITHOUT_LOGITS, exclude_ids=iter([1])
    ),
    # Which come first.
    "score_temperature: received 0, expected a number in (0, inf)": refused(score_temperature=0),
    "score_temperature: received inf": refused(score_temperature=float("inf")),
    "order_temperature: received -1, expected a number in [0, inf)": refused(
        order_temperature=-1, rng=RNG
    ),
    "order_temperature: received nan": refused(order_temperature=float("nan"), rng=RNG),
    "order_temperature: received None, expected a real number": refused(order_temperature=None),
    'order_temperature: received 1.0, expected 0 with order="halton", which does not look': refused(
        order_temperature=1.0, order="halton", seq_len=4, rng=RNG
    ),
    'choice_temperature: received 2.0, expected 0 with order="left-to-right", which does': refused(
        choice_temperature=2.0, order="left-to-right", rng=RNG
    ),
    "order_temperature: received 1.0 with choice_temperature 2.0, expected one of them": refused(
        order_temperature=1.0, choice_temperature=2.0, rng=RNG
    ),
    'rng: received None, but order="random", choice_temperature, order_temperature and a remask '
    "that draws need one": refused(order_temperature=1.0),
    "order_temperature and a remask that draws need one": refused(remask=Draws()),
    "and a remask that draws need one": refused(remask=ReMDMCap(), order="random"),
    "a remask that draws need one": refused(reveal=Independent(), order="random"),
    'order: received "halton" for length 6, expected a square grid, as 64 = 8 * 8': refused(
        order="halton"
    ),
    'order: received "halton" for length 3, expected a square grid': refused(
        order="halton", tokens=TOKENS
    ),
    # How many now.
    "reveal: received 3, expected a function of a Step, as Threshold(0.9), or None": refused(
        reveal=3
    ),
    "reveal: received 'threshold', expected a function of a Step": refused(reveal="threshold"),
    "reveal: received P2(), expected a function of a Step": refused(reveal=P2()),
    "reveal: received the class Threshold, expected an instance, as Threshold()": refused(
        reveal=Threshold
    ),
    "reveal: returned array(1), expected integers of shape [1], one a sequence": revealing(1),
    "reveal: returned array([0, 1]) in step 1, expected at least 1 wherever something is masked": (
        revealing(np.array([0, 1]), batch_size=2)
    ),
    "reveal: returned array([-1]) in step 1": revealing(np.array([-1])),
    "reveal: returned array([1.]), expected integers of shape [1], one a sequence": revealing(
        np.ones(1)
    ),
    "reveal: returned array([1, 1]), expected integers of shape [1], one a sequence": revealing(
        np.ones(2, int)
    ),
    "reveal: returned array([[1, 1]]), expected integers of shape [2], one a sequence": revealing(
        np.ones((1, 2), int), batch_size=2
    ),
    "reveal: returned array([ True]), expected integers of shape [1]": revealing(np.ones(1, bool)),
    "reveal: returned array(None, dtype=object), expected integers of shape [1]": revealing(None),
    "reveal: cannot be made an array": revealing([[1], [1, 2]]),
    "reveal: received a masked array": revealing(np.ma.masked_equal([1], 1)),
    "block_length: received 0, expected an integer >= 1": refused(block_length=0),
    "block_length: received 2.0, expected an integer": refused(block_length=2.0),
    "block_length: received True, expected an integer": refused(block_length=True),
    "num_steps: received 2, expected at least one for each of the 3 blocks of block_length 2": (
        refused(num_steps=2, block_length=2)
    ),
    # What is taken back.
    "remask: received 'p2', expected a Remask, as P2(), or None": refused(remask="p2"),
    "remask: received Threshold(probability=0.9), expected a Remask": refused(remask=Threshold()),
    "remask: received the class P2, expected an instance, as P2()": refused(remask=P2),
    # Rules that contradict each other.
    'order: received "random", expected "confidence" with reveal=Threshold(probability=0.9)': (
        refused(reveal=Threshold(), order="random", rng=RNG)
    ),
    'order: received "entropy", expected "confidence" with reveal=Factor(factor=1.0)': refused(
        reveal=Factor(), order="entropy"
    ),
    'order: received "confidence", expected "entropy" with reveal=EntropyBounded(bound=0.1)': (
        refused(reveal=EntropyBounded())
    ),
    'order: received "confidence", expected "random" with reveal=Independent()': refused(
        reveal=Independent(), rng=RNG
    ),
    'order: received "confidence", expected "random" with remask=ReMDMCap(eta=0.008)': refused(
        remask=ReMDMCap(), rng=RNG
    ),
    "choice_temperature: received 1.0, expected 0 with Threshold(probability=0.9), which": refused(
        reveal=Threshold(), choice_temperature=1.0, rng=RNG
    ),
    "order_temperature: received 1.0, expected 0 with QuotaOrThreshold(probability=0.95)": refused(
        reveal=QuotaOrThreshold(), order_temperature=1.0, rng=RNG
    ),
    "reveal: received Threshold(probability=0.9), expected None with P2(), which says": refused(
        reveal=Threshold(), remask=P2()
    ),
    "reveal: received Independent(), expected None with ReMDMConf(), which says how many": refused(
        reveal=Independent(), remask=ReMDMConf(), order="random", rng=RNG
    ),
    'order: received "halton", expected one that looks at predictions, or "random"': refused(
        order="halton", remask=P2()
    ),
    "exclude_mask_token: received False, expected True with Edit(bound=0.9), which": refused(
        exclude_mask_token=False, remask=Edit()
    ),
    "block_length: received 2, expected None with P2(), which is defined on all": refused(
        block_length=2, remask=P2()
    ),
    "block_length: received 2, expected None with Edit(bound=0.9), which is defined": refused(
        block_length=2, remask=Edit()
    ),
    "block_length: received 2, expected None with Independent(), which is defined": refused(
        block_length=2, reveal=Independent(), order="random", rng=RNG
    ),
    'guidance: received "linear", expected "constant" with Threshold(probability=0.9)': guided(
        reveal=Threshold()
    ),
    'guidance: received "linear", expected "constant" with <function': guided(
        reveal=lambda step: np.ones(1, int)
    ),
    'guidance: received "linear", expected "constant" with P2(): what will be known': guided(
        remask=P2()
    ),
    'guidance: received "linear", expected "constant" with ReMDMCap(eta=0.008)': guided(
        remask=ReMDMCap(), order="random", rng=RNG
    ),
    # The optimiser.
    "state.step: received -1": lambda way: way.adam_step(
        PARAMS, PARAMS, {**STATE, "step": np.array(-1)}, 0.1
    ),
    "learning_rate: received -1": step(learning_rate=-1),
    # Classes.
    "labels: received for a model without classes, expected None": lambda way: way.loss_and_grads(
        MODEL, PARAMS, TOKENS, TOKENS, MASK, labels=[0, 1]
    ),
    "labels: received for a model without classes, expected None ": decode(labels=[0]),
    "labels: dtype float64, expected integers": labelled([0.0, 1.0]),
    "labels: dtype bool, expected integers": labelled([True, False]),
    "labels: shape [3], expected [2]": labelled([0, 1, 2]),
    "labels: shape [], expected [batch]": labelled(np.array(1)),
    "labels: shape [2, 1], expected [batch]": labelled([[0], [1]]),
    "labels: class 4 at [1] is not in [0, 3], the last of which is no class": labelled([0, 4]),
    "labels: class -1 at [0] is not in [0, 3]": labelled([-1, 0]),
    "labels: class 4 at [0] is not in [0, 3]": decode_classes(labels=[4]),
    "labels: shape [3], expected [2] ": decode_classes(labels=[0, 1, 2], batch_size=2),
    "labels: received None, but guidance_scale=2.0 needs them": decode_classes(guidance_scale=2.0),
    "labels: received None, but guidance_scale=3.0 needs them": decode(guidance_scale=3.0),
    "guidance_scale: received -1, expected a number in [0, inf)": decode_classes(
        labels=[0], guidance_scale=-1
    ),
    "guidance: received 'cosine', expected one of constant, linear": decode_classes(
        labels=[0], guidance="cosine"
    ),
    "params: class_embedding.table is missing": lambda way: way.loss_and_grads(
        CLASSES, PARAMS, TOKENS, TOKENS, MASK
    ),
    "params: class_embedding.table is not expected": lambda way: way.loss_and_grads(
        MODEL, CLASS_PARAMS, TOKENS, TOKENS, MASK
    ),
    "beta1: received 1.0, expected a number in [0, 1)": step(beta1=1.0),
    "beta2: received 2": step(beta2=2),
    "epsilon: received 0": step(epsilon=0),
    "weight_decay: received -0.1": step(weight_decay=-0.1),
    "grads: head.bias is missing": lambda way: way.adam_step(
        PARAMS, without("head.bias"), STATE, 0.1
    ),
    "grads: dtype float32, expected float64 as in params": lambda way: way.adam_step(
        PARAMS, MODEL.init(RNG, np.float32), STATE, 0.1
    ),
    "state: expected the result of init": lambda way: way.adam_step(PARAMS, PARAMS, {}, 0.1),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_call(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD_CALLS[message]()
    assert message.strip() in str(caught.value)


@both_ways
@pytest.mark.parametrize("message", BAD_CALLS_OF_BOTH_WAYS)
def test_bad_call_of_both_ways(way, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD_CALLS_OF_BOTH_WAYS[message](way)
    assert message.strip() in str(caught.value)


def test_the_table_is_long_enough():
    assert len(BAD_CALLS) + len(BAD_CALLS_OF_BOTH_WAYS) >= 220


def test_only_a_few_of_many_wrong_names_are_listed():
    with pytest.raises(ValueError, match="and 16 more"):
        MODEL({}, TOKENS)


def test_hyper_parameters_cannot_be_changed_behind_the_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.dropout = 2.0


def test_the_order_of_a_grid_cannot_be_changed_for_all_who_ask_next():
    with pytest.raises(ValueError, match="read-only"):
        halton(4)[0] = 3
