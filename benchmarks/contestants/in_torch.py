"""MAR as a PyTorch user writes it: eager and compiled, head everywhere or where masked."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.cases import CHECKED_STEPS, CONFIGS, LEARNING_RATE, MASK_TOKEN, Case, Config
from benchmarks.contestants import layout

Array = npt.NDArray[np.generic]


def tiny_operation() -> None:
    """Make PyTorch load what it loads late: its BLAS, autograd, the optimiser."""
    weight = nn.Parameter(torch.ones(8, 8))
    (weight @ weight).sum().backward()
    torch.optim.Adam([weight]).step()


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, embed_dim] -> the same."""
        batch, length, embed_dim = x.shape
        heads = (batch, length, self.num_heads, embed_dim // self.num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        context = F.scaled_dot_product_attention(query, key, value)
        return self.output(context.transpose(1, 2).reshape(batch, length, embed_dim))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.up = nn.Linear(embed_dim, 4 * embed_dim)
        self.down = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, embed_dim] -> the same."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, embed_dim] -> the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class MAR(nn.Module):
    """The model, with the weights of ``arrays``."""

    positions: Tensor

    def __init__(self, sizes: Config, dropout: float, arrays: Mapping[str, Array]):
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.embed_dim)
        self.register_buffer("positions", torch.from_numpy(arrays["positions"]))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(sizes.embed_dim, sizes.num_heads, dropout) for _ in range(sizes.num_layers)
        )
        self.final_norm = nn.LayerNorm(sizes.embed_dim)
        self.head = nn.Linear(sizes.embed_dim, sizes.vocab_size)
        self.to(self.positions.dtype)
        for name, view in self.views(lambda parameter: parameter.data):
            view.copy_(torch.from_numpy(layout.read(arrays, name)))

    def encode(self, tokens: Tensor) -> Tensor:
        """Run everything below the head."""
        x = self.dropout(self.embedding(tokens) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at all positions."""
        return self.head(self.encode(tokens))

    def logits_at_rows(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits at some positions of the flattened batch."""
        return self.head(self.encode(tokens).flatten(0, 1)[rows])

    def loss_at_rows(self, tokens: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Loss with the head at the masked positions only."""
        return F.cross_entropy(self.logits_at_rows(tokens, rows), labels)

    def views(self, select: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield what ``select`` takes from each parameter, in marref's layout and by its names."""
        for name, parameter in self.named_parameters():
            owner, kind = name.rsplit(".", 1)
            tensor = select(parameter)
            if kind == "bias":
                yield name, tensor
            elif owner == "embedding":
                yield f"{owner}.table", tensor
            elif tensor.ndim == 1:
                yield f"{owner}.scale", tensor
            else:
                yield f"{owner}.kernel", tensor.T


def masked_rows(mask: Tensor) -> Tensor:
    """Return the indices of the masked positions in the flattened batch."""
    return mask.flatten().nonzero()[:, 0]


def compiled(function: Callable[..., Tensor], variant: str) -> Callable[..., Tensor]:
    """Compile a function if the variant says so."""
    if variant == "autotuned":
        return torch.compile(function, mode="max-autotune-no-cudagraphs")
    return torch.compile(function) if variant.startswith("compiled") else function


def model_of(case: Case, arrays: Mapping[str, Array]) -> MAR:
    """Make the model of a case."""
    return MAR(CONFIGS[case.config], case.dropout, arrays)


class Training:
    """A step of training, plain, gathered, with fused Adam, or compiled or autotuned besides."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        self.model = model_of(case, arrays)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=LEARNING_RATE, fused=variant not in ("plain", "gathered")
        )
        self.tokens, self.targets, self.mask = (
            torch.from_numpy(arrays[name]) for name in ("tokens", "targets", "mask")
        )
        self.gathered = variant != "plain"
        self.loss_at_rows = compiled(self.model.loss_at_rows, variant)

    def loss(self) -> Tensor:
        """Cross-entropy over the masked positions."""
        if self.gathered:
            rows = masked_rows(self.mask)
            return self.loss_at_rows(self.tokens, rows, self.targets.flatten()[rows])
        return F.cross_entropy(self.model(self.tokens)[self.mask], self.targets[self.mask])

    def run(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss, and gradients by marref's names."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        views = self.model.views(lambda parameter: parameter.grad)
        return loss.item(), layout.split({name: view.numpy() for name, view in views})


class Trainer:
    """A step of training as users write one, with the head everywhere or gathered.

    Of what they write the faster: AdamW and clipping are fused, the average goes over all
    parameters in one call.

    Parameters
    ----------
    model : MAR
    options : dict
        Of a resolved `marref.training.runs.Config`.
    gathered : bool
    """

    def __init__(self, model: MAR, options: Mapping[str, Any], gathered: bool):
        self.model, self.gathered, self.max_norm = model, gathered, options["max_norm"]
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options["learning_rate"], weight_decay=options["weight_decay"], fused=True
        )
        warmup, total = options["warmup_steps"], options["num_steps"]
        self.scheduler = LambdaLR(self.optimizer, lambda step: warmup_cosine(step, warmup, total))
        decay = get_ema_multi_avg_fn(options["average_decay"])
        self.average = AveragedModel(model, multi_avg_fn=decay)
        # The first update would copy the parameters; marref's is an average from the start.
        self.average.n_averaged += 1

    def step(self, targets: Tensor) -> None:
        """Draw masks, and take a step."""
        self.given_step(*draw_masks(targets))

    def given_step(self, tokens: Tensor, targets: Tensor, mask: Tensor) -> None:
        """Take a step on a batch that is masked."""
        self.optimizer.zero_grad()
        self.loss(self.model, tokens, targets, mask).backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.model)

    def loss(self, model: MAR, tokens: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy over the masked positions."""
        if self.gathered:
            rows = masked_rows(mask)
            return model.loss_at_rows(tokens, rows, targets.flatten()[rows])
        return F.cross_entropy(model(tokens)[mask], targets[mask])


def draw_masks(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask sequences, each to a ratio 1 - cos(πu/2) of its own."""
    ratio = 1.0 - torch.cos(0.5 * math.pi * torch.rand(len(targets)))
    counts = (ratio * targets.shape[1]).round().clamp(min=1)
    mask = torch.rand(targets.shape).argsort(1) < counts[:, None]
    return targets.masked_fill(mask, MASK_TOKEN), targets, mask


class Loop:
    """A step of a training loop: a batch is drawn too."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        options = json.loads(str(arrays["options"]))
        self.trainer = Trainer(model_of(case, arrays), options, variant == "gathered")
        self.batch_size = case.batch
        self.data = 1 + torch.from_numpy(arrays["ids"])
        given = ("tokens", "targets", "mask")
        self.batch = [torch.from_numpy(arrays[name]) for name in given]
        self.given = [
            [torch.from_numpy(arrays[f"{name}/{number}"]) for name in given]
            for number in range(CHECKED_STEPS)
        ]

    def run(self) -> None:
        """Take one step."""
        self.trainer.step(self.data[torch.randint(len(self.data), (self.batch_size,))])

    def given_step(self, number: int) -> None:
        """Take one step on the batch that marref draws for it."""
        self.trainer.given_step(*self.given[number])

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss, and gradients by marref's names."""
        trainer = self.trainer
        trainer.optimizer.zero_grad()
        loss = trainer.loss(trainer.model, *self.batch)
        loss.backward()
        views = trainer.model.views(lambda parameter: parameter.grad)
        return loss.item(), layout.split({name: view.numpy() for name, view in views})

    def losses(self) -> list[float]:
        """Loss of the parameters, and of their average."""
        pair = self.trainer.model, self.trainer.average.module
        return [self.trainer.loss(model, *self.batch).item() for model in pair]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return what the peak of the learning rate is multiplied with."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    # Measuring may go on when the schedule has ended.
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Decoding:
    """Generate from nothing, with logits at all positions or at the masked ones."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        model = model_of(case, arrays).eval()
        self.gathered = variant in ("gathered", "compiled_gathered")
        self.logits = compiled(model.logits_at_rows if self.gathered else model, variant)
        # On a CPU, PyTorch tunes products with constant weights only; its manual says to freeze.
        if variant == "autotuned":
            inductor.freezing = True
        self.reveal_counts = arrays["reveal_counts"].tolist()
        self.shape = (case.batch, case.seq_len)

    @torch.inference_mode()
    def run(self) -> Array:
        """Decode once."""
        tokens = torch.full(self.shape, MASK_TOKEN)
        for count in self.reveal_counts:
            predict = self.predict_masked if self.gathered else self.predict_all
            confidence, predicted = predict(tokens, tokens == MASK_TOKEN)
            revealed = confidence.topk(count).indices
            tokens.scatter_(1, revealed, predicted.gather(1, revealed))
        return tokens.numpy()

    def predict_all(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and token at every position; confidence -1 where nothing is masked."""
        confidence, predicted = most_likely(self.logits(tokens))
        confidence[~mask] = -1
        return confidence, predicted

    def predict_masked(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same from logits at the masked positions."""
        rows = masked_rows(mask)
        at_rows, predicted_at_rows = most_likely(self.logits(tokens, rows))
        confidence, predicted = at_rows.new_full(self.shape, -1), tokens.clone()
        confidence.view(-1)[rows] = at_rows
        predicted.view(-1)[rows] = predicted_at_rows
        return confidence, predicted


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability and its id, [MASK] left out."""
    logits[..., MASK_TOKEN] = -torch.inf
    return logits.softmax(-1).max(-1)


class Product:
    """The product of two square matrices."""

    def __init__(self, case: Case, arrays: Mapping[str, Array], variant: str):
        shape = (2, case.seq_len, case.seq_len)
        self.left, self.right = torch.rand(shape, dtype=getattr(torch, case.dtype))

    def run(self) -> None:
        """Multiply once."""
        self.left @ self.right


TASKS = {"training": Training, "loop": Loop, "decoding": Decoding, "product": Product}
