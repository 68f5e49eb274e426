"""Every kernel as a problem: inputs in poisoned memory, a way to run it, and the float64 truth it is checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np

from .arrays import PACKED, Layout, Output, check_close, narrow, operand, wide
from .problem import Maker, Problem, finish
from .shapes import Shape


def shrink(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "shrink")
    x, A = t.large(shape.m, shape.k), t.factor(shape.k, shape.r)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        u = Output((shape.m, shape.r), t.dtype, shape.layout)
        lib.shrink(x, A, u.view, **t.prepare(lib))
        return finish(u=u)

    return Problem(run, lambda out: t.close(out["u"], t.op(x) * t.mask(shape.m, shape.k), t.op(A), "u"))


def shrink_core(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "shrink_core")
    x, A, core = t.large(shape.m, shape.k), t.factor(shape.k, shape.r), t.factor(shape.r, shape.other)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        u = Output((shape.m, shape.r), t.dtype, shape.layout)
        h = Output((shape.m, shape.other), t.dtype, shape.layout)
        lib.shrink(x, A, u.view, scale=0.5, core=core, h=h.view, core_scale=3.0, **{**t.prepare(lib), "p": 0.0})
        return finish(u=u, h=h)

    def check(out: dict[str, np.ndarray]) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u", scale=0.5)
        # u in memory is u as the second product reads it; that product is in float32 whatever the first is, at any rank
        u, c = (t.op(out["u"]), t.op(core)) if kind != "tf32" else (wide(out["u"]), wide(core))
        t.close(out["h"], u, c, "h", scale=3.0)

    return Problem(run, check)


def expand_add(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "expand_add")
    u, F = t.large(shape.m, shape.r), t.factor(shape.k, shape.r)
    y0 = narrow(t.values(shape.m, shape.k), kind)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        y = Output((shape.m, shape.k), t.dtype, shape.layout, y0)
        lib.expand_add_(y.view, u, F, **t.prepare(lib))
        return finish(y=y)

    return Problem(run, lambda out: t.close(out["y"], t.op(u), t.op(F).T, "y", wide(y0), t.mask(shape.m, shape.k)))


def expand_scaled(shape: Shape, kind: str) -> Problem:
    """y = bias + c (y + u F^T), or without a bias."""
    t = Maker(shape, kind, "expand_scaled")
    u, F = t.large(shape.m, shape.r), t.factor(shape.k, shape.r)
    y0, (c, bias) = narrow(t.values(shape.m, shape.k), kind), t.scale_and_bias(shape.k)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        y = Output((shape.m, shape.k), t.dtype, shape.layout, y0)
        lib.expand_add_(y.view, u, F, scale=c, bias=bias)
        return finish(y=y)

    def check(out: dict[str, np.ndarray]) -> None:
        left, right, b = t.op(u), t.op(F).T, 0.0 if bias is None else wide(bias)
        truth, eager = (b + wide(c) * (wide(y0) + np.matmul(*(a.astype(as_) for a in (left, right)))) for as_ in ("f8", "f4"))
        size = np.abs(b) + np.abs(wide(c)) * (np.abs(wide(y0)) + np.abs(left) @ np.abs(right))
        check_close(out["y"], truth, narrow(eager, kind), size, kind, f"expand_scaled {kind} {shape}: y")

    return Problem(run, check)


def scale_backward(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "scale_backward")
    g, y, (c, bias) = t.large(shape.m, shape.k), t.large(shape.m, shape.k), t.scale_and_bias(shape.k)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        g0, dc = Output(g.shape, t.dtype, shape.layout), Output((1, shape.k), np.float32, PACKED)
        lib.scale_backward(g, y, bias, c, g0.view, dc.view[0])
        return finish(g0=g0, dc=dc)

    def check(out: dict[str, np.ndarray]) -> None:
        b = np.zeros(shape.k) if bias is None else wide(bias)
        product = wide(g).astype(np.float32) * c
        assert np.array_equal(wide(out["g0"]), wide(narrow(product, kind))), f"{kind} {shape}: g0 is not c g, rounded"
        by = np.divide(1.0, wide(c), out=np.zeros(shape.k), where=c != 0)
        truth, size = ((a(g) * (a(y) + sign * a(b))).sum(0) * a(by) for a, sign in ((wide, -1), (lambda v: np.abs(wide(v)), 1)))
        check_close(out["dc"][0], truth, truth, size, "fp32", f"scale_backward {kind} {shape}: dc")

    return Problem(run, check)


def factor_grad(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "factor_grad")
    x, k = t.large(shape.m, shape.k), t.large(shape.m, shape.r)
    D0 = t.values(shape.k, shape.r).astype(np.float32)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        D = Output((shape.k, shape.r), np.float32, shape.layout, D0)
        lib.factor_grad_(D.view, x, k, **t.prepare(lib))
        return finish(D=D)

    left = (t.op(x) * t.mask(shape.m, shape.k)).T
    return Problem(run, lambda out: t.close(out["D"], left, t.op(k), "D", wide(D0), kind="fp32"))


def shrink_grad(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "shrink_grad")
    g, F, u = t.large(shape.m, shape.k), t.factor(shape.k, shape.r), t.large(shape.m, shape.r)
    Q0 = t.values(shape.k, shape.r).astype(np.float32) if shape.p else None  # some of the shapes accumulate

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        k = Output((shape.m, shape.r), t.dtype, shape.layout)
        Q = Output((shape.k, shape.r), np.float32, shape.layout if shape.p else PACKED, Q0)
        t.prepare(lib)
        lib.shrink_grad(g, F, u, k.view, Q.view, accumulate=bool(shape.p))
        return finish(k=k, Q=Q)

    def check(out: dict[str, np.ndarray]) -> None:
        t.close(out["k"], t.op(g), t.op(F), "k")
        t.close(out["Q"], t.op(g).T, t.op(u), "Q", 0.0 if Q0 is None else wide(Q0), kind="fp32")

    return Problem(run, check)


def shrink_grad_wgmma(shape: Shape, kind: str) -> Problem:
    """The same on a GPU that has wgmma, at a rank of its kernel; of an even number of multiprocessors 18 times as many, for
    clusters. float32 runs as ever."""
    sms = shape.sms if shape.sms % 2 else 18 * shape.sms
    return shrink_grad(replace(shape, r=1 + 3 * shape.r % 64, sms=sms, wgmma=True), kind)


def filled(made: int) -> int:
    """Multiprocessors for the blocks of shrink and factor_grad by wgmma, which make 64 rows each in clusters of up to 4: then
    it is the cheaper one."""
    return 4 * max(1, -(-made // 256))


def shrink_wgmma(shape: Shape, kind: str) -> Problem:
    """shrink on a GPU that has wgmma, at a rank of its kernel and with tokens enough. float32 runs as ever."""
    return shrink(replace(shape, r=1 + 3 * shape.r % 128, sms=filled(shape.m), wgmma=True, p=0.0), kind)


def factor_grad_wgmma(shape: Shape, kind: str) -> Problem:
    """factor_grad on such a GPU, at a rank of that kernel and with columns enough. float32 runs as ever."""
    return factor_grad(replace(shape, r=1 + 3 * shape.r % 128, sms=filled(shape.k), wgmma=True, p=0.0), kind)


def _cores(t: Maker) -> np.ndarray:
    return np.stack([t.factor(t.shape.r, t.shape.other) for _ in range(t.shape.layers)])


def fold(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "fold")
    B, cores = t.factor(shape.k, shape.other), _cores(t)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        out = Output((shape.layers * shape.k, shape.r), t.dtype, PACKED)
        lib.fold(B, cores, 0.25, out.view.reshape(shape.layers, shape.k, shape.r))
        return finish(F=out)

    def check(out: dict[str, np.ndarray]) -> None:
        F = out["F"].reshape(shape.layers, shape.k, shape.r)
        for layer in range(shape.layers):
            t.close(F[layer], wide(B), wide(cores[layer]).T, f"F[{layer}]", scale=0.25)

    return Problem(run, check)


def fold_transposed(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "fold_transposed")
    rows_of_A = shape.m
    B, core, A = t.factor(shape.k, shape.other), t.factor(shape.r, shape.other), t.factor(rows_of_A, shape.r)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        sizes = {"F": (shape.k, shape.r), "Ft": (shape.r, shape.k), "At": (shape.r, rows_of_A)}
        out = {name: Output(size, t.dtype, Layout(8, -size[1] % 8 + 8)) for name, size in sizes.items()}
        lib.fold_transposed(B, core, A, 0.25, *(o.view for o in out.values()))
        alone = Output(sizes["F"], t.dtype, PACKED)
        lib.fold(B, core[None], 0.25, alone.view[None])
        assert np.array_equal(alone.view, out["F"].view), "F has other bits than fold's"
        return finish(**out)

    def check(out: dict[str, np.ndarray]) -> None:
        t.close(out["F"], wide(B), wide(core).T, "F", scale=0.25)
        assert np.array_equal(out["Ft"], out["F"].T), "F^T is not F's transpose"
        assert np.array_equal(wide(out["At"]), wide(narrow(wide(A).T, kind))), "A^T is not A's transpose, rounded once"

    return Problem(run, check)


def fold_grad(shape: Shape, kind: str) -> Problem:
    t = Maker(shape, kind, "fold_grad")
    B, cores = t.factor(shape.k, shape.other), _cores(t)
    Q = np.stack([t.values(shape.k, shape.r).astype(np.float32) for _ in range(shape.layers)])
    dB0 = t.values(shape.k, shape.other).astype(np.float32)
    with_dB = shape.p == 0

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        dB = Output((shape.k, shape.other), np.float32, shape.layout, dB0)
        dcores = Output((shape.layers * shape.r, shape.other), np.float32, PACKED)
        lib.fold_grad(Q, B, cores, 0.25, dB.view if with_dB else None, dcores.view.reshape(-1, shape.r, shape.other))
        return finish(dB=dB, dcores=dcores)

    def check(out: dict[str, np.ndarray]) -> None:
        dcores = out["dcores"].reshape(shape.layers, shape.r, shape.other)
        for layer in range(shape.layers):
            t.close(dcores[layer], wide(Q[layer]).T, wide(B), f"dcores[{layer}]", scale=0.25, kind="fp32")
        if with_dB:
            left = np.concatenate([wide(q) for q in Q], 1)
            t.close(out["dB"], left, np.concatenate([wide(c) for c in cores]), "dB", wide(dB0), scale=0.25, kind="fp32")

    return Problem(run, check)


def small(shape: Shape, kind: str) -> Problem:
    """The unfolded form, forward and backward, against the layer's own formulas."""
    t = Maker(shape, kind, "small")
    m, k, n, r, q, s = shape.m, shape.k, max(1, shape.k // 2), shape.r, shape.other, 0.125
    x, g, A = t.large(m, k), t.large(m, n), t.factor(k, r)
    core, B = t.factor(r, q), t.factor(n, q)
    y0, dx0 = narrow(t.values(m, n), kind), narrow(t.values(m, k), kind)
    dA0, dB0 = t.values(k, r).astype(np.float32), t.values(n, q).astype(np.float32)
    wanted = shape.p == 0  # else the gradients of the core and of B alone

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        starts = [a if getattr(lib, "adds_unfolded", True) else np.zeros_like(a) for a in (y0, dx0)]
        y, u = Output((m, n), t.dtype, shape.layout, starts[0]), Output((m, r), t.dtype, shape.layout)
        lib.small_forward_(y.view, x, A, core, B, s, u.view)
        dx, dA = Output((m, k), t.dtype, shape.layout, starts[1]), Output((k, r), np.float32, shape.layout, dA0)
        dB, dcore = Output((n, q), np.float32, shape.layout, dB0), Output((r, q), np.float32, PACKED)
        some = {"dx": dx.view, "x": x, "dA": dA.view} if wanted else {"dx": None, "x": None, "dA": None}
        lib.small_backward_(g=g, u=u.view, A=A, core=core, B=B, scaling=s, dB=dB.view, dcore=dcore.view, **some)
        return finish(y=y, u=u, dx=dx, dA=dA, dB=dB, dcore=dcore) | {"y0": starts[0], "dx0": starts[1]}

    def check(out: dict[str, np.ndarray]) -> None:
        t.close(out["u"], t.op(x), t.op(A), "u")
        u, c, b, wide_g = t.op(out["u"]), t.op(core), t.op(B), t.op(g)

        h_u, h = s * (u @ c), s * (wide_g @ b)
        k = h @ c.T
        unit = 2.0 ** {"bf16": -8, "fp16": -11, "tf32": -10, "fp32": -20}[kind]
        # h and k may be stored rounded or not (the CPU keeps them in float32).  What that does to a sum: the root mean
        # square of its terms.  Their own errors are those of their terms, not of their values, which may have cancelled.
        h_u_error = np.sqrt(np.maximum(np.square(h_u), s**2 * (np.square(u) @ np.square(c))))
        h_error = np.sqrt(np.maximum(np.square(h), s**2 * (np.square(wide_g) @ np.square(b))))
        k_error = np.sqrt(np.square(h_error) @ np.square(c.T))
        products = [
            ("dB", wide_g.T, h_u, dB0, "fp32", np.square(wide_g.T) @ np.square(h_u_error)),
            ("dcore", u.T, h, np.zeros((r, q), np.float32), "fp32", np.square(u.T) @ np.square(h_error)),
            ("y", h_u, b.T, out["y0"], kind, np.square(h_u_error) @ np.square(b.T)),
        ]
        if wanted:
            products += [
                ("dx", k, t.op(A).T, out["dx0"], kind, np.square(k_error) @ np.square(t.op(A).T)),
                ("dA", t.op(x).T, k, dA0, "fp32", np.square(t.op(x).T) @ np.square(k_error)),
            ]
        for name, left, right, add, out_kind, square in products:
            truth, size = wide(add) + left @ right, np.abs(wide(add)) + np.abs(left) @ np.abs(right)
            error = np.abs(wide(out[name]) - truth)
            rounding = np.abs(truth) * (unit if out_kind == kind else 2.0**-22)
            allowed = 4 * unit * np.sqrt(square) + rounding + 1e-6 * size + 1e-30
            assert np.isfinite(error).all() and (error <= allowed).all(), (
                f"small {kind} {shape}: {name} is off by {error.max():.3g}"
            )

    return Problem(run, check)


def rows(shape: Shape, kind: str) -> Problem:
    """row_core and its backward: rows of tokens by index in any order, some without a core; or (p) by ends, a row a token."""
    t = Maker(shape, kind, "rows")
    m, r, q, s, c = shape.m, shape.r, shape.other, 0.5, 1 + shape.k % 9
    cores = np.stack([t.factor(r, q) for _ in range(c)])
    g, u = t.large(m, q), t.large(m if shape.p else m // 3 + 1, r)
    index, tokens, offs = t.rng.integers(-1, c, m), t.rng.integers(0, len(u), m), None
    index[index == c // 2] = -1  # and some cores without a row
    if shape.p:
        index, tokens = np.sort(index), np.arange(m)
        index = np.roll(index, -np.count_nonzero(index < 0))  # those without a core behind the others
        offs = np.array([np.count_nonzero((index >= 0) & (index <= core)) for core in range(c)], np.int32)

    def run(lib: ModuleType) -> dict[str, np.ndarray]:
        t.prepare(lib)
        given = (cores, None if shape.p else index, offs, None if shape.p else tokens, s)
        h, du = Output((m, q), t.dtype, shape.layout), Output(u.shape, t.dtype, shape.layout)
        dcores = Output((c * r, q), np.float32, PACKED)
        lib.row_core(u, *given, h.view, multiprocessors=shape.sms)
        into = du.view, dcores.view.reshape(c, r, q)
        lib.row_core_backward(g, u, *given, *into, multiprocessors=shape.sms)
        return finish(h=h, du=du, dcores=dcores)

    def check(out: dict[str, np.ndarray]) -> None:
        exact = "fp32" if kind == "tf32" else kind  # float32 is multiplied as such
        op = lambda a: operand(a, exact)  # noqa: E731
        wide_du, scale = np.zeros(u.shape), np.zeros(u.shape)
        for core in range(c):
            own = index == core
            left, G, right = op(u)[tokens[own]], op(cores[core]), op(g)[own]
            t.close(out["h"][own], left, G, f"h of core {core}", scale=s, kind=exact)
            t.close(out["dcores"].reshape(c, r, q)[core], left.T, right, f"dcores[{core}]", scale=s, kind="fp32")
            np.add.at(wide_du, tokens[own], s * right @ G.T)
            np.add.at(scale, tokens[own], s * np.abs(right) @ np.abs(G).T)
        check_close(out["du"], wide_du, narrow(wide_du, exact), scale, exact, f"rows {kind} {shape}: du")
        assert not wide(out["h"][index < 0]).any(), "rows without a core are zero"

    return Problem(run, check)


_ALL = (
    shrink,
    shrink_core,
    expand_add,
    expand_scaled,
    scale_backward,
    factor_grad,
    shrink_grad,
    shrink_grad_wgmma,
    shrink_wgmma,
    factor_grad_wgmma,
    fold,
    fold_grad,
    small,
    rows,
    fold_transposed,
)
KERNELS: dict[str, Callable[[Shape, str], Problem]] = {f.__name__: f for f in _ALL}
