"""MAR from stock PyTorch modules: a witness that shares no code with marref.

Everything is float64.  Parameters and gradients are read and written by marref's dotted names;
two layouts differ and are undone here: PyTorch's linear weights are [out, in], and its attention
keeps the query, key and value projections in one array, in that order.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Arrays this small gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

GELU = {"erf": "gelu", "tanh": functools.partial(F.gelu, approximate="tanh")}


class TorchMAR(nn.Module):
    """The model; its arguments are those of `marref.build` but for dropout, which is off."""

    def __init__(
        self,
        *,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        seq_len: int,
        layer_norm_epsilon: float,
        gelu: str,
        positions: str,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, embed_dim)
        self.register_buffer("positions", sinusoidal_table(seq_len, embed_dim, positions))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                embed_dim,
                num_heads,
                dim_feedforward=4 * embed_dim,
                dropout=0.0,
                activation=GELU[gelu],
                layer_norm_eps=layer_norm_epsilon,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(embed_dim, eps=layer_norm_epsilon)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.double()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [batch, length], labels [batch] -> logits [batch, length, vocab_size]."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        if labels is not None:
            x = x + self.class_embedding(labels).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))

    def loss_and_logits(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        mask: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over the masked positions, of which there must be one or more."""
        tokens, targets, mask = (torch.from_numpy(array) for array in (tokens, targets, mask))
        logits = self(tokens, None if labels is None else torch.from_numpy(labels))
        return F.cross_entropy(logits[mask], targets[mask]), logits

    def views(
        self, select: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter.data
    ) -> dict[str, torch.Tensor]:
        """By marref's names, views in its layout of what ``select`` takes from each parameter."""

        def norm(name, module):
            return {f"{name}.scale": select(module.weight), f"{name}.bias": select(module.bias)}

        def linear(name, module):
            return {f"{name}.kernel": select(module.weight).T, f"{name}.bias": select(module.bias)}

        views = {"embedding.table": select(self.embedding.weight)}
        if hasattr(self, "class_embedding"):
            views["class_embedding.table"] = select(self.class_embedding.weight)
        for index, block in enumerate(self.blocks):
            prefix, attention = f"blocks.{index}", block.self_attn
            views |= norm(f"{prefix}.attention_norm", block.norm1)
            kernels = select(attention.in_proj_weight).chunk(3)
            biases = select(attention.in_proj_bias).chunk(3)
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
                views[f"{prefix}.attention.{name}.kernel"] = kernel.T
                views[f"{prefix}.attention.{name}.bias"] = bias
            views |= linear(f"{prefix}.attention.output", attention.out_proj)
            views |= norm(f"{prefix}.feed_forward_norm", block.norm2)
            views |= linear(f"{prefix}.feed_forward.up", block.linear1)
            views |= linear(f"{prefix}.feed_forward.down", block.linear2)
        return views | norm("final_norm", self.final_norm) | linear("head", self.head)

    def load(self, leaves: dict[str, np.ndarray]) -> None:
        """Set every parameter; ``leaves`` is a flattened tree of marref's."""
        views = self.views()
        if set(leaves) != set(views):
            raise ValueError(f"leaves: not the parameters: {sorted(set(leaves) ^ set(views))}")
        for name, view in views.items():
            if leaves[name].shape != tuple(view.shape):
                raise ValueError(f"{name}: {leaves[name].shape}, expected {tuple(view.shape)}")
            view.copy_(torch.from_numpy(leaves[name]))

    def read(
        self, select: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter.data
    ) -> dict[str, np.ndarray]:
        """Copy what ``select`` takes from each parameter into arrays, by marref's names."""
        return {
            name: np.array(view.numpy(), order="C") for name, view in self.views(select).items()
        }

    def gradients(self) -> dict[str, np.ndarray]:
        """Copy the gradients of the last backward pass, by marref's names."""
        return self.read(lambda parameter: parameter.grad)

    def hold_key_biases(self) -> None:
        """Set the gradients of the key biases to 0, which they are but for rounding.

        A bias added to every key moves all scores of a query alike, and softmax ignores it.  Adam
        divides a gradient by its own size, and would turn that rounding into full-size steps of
        random sign, which no two programs share.
        """
        for name, gradient in self.views(lambda parameter: parameter.grad).items():
            if is_key_bias(name):
                gradient.zero_()


def is_key_bias(name: str) -> bool:
    """Whether a dotted name is that of a key bias."""
    return name.endswith(".attention.key.bias")


def sinusoidal_table(length: int, embed_dim: int, layout: str) -> torch.Tensor:
    """Position p, frequency w: sin(p w) and cos(p w), side by side or feature by feature.

    "concatenated":  [sin(p w_i) | cos(p w_i)],  w_i = 10000^(-i / max(half - 1, 1))
    "interleaved":   sin at even, cos at odd features,  w_i = 10000^(-2i / embed_dim)
    """
    half = embed_dim // 2
    i = torch.arange(half, dtype=torch.float64)
    position = torch.arange(length, dtype=torch.float64)
    table = torch.empty(length, embed_dim, dtype=torch.float64)
    if layout == "concatenated":
        angle = torch.outer(position, torch.pow(10000.0, -i / max(half - 1, 1)))
        table[:, :half], table[:, half:] = torch.sin(angle), torch.cos(angle)
    elif layout == "interleaved":
        angle = torch.outer(position, torch.pow(10000.0, -2 * i / embed_dim))
        table[:, 0::2], table[:, 1::2] = torch.sin(angle), torch.cos(angle)
    else:
        raise ValueError(f"layout: {layout!r}")
    return table
