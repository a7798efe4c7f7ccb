"""Time the continuous model beside PyTorch eager: a training step, and sampling.

    python -m benchmarks.continuous_speed [ROUNDS]

Width 256, 6 + 6 blocks, 256 tokens of 16, a buffer of 64, a batch of 8, a diffusion network of
3 blocks of 256, each token with 4 noises; float32.  PyTorch's model is written as the published
code is: all tokens through the network, and a masked mean.  Each contestant is a process of its
own, and they take turns; what is printed are ratios of medians, and memory beyond the imports.
Before that both must compute the same loss from the same draws.
"""

import argparse
import dataclasses
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.measuring import PAUSE
from benchmarks.worker import memory
from marref import chance, continuous
from marref.continuous import training

MODEL = continuous.build(
    image_size=16,
    channels=16,
    patch_size=1,
    encoder_dim=256,
    encoder_layers=6,
    decoder_dim=256,
    decoder_layers=6,
    num_heads=8,
    buffer_size=64,
    num_classes=10,
    diffusion_dim=256,
    diffusion_layers=3,
    diffusion_batch_mul=4,
)
BATCH = 8
STEPS, DIFFUSION_STEPS = 16, 100
CONTESTANTS = ("marref", "PyTorch eager")
TASKS = ("training", "sampling")
TOLERANCE = 1e-4

Task = Callable[[], float]


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Draw a batch."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, MODEL.channels, MODEL.image_size, MODEL.image_size))
    return images.astype(np.float32), np.arange(BATCH)


def of_marref(task: str) -> Task:
    """Return what does a task once; a step of training returns the loss of its draws."""
    images, labels = images_and_labels()
    config = training.Config(10**6, batch_size=BATCH, warmup_steps=0, schedule="constant")
    if task == "sampling":
        numbers = iter(range(10**6))
        params = MODEL.init(np.random.default_rng(0), np.float32)
        options = {"num_steps": STEPS, "num_diffusion_steps": DIFFUSION_STEPS}

        def sample() -> float:
            rng = chance.generator(0, "sample", next(numbers))
            return float(continuous.sample(MODEL, params, labels, rng, **options)[0, 0, 0, 0])

        return sample
    state = training.init(config, MODEL)

    def step() -> float:
        nonlocal state
        state, record = training.step(config, MODEL, images, labels, state)
        return record.loss

    return step


def of_torch(task: str) -> Task:
    """Return the same for PyTorch."""
    import torch

    from benchmarks import continuous_torch

    images, labels = images_and_labels()
    config = training.Config(10**6, batch_size=BATCH)
    if task == "sampling":
        port = continuous_torch.Port(MODEL, MODEL.init(np.random.default_rng(0), np.float32))

        def sample() -> float:
            made = port.sample(torch.tensor(labels), STEPS, DIFFUSION_STEPS)
            return float(made[0, 0, 0])

        return sample
    rng = chance.generator(config.seed, "parameters")
    port = continuous_torch.Port(MODEL, MODEL.init(rng, config.dtype))
    optimiser = torch.optim.AdamW(
        port.state.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.02
    )
    numbers = iter(range(10**6))

    def step() -> float:
        draws = MODEL.draw(chance.generator(config.seed, "diffusion", next(numbers)), BATCH)
        optimiser.zero_grad()
        loss = port.loss(images, labels, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(port.state.values(), config.max_norm)
        optimiser.step()
        return loss.item()

    return step


def work(contestant: str, task: str) -> None:
    """Do a task once for each line that comes in, and say what came of it and how long it took."""
    if contestant == "PyTorch eager":
        # What it imports is not what is measured.
        importlib.import_module("benchmarks.continuous_torch")
    base = memory("VmRSS")
    once = {"marref": of_marref, "PyTorch eager": of_torch}[contestant](task)
    for _ in sys.stdin:
        start = time.perf_counter()
        value = once()
        print(value, time.perf_counter() - start, memory("VmHWM") - base, flush=True)


@dataclasses.dataclass
class Worker:
    """A contestant's process."""

    contestant: str
    task: str

    def __post_init__(self) -> None:
        arguments = ["--worker", self.contestant, self.task]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.continuous_speed", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self) -> tuple[float, float, int]:
        """Let it do its task once: a value, seconds, bytes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        value, seconds, memory = self.process.stdout.readline().split()
        time.sleep(PAUSE)
        return float(value), float(seconds), int(memory)


def measured(task: str, rounds: int) -> Iterator[str]:
    """Let the contestants take turns, and write a line for each."""
    workers = [Worker(name, task) for name in CONTESTANTS]
    first = [worker.do()[0] for worker in workers]
    if task == "training" and abs(first[0] / first[1] - 1) > TOLERANCE:
        raise SystemExit(f"marref has the loss {first[0]}, PyTorch {first[1]}")
    results = [[worker.do() for worker in workers] for _ in range(rounds)]
    reference = statistics.median(of_round[1][1] for of_round in results)
    for place, worker in enumerate(workers):
        worker.process.kill()
        median = statistics.median(of_round[place][1] for of_round in results)
        memory = max(of_round[place][2] for of_round in results)
        yield (
            f"| {task} | {worker.contestant} | {median:.2f} s | {median / reference:.2f} | "
            f"{memory / 2**20:,.0f} MB |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continuous_speed")
    parser.add_argument("rounds", nargs="?", type=int, default=9)
    parser.add_argument("--worker", nargs=2, metavar=("CONTESTANT", "TASK"))
    parsed = parser.parse_args()
    if parsed.worker:
        work(*parsed.worker)
        return
    print("| what | | median | of PyTorch's | memory |\n| --- | --- | ---: | ---: | ---: |")
    for task in TASKS:
        for line in measured(task, parsed.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
