"""MAR: embedding, bidirectional pre-norm transformer, head.

    x = embedding(tokens)
    x = class_embedding(x, labels)        where the model has classes
    x = dropout(x)
    x = block(x)                          num_layers times
    logits = linear(layer_norm(x))        the head

This is the definition, written to be read; `marref.fast` computes the same sooner.  `MAR` holds
the hyper-parameters and owns no arrays; parameters are a tree (`marref.trees`):

    embedding.table                                            [vocab_size, embed_dim]
    blocks.<i>.attention_norm.{scale, bias}                    [embed_dim]
    blocks.<i>.attention.{query, key, value, output}.{kernel, bias}
    blocks.<i>.feed_forward_norm.{scale, bias}                 [embed_dim]
    blocks.<i>.feed_forward.{up, down}.{kernel, bias}
    final_norm.{scale, bias}                                   [embed_dim]
    head.{kernel, bias}                                        [embed_dim, vocab_size], [vocab_size]
    class_embedding.table                                      [num_classes + 1, embed_dim]

The last is there where the model has classes.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, loss, trees
from marref.hyperparameters import Hyperparameters
from marref.layers import block, class_embedding, dropout, embedding, layer_norm, linear
from marref.trees import Array, Tree


@dataclasses.dataclass(frozen=True)
class MAR(Hyperparameters):
    """A model: hyper-parameters, and the functions that compute with them.

    Parameters, defaults and errors are those of `marref.hyperparameters.Hyperparameters`:
    ``vocab_size``, ``embed_dim``, ``num_layers``, ``num_heads``, ``seq_len``, ``dropout``,
    ``layer_norm_epsilon``, ``gelu``, ``positions`` and ``num_classes``.
    """

    def init(
        self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float64, *, std: float = 0.02
    ) -> Tree:
        """Draw parameters.

        Kernels and the embedding tables come from N(0, std²), the kernels that write to the
        residual stream from N(0, std²/(2·num_layers)) (see `marref.layers.block.init`); biases
        are 0, norm scales 1.

        Parameters
        ----------
        rng : numpy.random.Generator
            The same seed gives the same numbers in every dtype, up to their rounding.  The table
            of the classes is drawn last: a model without has the same other parameters.
        dtype : float32, float64 or complex128
        std : float
            Positive.  The default is that of GPT-2 (published code), which is at least 768 wide.
            In a narrow model it makes queries and keys so small that attention is uniform at
            first; the demo draws with 1/sqrt(embed_dim).

        Returns
        -------
        dict
            The tree shown at the head of this module.
        """
        checks.generator("rng", rng)
        dtype = trees.check_dtype("dtype", dtype)
        std = checks.real("std", std, "(0, inf)")
        params = {
            "embedding": embedding.init(rng, self.vocab_size, self.embed_dim, std, dtype),
            "blocks": [
                block.init(rng, self.embed_dim, self.num_layers, std, dtype)
                for _ in range(self.num_layers)
            ],
            "final_norm": layer_norm.init(self.embed_dim, dtype),
            "head": linear.init(rng, self.embed_dim, self.vocab_size, std, dtype),
        }
        if self.num_classes is not None:
            params["class_embedding"] = class_embedding.init(
                rng, self.num_classes, self.embed_dim, std, dtype
            )
        return params

    def forward(
        self,
        params: Tree,
        tokens: npt.ArrayLike,
        rng: np.random.Generator | None = None,
        labels: npt.ArrayLike | None = None,
    ) -> tuple[Array, Tree]:
        """Compute the logits, and keep what the backward needs.

        Parameters
        ----------
        params : dict
            From `init`.  Everything is computed in their dtype.
        tokens : integer array [batch, length]
            length <= seq_len; ids in [0, vocab_size).
        rng : numpy.random.Generator, optional
            Given: dropout is on (training).
        labels : integer array [batch], optional
            The class of every sequence, in [0, num_classes]; num_classes is "no class", as all are
            without it.

        Returns
        -------
        logits : array [batch, length, vocab_size]
        cache : dict
            The activations, a tree; `marref.verify.trace` gives them names in their order.

        Raises
        ------
        TypeError, ValueError
            Parameters, tokens, rng or labels do not fit the model; the message says which and how.
        """
        tokens = self.check_inputs(params, tokens)
        labels = self.check_labels(labels, len(tokens))
        keep = self.draw_keep(rng, tokens.shape)
        cache: Tree = {}
        x, cache["embedding"] = embedding.forward(params["embedding"], tokens, self.positions)
        if labels is not None:
            x, cache["class_embedding"] = class_embedding.forward(
                params["class_embedding"], x, labels
            )
        x, cache["embedding_dropout"] = dropout.forward(x, keep["embedding"], self.dropout)
        cache["blocks"] = []
        for block_params, block_keep in zip(params["blocks"], keep["blocks"], strict=True):
            x, block_cache = block.forward(
                block_params,
                x,
                num_heads=self.num_heads,
                gelu=self.gelu,
                epsilon=self.layer_norm_epsilon,
                keep=block_keep,
                dropout_rate=self.dropout,
            )
            cache["blocks"].append(block_cache)
        logits, head_cache = head_forward(params, x, self.layer_norm_epsilon)
        return logits, {**cache, **head_cache, "logits": logits}

    def backward(self, params: Tree, dlogits: npt.ArrayLike, cache: Tree) -> Tree:
        """Push the gradient of the logits back to every parameter.

        Parameters
        ----------
        params : dict
            Those that `forward` was called with.
        dlogits : array [batch, length, vocab_size]
            Gradient of the loss with respect to the logits.
        cache : dict
            From `forward`.

        Returns
        -------
        dict
            The gradients, a tree like ``params``.

        Raises
        ------
        TypeError, ValueError
            ``params``, ``dlogits`` or ``cache`` do not fit, or the dtypes differ.
        """
        dtype = trees.check_like("params", params, self.parameter_shapes)
        if not isinstance(cache, dict) or len(cache.get("blocks", ())) != self.num_layers:
            raise ValueError("cache: expected what this model's forward returned")
        dlogits = checks.array("dlogits", dlogits)
        checks.shape("dlogits", dlogits, cache["logits"].shape)
        if dlogits.dtype != dtype:
            raise TypeError(f"dlogits: dtype {dlogits.dtype}, expected {dtype} as in params")
        dx, head_grads = head_backward(params, dlogits, cache)
        last_first = []
        for block_params, block_cache in zip(
            reversed(params["blocks"]), reversed(cache["blocks"]), strict=True
        ):
            dx, block_grads = block.backward(block_params, dx, block_cache)
            last_first.append(block_grads)
        dx = dropout.backward(dx, cache["embedding_dropout"])
        class_grads = {}
        if self.num_classes is not None:
            dx, class_grads["class_embedding"] = class_embedding.backward(
                params["class_embedding"], dx, cache["class_embedding"]
            )
        grads = {"embedding": embedding.backward(params["embedding"], dx, cache["embedding"])}
        return {**grads, "blocks": last_first[::-1], **head_grads, **class_grads}

    def __call__(
        self, params: Tree, tokens: npt.ArrayLike, labels: npt.ArrayLike | None = None
    ) -> Array:
        """Return the logits [batch, length, vocab_size] alone; see `forward`."""
        return self.forward(params, tokens, labels=labels)[0]

    def draw_keep(self, rng: np.random.Generator | None, shape: tuple[int, ...]) -> Tree:
        """Draw which features dropout keeps in one forward pass.

        Parameters
        ----------
        rng : numpy.random.Generator or None
            ``None`` turns dropout off.
        shape : tuple of int
            [batch, length] of the tokens.

        Returns
        -------
        dict
            ``embedding``, and for each of ``blocks`` ``attention`` and ``feed_forward``: boolean
            arrays [batch, length, embed_dim], or ``None`` where nothing is dropped.

        Raises
        ------
        TypeError
            ``rng`` is no generator.
        """
        if rng is not None:
            checks.generator("rng", rng)
        shape = (*shape, self.embed_dim)
        return {
            "embedding": dropout.draw(rng, shape, self.dropout),
            "blocks": [block.draw_keep(rng, shape, self.dropout) for _ in range(self.num_layers)],
        }


build = MAR


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a MAR."""
    if not isinstance(model, MAR):
        raise TypeError(f"model: received {type(model).__name__}, expected a marref.MAR")


