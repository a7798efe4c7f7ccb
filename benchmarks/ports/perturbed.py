"""Programs that are wrong in a way that no catalogue knows: at a random place, by a random size.

A kind draws a `Perturbation`: a class to be mixed into `TorchPort`, from which all that follows is
PyTorch's and autograd's, and what a true sentence about the first array that differs may say.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ports.in_torch import TorchPort

Verdict = Callable[[str], bool | None]
"""Whether a sentence is true; None if that cannot be told."""

PARTS = ("query", "key", "value")
KERNELS = (
    *(f"attention.{part}" for part in (*PARTS, "output")),
    "feed_forward.up",
    "feed_forward.down",
)
ACTIVATIONS = (
    "attention_norm",
    *(f"attention.{part}" for part in (*PARTS, "context", "output")),
    "feed_forward_norm",
    "feed_forward.up",
    "feed_forward.activation",
    "feed_forward.down",
    "output",
)
STREAM = ("attention_norm", "attention.output", "feed_forward_norm", "feed_forward.down", "output")


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A wrong program, and what is true of it.

    Parameters
    ----------
    program : type
        To be mixed into `TorchPort`.
    place : str
        Where it is wrong, and by how much, for the reader.
    truth : callable
    """

    program: type
    place: str
    truth: Verdict


