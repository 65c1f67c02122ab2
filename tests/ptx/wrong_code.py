"""Bodies of kernels with a fault each, and what the executor says of it."""

from tests.ptx.handwritten import EXPECT, LOAD, ONES, OTHER, PART, STORE, STORED, WAIT, WGMMA, WIDE_STORE

WRONG = {
    "an end off by one": (
        "setp.le.s32 %p1, %r1, 60; @%p1 st.global.b32 [%rd2+16], %r1;",
        "global address outside of every tensor",
    ),
    "an odd address": ("ld.global.b32 %r5, [%rd2+2];", "misaligned"),
    "beyond shared memory": ("st.shared.b32 [%r3+4], %r1;", "shared address outside"),
    "no barrier": (
        f"st.shared.b32 [%r3], %r1; {OTHER} bar.warp.sync -1; ld.shared.b32 %r7, [%r6];",
        "race in shared memory",
    ),
    "no second barrier": (
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {OTHER} ld.shared.b32 %r7, [%r6]; st.shared.b32 [%r3], %r7;",
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
        PART + "@%p1 mov.b32 %r5, 1; shfl.sync.idx.b32 %r6, %r5, 9, 31, -1; st.global.b32 [%rd2], %r6;",
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
        f"st.shared.b32 [%r3], %r1; bar.sync 0; {OTHER} setp.lt.s32 %p1, %r1, 32; "
        # the second warp is the first behind a barrier
        "@!%p1 ld.shared.b32 %r7, [%r6]; @%p1 st.shared.b32 [%r3], %r4;",
        "race in shared memory",
    ),
    "a store over a copy": (
        "cp.async.ca.shared.global [%r3], [%rd2], 0x4; st.shared.b32 [%r3], %r1;",
        "asynchronous copy is on the way",
    ),
    "a barrier for a part": (
        PART + "@%p1 bra $in; bra.uni $out; $in: bar.sync 0; $out: mov.b32 %r5, 0;",
        "lanes missing",
    ),
    "a shuffle from a lane elsewhere": (
        PART + "@!%p1 bra $out; shfl.sync.idx.b32 %r6, %r1, 10, 31, 127; $out: mov.b32 %r5, 0;",
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
        PART + "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];",
        "lanes missing",
    ),
    "a product of a part": (
        PART + "@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r5,%r6,%r7,%r8}, "
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
        f"{EXPECT} {LOAD} ld.shared.b32 %r5, [%r2+128];",
        "asynchronous copy is on the way",
    ),
    "a load by several lanes": (f"{EXPECT} {PART} {LOAD.replace('@%p0', '@%p1')} {WAIT}", "misused"),
    "a load of more than is expected": (f"{EXPECT.replace('64;', '32;')} {LOAD} {WAIT}", "deadlock"),
    "a load for another mbarrier": (f"{EXPECT} {LOAD.replace('[%r2];', '[%r8];')} {WAIT}", "misused"),
    "mbarriers without an end": (
        "".join(f"mbarrier.init.shared::cta.b64 [%r2+{8 * i}], 1; " for i in range(17)),
        "misused",
    ),
    "a wait without an mbarrier": (WAIT, "misused"),
    "two arrivals for one": (f"{EXPECT} {EXPECT.partition('bar.sync 0;')[2]} mov.b32 %r5, 0;", "misused"),
    "a load into an odd place": (
        f"{EXPECT} {LOAD.replace('%r2, 128', '%r2, 136')} {WAIT}",
        "misaligned",
    ),
    "a map that is none": (f"{EXPECT} {LOAD.replace('[%rd6', '[%rd1')}", "misused"),
    "a store without a fence": (f"{WIDE_STORE} {STORE} {STORED}", "without a fence"),
    "a store that is not waited for": (
        f"{WIDE_STORE} fence.proxy.async.shared::cta; {STORE}",
        "misused",
    ),
    "wgmma without a fence": (
        f"{ONES} bar.sync 0; {WGMMA} wgmma.wait_group.sync.aligned 0;",
        "without a fence",
    ),
    "wgmma without a barrier": (
        f"{ONES} fence.proxy.async.shared::cta; {WGMMA} wgmma.wait_group.sync.aligned 0;",
        "race in shared memory",
    ),
    "wgmma that is not waited for": (
        f"{ONES} fence.proxy.async.shared::cta; bar.sync 0; {WGMMA} mov.b32 %r6, %r10; "
        "wgmma.wait_group.sync.aligned 0;",
        "misused",
    ),
    "wgmma to the end": (f"{ONES} fence.proxy.async.shared::cta; bar.sync 0; {WGMMA}", "misused"),
    "sums that are not there": (
        f"{ONES} fence.proxy.async.shared::cta; bar.sync 0; {WGMMA.replace('%rd5, 0,', '%rd5, 1,')} "
        "wgmma.wait_group.sync.aligned 0;",
        "register never written",
    ),
    "wgmma whose lanes disagree": (
        f"{ONES} fence.proxy.async.shared::cta; bar.sync 0; {PART} "
        f"{WGMMA.replace('%rd5, 0,', '%rd5, %p1,')} wgmma.wait_group.sync.aligned 0;",
        "lanes missing",
    ),
    "wgmma of a part": (
        f"{ONES} {PART} {WGMMA.replace('wgmma.mma', '@%p1 wgmma.mma')}",
        "lanes missing",
    ),
    "a division by zero": ("mov.b32 %r5, 0; div.s32 %r6, %r1, %r5;", "division by zero"),
}
