"""Several processes: the same bits as one, errors that end all, and one that writes."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import operator
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from marref import data, trees
from marref.continuous import run as continuous_run
from marref.continuous.run import RunConfig
from marref.fast import loss_and_grads
from marref.training import checkpoints, loop, ranks, runs
from marref.training.config import Config
from marref.training.ranks import Ranks, Share

SMALL = {
    Config: {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    RunConfig: {"encoder_dim": 8, "decoder_dim": 8, "diffusion_dim": 8, "num_heads": 2},
}
LOOPS = {Config: loop, RunConfig: continuous_run}


class Comm:
    """What `Ranks` uses of a communicator, between threads."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.shown = [None] * size
        self.sent = collections.defaultdict(queue.Queue)
        self.aborted = []

    def at(self, rank):
        return _Member(self, rank)


class _Member:
    def __init__(self, comm, rank):
        self.comm, self.rank, self.size = comm, rank, comm.size

    def _all(self, array):
        self.comm.shown[self.rank] = array.copy()
        self.comm.barrier.wait()
        shown = list(self.comm.shown)
        self.comm.barrier.wait()
        return shown

    def Send(self, array, to):
        self.comm.sent[self.rank, to].put(array.copy())

    def Recv(self, array, source):
        array[...] = self.comm.sent[source, self.rank].get(timeout=60)

    def Bcast(self, array, root):
        array[...] = self._all(array)[root]

    def Allreduce(self, mine, total):
        # From the last to the first: no order is promised.
        total[...] = functools.reduce(operator.add, reversed(self._all(mine)))

    def Allgather(self, mine, found):
        found[...] = self._all(mine)

    def Abort(self, status):
        self.comm.aborted.append((self.rank, status))


def together(count, function):
    """Call a function with the `Ranks` of each of several threads; return what they do.

    One is in a thread too, where NumPy 2.1 turns float32 over an int into float64.
    """
    comm = Comm(count)

    def of_rank(rank):
        try:
            return function(ranks.ALONE if count == 1 else Ranks(comm.at(rank)))
        except BaseException:
            comm.barrier.abort()
            raise

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(of_rank, rank) for rank in range(count)]
    errors = [future.exception() for future in futures]
    for error in errors:
        # Who only waited for one that failed has nothing to say.
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


def bits(tree):
    leaves = sorted(trees.flatten(tree).items())
    return hashlib.sha256(b"".join(leaf.tobytes() for _, leaf in leaves)).hexdigest()


def of_random(shard):
    rng = np.random.default_rng(shard)
    grads = {"b": [{"w": rng.normal(size=(3, 4))}], "a": rng.normal(size=5)}
    weight = int(rng.integers(1, 9))
    return Share(weight, (rng.random(),), grads)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_mean_has_the_bits_of_the_tree_however_it_is_shared(count, num_threads):
    shares = [of_random(shard) for shard in range(7)]
    flat = [s.weight * np.concatenate([s.grads["a"], s.grads["b"][0]["w"].ravel()]) for s in shares]
    # 7 shards: (0 + (1 + 2)) + ((3 + 4) + (5 + 6))
    expected = (flat[0] + (flat[1] + flat[2])) + ((flat[3] + flat[4]) + (flat[5] + flat[6]))
    expected /= sum(share.weight for share in shares)
    like = {"a": np.empty(5), "b": [{"w": np.empty((3, 4))}]}
    for (loss,), grads in together(
        count, lambda p: p.mean(of_random, 7, like, num_threads=num_threads)
    ):
        found = np.concatenate([grads["a"], grads["b"][0]["w"].ravel()])
        np.testing.assert_array_equal(found, expected)
        assert loss == sum(s.weight * s.losses[0] for s in shares) / sum(s.weight for s in shares)


def test_a_fast_mean_is_that_up_to_rounding():
    like = {"a": np.empty(5), "b": [{"w": np.empty((3, 4))}]}
    _, expected = ranks.ALONE.mean(of_random, 8, like)
    results = together(3, lambda p: p.mean(of_random, 8, like, reduce="fast")[1])
    assert len({bits(grads) for grads in results}) == 1
    np.testing.assert_allclose(results[0]["a"], expected["a"], rtol=1e-13)