class Draw:
    """Draws from a model's hyper-parameters, by a random generator."""

    def __init__(self, config: Mapping[str, Any], seed: list[int]) -> None:
        self.config, self.rng = config, np.random.default_rng(seed)

    def one(self, options: Any) -> Any:
        """Draw one of some options."""
        return options[self.rng.integers(len(options))]

    def block(self) -> str:
        """Draw a block."""
        return f"blocks.{self.rng.integers(self.config['num_layers'])}"

    def activation(self, names: tuple[str, ...] = ACTIVATIONS) -> str:
        """Draw an activation of any block."""
        return f"{self.block()}.{self.one(names)}"

    def kernel(self, names: tuple[str, ...] = KERNELS) -> str:
        """Draw a linear layer of any block."""
        return f"{self.block()}.{self.one(names)}"

    def factor(self) -> float:
        """Draw a factor that is nobody's."""
        return float(round(self.one((1.0, -1.0, 1.0)) * self.rng.uniform(0.55, 0.95), 3))

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Draw normal numbers."""
        return torch.from_numpy(self.rng.normal(size=shape))


Kind = Callable[[Draw], Perturbation]

KINDS: dict[str, Kind] = {}
"""By name."""
NEEDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {}
"""What a model must have for a kind to be one."""


def kind(name: str, needs: Callable[[Mapping[str, Any]], bool] = lambda config: True) -> Any:
    """Enter a kind under a name."""

    def enter(draw: Kind) -> Kind:
        KINDS[name], NEEDS[name] = draw, needs
        return draw

    return enter


def says(pattern: str) -> Verdict:
    """Accept sentences that match."""
    return lambda sentence: True if re.search(pattern, sentence, re.IGNORECASE) else None


def says_factor(factor: float) -> Verdict:
    """Accept sentences with that factor, or its inverse; refuse those with another one."""

    def verdict(sentence: str) -> bool | None:
        numbers = [float(x) for x in re.findall(r"[-−]?\d+\.?\d*(?:e[-+]?\d+)?", sentence)]
        near = any(
            math.isclose(number, right, rel_tol=0.02)
            for number in numbers
            for right in (factor, 1 / factor)
        )
        return True if near else (False if re.search("times|factor|·", sentence) else None)

    return verdict


# Ways to get something wrong.


def tapped(place: str, change: Callable[[Tensor], Tensor]) -> type:
    """Change one activation, and all that follows."""

    class Tapped(TorchPort):
        def tap(self, name: str, x: Tensor) -> Tensor:
            return super().tap(name, change(x) if name == place else x)

    return Tapped


def weighted(change: Callable[[TorchPort, str, Tensor], Tensor]) -> type:
    """Use other parameters than were loaded."""

    class Weighted(TorchPort):
        def weight(self, name: str) -> Tensor:
            return change(self, name, super().weight(name))

    return Weighted


def one_weight(place: str, change: Callable[[Tensor], Tensor]) -> type:
    """Use one parameter otherwise than it was loaded."""
    return weighted(lambda port, name, x: change(x) if name == place else x)


def renamed(rename: Callable[[str], str]) -> type:
    """Use each parameter under the name that ``rename`` gives."""
    return overriding(stored=lambda port, name: rename(name))


def swapped(one: str, other: str) -> type:
    """Swap what two prefixes of names begin."""

    def rename(name: str) -> str:
        for old, new in ((one, other), (other, one)):
            if name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return name

    return renamed(rename)


def overriding(**methods: Any) -> type:
    """Override some methods, or settings, of the port."""
    return type("Overriding", (TorchPort,), methods)


def with_gradients(change: Callable[[TorchPort], None]) -> type:
    """Change gradients after the backward pass."""
    return overriding(change_gradients=change)


def one_gradient(place: str, change: Callable[[Tensor], Tensor]) -> type:
    """Change one gradient after the backward pass."""

    def change_gradients(port: TorchPort) -> None:
        param = port.params[place]
        param.grad = change(param.grad).contiguous()

    return with_gradients(change_gradients)


# Activations.

for _name in ("embedding", "final_norm", "logits"):

    @kind(f"{_name}-scaled")
    def _(draw: Draw, name: str = _name) -> Perturbation:
        factor = draw.factor()
        return Perturbation(
            tapped(name, lambda x: factor * x), f"{name} x {factor}", says_factor(factor)
        )


for _name in ACTIVATIONS:

    @kind(f"{_name}-scaled")
    def _(draw: Draw, name: str = _name) -> Perturbation:
        place, factor = f"{draw.block()}.{name}", draw.factor()
        return Perturbation(
            tapped(place, lambda x: factor * x), f"{place} x {factor}", says_factor(factor)
        )


@kind("offset")
def _(draw: Draw) -> Perturbation:
    place, offset = draw.activation(), draw.factor()
    changed = tapped(place, lambda x: x + offset)
    return Perturbation(changed, f"{place} + {offset}", says("constant|offset|added|plus|[+]"))


@kind("offset-by-feature")
def _(draw: Draw) -> Perturbation:
    place, vector = draw.activation(STREAM), draw.tensor((draw.config["embed_dim"],))
    changed = tapped(place, lambda x: x + vector.to(x.dtype))
    return Perturbation(changed, place, says("vector|per feature|each feature|bias|every position"))


@kind("offset-by-position")
def _(draw: Draw) -> Perturbation:
    place, vector = draw.activation(STREAM), draw.tensor((draw.config["seq_len"], 1))
    changed = tapped(place, lambda x: x + vector.to(x.dtype))
    return Perturbation(changed, place, says("per position|each position|position"))


@kind("features-scaled-apart")
def _(draw: Draw) -> Perturbation:
    place, vector = draw.activation(STREAM), draw.tensor((draw.config["embed_dim"],)).exp()
    changed = tapped(place, lambda x: x * vector.to(x.dtype))
    return Perturbation(changed, place, says("feature"))


@kind("features-permuted")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(STREAM)
    order = torch.from_numpy(draw.rng.permutation(draw.config["embed_dim"]))
    return Perturbation(tapped(place, lambda x: x[..., order]), place, says("permut|order|rolled"))


@kind("features-rolled")
def _(draw: Draw) -> Perturbation:
    place = draw.activation()
    return Perturbation(tapped(place, lambda x: x.roll(1, -1)), place, says("roll|permut|shift"))


@kind("features-reversed")
def _(draw: Draw) -> Perturbation:
    place = draw.activation()
    return Perturbation(tapped(place, lambda x: x.flip(-1)), place, says("revers|permut|order"))


def has_heads(config: Mapping[str, Any]) -> bool:
    """Whether there are several heads."""
    return config["num_heads"] > 1


@kind("heads-rolled", has_heads)
def _(draw: Draw) -> Perturbation:
    place = draw.activation(tuple(f"attention.{part}" for part in PARTS))
    return Perturbation(tapped(place, lambda x: x.roll(1, 1)), place, says("head"))


@kind("head-zeroed", has_heads)
def _(draw: Draw) -> Perturbation:
    place = draw.activation(tuple(f"attention.{part}" for part in PARTS))
    head = int(draw.rng.integers(draw.config["num_heads"]))
    keep = torch.ones(draw.config["num_heads"], 1, 1, dtype=torch.bool)
    keep[head] = False
    changed = tapped(place, lambda x: x.masked_fill(~keep, 0.0))
    return Perturbation(changed, f"{place} head {head}", says(f"head.*{head}|only"))


@kind("positions-rolled")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(STREAM)
    return Perturbation(tapped(place, lambda x: x.roll(1, 1)), place, says("position|roll|permut"))


@kind("positions-reversed")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(STREAM)
    return Perturbation(tapped(place, lambda x: x.flip(1)), place, says("position|revers|permut"))


@kind("batch-rolled")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(STREAM)
    changed = tapped(place, lambda x: x.roll(1, 0))
    return Perturbation(changed, place, says("batch|sequence|permut|roll"))


@kind("one-position-zero")
def _(draw: Draw) -> Perturbation:
    place, position = draw.activation(STREAM), int(draw.rng.integers(draw.config["seq_len"]))
    keep = torch.ones(draw.config["seq_len"], 1, dtype=torch.bool)
    keep[position] = False
    changed = tapped(place, lambda x: x.masked_fill(~keep, 0.0))
    return Perturbation(changed, f"{place} at {position}", says("position"))


@kind("one-sequence-scaled")
def _(draw: Draw) -> Perturbation:
    place, factor = draw.activation(STREAM), draw.factor()
    rows = torch.tensor([1.0, factor, 1.0, 1.0]).view(4, 1, 1)
    changed = tapped(place, lambda x: x * (rows.to(x.dtype) if len(x) == 4 else 1.0))
    return Perturbation(changed, f"{place} x {factor}", says("sequence|batch"))


@kind("one-logit-off")
def _(draw: Draw) -> Perturbation:
    off = torch.zeros(draw.config["seq_len"], draw.config["vocab_size"])
    off[-1, -1] = float(draw.rng.uniform(1e-3, 1.0))
    return Perturbation(tapped("logits", lambda x: x + off), "the last", says("only|position|id"))


@kind("logits-clamped")
def _(draw: Draw) -> Perturbation:
    bound = float(round(draw.rng.uniform(0.3, 1.0), 2))
    changed = tapped("logits", lambda x: x.clamp(-bound, bound))
    return Perturbation(changed, f"to {bound}", says("clip|clamp|bound|only"))


@kind("dropout-at-one-place")
def _(draw: Draw) -> Perturbation:
    place, rate = draw.activation(STREAM), float(round(draw.rng.uniform(0.05, 0.3), 2))
    shape = (4, draw.config["seq_len"], draw.config["embed_dim"])
    keep = torch.from_numpy(draw.rng.random(shape) >= rate)
    changed = tapped(place, lambda x: x * keep[: len(x)] / (1 - rate))
    return Perturbation(changed, f"{place}, rate {rate}", says("dropout|zero|0"))


@kind("unscaled-dropout-at-one-place")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(STREAM)
    shape = (4, draw.config["seq_len"], draw.config["embed_dim"])
    keep = torch.from_numpy(draw.rng.random(shape) >= 0.2)
    return Perturbation(
        tapped(place, lambda x: x * keep[: len(x)]), place, says("dropout|zero|some|only")
    )


@kind("detached-between-blocks")
def _(draw: Draw) -> Perturbation:
    place = draw.activation(("output", "attention.output", "feed_forward.down"))
    return Perturbation(tapped(place, Tensor.detach), place, says("zero|0|gradient"))


# Parameters.


@kind("one-kernel-transposed")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel(KERNELS[:4])
    return Perturbation(one_weight(f"{place}.kernel", lambda x: x.T), place, says("transpos"))


@kind("one-kernel-scaled")
def _(draw: Draw) -> Perturbation:
    place, factor = draw.kernel(), draw.factor()
    changed = one_weight(f"{place}.kernel", lambda x: factor * x)
    return Perturbation(changed, f"{place} x {factor}", says("kernel|times|factor"))


@kind("one-kernel-rolled")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel()
    changed = one_weight(f"{place}.kernel", lambda x: x.roll(1, 1))
    return Perturbation(changed, place, says("kernel|roll|permut"))


@kind("kernel-row-zeroed")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel()
    changed = one_weight(f"{place}.kernel", lambda x: F.pad(x[1:], (0, 0, 1, 0)))
    return Perturbation(changed, place, says("kernel|row|feature"))


@kind("one-bias-doubled")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel()
    return Perturbation(one_weight(f"{place}.bias", lambda x: 2 * x), place, says("bias"))


@kind("one-bias-negated")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel()
    return Perturbation(one_weight(f"{place}.bias", lambda x: -x), place, says("bias"))


@kind("one-bias-missing")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel(("attention.query", "attention.value", "feed_forward.up"))
    return Perturbation(one_weight(f"{place}.bias", torch.zeros_like), place, says("bias"))


@kind("head-bias-doubled")
def _(draw: Draw) -> Perturbation:
    return Perturbation(one_weight("head.bias", lambda x: 2 * x), "head", says("bias"))


@kind("one-norm-without-scale")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel(("attention_norm", "feed_forward_norm"))
    return Perturbation(one_weight(f"{place}.scale", torch.ones_like), place, says("scale"))


@kind("one-norm-without-bias")
def _(draw: Draw) -> Perturbation:
    place = draw.kernel(("attention_norm", "feed_forward_norm"))
    return Perturbation(one_weight(f"{place}.bias", torch.zeros_like), place, says("bias"))


@kind("scale-plus-one")
def _(draw: Draw) -> Perturbation:
    changed = weighted(lambda port, name, x: 1 + x if name.endswith("norm.scale") else x)
    return Perturbation(changed, "all norms", says("scale"))


@kind("table-row-swapped")
def _(draw: Draw) -> Perturbation:
    order = torch.arange(draw.config["vocab_size"])
    order[:2] = torch.tensor([1, 0])
    changed = one_weight("embedding.table", lambda x: x[order])
    return Perturbation(changed, "rows 0 and 1", says("token|id|row|mask"))


def has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether there are several blocks."""
    return config["num_layers"] > 1


