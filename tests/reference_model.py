"""A naive transformer in numpy, one row and one head at a time: written for reading, not for speed."""

import numpy as np

from illada_jax.config import ModelConfig


def rms_norm(x_LD: np.ndarray, scale_D: np.ndarray, eps: float) -> np.ndarray:
    return x_LD / np.sqrt((x_LD**2).mean(axis=-1, keepdims=True) + eps) * scale_D


def rotate(x_LH: np.ndarray, positions_L: np.ndarray, theta: float) -> np.ndarray:
    """Rotates each pair (i, i + H/2) by position / theta^(2i/H)."""
    width = x_LH.shape[1]
    out_LH = np.empty_like(x_LH)
    for i in range(width // 2):
        angle_L = positions_L * theta ** (-2 * i / width)
        first_L, second_L = x_LH[:, i], x_LH[:, i + width // 2]
        out_LH[:, i] = first_L * np.cos(angle_L) - second_L * np.sin(angle_L)
        out_LH[:, i + width // 2] = first_L * np.sin(angle_L) + second_L * np.cos(angle_L)
    return out_LH


def logits(config: ModelConfig, params: dict, tokens_L: np.ndarray, positions_L: np.ndarray, segments_L: np.ndarray):
    """Logits [L, V] of one row, in float64."""
    params = _to_float64(params)
    x_LD = params["embedding"][tokens_L]
    for layer in range(config.num_layers):
        p = {name: _slice(sub, layer) for name, sub in params["layers"].items()}
        normed_LD = rms_norm(x_LD, p["attention_norm"]["scale"], config.norm_eps)
        x_LD = x_LD + attention(config, p["attention"], normed_LD, positions_L, segments_L)
        normed_LD = rms_norm(x_LD, p["mlp_norm"]["scale"], config.norm_eps)
        gate_LF = normed_LD @ p["mlp"]["gate"]
        swish_LF = gate_LF / (1 + np.exp(-gate_LF))
        x_LD = x_LD + (swish_LF * (normed_LD @ p["mlp"]["up"])) @ p["mlp"]["down"]
    x_LD = rms_norm(x_LD, params["final_norm"]["scale"], config.norm_eps)
    return x_LD @ (params["embedding"].T if config.tied_head else params["head"])


def evaluate(config: ModelConfig, params: dict, tokens: list[int], columns: list[int], kept: list[tuple]):
    """Logits [T, V] of the columns, which attend to each other and to kept ones, and (column, keys, values) of each.

    `kept` is a list of such triples; keys and values are lists over layers of arrays [K, H].
    """
    params = _to_float64(params)
    x_TD = params["embedding"][np.array(tokens, int)].reshape(len(tokens), config.d_model)
    new = [(column, [], []) for column in columns]
    for layer in range(config.num_layers):
        p = {name: _slice(sub, layer) for name, sub in params["layers"].items()}
        normed_TD = rms_norm(x_TD, p["attention_norm"]["scale"], config.norm_eps)
        project = {name: np.einsum("TD,DNH->TNH", normed_TD, p["attention"][name]) for name in "qkv"}
        queries = [rotate_one(q_NH, column, config) for q_NH, column in zip(project["q"], columns, strict=True)]
        for k_KH, v_KH, (column, keys, values) in zip(project["k"], project["v"], new, strict=True):
            keys.append(rotate_one(k_KH, column, config))
            values.append(v_KH)
        keys_SKH, values_SKH = (np.array([column[kind][layer] for column in [*kept, *new]]) for kind in (1, 2))
        x_TD = x_TD.copy()
        for row, q_NH in enumerate(queries):
            for head, q_H in enumerate(q_NH):
                shared = head * config.num_kv_heads // config.num_heads
                score = keys_SKH[:, shared] @ q_H / config.head_dim**0.5
                weight = np.exp(score - score.max())
                mixed_H = weight / weight.sum() @ values_SKH[:, shared]
                x_TD[row] += mixed_H @ p["attention"]["o"][head]
        normed_TD = rms_norm(x_TD, p["mlp_norm"]["scale"], config.norm_eps)
        gate_TF = normed_TD @ p["mlp"]["gate"]
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (normed_TD @ p["mlp"]["up"])) @ p["mlp"]["down"]
    x_TD = rms_norm(x_TD, params["final_norm"]["scale"], config.norm_eps)
    return x_TD @ (params["embedding"].T if config.tied_head else params["head"]), new


def rotate_one(x_NH: np.ndarray, column: int, config: ModelConfig) -> np.ndarray:
    """Rotates all heads of one column."""
    return rotate(x_NH, np.full(len(x_NH), column), config.rope_theta)


def attention(config: ModelConfig, p: dict, x_LD: np.ndarray, positions_L: np.ndarray, segments_L: np.ndarray):
    out_LD = np.zeros_like(x_LD)
    group = config.num_heads // config.num_kv_heads
    for head in range(config.num_heads):
        q_LH = rotate(x_LD @ p["q"][:, head], positions_L, config.rope_theta)
        k_LH = rotate(x_LD @ p["k"][:, head // group], positions_L, config.rope_theta)
        v_LH = x_LD @ p["v"][:, head // group]
        for i in range(len(x_LD)):
            mine = np.flatnonzero(segments_L == segments_L[i])
            score = q_LH[i] @ k_LH[mine].T / np.sqrt(config.head_dim)
            weight = np.exp(score - score.max())
            out_LD[i] += (weight / weight.sum()) @ v_LH[mine] @ p["o"][head]
    return out_LD


def _slice(tree: dict, layer: int) -> dict:
    return {name: x[layer] for name, x in tree.items()}


def _to_float64(tree):
    if isinstance(tree, dict):
        return {name: _to_float64(x) for name, x in tree.items()}
    return np.asarray(tree, np.float64)
