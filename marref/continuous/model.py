"""Continuous MAR: an encoder of what is visible, a decoder of all places, a network that diffuses.

    h = token_projection(tokens)                      the visible ones
    h = [class vector, S times; h] + encoder_positions
    h = encoder_norm(blocks(token_norm(h)))
    h = decoder_projection(h), mask_vector where a token is masked
    h = decoder_norm(blocks(h + decoder_positions))
    z = h without the first S + diffusion_positions

z is a condition for each token, from which `marref.continuous.layers.network` learns the token's
distribution.  The first S places, the buffer, have the same content and differ by position; they
let the encoder compute when little is visible.  Li et al. 2024 (arXiv 2406.11838), from whose
published code every choice is.  Parameters are a tree (`marref.trees`):

    class_embedding.table                           [num_classes + 1, encoder_dim]; last: no class
    token_projection.{kernel, bias}                 [token_dim, encoder_dim]
    encoder_positions.table                         [buffer_size + length, encoder_dim]
    token_norm.{scale, bias}
    encoder_blocks.<i>.…                            see `marref.continuous.layers.block`
    encoder_norm.{scale, bias}
    decoder_projection.{kernel, bias}               [encoder_dim, decoder_dim]
    mask_vector                                     [decoder_dim]
    decoder_positions.table                         [buffer_size + length, decoder_dim]
    decoder_blocks.<i>.…
    decoder_norm.{scale, bias}
    diffusion_positions.table                       [length, decoder_dim]
    diffusion.…                                     see `marref.continuous.layers.network`
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, masking, trees
from marref.continuous import diffusion
from marref.continuous.hyperparameters import Hyperparameters
from marref.continuous.layers import block, network, positions, xavier
from marref.layers import layer_norm, linear
from marref.trees import Array, Tree

_STD = 0.02
TOKEN_NORM_EPSILON = 1e-6


class ContinuousMAR(Hyperparameters):
    """A model: hyper-parameters, and the functions that compute with them.

    Parameters, defaults and errors are those of
    `marref.continuous.hyperparameters.Hyperparameters`.
    """

    def init(self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float64) -> Tree:
        """Draw parameters.

        Tables and the mask vector come from N(0, 0.02²), linear layers as Glorot and Bengio 2010
        propose, and the diffusion network so that it returns 0 at first.

        Parameters
        ----------
        rng : numpy.random.Generator
        dtype : float32, float64 or complex128

        Returns
        -------
        dict
            The tree shown at the head of this module.
        """
        checks.generator("rng", rng)
        dtype = trees.check_dtype("dtype", dtype)

        def table(rows: int, features: int) -> Tree:
            return {"table": rng.normal(0.0, _STD, (rows, features)).astype(dtype)}

        def blocks(num: int, features: int) -> list[Tree]:
            hidden = self.hidden(features)
            return [block.init(rng, features, hidden, dtype) for _ in range(num)]

        encoder, decoder, places = (
            self.encoder_dim,
            self.decoder_dim,
            self.buffer_size + self.length,
        )
        return {
            "class_embedding": table((self.num_classes or 0) + 1, encoder),
            "token_projection": xavier.init(rng, self.token_dim, encoder, dtype),
            "encoder_positions": table(places, encoder),
            "token_norm": layer_norm.init(encoder, dtype),
            "encoder_blocks": blocks(self.encoder_layers, encoder),
            "encoder_norm": layer_norm.init(encoder, dtype),
            "decoder_projection": xavier.init(rng, encoder, decoder, dtype),
            "mask_vector": rng.normal(0.0, _STD, decoder).astype(dtype),
            "decoder_positions": table(places, decoder),
            "decoder_blocks": blocks(self.decoder_layers, decoder),
            "decoder_norm": layer_norm.init(decoder, dtype),
            "diffusion_positions": table(self.length, decoder),
            "diffusion": network.init(
                rng, self.token_dim, decoder, self.diffusion_dim, self.diffusion_layers, dtype
            ),
        }

    @functools.cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by dotted name."""
        leaves = trees.flatten(self.init(np.random.default_rng(0), np.float32))
        return {name: leaf.shape for name, leaf in leaves.items()}

    def draw(
        self,
        rng: np.random.Generator,
        batch_size: int,
        *,
        mask_schedule: str = "truncated-normal",
    ) -> Tree:
        """Draw everything that is random in a training step.

        Masked are the first M = ceil(length·r) of each sequence's order, with one r for the batch.

        Parameters
        ----------
        rng : numpy.random.Generator
        batch_size : int
        mask_schedule : str
            Of r, see `marref.masking`; by default N(1, 0.25²) cut to [0.7, 1], as published.

        Returns
        -------
        dict
            ``orders`` int64 [batch, length], permutations; ``num_masked`` int; ``label_dropped``
            bool [batch]; with R = diffusion_batch_mul·batch·length rows, one copy of the batch
            after the other, ``timesteps`` int64 [R] and ``noise`` float64 [R, token_dim]; with
            dropout ``keep``, see `draw_keep`.
        """
        checks.generator("rng", rng)
        checks.integer("batch_size", batch_size, 1)
        ratio = masking.sample_mask_ratio(rng, mask_schedule)
        num_rows = self.diffusion_batch_mul * batch_size * self.length
        draws: Tree = {
            "orders": rng.permuted(np.tile(np.arange(self.length), (batch_size, 1)), axis=1),
            "num_masked": num_masked(self.length, ratio),
            "label_dropped": rng.random(batch_size) < self.label_drop,
            "timesteps": rng.integers(diffusion.NUM_TIMESTEPS, size=num_rows),
            "noise": rng.standard_normal((num_rows, self.token_dim)),
        }
        if self.dropout > 0.0:
            draws["keep"] = self.draw_keep(rng, batch_size, draws["num_masked"])
        return draws

    def draw_keep(self, rng: np.random.Generator, batch_size: int, num_masked: int) -> Tree:
        """Draw what dropout keeps: ``encoder`` and ``decoder``, a list of blocks each."""
        places = self.buffer_size + self.length
        parts = {
            "encoder": (self.encoder_layers, places - num_masked, self.encoder_dim),
            "decoder": (self.decoder_layers, places, self.decoder_dim),
        }
        return {
            name: [
                block.draw_keep(
                    rng,
                    (batch_size, length, features),
                    self.num_heads,
                    self.hidden(features),
                    self.dropout,
                )
                for _ in range(num)
            ]
            for name, (num, length, features) in parts.items()
        }

    def forward(
        self, params: Tree, tokens: Array, labels: Array, masked: Array, keep: Tree | None = None
    ) -> tuple[Array, Tree]:
        """Compute the condition of every token.

        Parameters
        ----------
        params : dict
        tokens : array [batch, length, token_dim]
            What is masked is not looked at.
        labels : integer array [batch]
            In [0, num_classes], the last being no class.
        masked : bool array [batch, length]
            As many in every sequence.
        keep : dict, optional
            From `draw_keep`; without it nothing is dropped.

        Returns
        -------
        z : array [batch, length, decoder_dim]
        cache : dict
        """
        cache: Tree = {"labels": labels, "kept": self.kept(masked)}
        encoded, cache["encoder"] = self.encode(params, tokens, labels, cache["kept"], keep)
        z, cache["decoder"] = self.decode(params, encoded, cache["kept"], keep)
        return z, cache

    def backward(self, params: Tree, dz: Array, cache: Tree) -> Tree:
        """Push the gradient of z back to every parameter but those of the diffusion network.

        Returns
        -------
        dict
            Like ``params``, without ``diffusion``.
        """
        dencoded, of_decoder = self.decode_backward(params, dz, cache)
        of_encoder = self.encode_backward(params, dencoded, cache)
        grads = {**of_encoder, **of_decoder}
        return {name: grads[name] for name in params if name != "diffusion"}

    def kept(self, masked: Array) -> Array:
        """List the places that the encoder sees: the buffer, then the visible tokens in order.

        Returns
        -------
        int64 array [batch, buffer_size + visible]
            Of buffer_size + length places.
        """
        num_visible = masked.shape[1] - int(masked[0].sum())
        visible = np.argsort(masked, axis=1, kind="stable")[:, :num_visible]
        buffer = np.tile(np.arange(self.buffer_size), (len(masked), 1))
        return np.concatenate([buffer, self.buffer_size + visible], axis=1)

    def encode(
        self, params: Tree, tokens: Array, labels: Array, kept: Array, keep: Tree | None
    ) -> tuple[Array, Tree]:
        """Encode the buffer and what is visible: [batch, kept, encoder_dim]."""
        h, cache = self.embed(params, tokens, labels, kept)
        h, cache["token_norm"] = layer_norm.forward(params["token_norm"], h, TOKEN_NORM_EPSILON)
        h, cache["encoder_blocks"] = self._blocks(params["encoder_blocks"], h, keep, "encoder")
        h, cache["encoder_norm"] = layer_norm.forward(
            params["encoder_norm"], h, self.layer_norm_epsilon
        )
        return h, cache

    def encode_backward(self, params: Tree, dencoded: Array, cache: Tree) -> Tree:
        """Push ``dencoded`` back."""
        of = cache["encoder"]
        grads: Tree = {}
        dh, grads["encoder_norm"] = layer_norm.backward(
            params["encoder_norm"], dencoded, of["encoder_norm"]
        )
        dh, grads["encoder_blocks"] = blocks_backward(
            params["encoder_blocks"], dh, of["encoder_blocks"]
        )
        dkept, grads["token_norm"] = layer_norm.backward(params["token_norm"], dh, of["token_norm"])
        return {**grads, **self.embed_backward(params, dkept, of)}

    def embed(self, params: Tree, tokens: Array, labels: Array, kept: Array) -> tuple[Array, Tree]:
        """Put the class vector in the buffer and what is visible behind it, with positions.

        Returns
        -------
        h : array [batch, kept, encoder_dim]
        cache : dict
        """
        projected, of_tokens = linear.forward(params["token_projection"], tokens)
        classes = params["class_embedding"]["table"][labels][:, np.newaxis]
        buffer = np.repeat(classes, self.buffer_size, axis=1)
        h = positions.forward(
            params["encoder_positions"], np.concatenate([buffer, projected], axis=1)
        )
        rows = np.arange(len(kept))[:, np.newaxis]
        return h[rows, kept], {"token_projection": of_tokens, "labels": labels, "kept": kept}

    def embed_backward(self, params: Tree, dkept: Array, cache: Tree) -> Tree:
        """Push ``dkept`` back.

        What is not kept has no gradient.  The class vector stands in all places of the buffer, so
        its gradient is the sum over them, and over the sequences of that class.
        """
        kept = cache["kept"]
        dall = np.zeros((len(kept), self.buffer_size + self.length, self.encoder_dim), dkept.dtype)
        dall[np.arange(len(kept))[:, np.newaxis], kept] = dkept
        dall, dpositions = positions.backward(dall)
        dtable = np.zeros_like(params["class_embedding"]["table"])
        np.add.at(dtable, cache["labels"], dall[:, : self.buffer_size].sum(axis=1))
        _, dprojection = linear.backward(
            params["token_projection"], dall[:, self.buffer_size :], cache["token_projection"]
        )
        return {
            "class_embedding": {"table": dtable},
            "token_projection": dprojection,
            "encoder_positions": dpositions,
        }

    def decode(
        self, params: Tree, encoded: Array, kept: Array, keep: Tree | None
    ) -> tuple[Array, Tree]:
        """Decode all places, the mask vector where nothing was encoded."""
        cache: Tree = {}
        projected, cache["decoder_projection"] = linear.forward(
            params["decoder_projection"], encoded
        )
        h = self.fill(params, projected, kept)
        h, cache["decoder_blocks"] = self._blocks(params["decoder_blocks"], h, keep, "decoder")
        h, cache["decoder_norm"] = layer_norm.forward(
            params["decoder_norm"], h, self.layer_norm_epsilon
        )
        return positions.forward(params["diffusion_positions"], h[:, self.buffer_size :]), cache

    def decode_backward(self, params: Tree, dz: Array, cache: Tree) -> tuple[Array, Tree]:
        """Push ``dz`` back."""
        of = cache["decoder"]
        grads: Tree = {}
        dz, grads["diffusion_positions"] = positions.backward(dz)
        buffer = np.zeros((len(dz), self.buffer_size, self.decoder_dim), dz.dtype)
        dh, grads["decoder_norm"] = layer_norm.backward(
            params["decoder_norm"], np.concatenate([buffer, dz], axis=1), of["decoder_norm"]
        )
        dh, grads["decoder_blocks"] = blocks_backward(
            params["decoder_blocks"], dh, of["decoder_blocks"]
        )
        dprojected, of_places = self.fill_backward(dh, cache["kept"])
        dencoded, grads["decoder_projection"] = linear.backward(
            params["decoder_projection"], dprojected, of["decoder_projection"]
        )
        return dencoded, {**grads, **of_places}

    def fill(self, params: Tree, projected: Array, kept: Array) -> Array:
        """Put the mask vector where nothing was encoded, and add positions: [batch, places, …]."""
        shape = (len(kept), self.buffer_size + self.length, self.decoder_dim)
        h = np.broadcast_to(params["mask_vector"], shape).copy()
        h[np.arange(len(kept))[:, np.newaxis], kept] = projected
        return positions.forward(params["decoder_positions"], h)

    def fill_backward(self, dh: Array, kept: Array) -> tuple[Array, Tree]:
        """Push ``dh`` back; the mask vector's gradient is the sum over all places that have it."""
        dh, dpositions = positions.backward(dh)
        rows = np.arange(len(kept))[:, np.newaxis]
        dprojected = dh[rows, kept]
        dh = dh.copy()
        dh[rows, kept] = 0.0
        return dprojected, {"decoder_positions": dpositions, "mask_vector": dh.sum(axis=(0, 1))}

    def _blocks(
        self, params: list[Tree], h: Array, keep: Tree | None, part: str
    ) -> tuple[Array, list[Tree]]:
        return blocks_forward(
            params,
            h,
            None if keep is None else keep[part],
            num_heads=self.num_heads,
            epsilon=self.layer_norm_epsilon,
            dropout_rate=self.dropout,
        )


