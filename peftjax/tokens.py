"""Virtual tokens: inserting them into a model's arguments, and taking their rows out of what it returns."""

import functools
import inspect
from typing import Any, Callable, ParamSpec, TypeVar
from typing import Sequence as Seq

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.call import Call
from peftjax.causal import against_last, is_causal
from peftjax.evaluate import Passed, evaluated, runner, traced
from peftjax.evaluator import Evaluator
from peftjax.overlay import Output, Overlay, Table, layers, type_of
from peftjax.paths import path_of
from peftjax.token_args import (
    Names,
    argument_paths,
    axes_of,
    check_arguments,
    find,
    resized,
)
from peftjax.token_axes import Differ, Sequence, Span, moves
from peftjax.token_insert import inserted
from peftjax.token_packed import check_values, sound, spoiled
from peftjax.token_rows import check_rows
from peftjax.token_rows import given as rows_of

P = ParamSpec("P")
R = TypeVar("R")


def wrap_tokens(
    fn: Callable[P, R],
    *,
    ids: str = "input_ids",
    mask: str | None = "attention_mask",
    positions: str | None = "position_ids",
    types: str | None = "token_type_ids",
    labels: str | None = "labels",
    pool_mask: str | None = None,
    side: str = "auto",
    shift: bool | None = None,
    axis: int = -1,
    drop_first_label: bool = False,
    keep: Seq[str] = (),
    check: bool = True,
) -> Callable[P, R]:
    """`peftjax.wrap` for functions of token ids: it inserts the virtual tokens of a tree with prompts or prefixes.

    `[P; x]` or `[x; P]` goes through the model, and x's rows come out. Arguments are named as keywords, as parameters
    of `fn`, or as keys in its arguments ("input_ids", or "batch/input_ids" where that is not unique).

    Args:
      fn: any function that `jax.jit` could trace, `fn(params, ...)`.
      ids: the token ids, integers (B, T), or with the tokens along `axis`. Virtual ones are V, V + 1, ... for prompts,
        which read the table's further rows, and 0 for prefixes, where nobody reads what stands there.
      mask: 1 where a token is real; virtual ones are 1, and 0 while every overlay's scale is 0, so `peftjax.disable`
        gives the base model (but one that counts positions itself counts virtual tokens that come first). None for a
        model without a mask.
      positions: the positions of the tokens, if the model takes them.
      types: token types, if the model takes them; virtual ones are 0.
      labels: one label a token, if the model takes them; virtual ones are -100. Beside arguments called `decoder_...` they
        are a decoder's, and stay unless the ids are called so too; None says so of models that make those from labels.
      pool_mask: a mask that stays 0 at virtual tokens, for pooling and losses inside `fn`.
      side: "first" puts virtual tokens before x, "last" after it, where the first position stays first. "auto" is first
        for models with a causal part and last for others.
      shift: whether the real tokens' positions move by n, and the virtual ones' begin where a row's began (0, or 2 in
        RoBERTa). By default where virtual tokens come first, as they do in HF peft. Else real positions stay, and a
        prompt's follow the last of them.
      axis: the ids' axis of tokens.
      drop_first_label: sets the first real label to -100 too, where virtual tokens come first: for models that shift
        labels by one, in which a virtual row would predict it.
      keep: names of outputs whose virtual rows stay, such as a cache.
      check: whether to make sure, from the trace, that no output depends on virtual rows by a mean, a maximum or an
        index. False trusts the model, as for HF's prompts before the first token of BERT, which its pooler reads.

    Returns:
      The function. Its outputs have the lengths of x; a tree without virtual tokens runs as `peftjax.wrap` runs it.
      Where mask and positions are traced (in `jax.jit`, in a train step), nothing can raise for their values: an example
      whose mask holds other numbers than 0 and 1, or whose real tokens' positions do not rise, has NaN in its floating
      outputs and in its gradients. An output whose axes do not begin as those of the ids is NaN as a whole.

    Raises:
      ValueError: an argument that is not there or has no axis of tokens, `shift` of positions that the model makes
        itself, packed sequences or a mask of other numbers than 0 and 1 (where their values are known), a table of
        positions that is too short, a projection without an axis of tokens, or an output that would depend on virtual
        rows.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, input_ids, attention_mask: p["words"][input_ids] * attention_mask[..., None]
      >>> params = {"words": jnp.ones((5, 2))}
      >>> ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
      >>> tuned = pj.prompt(4, targets="words").init(jax.random.key(0), params)
      >>> pj.wrap_tokens(fn, side="first")(tuned, ids, mask).shape
      (1, 3, 2)
    """
    if side not in ("auto", "first", "last"):
        raise ValueError(f"wrap_tokens: side={side!r}; expected 'auto', 'first' or 'last'")
    usual = {k: p.default for k, p in inspect.signature(wrap_tokens).parameters.items()}
    given: dict[str, Any] = dict(
        ids=ids, mask=mask, positions=positions, types=types, labels=labels, pool_mask=pool_mask
    )
    implied = frozenset(k for k, v in given.items() if v == usual[k])
    names = Names(**given, side=side, shift=shift, axis=axis, drop_first_label=drop_first_label, keep=tuple(keep),
                  check=check, implied=implied)  # type: ignore[arg-type]  # fmt: skip

    def before(call: Call) -> None:
        if any(o.virtual or o.sequential for x in call.leaves for o in layers(x)):
            found = find(names, fn, call)
            check_arguments(names, found, argument_paths(fn, call), call)
            check_values(names, found, call)

    return runner(fn, functools.partial(_evaluate, fn, names), before)


