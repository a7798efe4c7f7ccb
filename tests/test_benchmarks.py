import argparse
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import marref
from benchmarks import cases, measuring, report
from benchmarks.measuring import Result
from marref.verify import measure

TINY = cases.Case("training", "training, tiny", "training", cases.THREE, "tiny", 16, 2)


def test_needed_work_is_counted_by_hand():
    """Width 16, vocab 18, one layer, 2 sequences of 16 positions, 8 masked in each."""
    projections = 2 * 16 * 16 * (32 + 32 + 16 + 16) + 2 * (2 * 16 * 16 * 64)
    attention = 2 * (2 * 16 * 16 * 16)
    head = 2 * 16 * 16 * 18
    assert cases.needed_flops(TINY, 8, []) == 3 * (projections + attention + head)
    decoding = dataclasses.replace(TINY, task="decoding")
    first, second = (cases.needed_flops(TINY, masked, []) / 3 for masked in (16, 6))
    assert cases.needed_flops(decoding, 0, [10, 6]) == first / 2 + second


def test_the_best_peer_is_the_fastest_that_is_not_marref():
    seconds = {
        cases.EAGER: [1.0, 1.0, 1.0],
        cases.GATHERED: [0.9, 0.9, 0.9],
        cases.COMPILED: [0.8, 0.1, 0.95],
        cases.MARREF: [0.5, 0.5, 0.5],
        cases.BEST: [0.4, 0.4, 0.4],
    }
    case = dataclasses.replace(TINY, contestants=(*seconds, cases.AUTOTUNED))
    result = Result(case, 1.0, seconds, {}, dict.fromkeys(seconds, 1))
    product = dataclasses.replace(TINY, section="product", task="product")
    peak = Result(product, 1.0, {cases.EAGER: [0.3]}, {}, {cases.EAGER: 1})
    header, _, row = (
        report.render({}, [], [peak, result]).split("### Training\n\n")[1].split("\n")[:3]
    )
    cells = dict(zip(*(line.strip("| ").split(" | ") for line in (header, row)), strict=True))
    assert cells["peer at its best"] == "0.80 (torch.compile)"
    assert cells[cases.AUTOTUNED] == "failed"
    assert cells["physical limit"] == "0.30"


def test_contestants_agree_and_a_report_has_a_row_for_each():
    pytest.importorskip("torch")
    contestants = (cases.EAGER, cases.GATHERED, cases.MARREF, cases.BEST)
    product = next(case for case in cases.quick_cases() if case.task == "product")
    training = dataclasses.replace(TINY, contestants=contestants, dropout=0.1)
    decoding = dataclasses.replace(
        TINY,
        section="decoding",
        name="decoding, tiny",
        task="decoding",
        contestants=contestants,
        dtype="float64",
    )
    double = dataclasses.replace(product, dtype="float64")
    agreements, results = measuring.measure([product, double, training, decoding], rounds=1)
    assert len(agreements) == 6
    assert max(row.gradients for row in agreements if row.gradients is not None) < 1e-4
    text = report.render({"CPU": "one"}, agreements, results)
    for contestant in contestants:
        assert text.count(f"\n| {contestant} | ") == 2
    assert "failed" not in text


def test_gathered_logits_predict_what_all_logits_predict(tmp_path):
    torch = pytest.importorskip("torch")
    from benchmarks.contestants import in_torch

    measuring.write_arrays(TINY, tmp_path)
    with np.load(tmp_path / measuring.ARRAYS) as arrays:
        plain, gathered = (in_torch.Decoding(TINY, arrays, name) for name in ("plain", "gathered"))
        tokens = torch.from_numpy(arrays["tokens"])
    with torch.inference_mode():
        masked = tokens == cases.MASK_TOKEN
        expected, predicted = plain.predict_all(tokens, masked)
        found, predicted_at_masked = gathered.predict_masked(tokens, masked)
    assert 0 < masked.sum() < masked.numel()
    torch.testing.assert_close(found, expected)
    assert torch.equal(predicted_at_masked[masked], predicted[masked])


LOOP = dataclasses.replace(
    next(case for case in cases.quick_cases() if case.task == "loop"), dtype="float64", dropout=0.0
)


