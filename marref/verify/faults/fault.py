"""A fault: one known way to get MAR wrong, put into marref from outside.

A fault says what computes in the place of some functions of the definition, its *seams*:
`Fault.wraps` with the old function, `Fault.replaces` without.  Wraps of one seam nest, so that most
faults can be applied together.

How a fault gets in.  While a fault on it is applied anywhere, a seam has another ``__code__``, its
stand-in, which asks `dispatch` what to compute; after the last, it has its own again.  To set the
attribute of the module instead would miss whoever holds the function under another name, or in a
dict such as `marref.schedules.SCHEDULES`; the function itself is one object for all.

Which faults act is a matter of the context (`contextvars`) that calls: they act where they were
applied, and in the threads that marref starts there, which run in copies of that context.  For
others the stand-in computes the pristine function.  The code of the seams follows from the set of
what is applied: it may end in any order, in any thread, or by an exception, and leaves nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self, TypeVar

from marref import decoding, fast, model, optim
from marref.continuous import sampling
from marref.continuous.fast import sampling as fast_sampling
from marref.continuous.fast import training as fast_training

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class Seam:
    """A function that faults may replace, a copy that they cannot, and the code of its stand-in."""

    function: types.FunctionType
    pristine: types.FunctionType
    stand_in: types.CodeType


class Patch(NamedTuple):
    """What computes at a seam: with the old as first argument, unless it ``replaces`` it."""

    seam: Seam
    function: Callable[..., Any]
    replaces: bool


@dataclasses.dataclass(eq=False)
class Fault:
    """A known way to get MAR wrong, or another convention.

    Parameters
    ----------
    name : str
        In kebab-case; begins with the part that it is about.
    summary : str
        One paragraph: what it is, who does it, how it shows.  It is what the fault `says`, or else
        the docstring of the first function that is decorated.
    patches : list of Patch
        What makes marref compute it so; added by decorators.  The gradients of a fault in the
        forward pass are the derivatives of that faulty forward pass.
    setting : str
        The one choice that it makes otherwise, where other faults make it in yet another way: a
        scale, an epsilon, an order.  Two of them together would be a third that nobody made.
    """

    name: str
    summary: str = ""
    patches: list[Patch] = dataclasses.field(default_factory=list)
    setting: str = ""

    def says(self, summary: str | None) -> Self:
        """Set the summary, if there is none yet."""
        self.summary = self.summary or " ".join((summary or "").split())
        return self

    def sets(self, setting: str) -> Self:
        """Name the choice that it makes otherwise; see ``setting``."""
        self.setting = setting
        return self

    def wraps(self, seam: Callable[..., Any]) -> Callable[[Function], Function]:
        """Decorate what computes ``function(old, *args)`` in the place of ``seam(*args)``."""
        return functools.partial(self._patch, _seam_of(seam), False)

    def replaces(self, seam: Callable[..., Any]) -> Callable[[Function], Function]:
        """Decorate what computes ``function(*args)`` in the place of ``seam(*args)``."""
        return functools.partial(self._patch, _seam_of(seam), True)

    def of(self, family: Callable[..., None], *args: Any, **options: Any) -> Callable[..., None]:
        """Decorate the function in which the faults of a family differ; the family patches."""
        return lambda function: family(self.says(function.__doc__), *args, function, **options)

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Make marref compute with this fault until the context ends; see `applied`."""
        return applied(self)

    def _patch(self, seam: Seam, replaces: bool, function: Function) -> Function:
        self.says(function.__doc__).patches.append(Patch(seam, function, replaces))
        return function


class Stage(list[Fault]):
    """The faults of one stage of the pipeline; called with a name, it adds one."""

    def __call__(self, name: str) -> Fault:
        """Add a fault, without summary and patches yet."""
        self.append(Fault(name))
        return self[-1]


def compatible(*faults: Fault) -> bool:
    """Whether faults can be applied together: no two replace one seam, or make one setting."""
    different = dict.fromkeys(faults)
    patches = [patch for fault in different for patch in fault.patches]
    replaced = [patch.seam for patch in patches if patch.replaces]
    settings = [fault.setting for fault in different if fault.setting]
    return len(set(replaced)) == len(replaced) and len(set(settings)) == len(settings)