def blocks_forward(
    params: list[Tree], h: Array, keep: list[Tree] | None = None, **options: Any
) -> tuple[Array, list[Tree]]:
    """Run blocks, one after the other; options are those of `block.forward`."""
    keeps: Sequence[Tree | None] = keep or [None] * len(params)
    caches = []
    for of_block, of_keep in zip(params, keeps, strict=True):
        h, cache = block.forward(of_block, h, keep=of_keep, **options)
        caches.append(cache)
    return h, caches


def blocks_backward(params: list[Tree], dh: Array, caches: list[Tree]) -> tuple[Array, list[Tree]]:
    """Push ``dh`` back through blocks, the last first."""
    last_first = []
    for of_block, cache in zip(reversed(params), reversed(caches), strict=True):
        dh, grads = block.backward(of_block, dh, cache)
        last_first.append(grads)
    return dh, last_first[::-1]


def num_masked(length: int, ratio: float) -> int:
    """Count the masked tokens: ceil(length·ratio), at least one."""
    return int(np.clip(np.ceil(length * ratio), 1, length))


def check_model(model: Any) -> None:
    """Raise TypeError unless ``model`` is a ContinuousMAR."""
    if not isinstance(model, ContinuousMAR):
        raise TypeError(
            f"model: received {type(model).__name__}, expected what continuous.build returns"
        )
