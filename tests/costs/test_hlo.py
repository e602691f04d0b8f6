"""What the compiled text says, against programs whose loops and collectives are known."""

import jax
import jax.numpy as jnp
import pytest

from halonet_jax.costs import hlo

P = jax.P


def _compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_collectives_are_multiplied_by_the_loops_around_them():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def inner(x, _):
        return 2 * jax.lax.ppermute(x, "d", ring), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return x + jax.lax.psum(x, "d"), None

    def body(x, y):
        x, _ = jax.lax.scan(outer, x, None, length=5)
        whole = jax.lax.all_gather(x, "d", tiled=True)
        parts = jax.lax.psum_scatter(whole @ whole.T, "d", tiled=True)
        swapped = jax.lax.all_to_all(y, "d", 1, 0, tiled=True)
        return parts.sum() + swapped.sum() + x.sum()[None]

    f = jax.shard_map(body, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=False)
    text = _compiled(f, jnp.ones((8, 16)), jnp.ones((8, 8), jnp.int32))
    assert hlo.collectives(text) == [
        hlo.Collective("all-gather", 1, 4 * 8 * 16),
        hlo.Collective("all-reduce", 5, 5 * 4 * 2 * 16),
        hlo.Collective("all-to-all", 1, 4 * 2 * 8),
        hlo.Collective("collective-permute", 15, 15 * 4 * 2 * 16),
        hlo.Collective("reduce-scatter", 1, 4 * 8 * 8),
    ]


def test_a_program_without_collectives_has_none():
    assert hlo.collectives(_compiled(jnp.sin, jnp.ones(3))) == []


# As TPU writes it: trip counts stand in the conditions alone, start and done are a pair, tuples and tiled layouts.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], bf16[2,100])) -> (s32[], bf16[2,100]) {
  %p = (s32[]{:T(128)}, bf16[2,100]{1,0:T(2,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[2,100]{1,0:T(2,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %ar = (bf16[2,100]{1,0}, /*index=1*/f32[]{:T(128)}) all-reduce(%x, %next), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %y = bf16[2,100]{1,0:T(2,128)(2,1)S(1)} get-tuple-element(%ar), index=0
  ROOT %t = (s32[]{:T(128)}, bf16[2,100]{1,0:T(2,128)(2,1)S(1)}) tuple(%next, %y)
}

%condition (p.1: (s32[], bf16[2,100])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[2,100]{1,0:T(2,128)(2,1)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(LIMIT)
  %counter = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (x: bf16[2,100]) -> bf16[4,100] {
  %x.1 = bf16[2,100]{1,0:T(2,128)(2,1)} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%first)
  %tuple = (s32[]{:T(128)}, bf16[2,100]{1,0:T(2,128)(2,1)}) tuple(%start, %x.1)
  %loop = (s32[]{:T(128)}, bf16[2,100]{1,0:T(2,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  %z = bf16[2,100]{1,0:T(2,128)(2,1)} get-tuple-element(%loop), index=1
  %ag = (bf16[2,100]{1,0}, bf16[4,100]{1,0:T(4,128)(2,1)}) all-gather-start(%z), dimensions={0}
  ROOT %done = bf16[4,100]{1,0:T(4,128)(2,1)} all-gather-done(%ag)
}
"""


def test_trip_counts_are_read_from_conditions():
    text = TPU_TEXT.replace("LIMIT", "9")
    assert hlo.collectives(text) == [
        hlo.Collective("all-gather", 1, 2 * 4 * 100), hlo.Collective("all-reduce", 7, 7 * (2 * 2 * 100 + 4))
    ]  # fmt: skip
    assert hlo.unknown_loops(hlo.parse(text)) == []


# A collective that begins in one fusion and goes on inside another beside its own work.
ASYNC_TEXT = """HloModule jit_f, is_scheduled=true

%starts (x: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %x = bf16[2,8]{1,0} parameter(0)
  %ag.1 = bf16[8,8]{1,0} all-gather(%x), channel_id=7, dimensions={0}
  ROOT %started = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (y: bf16[2,8]) -> bf16[8,8] {
  %y = bf16[2,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,8]{1,0} all-gather(%y), channel_id=7, dimensions={0}
}

ENTRY %main (z: bf16[2,8]) -> bf16[8,8] {
  %z = bf16[2,8]{1,0} parameter(0)
  %start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%z), kind=kCustom, calls=%starts
  %w = bf16[2,8]{1,0} get-tuple-element(%start), index=0
  ROOT %on = bf16[8,8]{1,0} fusion(%w), kind=kOutput, calls=%goes_on
}
"""


def test_a_collective_spread_over_fusions_counts_once():
    assert hlo.collectives(ASYNC_TEXT) == [hlo.Collective("all-gather", 1, 2 * 8 * 8)]


def test_unknown_trip_counts_are_named():
    module = hlo.parse(TPU_TEXT.replace("LIMIT", "9").replace("direction=LT", "direction=NE"))
    assert hlo.unknown_loops(module) == ["loop"]
    assert hlo.executions(module)["body"] == 1


@pytest.mark.parametrize(
    "shape, size, padded, memory",
    [
        ("f32[3,5]{1,0}", 60, 60, 0),
        ("bf16[8,38,38,8,16]{2,1,4,3,0:T(8,128)(2,1)S(1)}", 2 * 8 * 38 * 38 * 8 * 16, 2 * 8 * 8 * 16 * 40 * 128, 1),
        ("f32[2,256,16]{1,2,0:T(8,128)}", 4 * 2 * 256 * 16, 4 * 2 * 256 * 16, 0),
        ("f32[100]{0:T(128)}", 400, 512, 0),
        ("s32[]{:T(128)}", 4, 4, 0),
        ("pred[7]", 7, 7, 0),
    ],
)
def test_sizes(shape, size, padded, memory):
    (array,) = hlo.arrays(shape)
    assert (array.bytes, array.padded_bytes, array.memory) == (size, padded, memory)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("not HLO")
