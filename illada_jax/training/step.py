"""The training step: corrupt, loss, gradient, update, as one sharded jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config, FaultsConfig
from illada_jax.data.batch import Batch
from illada_jax.diffusion.objective import LossSums, objective, total_weight
from illada_jax.diffusion.process import Corrupted, corrupt
from illada_jax.keys import Purpose, key_for
from illada_jax.parallel import sharding
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.sharded_loss import sharded_token_losses


@flax.struct.dataclass
class TrainState:
    """State that a step updates."""

    step: jax.Array  # int32 scalar, the number of steps taken
    params: Any  # float32 params of the model
    opt_state: Any  # the optax state
    ema: Any = None  # moving average of the params, float32; None where config.optimizer.ema_decay is 0

    @property
    def eval_params(self) -> Any:
        """Params to evaluate and to use: the moving average if there is one, else the params."""
        return self.params if self.ema is None else self.ema


class StepMetrics(NamedTuple):
    """Metrics of one step, on the device."""

    sums: LossSums  # of the objective
    gradient_norm: jax.Array  # float32 scalar, before clipping
    bad: jax.Array  # bool scalar, True if the update was left out (config.faults)


def init_state(config: Config) -> TrainState:
    """Initial state on one device; see `make_init`."""
    return _state_of(config, model.init_params(config.model, key_for(config.seed, Purpose.PARAMS)))


def _state_of(config: Config, params: Any) -> TrainState:
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, fresh_average(config, params))


def fresh_average(config: Config, params: Any) -> Any:
    """Moving average that starts at `params` (a copy, since both are donated); None if the config keeps none."""
    return jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None


@functools.lru_cache(maxsize=8)
def make_init(config: Config, mesh: Mesh) -> Callable[[], TrainState]:
    """Builds the jitted initialisation: () → the initial state, sharded. Cached, like the step."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: init_state(config), out_shardings=shardings)


@functools.lru_cache(maxsize=8)
def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """State as ShapeDtypeStructs with their shardings; allocates nothing."""
    abstract = model.abstract_params(config.model)
    shapes = jax.eval_shape(lambda: _state_of(config, jax.tree.map(jnp.zeros_like, abstract)))
    params = sharding.param_shardings(mesh, model.param_axes(config.model))
    shardings = TrainState(
        step=sharding.replicated(mesh), params=params, opt_state=sharding.like_params(mesh, shapes.opt_state, params),
        ema=None if shapes.ema is None else params,
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


@functools.lru_cache(maxsize=8)
def make_train_step(
    config: Config, mesh: Mesh, rate: float = 1.0
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds the jitted step (state, global batch) → (state, metrics), which donates the state except on CPUs.

    Keys derive from (seed, step, global row), so masks do not depend on the mesh or the number of micro-batches. A step
    with bad numbers changes only the step counts. `rate` is a factor of all learning rates. Cached, so that equal
    arguments give the same function.
    """
    optimizer = make_optimizer(config, rate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        corrupted = corrupt(key_for(config.seed, Purpose.CORRUPTION, state.step), batch, config.diffusion)
        grads, sums = loss_gradients(config, mesh, state.params, batch, corrupted)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Without this bound the average would be dominated by the random initial params for long.
            decay = jnp.minimum(config.optimizer.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        norm = optax.tree.norm(grads)
        bad = _is_bad(config.faults, sums, norm)
        # Loss and norm are global, so all devices and hosts decide alike.
        after = jax.tree.map(lambda old, new: new if _is_count(new) else jnp.where(bad, old, new), state,
                             TrainState(state.step + 1, params, opt_state, ema))
        return after, StepMetrics(sums, norm, bad)

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    platform = mesh.devices.flat[0].platform
    options = dict(option.split("=", 1) for option in config.train.compiler_options)
    return jax.jit(
        train_step,
        compiler_options=options if platform == "tpu" else None,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0 if donates(platform) else (),
    )


def donates(platform: str) -> bool:
    """True if the step donates its state.

    On a CPU, XLA copies donated arrays before overwriting them, which takes a quarter of a step of 1 M parameters.
    """
    return platform != "cpu"


def _is_bad(faults: FaultsConfig, sums: LossSums, gradient_norm: jax.Array) -> jax.Array:
    bad = ~(jnp.isfinite(sums.loss) & jnp.isfinite(gradient_norm))
    if faults.max_cross_entropy:
        bad |= jnp.sum(sums.ce_K) > faults.max_cross_entropy * sums.masked
    return bad


def _is_count(x: jax.Array) -> bool:
    """True for leaves that count steps. Schedules follow these counts, so a skipped step still counts."""
    return jnp.issubdtype(x.dtype, jnp.integer)


@functools.partial(jax.jit, donate_argnums=0)
def skip_steps(state: TrainState, steps: jax.Array) -> TrainState:
    """Advances the step counts by `steps` without changing anything else. The state is donated."""
    return jax.tree.map(lambda x: x + steps if _is_count(x) else x, state)


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """True, as a bool scalar, if all numbers of the state are finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]).all()


def loss_gradients(
    config: Config, mesh: Mesh, params: Any, batch: Batch, corrupted: Corrupted
) -> tuple[Any, LossSums]:
    """Gradients of the objective over the global batch, and its sums.

    With micro-batches each part is divided by the weight of the WHOLE batch, so that the number of parts changes only
    the order of additions.
    """
    weight = total_weight(batch)

    def loss_of_part(params: Any, part: Batch, corrupted: Corrupted) -> tuple[jax.Array, LossSums]:
        hidden_BLD = model.hidden(config.model, params, corrupted.noisy_BL, part.positions_BL, part.segments_BL)
        losses = functools.partial(sharded_token_losses, config, mesh, params)
        return objective(losses, hidden_BLD, part, corrupted, weight)[:2]

    gradients_of_part = jax.grad(loss_of_part, has_aux=True)
    parts = config.train.microbatches
    if parts == 1:
        return gradients_of_part(params, batch, corrupted)

    def add_part(total: Any, part: tuple[Batch, Corrupted]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients_of_part(params, *part)), None

    # Part m takes rows m, m + parts, …: each device cuts its own rows and nothing moves between devices.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), (batch, corrupted))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        lambda: gradients_of_part(params, *jax.tree.map(lambda x: x[0], split))))
    return jax.lax.scan(add_part, zeros, split)[0]
