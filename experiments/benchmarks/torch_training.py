"""A plain PyTorch implementation of the transformer and its training step, for the benchmark."""

from typing import Any

import torch
import torch.nn.functional as F

from illada_jax.config import Config


class Layer(torch.nn.Module):
    """Pre-norm attention and SwiGLU. Weights in the usual [out, in] layout."""

    def __init__(self, weights: dict[str, Any], index: int, config: Any):
        super().__init__()
        attention, mlp = weights["attention"], weights["mlp"]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.norm_eps
        flat = {name: attention[name][index].reshape(config.d_model, -1).T for name in "qkv"}
        flat["o"] = attention["o"][index].reshape(-1, config.d_model).T
        flat |= {name: mlp[name][index].T for name in ("gate", "up", "down")}
        for name, matrix in flat.items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(matrix.copy())))
        for name in ("attention_norm", "mlp_norm"):
            scale = torch.from_numpy(weights[name]["scale"][index].copy())
            self.register_parameter(name, torch.nn.Parameter(scale))

    def forward(self, x, cos, sin):
        """Maps x [B, L, D] to the same shape."""
        batch, length, _ = x.shape
        y = F.rms_norm(x, x.shape[-1:], self.attention_norm, self.eps)
        q, k, v = (F.linear(y, w).view(batch, length, n, self.head_dim).transpose(1, 2) for w, n in (
            (self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)))
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)
        x = x + F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.o)
        y = F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.eps)
        return x + F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)


def rotate(x, cos, sin):
    """Rotary positions, rotate-half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Network(torch.nn.Module):
    """Tokens, targets and weights to the loss."""

    def __init__(self, params: dict[str, Any], config: Any, length: int):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.from_numpy(params["embedding"].copy()))
        self.layers = torch.nn.ModuleList(Layer(params["layers"], i, config) for i in range(config.num_layers))
        self.final_norm = torch.nn.Parameter(torch.from_numpy(params["final_norm"]["scale"].copy()))
        self.eps = config.norm_eps
        half = config.head_dim // 2
        angles = torch.arange(length)[:, None] * config.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, noisy, targets, weights):
        """Σ weights · cross-entropy, all [B, L]."""
        x = F.embedding(noisy, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(F.rms_norm(x, x.shape[-1:], self.final_norm, self.eps), self.embedding)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()


class Trainer:
    """Training steps: gradient, clipping, AdamW with weight decay on the matrices."""

    def __init__(self, params: dict[str, Any], config: Config, compiled: bool, device: str = "cpu",
                 bfloat16: bool = False):
        """Copies `params`; `compiled` uses torch.compile, `bfloat16` autocast."""
        self._network = Network(params, config.model, config.data.length).to(device)
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=bfloat16)
        self._start = {name: value.clone() for name, value in self._network.state_dict().items()}
        self._loss = torch.compile(self._network) if compiled else self._network
        self._config = config.optimizer
        self.reset()

    def reset(self) -> None:
        """Restores the initial params, with a new optimizer."""
        self._network.load_state_dict(self._start)
        c = self._config
        matrices = [p for p in self._network.parameters() if p.ndim > 1]
        scales = [p for p in self._network.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": scales, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.b1, c.b2), eps=c.eps)

    def step(self, noisy, targets, weights):
        """Takes one step; returns the loss before it."""
        with self._autocast:
            loss = self._loss(noisy, targets, weights)
        self._optimizer.zero_grad()
        loss.backward()
        if self._config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._config.clip_norm)
        self._optimizer.step()
        return loss.detach()
