"""The network of iLLaDA and LLaDA: a Llama-like bidirectional transformer.

Pre-norm RMSNorm, SwiGLU, rotary positions, grouped keys and values, no biases, a final norm, a tied or untied head
(iLLaDA paper, architecture table). Prediction is same-position: logit i predicts token i. The time is not an input.

Dimensions: B batch, L length (T query, S key), D model, N query heads, K key/value heads, H head dim, F feed-forward,
V vocabulary, Q queried columns. Logical axis names say how an array may be sharded (`parallel/sharding.py`: the rules).
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from illada_jax.config import ModelConfig
from illada_jax.model.attention import ATTENTION_OUT, attention_fn
from illada_jax.model.cache import Cache, KeysValues
from illada_jax.model.dense import dense
from illada_jax.model.embedding import embed

RopeCosSin = tuple[jax.Array, jax.Array]  # see `rope_cos_sin`
# Names of a layer's intermediate results in remat policies.
PROJECTIONS, FEED_FORWARD = "projections", "feed_forward"
ACTIVATION_AXES = ("batch", "length", "embed_act")


def _init(config: ModelConfig, *axes: str, to_residual: bool = False) -> nn.initializers.Initializer:
    std = config.init_std or math.sqrt(2 / (5 * config.d_model))
    if to_residual:  # so that the variance of the residual stream does not grow with depth
        std /= math.sqrt(2 * config.num_layers)
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normed and scaled x_BTD, same shape and dtype."""
        scale_D = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), x_BTD.shape[-1:])
        x32_BTD = x_BTD.astype(jnp.float32)
        inverse_rms_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + self.eps)
        scale_11D = scale_D.astype(jnp.float32)[None, None, :]
        return (x32_BTD * inverse_rms_BT1 * scale_11D).astype(x_BTD.dtype)


def rope_cos_sin(positions_BT: jax.Array, width: int, theta: float) -> RopeCosSin:
    """Cosine and sine of the rotary angles of heads of the given width, float32 [B, T, 1, width/2].

    Shared by all layers; computing them once saves an eighth of attention's time on a CPU.
    """
    half = width // 2
    frequencies_111h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, None, None, :]
    angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_111h
    return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)


def apply_rope(x_BTNH: jax.Array, rope: RopeCosSin) -> jax.Array:
    """Queries or keys rotated by their positions, in the rotate-half layout: dimension i is paired with i + H/2."""
    cos_BT1h, sin_BT1h = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h],
                           axis=-1).astype(x_BTNH.dtype)


def _columns_of(x_BT: jax.Array, query_columns_BQ: jax.Array) -> jax.Array:
    """The queried columns of [B, T, ...]."""
    return jnp.take_along_axis(x_BT, query_columns_BQ.reshape(query_columns_BQ.shape + (1,) * (x_BT.ndim - 2)), axis=1)


