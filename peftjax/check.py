"""The laws, run on the reader's own model."""

import dataclasses
import functools
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.attach import attach
from peftjax.call import is_array
from peftjax.evaluate import explain
from peftjax.flat import extract, insert
from peftjax.merging import merge
from peftjax.method import Method
from peftjax.overlay import is_overlay, layers
from peftjax.tree import combine, partition, strip


@dataclasses.dataclass(frozen=True)
class Finding:
    """One law on one model: whether it holds, and the figure that says so."""

    law: str
    holds: bool
    figure: str


class Report(tuple[Finding, ...]):
    """What `check` found; printed as a table."""

    @property
    def ok(self) -> bool:
        """Whether every law holds."""
        return all(f.holds for f in self)

    def __repr__(self) -> str:
        width = max(len(f.law) for f in self)
        return "\n".join(f"{'ok  ' if f.holds else 'FAIL'}  {f.law.ljust(width)}  {f.figure}" for f in self)


def check(
    method: Method,
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: jax.Array | None = None,
    tokens: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Runs those laws of peftjax on a model that need nothing beside it: a smoke test, and no proof.

    1, where the method claims it: the tuned model equals the model before training. 2, where every overlay merges: merged
    and tuned model are equal. 3, in part: the gradients of the sum of the outputs are finite, and of each array that trains
    one of three is not zero; they are compared with no others. 4: `strip` gives the buffers back. 6, in part: other trained
    values make no new program. 7, in part: `insert` undoes `extract`; nothing is saved. Beside these, that every overlay
    acts. Not tried are 5 and 8 to 12: training, chains, vmap, meshes, wrong use, what stands at a prefix's positions.

    The errors are `max|difference| / max|reference|`, with trained fields moved away from their start; the tolerance is
    1e-5, and 2e-2 where the parameters hold floating point narrower than float32. Dropout is off.

    Args:
      method: the method to try.
      fn, params, *args, **kwargs: the model, which returns floating point, and one small batch of real arrays. A model's
        own arguments `key` and `tokens` are given by place, as for `peftjax.attach`.
      key: a PRNG key for the method's start and the moves; `jax.random.key(0)` by default, so that findings repeat.
      tokens: the options of `peftjax.wrap_tokens` for what acts on tokens, as for `peftjax.attach`.

    Returns:
      The findings, one a law, and the overlays that were merged or never used; `.ok` says whether all hold.

    Raises:
      ValueError: as `peftjax.attach`; a method that acts on tokens, and no `tokens`.
      TypeError: as `peftjax.attach`; no output is of floating point, or the batch is abstract.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["w"]
      >>> report = pj.check(pj.lora(rank=1, targets="w"), fn, {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
      >>> report.ok
      True
    """
    key = jax.random.key(0) if key is None else key
    apply, fresh = attach(method, fn, params, *args, key=key, tokens=tokens, **kwargs)
    tuned, traces = _moved(fresh, key), [0]

    def counted(tuned: Any, args: Any, kwargs: Any) -> list[Any]:
        traces[0] += 1
        return _floats(apply(tuned, *args, **kwargs))

    plain, act = (_compiled(f) for f in (lambda p, args, kwargs: _floats(fn(p, *args, **kwargs)), counted))
    base, start, now = plain(params, args, kwargs), act(fresh, args, kwargs), act(tuned, args, kwargs)
    once = Finding("6 one compilation", traces[0] == 1, f"{traces[0]} for two trees")
    tolerance = 2e-2 if any(jnp.finfo(x.dtype).bits < 32 for x in _floats(params)) else 1e-5

    def close(law: str, got: Sequence[Any], want: Sequence[Any]) -> Finding:
        error = _error(got, want)
        return Finding(law, error <= tolerance, f"error {error:.1e}, at most {tolerance:.0e}")

    findings = [close("1 identity at init", start, base)] if method.identity_at_init else []
    if all(x.merges for leaf in jax.tree.leaves(tuned, is_leaf=is_overlay) for x in layers(leaf)):
        findings.append(close("2 merge", plain(merge(tuned), args, kwargs), now))
    findings += [_gradients(apply, tuned, args, kwargs), _strips(params, tuned), once, _extracts(tuned)]
    return Report((*findings, _acted(apply, tuned, args, kwargs)))


def _gradients(apply: Any, tuned: Any, args: Any, kwargs: Any) -> Finding:
    def total(trainable: Any, frozen: Any, args: Any, kwargs: Any) -> Any:
        return sum(map(jnp.sum, _floats(apply(combine(trainable, frozen), *args, **kwargs))))

    gradients = _compiled(jax.grad(total))
    # An array may have none at one place, such as one behind a bottleneck whose units are all off: three are tried.
    trees = [partition(_moved(tuned, jax.random.key(k))) for k in range(3)]
    places = [[np.asarray(g) for g in jax.tree.leaves(gradients(*tree, args, kwargs))] for tree in trees]
    finite = all(np.isfinite(g.astype(np.float32)).all() for grads in places for g in grads)
    moving = [any(map(np.any, grads)) for grads in zip(*places)]
    return Finding("3 gradients", finite and all(moving), f"{sum(moving)} of {len(moving)} trained arrays have one")


def _strips(params: Any, tuned: Any) -> Finding:
    same = all(a is b for a, b in zip(jax.tree.leaves(strip(tuned)), jax.tree.leaves(params)))
    return Finding("4 strip", same, "the buffers that were given" if same else "other buffers than were given")


def _extracts(tuned: Any) -> Finding:
    back = jax.tree.leaves(insert(tuned, extract(tuned)))
    equal = all(a is b or bool(np.all(a == b)) for a, b in zip(back, jax.tree.leaves(tuned)))
    return Finding("7 extract, insert", equal, "the same tree" if equal else "another tree")


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one program; what is no array among its arguments is part of it."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def program(tree: Any, still: tuple[Any, ...], arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        return fn(*jax.tree.unflatten(tree, [next(given) if x is None else x for x in still]))

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        still = tuple(None if is_array(x) else x for x in leaves)
        return program(tree, still, [x for x in leaves if is_array(x)])

    return run


def _acted(apply: Any, tuned: Any, args: Any, kwargs: Any) -> Finding:
    events = explain(apply, tuned, *args, **kwargs)
    unused = sorted({e.path for e in events if e.how == "unused"})
    merged = sorted({f"{e.path} at {e.primitive}" for e in events.merged})
    figure = f"unused: {', '.join(unused) or 'none'}; merged: {', '.join(merged) or 'none'}"
    return Finding("every overlay acts", not unused, figure)


def _moved(tuned: Any, key: jax.Array) -> Any:
    """The tree with its trained fields away from where they started."""
    trainable, frozen = partition(tuned)
    return combine(_shifted(trainable, key), frozen)


@jax.jit
def _shifted(trainable: Any, key: jax.Array) -> Any:
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)])


def _floats(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=is_overlay)
    return [x for x in leaves if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)]


def _error(got: Sequence[Any], want: Sequence[Any]) -> float:
    wide = lambda x: np.asarray(x, np.float64)
    pairs = [(wide(a), wide(b)) for a, b in zip(got, want) if b.size]
    return max((float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs), default=0.0)
