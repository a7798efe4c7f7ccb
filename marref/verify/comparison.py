"""Comparison: where an implementation's numbers first leave golden vectors by more than rounding.

How much rounding is allowed is derived, not picked.  marref itself is run again in the precision
of the implementation, on the golden inputs, several times: once as they are, and with every
parameter moved by one unit in its last place.  The largest error that it makes, times `MULTIPLE`,
is the budget of an array.

Errors are measured relative to the largest entry of an array.  In a forward pass they grow from
one activation to the next, and where a small array happens to have been computed with a small
error, that is luck: the relative error of an activation is taken to be at least that of those
before it, and that of a gradient or a parameter after a step at least the median of its section.

Three things are not in marref's own arithmetic and are put into the runs: in float64, in which
golden vectors are computed, every operation errs at random (`marref.verify.rounding`); positions
are computed in many ways, whose frequencies differ in their last digits; and an optimiser turns a
gradient of the size of its rounding into a whole step, of either sign.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from marref import checks, trees
from marref.continuous.model import ContinuousMAR
from marref.model import MAR
from marref.positions import sinusoidal_table
from marref.trees import Array, Tree
from marref.verify import golden, golden_continuous, measure, samplers
from marref.verify.faults.fault import Fault
from marref.verify.rounding import (
    EPSILON,
    PRECISIONS,
    PRODUCT_EPSILON,
    in_precision,
    jittered,
    round_to,
)

MULTIPLE = 8.0
"""Budget over error.  See docs/cross-checking.md for its derivation and measurement."""

_NUM_RUNS = 5
_NUM_MOVED = 32
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared array.

    Parameters
    ----------
    name : str
    shape : tuple of int
    difference : float
        The largest |yours - golden|; NaN or infinite where yours is.
    relative : float
        ``difference`` over the largest |golden|; ``difference`` itself where that is 0.
    budget : float
        What ``difference`` may be; infinite where this precision decides nothing.
    """

    name: str
    shape: tuple[int, ...]
    difference: float
    relative: float
    budget: float

    @property
    def verdict(self) -> str:
        """``"equal"``, ``"rounding"``, ``"DIFFERS"``, or ``"undecided"`` in this precision."""
        if self.difference == 0:
            return "equal"
        if math.isinf(self.budget):
            return "undecided"
        return "rounding" if self.difference <= self.budget else "DIFFERS"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, in the order of computation.

    Parameters
    ----------
    rows : tuple of Row
    precision : str
        For which the budgets hold.
    exceptions : dict of str to str
        The arrays that are in another precision, with that, and have its budgets.
    wider : tuple of str
        The arrays whose dtype is wider than their precision.
    """

    rows: tuple[Row, ...]
    precision: str
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wider: tuple[str, ...] = ()

    @property
    def differing(self) -> list[Row]:
        """The rows that differ by more than rounding."""
        return [row for row in self.rows if row.verdict == "DIFFERS"]

    @property
    def first(self) -> Row | None:
        """The first of them, if any."""
        return next(iter(self.differing), None)

    def as_table(self, colour: bool = False) -> str:
        """Write the rows as a table, and say in a last line what was found."""
        width = max(len(row.name) for row in self.rows) + 2
        lines = [
            f"{'name':<{width}}{'shape':<12}{'max |Δ|':>9}{'rel. error':>12}{'budget':>9}  verdict"
        ]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            verdict = row.verdict + ("   <- first difference" if row is self.first else "")
            if colour and row.verdict == "DIFFERS":
                verdict = f"\x1b[31m{verdict}\x1b[0m"
            lines.append(
                f"{row.name:<{width}}{shape:<12}{row.difference:>9.1e}{row.relative:>12.1e}"
                f"{row.budget:>9.1e}  {verdict}"
            )
        if self.first is None:
            undecided = sum(row.verdict == "undecided" for row in self.rows)
            lines.append(
                f"\nall {len(self.rows)} arrays agree within the rounding of {self._rounding}"
                + (f" ({undecided} undecided: it is too coarse for them)" if undecided else "")
            )
        else:
            lines.append(
                f"\n{len(self.differing)} of {len(self.rows)} arrays differ by more than the "
                f"rounding of {self._rounding}; the first is {self.first.name}"
            )
            if self.beside:
                lines.append(f"computed beside it, not from it: {checks.listed(self.beside, 3)}")
        if self.wider:
            lines.append(f"wider than what they were computed from: {checks.listed(self.wider, 3)}")
        return "\n".join(lines)

    @property
    def beside(self) -> list[str]:
        """The differing arrays that are computed beside the first, neither from the other."""
        if self.first is None:
            return []
        place = _place(self.first.name)
        others = [row.name for row in self.differing if row is not self.first]
        return [name for name in others if _place(name) == place]

    def precision_of(self, name: str) -> str:
        """Return the precision that an array's budget holds for."""
        return self.exceptions.get(name, self.precision)

    @property
    def _rounding(self) -> str:
        others = [f"{name} of {one}" for name, one in self.exceptions.items()]
        return self.precision + (f" ({checks.listed(others, 3)})" if others else "")

    def as_json(self) -> str:
        """Write the same for machines; infinities are null."""
        return json.dumps(self.as_dict(), indent=1)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                **{
                    key: value if math.isfinite(value) else None
                    for key, value in (
                        ("difference", row.difference),
                        ("relative", row.relative),
                        ("budget", row.budget),
                    )
                },
                "verdict": row.verdict,
            }
            for row in self.rows
        ]
        first = self.first.name if self.first else None
        return {
            "precision": self.precision,
            "exceptions": dict(self.exceptions),
            "wider": list(self.wider),
            "first": first,
            "beside": self.beside,
            "rows": rows,
        }

    @property
    def agrees(self) -> bool:
        """Whether there is none."""
        return self.first is None


