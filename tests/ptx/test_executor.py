"""The executor itself, on PTX written by hand: what each check notices, and that it lets right code pass."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.engine import COUNTS, Engine
from tests.ptx.handwritten import EXPECT, LOAD, ONES, OTHER, SIZE, STORE, STORED, WAIT, WGMMA, WIDE_STORE, run
from tests.ptx.source import Unsupported
from tests.ptx.wrong_code import WRONG

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux",
    reason="the executor is built with gcc on Linux",
)


def _bf16(value: float) -> int:
    return int(np.float32(value).view(np.uint32)) >> 16


RIGHT: dict[str, tuple[str, Callable[[int], int]]] = {
    "a store": ("st.global.b32 [%rd2], %r1;", lambda i: i),
    "a masked store": (
        "setp.lt.s32 %p1, %r1, 60; @%p1 st.global.b32 [%rd2+16], %r1;",
        lambda i: i - 4 if i >= 4 else 100 + i,
    ),
    "an exchange": (
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {OTHER} ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd2], %r7;",
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
        f"{EXPECT} {LOAD} {WAIT} setp.lt.s32 %p1, %r1, 16; @%p1 ld.shared.b32 %r5, [%r3+128]; "
        "@%p1 st.global.b32 [%rd2], %r5;",
        # four rows of four out of rows of eight
        lambda i: 100 + (i // 4 * 8 + i % 4 if i < 16 else i),
    ),
    "a TMA store": (
        f"{WIDE_STORE} fence.proxy.async.shared::cta; {STORE} {STORED}",
        lambda i: i // 8 * 4 + i % 8 if i < 32 and i % 8 < 4 else 100 + i,
    ),
    "wgmma": (
        f"{ONES} fence.proxy.async.shared::cta; bar.sync 0; {WGMMA} wgmma.wait_group.sync.aligned 0; "
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


@pytest.fixture(scope="session")
def engine(kept_folder: Callable[[str], Path]) -> Engine:
    return Engine(kept_folder("ptx"))


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
    load = f"{EXPECT} {LOAD} {WAIT}"
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
