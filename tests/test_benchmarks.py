import dataclasses

import pytest

from benchmarks import cases

TINY = cases.Case("training", "training, tiny", "training", cases.PAIR, "tiny", 16, 2)


def test_needed_work_is_counted_by_hand():
    """Width 16, vocab 18, one layer, 2 sequences of 16 positions, 8 masked in each."""
    projections = 2 * 16 * 16 * (32 + 32 + 16 + 16) + 2 * (2 * 16 * 16 * 64)
    attention = 2 * (2 * 16 * 16 * 16)
    head = 2 * 16 * 16 * 18
    assert cases.needed_flops(TINY, 8, []) == 3 * (projections + attention + head)
    decoding = dataclasses.replace(TINY, task="decoding")
    first, second = (cases.needed_flops(TINY, masked, []) / 3 for masked in (16, 6))
    assert cases.needed_flops(decoding, 0, [10, 6]) == first / 2 + second


def test_contestants_agree_and_a_report_has_a_row_for_each():
    pytest.importorskip("torch")
    from benchmarks import measuring, report

    contestants = (cases.EAGER, "PyTorch gathered", cases.MARREF, cases.DEFAULTS)
    product = next(case for case in cases.quick_cases() if case.task == "product")
    training = dataclasses.replace(TINY, contestants=contestants, dropout=0.1)
    decoding = dataclasses.replace(
        TINY, section="decoding", name="decoding, tiny", task="decoding", dtype="float64"
    )
    double = dataclasses.replace(product, dtype="float64")
    agreements, results = measuring.measure([product, double, training, decoding], rounds=1)
    assert max(row.gradients for row in agreements if row.gradients is not None) < 1e-4
    text = report.render({"CPU": "one"}, agreements, results)
    for contestant in contestants:
        assert f"\n| {contestant} |" in text


def test_contestants_that_disagree_stop_it(monkeypatch):
    pytest.importorskip("torch")
    from benchmarks import measuring

    monkeypatch.setitem(measuring.TOLERANCES, "float32", 1e-12)
    with pytest.raises(SystemExit, match="does not compute what PyTorch eager computes"):
        measuring.measure([TINY], rounds=1)
