"""Collectives are counted as they run: in loops once a turn, asynchronous ones once, by the size of whole arrays."""

import pytest

from sdxl_eqx.parallel.collectives import Traffic, collectives, sent

HLO = """HloModule step, entry_computation_layout={()->f32[]}, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: bf16[16,8]) -> bf16[4,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-reduce.9 = bf16[16,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[4,8]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={4,8}
}

%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.3 = f32[2]{0} reduce-scatter(%q), replica_groups={}, to_apply=%add
}

%inner (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %all-gather-start.2 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%s), replica_groups={{0,1,2,3}}
  %all-gather-done.2 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.2)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%s)
}

%to_three (s: (s32[], bf16[4,8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3)
  %s = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.7), direction=LT
}

%outer (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%s), condition=%to_three, body=%inner
  %fusion.4 = bf16[4,8]{1,0} fusion(%s), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%while.1)
}

ENTRY %main (a: f32[8]) -> f32[] {
  %a = f32[8]{0} parameter(0)
  %while.2 = (s32[], bf16[4,8]) while(%a), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"10"}}
  %async-start = ((f32[8]{0}), f32[2]{0}) async-start(%a), calls=%wrapped
  %async-done = f32[2]{0} async-done(%async-start), calls=%wrapped
  %reduce-scatter-start.1 = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%a, %b)
  %reduce-scatter-done.1 = (f32[2]{0}, f32[1]{0}) reduce-scatter-done(%reduce-scatter-start.1)
  %all-reduce.1 = (f32[8]{0}, /*index=1*/f32[]) all-reduce(%a, %b), to_apply=%add
  ROOT %gte = f32[] get-tuple-element(%all-reduce.1), index=1
}
"""


def test_every_form_is_counted_as_often_as_it_runs():
    assert collectives(HLO) == {
        "all-gather": Traffic(30, 30 * 2 * 16 * 8),
        "all-reduce": Traffic(1, 4 * 8 + 4),
        "reduce-scatter": Traffic(10 + 1 + 1, 10 * 2 * 16 * 8 + 4 * 2 * 4 + 4 * (8 + 4)),
    }


RING = """HloModule ring, num_partitions=16

%cond (s: (bf16[4,8], u32[])) -> pred[] {
  %constant.8 = u32[]{:T(128)} constant(8)
  %s = (bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %gte = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %lt = pred[]{:T(512)} compare(%gte, %constant.8), direction=LT
}

%body (s: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %constant.15 = u32[]{:T(128)} constant(15)
  %constant.STEP = u32[]{:T(128)} constant(STEP)
  %s = (bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %share = bf16[4,8]{1,0} get-tuple-element(%s), index=0
  %turn = u32[]{:T(128)} get-tuple-element(%s), index=1
  %copy.1 = u32[]{:T(128)S(6)} copy(%turn)
  %add.1 = u32[]{:T(128)S(6)} add(%copy.1, %constant.15)
  %add.2 = u32[]{:T(128)} add(%copy.1, %constant.STEP), control-predecessors={%copy.1}
  %collective-permute.1 = bf16[4,8]{1,0} collective-permute(%share), source_target_pairs={{0,1},{1,0}}
  %collective-permute.2 = bf16[4,8]{1,0} collective-permute(%collective-permute.1), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple.1 = (bf16[4,8]{1,0}, /*index=1*/u32[]) tuple(%collective-permute.2, /*index=1*/%add.2)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %while.1 = (bf16[4,8]{1,0}, u32[]) while(%a), condition=%cond, body=%body
  ROOT %gte = bf16[4,8]{1,0} get-tuple-element(%while.1), index=0
}
"""


@pytest.mark.parametrize(("step", "turns"), [(1, 8), (2, 4), (3, 3)])
def test_a_ring_of_a_tpu_counts_its_turns_by_what_it_adds(step, turns):
    found = collectives(RING.replace("STEP", str(step)))
    assert found == {"collective-permute": Traffic(2 * turns, 2 * turns * 2 * 4 * 8)}


def test_what_is_summed_whole_goes_over_the_network_twice():
    assert sent({"all-reduce": Traffic(1, 100), "all-gather": Traffic(3, 10)}) == 210
    assert sent({}) == 0
