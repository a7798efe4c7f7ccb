"""What a run is made with: the model and every option of its training."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from marref import checks, masking, optim
from marref.data import Dataset
from marref.fast import parallel
from marref.model import MAR
from marref.training import ranks

if TYPE_CHECKING:
    from marref.continuous.run import RunConfig

DECAYED = ("matrices", "all")
MASKED_PER = ("sequence", "batch")
DTYPES = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of a run; where ``None``, `resolved` fills in what fits the others and the data.

    Parameters
    ----------
    embed_dim, num_layers, num_heads, dropout, gelu, positions
        Of the model; see `marref.hyperparameters.Hyperparameters`.  The sizes are for ten minutes
        of two cores: on a text, wider or deeper models learnt less in that time.  No dropout: so
        short a run sees its data a few times only.
    seq_len : int, optional
        The longest sequence of the model; ``None``: that of the data.
    num_steps : int
        The default is about ten minutes of two cores for text, with all other defaults; see
        docs/training.md.
    batch_size : int
        Sequences that are computed at once.  With the default, text has 2,048 tokens a step.
    accumulate : int
        Batches that make up a step.  Its loss is the mean over the masked positions of all of
        them, so that ``accumulate=k`` is a batch that is k times as large, in less memory.
    learning_rate : float, optional
        The peak; see `marref.optim.warmup_cosine`.  ``None``: 5e-3·√(64/embed_dim), of which the
        constant was better than 2e-3 and 1e-2 on a text, and the root lies between a constant and
        the 1/width of Yang et al. 2022 (muP, arXiv 2203.03466).
    warmup_steps : int, optional
        ``None``: a twentieth of the steps.
    weight_decay : float
        As in AdamW; see `marref.optim`.  The default is nanoGPT's.
    decay : {"matrices", "all"}
        What decays: every array with two axes, the embedding table among them, and neither biases
        nor norms (as nanoGPT's ``configure_optimizers``), or everything (PyTorch's one group).
    max_norm : float
        See `marref.optim.clip_by_global_norm`.
    label_smoothing : float
        See `marref.loss.uniform`.
    label_drop : float
        Of data with classes: the probability that a sequence is trained on as one of no class; see
        `marref.masking.drop_labels`.
    average_decay : float, optional
        d of the average of the parameters, a ← d a + (1 - d) θ after every step, which starts at
        the initial parameters: after n steps these still have the weight dⁿ in it.  0: no average.
        ``None``: 1 - 10/num_steps, at most 0.9999, which leaves them about e⁻¹⁰.
    mask_schedule : str
        See `marref.masking.sample_mask_ratio`.  The default is MAR's specification; small ratios
        are more frequent, from which a place's neighbours are learnt sooner.
    mask_per : {"sequence", "batch"}
        What has a mask ratio of its own: every sequence, or every step.
    dtype : {"float32", "float64"}
    seed : int
        Of everything that is drawn; see `marref.chance`.
    validate_every, checkpoint_every : int, optional
        In steps.  ``None``: ten times in a run.
    keep : int
        How many checkpoints are kept, the newest; beside them the best by validation.
    validation_fraction : float
        How much of the data to set aside, in [0, 1); 0: no validation.
    num_threads : int, optional
        ``None``: as many as pay and there are cores where the run starts; with shards, where it
        goes on, and one beside other processes.
    num_shards : int, optional
        Into how many parts the sequences of a step are cut, for several processes; with them the
        bits do not depend on how many processes and threads there are.  ``None``: none, for one
        process.  See `marref.training.ranks`.
    reduce : {"exact", "fast"}
        How shards are added; with ``"fast"`` the last digits depend on the number of processes.

    Raises
    ------
    TypeError, ValueError
        An option is of another type or outside its range.
    """

    kind: ClassVar[str] = "discrete"

    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.0
    gelu: str = "erf"
    positions: str = "concatenated"
    seq_len: int | None = None
    num_steps: int = 10_000
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    decay: str = "matrices"
    max_norm: float = 1.0
    label_smoothing: float = 0.0
    label_drop: float = 0.1
    average_decay: float | None = None
    mask_schedule: str = "one-minus-cosine"
    mask_per: str = "sequence"
    dtype: str = "float32"
    seed: int = 0
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 3
    validation_fraction: float = 0.1
    num_threads: int | None = None
    num_shards: int | None = None
    reduce: str = "exact"

    def __post_init__(self) -> None:
        steps = checks.integer("num_steps", self.num_steps, 1, 2**32 - 1)
        for name, minimum, maximum in (
            ("batch_size", 1, 2**31 - 1),
            ("accumulate", 1, 2**31 - 1),
            ("seed", 0, 2**128 - 1),
            ("keep", 1, None),
            ("warmup_steps", 0, steps - 1),
            ("validate_every", 1, None),
            ("checkpoint_every", 1, None),
            ("num_threads", 1, None),
            ("num_shards", 1, self.batch_size * self.accumulate),
        ):
            if getattr(self, name) is not None:
                self._set(name, checks.integer(name, getattr(self, name), minimum, maximum))
        for name, interval in (
            ("learning_rate", "(0, inf)"),
            ("weight_decay", "[0, inf)"),
            ("max_norm", "(0, inf)"),
            ("label_smoothing", "[0, 1)"),
            ("label_drop", "[0, 1)"),
            ("average_decay", "[0, 1)"),
            ("validation_fraction", "[0, 1)"),
        ):
            if getattr(self, name) is not None:
                self._set(name, checks.real(name, getattr(self, name), interval))
        checks.choice("decay", self.decay, DECAYED)
        checks.choice("mask_per", self.mask_per, MASKED_PER)
        checks.choice("mask_schedule", self.mask_schedule, masking.SCHEDULES)
        checks.choice("dtype", self.dtype, DTYPES)
        checks.choice("reduce", self.reduce, ranks.REDUCE)
        self._model(2, 1 if self.seq_len is None else self.seq_len, None)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Config":
        """Build one from what JSON or TOML hold; an unknown option names the nearest."""
        return from_options(cls, options)

    def resolved(self, dataset: Dataset) -> "Config":
        """Fill in every ``None``."""
        tenth = math.ceil(self.num_steps / 10)
        length = dataset.length if self.seq_len is None else self.seq_len
        features = self.batch_size * dataset.length * self.embed_dim
        found: dict[str, Any] = {
            "seq_len": length,
            "learning_rate": 5e-3 * math.sqrt(64 / self.embed_dim),
            "warmup_steps": self.num_steps // 20,
            "average_decay": min(max(0.0, 1.0 - 10.0 / self.num_steps), 0.9999),
            "validate_every": tenth,
            "checkpoint_every": tenth,
        }
        if self.num_shards is None:
            worth = parallel.FEATURES_WORTH_A_THREAD
            found["num_threads"] = parallel.choose(None, features, worth)
        if length < dataset.length:
            raise ValueError(
                f"seq_len: received {length}, expected at least the length of the data's "
                f"sequences, {dataset.length}"
            )
        return filled(self, found)

    def model(self, vocab_size: int, num_classes: int | None = None) -> MAR:
        """Build the model of a resolved config for so many token ids, and classes if any."""
        if self.seq_len is None:
            raise ValueError("seq_len: received None, expected a config that is resolved")
        return self._model(vocab_size, self.seq_len, num_classes)

    def learning_rate_at(self, step: int) -> float:
        """Compute the learning rate of a resolved config after so many steps."""
        if self.learning_rate is None or self.warmup_steps is None:
            raise ValueError("learning_rate: received None, expected a config that is resolved")
        return optim.warmup_cosine(
            step,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            total_steps=self.num_steps,
        )

    def _model(self, vocab_size: int, seq_len: int, num_classes: int | None) -> MAR:
        return MAR(
            vocab_size,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            seq_len=seq_len,
            dropout=self.dropout,
            gelu=self.gelu,
            positions=self.positions,
            num_classes=num_classes,
        )

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)