def steps(kind, processes, num_steps=20, **options):
    """Take steps of a run on the digits in memory."""
    dataset = data.load("digits")
    config = kind(num_steps=num_steps, batch_size=11, **SMALL[kind], **options).resolved(dataset)
    model = config.model(dataset.vocab_size, dataset.num_classes)
    state = LOOPS[kind].init(config, model)
    records = []
    for number in range(num_steps):
        state, record = LOOPS[kind].step(config, model, dataset, state, number, processes)
        records.append((record.loss, record.grad_norm))
    return bits(state._asdict()), records


@pytest.mark.parametrize("kind", SMALL)
def test_any_number_of_processes_trains_to_the_same_bits(kind):
    num_steps = 20 if kind is Config else 4
    found = [
        of_rank
        for count in (1, 2, 3, 4)
        for of_rank in together(count, lambda p: steps(kind, p, num_steps, num_shards=5))
    ]
    assert all(of_rank == found[0] for of_rank in found)


def test_nor_do_the_bits_depend_on_the_number_of_threads():
    found = [steps(Config, ranks.ALONE, 5, num_shards=8, num_threads=n) for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("mask_per", ["sequence", "batch"])
def test_shards_add_up_to_the_loss_of_all_their_masked_positions(mask_per):
    """A mean of means would weigh a shard of few masked positions like one of many."""
    dataset = data.load("digits")
    options = {**SMALL[Config], "dropout": 0.0, "mask_per": mask_per, "dtype": "float64"}
    config = Config(num_steps=2, batch_size=7, num_shards=3, **options).resolved(dataset)
    model = config.model(dataset.vocab_size, dataset.num_classes)
    params = loop.init(config, model).params
    parts = [loop._batch(config, model, dataset, n, 0, s) for s, n in enumerate((3, 2, 2))]
    counts = [int(part.mask.sum()) for part in parts]
    assert len(set(counts)) > 1
    if mask_per == "batch":
        shares = {
            round(float(of_sequence), 9) for part in parts for of_sequence in part.mask.mean(axis=1)
        }
        assert len(shares) == 1
    inputs, targets, mask, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    expected, grads = loss_and_grads(model, params, inputs, targets, mask, labels=labels)
    of_shard = functools.partial(loop._of_shard, config, model, dataset, params, 0)
    (found,), found_grads = ranks.ALONE.mean(of_shard, 3, params)
    assert found == pytest.approx(float(expected), rel=1e-13)
    for name, leaf in trees.flatten(grads).items():
        other = trees.flatten(found_grads)[name]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-13 * max(1.0, abs(leaf).max()))


# Runs.


def start(out, processes, kind=Config, num_steps=7, **options):
    config = kind(
        num_steps=num_steps,
        batch_size=8,
        num_shards=4,
        checkpoint_every=2,
        validate_every=3,
        validation_fraction=0.02,
        **SMALL[kind],
        **options,
    )
    return runs.start(data.load("digits"), out, config, processes=processes)


def newest(out):
    return checkpoints.latest(out / "checkpoints")


@pytest.mark.parametrize("kind", SMALL)
def test_a_run_of_several_is_that_of_one(kind, tmp_path):
    num_steps = 7 if kind is Config else 3
    for count in (1, 3):
        out = tmp_path / str(count)
        results = together(count, lambda p, out=out: start(out, p, kind, num_steps))
        assert {bits(run.state._asdict()) for run in results} == {
            bits(newest(tmp_path / str(count)).state._asdict())
        }
    one, three = (newest(tmp_path / str(count)) for count in (1, 3))
    assert bits(one.state._asdict()) == bits(three.state._asdict())
    validated = [
        [line.split(",")[-1] for line in (tmp_path / name / "history.csv").read_text().split()]
        for name in "13"
    ]
    assert validated[0] == validated[1]
    assert len(validated[0]) == 1 + num_steps


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    whole = start(tmp_path / "whole", ranks.ALONE)

    def stop(record):
        if record.step == 3:
            raise KeyboardInterrupt

    dataset, config = data.load("digits"), whole.config
    with pytest.raises(KeyboardInterrupt):
        runs.start(dataset, tmp_path / "run", config, on_step=stop)
    results = together(3, lambda p: runs.resume(tmp_path / "run", dataset, processes=p))
    assert {bits(run.state._asdict()) for run in results} == {bits(whole.state._asdict())}


