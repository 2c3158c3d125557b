"""How operators enter and leave the regions of a jaxpr: jit, remat, scan, cond, while and custom derivatives."""

from typing import Any, Callable, Sequence

import jax
from jax import lax
from jax.extend import core as jex

from peftjax import compat, stacked

Region = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr: the input that it is, untouched, or None. Looks through jit and remat regions."""
    source: dict[Any, int] = {v: k for k, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if inner is None:
            continue
        for var, k in zip(eqn.outvars, forwarded(inner.jaxpr)):
            if k is not None and not isinstance(eqn.invars[k], jex.Literal) and eqn.invars[k] in source:
                source[var] = source[eqn.invars[k]]
    return [None if isinstance(v, jex.Literal) else source.get(v) for v in jaxpr.outvars]


ONCE = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat"})


def runs_once(eqn: Any) -> bool:
    """Whether an equation is a region that runs exactly once, jit or remat."""
    return eqn.primitive.name in ONCE


def _inner(eqn: Any) -> Any:
    """The closed jaxpr of a region that runs exactly once, or None."""
    if not runs_once(eqn):
        return None
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())


def _once(self: Any, eqn: Any, operands: Sequence[Any], lift: Callable[[Any], Any]) -> Sequence[Any]:
    """Runs a region's body under `lift`; outputs that are its inputs stay outside."""
    inner = _inner(eqn)
    source = forwarded(inner.jaxpr)

    def body(*operands: Any) -> list[Any]:
        outs = self.run(inner, operands)
        return [x for x, k in zip(outs, source) if k is None]

    made = iter(lift(body)(*operands))
    return [next(made) if k is None else operands[k] for k in source]


def _jit(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params

    def lift(body: Any) -> Any:
        body.__name__ = body.__qualname__ = p["name"]
        return jax.jit(_constrained(body, p), inline=p["inline"], keep_unused=p["keep_unused"])

    return [_placed(x, s) for x, s in zip(_once(self, eqn, operands, lift), p["out_shardings"])]


def _constrained(body: Any, p: dict[str, Any]) -> Any:
    """The body of a jit region with the shardings that the region asks of its inputs."""
    if all(map(compat.is_unspecified, p["in_shardings"])):
        return body

    def constrained(*operands: Any) -> Any:
        return body(*map(_placed, operands, p["in_shardings"]))

    constrained.__name__ = body.__name__
    return constrained


def _placed(x: Any, sharding: Any) -> Any:
    """An array where a jit region asks for it; an operator stays where it is."""
    free = compat.is_unspecified(sharding) or not isinstance(x, jax.Array)
    return x if free else lax.with_sharding_constraint(x, sharding)


def _remat(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params
    return _once(self, eqn, operands, lambda f: jax.checkpoint(f, policy=p["policy"], prevent_cse=p["prevent_cse"]))


def _inline(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    return _once(self, eqn, operands, lambda f: f)


def _scan(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    p, body_of = eqn.params, eqn.params["jaxpr"].jaxpr
    n_consts, n_carry = compat.scan_sizes(p)
    start, source = n_consts + n_carry, forwarded(body_of)
    moving = [k for k in range(n_consts, start) if source[k - n_consts] != k]
    passed = {k: s for k, s in enumerate(source) if k >= n_carry and s is not None and s >= start}
    made = [k for k in range(n_carry, len(source)) if k not in passed]
    arrays, rebuild = stacked.split(self, eqn, operands[start:], [v.aval for v in body_of.invars[start:]])

    def body(carry: Any, slices: Any) -> Any:
        values = [*operands[:start], *rebuild(slices)]
        for k, value in zip(moving, carry):
            values[k] = value
        outs = self.run(p["jaxpr"], values)
        return [self.merged(outs[k - n_consts], eqn) for k in moving], [self.merged(outs[k], eqn) for k in made]

    init = [self.merged(operands[k], eqn) for k in moving]
    carry, ys = lax.scan(body, init, arrays, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    given = dict(enumerate(operands))
    ends = {**given, **dict(zip(moving, carry))}
    series = {**{k: given[s] for k, s in passed.items()}, **dict(zip(made, ys))}
    return [ends[k] for k in range(n_consts, start)] + [series[k] for k in range(n_carry, len(source))]


def _cond(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    index, *rest = operands

    def branch(closed: Any) -> Any:
        return lambda *values: [self.merged(x, eqn) for x in self.run(closed, values)]

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], *rest)


def _while(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
    source = forwarded(p["body_jaxpr"].jaxpr)
    moving = [k for k, s in enumerate(source) if s != n_body + k]

    def values(carry: Any) -> list[Any]:
        whole = list(init)
        for k, x in zip(moving, carry):
            whole[k] = x
        return whole

    def cond(carry: Any) -> Any:
        return self.run(p["cond_jaxpr"], [*cond_consts, *values(carry)])[0]

    def body(carry: Any) -> Any:
        outs = self.run(p["body_jaxpr"], [*body_consts, *values(carry)])
        return [self.merged(outs[k], eqn) for k in moving]

    ends = dict(zip(moving, lax.while_loop(cond, body, [self.merged(init[k], eqn) for k in moving])))
    return [ends.get(k, x) for k, x in enumerate(init)]


def _custom_jvp(self: Any, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs the body with its operators; its derivative stays the custom one, taken at the merged operators."""
    inner = eqn.params["call_jaxpr"]

    @jax.custom_jvp
    def call(*operands: Any) -> Any:
        return [self.merged(x, eqn) for x in self.run(inner, operands)]

    @call.defjvp
    def call_jvp(primals: Any, tangents: Any) -> Any:
        plain = lambda *operands: compat.single(eqn, [self.merged(x, eqn) for x in operands], inner.jaxpr.debug_info)
        _, out_tangents = jax.jvp(plain, primals, tangents)
        return call(*primals), out_tangents

    return call(*operands)


REGIONS: dict[str, Region] = {
    **dict.fromkeys(("jit", "pjit"), _jit),
    **dict.fromkeys(("closed_call", "core_call"), _inline),
    **dict.fromkeys(("checkpoint", "remat2", "remat"), _remat),
    "scan": _scan,
    "cond": _cond,
    "while": _while,
    "custom_jvp_call": _custom_jvp,
}
