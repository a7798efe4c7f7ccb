"""Runs: training into a folder, from which it goes on bit for bit if it is stopped.

    config.json          every option, what the token ids mean, and which data it was
    history.csv          a line a step
    checkpoints/         the newest and the best; see `marref.training.checkpoints`
    loss.png             at the end, with the extra ``viz``

A step depends on the state before it and on its number (`marref.training.loop.step`), and a
checkpoint holds the whole state.  So a run that was killed at any moment and resumed ends with the
same parameters as one that never stopped.  Page: docs/training.md.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

import numpy as np

from marref import checks, data, files, trees
from marref.data import Classes, Dataset
from marref.model import MAR
from marref.training import checkpoints, loop
from marref.training.checkpoints import Checkpoint
from marref.training.config import AnyConfig, Config, as_told, from_told
from marref.training.loop import VALIDATION_RATIOS, RunRecord, State
from marref.training.ranks import ALONE, Ranks
from marref.trees import Array

if TYPE_CHECKING:
    from marref.continuous import ContinuousMAR
    from marref.continuous.run import RunRecord as ContinuousRunRecord

AnyRecord: TypeAlias = "RunRecord | ContinuousRunRecord"
"""What happened in a step of a run, of discrete MAR or of the continuous model."""

__all__ = [
    "VALIDATION_RATIOS",
    "AnyRecord",
    "Config",
    "Run",
    "RunRecord",
    "best",
    "classes_of",
    "read_dataset",
    "read_settings",
    "resume",
    "spread",
    "spread_index",
    "start",
]

FORMAT = "marref-run-1"
VALIDATION_SEQUENCES = 256
"""How many sequences at most it is computed over."""


class Run(NamedTuple):
    """A run at its end.

    Parameters
    ----------
    config : Config, or marref.continuous.run.RunConfig
        Resolved.
    model : MAR or ContinuousMAR
    state : State
        ``params``, ``optimiser``, ``average``, and ``averaged``, to sample with.
    history : list of RunRecord
    """

    config: AnyConfig
    model: "MAR | ContinuousMAR"
    state: State
    history: list[AnyRecord]


def start(
    dataset: Dataset,
    out: str | os.PathLike[str],
    config: "AnyConfig | None" = None,
    *,
    source: Sequence[str] | None = None,
    labels: str | None = None,
    on_step: Callable[[AnyRecord], None] | None = None,
    on_state: Callable[[AnyRecord, State], None] | None = None,
    processes: Ranks = ALONE,
) -> Run:
    """Train on a dataset into a new folder.

    Parameters
    ----------
    dataset : Dataset
        See `marref.data`.  With labels, the model has their classes.
    out : path
        Made if missing; must hold no run yet.
    config : Config, or marref.continuous.run.RunConfig, optional
        By default what `Config` says; with a `RunConfig` the continuous model is trained.
    source : sequence of str, optional
        Where the data lie; kept in config.json for `read_dataset`, and not compared.
    labels : str, optional
        Where the file of the labels lies, if there is one; see `marref.data.load`.  Kept too.
    on_step : callable, optional
        Called with the record of every step, as it ends; may raise KeyboardInterrupt to stop.
    on_state : callable, optional
        Called before ``on_step`` with the record and the `State`: parameters, moments, average.
        The next step writes over the arrays, so what is to be kept must be copied; to write to
        them is another training, which does not resume to the same.
    processes : Ranks
        Those that train together, all of which call this: `marref.training.ranks.world()` under
        ``mpiexec``.  The first writes the folder, and its history alone is whole after `resume`.
        An error in one must end all: see `Ranks.ending_together`.  What callbacks raise, they must
        raise in all.

    Returns
    -------
    Run

    Raises
    ------
    TypeError, ValueError
        The options do not fit the data or the processes, or the folder holds a run already.
    OSError
        Something cannot be written; the checkpoints before it are whole.
    FloatingPointError
        Training diverged; the message says what to change.
    KeyboardInterrupt, SystemExit
        SIGINT (Ctrl-C) or SIGTERM came, or ``on_step`` raised it: the step was ended and a
        checkpoint written, from which `resume` goes on.  A second signal stops at once.
    """
    loop.check_callbacks(on_step, on_state)
    job = _job(dataset, Path(out), (config or Config()).resolved(dataset), processes)
    # A process that cannot read its data fails before this, and leaves nothing of the run.
    processes.wait()
    if not processes.is_first:
        return _go_on(job, on_step, on_state)
    with _made(job), _alone(job.out):
        if job.settings.exists() or checkpoints.found(job.checkpoints):
            raise ValueError(f"{job.out}: holds a run already; resume it or choose another folder")
        with files.replacing(job.settings) as temporary:
            described = _described(job, dataset)
            if source is not None:
                described["source"] = list(source)
            if labels is not None:
                described["labels"] = labels
            temporary.write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        return _go_on(job, on_step, on_state)


def resume(
    out: str | os.PathLike[str],
    dataset: Dataset,
    *,
    on_step: Callable[[AnyRecord], None] | None = None,
    on_state: Callable[[AnyRecord, State], None] | None = None,
    processes: Ranks = ALONE,
) -> Run:
    """Go on with a run from its newest checkpoint, or from its start if there is none yet.

    Parameters
    ----------
    out : path
        The folder of `start`.
    dataset : Dataset
        The same data as at the start.
    on_step, on_state : callable, optional
        As in `start`.
    processes : Ranks
        As in `start`; with shards it may be another number of them.

    Returns
    -------
    Run
        The same, to the bit, as that of a run that never stopped, but for its
        ``tokens_per_second``: on the same machine, with the same versions of NumPy and SciPy.
        Without shards the number of threads (of the continuous model: of parts) is that of the
        start, whatever machine goes on, since it decides in which order numbers are added.  Of a
        run that had ended already, its result.

    Raises
    ------
    ValueError
        There is no run in the folder, the data are others, or all checkpoints are damaged.
    OSError, FloatingPointError, KeyboardInterrupt, SystemExit
        As in `start`.

    Warns
    -----
    RuntimeWarning
        The newest checkpoint is damaged, and the one before it is used.
    """
    loop.check_callbacks(on_step, on_state)
    settings = read_settings(out)
    job = _job(dataset, Path(out), from_told(settings), processes)
    for name, found in _described(job, dataset).items():
        # The options of a run are those that it was started with, and these alone.
        if name != "config" and found != settings.get(name):
            raise ValueError(
                f"dataset: its {name} is {found}, expected {settings.get(name)} as in the run"
            )
    if not processes.is_first:
        return _go_on(job, on_step, on_state)
    with _alone(job.out):
        return _go_on(job, on_step, on_state)


def read_settings(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's config.json.

    Parameters
    ----------
    out : path
        The folder of `start`.

    Returns
    -------
    dict
        ``config``, ``vocab_size``, ``codec``, ``data`` and, if they were told, ``source`` and
        ``labels``.  ``data`` has ``classes`` where there are labels: ``counts``, how many sequences
        each class has, and ``names``, or none.

    Raises
    ------
    ValueError
        The folder holds no run, or its config.json is damaged.
    """
    path = Path(out) / "config.json"
    if not path.exists():
        raise ValueError(f"{path.parent}: holds no run, since it has no {path.name}")
    files.regular(path)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON that can be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ValueError(f"{path}: is no {FORMAT}")
    for name in ("config", "codec", "data"):
        if not isinstance(settings.get(name), dict):
            raise ValueError(f"{path}: is damaged, expected {name} in it")
    checks.integer(f"{path}: length", settings["data"].get("length"), 1)
    return settings


