"""Known mistakes, as they are made in PyTorch: by name, a class that makes `TorchPort` wrong.

The names are those that diagnosis should find; they are plain strings, and the code is PyTorch's
and autograd's, so that nothing of marref's catalogue is in it.  Several classes can be mixed where
they do not get the same method wrong, see `compatible`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ports.in_torch import TorchPort, with_gradient_of

FAULTS: dict[str, type] = {}
"""By name; a class to be mixed into `TorchPort`, before it."""

_COOPERATIVE = {"weight"}
"""Methods that several classes may override, each calling the next."""


def fault(name: str) -> Callable[[type], type]:
    """Enter a class under a name."""

    def enter(mistake: type) -> type:
        FAULTS[name] = mistake
        return mistake

    return enter


def compatible(names: Iterable[str]) -> bool:
    """Whether no method is overridden by two of them."""
    overridden = [name for fault in names for name in _overridden(FAULTS[fault])]
    return len(overridden) == len(set(overridden))


def faulty(names: Iterable[str]) -> type[TorchPort]:
    """Mix some mistakes into one program."""
    return type("FaultyPort", (*(FAULTS[name] for name in names), TorchPort), {})


def _overridden(mistake: type) -> set[str]:
    return {name for name in vars(mistake) if not name.startswith("__")} - _COOPERATIVE


def is_linear_bias(name: str) -> bool:
    """Whether a name is that of the bias of a linear layer."""
    return name.endswith(".bias") and not name.endswith("norm.bias")


def _weights(change: Callable[[TorchPort, str, Tensor], Tensor]) -> type:
    """Make a mistake of what a parameter is replaced by."""

    class Changed(TorchPort):
        def weight(self, name: str) -> Tensor:
            return change(self, name, super().weight(name))

    return Changed


def _zeroed(*endings: str) -> type:
    """Leave out the parameters whose names end so."""
    return _weights(lambda _, name, x: torch.zeros_like(x) if name.endswith(endings) else x)


# Embedding, positions, head.


@fault("embedding-times-root-embed-dim")
class _(TorchPort):
    def token_vectors(self, tokens):
        return super().token_vectors(tokens) * math.sqrt(self.config["embed_dim"])


@fault("embedding-ids-off-by-one")
class _(TorchPort):
    def rows(self, tokens):
        return (tokens - 1) % self.config["vocab_size"]


def _ramp(port: TorchPort, name: str, x: Tensor) -> Tensor:
    if name != "embedding.table":
        return x
    ramp = torch.arange(x.numel(), dtype=torch.float64).view(x.shape) / math.sqrt(x.shape[1])
    return ramp.to(x.dtype)


FAULTS["embedding-fixed-ramp"] = _weights(_ramp)
FAULTS["embedding-mask-row-zero"] = _weights(
    lambda _, name, x: F.pad(x[1:], (0, 0, 1, 0)) if name == "embedding.table" else x
)


@fault("positions-interleaved")
class _(TorchPort):
    def layout(self):
        return "interleaved"


@fault("positions-concatenated")
class _(TorchPort):
    def layout(self):
        return "concatenated"


@fault("positions-from-one")
class _(TorchPort):
    def position_numbers(self, length):
        return torch.arange(1, length + 1)


@fault("positions-other-denominator")
class _(TorchPort):
    def exponents(self):
        half = self.config["embed_dim"] // 2
        denominator = half if self.layout() == "concatenated" else max(half - 1, 1)
        return torch.arange(half, dtype=torch.float64) / denominator


@fault("positions-exponent-without-two")
class _(TorchPort):
    def exponents(self):
        dim = self.config["embed_dim"]
        return torch.arange(dim // 2, dtype=torch.float64) / dim


@fault("positions-cosine-first")
class _(TorchPort):
    def waves(self, angle):
        pair = [angle.cos(), angle.sin()]
        if self.layout() == "interleaved":
            return torch.stack(pair, dim=-1).flatten(1)
        return torch.cat(pair, dim=1)


@fault("positions-missing")
class _(TorchPort):
    def positions(self, length):
        return torch.zeros(length, self.config["embed_dim"], dtype=self.dtype)


@fault("positions-added-twice")
class _(TorchPort):
    def embedding(self, tokens):
        return super().embedding(tokens) + self.positions(tokens.shape[1])


@fault("head-tied")
class _(TorchPort):
    def weight(self, name):
        return (
            super().weight("embedding.table").T if name == "head.kernel" else super().weight(name)
        )


FAULTS["head-without-bias"] = _zeroed("head.bias")


# Layer norm.


def _epsilon(value: float) -> type:
    class Epsilon(TorchPort):
        def epsilon(self):
            return value

    return Epsilon


for _name in ("1e-3", "1e-5", "1e-6", "1e-12"):
    FAULTS[f"layer-norm-epsilon-{_name}"] = _epsilon(float(_name))


@fault("layer-norm-epsilon-outside-root")
class _(TorchPort):
    def normalise(self, centred, variance):
        return centred / (variance.sqrt() + self.epsilon())


@fault("layer-norm-unbiased-variance")
class _(TorchPort):
    def norm_variance(self, centred):
        return (centred**2).sum(-1, keepdim=True) / (centred.shape[-1] - 1)


@fault("layer-norm-unbiased-epsilon-outside-root")
class _(TorchPort):
    def norm_variance(self, centred):
        return centred.var(-1, keepdim=True)

    def normalise(self, centred, variance):
        return centred / (variance.sqrt() + self.epsilon())


@fault("layer-norm-clipped-variance")
class _(TorchPort):
    def normalise(self, centred, variance):
        epsilon = self.epsilon()
        clipped = torch.where(variance < epsilon, epsilon, variance + epsilon)
        return centred / clipped.sqrt()


@fault("layer-norm-uncentred")
class _(TorchPort):
    def norm_mean(self, x):
        return torch.zeros_like(x[..., :1])


FAULTS["layer-norm-without-scale"] = _weights(
    lambda _, name, x: torch.ones_like(x) if name.endswith("norm.scale") else x
)
FAULTS["layer-norm-without-bias"] = _zeroed("norm.bias")


@fault("final-norm-missing")
class _(TorchPort):
    def final_norm(self, x):
        return x


# Linear layers.


def _kernels(change: Callable[[str, Tensor], Tensor]) -> type:
    class Changed(TorchPort):
        def kernel(self, name):
            return change(name, super().kernel(name))

    return Changed


def _transposed(*endings: str) -> type:
    """Transpose the kernels of layers whose names end so."""
    return _kernels(lambda name, x: x.T if name.endswith(endings) else x)


FAULTS["linear-square-kernels-transposed"] = _kernels(
    lambda _, x: x.T if x.shape[0] == x.shape[1] else x
)
FAULTS["linear-kernels-reshaped"] = _kernels(lambda _, x: x.T.reshape(x.shape))
FAULTS["attention-qkv-kernels-transposed"] = _transposed("query", "key", "value")
FAULTS["attention-output-kernel-transposed"] = _transposed("attention.output")
FAULTS["linear-without-biases"] = _weights(
    lambda _, name, x: torch.zeros_like(x) if is_linear_bias(name) else x
)
FAULTS["feed-forward-without-biases"] = _zeroed("up.bias", "down.bias")
FAULTS["attention-without-qkv-biases"] = _zeroed("query.bias", "key.bias", "value.bias")
FAULTS["attention-without-output-bias"] = _zeroed("attention.output.bias")


# Attention.


def _scale(scale: Callable[[int, int], float]) -> type:
    class Scale(TorchPort):
        def scale(self, head_dim):
            return scale(head_dim, self.config["num_heads"])

    return Scale


FAULTS["attention-unscaled"] = _scale(lambda d, n: 1.0)
FAULTS["attention-scaled-by-embed-dim"] = _scale(lambda d, n: 1 / math.sqrt(n * d))
FAULTS["attention-scaled-without-root"] = _scale(lambda d, n: 1 / d)


@fault("attention-softmax-over-queries")
class _(TorchPort):
    def softmax(self, scores):
        return scores.softmax(-2)


@fault("attention-causal")
class _(TorchPort):
    def softmax(self, scores):
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


@fault("attention-mask-keys-hidden")
class _(TorchPort):
    def forward(self, tokens):
        self.hidden = (tokens == 0)[:, None, None, :]
        return super().forward(tokens)

    def softmax(self, scores):
        lowest = max(-1e9, torch.finfo(scores.dtype).min)
        return super().softmax(scores.masked_fill(self.hidden, lowest))


@fault("attention-heads-innermost")
class _(TorchPort):
    def split(self, x):
        return x.unflatten(-1, (-1, self.config["num_heads"])).permute(0, 3, 1, 2)

    def merge(self, x):
        return x.permute(0, 2, 3, 1).flatten(2)


@fault("attention-heads-reshaped")
class _(TorchPort):
    def split(self, x):
        return x.reshape(len(x), self.config["num_heads"], x.shape[1], -1)

    def merge(self, x):
        return x.reshape(len(x), x.shape[2], -1)


@fault("attention-query-and-key-swapped")
class _(TorchPort):
    def scores(self, query, key):
        return key @ query.mT


def _parts_taken_for(*order: int) -> type:
    """Take the parts of the fused projection of these numbers for query, key and value."""

    class Order(TorchPort):
        def project(self, names, x):
            return super().project([names[part] for part in order], x)

    return Order


FAULTS["attention-query-and-key-parameters-swapped"] = _parts_taken_for(1, 0, 2)
FAULTS["attention-key-and-value-parameters-swapped"] = _parts_taken_for(0, 2, 1)
FAULTS["attention-query-and-value-parameters-swapped"] = _parts_taken_for(2, 1, 0)
FAULTS["attention-parameters-read-as-key-value-query"] = _parts_taken_for(2, 0, 1)
FAULTS["attention-parameters-read-as-value-query-key"] = _parts_taken_for(1, 2, 0)


def _fused_read(read: Callable[[Tensor, int], Tensor]) -> type:
    """Read the features of the fused projection, given the number of heads, in another order."""

    class Read(TorchPort):
        def project(self, names, x):
            fused = torch.cat([*super().project(names, x)], dim=-1)
            return read(fused, self.config["num_heads"]).reshape(fused.shape).chunk(3, dim=-1)

    return Read


FAULTS["attention-parameters-read-by-head"] = _fused_read(
    lambda x, heads: x.unflatten(-1, (heads, 3, -1)).transpose(2, 3)
)
FAULTS["attention-parameters-read-innermost"] = _fused_read(
    lambda x, heads: x.unflatten(-1, (heads, -1, 3)).movedim(-1, 2)
)


def _guarded(extra: float) -> type:
    class Guarded(TorchPort):
        def softmax(self, scores):
            exponentials = (scores - scores.amax(-1, keepdim=True).detach()).exp()
            return exponentials / (exponentials.sum(-1, keepdim=True) + extra)

    return Guarded


FAULTS["attention-softmax-sum-plus-1e-8"] = _guarded(1e-8)
FAULTS["attention-softmax-sum-plus-1e-5"] = _guarded(1e-5)


@fault("attention-softmax-plus-one")
class _(TorchPort):
    def softmax(self, scores):
        return scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))


# Feed-forward.


def _activation(function: Callable[[Tensor], Tensor]) -> type:
    class Activation(TorchPort):
        def activation(self, x):
            return function(x)

    return Activation


FAULTS["gelu-tanh"] = _activation(lambda x: F.gelu(x, approximate="tanh"))
FAULTS["gelu-erf"] = _activation(F.gelu)
FAULTS["gelu-sigmoid"] = _activation(lambda x: x * torch.sigmoid(1.702 * x))
FAULTS["gelu-relu"] = _activation(F.relu)
FAULTS["gelu-leaky-relu"] = _activation(F.leaky_relu)
FAULTS["gelu-silu"] = _activation(F.silu)
FAULTS["gelu-missing"] = _activation(lambda x: x)


# Block.


@fault("block-post-norm")
class _(TorchPort):
    def block(self, name, x):
        read = self.tap(f"{name}.attention_norm", x)
        x = x + self.attention(f"{name}.attention", read)
        x = self.norm(f"{name}.attention_norm", x)
        read = self.tap(f"{name}.feed_forward_norm", x)
        x = x + self.feed_forward(f"{name}.feed_forward", read)
        return self.norm(f"{name}.feed_forward_norm", x)


@fault("block-post-norm-hooked")
class _(TorchPort):
    def block(self, name, x):
        x = x + self.attention(f"{name}.attention", x)
        x = self.tap(f"{name}.attention_norm", self.norm(f"{name}.attention_norm", x))
        x = x + self.feed_forward(f"{name}.feed_forward", x)
        return self.tap(f"{name}.feed_forward_norm", self.norm(f"{name}.feed_forward_norm", x))


@fault("block-parallel")
class _(TorchPort):
    def block(self, name, x):
        normed = self.tap(f"{name}.attention_norm", self.norm(f"{name}.attention_norm", x))
        attended = self.attention(f"{name}.attention", normed)
        normed = self.tap(f"{name}.feed_forward_norm", self.norm(f"{name}.feed_forward_norm", x))
        x = self.add_attention(x, attended)
        return self.add_feed_forward(x, self.feed_forward(f"{name}.feed_forward", normed))


def _overwritten(*norms: str) -> type:
    """Overwrite the residual stream by what these norms return."""

    class Overwritten(TorchPort):
        def block(self, name, x):
            normed = self.tap(f"{name}.attention_norm", self.norm(f"{name}.attention_norm", x))
            x = normed if "attention_norm" in norms else x
            x = self.add_attention(x, self.attention(f"{name}.attention", normed))
            normed = self.norm(f"{name}.feed_forward_norm", x)
            normed = self.tap(f"{name}.feed_forward_norm", normed)
            x = normed if "feed_forward_norm" in norms else x
            return self.add_feed_forward(x, self.feed_forward(f"{name}.feed_forward", normed))

    return Overwritten


FAULTS["residual-from-normalised"] = _overwritten("attention_norm", "feed_forward_norm")
FAULTS["residual-around-attention-from-normalised"] = _overwritten("attention_norm")
FAULTS["residual-around-feed-forward-from-normalised"] = _overwritten("feed_forward_norm")


@fault("residual-around-attention-missing")
class _(TorchPort):
    def add_attention(self, x, branch):
        return branch


@fault("residual-around-feed-forward-missing")
class _(TorchPort):
    def add_feed_forward(self, x, branch):
        return branch


def _blocks_read(read: Callable[[int, int], int]) -> type:
    """Compute with the parameters of block ``read(index, num_layers)``."""

    class Read(TorchPort):
        def stored(self, name):
            section, *rest = super().stored(name).split(".")
            if section == "blocks":
                rest[0] = str(read(int(rest[0]), self.config["num_layers"]))
            return ".".join([section, *rest])

    return Read


FAULTS["block-parameters-shared"] = _blocks_read(lambda index, num_layers: 0)
FAULTS["block-order-reversed"] = _blocks_read(lambda index, num_layers: num_layers - 1 - index)


# Loss.


def _reduced(reduce: Callable[[Tensor, Tensor], Tensor]) -> type:
    class Reduced(TorchPort):
        def reduced(self, errors, mask):
            return reduce(errors, mask)

    return Reduced


def _by_sequence(errors: Tensor, mask: Tensor) -> Tensor:
    return ((errors * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _by_sequence_with_some(errors: Tensor, mask: Tensor) -> Tensor:
    means = [e[m].mean() for e, m in zip(errors, mask, strict=True) if m.any()]
    return torch.stack(means).mean()


def _over_ratio(errors: Tensor, mask: Tensor) -> Tensor:
    ratio = mask.to(errors.dtype).mean(1, keepdim=True).expand(mask.shape)
    return (errors[mask] / ratio[mask]).mean()


FAULTS["loss-over-all-positions"] = _reduced(lambda e, mask: e.mean())
FAULTS["loss-over-unmasked-positions"] = _reduced(lambda e, mask: e[~mask].mean())
FAULTS["loss-summed"] = _reduced(lambda e, mask: e[mask].sum())
FAULTS["loss-over-batch-times-length"] = _reduced(lambda e, mask: (e * mask).mean())
FAULTS["loss-averaged-by-sequence"] = _reduced(_by_sequence)
FAULTS["loss-averaged-by-sequence-without-empty"] = _reduced(_by_sequence_with_some)
FAULTS["loss-over-ratio"] = _reduced(_over_ratio)
FAULTS["loss-count-plus-1e-8"] = _reduced(
    lambda e, mask: (e * mask).sum() / (mask.sum(dtype=e.dtype) + 1e-8)
)


def _errors(errors: Callable[[Tensor, Tensor], Tensor]) -> type:
    class Errors(TorchPort):
        def errors(self, logits, targets):
            return errors(logits, targets)

    return Errors


def _cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.mT, targets, reduction="none", **options)


FAULTS["loss-base-2"] = _errors(lambda z, y: _cross_entropy(z, y) / math.log(2))
FAULTS["loss-label-smoothing"] = _errors(lambda z, y: _cross_entropy(z, y, label_smoothing=0.1))
FAULTS["loss-targets-shifted"] = _errors(lambda z, y: _cross_entropy(z, y.roll(-1, dims=1)))
FAULTS["loss-softmax-twice"] = _errors(lambda z, y: _cross_entropy(z.softmax(-1), y))


@fault("loss-shifted")
class _(TorchPort):
    def aligned(self, logits, targets, mask):
        return logits[:, :-1], targets[:, 1:], mask[:, 1:]


# Gradients: the forward pass is right.


@fault("loss-gradient-not-averaged")
class _(TorchPort):
    def objective(self, loss, logits):
        return loss * self.mask.sum()


@fault("loss-gradient-without-target")
class _(TorchPort):
    def objective(self, loss, logits):
        return logits[self.mask].logsumexp(-1).mean()


FAULTS["linear-gradient-biases-averaged"] = _weights(
    lambda port, name, x: (
        with_gradient_of(x, x / port.tokens.numel()) if is_linear_bias(name) else x
    )
)


@fault("linear-gradient-kernel-not-transposed")
class _(TorchPort):
    def affine(self, x, kernel, bias):
        if kernel.shape[0] != kernel.shape[1]:
            return super().affine(x, kernel, bias)
        path = x @ kernel.detach().T
        return super().affine(x.detach(), kernel, bias) + (path - path.detach())


@fault("layer-norm-gradient-without-mean")
class _(TorchPort):
    def norm_mean(self, x):
        return super().norm_mean(x).detach()


@fault("layer-norm-gradient-without-correlation")
class _(TorchPort):
    def norm_variance(self, centred):
        return super().norm_variance(centred).detach()


@fault("layer-norm-gradient-first-term-only")
class _(TorchPort):
    def norm_mean(self, x):
        return super().norm_mean(x).detach()

    def norm_variance(self, centred):
        return super().norm_variance(centred).detach()


@fault("layer-norm-gradient-without-scale")
class _(TorchPort):
    def norm_affine(self, normalised, scale, bias):
        path = normalised - normalised.detach()
        return super().norm_affine(normalised.detach(), scale, bias) + path


@fault("residual-gradient-dropped")
class _(TorchPort):
    def add_attention(self, x, branch):
        return x.detach() + branch

    def add_feed_forward(self, x, branch):
        return x.detach() + branch


@fault("gelu-gradient-without-density")
class _(TorchPort):
    def activation(self, x):
        if self.config["gelu"] == "tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            gate = 0.5 * (1 + torch.tanh(inner))
        else:
            gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return with_gradient_of(super().activation(x), x * gate.detach())


@fault("attention-gradient-softmax-without-sum")
class _(TorchPort):
    def softmax(self, scores):
        weights = super().softmax(scores).detach()
        return with_gradient_of(weights, weights * scores)


@fault("attention-gradient-query-and-key-swapped")
class _(TorchPort):
    def before_scores(self, query, key):
        return with_gradient_of(query, key), with_gradient_of(key, query)


@fault("attention-gradient-unscaled")
class _(TorchPort):
    def before_scores(self, query, key):
        root = math.sqrt(query.shape[-1])
        return with_gradient_of(query, root * query), with_gradient_of(key, root * key)


@fault("attention-gradient-through-values-only")
class _(TorchPort):
    def softmax(self, scores):
        return super().softmax(scores).detach()


@fault("embedding-gradient-assigned")
class _(TorchPort):
    def change_gradients(self):
        grad = self.params["embedding.table"].grad.zero_()
        received = self.residual["embedding"].grad.flatten(0, 1)
        for index, row in zip(self.rows(self.tokens).flatten(), received, strict=True):
            grad[index] = row


@fault("embedding-gradient-padding")
class _(TorchPort):
    padding = 0


# Optimisers.


class _HandWrittenAdam(torch.optim.Optimizer):
    """Adam by hand; ``direction(m, v, t)`` is what parameters move along."""

    def __init__(self, params: list[Tensor], options: Mapping[str, float], direction: Any) -> None:
        super().__init__(params, dict(options))
        self.direction, self.t = direction, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.t += 1
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                m = 0.9 * state.get("m", 0.0) + 0.1 * param.grad
                v = 0.999 * state.get("v", 0.0) + 0.001 * param.grad**2
                state.update(m=m, v=v)
                decay = group["weight_decay"] * param
                param -= group["learning_rate"] * (self.direction(m, v, self.t) + decay)


def _direction(direction: Callable[[Tensor, Tensor, int], Tensor]) -> type:
    class Direction(TorchPort):
        def optimiser(self, name, options):
            settings = {key: options[key] for key in ("learning_rate", "weight_decay")}
            return _HandWrittenAdam(list(self.params.values()), settings, direction)

    return Direction


def _corrected_by(ahead: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    def direction(m: Tensor, v: Tensor, t: int) -> Tensor:
        first, second = 1 - 0.9 ** (t + ahead), 1 - 0.999 ** (t + ahead)
        return m.div(first) / (v.div(second).sqrt() + 1e-8)

    return direction


def _inside_root(m: Tensor, v: Tensor, t: int) -> Tensor:
    return (m / (1 - 0.9**t)) / (v / (1 - 0.999**t) + 1e-8).sqrt()


def _before_correction(m: Tensor, v: Tensor, t: int) -> Tensor:
    return math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-8)


FAULTS["adam-without-bias-correction"] = _direction(lambda m, v, t: m / (v.sqrt() + 1e-8))
FAULTS["adam-step-from-zero"] = _direction(_corrected_by(-1))
FAULTS["adam-step-ahead"] = _direction(_corrected_by(1))
FAULTS["adam-epsilon-inside-root"] = _direction(_inside_root)
FAULTS["adam-epsilon-before-correction"] = _direction(_before_correction)


@fault("adam-epsilon-1e-7")
class _(TorchPort):
    adam_epsilon = 1e-7


@fault("adam-epsilon-1e-6")
class _(TorchPort):
    adam_epsilon = 1e-6


@fault("adam-beta2-0.95")
class _(TorchPort):
    beta2 = 0.95


def _optimiser(make: Callable[[list[Tensor], float, float], torch.optim.Optimizer]) -> type:
    class Optimiser(TorchPort):
        def optimiser(self, name, options):
            params = list(self.params.values())
            return make(params, options["learning_rate"], options["weight_decay"])

    return Optimiser


def _decaying_kernels(params: list[Tensor], lr: float, decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": decay},
        {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


FAULTS["adam-decay-in-gradient"] = _optimiser(
    lambda params, lr, decay: torch.optim.Adam(params, lr=lr, weight_decay=decay)
)
FAULTS["adam-decay-without-learning-rate"] = _optimiser(
    lambda params, lr, decay: torch.optim.AdamW(params, lr=lr, weight_decay=decay / lr)
)
FAULTS["adam-decay-of-kernels-only"] = _optimiser(_decaying_kernels)


@fault("gradients-not-zeroed")
class _(TorchPort):
    def step_gradients(self, step):
        before = {name: param.grad for name, param in self.params.items()} if step > 1 else {}
        super().step_gradients(step)
        for name, grad in before.items():
            self.params[name].grad += grad


@fault("clip-each-array")
class _(TorchPort):
    def clip(self, max_norm):
        for param in self.params.values():
            torch.nn.utils.clip_grad_norm_([param], max_norm)


@fault("clip-each-fused-array")
class _(TorchPort):
    def clip(self, max_norm):
        arrays: dict[str, list[Tensor]] = {}
        for name, param in self.params.items():
            arrays.setdefault(re.sub("query|key|value", "in_proj", name), []).append(param)
        for fused in arrays.values():
            torch.nn.utils.clip_grad_norm_(fused, max_norm)


@fault("clip-without-1e-6")
class _(TorchPort):
    def clip(self, max_norm):
        norm = torch.cat([param.grad.ravel() for param in self.params.values()]).norm()
        for param in self.params.values():
            param.grad *= min(1.0, float(max_norm / norm))


@fault("clip-values")
class _(TorchPort):
    def clip(self, max_norm):
        torch.nn.utils.clip_grad_value_(list(self.params.values()), max_norm)


# Decoding.


@fault("decode-mask-token-emitted")
class _(TorchPort):
    def predict(self, logits, temperature, exclude_mask_token):
        return super().predict(logits, temperature, False)


@fault("decode-mask-excluded-after-softmax")
class _(TorchPort):
    def predict(self, logits, temperature, exclude_mask_token):
        predicted, _ = super().predict(logits, temperature, exclude_mask_token)
        log_p = (logits / temperature).log_softmax(-1)
        return predicted, log_p.gather(-1, predicted[..., None])[..., 0]


@fault("decode-temperature-multiplied")
class _(TorchPort):
    def predict(self, logits, temperature, exclude_mask_token):
        return super().predict(logits, 1.0 / temperature, exclude_mask_token)


@fault("decode-confidence-unscaled")
class _(TorchPort):
    def predict(self, logits, temperature, exclude_mask_token):
        return super().predict(logits, 1.0, exclude_mask_token)


@fault("decode-least-confident-first")
class _(TorchPort):
    def choose(self, log_confidence, masked, count):
        return super().choose(-log_confidence, masked, count)


@fault("decode-ties-to-higher-position")
class _(TorchPort):
    def choose(self, log_confidence, masked, count):
        return super().choose(log_confidence.flip(0), masked.flip(0), count).flip(0)


@fault("decode-ties-together")
class _(TorchPort):
    def choose(self, log_confidence, masked, count):
        cut_off = log_confidence[super().choose(log_confidence, masked, count)].min()
        return masked & (log_confidence >= cut_off)


@fault("decode-revealed-predicted-again")
class _(TorchPort):
    def open_positions(self, unknown, masked):
        return unknown


@fault("decode-known-tokens-ignored")
class _(TorchPort):
    def starting_tokens(self, known):
        return torch.zeros_like(known)


def _cosine(left: Callable[[int, int, int, int], int]) -> type:
    class Cosine(TorchPort):
        def cosine(self, num_masked, num_steps, step, masked):
            return left(num_masked, num_steps, step, masked)

    return Cosine


def _between(left: float, masked: int) -> int:
    return max(1, min(masked - 1, int(left)))


def _in_float32(n: int, steps: int, step: int, masked: int) -> int:
    ratio = torch.tensor(step / steps, dtype=torch.float32)
    cosine = torch.cos(ratio * torch.tensor(math.pi / 2, dtype=torch.float32))
    return _between(torch.floor(n * cosine).item(), masked)


FAULTS["decode-cosine-rounded"] = _cosine(
    lambda n, steps, step, masked: _between(
        round(n * math.cos(math.pi * step / (2 * steps))), masked
    )
)
FAULTS["decode-cosine-float32"] = _cosine(_in_float32)
FAULTS["decode-cosine-early"] = _cosine(
    lambda n, steps, step, masked: max(
        1, math.floor(n * math.cos(math.pi / 2 * step / max(steps - 1, 1)))
    )
)


@fault("decode-cosine-linear")
class _(TorchPort):
    def cosine(self, num_masked, num_steps, step, masked):
        return self.linear_schedule(num_masked, num_steps, step, masked)


@fault("decode-linear-floored")
class _(TorchPort):
    def linear_schedule(self, num_masked, num_steps, step, masked):
        return num_masked * (num_steps - step) // num_steps


@fault("decode-linear-remainder-first")
class _(TorchPort):
    def linear_schedule(self, num_masked, num_steps, step, masked):
        each, more = divmod(num_masked, num_steps)
        return masked - each - (step <= more)
