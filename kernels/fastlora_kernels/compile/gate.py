"""What the committed table holds and the tests compile: all that differs in kind, not all that there is.

fp16 differs from bf16 in an instruction's type alone.
"""

from fastlora_kernels.compile.codegen import DEFAULT_TARGETS
from fastlora_kernels.compile.specs import Spec, specs, variants

# assembled otherwise than sm_100 and sm_120, whose tiles they take
_RELATIVES = ("sm_103", "sm_121")
GATE_TARGETS = (*DEFAULT_TARGETS, "sm_86", "sm_120", *_RELATIVES)


def gate_specs() -> list[Spec]:
    """Every kernel and tile for the usual targets, and what else a call can launch."""
    wanted = [spec for name in DEFAULT_TARGETS for spec in specs(name, ("bf16", "fp32"))]
    # the same code as for sm_80, in less shared memory
    wanted += specs("sm_86", ("bf16",))
    # all on Hopper, where one instruction out of place serialises the products; elsewhere one of each kernel
    wanted += [variant for spec in _usual("sm_90") for variant in variants(spec)]
    others = [name for name in DEFAULT_TARGETS if name != "sm_90"]
    wanted += [variant for name in others for spec in _largest(name) for variant in variants(spec)[:1]]
    wanted += filter(_takes_most, _usual("sm_120"))
    return wanted + [spec for name in _RELATIVES for spec in _largest(name)]


def _usual(target: str) -> list[Spec]:
    """Every tile for aligned rows in 16 bits."""
    return [spec for spec in specs(target, ("bf16",)) if spec.aligned and spec.activation in ("", "gelu")]


def _takes_most(spec: Spec) -> bool:
    return spec.dropout == spec.can_drop


def _largest(target: str) -> list[Spec]:
    """The largest tile of each kernel."""
    found: dict[str, Spec] = {}
    for spec in sorted(filter(_takes_most, _usual(target)), key=lambda each: each.tile.rows * each.tile.cols):
        found[spec.kernel] = spec
    return list(found.values())