def read_dataset(out: str | os.PathLike[str], source: Sequence[str] | None = None) -> data.Dataset:
    """Read data as those that a run was trained on: the same ids, in sequences of one length.

    Classes have the numbers that they have in the run; where it has none, labels are left out.

    Parameters
    ----------
    out : path
        The folder of `start`.
    source : sequence of str, optional
        See `marref.data.load`; by default that of the run.

    Returns
    -------
    marref.data.Dataset

    Raises
    ------
    OSError, TypeError, ValueError, ImportError
        There is no run, it does not say where its data lie, or they cannot be read.
    """
    settings = read_settings(out)
    labels = None if source else settings.get("labels")
    source = source or settings.get("source")
    if not source:
        raise ValueError(f"{os.fspath(out)}: does not say where its data lie, expected them named")
    dataset = data.load(
        source[0] if len(source) == 1 else source,
        codec=data.codec_from_dict(settings["codec"]),
        length=settings["data"]["length"],
        labels=labels,
    )
    classes = classes_of(settings)
    return dataset.without_labels() if classes is None else dataset.with_classes(classes)


def classes_of(settings: dict[str, Any]) -> Classes | None:
    """Return the classes of a run, from what `read_settings` read; ``None`` where it has none."""
    told = settings["data"].get("classes")
    if told is None:
        return None
    try:
        names = None if told["names"] is None else tuple(map(str, told["names"]))
        return Classes(tuple(map(int, told["counts"])), names)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config.json: data: classes: is damaged ({error})") from error


