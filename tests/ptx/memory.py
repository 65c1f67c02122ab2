"""Loads, stores, copies, barriers and what whole warps do together as instructions of the executor."""

import re
from collections.abc import Callable, Mapping

from tests.ptx.program import Assembler
from tests.ptx.source import Unsupported, split

_MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "m16n8k16.row.col.f32.f16.f16.f32": "f16",
}
_WGMMA = re.compile(r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
_TMA_LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
_TMA_STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"


def _address(assembler: Assembler, text: str, bits: int) -> tuple[int, int]:
    """Unit and offset of ``[base + offset]``."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    if match is None:
        raise Unsupported(f"address {text!r}")
    return assembler.value(match[1], bits), int(match[2] or "0", 0)


def _names(text: str) -> list[str]:
    return split(text[1:-1]) if text.startswith("{") else [text]


def _load(assembler: Assembler) -> None:
    if assembler.now.opcode[1] == "param":
        return _load_parameter(assembler)
    space, size, count = _access(assembler)
    to, source = assembler.now.arguments
    results = [assembler.register(name) for name in _names(to)]
    unit, offset = _address(assembler, source, 64 if space == "global" else 32)
    # a narrow number may be loaded into a wide register
    wide = {assembler.is_wide(result) for result in results}
    assert len(results) == count
    assert len(wide) == 1
    return assembler.emit(
        f"LD{space.upper()}", space, results, [unit], a=size, b=count, c=int(wide.pop()), offset=offset
    )


def _load_parameter(assembler: Assembler) -> None:
    to, source = assembler.now.arguments
    match = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", source)
    if match is None:
        raise Unsupported(f"address {source!r}")
    result, kind = assembler.register(to), assembler.now.opcode[-1]
    bits = 64 if assembler.is_wide(result) else 32
    unit = assembler.constant(("parameter", match[1], match[2] or "0", kind), bits)
    assembler.emit("MOV", "other", [result], [unit], a=assembler.type_of(f"u{bits}"))


def _store(assembler: Assembler) -> None:
    space, size, count = _access(assembler)
    to, values = assembler.now.arguments
    unit, offset = _address(assembler, to, 64 if space == "global" else 32)
    sources = assembler.values(_names(values), 8 * size)
    assert len(sources) == count
    assembler.emit(
        f"ST{space.upper()}", space, [], [*sources, unit], a=size, b=count, c=int(size == 8), offset=offset
    )


def _access(assembler: Assembler) -> tuple[str, int, int]:
    """Space, bytes of an element and how many."""
    _, space, *vector, kind = assembler.now.opcode
    space = space.removesuffix("::cta")
    count = {(): 1, ("v2",): 2, ("v4",): 4}.get(tuple(vector))
    if space not in ("global", "shared") or count is None or kind not in ("b8", "b16", "b32", "b64"):
        raise Unsupported("an access of another kind")
    return space, assembler.bits // 8, count


def _matrices(assembler: Assembler) -> None:
    name, *_, kind = assembler.now.opcode
    is_load, flags = name == "ldmatrix", assembler.now.opcode[3:-1]
    count = int(flags[1][1:])
    transposed = "trans" in flags
    if flags[0] != "m8n8" or kind != "b16" or len(flags) != 3 + transposed:
        raise Unsupported("matrices of another kind")
    first, second = assembler.now.arguments
    registers = [assembler.register(each) for each in _names(first if is_load else second)]
    unit, offset = _address(assembler, second if is_load else first, 32)
    assert len(registers) == count
    results, sources = (registers, [unit]) if is_load else ([], [*registers, unit])
    kind = "matrix" if is_load else "shared"
    assembler.emit(name.upper(), kind, results, sources, a=count, b=int(transposed), offset=offset)


def _mma(assembler: Assembler) -> None:
    kind = _MMA[".".join(assembler.now.opcode[3:])]
    to, *groups = [_names(group) for group in assembler.now.arguments]
    assert [len(to), *map(len, groups)] == [4, 4, 2, 4]
    results = [assembler.register(name) for name in to]
    sources = assembler.values([name for group in groups for name in group], 32)
    assembler.emit("MMA", "product", results, sources, a=assembler.type_of(kind))


def _wgmma(assembler: Assembler) -> None:
    action = assembler.now.opcode[1]
    if action == "fence":
        return assembler.emit("NOTHING", "other", [], [])
    if action == "commit_group":
        return assembler.emit("WGCOMMIT", "other", [], [])
    if action == "wait_group":
        return assembler.emit("WGWAIT", "other", [], [], offset=int(assembler.now.arguments[0]))
    shape = _WGMMA.fullmatch(".".join(assembler.now.opcode[1:]))
    if shape is None:
        raise Unsupported("a product of another shape")
    to, a, b, accumulates, *flags = assembler.now.arguments
    in_registers = a.startswith("{")
    results = [assembler.register(name) for name in _names(to)]
    sources = [*(assembler.value(name, 32 if in_registers else 64) for name in _names(a))]
    sources += [assembler.value(b, 64), assembler.predicate(accumulates)]
    # neither is negated; an operand in registers can't be turned
    turned = ["0", *flags[2:]] if in_registers else flags[2:]
    if flags[:2] != ["1", "1"] or len(turned) != 2:
        raise Unsupported("a product of negated operands")
    c = in_registers | int(turned[0]) << 1 | int(turned[1]) << 2
    return assembler.emit(
        "WGMMA", "product", results, sources, a=assembler.type_of(shape[2]), b=int(shape[1]), c=c
    )


def _copy(assembler: Assembler) -> None:
    opcode, arguments = assembler.now.opcode, assembler.now.arguments
    if opcode[2] == "bulk":
        return _bulk_copy(assembler)
    if opcode[2] == "commit_group":
        return assembler.emit("CPCOMMIT", "other", [], [])
    if opcode[2] == "wait_group":
        return assembler.emit("CPWAIT", "other", [], [], offset=int(arguments[0], 0))
    if opcode[1:] not in (("async", "ca", "shared", "global"), ("async", "cg", "shared", "global")):
        raise Unsupported("a copy of another kind")
    to, source, size, *wanted = arguments
    unit, offset = _address(assembler, to, 32)
    source_unit, source_offset = _address(assembler, source, 64)
    sources = [unit, source_unit, *assembler.values(wanted, 32)]
    return assembler.emit(
        "CPASYNC", "copy", [], sources, a=int(size, 0), offset=offset, source_offset=source_offset
    )


def _bulk_copy(assembler: Assembler) -> None:
    # a CTA is a cluster of its own where nobody asks for a larger one
    joined = ".".join(assembler.now.opcode).replace(".shared::cluster.", ".shared::cta.")
    arguments = assembler.now.arguments
    if joined == "cp.async.bulk.commit_group":
        return assembler.emit("TMACOMMIT", "other", [], [])
    # once read, what a store sends may be overwritten; it arrives with the same wait here
    if joined in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
        return assembler.emit("TMAWAIT", "other", [], [], offset=int(arguments[0]))
    if joined not in (_TMA_LOAD, _TMA_STORE):
        raise Unsupported("a copy of another kind")
    is_load = joined == _TMA_LOAD
    shared, tensor = arguments[:2] if is_load else (arguments[1], arguments[0])
    name, place = split(tensor[1:-1])
    unit, offset = _address(assembler, shared, 32)
    sources = [unit, assembler.value(name, 64), *assembler.values(_names(place), 32)]
    if is_load:
        mbarrier, distance = _address(assembler, arguments[2], 32)
        sources.append(mbarrier)
        offset |= distance
    if offset:
        raise Unsupported("an address with an offset")
    return assembler.emit("TMALOAD" if is_load else "TMASTORE", "copy", [], sources)


def _mbarrier(assembler: Assembler) -> None:
    arguments, (_, *action, space, kind) = assembler.now.arguments, assembler.now.opcode
    if space.removesuffix("::cta") != "shared" or kind != "b64":
        raise Unsupported("an mbarrier elsewhere")
    operation = {
        "init": "MBINIT", "inval": "MBINVAL", "arrive.expect_tx": "MBEXPECT", "try_wait.parity": "MBWAIT",
    }[".".join(action)]  # fmt: skip
    results = [assembler.register(arguments[0])] if operation == "MBWAIT" else []
    # the state that arriving gives is thrown away
    address, *values = arguments if operation in ("MBINIT", "MBINVAL") else arguments[1:]
    if operation == "MBEXPECT" and arguments[0] != "_":
        raise Unsupported("an arrival whose state is kept")
    unit, offset = _address(assembler, address, 32)
    kind = "barrier" if operation == "MBWAIT" else "other"
    assembler.emit(operation, kind, results, [unit, *assembler.values(values, 32)], offset=offset)


def _barrier(assembler: Assembler) -> None:
    if assembler.now.opcode[1:] == ("warp", "sync"):
        # lanes run together here
        return assembler.emit("NOTHING", "other", [], [])
    if assembler.now.opcode != ("bar", "sync"):
        raise Unsupported("a barrier of another kind")
    return assembler.emit("BARRIER", "barrier", [], assembler.values(assembler.now.arguments, 32))


def _shuffle(assembler: Assembler) -> None:
    result, *sources = assembler.now.arguments
    kind = {"idx": 0, "bfly": 1}[assembler.now.opcode[2]]
    assembler.emit("SHUFFLE", "shuffle", [assembler.register(result)], assembler.values(sources, 32), a=kind)


def _elect(assembler: Assembler) -> None:
    results = [assembler.register(name.strip()) for name in assembler.now.arguments[0].split("|")]
    assembler.emit("ELECT", "predicate", results, [])


def _fence(assembler: Assembler) -> None:
    if assembler.now.opcode != ("fence", "proxy", "async", "shared::cta"):
        raise Unsupported("a fence of another kind")
    assembler.emit("FENCE", "other", [], [])


def _address_of_map(assembler: Assembler) -> None:
    result, source = assembler.now.arguments
    if assembler.now.opcode != ("cvta", "param", "u64"):
        raise Unsupported("an address of another space")
    sources = [assembler.value(source, 64)]
    assembler.emit("MOV", "move", [assembler.register(result)], sources, a=assembler.type_of("u64"))


def _branch(assembler: Assembler) -> None:
    # decode.py says where to
    assembler.emit("BRANCH", "branch", [], [])


def _return(assembler: Assembler) -> None:
    assembler.emit("RETURN", "branch", [], [])


MEMORY: Mapping[str, Callable[[Assembler], None]] = {
    "ld": _load, "st": _store, "ldmatrix": _matrices, "stmatrix": _matrices, "mma": _mma, "wgmma": _wgmma,
    "cp": _copy, "mbarrier": _mbarrier, "bar": _barrier, "shfl": _shuffle, "elect": _elect, "fence": _fence,
    "cvta": _address_of_map, "bra": _branch, "ret": _return,
}  # fmt: skip
