"""The model forward without dropout, at the positions that are wanted, shared among threads.

Nothing is kept for a backward pass.  The head and, in the last block, the queries and the
feed-forward layer are computed at the wanted positions only.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marref.fast import block, kernels, memory, parallel
from marref.fast.block import Rows, rows_of
from marref.fast.kernels import linear, normalise, remove_mean
from marref.fast.packed import Packed, after_norm, pack
from marref.model import MAR, check_model
from marref.positions import sinusoidal_table
from marref.trees import Array, Tree


def logits(
    model: MAR,
    params: Tree,
    tokens: npt.ArrayLike,
    labels: npt.ArrayLike | None = None,
    *,
    num_threads: int | None = None,
) -> Array:
    """Compute the logits of all positions, without dropout.

    Equal to ``model(params, tokens, labels)``, its definition, up to rounding.

    Parameters
    ----------
    model : MAR
    params : dict
    tokens : integer array [batch, length]
    labels : integer array [batch], optional
        See `MAR.forward`.
    num_threads : int, optional
        As in `marref.iterative_decode`.

    Returns
    -------
    array [batch, length, vocab_size]

    Raises
    ------
    TypeError, ValueError
        See `MAR.forward`.
    """
    check_model(model)
    tokens = model.check_inputs(params, tokens)
    labels = model.check_labels(labels, len(tokens))
    num_threads = parallel.choose(
        num_threads, tokens.size * model.embed_dim, parallel.FEATURES_WORTH_A_THREAD
    )
    dtype = params["head"]["bias"].dtype
    if dtype.kind == "c":
        return model(params, tokens, labels)
    memory.keep_by_default()
    with parallel.threads(num_threads) as run:
        work = prepare(run, model, params, tokens.shape[1])
        members = split_up(run, work, tokens, labels, np.ones(tokens.shape, bool))
        parts = run(functools.partial(_logits_of_member, work), members)
    return np.concatenate(parts).reshape(*tokens.shape, model.vocab_size)


class Work(NamedTuple):
    """The model ready to be run; ``head`` is kernel and bias behind the final norm.

    ``class_table`` is ``None`` where the model has no classes.
    """

    model: MAR
    table: Array
    class_table: Array | None
    positions: Array
    blocks: list[Packed]
    head: tuple[Array, Array]


def prepare(run: parallel.Run, model: MAR, params: Tree, length: int) -> Work:
    """Pack the parameters, once for many passes."""
    table = params["embedding"]["table"]
    positions = sinusoidal_table(length, model.embed_dim, model.positions)
    of_block = functools.partial(pack, num_heads=model.num_heads, centre=True)
    head = after_norm(params["final_norm"], params["head"], 1.0)
    class_table = params["class_embedding"]["table"] if model.num_classes is not None else None
    blocks = run(of_block, params["blocks"])
    return Work(model, table, class_table, positions.astype(table.dtype), blocks, head)


class _Team:
    """Some sequences, whose positions are shared by one or several members.

    Parameters
    ----------
    work : Work
    tokens, wanted : arrays [batch, length]
    labels : array [batch] or None
    num_members : int
    """

    def __init__(
        self, work: Work, tokens: Array, labels: Array | None, wanted: Array, num_members: int
    ) -> None:
        self.tokens, self.labels = tokens, labels
        self.rows, self.num_members = rows_of(wanted), num_members
        if num_members > 1:
            shape = len(work.blocks), *tokens.shape, 3 * work.model.embed_dim
            self._shown = np.empty(shape, work.table.dtype)
            self._barrier = threading.Barrier(num_members)

    def show(self, layer: int, positions: slice, x: Array) -> Array:
        """Show the other members what a block has at some positions, and wait for theirs.

        x [batch·positions, features] -> that of all positions [batch·length, features].
        """
        if self.num_members == 1:
            return x
        whole: Array = self._shown[layer]
        whole[:, positions] = x.reshape(len(whole), -1, x.shape[1])
        self._barrier.wait()
        return whole.reshape(-1, x.shape[1])

    def give_up(self) -> None:
        """Let no member wait for one that failed."""
        if self.num_members > 1:
            self._barrier.abort()


class Member:
    """One member of a team: its positions, and of the rectangle of the last block its columns."""

    def __init__(self, team: _Team, number: int) -> None:
        def part(length: int) -> slice:
            parts = parallel.split(length, team.num_members)
            return parts[number] if number < len(parts) else slice(0)

        columns = part(team.rows.wanted.shape[1])
        self.team = team
        self.positions = part(team.tokens.shape[1])
        self.rows = Rows(team.rows.rectangle[:, columns], team.rows.wanted[:, columns])


def split_up(
    run: parallel.Run, work: Work, tokens: Array, labels: Array | None, wanted: Array
) -> list[Member]:
    """Share sequences among threads or, if there are fewer, the positions of each.

    Parameters
    ----------
    run : Run
    work : Work
    tokens : integer array [batch, length]
    labels : integer array [batch] or None
        ``None`` where the model has no classes.
    wanted : bool array [batch, length]

    Returns
    -------
    list of Member
        Their wanted positions, one member after the other, are all wanted positions in order.
    """
    sequences = parallel.split(len(tokens), run.num_threads)
    num_members = min(run.num_threads // len(sequences), tokens.shape[1])
    teams = [
        _Team(
            work, tokens[part], None if labels is None else labels[part], wanted[part], num_members
        )
        for part in sequences
    ]
    return [Member(team, number) for team in teams for number in range(num_members)]


def encode(work: Work, member: Member) -> Array | None:
    """Run everything below the head, the final norm without scale and bias included.

    Returns
    -------
    array [wanted positions, embed_dim], or None
        Of the member's wanted positions; ``None`` where another member failed, whose error is the
        one to be seen.
    """
    try:
        return normalise(_encode(work, member), work.model.layer_norm_epsilon)[0]
    except threading.BrokenBarrierError:
        return None
    except BaseException:
        member.team.give_up()
        raise


def head(work: Work, normal: Array, use: Callable[[Array, slice], Any]) -> list[Any]:
    """Run the head, at a few positions at a time: logits are large.

    Parameters
    ----------
    work : Work
    normal : array [positions, embed_dim]
        From `encode`.
    use : callable
        Takes the logits of some positions, and which.

    Returns
    -------
    list
        What ``use`` returned.
    """
    kernel, bias = work.head
    num_parts = math.ceil(len(normal) * len(bias) / kernels.LOGITS_AT_ONCE)
    parts = parallel.split(len(normal), num_parts)
    return [use(linear(normal[part], kernel, bias), part) for part in parts]


def _logits_of_member(work: Work, member: Member) -> Array:
    normal = encode(work, member)
    if normal is None:
        return np.empty((0, work.model.vocab_size))
    return np.concatenate(head(work, normal, lambda logits, _: logits))


def _encode(work: Work, member: Member) -> Array:
    """Do as `encode`; raise BrokenBarrierError where another member failed."""
    team, positions, rows = member.team, member.positions, member.rows
    features, epsilon = work.model.embed_dim, work.model.layer_norm_epsilon
    batch = len(team.tokens)
    x = work.table[team.tokens[:, positions]]
    x += work.positions[positions]
    if work.class_table is not None:
        x += work.class_table[team.labels][:, np.newaxis]
    x = remove_mean(x.reshape(-1, features))
    *others, last = work.blocks
    for layer, packed in enumerate(others):
        qkv = linear(normalise(x, epsilon)[0], packed.qkv_kernel, packed.qkv_bias)
        whole = team.show(layer, positions, qkv)
        context = block.attended(work.model, batch, qkv[:, :features], whole[:, features:])
        x = block.finished(work.model, packed, x, context)

    key_value = block.key_value_of(work.model, last, x)
    if team.num_members > 1:
        whole = team.show(len(others), positions, np.concatenate([x, key_value], axis=1))
        x, key_value = whole[:, :features], whole[:, features:]
    return block.passed_at(work.model, last, x, key_value, batch, rows)