def best(out: str | os.PathLike[str]) -> Checkpoint:
    """Read the checkpoint of a run to sample with.

    Parameters
    ----------
    out : path
        The folder of `start`.

    Returns
    -------
    Checkpoint
        The best by validation; the newest where none was validated or the best is damaged.

    Raises
    ------
    ValueError
        There is no run, no checkpoint yet, or all are damaged.

    Warns
    -----
    RuntimeWarning
        A checkpoint is damaged, and another is used.
    """
    settings = read_settings(out)
    folder = Path(out) / "checkpoints"
    found = checkpoints.found(folder)
    if not found:
        raise ValueError(f"{os.fspath(out)}: has no checkpoint yet")
    history = _read_history(
        Path(out) / "history.csv", max(found), _loop(from_told(settings)).RunRecord
    )
    step = _best([record for record in history if record.step in found])
    if step is not None:
        try:
            return checkpoints.load(found[step])
        except ValueError as error:
            warnings.warn(f"{error}; using the newest", RuntimeWarning, stacklevel=2)
    newest = checkpoints.latest(folder)
    assert newest is not None
    return newest


def spread(dataset: Dataset, count: int) -> Array:
    """Take sequences that are evenly spread over the data.

    Parameters
    ----------
    dataset : Dataset
    count : int
        At most; all if there are fewer.

    Returns
    -------
    int64 array [count, length]
    """
    return dataset.rows(spread_index(dataset, count))


def spread_index(dataset: Dataset, count: int) -> Array:
    """Return which sequences `spread` takes."""
    places = np.linspace(0, len(dataset) - 1, min(len(dataset), count))
    return places.astype(np.int64)


class _Job(NamedTuple):
    """What does not change during a run.

    ``held_out`` are data, and which of them to validate with; ``loop`` is the module that takes the
    steps.
    """

    out: Path
    config: AnyConfig
    model: "MAR | ContinuousMAR"
    train: Dataset
    held_out: tuple[Dataset, Array] | None
    codec: dict[str, Any]
    vocab_size: int
    loop: Any
    processes: Ranks

    @property
    def settings(self) -> Path:
        return self.out / "config.json"

    @property
    def history(self) -> Path:
        return self.out / "history.csv"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def _loop(config: AnyConfig) -> Any:
    """Return the module whose functions train with a config."""
    if isinstance(config, Config):
        return loop
    from marref.continuous import run  # which imports this package

    return run


def _job(dataset: Dataset, out: Path, config: AnyConfig, processes: Ranks) -> _Job:
    if processes.count > (config.num_shards or 1):
        raise ValueError(
            f"num_shards: received {config.num_shards}, expected at least as many as there are "
            f"processes, {processes.count}"
        )
    model = config.model(dataset.vocab_size, dataset.num_classes)
    train, held_out = dataset, None
    if config.validation_fraction:
        train, validation = dataset.split(config.validation_fraction, config.seed)
        held_out = validation, spread_index(validation, VALIDATION_SEQUENCES)
    codec = dataset.codec.as_dict()
    size = dataset.vocab_size
    return _Job(out, config, model, train, held_out, codec, size, _loop(config), processes)


