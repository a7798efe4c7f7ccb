"""A causal backbone: each token's condition is computed from the tokens before it in an order.

    h_p = class vector                          p < S, the buffer
    h_{S+i} = token_projection(x_{o_i})         the i-th token of the order o
    h = token_norm(h + positions + targets)     targets[o_{i+1}] where token o_{i+1} comes next
    h = norm(blocks(h)), each place attending to itself and the places before it
    z_{o_i} = h_{S+i-1} + diffusion_positions[o_i]

In raster order o = 0, 1, … this is a language model's next-token prediction, with all conditions of
a sequence from one pass (teacher forcing).  In a random order a place must also be told which token
comes next: `targets` is a table of positions for that.  The paper has both without a formula; its
authors say that the causal model has the hyper-parameters of the other (LTH14/mar, issues 39, 72).
Here all blocks are of the encoder's width.
"""

import numpy as np
import numpy.typing as npt

from marref import checks, trees
from marref.continuous.hyperparameters import Hyperparameters
from marref.continuous.layers import block, positions, xavier
from marref.continuous.model import TOKEN_NORM_EPSILON, blocks_backward, blocks_forward
from marref.layers import layer_norm, linear
from marref.trees import Array, Tree

_STD = 0.02


class CausalMAR(Hyperparameters):
    """A causal transformer of encoder_layers + decoder_layers blocks; see the head of this module.

    Parameters, defaults and errors are those of
    `marref.continuous.hyperparameters.Hyperparameters`; encoder_dim must be decoder_dim.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_dim != self.decoder_dim:
            raise ValueError(
                f"decoder_dim: received {self.decoder_dim}, expected {self.encoder_dim}, the "
                "encoder's, as a causal model has one width"
            )

    def init(self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float64) -> Tree:
        """Draw parameters as `ContinuousMAR.init` does."""
        checks.generator("rng", rng)
        dtype, width = trees.check_dtype("dtype", dtype), self.encoder_dim

        def table(rows: int) -> Tree:
            return {"table": rng.normal(0.0, _STD, (rows, width)).astype(dtype)}

        return {
            "class_embedding": table((self.num_classes or 0) + 1),
            "token_projection": xavier.init(rng, self.token_dim, width, dtype),
            "positions": table(self.buffer_size + self.length),
            "targets": table(self.length),
            "token_norm": layer_norm.init(width, dtype),
            "blocks": [
                block.init(rng, width, self.hidden(width), dtype)
                for _ in range(self.encoder_layers + self.decoder_layers)
            ],
            "norm": layer_norm.init(width, dtype),
            "diffusion_positions": table(self.length),
        }

    def forward(
        self, params: Tree, tokens: Array, labels: Array, orders: Array
    ) -> tuple[Array, Tree]:
        """Compute the condition of every token.

        Parameters
        ----------
        params : dict
        tokens : array [batch, length, token_dim]
            Of each its own condition does not depend on, nor those before it in the order.
        labels : integer array [batch]
        orders : integer array [batch, length]
            Permutations.

        Returns
        -------
        z : array [batch, length, encoder_dim]
            By position, not by the order.
        cache : dict
        """
        size, rows = self.buffer_size, np.arange(len(orders))[:, np.newaxis]
        cache: Tree = {"labels": labels, "orders": orders}
        before = tokens[rows, orders[:, :-1]]
        projected, cache["token_projection"] = linear.forward(params["token_projection"], before)
        classes = params["class_embedding"]["table"][labels][:, np.newaxis]
        h = np.concatenate([np.repeat(classes, size, axis=1), projected], axis=1)
        h += params["positions"]["table"][self._places(orders)]
        h[:, size - 1 :] += params["targets"]["table"][orders]
        h, cache["token_norm"] = layer_norm.forward(params["token_norm"], h, TOKEN_NORM_EPSILON)
        h, cache["blocks"] = blocks_forward(
            params["blocks"],
            h,
            num_heads=self.num_heads,
            epsilon=self.layer_norm_epsilon,
            visible=np.tri(h.shape[1], dtype=np.bool_),
        )
        h, cache["norm"] = layer_norm.forward(params["norm"], h, self.layer_norm_epsilon)
        z = np.empty_like(h[:, size - 1 :])
        z[rows, orders] = h[:, size - 1 :]
        return positions.forward(params["diffusion_positions"], z), cache

    def backward(self, params: Tree, dz: Array, cache: Tree) -> Tree:
        """Push the gradient of z back: `forward` read from bottom to top.

        Returns
        -------
        dict
            Like ``params``.
        """
        size, orders = self.buffer_size, cache["orders"]
        rows = np.arange(len(orders))[:, np.newaxis]
        grads: Tree = {}
        dz, grads["diffusion_positions"] = positions.backward(dz)
        dh = np.zeros((len(dz), size - 1 + self.length, self.encoder_dim), dz.dtype)
        dh[:, size - 1 :] = dz[rows, orders]
        dh, grads["norm"] = layer_norm.backward(params["norm"], dh, cache["norm"])
        dh, grads["blocks"] = blocks_backward(params["blocks"], dh, cache["blocks"])
        dh, grads["token_norm"] = layer_norm.backward(params["token_norm"], dh, cache["token_norm"])
        for name, index, part in (
            ("positions", self._places(orders), dh),
            ("targets", orders, dh[:, size - 1 :]),
            ("class_embedding", cache["labels"], dh[:, :size].sum(axis=1)),
        ):
            table = np.zeros_like(params[name]["table"])
            np.add.at(table, index, part)
            grads[name] = {"table": table}
        _, grads["token_projection"] = linear.backward(
            params["token_projection"], dh[:, size:], cache["token_projection"]
        )
        return {name: grads[name] for name in params}

    def _places(self, orders: Array) -> Array:
        """List the rows of the table of positions: the buffer, then all tokens but the last."""
        buffer = np.tile(np.arange(self.buffer_size), (len(orders), 1))
        return np.concatenate([buffer, self.buffer_size + orders[:, :-1]], axis=1)
