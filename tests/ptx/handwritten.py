"""PTX written by hand: a kernel around statements, and statements that several bodies have."""

import torch
from torch import Tensor

from tests.ptx.decode import decode
from tests.ptx.engine import MAP_BYTES, SHARED_START, Engine, TensorMap
from tests.ptx.execute import Launch, Memory, Outcome, execute

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
OTHER = "xor.b32 %r5, %r4, 128; add.s32 %r6, %r2, %r5;"
# a box of 4 × 4 words of x, 64 bytes, lies 128 bytes into shared memory, its mbarrier at the start
EXPECT = (
    "setp.eq.b32 %p0, %r1, 0; @%p0 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0; "
    "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;"
)
MAP = "mov.b64 %rd5, map; cvta.param.u64 %rd6, %rd5; add.s32 %r8, %r2, 128;"
LOAD = (
    f"{MAP} @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
    "[%r8], [%rd6, {0, 0}], [%r2];"
)
WAIT = "$wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra $wait;"
WIDE_STORE = "setp.lt.s32 %p0, %r1, 16; @%p0 st.shared.b32 [%r3+128], %r1;"
STORE = (
    f"bar.sync 0; setp.eq.b32 %p1, %r1, 0; {MAP} "
    "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd6, {0, 0}], [%r8]; "
    "cp.async.bulk.commit_group;"
)
STORED = "cp.async.bulk.wait_group 0;"
# shared memory is B, 8 columns of 16 ones in two pieces of 128 bytes; so is A, in registers
ONES = f"mov.b32 %r5, {0x3F803F80}; st.shared.b32 [%r3], %r5;"
WGMMA = (
    f"mov.b64 %rd5, {SHARED_START >> 4 | 128 >> 4 << 16}; wgmma.fence.sync.aligned; "
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, {%r5,%r5,%r5,%r5}, %rd5, 0, "
    "1, 1, 0; wgmma.commit_group.sync.aligned;"
)
PART = "setp.lt.s32 %p1, %r1, 7; "


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
