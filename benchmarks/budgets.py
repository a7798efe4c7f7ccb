"""Measure how close PyTorch comes to the budgets of ``marref compare``.

    python -m benchmarks.budgets [NUM_MODELS]

Draws random models, runs them in stock PyTorch in float64, float32 and bfloat16, and prints for
each the largest difference over its budget, and how many arrays went over.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import marref
from marref import trees
from marref.verify import golden
from marref.verify.comparison import Golden, compare
from tests.torch_mar import TorchMAR

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def random_model(seed: int) -> marref.MAR:
    """Draw a small model."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    return marref.build(
        vocab_size=int(rng.integers(4, 20)),
        embed_dim=heads * int(rng.choice([2, 4, 8, 16])),
        num_layers=int(rng.integers(1, 4)),
        num_heads=heads,
        seq_len=int(rng.integers(2, 17)),
        dropout=0.0,
        gelu=str(rng.choice(["erf", "tanh"])),
        positions=str(rng.choice(["concatenated", "interleaved"])),
    )


def run_torch(golden_vectors: Golden, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Residual stream, logits, loss and gradients of PyTorch, by golden names."""
    model = golden_vectors.model
    module = TorchMAR(
        vocab_size=model.vocab_size,
        embed_dim=model.embed_dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        seq_len=model.seq_len,
        layer_norm_epsilon=model.layer_norm_epsilon,
        gelu=model.gelu,
        positions=model.positions,
    )
    module.load(trees.flatten(golden_vectors.params))
    module.to(dtype)
    arrays: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(_module, _inputs, output):
            arrays[f"activations/{name}"] = output.detach().double().numpy()

        return hook

    for index, block in enumerate(module.blocks):
        block.register_forward_hook(keep(f"blocks.{index}.output"))
        block.norm1.register_forward_hook(keep(f"blocks.{index}.attention_norm"))
        block.norm2.register_forward_hook(keep(f"blocks.{index}.feed_forward_norm"))
        block.linear1.register_forward_hook(keep(f"blocks.{index}.feed_forward.up"))
        block.linear2.register_forward_hook(keep(f"blocks.{index}.feed_forward.down"))
    module.final_norm.register_forward_hook(keep("final_norm"))
    tokens, targets, mask = (
        torch.from_numpy(golden_vectors.batch[name]) for name in ("tokens", "targets", "mask")
    )
    logits = module(tokens)
    loss = F.cross_entropy(logits[mask == 1], targets[mask == 1])
    loss.backward()
    arrays["activations/logits"] = logits.detach().double().numpy()
    arrays["loss"] = loss.detach().double().numpy()
    gradients = module.views(lambda parameter: parameter.grad)
    return arrays | {
        f"gradients/{name}": gradient.double().numpy() for name, gradient in gradients.items()
    }


def main() -> None:
    """Measure and print."""
    num_models = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for precision, dtype in DTYPES.items():
        worst, name, flagged, compared = 0.0, "", 0, 0
        for seed in range(num_models):
            vectors = Golden(*golden.make(random_model(seed), seed))
            comparison = compare(vectors, run_torch(vectors, dtype), precision)
            for row in comparison.rows:
                compared += 1
                if row.verdict == "DIFFERS":
                    flagged += 1
                    print(f"{precision}: model {seed}: {row}", flush=True)
                ratio = row.difference / row.budget if row.budget else 0.0
                if ratio > worst:
                    worst, name = ratio, f"{row.name} of model {seed}"
        print(
            f"{precision}: {flagged} of {compared} arrays flagged; "
            f"largest difference over budget {worst:.2f} ({name})",
            flush=True,
        )


if __name__ == "__main__":
    main()
