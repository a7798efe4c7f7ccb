"""Continuous MAR in PyTorch as its users write it, to be timed.

What is no part of the model, patches and tables, is marref's own: the witness, which shares nothing
with it, is tests/torch_continuous.py.
"""

import math

import numpy as np
import torch
from torch.nn import functional

from marref import schedules
from marref.continuous import ContinuousMAR, diffusion, tokens
from marref.continuous.loss import masked_by
from marref.interop import mar
from marref.trees import Tree

_NETWORK = "diffloss.net"


class Port:
    """A model over a state_dict with the published names, float32, in eager mode."""

    def __init__(self, model: ContinuousMAR, params: Tree) -> None:
        self.model = model
        state = mar.to_state_dict(params, model)
        self.state = {name: torch.tensor(x, requires_grad=True) for name, x in state.items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply a linear layer."""
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply a layer norm."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Run a block of the transformer."""
        batch, length, width = x.shape
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x))
        qkv = qkv.reshape(batch, length, 3, self.model.num_heads, -1).permute(2, 0, 3, 1, 4)
        context = functional.scaled_dot_product_attention(*qkv)
        context = context.transpose(1, 2).reshape(batch, length, width)
        x = x + self.linear(f"{name}.attn.proj", context)
        hidden = functional.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def z(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the condition of every token; -1 is no class."""
        state, size = self.state, self.model.buffer_size
        classes = torch.cat([state["class_emb.weight"], state["fake_latent"]])[labels]
        h = torch.cat([classes[:, None].expand(-1, size, -1), self.linear("z_proj", x)], dim=1)
        h = self.norm("z_proj_ln", h + state["encoder_pos_embed_learned"])
        seen = torch.cat([torch.ones(len(mask), size, dtype=torch.bool), ~mask], dim=1)
        h = h[seen].reshape(len(mask), -1, h.shape[-1])
        for index in range(self.model.encoder_layers):
            h = self.block(f"encoder_blocks.{index}", h)
        h = self.linear("decoder_embed", self.norm("encoder_norm", h))
        full = state["mask_token"].expand(len(mask), seen.shape[1], -1).clone()
        full[seen] = h.reshape(-1, h.shape[-1])
        h = full + state["decoder_pos_embed_learned"]
        for index in range(self.model.decoder_layers):
            h = self.block(f"decoder_blocks.{index}", h)
        return self.norm("decoder_norm", h)[:, size:] + state["diffusion_pos_embed_learned"]

    def network(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Compute [e, v] of rows."""
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        angles = t[:, None].float() * frequencies
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        time = self.linear(
            f"{_NETWORK}.time_embed.mlp.2",
            functional.silu(self.linear(f"{_NETWORK}.time_embed.mlp.0", time)),
        )
        y = functional.silu(time + self.linear(f"{_NETWORK}.cond_embed", z))
        h = self.linear(f"{_NETWORK}.input_proj", x)
        for index in range(self.model.diffusion_layers):
            name = f"{_NETWORK}.res_blocks.{index}"
            shift, scale, gate = self.linear(f"{name}.adaLN_modulation.1", y).chunk(3, dim=1)
            inner = self.norm(f"{name}.in_ln", h) * (1 + scale) + shift
            inner = functional.silu(self.linear(f"{name}.mlp.0", inner))
            h = h + gate * self.linear(f"{name}.mlp.2", inner)
        last = f"{_NETWORK}.final_layer"
        shift, scale = self.linear(f"{last}.adaLN_modulation.1", y).chunk(2, dim=1)
        h = functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.linear(f"{last}.linear", h)

    def loss(self, images: np.ndarray, labels: np.ndarray, draws: Tree) -> torch.Tensor:
        """Compute the loss of a batch."""
        model, copies = self.model, self.model.diffusion_batch_mul
        clean = torch.tensor(tokens.from_images(images, model.patch_size))
        mask = torch.tensor(masked_by(draws["orders"], draws["num_masked"]))
        of_class = torch.tensor(np.where(draws["label_dropped"], -1, labels))
        z = self.z(clean, of_class, mask).reshape(-1, model.decoder_dim).repeat(copies, 1)
        clean = clean.reshape(-1, model.token_dim).repeat(copies, 1)
        weight = mask.reshape(-1).repeat(copies).float()
        noise = torch.tensor(draws["noise"], dtype=torch.float32)
        times = torch.tensor(draws["timesteps"])
        steps = Steps(diffusion.process(model.noise_schedule))
        noisy = steps.noisy(clean, noise, times)
        e, v = self.network(noisy, times, z).chunk(2, dim=1)
        rows = ((noise - e) ** 2).mean(dim=1) + steps.bound(e.detach(), v, clean, noise, times)
        return (rows * weight).sum() / weight.sum()

    @torch.no_grad()
    def sample(self, labels: torch.Tensor, num_steps: int, diffusion_steps: int) -> torch.Tensor:
        """Generate tokens, without guidance, the estimate of the clean token clipped to 3."""
        model, batch = self.model, len(labels)
        steps = Steps(diffusion.process(model.noise_schedule, diffusion_steps))
        orders = torch.rand(batch, model.length).argsort(dim=1)
        places = orders.argsort(dim=1)
        x = torch.zeros(batch, model.length, model.token_dim)
        left = model.length
        for count in schedules.cosine(model.length, num_steps):
            mask, left = places < left, left - int(count)
            now = mask & (places >= left)
            x[now] = self._chain(steps, self.z(x, labels, mask)[now])
        return x

    def _chain(self, steps: "Steps", z: torch.Tensor) -> torch.Tensor:
        x = torch.randn(len(z), self.model.token_dim)
        for index in reversed(range(len(steps.timestep))):
            t = torch.full((len(z),), int(steps.timestep[index]))
            e, v = self.network(x, t, z).chunk(2, dim=1)
            x = steps.back(e, v, x, index)
        return x


class Steps:
    """The tables of a noise schedule, float32."""

    def __init__(self, steps: diffusion.Process) -> None:
        self.timestep = steps.timestep
        names = ("alpha_bar", "low", "high", "to_clean", "mean_of_clean", "mean_of_noisy")
        self.table = {
            name: torch.tensor(getattr(steps, name), dtype=torch.float32) for name in names
        }

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute x_t."""
        bar = self.table["alpha_bar"][t][:, None]
        return bar.sqrt() * clean + (1 - bar).sqrt() * noise

    def bound(
        self,
        e: torch.Tensor,
        v: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the variational bound in bits, row by row."""
        low, high = (self.table[name][t][:, None] for name in ("low", "high"))
        log_variance = low + (v + 1) / 2 * (high - low)
        factor = self.table["mean_of_clean"] * self.table["to_clean"]
        apart = factor[t][:, None] * (e - noise)
        kl = log_variance - low - 1 + (low - log_variance).exp()
        kl = (kl + apart**2 * (-log_variance).exp()) / 2
        shrink = (-log_variance / 2).exp()
        above, below = (_normal(shrink * (apart + side / 255)) for side in (1, -1))
        inside = torch.where(clean > 0.999, 1 - below, above - below)
        p = torch.where(clean < -0.999, above, inside).clamp(min=1e-12)
        return torch.where((t == 0)[:, None], -p.log(), kl).mean(dim=1) / math.log(2)

    def back(self, e: torch.Tensor, v: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        """Take a step back."""
        table = {name: float(values[index]) for name, values in self.table.items()}
        clean = (x / math.sqrt(table["alpha_bar"]) - table["to_clean"] * e).clamp(-3.0, 3.0)
        mean = table["mean_of_clean"] * clean + table["mean_of_noisy"] * x
        if index == 0:
            return mean
        log_variance = table["low"] + (v + 1) / 2 * (table["high"] - table["low"])
        return mean + (log_variance / 2).exp() * torch.randn_like(x)


def _normal(a: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
