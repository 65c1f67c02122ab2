"""A launch of every LoRA kernel, DoRA's among them, and its comparison with float64."""

from typing import Any

import torch
from torch import Tensor

from fastlora_kernels.lora.backward import lora_grad_a, lora_grad_s_b, lora_grad_x
from fastlora_kernels.lora.dora import dora_grad_product, dora_weight_norm
from fastlora_kernels.lora.down import lora_down
from fastlora_kernels.lora.epilogue import lora_add
from fastlora_kernels.lora.forward import lora_forward
from fastlora_kernels.lora.grad_x_a import lora_grad_x_a
from fastlora_kernels.lora.persistent import lora_forward_persistent, lora_grad_x_a_persistent
from fastlora_kernels.lora.single import lora_forward_single
from fastlora_kernels.shared.down import shared_down
from fastlora_kernels.shared.grad_x import shared_grad_x
from fastlora_kernels.tile import cdiv
from tests.kernel_harness import assert_exact, shared_dx
from tests.lora_yardstick import unpack_mask
from tests.philox import THRESHOLD
from tests.ptx.trial import Trial

# fewer than there are tiles, so that some programs take several
_PROGRAMS = 3


def _down(t: Trial) -> None:
    x, a = t.layer("M", "K"), t.trainable("R", "K")
    partial = t.partial(t.plan.splits, "M", "R")
    mask, keep = t.drawn_mask("M", "K")
    lora_down(x, a, t.seed(), mask, partial, drop_threshold=THRESHOLD, scale=1.5, plan=t.plan)
    if mask is not None:
        assert torch.equal(unpack_mask(mask, keep.shape[1]), keep), "another mask than NumPy's"
    assert_exact(partial.sum(0), lambda x, a: 1.5 * (x * keep) @ a.t(), x, t.low(a))


def _forward(t: Trial) -> None:
    x, w, bias = t.layer("M", "K"), t.layer("N", "K"), t.bias("N")
    s, b, y = t.layer("M", "R", padded=False), t.trainable("N", "R"), t.out("M", "N")
    if t.spec.tile.persistent:
        lora_forward_persistent(x, w, bias, s, b, y, plan=t.plan, multiprocessors=_PROGRAMS)
    else:
        lora_forward(x, w, bias, s, b, y, plan=t.plan)
    o = t.or_zeros(bias, "N")
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + o, x, w, s, t.low(b), o)


def _dora_forward(t: Trial) -> None:
    x, w, bias, g = t.layer("M", "K"), t.layer("N", "K"), t.bias("N"), t.factor("N")
    s, b = t.layer("M", "R", padded=False), t.trainable("N", "R")
    y, product = t.out("M", "N"), t.out("M", "N") if t.has("KEEP_PRODUCT") else None
    lora_forward(x, w, bias, s, b, y, plan=t.plan, factor=g, product=product)
    operands = (x, w, s, t.low(b))
    if product is not None:
        assert_exact(product, lambda x, w, s, b: x @ w.t() + s @ b.t(), *operands)
    o = t.or_zeros(bias, "N")
    assert_exact(y, lambda x, w, s, b, g, o: g * (x @ w.t() + s @ b.t()) + o, *operands, g, o)


def _forward_single(t: Trial) -> None:
    x, w, bias = t.layer("M", "K"), t.layer("N", "K"), t.bias("N")
    a, b, s, y = t.trainable("R", "K"), t.trainable("N", "R"), t.out("M", "R"), t.out("M", "N")
    lora_forward_single(x, w, bias, a, b, s, y, scale=0.5, plan=t.plan)
    assert_exact(s, lambda x, a: 0.5 * (x @ a.t()), x, t.low(a))
    o = t.or_zeros(bias, "N")
    assert_exact(y, lambda x, w, s, b, o: x @ w.t() + s @ b.t() + o, x, w, s, t.low(b), o)


def _add(t: Trial) -> None:
    """y += S·Bᵀ, which has no mask, or dX += mask ⊙ (dS·A)."""
    before, left, out = t.layer("M", "C", padded=False), t.layer("M", "R", padded=False), t.out("M", "C")
    transposed = not t.spec.dropout
    right = t.trainable("C", "R") if transposed else t.trainable("R", "C")
    mask, keep = t.packed_mask("M", "C")
    out.copy_(before)
    lora_add(left, right, mask, out, transposed=transposed, plan=t.plan)
    low = t.low(right.t() if transposed else right)
    assert_exact(out, lambda o, a, b: o + (a @ b) * keep, before, left, low)
    assert torch.equal(out[~keep], before[~keep])


def _grad_s_b(t: Trial) -> None:
    dy, s, b = t.layer("M", "N"), t.layer("M", "R", padded=False), t.trainable("N", "R")
    ds = t.partial(cdiv(t.size["N"], t.spec.tile.cols), "M", "R")
    db = t.partial(t.plan.splits, "N", "R")
    lora_grad_s_b(dy, s, b, ds, db, scale=0.5, plan=t.plan)
    assert_exact(ds.sum(0), lambda dy, b: 0.5 * dy @ b, dy, t.low(b))
    assert_exact(db.sum(0), lambda dy, s: dy.t() @ s, dy, s)


def _grad_x(t: Trial) -> None:
    dy, w = t.layer("M", "N"), t.layer("N", "K")
    ds, a, dx = t.layer("M", "R", padded=False), t.trainable("R", "K"), t.out("M", "K")
    mask, keep = t.packed_mask("M", "K")
    lora_grad_x(dy, w, ds, a, mask, dx, plan=t.plan)
    assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * keep, dy, w, ds, t.low(a))


