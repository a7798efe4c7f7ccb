"""Continuous MAR in PyTorch, from the facts of the published code: stock layers and autograd.

Parameters come by the published names (`marref.interop.mar.to_state_dict`); everything random is
handed in.  What a twin has computed is in ``seen``, by the names of golden activations.  A mistake
is a subclass.
"""

import math

import torch
from torch.nn import functional

EPSILON = 1e-6


class Published:
    """The published model over a state_dict of tensors."""

    def __init__(self, model, state):
        self.model, self.state, self.seen = model, state, {}

    def saw(self, name, x):
        self.seen[f"activations/{name}"] = x.detach().numpy()
        return x

    def linear(self, name, x):
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x):
        affine = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], *affine, eps=EPSILON)

    def block(self, name, x):
        batch, length, width = x.shape
        heads = self.model.num_heads
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x))
        qkv = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        context = functional.scaled_dot_product_attention(*qkv)
        context = context.transpose(1, 2).reshape(batch, length, width)
        self.saw(f"{name}.attention.context", context)
        x = x + self.linear(f"{name}.attn.proj", context)
        normal = self.saw(f"{name}.feed_forward_norm", self.norm(f"{name}.norm2", x))
        hidden = functional.gelu(self.linear(f"{name}.mlp.fc1", normal))
        return self.saw(f"{name}.output", x + self.linear(f"{name}.mlp.fc2", hidden))

    def z(self, tokens, labels, mask):
        """labels: -1 is no class; mask: bool, True where masked."""
        state, model = self.state, self.model
        size = model.buffer_size
        h = self.linear("z_proj", self.saw("tokens", tokens))
        classes = torch.cat([state["class_emb.weight"], state["fake_latent"]])[labels]
        h = torch.cat([classes[:, None].expand(-1, size, -1), h], dim=1)
        h = self.norm_tokens(h + state["encoder_pos_embed_learned"])
        seen = torch.cat([torch.ones(len(mask), size, dtype=torch.bool), ~mask], dim=1)
        h = h[seen].reshape(len(mask), -1, h.shape[-1])
        for index in range(model.encoder_layers):
            h = self.block(f"encoder_blocks.{index}", h)
        h = self.saw("encoder_norm", self.norm("encoder_norm", h))
        h = self.linear("decoder_embed", h)
        full = state["mask_token"].expand(len(mask), seen.shape[1], -1).clone()
        full[seen] = h.reshape(-1, h.shape[-1])
        h = full + state["decoder_pos_embed_learned"]
        for index in range(model.decoder_layers):
            h = self.block(f"decoder_blocks.{index}", h)
        h = self.norm("decoder_norm", h)[:, size:]
        return self.saw("z", h + state["diffusion_pos_embed_learned"])

    def norm_tokens(self, h):
        return self.norm("z_proj_ln", h)

    def features(self, t):
        frequencies = 10000.0 ** (-torch.arange(128, dtype=t.dtype) / 128)
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def network(self, x, t, z):
        net = "diffloss.net"
        time = functional.silu(self.linear(f"{net}.time_embed.mlp.0", self.features(t.to(x.dtype))))
        y = self.linear(f"{net}.time_embed.mlp.2", time) + self.linear(f"{net}.cond_embed", z)
        y = functional.silu(y)
        h = self.linear(f"{net}.input_proj", x)
        for index in range(self.model.diffusion_layers):
            name = f"{net}.res_blocks.{index}"
            shift, scale, gate = self.linear(f"{name}.adaLN_modulation.1", y).chunk(3, dim=1)
            inner = self.norm(f"{name}.in_ln", h) * (1 + scale) + shift
            inner = functional.silu(self.linear(f"{name}.mlp.0", inner))
            h = h + gate * self.linear(f"{name}.mlp.2", inner)
            self.saw(f"network.blocks.{index}.output", h)
        shift, scale = self.linear(f"{net}.final_layer.adaLN_modulation.1", y).chunk(2, dim=1)
        h = functional.layer_norm(h, h.shape[-1:], eps=EPSILON) * (1 + scale) + shift
        return self.linear(f"{net}.final_layer.linear", h)

    def loss(self, tokens, labels, mask, times, noise):
        copies = self.model.diffusion_batch_mul
        z = self.z(tokens, labels, mask).reshape(-1, self.model.decoder_dim).repeat(copies, 1)
        clean = tokens.reshape(-1, self.model.token_dim).repeat(copies, 1)
        weight = mask.reshape(-1).repeat(copies).to(tokens.dtype)
        steps = Steps(self.model.noise_schedule)
        x = steps.noisy(clean, noise, times)
        e, v = self.network(x, times.to(x.dtype), z).chunk(2, dim=1)
        rows = ((noise - e) ** 2).mean(dim=1) + self.bound(steps, e, v, clean, x, times)
        return (rows * weight).sum() / weight.sum()

    def bound(self, steps, e, v, clean, x, times):
        return steps.bound(e.detach(), v, clean, x, times)

    @torch.no_grad()
    def sample(self, labels, orders, start, noises, counts, scales, clip, temperature, kept):
        """labels: None, or -1 is no class; scales: one a step, all 1 where nothing guides."""
        model, steps = self.model, Steps(self.model.noise_schedule, kept)
        found = torch.zeros_like(start)
        none = torch.full((len(start),), -1)
        ranks, left = orders.argsort(dim=1), model.length
        for count, scale in zip(counts, scales, strict=True):
            mask, left = ranks < left, left - count
            now = mask & (ranks >= left)
            z = self.z(found, none if labels is None else labels, mask)[now]
            u = self.z(found, none, mask)[now]
            x = start[now]
            for index in reversed(range(len(kept))):
                time = torch.full((len(x),), float(kept[index]), dtype=x.dtype)
                e, v = self.network(x, time, z).chunk(2, dim=1)
                if scale != 1:
                    of_none = self.network(x, time, u).chunk(2, dim=1)[0]
                    e = of_none + scale * (e - of_none)
                noise = noises[len(kept) - 1 - index][now]
                x = steps.back(e, v, x, index, noise, clip, temperature)
            found[now] = x
        return found


