"""A backbone and a head as one model: its loss, its gradients, its samples."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks, masking, schedules
from marref.continuous import tokens
from marref.continuous.loss import masked_by
from marref.continuous.model import ContinuousMAR, num_masked
from marref.continuous.variants.causal import CausalMAR
from marref.continuous.variants.heads import Head
from marref.trees import Array, Tree

ORDERS = ("random", "raster")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A backbone and a head.

    Parameters
    ----------
    backbone : ContinuousMAR or CausalMAR
        Without its dropout.
    head : Head
    order : {"random", "raster"}
        In which tokens are learnt and generated.
    """

    backbone: ContinuousMAR | CausalMAR
    head: Head
    order: str = "random"

    def __post_init__(self) -> None:
        checks.choice("order", self.order, ORDERS)
        if self.head.token_dim != self.backbone.token_dim:
            raise ValueError(
                f"head: token_dim {self.head.token_dim}, expected {self.backbone.token_dim} as of "
                "the backbone"
            )

    def init(self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float64) -> Tree:
        """Draw the parameters of the backbone, and ``head``."""
        params = self.backbone.init(rng, dtype)
        params.pop("diffusion", None)
        return {**params, "head": self.head.init(rng, self.backbone.decoder_dim, dtype)}

    def draw(
        self, rng: np.random.Generator, batch_size: int, mask_schedule: str = "truncated-normal"
    ) -> Tree:
        """Draw everything that is random in a step.

        Returns
        -------
        dict
            ``orders``, ``num_masked`` (all of a causal model) and ``label_dropped`` as of
            `ContinuousMAR.draw`, and ``head``.
        """
        count = length = self.backbone.length
        if isinstance(self.backbone, ContinuousMAR):
            count = num_masked(length, masking.sample_mask_ratio(rng, mask_schedule))
        return {
            "orders": self._orders(rng, batch_size),
            "num_masked": count,
            "label_dropped": rng.random(batch_size) < self.backbone.label_drop,
            "head": self.head.draw(rng, batch_size * count),
        }

    def loss_and_grads(
        self, params: Tree, images: npt.ArrayLike, labels: npt.ArrayLike | None, draws: Tree
    ) -> tuple[Any, Tree]:
        """Compute the head's loss over the tokens that are masked, and all gradients.

        Parameters
        ----------
        params : dict
        images, labels : arrays
            As of `marref.continuous.loss_and_grads`.
        draws : dict
            From `draw`.
        """
        images = self.backbone.check_images(images)
        labels = self.backbone.check_labels(labels, len(images))
        labels = np.where(draws["label_dropped"], self.backbone.num_classes or 0, labels)
        clean = tokens.from_images(images, self.backbone.patch_size)
        clean = clean.astype(params["token_norm"]["scale"].dtype)
        masked = masked_by(draws["orders"], draws["num_masked"])
        of_backbone = {name: of for name, of in params.items() if name != "head"}
        z, cache = self._conditions(of_backbone, clean, labels, draws["orders"], masked)
        value, drows, of_head = self.head.loss_and_grads(
            params["head"], z[masked], clean[masked], draws["head"]
        )
        dz = np.zeros_like(z)
        dz[masked] = drows
        grads = self.backbone.backward(of_backbone, dz, cache)
        return value, {**grads, "head": of_head}

    def sample(
        self,
        params: Tree,
        labels: npt.ArrayLike | None,
        rng: np.random.Generator,
        *,
        batch_size: int = 1,
        num_steps: int | None = None,
    ) -> Array:
        """Generate images; see `marref.continuous.sample`.

        Parameters
        ----------
        params : dict
        labels : integer array [batch], optional
        rng : numpy.random.Generator
        batch_size : int
            Without labels.
        num_steps : int, optional
            ``None``: a token a step, as a causal model takes always.

        Returns
        -------
        array [batch, channels, image_size, image_size]
        """
        backbone = self.backbone
        length = backbone.length
        if isinstance(backbone, CausalMAR) and num_steps not in (None, length):
            raise ValueError(f"num_steps: received {num_steps}, expected {length} as causal")
        batch = batch_size if labels is None else len(np.asarray(labels))
        classes = backbone.check_labels(labels, batch)
        orders = self._orders(rng, batch)
        dtype = params["token_norm"]["scale"].dtype
        found = np.zeros((batch, length, backbone.token_dim), dtype)
        left = length
        for count in schedules.cosine(length, num_steps or length):
            before, left = masked_by(orders, left), left - int(count)
            now = before & ~masked_by(orders, left)
            z, _ = self._conditions(params, found, classes, orders, before)
            found[now] = self.head.sample(params["head"], z[now], rng)
        return tokens.to_images(found, backbone.patch_size, backbone.channels, backbone.image_size)

    def _conditions(
        self, params: Tree, clean: Array, labels: Array, orders: Array, masked: Array
    ) -> tuple[Array, Tree]:
        """Compute z of every token; orders are used up from their end, where causal ones begin."""
        if isinstance(self.backbone, CausalMAR):
            return self.backbone.forward(params, clean, labels, orders[:, ::-1])
        return self.backbone.forward(params, clean, labels, masked)

    def _orders(self, rng: np.random.Generator, batch: int) -> Array:
        """Draw orders [batch, length], or repeat that of the raster, both read from their end."""
        raster = np.tile(np.arange(self.backbone.length)[::-1], (batch, 1))
        return rng.permuted(raster, axis=1) if self.order == "random" else raster
