"""What one launch is predicted to cost: bytes over bandwidth, products over peak, waves of tiles, start-up.

Every constant here is either fitted to published times (see the comments and ``targets``) or assumed. Nothing
is measured by us: whatever comes out is a prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastlora_kernels.predict.traffic import Wave, grouped_wave, lost, product_bytes, square_wave
from fastlora_kernels.targets import Target
from fastlora_kernels.tile import Tile

Bound = Literal["products", "memory", "integers"]

# microseconds between two launches of a stream, and from a kernel's start to full speed and back
GAP, RAMP = 1.5, 2.0
# microseconds that the host takes for a launch through torch, and through Triton
HOST_LIBRARY, HOST_TRITON = 6.0, 12.0
# share of the bandwidth that a kernel which only streams reaches; a library's product with a thin output less
STREAM, LIBRARY_THIN = 0.92, 0.8
# the cache serves what stays in it this much faster than memory
CACHE_SPEED = 2.5
# microseconds in which a tile of 128 × 256 fills its pipeline and stores its output: triton#2339, FBGEMM#2766
# (H100) and triton#6523 (A100) agree on about 13 in all, of which some depends on the tile's size
_FILL_FIXED, _FILL_LARGEST, _LARGEST = 3.0, 10.0, 128 * 256
# speed of the kernels' main loops beside the library's: lorafusion#8 (sm_90), triton#6523 (sm_80), or assumed
_POINTER_LOOP = {"sm_80": 0.93, "sm_90": 0.98, "sm_100": 0.7, "gfx942": 0.85}
_DESCRIPTOR_LOOP = {"sm_90": 1.0, "sm_100": 0.9}
_OTHER_LOOP = 0.6
# speed of a main loop with fewer operands on the way than hide the distance to memory (assumed)
_SHORT_PIPELINE = {1: 0.4, 2: 0.85}
# a persistent program stores while it fetches the next tile's operands: triton#5461 has it 4 % faster than
# the library in 8 bits on an H100; in 16 bits no more is assumed than that it keeps up
_PERSISTENT_FILL = 0.75
# of the library's tiles, the one with the lowest prediction counts
_LIBRARY_TILES = ((128, 256), (128, 128), (64, 128), (64, 64), (32, 64))


@dataclass(frozen=True)
class Launch:
    """A predicted launch.

    Attributes:
        name: The kernel's, or what the library computes.
        microseconds: Time from its start to its end.
        bytes: Moved from and to memory.
        flops: Floating-point operations of its products.
        bound: What takes longest.
        from_library: Whether torch launches it.
        count: Launches that it stands for.
    """

    name: str
    microseconds: float
    bytes: float
    flops: float
    bound: Bound
    from_library: bool = False
    count: int = 1


def stream(
    name: str,
    moved: float,
    target: Target,
    *,
    flops: float = 0.0,
    integers: float = 0.0,
    cached: float = 0.0,
    programs: float = math.inf,
    share: float = STREAM,
    from_library: bool = False,
    count: int = 1,
) -> Launch:
    """A launch that reads and writes its operands once.

    Args:
        name: For the table.
        moved: Bytes from and to memory.
        target: The GPU.
        flops: Floating-point operations of its products.
        integers: Integer operations, such as drawing random numbers takes.
        cached: Bytes that stay in the cache until they are read again, as far as it holds them.
        programs: Blocks of the launch; too few don't reach the full bandwidth.
        share: Share of the bandwidth that it reaches at most.
        from_library: Whether torch launches it.
        count: Launches that it stands for.
    """
    reached = min(1.0, programs / target.multiprocessors)
    moved += cached * lost(cached, target)
    memory = (moved + cached / CACHE_SPEED) / (target.bandwidth * 1e3 * share * reached)
    # a quarter of the lanes that add and multiply floats do so with integers
    times: dict[Bound, float] = {
        "memory": memory,
        "integers": integers / (target.fp32_tflops / 4 * 1e6 * reached),
        "products": flops / (_peak(target, 2) * target.sustained * 1e6 * reached),
    }
    bound = max(times, key=lambda each: times[each])
    return Launch(name, times[bound] + RAMP * count, moved, flops, bound, from_library, count)


def kernel_product(
    name: str,
    m: int,
    n: int,
    k: int,
    itemsize: int,
    tile: Tile,
    target: Target,
    *,
    group: int,
    at_once: int = 1,
    low_rank: int = 0,
    beside: int = 0,
    loops: int = 1,
    extra_bytes: float = 0.0,
    extra_flops: float = 0.0,
    extra_tiles: Sequence[float] = (),
    decoding: float = 0.0,
) -> Launch:
    """Our own ``[m, k]·[k, n]`` with a low-rank product in the same launch.

    Args:
        name: The kernel's.
        m: Rows of the output.
        n: Columns.
        k: Length of the sums.
        itemsize: Bytes of an element.
        tile: Block sizes.
        target: The GPU.
        group: Row tiles that walk the columns together.
        at_once: Programs that one multiprocessor holds.
        low_rank: Ranks of the second product, which every tile adds.
        beside: Ranks of a product that every tile computes beside the first, over the same sum.
        loops: Main loops that every tile runs one after the other, each over a part of the sum.
        extra_bytes: Read or written beside the operands and the output.
        extra_flops: Floating-point operations of other products in the same launch.
        extra_tiles: Microseconds of each program that the same launch runs after the product's tiles.
        decoding: Instructions of a thread for every element of the right side that the loop decodes.
    """
    loop = (_DESCRIPTOR_LOOP if tile.persistent else _POINTER_LOOP).get(target.tiles, _OTHER_LOOP)
    rate = _peak(target, itemsize) * target.sustained * (loop if itemsize < 4 else _OTHER_LOOP)
    rate *= _tile_speed(tile.rows, tile.cols)
    if not target.is_amd:
        rate *= _SHORT_PIPELINE.get(tile.stages, 1.0)
    depth = _padded(k, tile.depth) * (1 + _padded(beside, 16) / tile.cols) + _padded(low_rank, 16)
    main = _tile_us(tile.rows, tile.cols, depth, rate, target)
    # S and B arrive after the main loop, where nothing hides the way from memory, as at each loop's beginning
    late = 0.7 * (math.ceil(low_rank / max(tile.rank, 1)) + loops - 1)
    tiles = math.ceil(m / tile.rows) * math.ceil(n / tile.cols)
    places = target.multiprocessors * at_once
    fill = _fill(tile.rows, tile.cols) * (_PERSISTENT_FILL if tile.persistent else 1.0)
    products, idle = _waves(tiles, main, fill + late, target, at_once)
    products += max(0.0, sum(extra_tiles) - idle) / places
    wave = grouped_wave(tile.rows, tile.cols, group, places)
    moved = product_bytes(m, n, k, itemsize, wave, target) + extra_bytes
    flops = 2.0 * m * n * (k + low_rank) + extra_flops
    # a multiprocessor issues as many instructions as it has float32 units; that nothing overlaps is assumed
    decoded = math.ceil(tiles / target.multiprocessors) * tile.cols * k * decoding
    integers = decoded / (target.fp32_tflops / 2 * 1e6 / target.multiprocessors)
    return _product(name, products, moved, flops, target, integers=integers)


def library_product(
    name: str, m: int, n: int, k: int, itemsize: int, target: Target, *, extra_bytes: float = 0.0
) -> Launch:
    """``[m, k]·[k, n]`` by the vendor's library.

    Args:
        name: What it computes.
        m: Rows of the output.
        n: Columns.
        k: Length of the sums.
        itemsize: Bytes of an element.
        target: The GPU.
        extra_bytes: Read beside the operands, as what the product is added to.
    """
    rate = _peak(target, itemsize) * target.sustained
    best: Launch | None = None
    for rows, cols in _LIBRARY_TILES:
        at_once = max(1, min(4, _LARGEST // (rows * cols)))
        # small tiles read more of shared memory for every product
        main = _tile_us(rows, cols, _padded(k, 64), rate * _tile_speed(rows, cols), target)
        tiles = math.ceil(m / rows) * math.ceil(n / cols)
        # with few tiles the library cuts the sums into parts
        parts = max(1, min(4, target.multiprocessors // max(tiles, 1), k // 512))
        products, _ = _waves(tiles * parts, main / parts, _fill(rows, cols), target, at_once)
        wave: Wave = square_wave(rows, cols, at_once * target.multiprocessors)
        moved = product_bytes(m, n, k, itemsize, wave, target) + extra_bytes
        launch = _product(name, products, moved, 2.0 * m * n * k, target, from_library=True)
        best = launch if best is None or launch.microseconds < best.microseconds else best
    assert best is not None
    return best


def total_us(launches: Sequence[Launch]) -> float:
    """Time of launches that follow each other in a stream; no faster than the host can launch them."""
    device = sum(launch.microseconds + GAP * launch.count for launch in launches)
    host = sum((HOST_LIBRARY if launch.from_library else HOST_TRITON) * launch.count for launch in launches)
    return max(device, host)


def extra_tile_us(moved: float, target: Target) -> float:
    """A program that streams ``moved`` bytes while others compute, at twice a multiprocessor's even share."""
    return moved / (2 * target.bandwidth * 1e3 / target.multiprocessors) + RAMP