@kind("blocks-swapped", has_blocks)
def _(draw: Draw) -> Perturbation:
    return Perturbation(swapped("blocks.0", "blocks.1"), "0 and 1", says("block|blocks.1"))


@kind("block-repeated", has_blocks)
def _(draw: Draw) -> Perturbation:
    changed = renamed(lambda name: name.replace("blocks.1.", "blocks.0."))
    return Perturbation(changed, "0 is 1", says("block|blocks.0"))


@kind("query-and-value-swapped")
def _(draw: Draw) -> Perturbation:
    block = draw.block()
    changed = swapped(f"{block}.attention.query", f"{block}.attention.value")
    return Perturbation(changed, block, says("value"))


@kind("key-and-value-swapped")
def _(draw: Draw) -> Perturbation:
    block = draw.block()
    changed = swapped(f"{block}.attention.key", f"{block}.attention.value")
    return Perturbation(changed, block, says("value"))


@kind("norms-swapped")
def _(draw: Draw) -> Perturbation:
    block = draw.block()
    changed = swapped(f"{block}.attention_norm", f"{block}.feed_forward_norm")
    return Perturbation(changed, block, says("scale|bias|norm"))


@kind("final-norm-of-a-block")
def _(draw: Draw) -> Perturbation:
    block = draw.block()
    changed = renamed(lambda name: name.replace("final_norm", f"{block}.feed_forward_norm"))
    return Perturbation(changed, block, says("scale|bias|norm"))


