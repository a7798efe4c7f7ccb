"""The hyper-parameters of a model: their ranges, and the parameters and tokens that fit them.

Nothing is computed here; the model is in `marref.model`.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, positions, trees
from marref.layers import gelu
from marref.trees import Array, Tree


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The hyper-parameters of a `marref.model.MAR`.

    Parameters
    ----------
    vocab_size : int
        Number of token ids, [MASK] included; at least 2.
    embed_dim : int
        Features per position; even, and divisible by ``num_heads``.
    num_layers, num_heads : int
    seq_len : int
        The longest sequence; shorter ones work too.
    dropout : float
        Probability of dropping a feature in training, in [0, 1).
    layer_norm_epsilon : float
        Added to the variance, inside the root.  1e-5 is the default of PyTorch and Axon (Flax's
        is 1e-6).
    gelu : {"erf", "tanh"}
        Exact, or the approximation; see `marref.layers.gelu`.
    positions : {"concatenated", "interleaved"}
        The kind of sinusoidal table; see `marref.positions`.
    num_classes : int, optional
        How many classes sequences have; ``None``: none, and no parameters for them.  See
        `marref.layers.class_embedding`.

    Raises
    ------
    TypeError, ValueError
        A hyper-parameter is of another type or outside its range.

    Notes
    -----
    Sizes and dropout have the defaults of the MAR specification.
    """

    vocab_size: int
    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    seq_len: int = 256
    dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    gelu: str = "erf"
    positions: str = "concatenated"
    num_classes: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"vocab_size": checks.integer("vocab_size", self.vocab_size, 2)}
        for name in ("embed_dim", "num_layers", "num_heads", "seq_len"):
            checked[name] = checks.integer(name, getattr(self, name), 1)
        checked["dropout"] = checks.real("dropout", self.dropout, "[0, 1)")
        checked["layer_norm_epsilon"] = checks.real(
            "layer_norm_epsilon", self.layer_norm_epsilon, "(0, inf)"
        )
        checks.choice("gelu", self.gelu, gelu.KINDS)
        checks.choice("positions", self.positions, positions.KINDS)
        checks.even("embed_dim", self.embed_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: received {self.embed_dim}, "
                f"expected a multiple of num_heads = {self.num_heads}"
            )
        if self.num_classes is not None:
            checked["num_classes"] = checks.integer("num_classes", self.num_classes, 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        """Return the hyper-parameters by name; ``num_classes`` only where there are classes."""
        found = dataclasses.asdict(self)
        if self.num_classes is None:
            del found["num_classes"]
        return found

    @functools.cached_property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every parameter, by dotted name."""
        features, hidden = self.embed_dim, 4 * self.embed_dim

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            return {f"{name}.scale": (features,), f"{name}.bias": (features,)}

        def projection(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
            return {f"{name}.kernel": (inputs, outputs), f"{name}.bias": (outputs,)}

        shapes: dict[str, tuple[int, ...]] = {"embedding.table": (self.vocab_size, features)}
        for index in range(self.num_layers):
            prefix = f"blocks.{index}"
            shapes |= norm(f"{prefix}.attention_norm")
            for name in ("query", "key", "value", "output"):
                shapes |= projection(f"{prefix}.attention.{name}", features, features)
            shapes |= norm(f"{prefix}.feed_forward_norm")
            shapes |= projection(f"{prefix}.feed_forward.up", features, hidden)
            shapes |= projection(f"{prefix}.feed_forward.down", hidden, features)
        shapes |= norm("final_norm") | projection("head", features, self.vocab_size)
        if self.num_classes is not None:
            shapes["class_embedding.table"] = (self.num_classes + 1, features)
        return types.MappingProxyType(shapes)

    def check_inputs(self, params: Tree, tokens: npt.ArrayLike) -> Array:
        """Raise unless parameters and tokens fit the model; return the tokens as an array."""
        trees.check_like("params", params, self.parameter_shapes)
        tokens = checks.token_ids("tokens", tokens, self.vocab_size)
        if 0 in tokens.shape or tokens.shape[1] > self.seq_len:
            raise ValueError(
                f"tokens: shape {list(tokens.shape)}, expected [batch, length] "
                f"with batch >= 1 and length in [1, seq_len = {self.seq_len}]"
            )
        return tokens

    def check_labels(self, labels: npt.ArrayLike | None, batch_size: int) -> Array | None:
        """Raise unless labels fit the model and the batch.

        Parameters
        ----------
        labels : integer array [batch], or None
            In [0, num_classes]; num_classes is "no class", which ``None`` stands for in all
            sequences.
        batch_size : int

        Returns
        -------
        integer array [batch], or None
            ``None`` where the model has no classes.
        """
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels: received for a model without classes, expected None")
            return None
        if labels is None:
            return np.full(batch_size, self.num_classes)
        labels = checks.labels("labels", labels, self.num_classes)
        checks.shape("labels", labels, (batch_size,))
        return labels