def _evaluate(fn: Any, names: Names, call: Call, given: Seq[Any]) -> tuple[Any, Evaluator]:
    prompt, prefix, overlays = _virtual(call, given)
    if not overlays:
        return evaluated(*traced(fn, call, [type_of(x) for x in given]), call, given)
    found = find(names, fn, call)
    check_arguments(names, found, argument_paths(fn, call), call)
    axes = axes_of(names, found, call)
    size, dynamic = call.leaves[found["ids"]].shape[names.axis], call.dynamic
    place = {field: dynamic.index(found[field]) for field in axes}
    long = size + prompt + prefix
    types = lambda n: [
        next((resized(x, axes[f], n) for f, k in place.items() if k == j), type_of(x)) for j, x in enumerate(given)
    ]
    closed, shape = _traced(fn, call, types(long), long - size)
    first = _is_first(names, closed, prompt + prefix)
    if names.shift not in (None, first) and "positions" not in found:
        raise ValueError(
            f"wrap_tokens: shift={names.shift} with virtual tokens {'first' if first else 'last'} needs the tokens' positions, "
            "which this model makes itself; expected an argument with them (`positions=`)"
        )
    span = Span(long, 0 if first else size, prompt, prefix)
    sequence, other_shape = _compared(fn, call, types, closed, size, span)
    if names.check and span.virtual and not first and (reason := against_last(closed, sequence.is_square)):
        raise ValueError(
            f"wrap_tokens: virtual tokens last: {reason}; expected side='first' (`check=False` trusts the model)"
        )
    active = functools.reduce(
        jnp.logical_or, [jnp.any(jnp.asarray(o.scale) != 0) for o in overlays if o.virtual] or [jnp.array(True)]
    )
    vocabulary = next((o.bottom.shape[0] for o in overlays if isinstance(o, Table)), 0)
    longer, mask = list(given), jnp.asarray(given[place["mask"]]) if "mask" in place else None
    for field, k in place.items():
        longer[k] = inserted(names, field, jnp.asarray(given[k]), axes[field], span, active, vocabulary, mask)
    out, evaluator = evaluated(closed, shape, call, longer, sequence)
    if names.check and span.virtual:
        fields = {k: f for f, k in place.items()}
        kinds, dropped = zip(range(len(given)), closed.in_avals), names.drop_first_label
        known = [
            rows_of(fields.get(k), kind, axes.get(fields.get(k, "")), span, vocabulary, dropped) for k, kind in kinds
        ]
        check_rows(closed, sequence, known, shape, other_shape, functools.partial(_is_kept, names))
    fine = sound({f: jnp.asarray(given[k]) for f, k in place.items()}, call.leaves[found["ids"]], names.axis)
    return _cut(names, out, shape, other_shape, sequence, fine), evaluator