def loss_and_grads(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    mask: npt.ArrayLike,
    rng: np.random.Generator | None = None,
    *,
    label_smoothing: float = 0.0,
    labels: npt.ArrayLike | None = None,
) -> tuple[np.inexact, Tree]:
    """Run the model and the loss forward, and both backward.

    Parameters
    ----------
    model : MAR
    params : dict
    tokens, targets : integer arrays [batch, length]
        The inputs, with [MASK] where masked, and the true ids.
    mask : array [batch, length]
        True (or 1) where a position was masked.
    rng : numpy.random.Generator, optional
        Given: dropout is on.
    label_smoothing : float
        ε in [0, 1) of the loss (1 - ε) L + ε U; see `marref.loss.uniform`.
    labels : integer array [batch], optional
        See `MAR.forward`.

    Returns
    -------
    loss : scalar
        Nats per masked token.
    grads : dict
        A tree like ``params``.
    """
    check_model(model)
    checks.real("label_smoothing", label_smoothing, "[0, 1)")
    logits, cache = model.forward(params, tokens, rng, labels)
    value, loss_cache = loss.forward(logits, targets, mask)
    dlogits = loss.backward(loss_cache)
    if label_smoothing > 0.0:
        uniform, duniform = loss.uniform(loss_cache)
        value = (1.0 - label_smoothing) * value + label_smoothing * uniform
        dlogits = (1.0 - label_smoothing) * dlogits + label_smoothing * duniform
    return value, model.backward(params, dlogits, cache)


def head_forward(params: Tree, x: Array, epsilon: float) -> tuple[Array, Tree]:
    """Run the final norm and the head: x [batch, length, embed_dim] -> logits."""
    cache: Tree = {}
    x, cache["final_norm"] = layer_norm.forward(params["final_norm"], x, epsilon)
    logits, cache["head"] = linear.forward(params["head"], x)
    return logits, cache


def head_backward(params: Tree, dlogits: Array, cache: Tree) -> tuple[Array, Tree]:
    """Push ``dlogits`` back to the head's input and parameters."""
    dx, dhead = linear.backward(params["head"], dlogits, cache["head"])
    dx, dnorm = layer_norm.backward(params["final_norm"], dx, cache["final_norm"])
    return dx, {"final_norm": dnorm, "head": dhead}
