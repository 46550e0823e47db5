"""Compiled programs of known traffic, as the HLO reader sees them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from illada_jax.planning import hlo

SIZE = 4 * 16 * 32  # bytes of what a device holds in `compiled`


def compiled(function, axes=("outer", "inner"), shape=(2, 4), out_specs=None):
    """The text of a program in which every device runs `function` on its own float32 [16, 32]."""
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    spec = PartitionSpec(axes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_specs or spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * 16, 32), jnp.float32)).compile().as_text()


def loop(times, collective):
    return lambda x: jax.lax.fori_loop(0, times, lambda i, x: collective(x) * 0.5, x)


@pytest.mark.parametrize(("axis", "group"), [("outer", 2), ("inner", 4), (("outer", "inner"), 8)])
def test_all_reduce_in_a_loop(axis, group):
    module = hlo.Module(compiled(loop(5, lambda x: jax.lax.psum(x, axis))))
    work = hlo.work(module, 8)
    assert work.ici_bytes == pytest.approx(5 * 2 * SIZE * (group - 1) / group)
    assert work.collectives["all-reduce"] == 5 * SIZE
    assert work.dcn_bytes == 0


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        (lambda x: jax.lax.all_gather(x, "inner", tiled=True)[:16], 3 * SIZE),
        (lambda x: jnp.tile(jax.lax.psum_scatter(x, "inner", tiled=True), (4, 1)), SIZE * 3 / 4),
        (lambda x: jax.lax.all_to_all(x, "inner", 0, 0, tiled=True), SIZE * 3 / 4),
        (lambda x: jax.lax.ppermute(x, "inner", [(0, 1), (1, 2), (2, 3), (3, 0)]), SIZE),
    ],
    ids=["all_gather", "psum_scatter", "all_to_all", "ppermute"],
)
def test_what_a_device_sends(collective, sent):
    assert hlo.work(hlo.Module(compiled(collective)), 8).ici_bytes == pytest.approx(sent)


def test_traffic_between_slices_is_counted_apart():
    """With the outer axis over two slices a sum over it leaves the slice, one over the inner axis does not."""
    inside = hlo.work(hlo.Module(compiled(lambda x: jax.lax.psum(x, "inner"))), 8, num_slices=2)
    across = hlo.work(hlo.Module(compiled(lambda x: jax.lax.psum(x, "outer"))), 8, num_slices=2)
    assert inside.dcn_bytes == 0 and inside.ici_bytes > 0
    assert across.dcn_bytes == pytest.approx(SIZE) and across.ici_bytes == 0


def test_nested_loops_multiply_and_computed_bounds_use_the_default():
    nested = hlo.work(hlo.Module(compiled(loop(3, loop(7, lambda x: jax.lax.psum(x, "inner"))))), 8)
    assert nested.collectives["all-reduce"] == 21 * SIZE
    while_loop = compiled(lambda x: jax.lax.while_loop(lambda s: jnp.sum(s) > 0, lambda s: jax.lax.psum(s, "inner"), x))
    assert hlo.work(hlo.Module(while_loop), 8, default_trip_count=11).collectives["all-reduce"] >= 11 * SIZE


def test_of_a_sliced_array_only_the_slice_is_read():
    """A scan over 64 matrices reads each once, not all of them 64 times."""
    def scan(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 128), (64, 128, 128))]
    text = jax.jit(scan).lower(*shapes).compile().as_text()
    stack = 4 * 64 * 128 * 128
    assert stack <= hlo.work(hlo.Module(text), 1).hbm_bytes < 5 * stack


def test_estimated_cycles_and_kernels_are_summed_with_their_loops():
    text = """HloModule m
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"window_config":{"estimated_cycles":"100"}}
  %splash_fwd.7 = f32[8]{0} custom-call(%f), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %splash_fwd.7)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%inner (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}
ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body
}
"""
    work = hlo.work(hlo.Module(text), 1)
    assert work.cycles == 600
    assert work.kernels == {"splash_fwd": 6}


def test_replica_groups_in_all_their_spellings():
    assert hlo._group("replica_groups={{0,4},{1,5}}, x", 8, 2) == (2, 2)
    assert hlo._group("replica_groups=[2,4]<=[8], x", 8, 2) == (4, 1)
    assert hlo._group("replica_groups=[4,2]<=[2,4]T(1,0), x", 8, 2) == (2, 2)
    assert hlo._group("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 8, 2) == (4, 1)
    assert hlo._group("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", 8, 2) == (2, 2)
    assert hlo._group("no groups at all", 8, 2) == (8, 2)
    assert np.isclose(hlo.Shape("bf16", (3, 5), False).size, 30)
