"""Moves, integers, predicates, floating point and conversions as instructions of the executor."""

from collections.abc import Callable, Mapping

from tests.ptx.program import Assembler
from tests.ptx.source import Unsupported, split

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# added where a comparison holds for NaN, too
_UNORDERED = 8
# and where it is of the upper halves
_UPPER = 16
_HALVES = ("f16", "bf16")
_PAIRS = ("f16x2", "bf16x2")
_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
_FLOAT = {
    "add": "FADD", "sub": "FSUB", "mul": "FMUL", "fma": "FMA", "neg": "FNEG", "abs": "FABS", "ex2": "EX2",
    "sqrt": "SQRT", "div": "FDIV",
}  # fmt: skip
# to the nearest, or approximate
_ROUNDINGS = {"rn", "approx", "full", "ftz"}


def _plain(assembler: Assembler) -> None:
    """The result, then operands of one type: integers of a width, float32 or predicates."""
    name, kind = assembler.now.opcode[0], assembler.now.opcode[-1]
    result, *sources = assembler.now.arguments
    results = [assembler.register(result)]
    if kind == "pred":
        units = [assembler.predicate(text) for text in sources]
        number = assembler.engine.operations[name.upper()]
        return assembler.emit("PREDICATE", "predicate", results, units, a=number)
    units = assembler.values(sources, assembler.bits)
    if kind == "f32":
        flags = {*assembler.now.opcode[1:-1]}
        if flags - _ROUNDINGS:
            raise Unsupported(f"{', '.join(flags - _ROUNDINGS)} of {name}")
        return assembler.emit(_FLOAT[name], "float", results, units, a=int("ftz" in flags))
    return assembler.emit(name.upper(), "integer", results, units, a=assembler.type)


def _mov(assembler: Assembler) -> None:
    to, source = assembler.now.arguments
    if assembler.now.opcode[1] == "pred":
        return _plain(assembler)
    bits = assembler.bits
    if to.startswith("{"):
        names = split(to[1:-1])
        results, sources = [assembler.register(name) for name in names], [assembler.value(source, bits)]
        return assembler.emit("UNPACK", "move", results, sources, a=bits, b=bits // len(names))
    results = [assembler.register(to)]
    if source.startswith("{"):
        names = split(source[1:-1])
        each = bits // len(names)
        return assembler.emit("PACK", "move", results, assembler.values(names, each), a=bits, b=each)
    return assembler.emit(
        "MOV", "move", results, [assembler.value(source, bits)], a=assembler.type_of(f"u{bits}")
    )


def _multiply(assembler: Assembler) -> None:
    """``mul`` and ``mad`` of integers: the lower or upper half of the product, or all of it."""
    name, which = assembler.now.opcode[:2]
    if assembler.now.opcode[-1] == "f32":
        return _plain(assembler)
    operation = {"lo": "", "hi": "HI", "wide": "WIDE"}[which]
    bits = assembler.bits
    result, x, y, *added = assembler.now.arguments
    sources = assembler.values([x, y], bits) + assembler.values(added, 2 * bits if which == "wide" else bits)
    return assembler.emit(
        name.upper() + operation, "integer", [assembler.register(result)], sources, a=assembler.type
    )


def _with_words(assembler: Assembler) -> None:
    """Shifts, ``bfe`` and ``prmt``: operands behind the first have 32 bits, however wide that is."""
    name = assembler.now.opcode[0]
    result, first, *others = assembler.now.arguments
    sources = [assembler.value(first, assembler.bits), *assembler.values(others, 32)]
    assembler.emit(name.upper(), "integer", [assembler.register(result)], sources, a=assembler.type)


def _selp(assembler: Assembler) -> None:
    result, x, y, predicate = assembler.now.arguments
    bits = assembler.bits
    sources = [*assembler.values([x, y], bits), assembler.predicate(predicate)]
    assembler.emit("SELP", "integer", [assembler.register(result)], sources, a=assembler.type_of(f"u{bits}"))


def _setp(assembler: Assembler) -> None:
    _, name, *flags, kind = assembler.now.opcode
    result, *operands = assembler.now.arguments
    if flags not in ([], ["ftz"]):
        raise Unsupported(f"a comparison with {', '.join(flags)}")
    if (kind in _PAIRS) != ("|" in result):
        raise Unsupported("a comparison with another number of results")
    is_float = kind in ("f32", *_HALVES, *_PAIRS)
    unordered = is_float and name.endswith("u")
    comparison = _COMPARISONS.index(name.removesuffix("u") if unordered else name)
    sources = assembler.values(operands, 32 if kind in _PAIRS else assembler.bits)
    # two halves of a register are compared at once, one after the other here
    for predicate, upper in zip(result.split("|"), (0, _UPPER), strict=False):
        assembler.emit(
            "SETP", "predicate", [assembler.register(predicate)], sources,
            a=assembler.type_of(kind.removesuffix("x2")),
            b=comparison + (_UNORDERED if unordered else 0) + upper, c=int("ftz" in flags),
        )  # fmt: skip


def _cvt(assembler: Assembler) -> None:
    _, *rounding, to, source = assembler.now.opcode
    result, *operands = assembler.now.arguments
    results, sources = [assembler.register(result)], assembler.values(operands, assembler.bits)
    types = (to, source)
    if to in _PAIRS and (source, rounding) == ("f32", ["rn"]):
        half = assembler.type_of(to.removesuffix("x2"))
        return assembler.emit("CVTPACK", "convert", results, sources, a=half)
    exact = (to == "f32" and source in _HALVES) or {*types} <= {*_INTEGERS} or types == ("s32", "s8")
    rounded = (to in _HALVES and source == "f32") or (to == "f32" and source in ("u32", "s32"))
    if not (exact and not rounding) and not (rounded and rounding == ["rn"]):
        raise Unsupported(f"a conversion from {source} to {to}, rounding: {rounding}")
    return assembler.emit(
        "CVT", "convert", results, sources, a=assembler.type_of(source), b=assembler.type_of(to)
    )


ARITHMETIC: Mapping[str, Callable[[Assembler], None]] = {
    **dict.fromkeys(("add", "sub", "min", "max", "div", "rem", "neg", "and", "or", "xor", "not"), _plain),
    **dict.fromkeys(("fma", "abs", "ex2", "sqrt"), _plain),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("shl", "shr", "bfe", "prmt"), _with_words),
    "mov": _mov, "selp": _selp, "setp": _setp, "cvt": _cvt,
}  # fmt: skip
