"""Calls that others make: in order, in one thread each, the same results whoever computes them."""

import concurrent.futures
import functools
import subprocess
import sys

import numpy as np
import pytest

from marref import cli
from marref.fast import parallel
from marref.training import pool

from .test_ranks import mpi, needs_mpi


def threads_there_are(_):
    with parallel.threads(2) as run:
        return run.num_threads


def test_results_come_in_order_from_any_executor():
    items = [3, -1, 2]
    assert list(pool.in_order(abs, items)) == [3, 1, 2]
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert list(pool.in_order(abs, items, executor)) == [3, 1, 2]


def test_a_worker_has_one_thread():
    assert threads_there_are(0) == 2
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert list(pool.in_order(threads_there_are, [0], executor)) == [1]


def test_processes_are_started_where_they_are_asked_for():
    with pool.workers(None) as (is_first, executor):
        assert is_first
        assert executor is None
    with pool.workers(2) as (is_first, executor):
        assert is_first
        assert list(pool.in_order(functools.partial(divmod, 7), [2, 3], executor)) == [
            (3, 1),
            (2, 1),
        ]


@pytest.fixture(scope="module", params=["discrete", "continuous"])
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    options = ["--num-steps", "2", "--num-heads", "2", "--validation-fraction", "0.02"]
    options += ["--out", str(out)]
    if request.param == "continuous":
        options += ["--continuous", "--encoder-dim", "8", "--decoder-dim", "8"]
    else:
        options += ["--embed-dim", "8", "--num-layers", "1"]
    assert cli.main(["train", "digits", *options]) == 0
    return out


def sampled(run, out, *more):
    options = ["--num", "18", "--steps", "2", "--seed", "5"]
    if run.name == "continuous":
        options += ["--diffusion-steps", "2"]
    assert cli.main(["sample", str(run), *options, "--out", str(out), *more]) == 0
    return np.load(out)


def test_samples_are_the_same_set_whoever_computes_them(run, tmp_path):
    found = [sampled(run, tmp_path / f"{count}.npy", "--processes", str(count)) for count in (1, 2)]
    np.testing.assert_array_equal(*found)
    alone = sampled(run, tmp_path / "alone.npy")
    # Of the continuous model products of other shapes round otherwise: a level, here and there.
    assert (alone != found[0]).mean() < (0.001 if run.name == "continuous" else 1e-9)


def test_an_evaluation_prints_the_same_whoever_computes_it(run, capsys):
    if run.name == "continuous":
        pytest.skip("evaluate knows discrete MAR only")
    printed = []
    for more in ([], ["--processes", "2"]):
        assert cli.main(["evaluate", str(run), "--num", "20", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "any-order bound" in printed[0]


@needs_mpi
def test_mpi_samples_and_evaluates_the_same(run, tmp_path):
    expected = sampled(run, tmp_path / "1.npy", "--processes", "1")
    options = ["--num", "18", "--steps", "2", "--seed", "5", "--out", tmp_path / "3.npy"]
    if run.name == "continuous":
        options += ["--diffusion-steps", "2"]
    done = mpi(3, "sample", run, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    np.testing.assert_array_equal(np.load(tmp_path / "3.npy"), expected)
    if run.name == "discrete":
        command = [sys.executable, "-m", "marref", "evaluate", str(run), "--num", "20"]
        alone = subprocess.run(command, capture_output=True, text=True, check=True)
        assert mpi(2, "evaluate", run, "--num", "20").stdout == alone.stdout


def test_the_number_of_processes_is_checked(run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", str(run), "--processes", "0"])
    assert "--processes" in capsys.readouterr().err