@pytest.fixture
def arrays_of_loop(tmp_path):
    pytest.importorskip("torch")
    measuring.write_arrays(LOOP, tmp_path)
    with np.load(tmp_path / measuring.ARRAYS) as arrays:
        return dict(arrays)


def losses_after_given_steps(task):
    for number in range(cases.CHECKED_STEPS):
        task.given_step(number)
    return np.array(task.losses())


@pytest.mark.parametrize("variant", ["plain", "gathered"])
def test_a_loop_of_torch_does_what_marrefs_does(arrays_of_loop, variant):
    from benchmarks.contestants import in_numpy, in_torch

    # Made first, since marref writes over the arrays.
    found = losses_after_given_steps(in_torch.Loop(LOOP, arrays_of_loop, variant))
    expected = losses_after_given_steps(in_numpy.Loop(LOOP, arrays_of_loop, "default"))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len({*expected}) == 2


def test_a_loop_draws_its_own_batches(arrays_of_loop):
    from benchmarks.contestants import in_numpy, in_torch

    for task in (
        in_numpy.Loop(LOOP, arrays_of_loop, "default"),
        in_torch.Loop(LOOP, arrays_of_loop, "plain"),
    ):
        before = task.losses()
        task.run()
        task.run()
        assert task.losses() != before