@kind("value-without-kernel")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.block()}.attention.value"
    eye = torch.eye(draw.config["embed_dim"])
    return Perturbation(
        one_weight(f"{place}.kernel", lambda x: eye.to(x.dtype)), place, says("kernel|norm")
    )


# Tokens and positions.


@kind("positions-from-two")
def _(draw: Draw) -> Perturbation:
    def position_numbers(port: TorchPort, length: int) -> Tensor:
        return torch.arange(2, length + 2)

    changed = overriding(position_numbers=position_numbers)
    return Perturbation(changed, "", says("position"))


@kind("positions-stretched")
def _(draw: Draw) -> Perturbation:
    factor = abs(draw.factor())

    def position_numbers(port: TorchPort, length: int) -> Tensor:
        return factor * torch.arange(length, dtype=torch.float64)

    changed = overriding(position_numbers=position_numbers)
    return Perturbation(changed, f"x {factor}", says("position"))


@kind("positions-of-another-base", lambda config: config["embed_dim"] > 4)
def _(draw: Draw) -> Perturbation:
    base = float(draw.one((1000.0, 5000.0, 20000.0)))

    def frequencies(port: TorchPort, exponents: Tensor) -> Tensor:
        return base**-exponents

    return Perturbation(overriding(frequencies=frequencies), f"{base}", says("position|wave"))