def test_all_stop_where_one_is_asked_to_and_go_on_with_others(tmp_path, monkeypatch):
    whole = start(tmp_path / "whole", ranks.ALONE)
    received = {}

    @contextlib.contextmanager
    def signals():
        yield received.setdefault(threading.get_ident(), [])

    def stopped(processes):
        def on_step(record):
            if processes.number == 1 and record.step == 3:
                received[threading.get_ident()].append(signal.SIGTERM)

        with pytest.raises(SystemExit):
            runs.start(
                data.load("digits"),
                tmp_path / "run",
                whole.config,
                on_step=on_step,
                processes=processes,
            )

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_signals", signals)
        together(3, stopped)
    assert newest(tmp_path / "run").step == 3
    results = together(2, lambda p: runs.resume(tmp_path / "run", data.load("digits"), processes=p))
    assert {bits(run.state._asdict()) for run in results} == {bits(whole.state._asdict())}


def test_a_checkpoint_is_due_in_all_where_it_is_in_the_first(tmp_path, monkeypatch):
    """After a resume only the first knows what was best before."""
    values = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5}
    monkeypatch.setattr(
        loop, "validation", lambda *arguments: values[int(arguments[-1].optimiser["step"])]
    )
    config = Config(
        num_steps=4,
        batch_size=8,
        num_shards=4,
        checkpoint_every=99,
        validate_every=1,
        **SMALL[Config],
    )

    def stop(record):
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.start(data.load("digits"), tmp_path / "run", config, on_step=stop)
    together(2, lambda p: runs.resume(tmp_path / "run", data.load("digits"), processes=p))
    assert sorted(checkpoints.found(tmp_path / "run" / "checkpoints")) == [1, 2, 4]


def test_a_shard_computes_no_more_than_batch_size_sequences_at_a_time(monkeypatch):
    sizes = []

    def counting(model, params, tokens, *rest, **options):
        sizes.append(len(tokens))
        return loss_and_grads(model, params, tokens, *rest, **options)

    monkeypatch.setattr(loop, "loss_and_grads", counting)
    found = steps(Config, ranks.ALONE, 1, num_shards=2, accumulate=5)
    assert max(sizes) == 11
    assert sum(sizes) == 55
    assert found == steps(Config, ranks.ALONE, 1, num_shards=2, accumulate=5, num_threads=2)


def test_more_processes_than_shards_are_refused(tmp_path):
    message = "num_shards: received 4, expected at least as many as there are processes, 5"
    with pytest.raises(ValueError, match=message):
        together(5, lambda p: start(tmp_path / "run", p))
    assert not (tmp_path / "run").exists()
    config = Config(num_steps=2)
    with pytest.raises(ValueError, match="num_shards: received None, expected at least"):
        together(2, lambda p: runs.start(data.load("digits"), tmp_path, config, processes=p))


