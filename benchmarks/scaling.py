"""Time training in several processes beside threads, and kill some of them.

    python -m benchmarks.scaling [ROUNDS]
    python -m benchmarks.scaling --kills 50

The first: steps of the large model (vocabulary 8,192, width 256, 6 blocks, 256 tokens, a batch of
8), float32; the contestants take turns, and what is printed are medians, ratios to the first of
them, and the share of a step that a process spends in MPI, waiting for others included.

The second starts a small run in two processes again and again, kills one of them at a random
moment, and resumes; a run that ends is compared, bit for bit, with one that nobody killed.

Needs the extra ``mpi``.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import CONFIGS
from marref import data, trees
from marref.training import checkpoints, loop, ranks
from marref.training.config import Config

SIZES, BATCH, STEPS = CONFIGS["seed"], 8, 4
PATIENCE = 30.0
RUN = ["digits", "--num-steps", "1500", "--checkpoint-every", "50", "--embed-dim", "16"]


class Contestant(NamedTuple):
    """How a step is computed."""

    processes: int
    threads: int
    shards: int | None
    reduce: str = "exact"


CONTESTANTS = (
    Contestant(1, 2, None),
    Contestant(1, 2, 8),
    Contestant(2, 1, 8),
    Contestant(2, 1, 2),
    Contestant(2, 1, 8, "fast"),
    Contestant(4, 1, 8),
)


class Timed:
    """A communicator that counts the seconds spent in it."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size, self.seconds = comm, comm.rank, comm.size, 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.comm, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def work(contestant: Contestant) -> None:
    """Take steps, and say how long one took and how much of it was MPI's."""
    comm = None
    if contestant.processes > 1:
        from mpi4py import MPI

        comm = Timed(MPI.COMM_WORLD)
    ids = np.random.default_rng(0).integers(SIZES.vocab_size - 1, size=(64, SIZES.seq_len))
    dataset = data.Dataset(ids, data.Ids(SIZES.vocab_size - 1), SIZES.seq_len)
    config = Config(
        embed_dim=SIZES.embed_dim,
        num_layers=SIZES.num_layers,
        num_heads=SIZES.num_heads,
        batch_size=BATCH,
        num_threads=contestant.threads,
        num_shards=contestant.shards,
        reduce=contestant.reduce,
    ).resolved(dataset)
    model, processes = config.model(dataset.vocab_size), ranks.Ranks(comm)
    state = loop.init(config, model)
    state, _ = loop.step(config, model, dataset, state, 0, processes)
    if comm is not None:
        comm.seconds = 0.0
    start = time.perf_counter()
    for number in range(1, 1 + STEPS):
        state, _ = loop.step(config, model, dataset, state, number, processes)
    seconds = time.perf_counter() - start
    if processes.is_first:
        print(seconds / STEPS, 0.0 if comm is None else comm.seconds / seconds)


def measured(contestant: Contestant) -> tuple[float, float]:
    """Start the processes of a contestant: seconds of a step, share of MPI."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker"]
    command += [str(value) for value in contestant]
    if contestant.processes > 1:
        command = ["mpiexec", "-n", str(contestant.processes), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, share = map(float, done.stdout.split())
    return seconds, share


def table(rounds: int) -> None:
    """Let the contestants take turns, and print a line for each."""
    results = [[measured(contestant) for contestant in CONTESTANTS] for _ in range(rounds)]
    medians = [
        [statistics.median(column) for column in zip(*of_contestant, strict=True)]
        for of_contestant in zip(*results, strict=True)
    ]
    print("| processes | threads of each | shards | reduce | step | ratio | in MPI |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for contestant, (seconds, share) in zip(CONTESTANTS, medians, strict=True):
        processes, threads, shards, reduce = contestant
        print(
            f"| {processes} | {threads} | {shards or 'none'} | {reduce if shards else ''} | "
            f"{seconds:.2f} s | {seconds / medians[0][0]:.2f} | {share:.0%} |"
        )


def kill(times: int, seed: int) -> None:
    """Kill runs until enough were, and print what became of them."""
    rng = random.Random(seed)
    kills, ended, slowest = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        subprocess.run(
            [*command_of(alone, 1), "--num-shards", "8"], check=True, capture_output=True
        )
        expected = bits(alone)
        while kills < times:
            out = Path(folder) / f"run-{ended}"
            while True:
                process = subprocess.Popen(
                    command_of(out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                killed = kills < times and kill_one(process, out, rng)
                start = time.monotonic()
                process.wait(PATIENCE if killed else None)
                if not killed:
                    break
                kills += 1
                slowest = max(slowest, time.monotonic() - start)
            if bits(out) != expected:
                raise SystemExit(f"after {kills} kills a run has other bits")
            ended += 1
    print(
        f"{kills} kills, {ended} runs, all as one that nobody killed; after a kill all processes "
        f"had ended within {slowest:.1f} s"
    )


def command_of(out: Path, processes: int) -> list[str]:
    """Say how to start a run, or to go on with it."""
    marref = [sys.executable, "-m", "marref"]
    if processes > 1:
        marref = ["mpiexec", "-n", str(processes), *marref]
    if (out / "config.json").exists():
        return [*marref, "train", "--out", str(out), "--resume"]
    return [*marref, "train", *RUN, "--out", str(out)]


def kill_one(process: "subprocess.Popen[bytes]", out: Path, rng: random.Random) -> bool:
    """Kill one of the processes of a run at a random moment; say whether any was there."""
    end = time.monotonic() + rng.uniform(1.0, 6.0)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    found = ranks_of(out)
    if process.poll() is not None or not found:
        return False
    try:
        os.kill(rng.choice(found), signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        return False
    return True


def ranks_of(out: Path) -> list[int]:
    """Find the Python processes that train into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has ended
            continue
        if words[0] == sys.executable and str(out) in words:
            found.append(int(path.parent.name))
    return sorted(found)


def bits(out: Path) -> bytes:
    """Read all that the newest checkpoint holds."""
    newest = checkpoints.latest(out / "checkpoints")
    assert newest is not None
    leaves = trees.flatten(newest.state._asdict())
    return b"".join(leaves[name].tobytes() for name in sorted(leaves))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=4)
    parsed = parser.parse_args()
    if parsed.worker:
        processes, threads, shards, reduce = parsed.worker
        shards = None if shards == "None" else int(shards)
        work(Contestant(int(processes), int(threads), shards, reduce))
    elif parsed.kills:
        kill(parsed.kills, parsed.seed)
    else:
        table(parsed.rounds)


if __name__ == "__main__":
    main()