class Attention(nn.Module):
    """Bidirectional attention within segments, with N query heads and K key/value heads."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeCosSin, segments_BT: jax.Array, cached: KeysValues | None = None,
                 query_columns_BQ: jax.Array | None = None) -> tuple[jax.Array, KeysValues]:
        """Attends to x_BTD and, where x_BTD is a slice of a cached canvas, to the cached columns.

        x_BTD is the normed residual stream, `rope` belongs to its positions, and `cached` are keys and values of other
        columns. Only `query_columns_BQ` of x_BTD attend, by default all of them.

        Returns:
          (addition to the residual stream of the queried columns, [B, Q, D]; keys and values of x_BTD).
        """
        c = self.config
        q_DNH = self.param("q", _init(c, "embed", "heads", "head_dim"), (c.d_model, c.num_heads, c.head_dim))
        kv_shape = (c.d_model, c.num_kv_heads, c.head_dim)
        k_DKH = self.param("k", _init(c, "embed", "kv_heads", "head_dim"), kv_shape)
        v_DKH = self.param("v", _init(c, "embed", "kv_heads", "head_dim"), kv_shape)
        o_NHD = self.param("o", _init(c, "heads", "head_dim", "embed", to_residual=True),
                           (c.num_heads, c.head_dim, c.d_model))
        k_BTKH, v_BTKH = apply_rope(self._project(x_BTD, k_DKH), rope), self._project(x_BTD, v_DKH)
        query = x_BTD, segments_BT, rope
        if query_columns_BQ is not None:
            query = jax.tree.map(lambda x_BT: _columns_of(x_BT, query_columns_BQ), query)
        x_BQD, segments_BQ, query_rope = query
        q_BQNH = apply_rope(self._project(x_BQD, q_DNH), query_rope)
        q_BQNH = nn.with_logical_constraint(q_BQNH, ("batch", "length", "heads_act", None))
        q_BQNH, k_BTKH, v_BTKH = checkpoint_name((q_BQNH, k_BTKH, v_BTKH), PROJECTIONS)
        kv = new_kv = KeysValues(k_BTKH, v_BTKH, segments_BT)
        if cached is not None:
            kv = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), cached, new_kv)
        out_BQNH = attention_fn(c)(q_BQNH, kv.k_BSKH, kv.v_BSKH, segments_BQ, kv.segments_BS)
        out_BQE = out_BQNH.reshape(*out_BQNH.shape[:2], -1)
        added_BQD = dense(out_BQE, o_NHD.reshape(-1, c.d_model), x_BTD.dtype)
        return checkpoint_name(added_BQD, PROJECTIONS), new_kv

    def _project(self, x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
        heads_BTE = dense(x_BTD, w_DNH.reshape(self.config.d_model, -1), x_BTD.dtype)
        return heads_BTE.reshape(*x_BTD.shape[:2], *w_DNH.shape[1:])


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Addition to the residual stream, of the shape and dtype of x_BTD."""
        c = self.config
        gate_DF = self.param("gate", _init(c, "embed", "mlp"), (c.d_model, c.d_ff))
        up_DF = self.param("up", _init(c, "embed", "mlp"), (c.d_model, c.d_ff))
        down_FD = self.param("down", _init(c, "mlp", "embed", to_residual=True), (c.d_ff, c.d_model))
        dtype = x_BTD.dtype
        gate_BTF, up_BTF = checkpoint_name((dense(x_BTD, gate_DF, dtype), dense(x_BTD, up_DF, dtype)), FEED_FORWARD)
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        hidden_BTF = nn.with_logical_constraint(hidden_BTF, ("batch", "length", "mlp_act"))
        return dense(hidden_BTF, down_FD, dtype)


class Layer(nn.Module):
    """One layer as `nn.scan` expects it: (carry, inputs) → (carry, output of the layer).

    Attributes:
      config: the model.
      returns_kv: the output is the keys and values of all columns, for a cache; else None.
    """

    config: ModelConfig
    returns_kv: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeCosSin, segments_BT: jax.Array, cached: KeysValues | None = None,
                 query_columns_BQ: jax.Array | None = None) -> tuple[jax.Array, KeysValues | None]:
        """Adds attention and feed-forward to the residual stream x_BTD, or to its queried columns; see Attention."""
        c = self.config
        x_BTD = nn.with_logical_constraint(x_BTD, ACTIVATION_AXES)
        normed_BTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        added_BQD, new_kv = Attention(c, name="attention")(normed_BTD, rope, segments_BT, cached, query_columns_BQ)
        x_BQD = (x_BTD if query_columns_BQ is None else _columns_of(x_BTD, query_columns_BQ)) + added_BQD
        normed_BQD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BQD)
        x_BQD = x_BQD + FeedForward(c, name="mlp")(normed_BQD)
        return nn.with_logical_constraint(x_BQD, ACTIVATION_AXES), new_kv if self.returns_kv else None


# Results that the forward pass saves for the backward pass, by config.model.remat, besides the input of each layer.
# Saving attention gains the most time per byte; the others gain about the same as each other.
SAVED_NAMES = {
    "full": (),
    "attention": (ATTENTION_OUT,),
    "projections": (ATTENTION_OUT, PROJECTIONS),
    "dots": (ATTENTION_OUT, PROJECTIONS, FEED_FORWARD),
}


