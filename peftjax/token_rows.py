"""Which entries of a traced model depend on virtual rows: followed from the ids to the outputs, by the trace alone.

An entry of a value is marked where it holds a prompt's row (`PROMPT`) or what stands at a prefix's position (`PREFIX`),
which nobody may read. Attention reads a prompt's rows, and what it puts out at real positions is no virtual row; means,
maxima and indices that take one in spread the mark, and a mark on a real row of an output raises.
"""

import dataclasses
from collections import Counter
from typing import Any, Mapping

import jax
import numpy as np
from jax.extend import core as jex

from peftjax import compat, token_rules
from peftjax.paths import path_of
from peftjax.regions import ONCE
from peftjax.token_axes import Sequence, Span, moves
from peftjax.token_marks import PREFIX, PROMPT, Marked, anything, clean, joined

REGIONS = ONCE | {"custom_jvp_call", "custom_vjp_call"}
EXACT = 1 << 16  # the largest constant whose entries are followed


def given(field: str | None, kind: Any, axis: int | None, span: Span, vocabulary: int, dropped: bool = False) -> Marked:
    """What is known of an argument of the model; `dropped`: the first real label is left out too."""
    if axis is None:
        return clean(kind.shape)
    prompt, prefix = (np.zeros(span.length, bool) for _ in range(2))
    prompt[span.start : span.prefix_start] = True
    prefix[span.prefix_start : span.prefix_start + span.prefix] = True
    along = lambda x: x.reshape([-1 if k == axis else 1 for k in range(len(kind.shape))])
    known = np.full(span.length, np.nan)
    match field:
        case "ids":
            known[prompt] = vocabulary + np.arange(span.prompt)
            return Marked(tuple(kind.shape), along(PROMPT * prompt + PREFIX * prefix).astype(np.uint8), along(known))
        case "positions":
            return dataclasses.replace(clean(kind.shape), low=0, high=span.length - 1)
        case "labels":
            known[prompt | prefix] = -100
            known[span.virtual : span.virtual + (dropped and span.start == 0)] = -100
        case "mask":
            known[prompt | prefix] = 1
        case _:
            known[prompt | prefix] = 0
    return Marked(tuple(kind.shape), clean(kind.shape).marks, along(known))


def check_rows(closed: Any, sequence: Sequence, args: list[Marked], kinds: Any, shorts: Any, keep: Any) -> None:
    """Raises where a real row of an output would depend on virtual rows.

    Args:
      closed, sequence: the traced model, and where it has tokens; after the run that noted in it where overlays acted.
      args: what is known of each argument.
      kinds, shorts: the types of the outputs at the two lengths, as trees.
      keep: whether an output (by its path) keeps its virtual rows.
    """
    walk = Walk(sequence, {})
    walk.run(closed.jaxpr, closed.consts, args)
    if walk.shared:  # one jaxpr serves several layers, and not all of them have a prefix
        walk = Walk(sequence, walk.shared)
    outs = walk.run(closed.jaxpr, closed.consts, args)
    if other := [path for path, named in walk.named.items() if not named]:
        raise ValueError(
            f"wrap_tokens: the table at {other[0]} is looked up by something else than the ids that are named"
        )
    paths = jax.tree_util.tree_leaves_with_path(kinds)
    for out, (where, kind), short in zip(outs, paths, jax.tree.leaves(shorts), strict=True):
        marks, path = out.marks, path_of(where)
        if keep(path):
            continue
        for axis, _, _ in moves(kind, short):
            if marks.shape[axis] == sequence.span.length:
                marks = np.take(marks, np.r_[sequence.span.real], axis=axis)
        if marks.any():
            what = "what stands at virtual positions" if (marks & PREFIX).any() else "virtual rows"
            why = walk.notes[0] if walk.notes else "it is one of them"
            raise ValueError(
                f"wrap_tokens: output {path or 'of the model'} would depend on {what}: {why}. Give pooling and "
                "losses inside the model a mask without them (`pool_mask=`), choose the other `side=`, "
                "or put a prefix on every attention; `check=False` trusts the model"
            )


