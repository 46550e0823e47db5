"""Plain PyTorch implementations of the network and of the published decoding loops, for benchmarks and test fixtures.

Written from the papers' descriptions (LLaDA, appendix on inference; iLLaDA, generation), and run as published: eagerly,
one prompt at a time, the whole canvas at every step, without a cache.
"""

import torch
import torch.nn.functional as F


class Network:
    """The transformer of the paper with weights in the layout of `illada_jax.model` (a dict of paths to tensors)."""

    def __init__(self, weights: dict[str, torch.Tensor], num_layers: int, rope_theta: float, norm_eps: float):
        self.weights, self.num_layers, self.theta, self.eps = weights, num_layers, rope_theta, norm_eps

    def __call__(self, tokens_L: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of tokens [L]."""
        w = self.weights
        x_LD = w["embedding"][tokens_L]
        for layer in range(self.num_layers):
            x_LD = x_LD + self._attention(self._norm(x_LD, w["layers/attention_norm/scale"][layer]), layer)
            y_LD = self._norm(x_LD, w["layers/mlp_norm/scale"][layer])
            gate_LF = F.silu(y_LD @ w["layers/mlp/gate"][layer])
            x_LD = x_LD + (gate_LF * (y_LD @ w["layers/mlp/up"][layer])) @ w["layers/mlp/down"][layer]
        x_LD = self._norm(x_LD, w["final_norm/scale"])
        return x_LD @ (w["head"] if "head" in w else w["embedding"].T)

    def _norm(self, x, scale):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * scale

    def _attention(self, x_LD, layer):
        w = self.weights
        q, k, v = (torch.einsum("ld,dnh->nlh", x_LD, w[f"layers/attention/{name}"][layer]) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return torch.einsum("nlh,nhd->ld", out, w["layers/attention/o"][layer])

    def _rotate(self, x_NLH):
        length, half = x_NLH.shape[1], x_NLH.shape[2] // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        first, second = x_NLH.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_NLH.dtype)


def fixed_length(network, prompt, ids, max_new_tokens, block_length, steps_per_block, **options):
    """LLaDA: all masks are present from the start and are revealed block by block. Greedy. Returns the new tokens."""
    canvas = torch.tensor(list(prompt) + [ids["mask"]] * max_new_tokens)
    for start in range(len(prompt), len(canvas), block_length):
        denoise(network, canvas, len(prompt), start, start + block_length, steps_per_block, ids, **options)
    return canvas[len(prompt):].tolist()


def variable_length(network, prompt, ids, max_new_tokens, block_length, steps_per_block):
    """iLLaDA: appends and denoises a block of masks until a block holds EOS. Greedy. Returns the new tokens."""
    canvas = torch.tensor(list(prompt), dtype=torch.long)
    while len(canvas) - len(prompt) + block_length <= max_new_tokens:
        start = len(canvas)
        canvas = torch.cat([canvas, torch.full((block_length,), ids["mask"])])
        denoise(network, canvas, len(prompt), start, len(canvas), steps_per_block, ids)
        if ids["eos"] in canvas[start:]:
            break
    return canvas[len(prompt):].tolist()


@torch.no_grad()
def denoise(network, canvas, prompt_length, start, stop, steps, ids, cfg_scale=0.0, logits_eos_inf=False,
            confidence_eos_eot_inf=False, eot=None):
    """Reveals canvas[start:stop] in place in `steps` steps, the most probable tokens first."""
    masks = int((canvas[start:stop] == ids["mask"]).sum())
    for step in range(steps):
        count = masks // steps + (1 if step < masks % steps else 0)
        logits = network(canvas)
        if cfg_scale > 0:
            uncond = canvas.clone()
            uncond[:prompt_length] = ids["mask"]
            unconditional = network(uncond)
            logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
        logits[:, ids["mask"]] = -torch.inf
        if logits_eos_inf:
            logits[:, ids["eos"]] = -torch.inf
        chosen = logits.argmax(-1)
        if confidence_eos_eot_inf:
            logits[:, [ids["eos"], eot]] = -torch.inf
        confidence = F.softmax(logits.double(), -1).gather(-1, chosen[:, None])[:, 0]
        masked = start + (canvas[start:stop] == ids["mask"]).nonzero()[:, 0]
        # The published topk leaves the order of equal confidences open; here the lower position wins.
        best = masked[torch.sort(confidence[masked], descending=True, stable=True).indices[:count]]
        canvas[best] = chosen[best]


@torch.no_grad()
def confidence_score(network, context, candidate, mask_id):
    """Confidence-based score of one candidate (iLLaDA): reveals the most confident true token, one per evaluation."""
    truth = torch.tensor([*context, *candidate])
    canvas = truth.clone()
    canvas[len(context) :] = mask_id
    score = 0.0
    for _ in candidate:
        hidden = (canvas == mask_id).nonzero()[:, 0]
        loss = F.cross_entropy(network(canvas)[hidden], truth[hidden], reduction="none")
        least, index = loss.min(dim=0)
        score -= least.item()
        canvas[hidden[index]] = truth[hidden[index]]
    return score