def _described(job: _Job, dataset: Dataset) -> dict[str, Any]:
    """Describe a run as config.json holds it: what must be the same when it goes on."""
    sample = spread(dataset, 64)
    data: dict[str, Any] = {
        "count": len(dataset),
        "length": dataset.length,
        "checksum": zlib.crc32(sample.astype("<i8").tobytes()),
    }
    if dataset.labels is not None:
        data["classes"] = {
            "names": None if dataset.class_names is None else list(dataset.class_names),
            "counts": np.bincount(dataset.labels, minlength=job.model.num_classes or 0).tolist(),
            "checksum": zlib.crc32(dataset.labels.astype("<i8").tobytes()),
        }
    return {
        "format": FORMAT,
        **as_told(job.config),
        "vocab_size": dataset.vocab_size,
        "codec": job.codec,
        "data": data,
    }


def _go_on(
    job: _Job,
    on_step: Callable[[AnyRecord], None] | None,
    on_state: Callable[[AnyRecord, State], None] | None,
) -> Run:
    """Train from the newest checkpoint to the end."""
    processes = job.processes
    if processes.is_first:
        first, state, history = _where_it_stands(job)
    else:
        first, state, history = 0, job.loop.init(job.config, job.model), []
    first = int(processes.told(first))
    processes.copy(state._asdict())
    with _signals() as received:
        for number in range(first, job.config.num_steps):
            with _advice(job):
                state, record = _step(job, state, number)
                history.append(record)
                if processes.is_first:
                    _append(job.history, record)
                saved = processes.told(_is_due(job.config, history)) == 1.0
                if saved:
                    _save(job, state, history)
            try:
                if on_state is not None:
                    on_state(record, state)
                if on_step is not None:
                    on_step(record)
                _stop_if_asked(processes.agreed(received), record.step)
            except (KeyboardInterrupt, SystemExit):
                if not saved and processes.acts_with_all:
                    _save(job, state, history)
                raise
    if processes.is_first and importlib.util.find_spec("matplotlib"):
        from marref import plots

        plots.loss(job.out / "loss.png", history, *job.loop.PLOTTED)
    return Run(job.config, job.model, state, history)


def _where_it_stands(job: _Job) -> tuple[int, State, list[AnyRecord]]:
    """Read how many steps a folder holds, and what is known after them; clean it up."""
    for folder in (job.out, job.checkpoints):
        files.remove_stale(folder)
    newest = checkpoints.latest(job.checkpoints)
    first = 0 if newest is None else newest.step
    checkpoints.remove_after(job.checkpoints, first)
    state = job.loop.init(job.config, job.model) if newest is None else newest.state
    history = _shortened_history(job.history, first, job.loop.RunRecord)
    # A kill may have come between a checkpoint and the removal of an old one.
    checkpoints.clean(job.checkpoints, job.config.keep, best=_best(history))
    return first, state, history


def _step(job: _Job, state: State, number: int) -> tuple[State, AnyRecord]:
    """Take a step, and validate where that is due."""
    processes = job.processes
    state, record = job.loop.step(job.config, job.model, job.train, state, number, processes)
    measured = None
    if job.held_out is not None and _is_multiple(job.config, number + 1, "validate_every"):
        measured = math.nan
        if processes.is_first:
            measured = job.loop.validation(job.config, job.model, *job.held_out, state)
        measured = processes.told(measured)
    return state, job.loop.RunRecord(*dataclasses.astuple(record), measured)


def _is_multiple(config: AnyConfig, step: int, option: str) -> bool:
    """Whether a step is the last, or a multiple of what an option says."""
    return step == config.num_steps or step % getattr(config, option) == 0


def _is_due(config: AnyConfig, history: list[AnyRecord]) -> bool:
    """Whether a checkpoint is: every so often, at the end, and of what is best so far."""
    record = history[-1]
    is_best = record.validation is not None and record.step == _best(history)
    return is_best or _is_multiple(config, record.step, "checkpoint_every")


def _best(history: list[AnyRecord]) -> int | None:
    """Return the step of the best validation, the first of equals."""
    validated = [
        (record.validation, record.step) for record in history if record.validation is not None
    ]
    return min(validated)[1] if validated else None