@kind("positions-scaled")
def _(draw: Draw) -> Perturbation:
    factor = draw.factor()

    def positions(port: TorchPort, length: int) -> Tensor:
        return factor * TorchPort.positions(port, length)

    changed = overriding(positions=positions)
    return Perturbation(changed, f"x {factor}", says("position"))


@kind("tokens-rolled")
def _(draw: Draw) -> Perturbation:
    changed = overriding(rows=lambda port, tokens: tokens.roll(1, 1))
    return Perturbation(changed, "", says("position|token|roll"))


@kind("token-ids-off-by-one")
def _(draw: Draw) -> Perturbation:
    changed = overriding(rows=lambda port, tokens: (tokens + 1) % port.config["vocab_size"])
    return Perturbation(changed, "", says("token|id|row"))


@kind("tokens-scaled")
def _(draw: Draw) -> Perturbation:
    factor = draw.factor()

    def token_vectors(port: TorchPort, tokens: Tensor) -> Tensor:
        return factor * TorchPort.token_vectors(port, tokens)

    changed = overriding(token_vectors=token_vectors)
    return Perturbation(changed, f"x {factor}", says("token"))


# Norms, attention, activation, residuals.


@kind("epsilon-of-all")
def _(draw: Draw) -> Perturbation:
    epsilon = float(draw.one((3e-4, 2e-3, 1e-2)))
    return Perturbation(
        overriding(epsilon=lambda port: epsilon), f"{epsilon}", says("epsilon|factor")
    )


@kind("epsilon-of-one")
def _(draw: Draw) -> Perturbation:
    place = draw.one(("final_norm", draw.activation(("attention_norm", "feed_forward_norm"))))

    class Epsilon(TorchPort):
        current = ""

        def norm(self, name: str, x: Tensor) -> Tensor:
            self.current = name
            return super().norm(name, x)

        def epsilon(self) -> float:
            return 5e-3 if self.current == place else super().epsilon()

    return Perturbation(Epsilon, place, says("epsilon|factor"))


@kind("norm-by-mean-of-sizes")
def _(draw: Draw) -> Perturbation:
    def normalise(port: TorchPort, centred: Tensor, variance: Tensor) -> Tensor:
        return centred / (centred.abs().mean(-1, keepdim=True) + port.epsilon())

    return Perturbation(overriding(normalise=normalise), "", says("factor|position|norm"))


@kind("variance-over-n-plus-one")
def _(draw: Draw) -> Perturbation:
    def norm_variance(port: TorchPort, centred: Tensor) -> Tensor:
        return (centred**2).sum(-1, keepdim=True) / (centred.shape[-1] + 1)

    return Perturbation(overriding(norm_variance=norm_variance), "", says("variance|factor|times"))


@kind("final-norm-twice")
def _(draw: Draw) -> Perturbation:
    def final_norm(port: TorchPort, x: Tensor) -> Tensor:
        return port.norm("final_norm", port.norm("final_norm", x))

    return Perturbation(overriding(final_norm=final_norm), "", says("twice|norm"))


@kind("embedding-normalised")
def _(draw: Draw) -> Perturbation:
    def embedding(port: TorchPort, tokens: Tensor) -> Tensor:
        x = TorchPort.embedding(port, tokens)
        return F.layer_norm(x, x.shape[-1:])

    return Perturbation(overriding(embedding=embedding), "", says("norm"))


@kind("attention-temperature")
def _(draw: Draw) -> Perturbation:
    factor = abs(draw.factor())

    def scale(port: TorchPort, head_dim: int) -> float:
        return factor * head_dim**-0.5

    return Perturbation(overriding(scale=scale), f"x {factor}", says_factor(factor))


def _hiding(hide: Callable[[Tensor], Tensor]) -> type:
    """Hide some keys; ``hide`` takes ones [length, length]."""

    def softmax(port: TorchPort, scores: Tensor) -> Tensor:
        hidden = hide(torch.ones(scores.shape[-2:], dtype=torch.bool))
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    return overriding(softmax=softmax)


def is_long(config: Mapping[str, Any]) -> bool:
    """Whether shifts by 1 and by -1 differ."""
    return config["seq_len"] > 2


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "attention-window": lambda ones: ones.triu(2) | ones.tril(-2),
    "attention-to-the-right": lambda ones: ones.tril(-1),
    "attention-without-itself": lambda ones: ones.triu(0) & ones.tril(0),
    "attention-without-first-key": lambda ones: torch.arange(len(ones)).eq(0).expand_as(ones),
    "attention-causal-by-two": lambda ones: ones.triu(2),
}


