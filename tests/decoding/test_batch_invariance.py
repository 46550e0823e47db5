"""A row's result does not depend on the other rows, the batch size, the order or the devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from illada_jax import model
from illada_jax.config import DecodeConfig, MeshConfig
from illada_jax.decoding import Decoder
from illada_jax.decoding.loop import run_blocks
from illada_jax.errors import InputError
from illada_jax.parallel.mesh import make_mesh
from illada_jax.parallel.sharding import param_shardings
from tests import reference
from tests.decoding.toys import IDS, TRANSFORMER, network_of
from tests.util import random_params

SETTINGS = DecodeConfig(max_new_tokens=16, block_length=8, steps_per_block=8, seed=11)
PROMPTS = [list(np.random.default_rng(n).integers(4, 11, n)) for n in range(1, 33)]
EVERYTHING = list(range(32))


@functools.cache
def trained_params():
    """Trained on counting, 4 5 … 10 4 5 …, with masks at random, until it is nearly certain of everything."""
    columns_L = np.arange(24)
    optimizer = optax.adam(1e-2)

    def loss(params, key):
        start_key, mask_key = jax.random.split(key)
        tokens_BL = 4 + (jax.random.randint(start_key, (32, 1), 0, 7) + columns_L[None]) % 7
        masked_BL = jax.random.bernoulli(mask_key, 0.5, tokens_BL.shape)
        noisy_BL = jnp.where(masked_BL, IDS.mask, tokens_BL)
        ones_BL = jnp.ones_like(tokens_BL)
        hidden_BLD = model.hidden(TRANSFORMER, params, noisy_BL, jnp.broadcast_to(columns_L, tokens_BL.shape), ones_BL)
        logits_BLV = model.head(TRANSFORMER, params, hidden_BLD)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL) * masked_BL)

    @jax.jit
    def train(params):
        def step(state, key):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)),
                                           jax.random.split(jax.random.key(0), 400))
        return params, losses

    params, losses = train(random_params(TRANSFORMER, scale=1.0))
    assert losses[-50:].mean() < 0.1  # single batches vary, with versions of JAX too
    return params


def params_of(kind):
    return trained_params() if kind == "trained" else random_params(TRANSFORMER, seed=0)


def decode(params, settings, order, batch_size, mesh=None):
    """{prompt: (tokens, reveal steps, why it stopped)} of the prompts in `order`."""
    settings = dataclasses.replace(settings, batch_size=batch_size)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(mesh, model.param_axes(TRANSFORMER)))
    decoder = Decoder(model.make_logits_fn(TRANSFORMER, params), settings, IDS, TRANSFORMER.max_length, mesh=mesh)
    results = decoder.generate([PROMPTS[i] for i in order], rows=order)
    return {i: (r.tokens, r.reveal_step, r.stopped_by) for i, r in zip(order, results, strict=True)}


def near_ties(params, settings, one, other):
    """Asserts that rows differ only where the oracle meets two choices within 1e-5; returns how many do."""
    different = [i for i in EVERYTHING if one[i] != other[i]]
    for i in different:
        trace = reference.decode(network_of(TRANSFORMER, params), PROMPTS[i], settings, IDS, i)
        assert trace.tied or trace.closest < 1e-5, f"prompt {i}"
    return len(different)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_alone_or_in_a_batch(kind, temperature):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    params = params_of(kind)
    alone = {i: decode(params, settings, [i], 1)[i] for i in EVERYTHING}
    shuffled = np.random.default_rng(0).permutation(32).tolist()
    spread = make_mesh(MeshConfig(data=8, fsdp=1, tensor=1), jax.devices()[:8])
    for batch_size, order, mesh in ((32, EVERYTHING, None), (3, EVERYTHING, None), (7, EVERYTHING, None),
                                    (16, shuffled, None), (32, EVERYTHING, spread)):
        batched = decode(params, settings, order, batch_size, mesh)
        assert near_ties(params, settings, alone, batched) <= 1, (batch_size, mesh)
    assert len({str(tokens) for tokens, _, _ in alone.values()}) > 5


def test_settings_of_its_own():
    """Ten temperatures, filters, thresholds, stop ids, budgets and seeds in a batch: one program, rows as alone."""
    base = dataclasses.replace(SETTINGS, reveal="threshold", confidence_eos_eot_inf=True, batch_size=16)
    settings = [dataclasses.replace(base, temperature=0.2 * n, top_k=n % 4, top_p=1 - 0.05 * (n % 3), seed=n // 2,
                                    threshold=0.1 + 0.08 * n, stop_ids=tuple(range(4, 4 + n % 3)),
                                    max_new_tokens=8 + n) for n in range(10)]
    logits_fn = model.make_logits_fn(TRANSFORMER, trained_params())
    make = functools.partial(Decoder, logits_fn, ids=IDS, max_length=TRANSFORMER.max_length, buckets=[64])

    def run(settings, *arguments, **options):
        results = make(settings=settings).generate(*arguments, **options)
        return [(r.tokens, r.reveal_step, r.stopped_by) for r in results]

    alone = [run(each, [prompt], rows=[row])[0] for row, (prompt, each) in enumerate(zip(PROMPTS, settings,
                                                                                         strict=False))]
    size = run_blocks._cache_size()
    assert run(base, PROMPTS[:10], row_settings=settings) == alone
    assert run_blocks._cache_size() == size + 1  # 16 rows instead of one
    assert run(base, PROMPTS[:10], row_settings=settings[::-1]) != alone
    assert run_blocks._cache_size() == size + 1
    with pytest.raises(InputError, match=r"prompt 0: config.decode.cfg_scale = 2.0: must be 0.0, as for the other"):
        make(settings=base).generate([[4]], row_settings=[dataclasses.replace(base, cfg_scale=2.0)])
    with pytest.raises(InputError, match="rows: 1 settings for 2 prompts"):
        make(settings=base).generate([[4], [5]], row_settings=[base])


def test_sharded_matrices():
    """Rows over two devices, heads and feed-forward over two more."""
    settings = dataclasses.replace(SETTINGS, temperature=0.7)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    config = dataclasses.replace(TRANSFORMER, num_kv_heads=2)  # to spread
    params = random_params(config)

    def run(params, mesh):
        decoder = Decoder(model.make_logits_fn(config, params), dataclasses.replace(settings, batch_size=16), IDS,
                          config.max_length, model.make_init_cache(config), mesh)
        return [(r.tokens, r.stopped_by) for r in decoder.generate(PROMPTS[::2])]

    spread = jax.device_put(params, param_shardings(mesh, model.param_axes(config)))
    assert run(spread, mesh) == run(params, None)


def test_the_trained_network_counts():
    """The trained network decodes what it learned, and the naive decoder agrees."""
    params = trained_params()
    counting = [4 + n % 7 for n in range(26)]
    decoder = Decoder(model.make_logits_fn(TRANSFORMER, params), SETTINGS, IDS, TRANSFORMER.max_length)
    result = decoder.generate([counting[:6]])[0]
    assert result.tokens == counting[6:22]
    trace = reference.decode(network_of(TRANSFORMER, params), counting[:6], SETTINGS, IDS)
    assert trace.canvas[6:] == result.tokens and trace.reveal_step[6:] == result.reveal_step