class Transformer(nn.Module):
    """Tokens to hidden states to logits. Layers are scanned: their params carry a leading `layers` axis."""

    config: ModelConfig

    def setup(self):
        """Declares the embedding, the scanned layers, the final norm and, if untied, the head."""
        c = self.config
        normal = nn.initializers.normal(math.sqrt(1 / (2 * c.d_model)))
        self.embedding_VD = self.param("embedding", nn.with_logical_partitioning(normal, ("vocab", "embed")),
                                       (c.vocab_size, c.d_model))
        layer = Layer
        if c.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[c.remat])
            layer = nn.remat(Layer, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=c.scan_unroll or c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tied_head:
            self.head_DV = self.param("head", _init(c, "embed", "vocab"), (c.d_model, c.vocab_size))

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """Final hidden states of all columns, for training.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 positions within each segment.
          segments_BT: int32 segment of each token; 0 is padding.

        Returns:
          hidden_BTD, normed, in the compute dtype.
        """
        x_BTD, rope = self._embed(tokens_BT, positions_BT)
        x_BTD, _ = self.layers(x_BTD, rope, segments_BT)
        return self.final_norm(x_BTD)

    def at_columns(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array,
                   query_columns_BQ: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Final hidden states of the queried columns, for decoding and scoring.

        The queried columns are int32 indices into the T columns. A cache has B rows and is used as `writes` and
        `appends` of `Cache` say; then positions_BT are canvas columns. For the rest see `hidden`.

        Returns:
          (hidden_BQD, normed, in the compute dtype; the cache, or None).
        """
        c = self.config
        writes = cache is not None and cache.writes
        reads = cache is not None and not writes
        appends = reads and cache.appends
        x_BTD, rope = self._embed(tokens_BT, positions_BT)
        cached_segments_BS = cache.segments_without(positions_BT) if reads else None
        stacked_params, module = self.variables["params"]["layers"], Layer(c, returns_kv=writes or appends, parent=None)

        # Unlike `nn.scan` in `hidden`, this loop takes params from the stack by layer number, so that the cache is
        # updated in place and the last layer computes queries and feed-forward of the queried columns only. Training
        # needs `nn.scan`: the gradient of indexing would be a sum over whole stacks.
        def layer(carry, index, query_columns_BQ=None):
            x_BTD, cache = carry
            params = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked_params)
            cached = cache.read(index, cached_segments_BS) if reads else None
            x_BTD, new_kv = module.apply({"params": params}, x_BTD, rope, segments_BT, cached, query_columns_BQ)
            return (x_BTD, cache.write(index, new_kv) if writes else cache), new_kv[:2] if appends else None

        last = c.num_layers - 1
        unroll = min(c.scan_unroll or c.num_layers, max(last, 1))
        carry, new_kv = jax.lax.scan(layer, (x_BTD, cache), jnp.arange(last), unroll=unroll)
        (x_BQD, cache), last_kv = layer(carry, last, query_columns_BQ)
        if writes:
            cache = cache.replace(segments_BS=segments_BT, writes=False)
        if appends:  # behind all reads: so XLA updates the cache in place
            stacks = (jnp.concatenate([x_YBTKH, x_BTKH[None]]) for x_YBTKH, x_BTKH in zip(new_kv, last_kv, strict=True))
            cache = cache.append(*stacks, segments_BT, positions_BT)
        return self.final_norm(x_BQD), cache

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, RopeCosSin]:
        """The residual stream before the first layer, and the cosines and sines of its positions."""
        x_BTD = embed(self.embedding_VD, tokens_BT, self.config.dtype)
        x_BTD = nn.with_logical_constraint(x_BTD, ACTIVATION_AXES)
        return x_BTD, rope_cos_sin(positions_BT, self.config.head_dim, self.config.rope_theta)

    def head(self, hidden_BQD: jax.Array) -> jax.Array:
        """Logits of the given hidden states, float32 [B, Q, V]; products are accumulated in float32."""
        head_DV = self.embedding_VD.T if self.config.tied_head else self.head_DV
        return dense(hidden_BQD, head_DV, jnp.float32)
