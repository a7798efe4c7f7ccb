"""MAR in PyTorch, as different people would write it, in every precision that they would run it in.

A port takes parameters by marref's names and hands over arrays by golden names.  Every decision
that people get wrong is a method of its own, for subclasses to get wrong; every activation passes
through `TorchPort.tap`, every parameter through `TorchPort.weight`.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ports import sampler
from marref.verify.comparison import Golden

# Arrays this small gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
LOSS_SCALE = 1024.0
"""What a gradient scaler multiplies the loss by."""

Counts = list[int]


@dataclasses.dataclass(frozen=True)
class Style:
    """The ways in which right programs differ.

    Parameters
    ----------
    attention : {"matmul", "einsum", "sdpa", "module"}
        "module" is torch.nn.TransformerEncoderLayer.
    fused : bool
        Query, key and value are one projection.
    linear : {"functional", "matmul"}
    norm : {"functional", "var", "mean of squares"}
    table : {"float64", "exp", "pow"}
        How the frequencies are computed; the last two in float32, or float64 in a float64 program.
    loss : {"masked", "ignored", "product", "gathered"}
    softmax : {"own", "float32"}
        The dtype of attention's softmax.
    confidence : {"log", "probability"}
        What the decoder sorts by.
    scaled : bool
        A gradient scaler is used under float16 autocast.
    item : bool
        The loss goes through ``.item()``.
    foreach : bool
    """

    attention: str = "matmul"
    fused: bool = False
    linear: str = "functional"
    norm: str = "mean of squares"
    table: str = "float64"
    loss: str = "product"
    softmax: str = "own"
    confidence: str = "log"
    scaled: bool = True
    item: bool = False
    foreach: bool = False

    @staticmethod
    def draw(rng: np.random.Generator) -> "Style":
        """Draw any style."""
        return Style(
            **{name: options[rng.integers(len(options))] for name, options in STYLES.items()}
        )

    @staticmethod
    def draw_by_hand(rng: np.random.Generator) -> "Style":
        """Draw a style in which every method of the port is called."""
        drawn = Style.draw(rng)
        kept = ("linear", "table", "item", "foreach")
        return Style(**{name: getattr(drawn, name) for name in kept})


STYLES: dict[str, tuple[Any, ...]] = {
    "attention": ("matmul", "einsum", "sdpa", "module"),
    "fused": (False, True),
    "linear": ("functional", "matmul"),
    "norm": ("functional", "var", "mean of squares"),
    "table": ("float64", "exp", "pow"),
    "loss": ("masked", "ignored", "product", "gathered"),
    "softmax": ("own", "float32"),
    "confidence": ("log", "probability"),
    "scaled": (False, True),
    "item": (False, True),
    "foreach": (False, True),
}
"""The options of each field of `Style`."""


class TorchPort:
    """A right program, which subclasses make wrong.

    Parameters
    ----------
    vectors : Golden
        Only its parameters, batch, metadata and numbers of chance are read.
    style : Style
    precision : str
    """

    padding: int | None = None
    label_smoothing = 0.0
    beta1, beta2, adam_epsilon = 0.9, 0.999, 1e-8

    def __init__(self, vectors: Golden, style: Style, precision: str = "float32") -> None:
        self.config: Mapping[str, Any] = vectors.metadata["config"]
        self.metadata = vectors.metadata
        self.style, self.precision = style, precision
        self.dtype = DTYPES[precision]
        self.params = {
            name.removeprefix("params/"): torch.tensor(leaf).to(self.dtype).requires_grad_()
            for name, leaf in vectors.arrays.items()
            if name.startswith("params/")
        }
        self.tokens, self.targets, mask = (
            torch.from_numpy(vectors.batch[name].copy()) for name in ("tokens", "targets", "mask")
        )
        self.mask = mask == 1
        self.drawn = {name: _drawn(vectors, name) for name in vectors.metadata.get("samplers", ())}
        self.named: dict[str, Tensor] = {}
        self.residual: dict[str, Tensor] = {}

    # What everything passes through.

    def weight(self, name: str) -> Tensor:
        """Return a parameter as the program uses it."""
        return self.params[self.stored(name)]

    def stored(self, name: str) -> str:
        """Name the parameter that is used under a name."""
        return name

    def tap(self, name: str, x: Tensor) -> Tensor:
        """Note an activation, and return what the program goes on with."""
        self.named[name] = x
        if torch.is_grad_enabled() and (name in ("logits", "embedding") or is_output(name)):
            # A fixed table has no gradient, and the stream after it has.
            x.requires_grad_().retain_grad()
            self.residual[name] = x
        return x

    # Forward.

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, length] -> logits [batch, length, vocab]."""
        x = self.tap("embedding", self.embedding(tokens))
        for index in range(self.config["num_layers"]):
            name = f"blocks.{index}"
            block = self.stock_block if self.style.attention == "module" else self.block
            x = self.tap(f"{name}.output", block(name, x))
        x = self.tap("final_norm", self.final_norm(x))
        return self.tap("logits", self.linear("head", x))

    def embedding(self, tokens: Tensor) -> Tensor:
        return self.token_vectors(tokens) + self.positions(tokens.shape[1])

    def token_vectors(self, tokens: Tensor) -> Tensor:
        rows = self.rows(tokens)
        return F.embedding(rows, self.weight("embedding.table"), padding_idx=self.padding)

    def rows(self, tokens: Tensor) -> Tensor:
        """Which rows of the table belong to tokens."""
        return tokens

    def positions(self, length: int) -> Tensor:
        """The table [length, embed_dim] as it is added."""
        wide = self.style.table == "float64" or self.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        frequencies = self.frequencies(self.exponents().to(dtype))
        angle = self.position_numbers(length).to(dtype)[:, None] * frequencies
        return self.waves(angle).to(self.dtype)

    def layout(self) -> str:
        return self.config["positions"]

    def exponents(self) -> Tensor:
        """What 10000 is raised to, negative."""
        dim = self.config["embed_dim"]
        if self.layout() == "interleaved":
            return torch.arange(0, dim, 2, dtype=torch.float64) / dim
        half = dim // 2
        return torch.arange(half, dtype=torch.float64) / max(half - 1, 1)

    def frequencies(self, exponents: Tensor) -> Tensor:
        if self.style.table == "exp":
            return torch.exp(-math.log(10000.0) * exponents)
        return 1.0 / torch.pow(10000.0, exponents)

    def position_numbers(self, length: int) -> Tensor:
        return torch.arange(length)

    def waves(self, angle: Tensor) -> Tensor:
        if self.layout() == "interleaved":
            return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def block(self, name: str, x: Tensor) -> Tensor:
        normed = self.tap(f"{name}.attention_norm", self.norm(f"{name}.attention_norm", x))
        x = self.add_attention(x, self.attention(f"{name}.attention", normed))
        normed = self.tap(f"{name}.feed_forward_norm", self.norm(f"{name}.feed_forward_norm", x))
        return self.add_feed_forward(x, self.feed_forward(f"{name}.feed_forward", normed))

    def stock_block(self, name: str, x: Tensor) -> Tensor:
        """Run torch.nn.TransformerEncoderLayer with these parameters."""
        dim = self.config["embed_dim"]
        layer = nn.TransformerEncoderLayer(
            dim,
            self.config["num_heads"],
            4 * dim,
            dropout=0.0,
            activation=lambda h: self.tap(f"{name}.feed_forward.activation", self.activation(h)),
            layer_norm_eps=self.epsilon(),
            batch_first=True,
            norm_first=True,
            dtype=self.dtype,
        )
        tapped = {
            "attention_norm": layer.norm1,
            "feed_forward_norm": layer.norm2,
            "feed_forward.up": layer.linear1,
            "feed_forward.down": layer.linear2,
        }
        for part, module in tapped.items():
            full = f"{name}.{part}"
            module.register_forward_hook(lambda _m, _x, y, full=full: self.tap(full, y))
        parts = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
        state = {
            "self_attn.in_proj_weight": torch.cat([self.kernel(p).T for p in parts]),
            "self_attn.in_proj_bias": torch.cat([self.weight(f"{p}.bias") for p in parts]),
        }
        for theirs, ours in _STOCK_LINEAR.items():
            state[f"{theirs}.weight"] = self.kernel(f"{name}.{ours}").T
            state[f"{theirs}.bias"] = self.weight(f"{name}.{ours}.bias")
        for theirs, ours in _STOCK_NORM.items():
            state[f"{theirs}.weight"] = self.weight(f"{name}.{ours}.scale")
            state[f"{theirs}.bias"] = self.weight(f"{name}.{ours}.bias")
        return torch.func.functional_call(layer, state, (x,))

    def add_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def add_feed_forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm("final_norm", x)

    # Layers.

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.affine(x, self.kernel(name), self.weight(f"{name}.bias"))

    def kernel(self, name: str) -> Tensor:
        """Kernel [in, out] of a linear layer."""
        return self.weight(f"{name}.kernel")

    def affine(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        if self.style.linear == "functional":
            return F.linear(x, kernel.T, bias)
        return x @ kernel + bias

    def epsilon(self) -> float:
        return self.config["layer_norm_epsilon"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale, bias = self.weight(f"{name}.scale"), self.weight(f"{name}.bias")
        if self.style.norm == "functional":
            return F.layer_norm(x, x.shape[-1:], scale, bias, self.epsilon())
        centred = x - self.norm_mean(x)
        if self.style.norm == "var":
            variance = x.var(-1, keepdim=True, unbiased=False)
        else:
            variance = self.norm_variance(centred)
        return self.norm_affine(self.normalise(centred, variance), scale, bias)

    def norm_mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def norm_variance(self, centred: Tensor) -> Tensor:
        return (centred**2).mean(-1, keepdim=True)

    def normalise(self, centred: Tensor, variance: Tensor) -> Tensor:
        return centred / torch.sqrt(variance + self.epsilon())

    def norm_affine(self, normalised: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return normalised * scale + bias

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        x = self.tap(f"{name}.up", self.linear(f"{name}.up", x))
        x = self.tap(f"{name}.activation", self.activation(x))
        return self.tap(f"{name}.down", self.linear(f"{name}.down", x))

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh" if self.config["gelu"] == "tanh" else "none")

    # Attention.

    def attention(self, name: str, x: Tensor) -> Tensor:
        parts = ("query", "key", "value")
        projected = self.project([f"{name}.{part}" for part in parts], x)
        heads = [
            self.tap(f"{name}.{part}", self.split(y))
            for part, y in zip(parts, projected, strict=True)
        ]
        context = self.tap(f"{name}.context", self.merge(self.attend(name, *heads)))
        return self.tap(f"{name}.output", self.linear(f"{name}.output", context))

    def project(self, names: list[str], x: Tensor) -> Iterable[Tensor]:
        if not self.style.fused:
            return [self.linear(name, x) for name in names]
        kernel = torch.cat([self.kernel(name) for name in names], dim=1)
        bias = torch.cat([self.weight(f"{name}.bias") for name in names])
        return self.affine(x, kernel, bias).chunk(3, dim=-1)

    def split(self, x: Tensor) -> Tensor:
        """[batch, length, embed_dim] -> [batch, heads, length, head_dim]."""
        return x.unflatten(-1, (self.config["num_heads"], -1)).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.style.attention == "sdpa":
            return F.scaled_dot_product_attention(query, key, value)
        query, key = self.before_scores(query, key)
        weights = self.softmax(self.scores(query, key) * self.scale(query.shape[-1]))
        weights = self.tap(f"{name}.weights", weights)
        if self.style.attention == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, value)
        return weights @ value

    def before_scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        if self.style.attention == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", query, key)
        return query @ key.mT

    def scale(self, head_dim: int) -> float:
        return head_dim**-0.5

    def softmax(self, scores: Tensor) -> Tensor:
        if self.style.softmax == "float32" and self.dtype != torch.float64:
            return scores.float().softmax(-1).to(scores.dtype)
        return scores.softmax(-1)

    # Loss.

    def loss(self, logits: Tensor) -> Tensor:
        """Half-precision logits are widened first, as people do."""
        logits = logits if self.dtype == torch.float64 else logits.float()
        logits, targets, mask = self.aligned(logits, self.targets, self.mask)
        if self.style.loss == "masked":
            return F.cross_entropy(logits[mask], targets[mask])
        if self.style.loss == "ignored":
            return F.cross_entropy(logits.mT, targets.masked_fill(~mask, -100), ignore_index=-100)
        if self.style.loss == "gathered":
            log_p = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            return -(log_p * mask).sum() / mask.sum()
        return self.reduced(self.errors(logits, targets), mask)

    def aligned(
        self, logits: Tensor, targets: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is held against each other at each position."""
        return logits, targets, mask

    def errors(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every position [batch, length]."""
        smoothing = self.label_smoothing
        return F.cross_entropy(logits.mT, targets, reduction="none", label_smoothing=smoothing)

    def reduced(self, errors: Tensor, mask: Tensor) -> Tensor:
        return (errors * mask).sum() / mask.sum()

    def objective(self, loss: Tensor, logits: Tensor) -> Tensor:
        """What the backward pass starts from."""
        return loss

    # Optimisation.

    def backward(self) -> Tensor:
        """Fill every ``.grad``, also in ``residual``, and return the loss."""
        self.named, self.residual = {}, {}
        for param in self.params.values():
            param.grad = None
        with self.computing():
            with self.autocast():
                logits = self.forward(self.tokens)
                loss = self.loss(logits)
                objective = self.objective(loss, logits)
            scale = LOSS_SCALE if self.style.scaled and self.precision == "fp16-mixed" else 1.0
            (objective * scale).backward()
        for param in self.params.values():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad / scale
        for x in self.residual.values():
            x.grad = torch.zeros_like(x) if x.grad is None else x.grad / scale
        self.change_gradients()
        return loss.detach()

    def change_gradients(self) -> None:
        """Leave the gradients as they are."""

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        return tensor_float_32() if self.precision == "tf32" else contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision in AUTOCAST:
            return torch.autocast("cpu", dtype=AUTOCAST[self.precision])
        return contextlib.nullcontext()

    def optimiser(self, name: str, options: Mapping[str, float]) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if options["weight_decay"] else torch.optim.Adam
        return kind(
            list(self.params.values()),
            lr=options["learning_rate"],
            betas=(self.beta1, self.beta2),
            eps=self.adam_epsilon,
            weight_decay=options["weight_decay"],
            foreach=self.style.foreach,
        )

    def clip(self, max_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.params.values()), max_norm)

    def step_gradients(self, step: int) -> None:
        """Fill every ``.grad`` for a step; those of key biases are 0, and rounded otherwise."""
        self.backward()
        for key, param in self.params.items():
            if key.endswith(".attention.key.bias"):
                param.grad.zero_()

    def steps(self, name: str) -> dict[str, Tensor]:
        """Parameters after steps 1, 2 and 10; the port's own stay as they are."""
        options = self.metadata["optimisers"][name]
        start = {key: param.detach().clone() for key, param in self.params.items()}
        optimiser = self.optimiser(name, options)
        found = {}
        for step in range(1, 11):
            self.step_gradients(step)
            if "max_norm" in options:
                self.clip(options["max_norm"])
            optimiser.step()
            if step in (1, 2, 10):
                copies = {key: param.detach().clone() for key, param in self.params.items()}
                found |= {f"{name}/{step}/{key}": copy for key, copy in copies.items()}
        for key, param in self.params.items():
            param.data = start[key]
        return found

    # Decoding.

    @torch.no_grad()
    def decode(
        self,
        known: Tensor,
        num_steps: int,
        temperature: float = 1.0,
        schedule: str = "cosine",
        exclude_mask_token: bool = True,
    ) -> dict[str, Tensor]:
        """Reveal the most confident tokens first."""
        tokens = self.starting_tokens(known)
        unknown = masked = tokens == 0
        counts = [self.counts(schedule, int(n), num_steps) for n in masked.sum(1)]
        confidence = torch.ones(tokens.shape, dtype=self.confidence_dtype())
        history: dict[str, list[Tensor]] = {"tokens": [], "mask": [], "confidence": []}
        for step in range(max(map(len, counts))):
            with self.computing(), self.autocast():
                logits = self.forward(tokens).to(self.confidence_dtype())
            predicted, log_confidence = self.predict(logits, temperature, exclude_mask_token)
            reopened = self.open_positions(unknown, masked)
            confidence = torch.where(reopened, log_confidence.exp(), confidence)
            masked = masked.clone()
            for row, row_counts in enumerate(counts):
                if step < len(row_counts):
                    chosen = self.choose(log_confidence[row], masked[row], row_counts[step])
                    masked[row] &= ~chosen
            tokens = torch.where(reopened & ~masked, predicted, tokens)
            for key, x in (("tokens", tokens), ("mask", masked), ("confidence", confidence)):
                history[key].append(x)
        found = {f"steps/{key}": torch.stack(states) for key, states in history.items()}
        return {"start": known, "tokens": tokens, **found}

    def confidence_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def starting_tokens(self, known: Tensor) -> Tensor:
        return known.clone()

    def open_positions(self, unknown: Tensor, masked: Tensor) -> Tensor:
        """Where this step's predictions count."""
        return masked

    def predict(
        self, logits: Tensor, temperature: float, exclude_mask_token: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-confidences [rows, length]."""
        if exclude_mask_token:
            logits = logits.clone()
            logits[..., 0] = -torch.inf
        log_p = (logits / temperature).log_softmax(-1)
        predicted = logits.argmax(-1)
        return predicted, log_p.gather(-1, predicted[..., None])[..., 0]

    def choose(self, log_confidence: Tensor, masked: Tensor, count: int) -> Tensor:
        """Mark so many masked positions of a row [length]."""
        by_log = self.style.confidence == "log"
        priority = log_confidence if by_log else log_confidence.exp()
        priority = priority.masked_fill(~masked, -torch.inf)
        order = torch.sort(priority, descending=True, stable=True).indices
        chosen = torch.zeros_like(masked)
        chosen[order[:count]] = True
        return chosen & masked

    def counts(self, schedule: str, num_masked: int, num_steps: int) -> Counts:
        """How many positions each step reveals."""
        num_steps = min(num_steps, num_masked)
        if schedule == "even":
            each, more = divmod(num_masked, num_steps)
            return [each + (step < more) for step in range(num_steps)]
        if schedule == "arccos":
            shares = [
                1 - math.acos(step / num_steps) * 2 / math.pi for step in range(num_steps + 1)
            ]
            revealed = [
                max(step, math.floor(num_masked * share + 1e-9))
                for step, share in enumerate(shares)
            ]
            return [after - before for before, after in itertools.pairwise(revealed)]
        if schedule in GAMMAS:
            return self.falling(GAMMAS[schedule], num_masked, num_steps)
        after = self.cosine if schedule == "cosine" else self.linear_schedule
        masked, counts = num_masked, []
        for step in range(1, num_steps + 1):
            left = after(num_masked, num_steps, step, masked) if step < num_steps else 0
            counts.append(masked - left)
            masked = left
        return counts

    def falling(
        self, gamma: Callable[[float, int], float], num_masked: int, num_steps: int
    ) -> Counts:
        """What MaskGIT's other schedules reveal, without the steps that would reveal nothing."""
        masked, counts = num_masked, []
        for step in range(1, num_steps + 1):
            share = gamma(step / num_steps, num_masked) if step < num_steps else 0.0
            left = min(masked - 1, math.floor(num_masked * share + 1e-9))
            left = max(left, 1) if step < num_steps else 0
            counts.append(masked - left)
            masked = left
        return [count for count in counts if count > 0]

    def cosine(self, num_masked: int, num_steps: int, step: int, masked: int) -> int:
        """How many are masked after a step before the last; ``masked`` were before it."""
        half = 3 * step == 2 * num_steps
        ratio = 0.5 if half else math.cos(math.pi * step / (2 * num_steps))
        return max(1, min(masked - 1, math.floor(num_masked * ratio)))

    def linear_schedule(self, num_masked: int, num_steps: int, step: int, masked: int) -> int:
        return math.floor((1 - step / num_steps) * num_masked + 0.5)

    # What is handed over.

    def arrays(self, sections: Iterable[str]) -> dict[str, np.ndarray]:
        """Compute arrays by golden names, of sections such as "activations" and "adam"."""
        sections = set(sections)
        loss = self.backward()
        found = {f"activations/{name}": x for name, x in self.named.items()}
        found |= {f"gradients/{name}": param.grad for name, param in self.params.items()}
        found |= {f"activation_gradients/{name}": x.grad for name, x in self.residual.items()}
        arrays = {name: to_numpy(x) for name, x in found.items()}
        arrays["loss"] = np.asarray(loss.item()) if self.style.item else to_numpy(loss)
        for name in sections & set(self.metadata["optimisers"]):
            arrays |= {key: to_numpy(x) for key, x in self.steps(name).items()}
        if "decode" in sections:
            arrays |= self.decoded()
        if "schedule" in sections:
            arrays |= self.schedules()
        if "samplers" in sections:
            arrays |= self.sampled()
        return {name: x for name, x in arrays.items() if name.split("/")[0] in sections}

    def decoded(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name, options in self.metadata["decodings"].items():
            length = self.config["seq_len"]
            known = self.tokens[:2] if name == "known" else torch.zeros(1, length, dtype=torch.long)
            for key, x in self.decode(known, **options).items():
                arrays[f"decode/{name}/{key}"] = to_numpy(x)
        return arrays

    @torch.no_grad()
    def sampled(self) -> dict[str, np.ndarray]:
        """Take the steps of every sampler in plain Python, from logits of this program."""
        arrays: dict[str, np.ndarray] = {}
        for name, options in self.metadata["samplers"].items():
            start, drawn = self.drawn[name]
            rows: list[dict[str, list[Any]]] = []
            for row, tokens in enumerate(start.tolist()):
                seen: list[np.ndarray] = []
                logits_at = functools.partial(self.sampler_logits, seen, name == "certain")
                numbers = {key: array[:, row].tolist() for key, array in drawn.items()}
                rows.append(sampler.sample(options, tokens, numbers, logits_at))
                rows[-1]["logits"] = seen
            arrays |= {
                f"samplers/{name}/steps/{key}": self.beside(key, [row[key] for row in rows])
                for key in rows[0]
            }
        return arrays

    def sampler_logits(
        self, seen: list[np.ndarray], saturated: bool, step: int, tokens: list[int]
    ) -> list[list[float]]:
        """Logits [length, vocab] of a sequence, which ``seen`` notes."""
        with self.computing(), self.autocast():
            logits = self.forward(torch.tensor([tokens]))[0].to(self.confidence_dtype())
        if saturated:
            logits = torch.zeros_like(logits)
            logits[:, :2] = torch.tensor([2000.0, 1000.0])
        seen.append(to_numpy(logits))
        rows: list[list[float]] = logits.tolist()
        return rows

    def beside(self, key: str, rows: list[Any]) -> np.ndarray:
        """Put rows beside each other; all but noise is float32, unless the program is wider."""
        array = np.stack([np.asarray(row) for row in rows], axis=1)
        wide = array.dtype.kind != "f" or key == "noise" or self.precision == "float64"
        return array if wide else array.astype(np.float32)

    def schedules(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name in self.metadata["order"]:
            section, *rest = name.split("/")
            if section == "schedule":
                kind, masked, steps = rest
                arrays[name] = np.array(self.counts(kind, int(masked), int(steps)))
        return arrays


SECTIONS = (
    "activations",
    "loss",
    "gradients",
    "activation_gradients",
    "adam",
    "adamw",
    "clipped",
    "decode",
    "schedule",
)

_STOCK_LINEAR = {
    "self_attn.out_proj": "attention.output",
    "linear1": "feed_forward.up",
    "linear2": "feed_forward.down",
}
_STOCK_NORM = {"norm1": "attention_norm", "norm2": "feed_forward_norm"}


GAMMAS: dict[str, Callable[[float, int], float]] = {
    "uniform": lambda r, n: 1 - r,
    "square": lambda r, n: 1 - r * r,
    "cubic": lambda r, n: 1 - r**3,
    "square-root": lambda r, n: 1 - math.sqrt(r),
    "log": lambda r, n: min(1.0, -math.log(r) / math.log(max(n, 2))),
    "exp": lambda r, n: 1 - n ** (r - 1),
}
"""Of k/K and the number of masked positions: the share of these that stays masked."""


def _drawn(vectors: Golden, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Where a sampler starts, and the numbers that were drawn for it."""
    steps = f"samplers/{name}/steps/"
    drawn = [full for full in vectors.arrays if full.startswith(steps) and "uniforms" in full]
    numbers = {full.removeprefix(steps): vectors.arrays[full] for full in drawn}
    return vectors.arrays[f"samplers/{name}/start"], numbers


def is_output(name: str) -> bool:
    """Whether a name is that of the residual stream after a block."""
    return name.startswith("blocks.") and name.split(".")[2:] == ["output"]


def to_numpy(x: Tensor) -> np.ndarray:
    """Copy; NumPy has no bfloat16, which float32 holds exactly."""
    x = x.detach().clone()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def with_gradient_of(value: Tensor, path: Tensor) -> Tensor:
    """Return exactly one number, with the gradient of another."""
    return value.detach() + (path - path.detach())


class _RoundedProducts(TorchDispatchMode):
    """Matrix products take inputs of 10 explicit bits, forward and backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first = _FIRST_FACTOR.get(func.overloadpacket)
        if first is not None:
            factors = [_round_to_tf32(x) for x in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        elif any(part in str(func) for part in ("attention", "linear", "matmul")):
            raise NotImplementedError(f"{func} multiplies matrices, unrounded")
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_FIRST_FACTOR: dict[Callable[..., Any], int] = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.addmm: 1,
    _aten.baddbmm: 1,
}


def _round_to_tf32(x: Tensor) -> Tensor:
    """Round to the nearest float32 whose last 13 bits are 0, halves away from zero.

    That is what the GPU's conversion (cvt.rna.tf32) does.
    """
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tensor_float_32() -> Iterator[None]:
    """Emulate TensorFloat-32; attention is computed by matrix products that can be seen."""
    with sdpa_kernel(SDPBackend.MATH), _RoundedProducts():
        yield
