import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

import marref
from marref import loss, optim, parallel, trees
from tests import strategies


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in trees.flatten(tree).values()])


def blas_threads():
    pools = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
    return {pool["num_threads"] for pool in pools}


@pytest.mark.parametrize(("features", "logits"), [(1, 1), (40, 30), (2**18, 2**21)])
@given(case=strategies.cases(dropout=0.3, max_batch=5), num_threads=st.integers(1, 6))
@settings(max_examples=40)
def test_threads_and_shares_change_nothing_but_rounding_in_loss_and_gradients(
    features, logits, case, num_threads
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marref.shares, "_SHARE", features)
        patch.setattr(marref.shares, "_LOGITS_AT_ONCE", logits)
        assert_sharing_changes_nothing(case, num_threads)


def assert_sharing_changes_nothing(case, num_threads):
    model, params, tokens, targets, mask, seed = case
    batch = (tokens, targets, mask)

    def run(num_threads):
        rng = np.random.default_rng(seed)
        value, grads = marref.loss_and_grads(model, params, *batch, rng, num_threads=num_threads)
        return value, flat(grads), rng.random()

    rng = np.random.default_rng(seed)
    logits, cache = model.forward(params, tokens, rng)
    value, loss_cache = loss.forward(logits, targets, mask)
    grads = flat(model.backward(params, loss.backward(loss_cache), cache))
    shared_value, shared_grads, next_number = run(num_threads)
    assert shared_value == pytest.approx(value, rel=1e-13)
    # The gradients in the order of the parameters, which is that of the backward's.
    np.testing.assert_allclose(shared_grads, grads, rtol=0, atol=1e-13 * np.abs(grads).max())
    assert next_number == rng.random()

    again = run(num_threads)
    assert again[0] == shared_value
    np.testing.assert_array_equal(again[1], shared_grads)


@given(case=strategies.cases(max_batch=4), num_threads=st.integers(2, 6), drawn=st.booleans())
@settings(max_examples=50)
def test_threads_change_nothing_but_rounding_in_decoding(case, num_threads, drawn):
    model, params, tokens, _, _, seed = case

    def decode(num_threads):
        return marref.iterative_decode(
            model,
            params,
            tokens=tokens,
            num_steps=3,
            rng=np.random.default_rng(seed) if drawn else None,
            return_steps=True,
            num_threads=num_threads,
        )

    alone, steps = decode(1)
    shared, shared_steps = decode(num_threads)
    np.testing.assert_array_equal(shared, alone)
    np.testing.assert_allclose(shared_steps["confidence"], steps["confidence"], rtol=1e-11)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937])
@pytest.mark.parametrize("stored", [0, 1], ids=["nothing in store", "half a draw in store"])
def test_dropout_of_a_share_is_that_of_the_batch_for_every_generator(monkeypatch, bits, stored):
    monkeypatch.setattr(marref.shares, "_SHARE", 1)
    model = marref.build(
        vocab_size=5, embed_dim=2, num_layers=2, num_heads=1, seq_len=3, dropout=0.5
    )
    params = strategies.random_params(model, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(4, 3))
    rngs = [np.random.Generator(bits(2)) for _ in range(2)]
    for rng in rngs:
        rng.random(stored, np.float32)
    logits, _ = model.forward(params, tokens, rngs[0])
    shared, _ = marref.loss_and_grads(model, params, tokens, tokens, tokens < 3, rngs[1])
    assert shared == pytest.approx(marref.mar_loss(logits, tokens, tokens < 3), rel=1e-13)
    assert rngs[0].random(3, np.float32).tolist() == rngs[1].random(3, np.float32).tolist()