AnyConfig: TypeAlias = "Config | RunConfig"
"""Of a run of discrete MAR, or of the continuous model."""

_Config = TypeVar("_Config")


def from_options(kind: type[_Config], options: Mapping[str, Any]) -> _Config:
    """Build a config of options; an unknown one names the nearest."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ValueError(f"config: {checks.unknown_name(name, known)}")
    return kind(**options)


def filled(config: _Config, found: Mapping[str, Any]) -> _Config:
    """Put what was found where an option is ``None``."""
    missing = {name: value for name, value in found.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)  # type: ignore[type-var]


def as_told(config: "AnyConfig") -> dict[str, Any]:
    """Say in what JSON can hold which options these are, and of which model unless discrete MAR."""
    kind = {} if config.kind == "discrete" else {"model": config.kind}
    return {**kind, "config": dataclasses.asdict(config)}


def from_told(told: Mapping[str, Any]) -> "AnyConfig":
    """Build the config that `as_told` told of."""
    return kind_of(told.get("model", "discrete")).from_dict(told["config"])


def kind_of(name: str) -> "type[Config] | type[RunConfig]":
    """Return the class of the configs of a kind of run."""
    if checks.choice("model", name, ("discrete", "continuous")) == "discrete":
        return Config
    from marref.continuous.run import RunConfig  # which imports this package

    return RunConfig