@pytest.mark.parametrize(
    "option",
    ["max_norm", "weight_decay", "learning_rate", "average_decay", "warmup_steps", "num_steps"],
)
def test_a_loop_of_torch_that_differs_in_an_option_is_seen(arrays_of_loop, option):
    from benchmarks.contestants import in_torch

    options = {**json.loads(str(arrays_of_loop["options"])), "max_norm": 0.5}
    if option != "warmup_steps":
        options["warmup_steps"] = 0
    losses = []
    for value in (options[option], options[option] // 2 or options[option] / 2):
        told = np.array(json.dumps({**options, option: value}))
        task = in_torch.Loop(LOOP, {**arrays_of_loop, "options": told}, "plain")
        losses.append(losses_after_given_steps(task))
    assert np.abs(losses[0] / losses[1] - 1).max() > 10 * measuring.TOLERANCES["float64"]


def test_a_contestant_that_fails_its_check_is_not_measured(monkeypatch):
    pytest.importorskip("torch")
    ask = measuring.Team.ask

    def ask_one_less(team, command, turn=0):
        if command.startswith("check"):
            team.workers[cases.GATHERED].process.kill()
        return ask(team, command, turn)

    monkeypatch.setattr(measuring.Team, "ask", ask_one_less)
    product = next(case for case in cases.quick_cases() if case.task == "product")
    training = dataclasses.replace(TINY, contestants=(*cases.THREE, cases.GATHERED))
    agreements, results = measuring.measure([product, training], rounds=1)
    assert [row.contestant for row in agreements] == [cases.MARREF, cases.BEST]
    assert tuple(results[1].seconds) == cases.THREE
    assert f"\n| {cases.GATHERED} | failed | " in report.render({}, agreements, results)


def test_a_run_goes_on_without_a_peer_that_ends_but_not_without_marref(tmp_path):
    pytest.importorskip("torch")
    case = dataclasses.replace(TINY, contestants=(cases.EAGER, cases.GATHERED, cases.MARREF))
    with measuring.start(case, tmp_path) as team:
        assert tuple(team.ask("measure")) == case.contestants
        team.workers[cases.GATHERED].process.kill()
        assert tuple(team.ask("measure")) == (cases.EAGER, cases.MARREF)
        assert tuple(team.ask("measure", 1)) == (cases.MARREF, cases.EAGER)
        team.workers[cases.MARREF].process.kill()
        with pytest.raises(SystemExit, match="marref failed in training, tiny"):
            team.ask("measure")


@pytest.mark.parametrize(
    ("task", "bounds", "bound"),
    [("training", "TOLERANCES", 1e-12), ("decoding", "EQUAL_TOKENS", 1.1)],
)
def test_contestants_that_disagree_stop_it(monkeypatch, task, bounds, bound):
    pytest.importorskip("torch")
    monkeypatch.setitem(getattr(measuring, bounds), "float32", bound)
    with pytest.raises(SystemExit, match="does not compute what PyTorch eager computes"):
        measuring.measure([dataclasses.replace(TINY, task=task)], rounds=1)


# Programs that diagnosis is measured on.

FORWARD = ("activations", "loss", "gradients", "activation_gradients")


@pytest.fixture(scope="module")
def vectors():
    pytest.importorskip("torch")
    from benchmarks import diagnosis

    return diagnosis.model_vectors(2, "torch")


def right(vectors, sections=FORWARD):
    return {name: x for name, x in vectors.arrays.items() if name.split("/")[0] in sections}


def largest_difference(found, vectors):
    return max(measure.difference(x, vectors.arrays[name]) for name, x in found.items())


def test_ports_know_nothing_of_the_catalogue():
    for path in (Path(__file__).parent.parent / "benchmarks" / "ports").glob("*.py"):
        assert not re.search(r"import.*(faults|CATALOGUE|diagnosis)\b", path.read_text("utf-8"))


def test_a_port_computes_every_golden_array_in_every_style(vectors):
    from benchmarks.ports import in_torch

    whole = in_torch.TorchPort(vectors, in_torch.Style(), "float64").arrays(in_torch.SECTIONS)
    assert whole.keys() == right(vectors, in_torch.SECTIONS).keys()
    assert largest_difference(whole, vectors) < 1e-12
    for field, options in in_torch.STYLES.items():
        for option in options:
            style = dataclasses.replace(in_torch.Style(), **{field: option})
            found = in_torch.TorchPort(vectors, style, "float64").arrays(FORWARD)
            assert {*found} <= {*right(vectors)}
            assert largest_difference(found, vectors) < 1e-12


@pytest.mark.parametrize("precision", ["tf32", "fp16-mixed", "bfloat16"])
def test_right_ports_are_measured_against_budgets_in_every_section(vectors, precision):
    from benchmarks import budgets

    rows = next(budgets.measured("torch", precision, 2))
    assert len({row.name.split("/")[0] for row in rows}) == 10
    assert not [row for row in rows if row.verdict == "DIFFERS"]
    assert max(row.relative for row in rows) > 0


def test_a_right_flax_port_is_measured():
    pytest.importorskip("flax")
    from benchmarks import budgets

    rows = next(budgets.measured("flax", "float32", 2))
    assert {row.name.split("/")[0] for row in rows} == {"activations", "loss", "gradients"}
    assert not [row for row in rows if row.verdict == "DIFFERS"]


def test_every_mistake_in_the_forward_or_backward_pass_is_one(vectors):
    from benchmarks.ports import faulty, in_torch

    elsewhere = ("adam", "clip", "decode", "gradients")
    # The model has them, or has no place for them: it has one block.
    hidden = {"gelu-tanh", "positions-concatenated", "layer-norm-epsilon-1e-5"}
    hidden |= {"layer-norm-clipped-variance", "block-parameters-shared", "block-order-reversed"}
    for name in faulty.FAULTS:
        if name.startswith(elsewhere) or name in hidden:
            continue
        port = faulty.faulty([name])(vectors, in_torch.Style(), "float64")
        found = port.arrays(FORWARD)
        assert largest_difference(found, vectors) > 1e-12, name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("attention-parameters-read-by-head + attention-key-and-value-parameters-swapped", False),
        ("attention-output-kernel-transposed + linear-kernels-reshaped", False),
        ("block-order-reversed + block-parameters-shared", False),
        ("residual-from-normalised + residual-around-attention-from-normalised", False),
        ("layer-norm-unbiased-epsilon-outside-root + layer-norm-unbiased-variance", False),
        ("embedding-ids-off-by-one + embedding-times-root-embed-dim + loss-shifted", True),
        ("gradients-not-zeroed + adam-epsilon-1e-6 + clip-each-fused-array", True),
    ],
)
def test_mistakes_in_one_decision_exclude_each_other(names, expected):
    pytest.importorskip("torch")
    from benchmarks.ports import faulty

    assert faulty.compatible(names.split(" + ")) == expected