class Steps:
    """The schedule, and the variational bound of the published code."""

    def __init__(self, schedule, kept=None):
        if schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        else:
            u = torch.arange(1001, dtype=torch.float64) / 1000
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        bar = torch.cumprod(1 - beta, 0)
        if kept is not None:
            bar = bar[kept]
            beta = 1 - bar / torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
        bar = torch.cumprod(1 - beta, 0)
        before = torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
        variance = beta * (1 - before) / (1 - bar)
        self.tables = {
            "of clean": bar.sqrt(),
            "of noise": (1 - bar).sqrt(),
            "over root": (1 / bar).sqrt(),
            "to clean": (1 / bar - 1).sqrt(),
            "low": torch.log(torch.cat([variance[1:2], variance[1:]])),
            "high": torch.log(beta),
            "c1": beta * before.sqrt() / (1 - bar),
            "c2": (1 - before) * (1 - beta).sqrt() / (1 - bar),
        }

    def at(self, name, t, like):
        return self.tables[name][t][:, None].to(like.dtype)

    def noisy(self, clean, noise, t):
        return self.at("of clean", t, noise) * clean + self.at("of noise", t, noise) * noise

    def mean(self, clean, x, t):
        return self.at("c1", t, x) * clean + self.at("c2", t, x) * x

    def log_variance(self, v, t):
        low, high = self.at("low", t, v), self.at("high", t, v)
        return (v + 1) / 2 * high + (1 - (v + 1) / 2) * low

    def clean(self, e, x, t):
        return self.at("over root", t, x) * x - self.at("to clean", t, x) * e

    def back(self, e, v, x, index, noise, clip, temperature):
        t = torch.full((len(x),), index)
        clean = self.clean(e, x, t)
        mean = self.mean(clean if clip is None else clean.clamp(-clip, clip), x, t)
        return mean + (index > 0) * temperature * torch.exp(self.log_variance(v, t) / 2) * noise

    def bound(self, e, v, clean, x, t):
        low, log_variance = self.at("low", t, v), self.log_variance(v, t)
        found = self.clean(e, x, t)
        apart = self.mean(clean, x, t) - self.mean(found, x, t)
        kl = log_variance - low + torch.exp(low - log_variance) - 1
        kl = (kl + apart**2 * torch.exp(-log_variance)) / 2
        shrink = torch.exp(-log_variance / 2)
        above = cdf(shrink * (clean - found + 1 / 255))
        below = cdf(shrink * (clean - found - 1 / 255))
        inside = torch.where(clean > 0.999, 1 - below, above - below)
        p = torch.where(clean < -0.999, above, inside).clamp(min=1e-12)
        rows = torch.where((t == 0)[:, None], -torch.log(p), kl)
        return rows.mean(dim=1) / math.log(2)


def cdf(a):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