for _name, _hide in HIDDEN.items():

    @kind(_name, is_long)
    def _(draw: Draw, hide: Any = _hide) -> Perturbation:
        return Perturbation(_hiding(hide), "", says("0|zero|hidden|mask|window|causal"))


@kind("attention-uniform")
def _(draw: Draw) -> Perturbation:
    changed = overriding(softmax=lambda port, scores: torch.softmax(0 * scores, -1))
    return Perturbation(changed, "", says("same|uniform|constant|equal|even|1/"))


@kind("attention-hard")
def _(draw: Draw) -> Perturbation:
    def softmax(port: TorchPort, scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype) + 0 * scores

    return Perturbation(overriding(softmax=softmax), "", says("0|zero|hard|max"))


OTHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky-relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "squared-relu": lambda x: F.relu(x) ** 2,
    "sigmoid-1.6": lambda x: x * torch.sigmoid(1.6 * x),
    "tanh-0.05": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.05 * x**3))),
    "softplus": F.softplus,
}
for _name, _function in OTHER_ACTIVATIONS.items():

    @kind(f"activation-{_name}")
    def _(draw: Draw, function: Any = _function) -> Perturbation:
        changed = overriding(activation=lambda port, x: function(x))
        return Perturbation(changed, "", says("function|activation|relu|gelu|input"))


@kind("residual-faded")
def _(draw: Draw) -> Perturbation:
    factor = abs(draw.factor())
    name = draw.one(("add_attention", "add_feed_forward"))
    changed = overriding(**{name: lambda port, x, branch: factor * x + branch})
    return Perturbation(changed, f"{name} x {factor}", says("residual|stream|input"))


@kind("residual-twice")
def _(draw: Draw) -> Perturbation:
    name = draw.one(("add_attention", "add_feed_forward"))
    changed = overriding(**{name: lambda port, x, branch: x + x + branch})
    return Perturbation(changed, name, says("residual|twice|stream"))


@kind("branch-twice")
def _(draw: Draw) -> Perturbation:
    name = draw.one(("add_attention", "add_feed_forward"))
    changed = overriding(**{name: lambda port, x, branch: x + branch + branch})
    return Perturbation(changed, name, says("twice|branch|attention|feed"))


@kind("branch-missing")
def _(draw: Draw) -> Perturbation:
    name = draw.one(("add_attention", "add_feed_forward"))
    changed = overriding(**{name: lambda port, x, branch: x})
    return Perturbation(changed, name, says("missing|lack|branch|without|residual"))


@kind("branch-subtracted")
def _(draw: Draw) -> Perturbation:
    name = draw.one(("add_attention", "add_feed_forward"))
    changed = overriding(**{name: lambda port, x, branch: x - branch})
    return Perturbation(changed, name, says("sign|minus|-1|branch"))


@kind("residual-over-root-two")
def _(draw: Draw) -> Perturbation:
    def add(port: TorchPort, x: Tensor, branch: Tensor) -> Tensor:
        return (x + branch) / math.sqrt(2)

    return Perturbation(overriding(add_feed_forward=add), "", says_factor(1 / math.sqrt(2)))


@kind("one-block-parallel", has_blocks)
def _(draw: Draw) -> Perturbation:
    def block(port: TorchPort, name: str, x: Tensor) -> Tensor:
        if name != "blocks.0":
            return TorchPort.block(port, name, x)
        normed = port.tap(f"{name}.attention_norm", port.norm(f"{name}.attention_norm", x))
        attended = port.attention(f"{name}.attention", normed)
        normed = port.tap(f"{name}.feed_forward_norm", port.norm(f"{name}.feed_forward_norm", x))
        return x + attended + port.feed_forward(f"{name}.feed_forward", normed)

    return Perturbation(overriding(block=block), "blocks.0", says("parallel|attention|norm"))


# Loss.


def _reducing(reduce: Callable[[Tensor, Tensor], Tensor]) -> type:
    return overriding(reduced=lambda port, errors, mask: reduce(errors, mask))


