import dataclasses

import numpy as np
import pytest

from benchmarks import cases, measuring, report
from benchmarks.measuring import Result

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