def _virtual(call: Call, given: Seq[Any]) -> tuple[int, int, list[Overlay]]:
    """How many virtual tokens a tree's prompts and prefixes need, and the overlays that act on tokens."""
    known = [
        (call.paths.get(k), o) for k, x in zip(call.dynamic, given) for o in layers(x) if o.virtual or o.sequential
    ]
    counts = {}
    for kind in (Table, Output):
        lengths = {path: o.virtual for path, o in known if isinstance(o, kind) and o.virtual}
        if len(set(lengths.values())) > 1 or (kind is Table and len(lengths) > 1):
            said = ", ".join(f"{n} at {path}" for path, n in lengths.items())
            raise ValueError(
                f"wrap_tokens: virtual tokens of several lengths, or in several tables: {said}; expected one"
            )
        counts[kind] = next(iter(lengths.values()), 0)
    return counts[Table], counts[Output], [o for _, o in known]


def _traced(fn: Any, call: Call, types: Seq[Any], count: int) -> tuple[Any, Any]:
    try:
        return traced(fn, call, types)
    except Exception as error:
        raise ValueError(
            f"wrap_tokens: the model cannot be traced with {count} virtual tokens ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}). Is every argument with an axis of tokens named, and "
            "no length a Python number?"
        ) from error


def _compared(fn: Any, call: Call, types: Any, closed: Any, size: int, span: Span) -> tuple[Sequence, Any]:
    """The model at another length, and where the two programs have tokens."""
    long, reason = span.length, "no length to compare with"
    # At a length of one, JAX leaves out what it does elsewhere.
    for n in dict.fromkeys(n for n in (size, long - 1, long + 1, 2 * long) if n > 1 and n != long):
        try:
            other, shape = traced(fn, call, types(n))
            return Sequence(closed, other, n, span), shape
        except (Differ, TypeError, ValueError) as error:
            reason = f"{error}"
    raise ValueError(f"wrap_tokens: where are the tokens? The model is another program at other lengths: {reason}")


def _is_first(names: Names, closed: Any, count: int) -> bool:
    if names.side != "auto" or not count:
        return names.side == "first"
    causal = is_causal(closed.jaxpr)
    if causal is None:
        raise ValueError(
            "wrap_tokens: the trace does not say whether the model is causal; expected side='first' (decoders) or "
            "side='last' (encoders)"
        )
    return causal


def _cut(names: Names, out: Any, long: Any, short: Any, sequence: Sequence, fine: Any) -> Any:
    """The outputs without virtual rows; what the model computed of examples that are not `fine` is NaN."""
    span, jaxpr = sequence.span, sequence.closed.jaxpr
    kinds = zip(jax.tree_util.tree_leaves_with_path(long), jax.tree.leaves(short), jaxpr.outvars, strict=True)
    leaves, tree = jax.tree.flatten(out, is_leaf=lambda x: isinstance(x, Passed))
    cut, came = [], {id(v) for v in jaxpr.invars}
    for x, ((where, kind), other, var) in zip(leaves, kinds, strict=True):
        path = path_of(where)
        for axis, before, after in () if _is_kept(names, path) else moves(kind, other):
            if (before, after) != (sequence.size, span.length):
                raise ValueError(
                    f"wrap_tokens: output {path or 'of the model'} has {after} entries along axis {axis} for "
                    f"{span.length} tokens, so its virtual rows cannot be told; "
                    "expected an axis of all tokens, or keep=(...,)"
                )
            if span.virtual:
                x = lax.slice_in_dim(x, span.real.start, span.real.stop, axis=axis)
        computed = id(var) not in came and jnp.issubdtype(kind.dtype, jnp.inexact)
        cut.append(spoiled(x, fine, names.axis) if computed and fine is not None else x)
    return jax.tree.unflatten(tree, cut)


def _is_kept(names: Names, path: str) -> bool:
    """Whether an output keeps its virtual rows."""
    return any(path == name or path.endswith("/" + name) or path.startswith(name + "/") for name in names.keep)
