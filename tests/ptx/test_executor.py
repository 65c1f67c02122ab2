"""The executor itself, on PTX written by hand: what each check notices, and that it lets right code pass."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx.decode import decode
from tests.ptx.engine import COUNTS, MAP_BYTES, SHARED_START, Engine, TensorMap
from tests.ptx.execute import Launch, Memory, Outcome, execute
from tests.ptx.source import Unsupported

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux",
    reason="the executor is built with gcc on Linux",
)

# %r1 is a thread's number, %rd2 the address of its element of x and %r3 of its word in shared memory
KERNEL = """
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 x_ptr,
\t.param .u32 size,
\t.param .align 64 .b8 map[128]
)
.reqntid 64
{
\tld.param.b64 %rd1, [x_ptr];
\tld.param.b32 %r0, [size];
\tmov.u32 %r1, %tid.x;
\tmul.wide.u32 %rd3, %r1, 4;
\tadd.s64 %rd2, %rd1, %rd3;
\tmov.b32 %r2, global_smem;
\tshl.b32 %r4, %r1, 2;
\tadd.s32 %r3, %r2, %r4;
BODY
\tret;
$L__func_end0:
}
"""
SIZE = 64
# address %r6 of the word of the thread in the other warp
_OTHER = "xor.b32 %r5, %r4, 128; add.s32 %r6, %r2, %r5;"


def _bf16(value: float) -> int:
    return int(np.float32(value).view(np.uint32)) >> 16


# a box of 4 × 4 words of x, 64 bytes, lies 128 bytes into shared memory, its mbarrier at the start
_EXPECT = (
    "setp.eq.b32 %p0, %r1, 0; @%p0 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; "
    "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;"
)
_MAP = "mov.b64 %rd5, map; cvta.param.u64 %rd6, %rd5; add.s32 %r8, %r2, 128;"
_LOAD = (
    f"{_MAP} @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r8], [%rd6, {0, 0}], [%r2];"
)
_WAIT = "$wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra $wait;"
_WIDE_STORE = "setp.lt.s32 %p0, %r1, 16; @%p0 st.shared.b32 [%r3+128], %r1;"
_STORE = (
    f"bar.sync 0; setp.eq.b32 %p1, %r1, 0; {_MAP} "
    "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd6, {0, 0}], [%r8]; "
    "cp.async.bulk.commit_group;"
)
_STORED = "cp.async.bulk.wait_group 0;"
# shared memory is B, 8 columns of 16 ones in two pieces of 128 bytes; so is A, in registers
_ONES = f"mov.b32 %r5, {0x3F803F80}; st.shared.b32 [%r3], %r5;"
_WGMMA = (
    f"mov.b64 %rd5, {SHARED_START >> 4 | 128 >> 4 << 16}; wgmma.fence.sync.aligned; "
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, {%r5,%r5,%r5,%r5}, %rd5, 0, "
    "1, 1, 0; wgmma.commit_group.sync.aligned;"
)
_PART = "setp.lt.s32 %p1, %r1, 7; "


RIGHT: dict[str, tuple[str, Callable[[int], int]]] = {
    "a store": ("st.global.b32 [%rd2], %r1;", lambda i: i),
    "a masked store": (
        "setp.lt.s32 %p1, %r1, 60; @%p1 st.global.b32 [%rd2+16], %r1;",
        lambda i: i - 4 if i >= 4 else 100 + i,
    ),
    "an exchange": (
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {_OTHER} ld.shared.b32 %r7, [%r6]; "
        "st.global.b32 [%rd2], %r7;",
        lambda i: i ^ 32,
    ),
    "a copy": (
        "st.global.b32 [%rd2], %r1; cp.async.ca.shared.global [%r3], [%rd2], 0x4; cp.async.commit_group; "
        "cp.async.wait_group 0; ld.shared.b32 %r5, [%r3]; add.s32 %r6, %r5, %r5; st.global.b32 [%rd2], %r6;",
        lambda i: 2 * i,
    ),
    "lanes that part and meet": (
        "setp.lt.s32 %p1, %r1, 7; @%p1 bra $less; mov.b32 %r5, 1; bra.uni $both; $less: mov.b32 %r5, 2; "
        "$both: shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; st.global.b32 [%rd2], %r6;",
        lambda i: 2 if i ^ 1 < 7 else 1,
    ),
    "a lane that is thrown away": (
        "setp.ge.s32 %p1, %r1, 7; @%p1 mov.b32 %r5, 5; add.s32 %r6, %r5, %r1; "
        "shfl.sync.bfly.b32 %r7, %r6, 0, 31, -1; selp.b32 %r8, %r7, %r1, %p1; st.global.b32 [%rd2], %r8;",
        lambda i: i + 5 if i >= 7 else i,
    ),
    "a half that is thrown away": (
        "cvt.u16.u32 %rs1, %r1; mov.b32 %r5, {%rs1, %rs2}; mov.b32 {%rs3, _}, %r5; cvt.u32.u16 %r6, %rs3; "
        "st.global.b32 [%rd2], %r6;",
        lambda i: i,
    ),
    "two comparisons": (
        "cvt.rn.f32.s32 %r5, %r1; cvt.rn.bf16x2.f32 %r6, 0f41F00000, %r5; mov.b32 %r7, 0x41204120; "
        "setp.le.bf16x2 %p1|%p2, %r6, %r7; selp.b32 %r8, 1, 0, %p1; @%p2 mov.b32 %r8, 7; "
        "st.global.b32 [%rd2], %r8;",
        # 10 twice; 30 above is more
        lambda i: int(i <= 10),
    ),
    "a byte with a sign": (
        "mad.lo.s32 %r5, %r1, 16, 1792; cvt.s32.s8 %r6, %r5; prmt.b32 %r7, %r5, 0, 0x8880; "
        "add.s32 %r8, %r6, %r7; st.global.b32 [%rd2], %r8;",
        lambda i: 2 * (i * 16 % 256 - (256 if i % 16 > 7 else 0)),
    ),
    "a loop": (
        "mov.b32 %r5, 0; $again: add.s32 %r5, %r5, 1; setp.lt.s32 %p1, %r5, %r1; @%p1 bra $again; "
        "st.global.b32 [%rd2], %r5;",
        lambda i: max(i, 1),
    ),
    "a TMA load": (
        f"{_EXPECT} {_LOAD} {_WAIT} setp.lt.s32 %p1, %r1, 16; @%p1 ld.shared.b32 %r5, [%r3+128]; "
        "@%p1 st.global.b32 [%rd2], %r5;",
        # four rows of four out of rows of eight
        lambda i: 100 + (i // 4 * 8 + i % 4 if i < 16 else i),
    ),
    "a TMA store": (
        f"{_WIDE_STORE} fence.proxy.async.shared::cta; {_STORE} {_STORED}",
        lambda i: i // 8 * 4 + i % 8 if i < 32 and i % 8 < 4 else 100 + i,
    ),
    "wgmma": (
        f"{_ONES} fence.proxy.async.shared::cta; bar.sync 0; {_WGMMA} wgmma.wait_group.sync.aligned 0; "
        "cvt.rn.bf16.f32 %rs1, %r10; cvt.u32.u16 %r5, %rs1; st.global.b32 [%rd2], %r5;",
        lambda i: _bf16(16),
    ),
    "numbers": (
        "cvt.rn.f32.s32 %r5, %r1; mul.f32 %r6, %r5, 0f3FC00000; cvt.rn.bf16x2.f32 %r7, %r6, %r5; "
        "st.global.b32 [%rd2], %r7;",
        lambda i: _bf16(1.5 * i) << 16 | _bf16(i),
    ),
}
NUMBERS: list[tuple[str, tuple[int, ...], int]] = [
    ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFE), -3),
    ("mul.hi.s32", (-1, 2), -1),
    ("mul.lo.s32", (-3, 5), -15),
    ("mad.lo.s32", (-3, 5, 1), -14),
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("div.u32", (0xFFFFFFFE, 2), 0x7FFFFFFF),
    ("rem.u32", (0xFFFFFFFF, 16), 15),
    ("min.s32", (-1, 1), -1),
    ("max.u32", (0xFFFFFFFF, 1), -1),
    ("neg.s32", (5,), -5),
    ("not.b32", (5,), -6),
    ("xor.b32", (5, 3), 6),
    ("shl.b32", (1, 32), 0),
    ("shr.u32", (0x80000000, 31), 1),
    ("shr.s32", (-8, 40), -1),
    ("bfe.u32", (0xABCD, 4, 8), 0xBC),
    ("bfe.s32", (0xABCD, 4, 8), 0xBC - 256),
    ("bfe.s32", (0x7000ABCD, 28, 8), 7),
    ("prmt.b32", (0x33221100, 0x77665544, 0x5410), 0x55441100),
    ("prmt.b32", (0x80, 0x7F, 0xC888), 0x00FFFFFF),
]
WRONG = {
    "an end off by one": (
        "setp.le.s32 %p1, %r1, 60; @%p1 st.global.b32 [%rd2+16], %r1;",
        "global address outside of every tensor",
    ),
    "an odd address": ("ld.global.b32 %r5, [%rd2+2];", "misaligned"),
    "beyond shared memory": ("st.shared.b32 [%r3+4], %r1;", "shared address outside"),
    "no barrier": (
        f"st.shared.b32 [%r3], %r1; {_OTHER} bar.warp.sync -1; ld.shared.b32 %r7, [%r6];",
        "race in shared memory",
    ),
    "no second barrier": (
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {_OTHER} ld.shared.b32 %r7, [%r6]; st.shared.b32 [%r3], %r7;",
        "race in shared memory",
    ),
    "no wait": (
        "cp.async.ca.shared.global [%r3], [%rd2], 0x4; cp.async.commit_group; ld.shared.b32 %r5, [%r3];",
        "asynchronous copy is on the way",
    ),
    "a wait one group late": (
        "cp.async.ca.shared.global [%r3], [%rd2], 0x4; cp.async.commit_group; cp.async.wait_group 1; "
        "ld.shared.b32 %r5, [%r3];",
        "asynchronous copy is on the way",
    ),
    "an empty place": ("ld.shared.b32 %r5, [%r3];", "shared memory never written"),
    "an empty register": ("st.global.b32 [%rd2], %r5;", "register never written"),
    "a register that some lanes wrote": (
        "setp.lt.s32 %p1, %r1, 7; @%p1 mov.b32 %r5, 1; st.global.b32 [%rd2], %r5;",
        "register never written",
    ),
    "a shuffle from an empty register": (
        _PART + "@%p1 mov.b32 %r5, 1; shfl.sync.idx.b32 %r6, %r5, 9, 31, -1; st.global.b32 [%rd2], %r6;",
        "register never written",
    ),
    "an empty half": (
        "cvt.u16.u32 %rs1, %r1; mov.b32 %r5, {%rs1, %rs2}; st.global.b32 [%rd2], %r5;",
        "register never written",
    ),
    "an empty address": ("ld.global.b32 %r5, [%rd9];", "register never written"),
    "an empty predicate": ("@%p9 st.global.b32 [%rd2], %r1;", "register never written"),
    "an empty operand of a product": (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r5,%r6,%r7,%r8}, "
        "{%r1,%r1,%r1,%r9}, {%r1,%r1}, {%r1,%r1,%r1,%r1};",
        "register never written",
    ),
    "a store before others have read": (
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {_OTHER} setp.lt.s32 %p1, %r1, 32; "
        # the second warp is the first behind a barrier
        "@!%p1 ld.shared.b32 %r7, [%r6]; @%p1 st.shared.b32 [%r3], %r4;",
        "race in shared memory",
    ),
    "a store over a copy": (
        "cp.async.ca.shared.global [%r3], [%rd2], 0x4; st.shared.b32 [%r3], %r1;",
        "asynchronous copy is on the way",
    ),
    "a barrier for a part": (
        _PART + "@%p1 bra $in; bra.uni $out; $in: bar.sync 0; $out: mov.b32 %r5, 0;",
        "lanes missing",
    ),
    "a shuffle from a lane elsewhere": (
        _PART + "@!%p1 bra $out; shfl.sync.idx.b32 %r6, %r1, 10, 31, 127; $out: mov.b32 %r5, 0;",
        "lanes missing",
    ),
    "a shuffle of a part": (
        "setp.lt.s32 %p1, %r1, 7; @%p1 shfl.sync.idx.b32 %r6, %r1, 0, 31, -1;",
        "lanes missing",
    ),
    "a barrier that one warp leaves out": (
        "setp.lt.s32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; $out: mov.b32 %r5, 0;",
        "deadlock",
    ),
    "matrices for a part": (
        _PART + "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];",
        "lanes missing",
    ),
    "a product of a part": (
        _PART + "@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r5,%r6,%r7,%r8}, "
        "{%r1,%r1,%r1,%r1}, {%r1,%r1}, {%r1,%r1,%r1,%r1};",
        "lanes missing",
    ),
    "matrices at an odd place": (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2+8];",
        "misaligned",
    ),
    "a copy of too much": (
        "cp.async.ca.shared.global [%r3], [%rd2], 0x4, 8;",
        "asynchronous operation misused",
    ),
    "a load that is not waited for": (
        f"{_EXPECT} {_LOAD} ld.shared.b32 %r5, [%r2+128];",
        "asynchronous copy is on the way",
    ),
    "a load by several lanes": (f"{_EXPECT} {_PART} {_LOAD.replace('@%p0', '@%p1')} {_WAIT}", "misused"),
    "a load of more than is expected": (f"{_EXPECT.replace('64;', '32;')} {_LOAD} {_WAIT}", "deadlock"),
    "a load for another mbarrier": (f"{_EXPECT} {_LOAD.replace('[%r2];', '[%r8];')} {_WAIT}", "misused"),
    "mbarriers without an end": (
        "".join(f"mbarrier.init.shared::cta.b64 [%r2+{8 * i}], 1; " for i in range(17)),
        "misused",
    ),
    "a wait without an mbarrier": (_WAIT, "misused"),
    "two arrivals for one": (f"{_EXPECT} {_EXPECT.partition('bar.sync 0;')[2]} mov.b32 %r5, 0;", "misused"),
    "a load into an odd place": (
        f"{_EXPECT} {_LOAD.replace('%r2, 128', '%r2, 136')} {_WAIT}",
        "misaligned",
    ),
    "a map that is none": (f"{_EXPECT} {_LOAD.replace('[%rd6', '[%rd1')}", "misused"),
    "a store without a fence": (f"{_WIDE_STORE} {_STORE} {_STORED}", "without a fence"),
    "a store that is not waited for": (
        f"{_WIDE_STORE} fence.proxy.async.shared::cta; {_STORE}",
        "misused",
    ),
    "wgmma without a fence": (
        f"{_ONES} bar.sync 0; {_WGMMA} wgmma.wait_group.sync.aligned 0;",
        "without a fence",
    ),
    "wgmma without a barrier": (
        f"{_ONES} fence.proxy.async.shared::cta; {_WGMMA} wgmma.wait_group.sync.aligned 0;",
        "race in shared memory",
    ),
    "wgmma that is not waited for": (
        f"{_ONES} fence.proxy.async.shared::cta; bar.sync 0; {_WGMMA} mov.b32 %r6, %r10; "
        "wgmma.wait_group.sync.aligned 0;",
        "misused",
    ),
    "wgmma to the end": (f"{_ONES} fence.proxy.async.shared::cta; bar.sync 0; {_WGMMA}", "misused"),
    "sums that are not there": (
        f"{_ONES} fence.proxy.async.shared::cta; bar.sync 0; {_WGMMA.replace('%rd5, 0,', '%rd5, 1,')} "
        "wgmma.wait_group.sync.aligned 0;",
        "register never written",
    ),
    "wgmma whose lanes disagree": (
        f"{_ONES} fence.proxy.async.shared::cta; bar.sync 0; {_PART} "
        f"{_WGMMA.replace('%rd5, 0,', '%rd5, %p1,')} wgmma.wait_group.sync.aligned 0;",
        "lanes missing",
    ),
    "wgmma of a part": (
        f"{_ONES} {_PART} {_WGMMA.replace('wgmma.mma', '@%p1 wgmma.mma')}",
        "lanes missing",
    ),
    "a division by zero": ("mov.b32 %r5, 0; div.s32 %r6, %r1, %r5;", "division by zero"),
}


@pytest.fixture(scope="session")
def engine(kept_folder: Callable[[str], Path]) -> Engine:
    return Engine(kept_folder("ptx"))


def run(
    engine: Engine, body: str, *, programs: int = 1, columns: int = 0, swizzle: int = 0
) -> tuple[Outcome, Tensor]:
    """What statements do, and x, 100 and on, afterwards; its rows have so many columns of eight."""
    text = KERNEL.replace("BODY", body.replace("; ", ";\n").replace(": ", ":\n"))
    x = torch.arange(100, 100 + SIZE, dtype=torch.int32)
    start = x.data_ptr()
    # torch's tensors begin at a multiple of 64 bytes, of which sectors are counted
    assert start % 64 == 0
    parameters = [start.to_bytes(8, "little"), SIZE.to_bytes(4, "little"), bytes(MAP_BYTES)]
    rows = (4 * columns, 32) if columns else (0, 0)
    memory = [Memory("x_ptr", start, 4 * SIZE, *rows)]
    # eight rows of eight
    table = TensorMap(start=start, element_bytes=4, swizzle=swizzle, shape=(8, 8), stride=8, box=(4, 4))
    launch = Launch((programs, 1, 1), SIZE // 32, 4 * SIZE, parameters, memory, [table])
    return execute(decode(text, engine), launch, engine), x


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(engine: Engine, name: str) -> None:
    body, expected = RIGHT[name]
    outcome, x = run(engine, body)
    assert (outcome.findings, outcome.harmless) == ([], {})
    assert x.tolist() == [expected(thread) for thread in range(SIZE)]


@pytest.mark.parametrize(("operation", "operands", "expected"), NUMBERS, ids=lambda value: str(value))
def test_numbers(engine: Engine, operation: str, operands: tuple[int, ...], expected: int) -> None:
    """Where a sign, a width or a distance matters."""
    body = f"{operation} %r5, {', '.join(map(str, operands))}; st.global.b32 [%rd2], %r5;"
    outcome, x = run(engine, body)
    assert outcome.findings == []
    assert x[0] == expected


@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_is_noticed(engine: Engine, name: str) -> None:
    body, told = WRONG[name]
    assert any(told in found for found in run(engine, body)[0].findings)


def test_an_endless_loop_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.execute.MOST_INSTRUCTIONS", 1000)
    told = run(engine, "$again: bra.uni $again;")[0].findings
    assert "more instructions than the limit" in told[0]


def test_a_swizzled_box_lies_at_a_multiple_of_128_bytes(engine: Engine) -> None:
    load = f"{_EXPECT} {_LOAD} {_WAIT}"
    assert run(engine, load, swizzle=32)[0].findings == []
    (told,) = run(engine, load.replace("%r2, 128", "%r2, 144"), swizzle=32)[0].findings
    assert "misaligned" in told


def test_programs_must_not_meet(engine: Engine) -> None:
    store = "st.global.b32 [%rd2], %r1;"
    assert "race in global memory" in run(engine, store, programs=2)[0].findings[0]
    # but all may read
    assert run(engine, "ld.global.b32 %r5, [%rd2];", programs=2)[0].findings == []


def test_the_gap_between_rows_is_outside(engine: Engine) -> None:
    mask = "and.b32 %r5, %r1, 7; setp.{} %p1, %r5, 5; @%p1 ld.global.b32 %r6, [%rd2];"
    assert run(engine, mask.format("lt.s32"), columns=5)[0].findings == []
    (found,) = run(engine, mask.format("le.s32"), columns=5)[0].findings
    assert "at 20 of x_ptr, which has 256, rows of 20 every 32" in found


def test_one_value_from_several_warps_is_harmless(engine: Engine) -> None:
    outcome, _ = run(engine, "mov.b32 %r5, 7; st.shared.b32 [%r2], %r5;")
    assert outcome.findings == []
    assert [*outcome.harmless] == ["same value written by several warps"]


def test_bank_conflicts_are_counted(engine: Engine) -> None:
    """A word in each of 32 banks: eight words at a distance of eight lie in four of them."""
    for distance, waves in ((1, 1), (2, 1), (8, 2)):
        body = f"mul.lo.s32 %r5, %r1, {4 * distance}; setp.lt.s32 %p1, %r1, 8; add.s32 %r6, %r2, %r5;"
        counts = run(engine, f"{body} @%p1 st.shared.b32 [%r6], %r1;")[0].counts
        got = [int(counts[:, COUNTS.index(name)].sum()) for name in ("waves", "least_waves")]
        assert got == [waves, 1]


def test_sectors_are_counted(engine: Engine) -> None:
    """A warp's 32 words lie in four sectors of 32 bytes; every other word takes as many."""
    for mask, sectors, least in ((0, 8, 8), (1, 8, 4)):
        body = f"and.b32 %r5, %r1, {mask}; setp.eq.b32 %p1, %r5, 0; @%p1 ld.global.b32 %r6, [%rd2];"
        counts = run(engine, body)[0].counts
        got = [int(counts[:, COUNTS.index(name)].sum()) for name in ("sectors", "least_sectors")]
        assert got == [sectors, least]


def test_what_is_unknown_is_refused(engine: Engine) -> None:
    for body in (
        "add.rz.f32 %r5, %r1, %r1;",
        "frobnicate.b32 %r5, %r1;",
        "atom.global.add.u32 %r5, [%rd2], 1;",
    ):
        with pytest.raises(Unsupported, match="the executor doesn't know"):
            run(engine, body)
