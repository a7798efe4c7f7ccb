"""A user's MAR in plain PyTorch functions, which makes the mistakes that it is told to make.

It takes parameters by marref's names and layouts, and returns arrays by golden names.  The mistakes
are those that people make in PyTorch, written as they would be; their gradients are autograd's.
"""

import math
import re
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

# Arrays this small gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

EPSILON = {
    "layer-norm-epsilon-1e-3": 1e-3,
    "layer-norm-epsilon-1e-6": 1e-6,
    "layer-norm-epsilon-1e-12": 1e-12,
}
ACTIVATION = {
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu-sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu-relu": F.relu,
    "gelu-leaky-relu": F.leaky_relu,
    "gelu-silu": F.silu,
    "gelu-missing": lambda x: x,
}
SCALE = {
    "attention-unscaled": lambda head_dim, num_heads: 1.0,
    "attention-scaled-by-embed-dim": lambda head_dim, num_heads: (head_dim * num_heads) ** -0.5,
    "attention-scaled-without-root": lambda head_dim, num_heads: 1 / head_dim,
}
# What the parts of a fused projection, which are query, key and value, are taken for.
PARTS = {
    "attention-query-and-key-parameters-swapped": ("key", "query", "value"),
    "attention-key-and-value-parameters-swapped": ("query", "value", "key"),
    "attention-query-and-value-parameters-swapped": ("value", "key", "query"),
    "attention-parameters-read-as-key-value-query": ("key", "value", "query"),
    "attention-parameters-read-as-value-query-key": ("value", "query", "key"),
}
OPTIMISERS = {"adam": 0.0, "adamw": 0.1, "clipped": 0.0}
LEARNING_RATE, MAX_NORM = 0.01, 0.1