@contextlib.contextmanager
def applied(*faults: Fault) -> Iterator[None]:
    """Make marref compute with all the given faults until the context ends.

    They add to those that are applied here already; one that is applied twice acts once.  They act
    in this thread and in those that marref starts for it, in no other.  They are in the definition,
    by which all of `marref.fast` computes meanwhile.

    Parameters
    ----------
    *faults : Fault

    Raises
    ------
    ValueError
        Two of the faults replace the same function or make the same setting; see `compatible`.
    """
    together = {**_faults_here(), **dict.fromkeys(faults)}
    if not compatible(*together):
        names = ", ".join(fault.name for fault in together if fault is not _BY_DEFINITION)
        raise ValueError(
            f"faults: {names} exclude each other: two replace one function or make one setting"
        )
    key = object()
    try:
        with _lock:
            _applied[key] = (_BY_DEFINITION, *faults)
            _set_code()
        _keys.set((*_keys.get(), key))
        yield
    finally:
        with _lock:
            _applied.pop(key, None)
            _set_code()
        _keys.set(tuple(key for key in _keys.get() if key in _applied))


# Reentrant: a context that nobody has ended ends when it is collected, which can be at any time.
_lock = threading.RLock()
_seams: dict[str, Seam] = {}
_applied: dict[object, tuple[Fault, ...]] = {}
_keys: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar("faults", default=())


def dispatch(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute what the seam of that name is in this context; called by its stand-in."""
    seam = _seams[name]
    patches = [patch for fault in _faults_here() for patch in fault.patches if patch.seam is seam]
    function: Callable[..., Any] = seam.pristine
    # Replacements first, so that wraps go around them.
    for patch in sorted(patches, key=lambda patch: not patch.replaces):
        function = patch.function if patch.replaces else functools.partial(patch.function, function)
    return function(*args, **options)


def _faults_here() -> dict[Fault, None]:
    return dict.fromkeys(fault for key in _keys.get() for fault in _applied.get(key, ()))


def _set_code() -> None:
    """Give every seam its stand-in where anything applied needs it, else its own code.

    Derived from `_applied` anew each time: there is no count that could go wrong.
    """
    faults = [fault for faults in tuple(_applied.values()) for fault in faults]
    faulty = {patch.seam for fault in faults for patch in fault.patches}
    for seam in _seams.values():
        code = seam.stand_in if seam in faulty else seam.pristine.__code__
        if seam.function.__code__ is not code:
            seam.function.__code__ = code


def _seam_of(function: Callable[..., Any]) -> Seam:
    """Remember a function as it is before any fault."""
    if not isinstance(function, types.FunctionType) or function.__code__.co_freevars:
        raise TypeError(f"seam: received {function!r}, expected a function without free variables")
    name = f"{function.__module__}.{function.__qualname__}"
    with _lock:
        if name not in _seams:
            code, defaults = function.__code__, function.__defaults__
            pristine = types.FunctionType(code, function.__globals__, code.co_name, defaults)
            pristine.__kwdefaults__ = function.__kwdefaults__
            constants = (name if const == "seam" else const for const in _STAND_IN.co_consts)
            _seams[name] = Seam(function, pristine, _STAND_IN.replace(co_consts=tuple(constants)))
        return _seams[name]


def _stand_in(*args: Any, **options: Any) -> Any:
    # It runs with the globals of the seam's module: what it needs, it imports.
    from marref.verify.faults.fault import dispatch

    return dispatch("seam", args, options)


_STAND_IN = _stand_in.__code__
_BY_DEFINITION = Fault("by-definition", "A part of all that is applied.")


def _by_definition(fault: Fault, fast: Any, definition: Any) -> None:
    @fault.replaces(fast)
    def _(*args: Any, num_threads: Any = None, in_place: Any = False, **options: Any) -> Any:
        return definition(*args, **options)


_BY_DEFINITION.of(_by_definition, fast.loss_and_grads)(model.loss_and_grads)
_BY_DEFINITION.of(_by_definition, fast.iterative_decode)(decoding.iterative_decode)
_BY_DEFINITION.of(_by_definition, fast.adam_step)(optim.step)
_BY_DEFINITION.of(_by_definition, fast.logits)(model.MAR.__call__)
_BY_DEFINITION.of(_by_definition, fast_sampling.sample)(sampling.sample)


@_BY_DEFINITION.replaces(fast_training.loss_and_grads)
def _(
    model: Any, params: Any, images: Any, labels: Any, draws: Any, num_parts: int
) -> fast_training.Result:
    return fast_training.by_definition(model, params, images, labels, draws, slice(None))
