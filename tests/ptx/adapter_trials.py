"""A launch of every kernel of the bottleneck adapter, and its comparison with float64."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora_kernels.adapter.backward import adapter_grad_h_weights, adapter_grad_z
from fastlora_kernels.adapter.forward import adapter_down, adapter_forward, adapter_up
from fastlora_kernels.primitives import DROPPED
from tests.kernel_harness import assert_exact
from tests.philox import SEED, THRESHOLD, bottleneck_uniforms
from tests.ptx.trial import Trial

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def _keep(t: Trial, z: Tensor) -> Tensor:
    """What z's marks keep, which is what NumPy draws."""
    keep = z != torch.tensor(DROPPED).to(z)
    drawn = torch.from_numpy(bottleneck_uniforms(SEED, *z.shape) >= THRESHOLD)
    assert torch.equal(keep, drawn if t.spec.dropout else torch.ones_like(drawn)), "another mask than NumPy's"
    return keep


def _residual(t: Trial) -> Tensor | None:
    return t.layer("M", "H") if t.has("HAS_RESIDUAL") else None


def _forward(t: Trial) -> None:
    h, wd, bd = t.layer("M", "H"), t.trainable("D", "H"), t.trainable_bias("D", "HAS_DOWN_BIAS")
    wu, bu, residual = t.trainable("H", "D"), t.trainable_bias("H", "HAS_UP_BIAS"), _residual(t)
    z, out = t.out("M", "D"), t.out("M", "H")
    act = _ACTIVATIONS[t.spec.activation]
    adapter_forward(
        h, wd, bd, wu, bu, residual, t.seed(), z, out, activation=t.spec.activation,
        drop_threshold=THRESHOLD, scale=1.5, plan=t.plan,
    )  # fmt: skip
    keep = _keep(t, z)
    low = (h, t.low(wd), t.or_zeros(bd, "D"))
    if not t.spec.dropout:
        assert_exact(z, lambda h, wd, bd: h @ wd.t() + bd, *low)
    assert_exact(
        out,
        lambda h, wd, bd, wu, bu, q: q + (1.5 * act(h @ wd.t() + bd) * keep) @ wu.t() + bu,
        *low, t.low(wu), t.or_zeros(bu, "H"), t.or_zeros(residual, "M", "H"),
    )  # fmt: skip


def _down(t: Trial) -> None:
    h, wd, bd = t.layer("M", "H"), t.trainable("D", "H"), t.trainable_bias("D", "HAS_DOWN_BIAS")
    z, active = t.out("M", "D"), t.out("M", "D")
    act = _ACTIVATIONS[t.spec.activation]
    adapter_down(
        h, wd, bd, t.seed(), z, active, activation=t.spec.activation, drop_threshold=THRESHOLD, scale=1.5,
        plan=t.plan,
    )  # fmt: skip
    keep = _keep(t, z)
    low = (h, t.low(wd), t.or_zeros(bd, "D"))
    assert_exact(active, lambda h, wd, bd: 1.5 * act(h @ wd.t() + bd) * keep, *low)


def _up(t: Trial) -> None:
    active, wu = t.layer("M", "D", padded=False), t.trainable("H", "D")
    bu, residual, out = t.trainable_bias("H", "HAS_UP_BIAS"), _residual(t), t.out("M", "H")
    adapter_up(active, wu, bu, residual, out, plan=t.plan)
    added = (t.or_zeros(bu, "H"), t.or_zeros(residual, "M", "H"))
    assert_exact(out, lambda a, wu, bu, q: q + a @ wu.t() + bu, active, t.low(wu), *added)


def _grad_z(t: Trial) -> None:
    dout, z, wu = t.layer("M", "H"), t.layer("M", "D", padded=False), t.trainable("H", "D")
    dz, active = t.out("M", "D"), t.out("M", "D")
    z[::3, ::2] = DROPPED
    act = _ACTIVATIONS[t.spec.activation]
    adapter_grad_z(dout, z, wu, dz, active, activation=t.spec.activation, scale=1.5, plan=t.plan)

    def exact(dout: Tensor, z: Tensor, wu: Tensor) -> Tensor:
        variable = z.clone().requires_grad_()
        return torch.autograd.grad(1.5 * act(variable), variable, dout @ wu)[0]

    assert_exact(dz, exact, dout, z, t.low(wu))
    assert_exact(active, lambda z: 1.5 * act(z), z)
    assert not dz[::3, ::2].any()
    assert not active[::3, ::2].any()


def _grad_h_weights(t: Trial) -> None:
    dout, h = t.layer("M", "H"), t.layer("M", "H")
    dz, active = t.layer("M", "D", padded=False), t.layer("M", "D", padded=False)
    hidden, d = t.size["H"], t.size["D"]
    partial, add_input = t.partial(t.plan.splits, 2 * hidden * d + hidden + d), t.has("ADD_INPUT")
    wd = dh = None
    if t.has("HAS_DH"):
        wd, dh = t.trainable("D", "H"), t.out("M", "H")
    adapter_grad_h_weights(dout, h, dz, active, wd, dh, partial, add_input=add_input, plan=t.plan)
    if wd is not None and dh is not None:
        assert_exact(dh, lambda dz, w, o: dz @ w + add_input * o, dz, t.low(wd), dout)
    up, down, up_bias, down_bias = partial.sum(0).split([hidden * d, hidden * d, hidden, d])
    assert_exact(up.view(hidden, d), lambda o, a: o.t() @ a, dout, active)
    assert_exact(down.view(d, hidden), lambda dz, h: dz.t() @ h, dz, h)
    assert_exact(up_bias, lambda o: o.sum(0), dout)
    assert_exact(down_bias, lambda dz: dz.sum(0), dz)


ADAPTER_TRIALS = {
    "adapter_forward": _forward, "adapter_down": _down, "adapter_up": _up, "adapter_grad_z": _grad_z,
    "adapter_grad_h_weights": _grad_h_weights,
}  # fmt: skip