class FaultyMAR:
    """The model, its loss and its optimisers, with some mistakes.

    ``leaves`` are parameters by marref's names, ``config`` the model's, ``mistakes`` some names.
    """

    def __init__(
        self,
        config: dict,
        leaves: dict[str, np.ndarray],
        mistakes: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
    ):
        self.config = config
        self.mistakes = frozenset(mistakes)
        self.dtype = dtype
        self.params = {
            name: torch.tensor(leaf).to(dtype).requires_grad_() for name, leaf in leaves.items()
        }
        self.named: dict[str, torch.Tensor] = {}

    def chosen(self, choices: dict, otherwise):
        """What one of the mistakes chooses, or what is right."""
        return next((choices[name] for name in self.mistakes & set(choices)), otherwise)

    def keep(self, name: str, x: torch.Tensor) -> torch.Tensor:
        self.named[f"activations/{name}"] = x
        return x

    def param(self, name: str) -> torch.Tensor:
        """Look a parameter up, which may be another block's."""
        match = re.match(r"blocks\.(\d+)", name)
        if match and "block-parameters-shared" in self.mistakes:
            name = "blocks.0" + name[match.end() :]
        if match and "block-order-reversed" in self.mistakes:
            name = f"blocks.{self.config['num_layers'] - 1 - int(match[1])}" + name[match.end() :]
        return self.params[name]

    # Forward.

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.padding = (tokens == 0)[:, None, None, :]
        x = self.keep("embedding", self.embedding(tokens))
        for index in range(self.config["num_layers"]):
            x = self.keep(f"blocks.{index}.output", self.block(f"blocks.{index}", x))
        if "final-norm-missing" not in self.mistakes:
            x = self.layer_norm("final_norm", x)
        self.keep("final_norm", x)
        bias = "head-without-bias" not in self.mistakes
        return self.keep("logits", self.linear("head", x, bias=bias))

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        table = self.params["embedding.table"]
        padding = 0 if "embedding-gradient-padding" in self.mistakes else None
        if "embedding-ids-off-by-one" in self.mistakes:
            tokens = (tokens - 1) % len(table)
        x = F.embedding(tokens, table, padding_idx=padding)
        if "embedding-times-root-embed-dim" in self.mistakes:
            x = x * math.sqrt(x.shape[-1])
        if "positions-missing" in self.mistakes:
            return x
        if "positions-added-twice" in self.mistakes:
            x = x + self.positions(*x.shape[1:])
        return x + self.positions(*x.shape[1:])

    def positions(self, length: int, embed_dim: int) -> torch.Tensor:
        half = embed_dim // 2
        index = torch.arange(half, dtype=torch.float64)
        position = torch.arange(length, dtype=torch.float64)
        if "positions-from-one" in self.mistakes:
            position = position + 1
        if "positions-interleaved" in self.mistakes:
            angle = torch.outer(position, 10000.0 ** (-2 * index / embed_dim))
            table = torch.stack([angle.sin(), angle.cos()], dim=2).reshape(length, embed_dim)
            return table.to(self.dtype)
        steps = half if "positions-other-denominator" in self.mistakes else max(half - 1, 1)
        angle = torch.outer(position, 10000.0 ** (-index / steps))
        waves = [angle.sin(), angle.cos()]
        if "positions-cosine-first" in self.mistakes:
            waves.reverse()
        return torch.cat(waves, dim=1).to(self.dtype)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        dropped = "residual-gradient-dropped" in self.mistakes
        branch = self.keep(f"{name}.attention_norm", self.layer_norm(f"{name}.attention_norm", x))
        overwritten = {"residual-from-normalised", "residual-around-attention-from-normalised"}
        if overwritten & self.mistakes:
            x = branch
        original = x
        branch = self.attention(f"{name}.attention", branch)
        if "residual-around-attention-missing" in self.mistakes:
            x = branch
        else:
            x = (x.detach() if dropped else x) + branch
        source = original if "block-parallel" in self.mistakes else x
        normalised = self.layer_norm(f"{name}.feed_forward_norm", source)
        branch = self.keep(f"{name}.feed_forward_norm", normalised)
        overwritten = {"residual-from-normalised", "residual-around-feed-forward-from-normalised"}
        if overwritten & self.mistakes:
            x = branch
        branch = self.feed_forward(f"{name}.feed_forward", branch)
        if "residual-around-feed-forward-missing" in self.mistakes:
            return branch
        return (x.detach() if dropped else x) + branch

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch, length, embed_dim = x.shape
        num_heads = self.config["num_heads"]
        head_dim = embed_dim // num_heads

        def split(y: torch.Tensor) -> torch.Tensor:
            if "attention-heads-innermost" in self.mistakes:
                return y.view(batch, length, head_dim, num_heads).permute(0, 3, 1, 2)
            if "attention-heads-reshaped" in self.mistakes:
                return y.view(batch, num_heads, length, head_dim)
            return y.view(batch, length, num_heads, head_dim).transpose(1, 2)

        bias = "attention-without-qkv-biases" not in self.mistakes
        names = ("query", "key", "value")
        fused = torch.cat([self.linear(f"{name}.{part}", x, bias=bias) for part in names], dim=-1)
        if "attention-parameters-read-by-head" in self.mistakes:
            fused = fused.view(batch, length, num_heads, 3, head_dim).transpose(2, 3)
        if "attention-parameters-read-innermost" in self.mistakes:
            fused = fused.view(batch, length, num_heads, head_dim, 3).movedim(-1, 2)
        heads = map(split, fused.reshape(batch, length, 3 * embed_dim).chunk(3, dim=-1))
        parts = dict(zip(self.chosen(PARTS, names), heads, strict=True))
        query, key, value = (self.keep(f"{name}.{part}", parts[part]) for part in names)
        if "attention-query-and-key-swapped" in self.mistakes:
            query, key = key, query
        scores = query @ key.mT * self.chosen(SCALE, lambda d, _: d**-0.5)(head_dim, num_heads)
        if "attention-causal" in self.mistakes:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        if "attention-mask-keys-hidden" in self.mistakes:
            scores = scores.masked_fill(self.padding, -1e9)
        axis = -2 if "attention-softmax-over-queries" in self.mistakes else -1
        if "attention-softmax-plus-one" in self.mistakes:
            weights = scores.exp() / (1 + scores.exp().sum(axis, keepdim=True))
        else:
            weights = scores.softmax(axis)
        self.keep(f"{name}.weights", weights)
        if "attention-gradient-through-values-only" in self.mistakes:
            weights = weights.detach()
        context = weights @ value
        if "attention-heads-innermost" in self.mistakes:
            context = context.permute(0, 2, 3, 1).reshape(batch, length, embed_dim)
        elif "attention-heads-reshaped" in self.mistakes:
            context = context.reshape(batch, length, embed_dim)
        else:
            context = context.transpose(1, 2).reshape(batch, length, embed_dim)
        self.keep(f"{name}.context", context)
        bias = "attention-without-output-bias" not in self.mistakes
        return self.keep(f"{name}.output", self.linear(f"{name}.output", context, bias=bias))

    def feed_forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = "feed-forward-without-biases" not in self.mistakes
        x = self.keep(f"{name}.up", self.linear(f"{name}.up", x, bias=bias))
        x = self.keep(f"{name}.activation", self.chosen(ACTIVATION, F.gelu)(x))
        return self.keep(f"{name}.down", self.linear(f"{name}.down", x, bias=bias))

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        if "layer-norm-gradient-without-mean" in self.mistakes:
            mean = mean.detach()
        if "layer-norm-uncentred" in self.mistakes:
            mean = torch.zeros_like(mean)
        centred = x - mean
        biased = "layer-norm-unbiased-variance" not in self.mistakes
        variance = (centred**2).sum(-1, keepdim=True) / (x.shape[-1] - (not biased))
        if "layer-norm-gradient-without-correlation" in self.mistakes:
            variance = variance.detach()
        epsilon = self.chosen(EPSILON, self.config["layer_norm_epsilon"])
        if "layer-norm-unbiased-epsilon-outside-root" in self.mistakes:
            normalised = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + epsilon)
        elif "layer-norm-epsilon-outside-root" in self.mistakes:
            normalised = centred / (variance.sqrt() + epsilon)
        else:
            normalised = centred / (variance + epsilon).sqrt()
        if "layer-norm-without-scale" not in self.mistakes:
            normalised = normalised * self.param(f"{name}.scale")
        if "layer-norm-without-bias" in self.mistakes:
            return normalised
        return normalised + self.param(f"{name}.bias")

    def linear(self, name: str, x: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
        kernel = self.param(f"{name}.kernel")
        square = kernel.shape[0] == kernel.shape[1]
        if "linear-square-kernels-transposed" in self.mistakes and square:
            kernel = kernel.T
        if "linear-kernels-reshaped" in self.mistakes:
            kernel = kernel.T.reshape(kernel.shape)
        inputs = name.endswith(("attention.query", "attention.key", "attention.value"))
        if "attention-qkv-kernels-transposed" in self.mistakes and inputs:
            kernel = kernel.T
        output = name.endswith("attention.output")
        if "attention-output-kernel-transposed" in self.mistakes and output:
            kernel = kernel.T
        if not bias or "linear-without-biases" in self.mistakes:
            return x @ kernel
        return x @ kernel + self.param(f"{name}.bias")

    # Loss.

    def loss(self, logits: torch.Tensor, batch: dict[str, np.ndarray]) -> torch.Tensor:
        targets, mask = torch.from_numpy(batch["targets"]), torch.from_numpy(batch["mask"]) == 1
        if "loss-targets-shifted" in self.mistakes:
            targets = targets.roll(-1, dims=1)
        if "loss-shifted" in self.mistakes:
            logits, targets, mask = logits[:, :-1], targets[:, 1:], mask[:, 1:]
        if "loss-softmax-twice" in self.mistakes:
            logits = logits.softmax(-1)
        smoothing = 0.1 if "loss-label-smoothing" in self.mistakes else 0.0
        errors = F.cross_entropy(logits.mT, targets, reduction="none", label_smoothing=smoothing)
        if "loss-base-2" in self.mistakes:
            errors = errors / math.log(2)
        if "loss-over-all-positions" in self.mistakes:
            return errors.mean()
        if "loss-over-unmasked-positions" in self.mistakes:
            return errors[~mask].mean()
        if "loss-summed" in self.mistakes:
            return errors[mask].sum()
        if "loss-over-batch-times-length" in self.mistakes:
            return (errors * mask).mean()
        if "loss-averaged-by-sequence" in self.mistakes:
            return ((errors * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        if "loss-averaged-by-sequence-without-empty" in self.mistakes:
            return torch.stack(
                [e[m].mean() for e, m in zip(errors, mask, strict=True) if m.any()]
            ).mean()
        if "loss-over-ratio" in self.mistakes:
            ratio = mask.to(self.dtype).mean(1, keepdim=True).expand(mask.shape)
            return (errors[mask] / ratio[mask]).mean()
        return errors[mask].mean()

    # Optimisation.

    def gradients(self, batch: dict[str, np.ndarray], *, zero_grad: bool = True) -> torch.Tensor:
        """Fill every ``.grad`` and return the loss."""
        if zero_grad:
            for param in self.params.values():
                param.grad = None
        value = self.loss(self.logits(torch.from_numpy(batch["tokens"])), batch)
        value.backward()
        for param in self.params.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        return value

    def optimiser(self, name: str) -> torch.optim.Optimizer:
        params = list(self.params.values())
        options = {"lr": LEARNING_RATE, "weight_decay": OPTIMISERS[name], "foreach": False}
        if "adam-epsilon-1e-7" in self.mistakes:
            options["eps"] = 1e-7
        if "adam-epsilon-1e-6" in self.mistakes:
            options["eps"] = 1e-6
        if "adam-beta2-0.95" in self.mistakes:
            options["betas"] = (0.9, 0.95)
        if "adam-without-bias-correction" in self.mistakes:
            return UncorrectedAdam(params, lr=LEARNING_RATE, weight_decay=OPTIMISERS[name])
        if "adam-decay-in-gradient" in self.mistakes:
            return torch.optim.Adam(params, **options)
        if "adam-decay-of-kernels-only" in self.mistakes:
            groups = [
                {"params": [param for param in params if param.ndim > 1]},
                {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, **options)
        if "adam-decay-without-learning-rate" in self.mistakes:
            options["weight_decay"] /= LEARNING_RATE
        optimiser = torch.optim.AdamW(params, **options)
        if "adam-step-ahead" in self.mistakes:
            for param in params:
                moments = {"exp_avg": torch.zeros_like(param)}
                moments["exp_avg_sq"] = torch.zeros_like(param)
                optimiser.state[param] = {"step": torch.tensor(1.0), **moments}
        return optimiser

    def optimise(self, name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Parameters after steps 1, 2 and 10 with one optimiser; they stay as they were."""
        start = {key: param.detach().clone() for key, param in self.params.items()}
        optimiser = self.optimiser(name)
        arrays = {}
        for step in range(1, 11):
            zero_grad = step == 1 or "gradients-not-zeroed" not in self.mistakes
            self.gradients(batch, zero_grad=zero_grad)
            for key, param in self.params.items():
                if key.endswith(".attention.key.bias"):
                    param.grad.zero_()
            if name == "clipped":
                self.clip()
            optimiser.step()
            if step in (1, 2, 10):
                arrays |= {f"{name}/{step}/{key}": to_numpy(p) for key, p in self.params.items()}
        for key, param in self.params.items():
            param.data = start[key]
        return arrays

    def clip(self) -> None:
        params = list(self.params.values())
        if "clip-values" in self.mistakes:
            torch.nn.utils.clip_grad_value_(params, MAX_NORM)
        elif "clip-each-array" in self.mistakes:
            for param in params:
                torch.nn.utils.clip_grad_norm_([param], MAX_NORM)
        elif "clip-each-fused-array" in self.mistakes:
            arrays: dict[str, list[torch.Tensor]] = {}
            for name, param in self.params.items():
                array = re.sub("query|key|value", "in_proj", name)
                arrays.setdefault(array, []).append(param)
            for fused in arrays.values():
                torch.nn.utils.clip_grad_norm_(fused, MAX_NORM)
        elif "clip-without-1e-6" in self.mistakes:
            norm = torch.cat([param.grad.ravel() for param in params]).norm()
            for param in params:
                param.grad *= min(1.0, float(MAX_NORM / norm))
        else:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)

    def arrays(
        self, batch: dict[str, np.ndarray], optimisers: Iterable[str] = ()
    ) -> dict[str, np.ndarray]:
        """Activations, loss and gradients, and parameters after steps of the optimisers."""
        value = self.gradients(batch)
        arrays = {name: to_numpy(x) for name, x in self.named.items()}
        arrays["loss"] = to_numpy(value)
        arrays |= {f"gradients/{key}": to_numpy(p.grad) for key, p in self.params.items()}
        for name in optimisers:
            arrays |= self.optimise(name, batch)
        return arrays


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam from memory: θ ← θ - η (m / (√v + ε) + λ θ)."""

    def __init__(self, params: list[torch.Tensor], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(param), torch.zeros_like(param)
                state["m"].mul_(0.9).add_(param.grad, alpha=0.1)
                state["v"].mul_(0.999).addcmul_(param.grad, param.grad, value=0.001)
                update = state["m"] / (state["v"].sqrt() + 1e-8) + group["weight_decay"] * param
                param.sub_(group["lr"] * update)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Copy; NumPy has no bfloat16, which float32 holds exactly."""
    x = x.detach().clone()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