def _place(name: str) -> str:
    """Name the place in the computation that arrays share which are computed beside each other."""
    section, _, rest = name.partition("/")
    if section in golden.OPTIMISERS:
        return f"{section}/{rest.split('/')[0]}"
    if section == "gradients":
        rest = rest.rpartition(".")[0]
    return f"{section}/" + re.sub("attention.(query|key|value)$", "attention.qkv", rest)


class Golden:
    """Golden vectors, and what marref makes of their inputs in other precisions.

    Parameters
    ----------
    arrays, metadata : dict
        From `marref.verify.golden.make` or `marref.verify.golden_continuous.make`, or read from a
        file.

    Raises
    ------
    ValueError
        They are no golden vectors, or lack a part.
    """

    def __init__(self, arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
        config = metadata.get("config")
        if not isinstance(config, dict):
            raise ValueError("golden: the metadata hold no config")
        self.is_continuous = metadata.get("model") == "continuous"
        self.model: Any
        try:
            self.model = ContinuousMAR(**config) if self.is_continuous else MAR(**config)
        except TypeError as error:
            raise ValueError(f"golden: config {config} ({error})") from error
        order = [name for name in metadata.get("order", ()) if name in arrays]
        self.arrays = {**{name: arrays[name] for name in order}, **arrays}
        self.metadata = dict(metadata)
        self.params = trees.unflatten(
            {
                name.removeprefix("params/"): array.astype(np.float64)
                for name, array in arrays.items()
                if name.startswith("params/")
            }
        )
        trees.check_like("golden params", self.params, self.model.parameter_shapes)
        of = golden_continuous if self.is_continuous else golden
        inputs = of.inputs(self.model)
        for name in inputs:
            if f"input/{name}" not in arrays:
                raise ValueError(f"golden: input/{name} is missing")
        self.batch = {name: arrays[f"input/{name}"] for name in inputs}

    def order(self, names: Mapping[str, Any]) -> list[str]:
        """Sort the given names into the order of computation."""
        return [name for name in self.arrays if name in names]

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raise unless every array has the name and shape of a golden one, and holds numbers."""
        if not arrays:
            raise ValueError("arrays: none, expected at least one of the golden arrays")
        faults = [
            fault
            for name, array in arrays.items()
            if (fault := self._fault(name, np.asarray(array)))
        ]
        unknown = [name for name in arrays if name not in self.arrays]
        # To look for what is nearest takes its time.
        faults += [checks.unknown_name(name, self.arrays) for name in unknown[:1]]
        faults += [f"{name!r} is unknown" for name in unknown[1:]]
        if faults:
            more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise ValueError("arrays: " + "; ".join(faults[:_SHOWN]) + more)

    def _fault(self, name: str, array: Array) -> str | None:
        """Say why an array of a known name cannot be compared, if so."""
        if name not in self.arrays:
            return None
        expected = self.arrays[name].shape
        if array.shape != expected:
            hint = ": transposed?" if sorted(array.shape) == sorted(expected) else ""
            return f"{name} has shape {list(array.shape)}, expected {list(expected)}{hint}"
        known = array.dtype.kind in "fiub"
        return None if known else f"{name} has dtype {array.dtype}, expected numbers"

    def stages(
        self, names: Mapping[str, Any], params: Tree | None = None, **options: Any
    ) -> dict[Any, Callable[[], dict[str, Array]]]:
        """Return the stages of `golden.stages`, on the golden inputs, that the names ask for."""
        of = golden_continuous.stages if self.is_continuous else golden.stages
        stages = of(self.model, params or self.params, self.batch, **options)
        lines = "\n" + "\n".join(names)

        def asked(*prefixes: str) -> bool:
            return any(f"\n{prefix}" in lines for prefix in prefixes)

        return {
            prefix: stage
            for prefix, stage in stages.items()
            if asked(*((prefix,) if isinstance(prefix, str) else prefix))
        }

    def compute(self, names: Mapping[str, Any]) -> dict[str, Array]:
        """Run marref on the golden inputs, as far as the names ask for."""
        arrays: dict[str, Array] = {}
        for stage in self.stages(names).values():
            arrays |= stage()
        return arrays


def compare(
    golden_vectors: Golden,
    arrays: Mapping[str, Array],
    precision: str | None = None,
    *,
    fail_fast: bool = False,
) -> Comparison:
    """Compare an implementation's arrays with golden vectors.

    Parameters
    ----------
    golden_vectors : Golden
    arrays : dict of str to array
        Any subset of the golden arrays, by their names.
    precision : {"float64", "float32", "float16", "bfloat16", "tf32", "fp16-mixed", "bf16-mixed"}
        In which they were computed, see `marref.verify.rounding`; by default that of the numbers of
        each array, see `precisions_of`.
    fail_fast : bool
        Compare no further than to the first stage (of activations, gradients, each optimiser, …)
        in which something differs.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        A name is unknown (the message names the nearest), an array has another shape, or there
        is nothing to compare.
    """
    golden_vectors.check(arrays)
    if precision is None:
        precisions = precisions_of(golden_vectors, arrays)
    else:
        checks.choice("precision", precision, PRECISIONS)
        precisions = dict.fromkeys(arrays, precision)
    wider = tuple(
        name
        for name, one in precisions.items()
        if np.asarray(arrays[name]).dtype == np.float64
        and EPSILON[one] > EPSILON["float64"]
        and not golden.is_drawn(name)
    )
    result = Comparison((), _most_common(precisions), _exceptions(precisions), wider)
    for names in _by_stage(golden_vectors, arrays) if fail_fast else [golden_vectors.order(arrays)]:
        allowed = budgets_by_array(golden_vectors, {name: precisions[name] for name in names})
        rows = tuple(
            row_of(name, np.asarray(arrays[name]), golden_vectors.arrays[name], allowed[name])
            for name in names
        )
        result = dataclasses.replace(result, rows=result.rows + rows)
        if not result.agrees:
            break
    return result


def _by_stage(golden_vectors: Golden, names: Mapping[str, Any]) -> list[list[str]]:
    """Group names by the stage that computes them; what is given comes first."""
    prefixes = golden_vectors.stages(names)

    def stage(name: str) -> int:
        return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), -1)

    return [list(group) for _, group in itertools.groupby(golden_vectors.order(names), key=stage)]


def row_of(name: str, yours: Array, expected: Array, budget: float) -> Row:
    """Compare one array with what is expected."""
    difference = measure.difference(yours, expected)
    if np.isnan(yours).any() and not np.isnan(expected).any():
        difference = math.nan
    relative = measure.relative(difference, measure.largest(expected))
    return Row(name, expected.shape, difference, relative, budget)


def precisions_of(golden_vectors: Golden, arrays: Mapping[str, Array]) -> dict[str, str]:
    """Tell for every array in which precision its numbers are, whatever holds them.

    A float64 array of float32 numbers is float32, as is what ``.item()`` returned; a float32 array
    of bfloat16 or float16 numbers is that.  Arrays of fewer than 4 different numbers tell too
    little, as do numbers that are not finite, or given and not computed: the parameters, and those
    that no step has moved.  They are taken to be in the most common precision if that holds them.
    What follows from the activations (loss, gradients, steps) is no more precise than most of
    these, whatever holds it.
    """
    telling: dict[str, str] = {}
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind == "f" and _computed(golden_vectors, name, array):
            narrowest = _narrowest(array)
            # Where the right numbers fit into it too, that tells nothing.
            if narrowest == "float64" or not _holds(golden_vectors.arrays[name], narrowest):
                telling[name] = narrowest
    common = _most_common(telling)
    activations = {name: one for name, one in telling.items() if name.startswith("activations/")}
    of_inputs = _most_common(activations or telling)
    precisions = {}
    for name in golden_vectors.order(arrays):
        array = np.asarray(arrays[name])
        own = telling.get(name)
        if own is None and array.dtype.kind == "f":
            own = common if _holds(array, common) else array.dtype.name
        own = own or common
        follows = not name.startswith("activations/")
        precisions[name] = max(own, of_inputs, key=EPSILON.__getitem__) if follows else own
    return precisions


def _computed(golden_vectors: Golden, name: str, array: Array) -> bool:
    """Whether the numbers of an array tell in which precision they were computed."""
    section, _, leaf = name.partition("/")
    computed = np.isfinite(array)
    if section in golden.OPTIMISERS:
        computed &= array != golden_vectors.arrays["params/" + leaf.partition("/")[2]]
    given = section in ("params", "input") or golden.is_drawn(name)
    of_key_bias = name.endswith("attention.key.bias")
    return not given and not of_key_bias and len(np.unique(array[computed])) >= 4


def budgets_by_array(golden_vectors: Golden, precisions: Mapping[str, str]) -> dict[str, float]:
    """Derive `budgets` for arrays in several precisions, by name."""
    # All arrays are asked for each time, since an error is at least that of what comes before it.
    of_precision = {
        one: budgets(golden_vectors, precisions, one) for one in dict.fromkeys(precisions.values())
    }
    return {name: of_precision[one][name] for name, one in precisions.items()}


def _narrowest(array: Array) -> str:
    """Name the narrowest precision that holds all numbers of a floating-point array."""
    narrower = ("bfloat16", "float16", "float32")
    return next((name for name in narrower if _holds(array, name)), "float64")


def _holds(array: Array, precision: str) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = array.astype(np.float64)
        narrow = wide.astype(np.float32) if precision != "float64" else wide
        if precision in ("float16", "bfloat16"):
            narrow = round_to(narrow, precision)
    return bool(np.array_equal(narrow.astype(np.float64), wide, equal_nan=True))


def _most_common(precisions: Mapping[str, str]) -> str:
    return Counter(precisions.values()).most_common(1)[0][0] if precisions else "float64"


def _exceptions(precisions: Mapping[str, str]) -> dict[str, str]:
    """Name the arrays that are not in the most common precision."""
    common = _most_common(precisions)
    return {name: one for name, one in precisions.items() if one != common}


def budgets(golden_vectors: Golden, names: Mapping[str, Any], precision: str) -> dict[str, float]:
    """How far a correct implementation in a precision may be from golden vectors.

    Parameters
    ----------
    golden_vectors : Golden
    names : mapping
        Its keys are the arrays asked for.
    precision : str
        See `compare`.

    Returns
    -------
    dict of str to float
        Absolute: the largest |difference| allowed.  0 for what is given rather than computed, and
        for integers; infinite where marref itself, in this precision, is not finite or comes to
        other integers, or where the budget would be twice the largest entry: this precision
        decides nothing there.
    """
    steps = [name for name in names if name.split("/")[0] in golden.OPTIMISERS]
    asked = {**names, "activations/": None, **({"gradients/": None} if steps else {})}
    expected = golden_vectors.compute(asked)
    errors = dict.fromkeys(expected, 0.0)
    rng = np.random.default_rng(0)
    for run in range(_NUM_RUNS):
        params = _shaken(golden_vectors.params, rng if run > 0 else None, precision)
        rounded = (
            golden_continuous.tables_rounded if golden_vectors.is_continuous else _positions_rounded
        )
        with rounded(run, precision).applied():
            _raise_to(errors, expected, _compute_in_precision(golden_vectors, asked, params))
    decoded = [name for name in expected if name.startswith(("decode/", "guidance/", "samplers/"))]
    for _ in range(_NUM_RUNS if decoded else 0):
        params = _shaken(golden_vectors.params, rng, precision, MULTIPLE)
        found = _compute_in_precision(golden_vectors, dict.fromkeys(decoded), params)
        for name in decoded:
            if name not in found or (
                expected[name].dtype.kind != "f" and (found[name] != expected[name]).any()
            ):
                errors[name] = math.inf
    allowed = _smoothed(expected, errors, precision)
    for setting in dict.fromkeys("/".join(name.split("/")[:2]) for name in decoded):
        if _depends_on_rounding(golden_vectors.model, setting, expected, allowed):
            of_setting = [name for name in decoded if name.startswith(f"{setting}/")]
            allowed |= dict.fromkeys(of_setting, math.inf)
    if steps:
        for name, error in _errors_of_steps(golden_vectors, steps, expected, allowed, rng).items():
            allowed[name] = max(allowed[name], 2.0 * error)
    return {**dict.fromkeys(names, 0.0), **allowed}


def _depends_on_rounding(
    model: MAR, setting: str, expected: Mapping[str, Array], allowed: Mapping[str, float]
) -> bool:
    """Whether rounding can decide what a decoder does in a setting."""
    section, name = setting.split("/")
    if section == "samplers":
        return _chooses_otherwise(model, name, expected, allowed)
    return _nearly_ties(setting, expected, allowed)


def _nearly_ties(setting: str, expected: Mapping[str, Array], allowed: Mapping[str, float]) -> bool:
    """Whether rounding can decide which position a decoder reveals first."""
    confidence, after = (expected[f"{setting}/steps/{key}"] for key in ("confidence", "mask"))
    before = np.concatenate([expected[f"{setting}/start"][np.newaxis] == 0, after[:-1]])
    revealed = before & ~after
    apart = np.abs(confidence[..., :, np.newaxis] - confidence[..., np.newaxis, :])
    competing = revealed[..., :, np.newaxis] & after[..., np.newaxis, :]
    return bool((apart[competing] <= 2.0 * allowed[f"{setting}/steps/confidence"]).any())


def _chooses_otherwise(
    model: MAR, name: str, expected: Mapping[str, Array], allowed: Mapping[str, float]
) -> bool:
    """Whether a sampler chooses otherwise with logits that are off by all that they may be.

    Its steps are taken again with `_NUM_MOVED` copies of the sequences, whose logits are moved in
    random directions; all that draws, ranks, bounds and counts make of them is an integer.
    """
    of_sampler = {
        key.rpartition("/")[2]: array
        for key, array in expected.items()
        if key.startswith(f"samplers/{name}/") and "/steps/" in key
    }
    most = allowed[f"samplers/{name}/steps/logits"]
    if math.isinf(most):
        return True
    copied = {key: np.repeat(array, _NUM_MOVED, axis=1) for key, array in of_sampler.items()}
    signs = np.random.default_rng(0).choice([-1.0, 1.0], copied["logits"].shape)
    moved = copied["logits"] + most * signs
    start = np.repeat(expected[f"samplers/{name}/start"], _NUM_MOVED, axis=0)
    rule = samplers.rule_of(samplers.settings(model)[name])
    drawn = {key: copied[key] for key in copied if golden.is_drawn(f"samplers/{name}/steps/{key}")}
    found = samplers.run(rule, start, drawn, lambda step, _: moved[step])
    return any(
        (array != copied[key]).any() for key, array in found.items() if array.dtype.kind != "f"
    )


def _raise_to(
    errors: dict[str, float], expected: dict[str, Array], found: dict[str, Array]
) -> None:
    """Raise the errors of arrays to those of one more run; of what it lacks, to infinity."""
    for name, error in errors.items():
        this = math.inf
        if name in found:
            this = measure.difference(*measure.without_common_nan(found[name], expected[name]))
        errors[name] = max(error, this)


def _errors_of_steps(
    golden_vectors: Golden,
    names: list[str],
    expected: dict[str, Array],
    allowed: dict[str, float],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Step with gradients that are off by all that they may be, in random directions.

    Adam divides a gradient by its own size: one of the size of its rounding, and not exactly 0,
    becomes a whole step of either sign, after which all gradients are others.
    """

    def nudged(name: str, leaf: Array) -> Array:
        most = min(allowed[f"gradients/{name}"], measure.largest(leaf))
        # What is exactly 0, as for a token that is not in the batch, is so in every program.
        moves: Array = most * rng.choice([-1.0, 1.0], leaf.shape) * (leaf != 0)
        return leaf + moves

    def nudge(grads: Tree) -> Tree:
        leaves = trees.flatten(grads)
        return trees.unflatten({name: nudged(name, leaf) for name, leaf in leaves.items()})

    errors = dict.fromkeys(names, 0.0)
    for _ in range(_NUM_RUNS):
        found: dict[str, Array] = {}
        for stage in golden_vectors.stages(errors, nudge=nudge).values():
            found |= stage()
        _raise_to(errors, expected, found)
    return errors


def _positions_rounded(run: int, precision: str) -> Fault:
    """Make positions with frequencies w that are off in their last digits.

    exp(-log(10000) x), 10000^-x and 1/10000^x in float32 differ by about |log w| units; the angle
    p·w differs by p·w as much.  No program computes them more coarsely than in float32.
    """
    fault = Fault("positions-rounded")
    unit = EPSILON["float64" if precision == "float64" else "float32"]

    @fault.wraps(sinusoidal_table)
    def _(old: Any, length: int, embed_dim: int, positions: str = "concatenated") -> Array:
        table = old(length, embed_dim, positions)
        half = embed_dim // 2
        log_w = np.log(10000.0) * np.arange(half) / max(half - 1, 1)
        signs = np.random.default_rng(run).choice([-1.0, 1.0], half)
        units = signs * np.maximum(log_w, 1.0)
        dangle = unit * units * np.exp(-log_w) * np.arange(length)[:, np.newaxis]
        axis = 1 if positions == "concatenated" else 2
        shape = (length, 2, half) if axis == 1 else (length, half, 2)
        # The derivative of a sine is the cosine beside it, and the reverse but for the sign.
        others = np.flip(table.reshape(shape), axis) * np.expand_dims(dangle, axis)
        moved: Array = table + others.reshape(table.shape)
        return moved

    return fault


def _shaken(
    params: Tree, rng: np.random.Generator | None, precision: str, count: float = 1.0
) -> Tree:
    """Move every parameter by so many units in its last place, up or down; not without an rng.

    In bfloat16 and float16 all but the embedding table, or the tables of positions that are learnt:
    where they nearly cancel what they are added to, a unit is no rounding any more, but another
    input.  Where products round their inputs only, kernels move by a unit of these.
    """
    tables = ("embedding.table", "encoder_positions.table", "decoder_positions.table")
    still = tables if precision in ("float16", "bfloat16") else ()

    def move(name: str, leaf: Array) -> Array:
        if rng is not None and name not in still:
            units = PRODUCT_EPSILON if name.endswith("kernel") else EPSILON
            leaf = leaf * (1.0 + count * units[precision] * rng.choice([-1.0, 1.0], leaf.shape))
        if rng is not None and precision == "float64":
            return jittered(leaf, rng.spawn(1)[0])
        return in_precision(leaf, precision)

    return trees.unflatten({name: move(name, leaf) for name, leaf in trees.flatten(params).items()})


def _compute_in_precision(
    golden_vectors: Golden, names: Mapping[str, Any], params: Tree
) -> dict[str, Array]:
    """Compute every stage that can be computed; an overflow may end one."""
    arrays: dict[str, Array] = {}
    for stage in golden_vectors.stages(names, params).values():
        with (
            np.errstate(all="ignore"),
            contextlib.suppress(ValueError, FloatingPointError),
        ):
            arrays |= stage()
    return arrays


def _smoothed(
    expected: dict[str, Array], errors: dict[str, float], precision: str
) -> dict[str, float]:
    """Turn errors into budgets, with luck taken out as said at the head of this module."""
    largest = {name: measure.largest(array) for name, array in expected.items()}
    section_largest: dict[str, float] = {}
    for name, size in largest.items():
        section = name.split("/")[0]
        section_largest[section] = max(section_largest.get(section, 0.0), size)
    for name, size in largest.items():
        # The key bias's gradient is rounding, whose size says nothing: as if of the others' size.
        if size < 1e-12 * section_largest[name.split("/")[0]]:
            largest[name] = section_largest[name.split("/")[0]]
    relative = {
        name: max(errors[name] / largest[name], EPSILON[precision])
        for name, array in expected.items()
        if array.dtype.kind == "f" and largest[name] > 0
    }
    sections: dict[str, list[float]] = {}
    for name, error in relative.items():
        sections.setdefault(name.split("/")[0], []).append(error)
    allowed: dict[str, float] = {}
    running = 0.0
    for name, array in expected.items():
        if array.dtype.kind != "f":
            allowed[name] = math.inf if errors[name] > 0 else 0.0
            continue
        if name not in relative:
            allowed[name] = MULTIPLE * errors[name]
            continue
        floor = float(np.median(sections[name.split("/")[0]]))
        if name.startswith("activations/"):
            running = floor = max(running, relative[name])
        floor = max(floor, running) if name == "loss" else floor
        budget = MULTIPLE * max(errors[name], floor * largest[name])
        # No array of the size of the golden one could be further away: nothing is decided.
        allowed[name] = budget if budget < 2.0 * largest[name] else math.inf
    return allowed


def crosscheck(
    forward: Callable[..., Any], golden_vectors: Golden, precision: str | None = None
) -> Comparison:
    """Call an implementation with golden inputs and compare what it returns.

    Parameters
    ----------
    forward : callable
        ``(params, tokens)``, with classes ``(params, tokens, labels)``, to the logits, or to a dict
        of arrays by their golden names.  Of continuous MAR ``(params, inputs)``, with a dict of all
        inputs, to a dict of arrays.
    golden_vectors : Golden
    precision : str, optional
        See `compare`.  The parameters are handed over in this precision's dtype: float64 for
        ``"float64"`` and ``None``, float32 for the others.

    Returns
    -------
    Comparison
    """
    dtype = np.float64 if precision in (None, "float64") else np.float32
    params = trees.map_leaves(lambda leaf: leaf.astype(dtype), golden_vectors.params)
    batch = {name: array.copy() for name, array in golden_vectors.batch.items()}
    inputs = [batch[name] for name in ("tokens", "labels") if name in batch]
    result = forward(params, *([batch] if golden_vectors.is_continuous else inputs))
    named = result if isinstance(result, dict) else {"activations/logits": result}
    return compare(golden_vectors, {name: _array(x) for name, x in named.items()}, precision)


def _array(x: Any) -> Array:
    """Turn a framework's array into one of NumPy's; bfloat16, which that lacks, is widened."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    if "bfloat16" in str(getattr(x, "dtype", "")):
        x = x.float() if hasattr(x, "float") else x.astype(np.float32)
    return np.asarray(x)