def _with_errors(errors: Callable[[Tensor, Tensor], Tensor]) -> type:
    return overriding(errors=lambda port, logits, targets: errors(logits, targets))


def _cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.mT, targets, reduction="none", **options)


@kind("loss-scaled")
def _(draw: Draw) -> Perturbation:
    factor = abs(draw.factor())
    changed = _reducing(lambda errors, mask: factor * (errors * mask).sum() / mask.sum())
    return Perturbation(changed, f"x {factor}", says_factor(factor))


@kind("loss-temperature")
def _(draw: Draw) -> Perturbation:
    factor = abs(draw.factor())
    changed = _with_errors(lambda logits, targets: _cross_entropy(factor * logits, targets))
    return Perturbation(changed, f"x {factor}", says("temperature|logits"))


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss-count-plus-one": lambda e, mask: (e * mask).sum() / (mask.sum() + 1),
    "loss-over-batch": lambda e, mask: (e * mask).sum() / len(mask),
    "loss-mask-rolled": lambda e, mask: (e * mask.roll(1, 1)).sum() / mask.sum(),
    "loss-without-last": lambda e, mask: (e * mask)[:, :-1].sum() / mask.sum(),
    "loss-root-mean-square": lambda e, mask: ((e**2 * mask).sum() / mask.sum()).sqrt(),
    "loss-largest": lambda e, mask: (e * mask).max(),
    "loss-first-two-sequences": lambda e, mask: (e * mask)[:2].sum() / mask[:2].sum(),
}
for _name, _reduce in REDUCTIONS.items():

    @kind(_name, is_long)
    def _(draw: Draw, reduce: Any = _reduce) -> Perturbation:
        return Perturbation(_reducing(reduce), "", says("sum|mean|divid|count|position|factor"))


ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss-targets-shifted-right": lambda z, y: _cross_entropy(z, y.roll(1, 1)),
    "loss-targets-shifted-by-two": lambda z, y: _cross_entropy(z, y.roll(-2, 1)),
    "loss-smoothing-0.05": lambda z, y: _cross_entropy(z, y, label_smoothing=0.05),
    "loss-focal": lambda z, y: (1 - (-_cross_entropy(z, y)).exp()) ** 2 * _cross_entropy(z, y),
    "loss-brier": lambda z, y: ((z.softmax(-1) - F.one_hot(y, z.shape[-1])) ** 2).sum(-1),
    "loss-without-first-id": lambda z, y: _cross_entropy(
        torch.cat([torch.full_like(z[..., :1], -torch.inf), z[..., 1:]], -1), y
    ),
}
for _name, _errors in ERRORS.items():

    @kind(_name, lambda config: config["seq_len"] > 4)
    def _(draw: Draw, errors: Any = _errors) -> Perturbation:
        return Perturbation(
            _with_errors(errors), "", says("target|shift|id|smooth|sum|mean|averag")
        )


# Gradients.


@kind("one-gradient-scaled")
def _(draw: Draw) -> Perturbation:
    place, factor = f"{draw.kernel()}.kernel", draw.factor()
    changed = one_gradient(place, lambda x: factor * x)
    return Perturbation(changed, f"{place} x {factor}", says_factor(factor))


@kind("all-gradients-scaled")
def _(draw: Draw) -> Perturbation:
    factor = draw.factor()
    changed = overriding(objective=lambda port, loss, logits: factor * loss)
    return Perturbation(changed, f"x {factor}", says_factor(factor))


@kind("one-gradient-zero")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.kernel()}.kernel"
    return Perturbation(one_gradient(place, torch.zeros_like), place, says("zero|0"))


@kind("one-gradient-negated")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.kernel()}.kernel"
    return Perturbation(one_gradient(place, lambda x: -x), place, says_factor(-1.0))


@kind("one-gradient-transposed")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.kernel(KERNELS[:4])}.kernel"
    return Perturbation(one_gradient(place, lambda x: x.T), place, says("transpos|order"))


@kind("gradient-of-a-norm-halved")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.block()}.feed_forward_norm.scale"
    return Perturbation(one_gradient(place, lambda x: x / 2), place, says_factor(0.5))


@kind("table-gradient-of-masked-only")
def _(draw: Draw) -> Perturbation:
    changed = one_gradient("embedding.table", lambda x: F.pad(x[:1], (0, 0, 0, len(x) - 1)))
    return Perturbation(changed, "", says("row|id|token|zero|0"))