def test_every_perturbation_is_one(vectors):
    from benchmarks.ports import in_torch, perturbed

    config = vectors.metadata["config"]
    for index, (name, kind) in enumerate(perturbed.KINDS.items()):
        if name.startswith(("adam", "clip", "decode")) or not perturbed.NEEDS[name](config):
            continue
        program = kind(perturbed.Draw(config, [2, index])).program
        port = type("Port", (program, in_torch.TorchPort), {})
        found = port(vectors, in_torch.Style(), "float64").arrays(FORWARD)
        assert largest_difference(found, vectors) > 1e-12, name


def test_answers_are_scored():
    pytest.importorskip("torch")
    from benchmarks.diagnosis import score
    from marref.verify.diagnosis import Diagnosis, Explanation
    from marref.verify.faults import Fault

    one, two, three = Fault("one"), Fault("two"), Fault("three")
    pair = {frozenset({"one", "two"})}

    def answer(*found, acceptable=pair, coarser=None):
        return score(Diagnosis(None, found, coarser=coarser), acceptable)

    assert answer(Explanation((two, one), 0.1)) == "right"
    assert answer(Explanation((three,), 0.1, same=((one, two),))) == "right"
    assert answer(Explanation((one, two), 0.1), Explanation((three,), 0.2)) == "right, and others"
    assert answer(Explanation((one,), 0.1)) == "half"
    assert answer(Explanation((one, three), 0.1)) == "wrong"
    assert answer(Explanation((one,), 0.1), acceptable=pair | {frozenset({"one"})}) == "right"
    assert answer() == "empty"
    assert answer(coarser="tf32") == "coarser"


def test_a_mistake_in_torch_is_named_and_a_perturbation_is_not():
    pytest.importorskip("torch")
    from benchmarks import diagnosis, perturbations

    (case,) = diagnosis.judged(diagnosis.Program("torch", "float32", 2, "single"), ["logits"])
    assert (case.answer, len(case.mistakes)) == ("right", 1)
    (case,) = diagnosis.judged(diagnosis.Program("torch", "float32", 2, "right"), ["logits"])
    assert case.answer == "right"
    patient = perturbations.Patient("feed_forward.up-scaled", 2, "float32")
    assert patient.judged("logits + loss + gradients").names in ("none", "coarser")


# A text, learnt by both.


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """What both make of a short text in a moment; the run of marref."""
    pytest.importorskip("torch")
    from benchmarks import text

    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the lazy dog, and the quick brown foxes jump over it\n" * 60)
    dataset = text.data.load(folder / "text.txt", length=16)
    config = text.Config(
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        batch_size=8,
        num_threads=1,
        dropout=0.0,
        learning_rate=0.01,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.runs, "VALIDATION_SEQUENCES", 16)
        patch.setattr(text, "steps_in", lambda *_: 200)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        both = (
            text.in_marref(dataset, config, 1.0, folder / "run"),
            text.in_torch(dataset, config, 1.0),
        )
    return dataset, config.resolved(dataset), folder / "run", both


def test_marref_and_torch_learn_a_text_alike(learnt):
    from benchmarks import text

    dataset, options, _, (marref, torch) = learnt
    unigram = text.unigram_bits(dataset, options)
    assert 4.0 < unigram < 5.0
    assert (marref.num_steps, torch.num_steps) == (200, 200)
    assert len(marref.bits) == len(torch.bits) == 5
    assert np.mean(marref.bits) == pytest.approx(np.mean(torch.bits), rel=0.1)
    assert max(np.mean(marref.bits), np.mean(torch.bits)) < unigram


