"""The settings of a decoder, checked when they are put together."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from marref import checks
from marref.decoding.grid import halton
from marref.decoding.remasking import P2, Remask
from marref.decoding.revealing import Reveal
from marref.model import MAR
from marref.schedules import SCHEDULES, Schedule
from marref.trees import Array

ORDERS = ("confidence", "margin", "entropy", "random", "left-to-right", "halton")
GUIDANCES = ("constant", "linear")
_SCORED = ("confidence", "margin", "entropy")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a decoder does in its steps: arguments of `iterative_decode`, checked when built."""

    num_steps: int
    mask_token_id: int
    temperature: float
    schedule: str | Schedule
    order: str
    choice_temperature: float
    exclude_mask_token: bool
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance: str = "constant"
    min_p: float | None = None
    exclude_ids: Sequence[int] = ()
    score_temperature: float | None = None
    order_temperature: float = 0.0
    reveal: Reveal | None = None
    block_length: int | None = None
    remask: Remask | None = None

    def __post_init__(self) -> None:
        checks.integer("num_steps", self.num_steps, 1)
        checks.real("temperature", self.temperature, "[0, inf)")
        checks.real("choice_temperature", self.choice_temperature, "[0, inf)")
        checks.real("order_temperature", self.order_temperature, "[0, inf)")
        for name in ("top_k", "block_length"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                checks.real(name, getattr(self, name), "(0, 1]")
        if self.score_temperature is not None:
            checks.real("score_temperature", self.score_temperature, "(0, inf)")
        checks.choice("order", self.order, ORDERS)
        checks.real("guidance_scale", self.guidance_scale, "[0, inf)")
        checks.choice("guidance", self.guidance, GUIDANCES)
        if not callable(self.schedule):
            checks.choice("schedule", self.schedule, SCHEDULES)
        self._check_rules()
        self._check_noise()
        self._check_together()

    def _check_rules(self) -> None:
        for name, value in (("reveal", self.reveal), ("remask", self.remask)):
            if isinstance(value, type):
                raise TypeError(
                    f"{name}: received the class {value.__name__}, expected an instance, as "
                    f"{value.__name__}()"
                )
        if self.reveal is not None and not callable(self.reveal):
            raise TypeError(
                f"reveal: received {self.reveal!r}, expected a function of a Step, as "
                "Threshold(0.9), or None"
            )
        if self.remask is not None and not isinstance(self.remask, Remask):
            raise TypeError(
                f"remask: received {self.remask!r}, expected a Remask, as P2(), or None"
            )

    def _check_noise(self) -> None:
        for name in ("choice_temperature", "order_temperature"):
            value = getattr(self, name)
            if value > 0 and self.order not in _SCORED:
                raise ValueError(
                    f'{name}: received {value}, expected 0 with order="{self.order}", which does '
                    "not look at confidence"
                )
            if value > 0 and _order_of(self.reveal) is not None:
                raise ValueError(
                    f"{name}: received {value}, expected 0 with {self.reveal}, which reveals what "
                    "the model is sure of"
                )
        if self.choice_temperature > 0 and self.order_temperature > 0:
            raise ValueError(
                f"order_temperature: received {self.order_temperature} with choice_temperature "
                f"{self.choice_temperature}, expected one of them"
            )

    def _check_together(self) -> None:
        if self.remask is not None and self.remask.counts_itself and self.reveal is not None:
            raise ValueError(
                f"reveal: received {self.reveal}, expected None with {self.remask}, which says how "
                "many are revealed"
            )
        for name, value in (("reveal", self.reveal), ("remask", self.remask)):
            order = _order_of(value)
            if order not in (None, self.order):
                raise ValueError(
                    f'order: received "{self.order}", expected "{order}" with {name}={value}'
                )
        if self.remask is not None and self.remask.looks_again and not self.exclude_mask_token:
            raise ValueError(
                f"exclude_mask_token: received False, expected True with {self.remask}, which "
                "could not tell an emitted [MASK] from a masked position"
            )
        if isinstance(self.remask, P2) and self.order in ("left-to-right", "halton"):
            raise ValueError(
                f'order: received "{self.order}", expected one that looks at predictions, or '
                f'"random", with {self.remask}: places do not change, nothing would be taken back'
            )
        by_chance = self.remask is not None or _order_of(self.reveal) == "random"
        if self.block_length is not None and by_chance:
            raise ValueError(
                f"block_length: received {self.block_length}, expected None with "
                f"{self.remask or self.reveal}, which is defined on all positions"
            )
        if self.guidance == "linear" and not self.keeps_to_schedule:
            raise ValueError(
                'guidance: received "linear", expected "constant" with '
                f"{self.reveal or self.remask}: what will be known after a step must be known "
                "before it"
            )

    @property
    def keeps_to_schedule(self) -> bool:
        """Whether the schedule alone says how many are revealed."""
        return self.reveal is None and (self.remask is None or not self.remask.counts_itself)

    @property
    def asks_schedule(self) -> bool:
        """Whether the schedule is asked at all."""
        asks = self.reveal is not None and getattr(self.reveal, "asks_schedule", True)
        return self.keeps_to_schedule or asks

    @property
    def needs_rng(self) -> bool:
        """Whether something is drawn besides tokens."""
        noisy = self.choice_temperature > 0 or self.order_temperature > 0
        takes_back = self.remask is not None and self.remask.needs_rng
        return self.order == "random" or noisy or takes_back

    def check_rng(self, rng: np.random.Generator | None) -> None:
        """Raise unless there is a generator where one is needed."""
        if rng is not None:
            checks.generator("rng", rng)
        elif self.needs_rng:
            raise ValueError(
                'rng: received None, but order="random", choice_temperature, '
                "order_temperature and a remask that draws need one"
            )

    @property
    def excluded(self) -> list[int]:
        """The ids that are never emitted."""
        masks = [self.mask_token_id] if self.exclude_mask_token else []
        return sorted({*self.exclude_ids, *masks})

    def check(self, model: MAR, length: int) -> None:
        """Raise unless the excluded ids leave one, and the order is one of so many positions."""
        ids = checks.array("exclude_ids", self.exclude_ids)
        if ids.ndim != 1 or (ids.size > 0 and ids.dtype.kind not in "iu"):
            raise TypeError(
                f"exclude_ids: received {self.exclude_ids!r}, expected a sequence of integers"
            )
        checks.token_ids("exclude_ids", ids.astype(np.int64), model.vocab_size, batched=False)
        if len(self.excluded) == model.vocab_size:
            raise ValueError(
                f"exclude_ids: received {list(self.exclude_ids)}, expected one of "
                f"{model.vocab_size} ids besides [MASK] to be left"
            )
        if self.order == "halton":
            halton(length)

    @property
    def guides(self) -> bool:
        """Whether the logits of no class are needed."""
        return self.guidance_scale != 1.0

    def check_labels(
        self, model: MAR, labels: npt.ArrayLike | None, batch_size: int
    ) -> Array | None:
        """Raise unless labels fit the model, and are there if they are to guide."""
        if self.guides and labels is None:
            raise ValueError(
                f"labels: received None, but guidance_scale={self.guidance_scale} needs them"
            )
        return model.check_labels(labels, batch_size)


def _order_of(rule: Any) -> str | None:
    """Tell the order that a rule is defined with, if it is one of ours and says so."""
    return getattr(rule, "order", None)
