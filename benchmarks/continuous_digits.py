"""Generate digits with a trained continuous model, each setting of the sampler changed in turn.

    marref demo --continuous --out run
    python -m benchmarks.continuous_digits run/checkpoint.npz [--seed N]

How often a nearest-neighbour classifier sees the digit that was asked for, and the two-sample
statistic against held-out digits, of 30 of each digit.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.digits import NUM_OF_EACH, judged
from marref import chance, continuous, demo
from marref.continuous.pixels import Scale
from marref.demo.continuous import DEFAULT

SAMPLING: dict[str, dict[str, Any]] = {
    "as the demo": {},
    "no guidance": {"guidance_scale": 1.0},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 3, linear": {"guidance_scale": 3.0, "guidance": "linear"},
    "no class": {"guidance_scale": 1.0, "labels": None},
    "8 steps": {"num_steps": 8},
    "4 steps": {"num_steps": 4},
    "1 step": {"num_steps": 1},
    "1,000 diffusion steps": {"num_diffusion_steps": 1000},
    "25 diffusion steps": {"num_diffusion_steps": 25},
    "10 diffusion steps": {"num_diffusion_steps": 10},
    "temperature 0.9": {"temperature": 0.9},
    "no clipping": {"clip": None},
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continuous_digits")
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    model, _, state = continuous.load(parsed.checkpoint)
    scale = Scale.of(demo.digits()[0])
    asked = np.repeat(np.arange(demo.NUM_CLASSES), NUM_OF_EACH)
    print("| what differs | of the class asked for | MMD² |\n| --- | ---: | ---: |")
    for name, changed in SAMPLING.items():
        options = {**DEFAULT.sampling, "labels": asked, "batch_size": len(asked), **changed}
        rng = chance.generator(parsed.seed, "sample")
        images = continuous.sample(model, state.averaged, rng=rng, **options)
        is_asked = options["labels"] is not None
        columns = judged(scale.to_tokens(images), asked, is_asked, parsed.seed)
        print(f"| {name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