def test_both_models_are_the_same_at_the_start(learnt):
    import torch

    from benchmarks import text

    dataset, options, _, _ = learnt
    model = options.model(dataset.vocab_size)
    tokens = dataset.rows([0, 5])
    expected = model(text.loop.init(options, model).params, tokens)
    with torch.inference_mode():
        found = text._torch_model(dataset, options).eval()(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_blanks_are_words_in_held_out_windows(learnt):
    from benchmarks import text

    dataset, options, run, _ = learnt
    blanks = text.fill_in(dataset, run, 10)
    assert len(blanks) >= 8
    for blank in blanks:
        assert blank.word in text.known_words(dataset, options)
        assert len(blank.filled) == len(blank.word) >= 4
        whole = blank.before + blank.word + blank.after
        assert whole in "the lazy dog, and the quick brown foxes jump over it\n" * 3


def test_steps_are_counted_that_fit_beside_ten_validations(monkeypatch):
    from benchmarks import text

    now = [0.0]
    monkeypatch.setattr(text.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        now[0] += seconds

    assert text.steps_in(600.0, lambda _: takes(0.25), lambda: takes(6.0)) == 540 * 4


def test_docstrings_that_are_prose_are_collected():
    from benchmarks import text

    found = list(text._docstrings(Path(argparse.__file__)))
    assert any(each.startswith("Command-line parsing library\n\nThis module") for each in found)
    assert min(map(len, found)) > 200


# Rules of the decoder, measured.


@pytest.fixture(scope="module")
def bench():
    """Untrained models of digits, and as many digits as classes."""
    from benchmarks import samplers

    model = marref.build(18, 8, 1, 2, 64, num_classes=10)
    params = model.init(np.random.default_rng(0), dtype=np.float32)
    real = marref.data.digits()[1]
    return samplers.Bench(model, params, model, params, np.arange(10), real, 0)


def test_every_rule_is_measured_and_has_a_row(bench):
    from benchmarks import samplers

    results = list(samplers.measure(bench, (1, 4)))
    held_out = bench.bits(bench.real[:5], np.arange(5))
    text = samplers.tables(results, held_out, held_out)
    for rule in samplers.PLANNED:
        assert text.count(f"\n| {rule} | ") == 3
    for rule in samplers.UNPLANNED:
        assert text.count(f"\n| {rule} | ") == 1
    assert "\n| random, blocks of 16 |  | " in text
    # An untrained model draws noise, which real digits are not.
    assert min(each.statistic / each.noise for each in results) > 10


@pytest.mark.parametrize(
    ("rule", "num_steps", "passes", "positions"),
    [
        # The cosine leaves 59, 45 and 24 masked.
        ("random", 4, 4, (64 + 59 + 45 + 24) / 64),
        ("random, blocks of 16", 4, 4, 1),
        ("random, log", 64, 37, None),
        ("P2", 4, 4, 4),
        ("threshold 0.99", None, 64, 65 / 2),
    ],
)
def test_passes_and_predicted_positions_are_counted(bench, rule, num_steps, passes, positions):
    from benchmarks import samplers

    options = (samplers.PLANNED | samplers.UNPLANNED)[rule]
    result = samplers.measured(bench, rule, num_steps, **options)
    assert result.passes == passes
    assert positions is None or result.positions == positions


def test_models_that_judge_samplers_are_kept(tmp_path, monkeypatch):
    from benchmarks import samplers

    monkeypatch.setattr(samplers, "JUDGE", {"embed_dim": 16, "num_layers": 1})
    monkeypatch.setattr(samplers.digits.demo, "train_on", untrained)
    first = samplers.prepared(0, True, 30, tmp_path)
    monkeypatch.setattr(samplers.digits, "trained", None)
    again = samplers.prepared(0, True, 30, tmp_path)
    for name in ("params", "judging"):
        expected, found = (marref.trees.flatten(getattr(each, name)) for each in (first, again))
        np.testing.assert_equal(found, expected)
    assert (again.model.embed_dim, again.judge.embed_dim) == (48, 16)
    assert len(again.asked) == 10


def untrained(config, model, train, echo):
    return model.init(np.random.default_rng(config.seed)), []


def test_rules_are_drawn_and_printed_for_a_text(bench, learnt, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import samplers

    samplers.draw(bench, tmp_path / "rules.png")
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")
    samplers.print_text(learnt[2], 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(samplers.DRAWN) * (1 + samplers.SHOWN_STEPS)
    ends = [line for line in lines if line.startswith("   8 ")]
    assert len(ends) >= 10
    assert not [line for line in ends if "_" in line]
