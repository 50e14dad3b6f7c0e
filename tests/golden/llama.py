"""A Llama-style decoder in the plainest PyTorch: what the golden values are computed with."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tied: bool = False
    logit_scale: float = 1.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


class RmsNorm(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        # Half precision is normalised in single precision, as Hugging Face does.
        wide = x.float() if x.dtype == torch.float16 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding that pairs element i with element i + half, as Hugging Face does.

    `x`: [batch, heads, length, dim].
    """
    half = x.shape[-1] // 2
    angle_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = theta ** (-torch.arange(half, dtype=angle_dtype) / half)
    angles = positions[:, None, :, None].to(angle_dtype) * frequencies
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        config = self.config
        batch, length = x.shape[0], x.shape[1]

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(batch, length, heads, config.head_dim).transpose(1, 2)

        query = rotate(split(self.q_proj(x), config.heads), positions, config.rope_theta)
        key = rotate(split(self.k_proj(x), config.kv_heads), positions, config.rope_theta)
        value = split(self.v_proj(x), config.kv_heads)
        group = config.heads // config.kv_heads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

        scores = query @ key.transpose(-1, -2) * config.head_dim**-0.5
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1) @ value
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, config.heads * config.head_dim))


class Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, allowed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config)


class Llama(nn.Module):
    """Parameters carry Hugging Face's names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Optional[Tensor] = None, visible: Optional[Tensor] = None) -> Tensor:
        """Logits. `visible` ([batch, query, key]) narrows what a causal model attends to."""
        index = torch.arange(tokens.shape[1])
        if positions is None:
            positions = index[None, :]
        allowed = (index[None, :] <= index[:, None])[None, None]
        if visible is not None:
            allowed = allowed & visible[:, None]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, positions, allowed)
        head = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        logits = functional.linear(self.model.norm(x), head)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale


def fill(model: Llama, seed: int, grid: int) -> None:
    """Random weights on a grid of 1/`grid`, which any float format from half precision up holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            values = 1.0 + 0.1 * noise
        elif "embed_tokens" in name:
            values = 0.5 * noise
        else:
            values = noise * parameter.shape[1] ** -0.5
        parameter.data = ((values * grid).round() / grid).to(parameter.dtype)