def _product(
    name: str, products: float, moved: float, flops: float, target: Target, *, integers: float = 0.0,
    from_library: bool = False,
) -> Launch:  # fmt: skip
    memory = moved / (target.bandwidth * 1e3 * STREAM)
    longest = max(products, memory)
    bound: Bound = "integers" if integers > longest else "products" if products >= memory else "memory"
    return Launch(name, longest + integers + RAMP, moved, flops, bound, from_library)


def _peak(target: Target, itemsize: int) -> float:
    return target.tensor_tflops if itemsize < 4 else target.fp32_tflops


def _tile_us(rows: int, cols: int, k: float, tflops: float, target: Target) -> float:
    return 2.0 * rows * cols * k / (tflops * 1e6 / target.multiprocessors)


def _tile_speed(rows: int, cols: int) -> float:
    """Speed of a tile's main loop beside the largest tile's."""
    return math.pow(rows * cols / _LARGEST, 0.08)


def _fill(rows: int, cols: int) -> float:
    return _FILL_FIXED + _FILL_LARGEST * rows * cols / _LARGEST


def _waves(tiles: int, main: float, fill: float, target: Target, at_once: int) -> tuple[float, float]:
    """Microseconds of all tiles, and the microseconds that places of the last wave stand empty, added up.

    Programs on one multiprocessor share its units, but one fills its pipeline while another computes.
    """
    places = target.multiprocessors * at_once
    whole, rest = divmod(tiles, places)
    last = math.ceil(rest / target.multiprocessors) * main + fill
    if rest == 0:
        return whole * (at_once * main + fill), 0.0
    return whole * (at_once * main + fill) + last, (places - rest) * last


def _padded(size: int, step: int) -> int:
    return math.ceil(size / step) * step
