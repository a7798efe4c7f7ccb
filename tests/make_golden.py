"""Write tests/golden/*.npz, what stock PyTorch makes of two small models:

    python tests/make_golden.py

Each file holds, in float64,

    config                            JSON (uint8): the arguments of `marref.build`
    training                          JSON (uint8): the numbers of the optimiser steps
    params/<name>                     random, biases and norm scales too
    tokens, targets, mask             [3, 6]
    logits, loss, gradients/<name>
    adam/<name>                       the parameters after ten steps of torch.optim.Adam,
    adamw/<name>                      of torch.optim.AdamW,
    clipped/<name>                    of Adam on gradients clipped by torch.nn.utils

with the parameters' dotted names.  The key biases' gradients are as PyTorch computed them, all
rounding; for the optimiser steps they are held at 0 (`TorchMAR.hold_key_biases`).
"""

import json
from pathlib import Path

import numpy as np
import torch

if __package__:
    from .torch_mar import TorchMAR
else:  # run as a script
    from torch_mar import TorchMAR

GOLDEN = Path(__file__).parent / "golden"

SIZES = {"vocab_size": 11, "embed_dim": 8, "num_layers": 2, "num_heads": 2, "seq_len": 6}
CONFIGS = {
    "erf-concatenated": SIZES
    | {"layer_norm_epsilon": 1e-5, "gelu": "erf", "positions": "concatenated"},
    "tanh-interleaved": SIZES
    | {"layer_norm_epsilon": 1e-6, "gelu": "tanh", "positions": "interleaved"},
}
# The gradients' norm is well above max_norm at every step.
TRAINING = {"steps": 10, "learning_rate": 0.01, "weight_decay": 0.1, "max_norm": 0.05}

# Ids repeat within and across sequences; 6 and 8 occur where nothing is masked and nowhere else.
TARGETS = np.array([[3, 7, 7, 1, 10, 3], [5, 5, 5, 2, 9, 4], [6, 8, 1, 3, 3, 10]])
MASK = np.array([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
TOKENS = np.where(MASK, 0, TARGETS)


def make() -> dict[str, dict[str, np.ndarray]]:
    """Compute the contents of every file, by the file's name."""
    return {name: make_one(config, seed) for seed, (name, config) in enumerate(CONFIGS.items())}


def make_one(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Compute the contents of one file."""
    model = TorchMAR(**config)
    params = draw_parameters(model, np.random.default_rng(seed))
    model.load(params)
    loss, logits = model.loss_and_logits(TOKENS, TARGETS, MASK)
    loss.backward()
    trees = {"params": params, "gradients": model.gradients()}
    for name in ("adam", "adamw", "clipped"):
        trees[name] = train(model, params, name)
    return {
        "config": json_bytes(config | {"dropout": 0.0}),
        "training": json_bytes(TRAINING),
        "tokens": TOKENS,
        "targets": TARGETS,
        "mask": MASK,
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
    } | {f"{tree}/{name}": leaf for tree, leaves in trees.items() for name, leaf in leaves.items()}


def draw_parameters(model: TorchMAR, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw parameters that are all different from the initial ones, with lively activations."""

    def draw(name, shape):
        noise = rng.normal(size=shape)
        if name.endswith(".kernel"):
            return noise / np.sqrt(shape[0])
        if name.endswith(".scale"):
            return 1.0 + 0.2 * noise
        return noise if name.endswith(".table") else 0.3 * noise

    return {name: draw(name, tuple(view.shape)) for name, view in model.views().items()}


def train(model: TorchMAR, params: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Take the steps on the one batch, with "adam", "adamw" or "clipped"; return parameters."""
    model.load(params)
    rate = TRAINING["learning_rate"]
    if kind == "adamw":
        weight_decay = TRAINING["weight_decay"]
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay)
    else:
        optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(TRAINING["steps"]):
        optimiser.zero_grad()
        model.loss_and_logits(TOKENS, TARGETS, MASK)[0].backward()
        model.hold_key_biases()
        if kind == "clipped":
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["max_norm"])
            if norm < 2 * TRAINING["max_norm"]:
                raise RuntimeError(f"max_norm does not clip: the norm is {norm}")
        optimiser.step()
    return model.read()


def json_bytes(value: dict) -> np.ndarray:
    """Encode a dict as JSON in a uint8 array."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def main() -> None:
    """Write the files."""
    GOLDEN.mkdir(exist_ok=True)
    for name, arrays in make().items():
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