@pytest.mark.parametrize("kind", SMALL)
def test_options_of_shards_are_checked(kind):
    for options, message in (
        ({"num_shards": 0}, "num_shards: received 0"),
        ({"num_shards": 9}, "num_shards: received 9"),
        ({"reduce": "sum"}, "reduce: received 'sum'"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(num_steps=2, batch_size=8, **options)


def test_bits_that_differ_are_found_and_the_rank_is_named():
    def check(processes):
        x = {"w": np.zeros(3)}
        x["w"][1] = -0.0 if processes.number == 1 else 0.0
        processes.check_equal("state", x)

    with pytest.raises(RuntimeError, match="state: rank 1 has other bits than rank 0"):
        together(3, check)
    together(3, lambda p: p.check_equal("state", {"w": np.ones(3)}))


def test_what_the_first_has_all_have():
    def copied(processes):
        x = {"w": np.full(3, processes.number), "step": np.array(processes.number + 5)}
        processes.copy(x)
        return x["w"].tolist(), int(x["step"]), processes.told(float(processes.number) + 0.1)

    assert together(3, copied) == [([0, 0, 0], 5, 0.1)] * 3


def test_an_error_in_one_ends_all_and_says_where(capsys, monkeypatch):
    monkeypatch.setattr(ranks, "_UNTIL_READ", 0.0)
    comm = Comm(2)
    with Ranks(comm.at(1)).ending_together():
        raise OSError("cannot read")
    assert comm.aborted == [(1, 2)]
    assert capsys.readouterr().err == "marref: rank 1 of 2: cannot read\n"
    with Ranks(comm.at(0)).ending_together():
        raise KeyError("unforeseen")
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(OSError, match="cannot read"), ranks.ALONE.ending_together():
        raise OSError("cannot read")


def test_a_second_signal_in_one_ends_all():
    """The others know nothing of it: who stops alone must neither save nor wait."""
    comm = Comm(2)
    processes = Ranks(comm.at(0))
    assert not processes.acts_with_all
    with processes.ending_together():
        raise KeyboardInterrupt
    assert comm.aborted == [(0, 2)]
    results = together(2, lambda p: (p.agreed([signal.SIGINT]), p.acts_with_all))
    assert results == [([signal.SIGINT], True)] * 2


@pytest.fixture
def no_world():
    ranks.world.cache_clear()
    yield
    ranks.world.cache_clear()


def test_without_a_launcher_a_process_is_alone(no_world, monkeypatch):
    for name in ranks._SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert ranks.world() is ranks.ALONE


def test_several_processes_without_mpi4py_name_the_extra(no_world, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r'pip install "marref\[mpi\]"'):
        ranks.world()
    monkeypatch.setenv("PMI_SIZE", "1")
    assert ranks.world() is ranks.ALONE


def test_an_mpi4py_for_another_mpi_than_the_launcher_s_is_noticed(no_world, monkeypatch):
    class MPI:
        COMM_WORLD = Comm(1).at(0)

    module = types.ModuleType("mpi4py")
    module.MPI = MPI
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(RuntimeError, match="mpi4py sees one process of 4"):
        ranks.world()


def test_beside_others_a_process_has_one_thread_unless_it_is_told():
    features = 10**9
    assert ranks.ALONE.threads(3, features) == 3
    assert Ranks(Comm(2).at(0)).threads(None, features) == 1
    assert Ranks(Comm(2).at(0)).threads(2, features) == 2


# MPI itself.

MPIEXEC = shutil.which(
    "mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
)
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="needs the extra mpi"
)
TRAIN = ["train", "digits", "--batch-size", "16", "--num-heads", "2"]
SMALLER = {
    "discrete": ["--num-steps", "20", "--embed-dim", "8", "--num-layers", "1"],
    "continuous": ["--continuous", "--num-steps", "4", "--encoder-dim", "8"],
}


def mpi(count, *arguments, **options):
    command = [MPIEXEC, "-n", str(count), sys.executable, "-m", "marref", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, **options
    )


@needs_mpi
@pytest.mark.parametrize("kind", SMALLER)
def test_mpi_trains_to_the_same_bits(kind, tmp_path):
    train = [*TRAIN, *SMALLER[kind]]
    found = {}
    for count in (1, 2, 3, 4):
        done = mpi(count, *train, "--out", tmp_path / str(count))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done.") == 1
        assert ("wait for each other" in done.stderr) == (count > (os.cpu_count() or 1))
        found[count] = bits(newest(tmp_path / str(count)).state._asdict())
    alone = [sys.executable, "-m", "marref", *train, "--num-shards", "8"]
    subprocess.run([*alone, "--out", tmp_path / "alone"], check=True, capture_output=True)
    found["alone"] = bits(newest(tmp_path / "alone").state._asdict())
    assert len(set(found.values())) == 1, found


@needs_mpi
def test_a_rank_that_fails_ends_all_within_seconds_and_is_named(tmp_path):
    program = (
        "import sys; from marref.training import ranks; from marref.cli import main\n"
        "p = ranks.world()\n"
        "if p.number == 1:\n"
        "    from marref.training import loop\n"
        "    def fails(*_): raise OSError('no such page')\n"
        "    loop._batch = fails\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [
        MPIEXEC,
        "-n",
        "2",
        sys.executable,
        "-c",
        program,
        *TRAIN,
        *SMALLER["discrete"],
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "marref: rank 1 of 2: no such page" in done.stderr