def _grad_a(t: Trial) -> None:
    x, ds, da = t.layer("M", "K"), t.layer("M", "R", padded=False), t.partial(t.plan.splits, "R", "K")
    mask, keep = t.packed_mask("M", "K")
    lora_grad_a(x, ds, mask, da, plan=t.plan)
    assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * keep), x, ds)


def _grad_x_a(t: Trial) -> None:
    dy, w, x = t.layer("M", "N"), t.layer("N", "K"), t.layer("M", "K")
    ds, a, dx = t.layer("M", "R", padded=False), t.trainable("R", "K"), t.out("M", "K")
    da = t.partial(t.plan.splits, "R", "K")
    mask, keep = t.packed_mask("M", "K")
    if t.spec.tile.persistent:
        lora_grad_x_a_persistent(dy, w, ds, a, mask, x, dx, da, plan=t.plan, multiprocessors=_PROGRAMS)
    else:
        lora_grad_x_a(dy, w, ds, a, mask, x, dx, da, plan=t.plan)
    assert_exact(dx, lambda dy, w, ds, a: dy @ w + (ds @ a) * keep, dy, w, ds, t.low(a))
    assert_exact(da.sum(0), lambda x, ds: ds.t() @ (x * keep), x, ds)


def _shared_down(t: Trial) -> None:
    """Two layers or three, each with a mask of its own and, where rows are not aligned, of its own rank."""
    x, r, count = t.layer("M", "K"), t.size["R"], 3 if t.has("HAS_THIRD") else 2
    tensors, keeps = list[Tensor | None](), list[Tensor]()
    for i in range(count):
        t.size["R"] = r if t.spec.aligned else r - i
        mask, keep = t.drawn_mask("M", "K", i)
        tensors += t.trainable("R", "K"), t.seed(i), mask
        keeps.append(keep)
    lora_as, masks = [a for a in tensors[::3] if a is not None], tensors[2::3]
    sizes = [t.size["M"] * a.shape[0] for a in lora_as]
    partial = t.partial(t.plan.splits, sum(sizes))
    settings: dict[str, Any] = {"drop_thresholds": [THRESHOLD] * count, "scales": [0.5, 1.5, 2.5][:count]}
    shared_down(x, partial, *tensors, *[None] * (9 - len(tensors)), **settings, plan=t.plan)
    for a, mask, keep, scale, s in zip(
        lora_as, masks, keeps, settings["scales"], partial.sum(0).split(sizes), strict=True
    ):
        if mask is not None:
            assert torch.equal(unpack_mask(mask, keep.shape[1]), keep), "another mask than NumPy's"
        # bound now, and called now
        assert_exact(
            s.view(t.size["M"], -1),
            lambda x, a, keep=keep, scale=scale: scale * (x * keep) @ a.t(),
            x,
            t.low(a),
        )


def _shared_grad_x(t: Trial) -> None:
    """Two layers or three, each of a length of its own and, where rows are not aligned, of its own rank."""
    n, r, step = t.size["N"], t.size["R"], 16 if t.spec.aligned else 5
    tensors, keeps, dx = list[Tensor | None](), list[Tensor](), t.out("M", "K")
    for i in range(3 if t.has("HAS_THIRD") else 2):
        t.size["N"], t.size["R"] = n - i * step, r if t.spec.aligned else r - i
        mask, keep = t.packed_mask("M", "K")
        tensors += t.layer("M", "N"), t.layer("N", "K"), t.layer("M", "R", padded=False)
        tensors += t.trainable("R", "K"), mask
        keeps.append(keep)
    shared_grad_x(dx, *tensors, *[None] * (15 - len(tensors)), plan=t.plan)
    operands = [t.low(each) for i, each in enumerate(tensors) if each is not None and i % 5 < 4]
    assert_exact(dx, shared_dx(keeps), *operands)


def _dora_weight_norm(t: Trial) -> None:
    w, a, b = t.layer("N", "K"), t.trainable("R", "K"), t.trainable("N", "R")
    norm = t.out("N", dtype=torch.float32)
    dora_weight_norm(w, a, b, norm, scale=0.5, plan=t.plan)
    assert_exact(norm, lambda w, a, b: (w + 0.5 * b @ a).norm(dim=1), w, a, b)


def _dora_grad_product(t: Trial) -> None:
    dy, g, dproduct = t.layer("M", "N"), t.factor("N"), t.out("M", "N")
    product = dfactor = None
    if t.has("HAS_PRODUCT"):
        product, dfactor = t.layer("M", "N", padded=False), t.partial(t.plan.splits, "N")
    dora_grad_product(dy, product, g, dproduct, dfactor, plan=t.plan)
    assert_exact(dproduct, lambda dy, g: dy * g, dy, g)
    if product is not None and dfactor is not None:
        assert_exact(dfactor.sum(0), lambda dy, u: (dy * u).sum(0), dy, product)


LORA_TRIALS = {
    "lora_down": _down, "lora_forward": _forward, "lora_forward persistent": _forward,
    "lora_forward_single": _forward_single, "lora_add": _add, "lora_grad_s_b": _grad_s_b,
    "lora_grad_x": _grad_x, "lora_grad_a": _grad_a, "lora_grad_x_a": _grad_x_a,
    "lora_grad_x_a persistent": _grad_x_a, "dora_forward": _dora_forward,
    "dora_weight_norm": _dora_weight_norm, "dora_grad_product": _dora_grad_product,
    "shared_down": _shared_down, "shared_grad_x": _shared_grad_x,
}  # fmt: skip