@kind("gradients-accumulated")
def _(draw: Draw) -> Perturbation:
    def change(port: TorchPort) -> None:
        kept = getattr(port, "kept", {})
        for name, param in port.params.items():
            param.grad = param.grad + kept.get(name, 0.5 * param.grad)
        port.kept = {name: param.grad / 2 for name, param in port.params.items()}

    return Perturbation(with_gradients(change), "half of the last", says_factor(1.5))


@kind("value-gradient-missing")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.block()}.attention.value"
    return Perturbation(tapped(place, Tensor.detach), place, says("zero|0|value"))


# Optimisers.


def _with_options(**changed: float) -> type:
    """Multiply options of the optimisers."""

    def optimiser(port: TorchPort, name: str, options: Mapping[str, float]) -> Any:
        factors = {key: changed.get(key, 1.0) for key in options}
        return TorchPort.optimiser(port, name, {k: factors[k] * options[k] for k in options})

    return overriding(optimiser=optimiser)


SETTINGS: dict[str, type] = {
    "adam-beta1-0.8": overriding(beta1=0.8),
    "adam-beta2-0.99": overriding(beta2=0.99),
    "adam-epsilon-1e-3": overriding(adam_epsilon=1e-3),
    "adam-rate-times-1.1": _with_options(learning_rate=1.1),
    "adam-decay-times-two": _with_options(weight_decay=2.0),
    "clip-to-twice": overriding(clip=lambda port, norm: TorchPort.clip(port, 2 * norm)),
    "clip-missing": overriding(clip=lambda port, norm: None),
}
for _name, _changed in SETTINGS.items():

    @kind(_name)
    def _(draw: Draw, changed: type = _changed) -> Perturbation:
        return Perturbation(changed, "", says("step|rate|decay|beta|epsilon|clip|factor"))


@kind("adam-one-array-frozen")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.kernel()}.kernel"

    def optimiser(port: TorchPort, name: str, options: Mapping[str, float]) -> Any:
        made = TorchPort.optimiser(port, name, options)
        group = made.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not port.params[place]]
        return made

    return Perturbation(overriding(optimiser=optimiser), place, says("move|frozen|start|only"))


@kind("adam-one-array-undecayed")
def _(draw: Draw) -> Perturbation:
    place = f"{draw.kernel()}.kernel"

    def optimiser(port: TorchPort, name: str, options: Mapping[str, float]) -> Any:
        made = TorchPort.optimiser(port, name, options)
        group = made.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not port.params[place]]
        made.add_param_group({"params": [port.params[place]], "weight_decay": 0.0})
        return made

    return Perturbation(overriding(optimiser=optimiser), place, says("decay|only"))


# Decoding.


def _predicting(change: Callable[[Tensor, float], tuple[Tensor, float]]) -> type:
    def predict(port: TorchPort, logits: Tensor, temperature: float, exclude: bool) -> Any:
        return TorchPort.predict(port, *change(logits, temperature), exclude)

    return overriding(predict=predict)


def _left_to_right(port: TorchPort, log_confidence: Tensor, masked: Tensor, count: int) -> Tensor:
    return masked & (masked.cumsum(0) <= count)


DECODERS: dict[str, type] = {
    "decode-temperature-squared": _predicting(lambda z, t: (z, t * t)),
    "decode-logits-negated": _predicting(lambda z, t: (-z, t)),
    "decode-ids-rolled": _predicting(lambda z, t: (z.roll(1, -1), t)),
    "decode-left-to-right": overriding(choose=_left_to_right),
    "decode-one-more-at-first": overriding(
        cosine=lambda port, n, steps, step, masked: max(
            1, min(masked - 1, math.floor(n * math.cos(math.pi * step / (2 * steps))) - 1)
        )
    ),
    "decode-cosine-squared": overriding(
        cosine=lambda port, n, steps, step, masked: max(
            1, min(masked - 1, math.floor(n * math.cos(math.pi * step / (2 * steps)) ** 2))
        )
    ),
    "decode-linear-up": overriding(
        linear_schedule=lambda port, n, steps, step, masked: -(-n * (steps - step) // steps)
    ),
}
for _name, _changed in DECODERS.items():

    @kind(_name)
    def _(draw: Draw, changed: type = _changed) -> Perturbation:
        return Perturbation(changed, "", says("count|confiden|token|reveal|order|temperature"))