def _save(job: _Job, state: State, history: list[AnyRecord]) -> None:
    """Write a checkpoint after the lines of the history that lead to it; remove old ones.

    The first of several processes does, once all have the same.
    """
    job.processes.check_equal("state", state._asdict())
    if not job.processes.is_first:
        return
    for name, leaf in trees.flatten(state.params).items():
        checks.finite(name, leaf)
    with files.naming(job.history):
        files.sync(job.history)
    step = history[-1].step
    sizes = job.vocab_size, job.codec, job.model.num_classes
    checkpoints.save(job.checkpoints, Checkpoint(step, state, job.config, *sizes))
    checkpoints.clean(job.checkpoints, job.config.keep, best=_best(history))


@contextlib.contextmanager
def _advice(job: _Job) -> Iterator[None]:
    """Say of a run that diverged what to change, and where it was still good."""
    try:
        yield
    except (FloatingPointError, checks.NotFinite) as error:
        steps = checkpoints.found(job.checkpoints)
        good = f"the last good checkpoint is {steps[max(steps)]}" if steps else "no checkpoint yet"
        config = job.config
        raise FloatingPointError(
            f"{error}; {good}; start anew with a lower learning_rate (it was "
            f"{config.learning_rate:.3g}), more warmup_steps ({config.warmup_steps}) or a lower "
            f"max_norm ({config.max_norm:g})"
        ) from error


@contextlib.contextmanager
def _made(job: _Job) -> Iterator[None]:
    """Make a run's folders; where an error comes before its first step, leave nothing of it."""
    folders = (job.checkpoints, job.out, *job.out.parents)
    missing = [folder for folder in folders if not folder.exists()]
    is_new = not job.settings.exists() and not checkpoints.found(job.checkpoints)
    try:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        yield
    except Exception:
        with contextlib.suppress(
            OSError, ValueError
        ):  # what cannot be removed is not what went wrong
            if is_new and not _read_history(job.history, 1, job.loop.RunRecord):
                for path in (job.settings, job.history):
                    path.unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let no other process train into the folder."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(out))
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is training into it") from error
        yield


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop; the second one stops at once.

    Only the main thread may; elsewhere signals do what they did.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # What is ignored, as under nohup, stays ignored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_if_asked(received: list[int], step: int) -> None:
    if signal.SIGTERM in received:
        raise SystemExit(128 + signal.SIGTERM)
    if received:
        raise KeyboardInterrupt(f"stopped after step {step}, from which resume goes on")


def _read_history(path: Path, last: int, kind: type[Any]) -> list[AnyRecord]:
    """Read the history up to a step, in records of a kind."""
    if not path.exists():
        return []
    with files.regular(path).open(encoding="utf-8", errors="replace", newline="") as file:
        return list(_records(file, last, kind))


def _shortened_history(path: Path, last: int, kind: type[Any]) -> list[AnyRecord]:
    """Read the history up to a step, and cut off what is behind it."""
    records = _read_history(path, last, kind)
    if last and (not records or records[-1].step < last):
        known = records[-1].step if records else 0
        warnings.warn(
            f"{path}: cannot be read after step {known} of {last}; the lines behind it are lost",
            RuntimeWarning,
            stacklevel=2,
        )
    columns = [field.name for field in dataclasses.fields(kind)]
    lines = [_line(columns), *(_line(dataclasses.astuple(record)) for record in records)]
    with files.replacing(path) as temporary:
        temporary.write_text("".join(lines), "utf-8", newline="")
    return records


def _records(file: TextIO, last: int, kind: type[Any]) -> Iterator[AnyRecord]:
    """Read lines up to a step, or to the first that was not written whole."""
    next(file, None)
    columns = len(dataclasses.fields(kind))
    for line in file:
        values = line.rstrip("\n").split(",")
        if len(values) != columns:
            return
        step, *numbers, measured = values
        try:
            validation = float(measured) if measured else None
            record = kind(int(step), *map(float, numbers), validation)
        except ValueError:
            return
        if record.step > last:
            return
        yield record


def _append(path: Path, record: AnyRecord) -> None:
    """Add a line at once, so that a kill leaves whole lines."""
    with files.naming(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(_line(dataclasses.astuple(record)))


def _line(values: Iterable[Any]) -> str:
    return ",".join("" if value is None else str(value) for value in values) + "\n"