def test_attention_weights_that_are_let_go_are_computed_again(monkeypatch):
    """In a model whose weights take more memory than the rest; gradients are those of backward."""
    model = marref.build(vocab_size=5, embed_dim=2, num_layers=2, num_heads=1, seq_len=33)
    params = strategies.random_params(model, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(2, 33))
    mask = tokens < 3
    logits, cache = model.forward(params, tokens)
    _, loss_cache = loss.forward(logits, tokens, mask)
    expected = flat(model.backward(params, loss.backward(loss_cache), cache))

    weighed = []
    original = marref.layers.attention.weigh
    monkeypatch.setattr(
        marref.layers.attention, "weigh", lambda *pair: weighed.append(1) or original(*pair)
    )
    for length, times in ((33, 4), (31, 2)):
        weighed.clear()
        part = (array[:, :length] for array in (tokens, tokens, mask))
        _, grads = marref.loss_and_grads(model, params, *part)
        assert len(weighed) == times
        if length == 33:
            atol = 1e-13 * abs(expected).max()
            np.testing.assert_allclose(flat(grads), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_the_number_of_threads_may_be_an_integer_of_numpy(dtype):
    model = marref.build(vocab_size=5, embed_dim=32, num_layers=1, num_heads=1, seq_len=9)
    params = strategies.random_params(model, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(5, size=(7, 9))

    def run(num_threads):
        rng = np.random.default_rng(2)
        batch = (tokens, tokens, tokens < 3)
        value, _ = marref.loss_and_grads(model, params, *batch, rng, num_threads=num_threads)
        decoded = marref.iterative_decode(model, params, rng=rng, num_threads=num_threads)
        return value, decoded.tolist()

    assert run(dtype(2)) == run(2)


def test_training_holds_few_sequences_and_logits_at_a_time(monkeypatch):
    model = marref.build(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, seq_len=6)
    params = strategies.random_params(model, np.random.default_rng(0))
    tokens = np.random.default_rng(1).integers(8, size=(7, 6))
    seen = {"body_forward": [], "head_forward": []}

    def counting(name, original):
        def count(model, params, x, *rest):
            seen[name].append(len(x))
            return original(model, params, x, *rest)

        return count

    for name in seen:
        monkeypatch.setattr(marref.shares, name, counting(name, getattr(marref.shares, name)))
    monkeypatch.setattr(marref.shares, "_SHARE", 2 * 6 * 4 + 5)
    monkeypatch.setattr(marref.shares, "_LOGITS_AT_ONCE", 5 * 8 + 7)
    for num_threads, sequences in ((1, [1, 2, 2, 2]), (2, [1, 2, 2, 2]), (3, [1, 1, 1, 1, 1, 2])):
        for counts in seen.values():
            counts.clear()
        marref.loss_and_grads(model, params, tokens, tokens, tokens < 6, num_threads=num_threads)
        assert sorted(seen["body_forward"]) == sequences
        assert max(seen["head_forward"]) <= 5
        assert sum(seen["head_forward"]) == (tokens < 6).sum()


def test_logits_are_made_a_few_at_a_time(monkeypatch):
    model = marref.build(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, seq_len=7)
    params = strategies.random_params(model, np.random.default_rng(0))
    whole = marref.iterative_decode(model, params, num_steps=3)
    rows = []
    original = marref.decoding.head_forward

    def counting(model, params, x):
        rows.append(len(x))
        return original(model, params, x)

    monkeypatch.setattr(marref.decoding, "head_forward", counting)
    monkeypatch.setattr(marref.decoding, "_LOGITS_AT_ONCE", 16)
    np.testing.assert_array_equal(marref.iterative_decode(model, params, num_steps=3), whole)
    assert max(rows) <= 3


def test_blas_has_one_thread_meanwhile_and_its_own_number_afterwards():
    before = blas_threads()
    with parallel.threads(2) as run:
        assert run(lambda _: blas_threads(), range(2)) == [{1}, {1}]
    assert blas_threads() == before
    with parallel.threads(1) as run:
        assert run(lambda _: blas_threads(), range(1)) == [before]


def test_an_error_in_a_thread_reaches_the_caller_and_the_process_is_as_it_was():
    before = blas_threads(), sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), parallel.threads(2) as run:
        run(lambda x: 1 / x, [1, 0])
    assert (blas_threads(), sys.getswitchinterval()) == before


def test_threads_do_not_wait_long_for_the_interpreter_meanwhile():
    with parallel.threads(2) as run:
        assert run(lambda _: sys.getswitchinterval(), range(2)) == [pytest.approx(1e-4)] * 2


def test_threads_have_the_errstate_of_the_caller():
    with np.errstate(divide="raise"), parallel.threads(2) as run, pytest.raises(FloatingPointError):
        run(lambda x: np.ones(1) / x, [1.0, 0.0])


def test_without_threadpoolctl_it_goes_on_with_one_thread_and_says_so(monkeypatch):
    monkeypatch.setattr(parallel, "threadpoolctl", None)
    with (
        pytest.warns(RuntimeWarning, match=r'pip install "marref\[fast\]"'),
        parallel.threads(2) as run,
    ):
        assert run(lambda a, b: a + b, [1, 2], [3, 4]) == [4, 6]
    with parallel.threads(1) as run:
        assert run(str, [1]) == ["1"]


@given(length=st.integers(1, 50), num_shares=st.integers(1, 60))
def test_shares_are_contiguous_and_almost_equal(length, num_shares):
    shares = parallel.split(length, num_shares)
    assert len(shares) == min(length, num_shares)
    assert [i for share in shares for i in range(length)[share]] == list(range(length))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_threads", [1, 3])
def test_adam_in_place_and_in_threads_is_adam(monkeypatch, num_threads):
    monkeypatch.setattr(trees, "_PIECE", 10)
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "vector": (25,), "matrix": (7, 4), "empty": (0, 3)}
    params, first, second = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    )
    params["matrix"] = np.asfortranarray(params["matrix"])
    state = optim.init(params)
    monkeypatch.undo()
    pure, pure_state = optim.step(params, first, state, 0.1, weight_decay=0.1)
    pure, pure_state = optim.step(pure, second, pure_state, 0.1, weight_decay=0.1)
    monkeypatch.setattr(trees, "_PIECE", 10)

    arrays = trees.flatten({"params": params, **state})
    options = {"weight_decay": 0.1, "in_place": True, "num_threads": num_threads}
    stepped, state = optim.step(params, first, state, 0.1, **options)
    stepped, state = optim.step(stepped, second, state, 0.1, **options)
    assert state["step"] == 2
    written = trees.flatten({"params": stepped, **state})
    expected = trees.flatten({"params": pure, **pure_state})
    for name, leaf in written.items():
        np.testing.assert_array_equal(leaf, expected[name])
        assert leaf is arrays[name] or name == "step"


def test_freed_memory_is_kept_if_asked_for():
    """A second array on the memory of a first one touches no new page."""
    program = """
import resource
import numpy as np
from marref import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
if memory.keep_freed():
    faults()
    assert faults() < returned / 5, returned
"""
    subprocess.run([sys.executable, "-c", program], check=True)