class Walk:
    """One reading of a trace. `without` holds equations that are read as if no prefix acted there."""

    def __init__(self, sequence: Sequence, without: Mapping[int, int]) -> None:
        self.sequence, self.without = sequence, without
        self.notes: list[str] = []
        self.named: dict[str, bool] = {}  # of each table with a prompt, whether a lookup takes the prompt's ids
        self.visits: Counter[int] = Counter()
        self.rehearsing = False

    @property
    def shared(self) -> dict[int, int]:
        """Equations at which a prefix acted fewer times than the model runs them."""
        acted = {key: len(sites) for key, sites in self.sequence.acted.items()}
        return {key: n for key, n in acted.items() if n < self.visits[key]}

    def note(self, eqn: Any, what: str) -> None:
        """Remembers where a mark spread."""
        where = str(eqn.source_info.name_stack)
        self.notes.append(f"{eqn.primitive.name}{f' in {where}' if where else ''} {what}")

    def run(self, jaxpr: Any, consts: Any, args: list[Marked]) -> list[Marked]:
        """What is known of a jaxpr's outputs."""
        known = [anything(c) if np.size(c) <= EXACT and not compat.is_traced(c) else clean(np.shape(c)) for c in consts]
        env = dict(zip(jaxpr.constvars, known)) | dict(zip(jaxpr.invars, args))
        read = lambda v: anything(v.val) if isinstance(v, jex.Literal) else env[v]
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            outs = self.step(eqn, operands, jaxpr)
            env.update(zip(eqn.outvars, self.acted(eqn, operands, outs)))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, operands: list[Marked], jaxpr: Any) -> list[Marked]:
        """What is known of an equation's outputs."""
        name, p = eqn.primitive.name, eqn.params
        shapes = [tuple(v.aval.shape) if hasattr(v.aval, "shape") else () for v in eqn.outvars]
        if name in REGIONS:
            body = p.get("jaxpr") or p.get("call_jaxpr") or p.get("fun_jaxpr")
            closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
            return self.run(closed.jaxpr, closed.consts, operands)
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "cond":
            index, *rest = operands
            runs = [self.run(b.jaxpr, b.consts, list(rest)) for b in p["branches"]]
            outs = [joined(list(xs)) for xs in zip(*runs)]
            return [token_rules.spread(x, index.marks) for x in outs]
        if name == "while":
            return self.loop(eqn, operands)
        rule = token_rules.RULES.get(name)
        if rule is not None:
            return rule(self, eqn, operands, shapes, jaxpr)
        all_marks = np.bitwise_or.reduce([np.bitwise_or.reduce(x.marks, axis=None) for x in operands] or [np.uint8(0)])
        if all_marks and not self.rehearsing:
            self.note(eqn, "reads them, and cannot be followed")
        return [token_rules.spread(clean(s), np.asarray(all_marks)) for s in shapes]

    def scan(self, eqn: Any, operands: list[Marked]) -> list[Marked]:
        """A loop: its carry is read until nothing new is learnt of it."""
        p, body = eqn.params, eqn.params["jaxpr"]
        n_consts, n_carry = compat.scan_sizes(p)
        consts, carry, xs = operands[:n_consts], operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        steps = [x.reduced(0) for x in xs]
        if any((x.marks.shape or (1,))[0] > 1 for x in xs):
            self.note(eqn, "runs over the tokens, and cannot be followed")
        outs = self.fixed(lambda c: self.run(body.jaxpr, body.consts, [*consts, *c, *steps]), carry, n_carry)
        return [*outs[:n_carry], *(x.stacked(p["length"]) for x in outs[n_carry:])]

    def loop(self, eqn: Any, operands: list[Marked]) -> list[Marked]:
        """A while loop, likewise."""
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        test, consts, carry = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
        body = lambda c: self.run(p["body_jaxpr"].jaxpr, p["body_jaxpr"].consts, [*consts, *c])
        outs = self.fixed(body, carry, len(carry))
        ends = self.run(p["cond_jaxpr"].jaxpr, p["cond_jaxpr"].consts, [*test, *outs])
        return [token_rules.spread(x, ends[0].marks) for x in outs]

    def fixed(self, body: Any, carry: list[Marked], count: int) -> list[Marked]:
        """The outputs of a body once its carry has settled; marks only grow, and what is known only shrinks."""
        before, self.rehearsing = self.rehearsing, True
        visits = self.visits.copy()
        while True:
            outs = body(carry)
            wider = [joined([x, y]) for x, y in zip(carry, outs[:count])]
            if all(x.same(y) for x, y in zip(wider, carry)):
                break
            carry = wider
        self.rehearsing, self.visits = before, visits
        outs = body(carry)
        return [joined([x, y]) for x, y in zip(carry, outs[:count])] + outs[count:]

    def acted(self, eqn: Any, operands: list[Marked], outs: list[Marked]) -> list[Marked]:
        """The outputs after what overlays did there: a prefix overwrites rows; a prompt's ids arrive at its table."""
        self.visits[id(eqn)] += 1
        for path, size in self.sequence.looked_up.get(id(eqn), ()):
            rows = set(range(size, size + self.sequence.span.prompt))
            marked = [x for x in operands if (x.marks & PROMPT).any()]
            named = any(
                x.known is None or eqn.primitive.name != "gather" or rows <= set(x.known.ravel()) for x in marked
            )
            self.named[path] = self.named.get(path, False) or named
        if id(eqn) in self.sequence.acted and id(eqn) not in self.without:
            axis, features, ranges = self.sequence.acted[id(eqn)][0]
            outs = [outs[0].overwritten(axis, features, ranges, self.sequence.span), *outs[1:]]
        return outs
