"""What crosses the wire, read from programs: made ones, and those of the TPU compiler."""

import json

import pytest

from rpa.lab.parallel import CASES, TOPOLOGIES, estimate_for, wire
from rpa.lab.parallel.estimate import read
from tests.test_parallel import run_on_host_devices

HLO = """
%ring (p: bf16[4,8]) -> bf16[4,8] {
  %p1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p), \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

%layer (p: bf16[4,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %w = bf16[4,8]{1,0} while(%p0), condition=%c, body=%ring
  %c = bf16[9,8,2]{2,1,0} copy(%cache)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %w = bf16[4,8]{1,0} while(%p), condition=%c, body=%layer
  %r = (f32[8]{0}, f32[2,8]{1,0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_collectives_are_found_with_their_loops():
    ring, first, reduced = wire.collectives(HLO)
    assert (ring.kind, ring.result_bytes, ring.group_size, ring.depth) == (
        *("collective-permute", 64, 4),
        2,
    )
    assert first.depth == 1 and ring.sent_bytes == first.sent_bytes == 64
    assert (reduced.result_bytes, reduced.group_size, reduced.depth) == (96, 4, 0)
    assert reduced.sent_bytes == 2 * 96 * 3 / 4


def test_a_copy_of_the_cache_is_found():
    assert wire.whole_cache_operations(HLO, (9, 8, 2)) == ["%c = bf16[9,8,2]{2,1,0} copy(%cache)"]
    assert wire.whole_cache_operations(HLO, (9, 8, 3)) == []


def test_the_ring_is_counted_as_often_as_it_goes_round():
    answer = {"hlo": HLO.replace("all-reduce", "add"), "cache_shape": (9, 8, 2)}
    found = read("prefill context", "v5e:2x4", answer)
    assert found.collectives == {"collective-permute": 7} and len(found.cache_operations) == 1
    assert found.time_us == max(found.on_chip_us, found.wire_us)


EXPECTED = {
    "heads": {},
    "heads, each KV head on two": {},
    "sequences": {},
    "sequences x heads": {},
    "decode context": {"all-gather": 1, "all-reduce": 1},
    "heads x decode context": {"all-gather": 1, "all-reduce": 1},
    "prefill context": {"collective-permute": 7},
}
SAMPLE = [("decode context", "v5e:2x4"), ("prefill context", "v6e:2x4"), ("heads", "tpu7x:2x2x1")]


@pytest.mark.parametrize(
    "case, topology",
    [
        pytest.param(case, topology, marks=() if (case, topology) in SAMPLE else pytest.mark.full)
        for case in CASES
        for topology in TOPOLOGIES
    ],
)
def test_only_the_expected_collectives_and_no_copy_of_the_cache(case, topology):
    found = estimate_for(case, topology)
    if found.error and "libtpu" in found.error:
        pytest.skip(found.error)
    assert not found.error, found.error
    assert found.collectives == EXPECTED[case]
    assert found.cache_operations == ()


def test_the_command_prints_a_line_for_each():
    printed = run_on_host_devices(
        *("rpa", "lab", "parallel", "--case", "heads", "--topology", "v5e:2x4", "--json"),
        num_devices=1,
    )
    (found,) = json.loads(printed)["estimates"]
    if found["error"]:
        pytest.skip(found["error"])
    assert found["collectives"] == {} and found["time_us"] == found["on_chip_us"]
