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
from tests.ptx.engine import COUNTS, Engine
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
\t.param .u32 size
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


RIGHT: dict[str, tuple[str, Callable[[int], int]]] = {
    "a store": ("st.global.b32 [%rd2], %r1;", lambda i: i),
    "a masked store": (
        "setp.lt.s32 %p1, %r1, 60; @%p1 st.global.b32 [%rd2+16], %r1;",
        lambda i: max(i - 4, 0),
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
    "a loop": (
        "mov.b32 %r5, 0; $again: add.s32 %r5, %r5, 1; setp.lt.s32 %p1, %r5, %r1; @%p1 bra $again; "
        "st.global.b32 [%rd2], %r5;",
        lambda i: max(i, 1),
    ),
    "numbers": (
        "cvt.rn.f32.s32 %r5, %r1; mul.f32 %r6, %r5, 0f3FC00000; cvt.rn.bf16x2.f32 %r7, %r6, %r5; "
        "st.global.b32 [%rd2], %r7;",
        lambda i: _bf16(1.5 * i) << 16 | _bf16(i),
    ),
}
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
    "a shuffle of a part": (
        "setp.lt.s32 %p1, %r1, 7; @%p1 shfl.sync.idx.b32 %r6, %r1, 0, 31, -1;",
        "lanes missing",
    ),
    "a barrier that one warp leaves out": (
        "setp.lt.s32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; $out: mov.b32 %r5, 0;",
        "deadlock",
    ),
    "a division by zero": ("mov.b32 %r5, 0; div.s32 %r6, %r1, %r5;", "division by zero"),
}


@pytest.fixture(scope="session")
def engine(kept_folder: Callable[[str], Path]) -> Engine:
    return Engine(kept_folder("ptx"))


def run(engine: Engine, body: str, *, programs: int = 1, columns: int = 0) -> tuple[Outcome, Tensor]:
    """What statements do, and x afterwards: 64 words, or rows of so many columns in every eight."""
    text = KERNEL.replace("BODY", body.replace("; ", ";\n").replace(": ", ":\n"))
    x = torch.zeros(SIZE, dtype=torch.int32)
    start = x.data_ptr()
    # torch's tensors begin at a multiple of 64 bytes, of which sectors are counted
    assert start % 64 == 0
    parameters = [start.to_bytes(8, "little"), SIZE.to_bytes(4, "little")]
    rows = (4 * columns, 32) if columns else (0, 0)
    memory = [Memory("x_ptr", start, 4 * SIZE, *rows)]
    launch = Launch((programs, 1, 1), SIZE // 32, 4 * SIZE, parameters, memory)
    return execute(decode(text, engine), launch, engine), x


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(engine: Engine, name: str) -> None:
    body, expected = RIGHT[name]
    outcome, x = run(engine, body)
    assert (outcome.findings, outcome.harmless) == ([], {})
    assert x.tolist() == [expected(thread) for thread in range(SIZE)]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_is_noticed(engine: Engine, name: str) -> None:
    body, told = WRONG[name]
    assert any(told in found for found in run(engine, body)[0].findings)


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
