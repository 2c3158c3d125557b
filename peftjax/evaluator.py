"""The interpreter: runs a jaxpr whose values may be operators, or carry overlays, through the rules of both."""

import dataclasses
import functools
from typing import Any, Mapping, Sequence

from jax.extend import core as jex

from peftjax import compat, hooks, regions, rules, tables
from peftjax.hooked import HOOKED, Hook, Pending, Rows, inner, is_marked
from peftjax.streams import Key
from peftjax.weight import Weight, dense

LIVE = (Weight, *HOOKED)


@dataclasses.dataclass(frozen=True)
class Event:
    """What one equation did with one overlay: `how` is "acted", "merged", "left alone", "met the residual" or "unused"."""

    path: str
    overlay: str
    how: str
    primitive: str
    where: str


class Evaluator:
    """Evaluates jaxprs whose values may be operators or carry overlays, and notes what each overlay did."""

    def __init__(
        self,
        names: dict[str, str],
        tables: bool = False,
        sequence: Any = None,
        streams: Mapping[Key, int] | None = None,
    ) -> None:
        self.names = names
        self.tables = tables
        self.sequence = sequence  # a `tokens.Sequence`: where the equations have tokens; None under a plain `wrap`
        self.events: list[Event] = []
        self.waiting: list[str] = []
        self.stacks: list[str] = []
        self.around: tuple[int, ...] = ()  # the identities of the equations whose regions these are
        self.streams: Mapping[Key, int] = streams or {}
        self.layer: dict[str, Any] = {}
        self.idle: list[
            str
        ] = []  # where an overlay of a weight stands that nothing used, and that did not come out again

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a closed jaxpr; those that are more than arrays come back as what they are."""
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts)) | dict(zip(jaxpr.invars, args))
        read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            inside = self.tables and regions.runs_once(eqn)  # ids are clipped, and coded, in regions of their own
            if inside or any(isinstance(x, LIVE) for x in operands):
                with compat.scope(eqn):
                    outs = self.step(eqn, operands, jaxpr.debug_info)
            else:
                outs = compat.single(eqn, operands, jaxpr.debug_info)
            if self.tables and eqn.primitive.name not in regions.REGIONS:
                outs = tables.notice(eqn, operands, outs)
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, operands: Sequence[Any], debug_info: Any) -> Sequence[Any]:
        """The outputs of one equation, some of whose operands are more than arrays."""
        region = regions.REGIONS.get(eqn.primitive.name)
        if region is not None:
            around, self.around = self.around, (*self.around, id(eqn))
            self.stacks.append(str(eqn.source_info.name_stack))
            outs = region(self, eqn, operands)
            self.stacks.pop()
            self.around = around
            return outs
        plain = functools.partial(self.plain, eqn, debug_info)
        return hooks.act(self, eqn, operands, plain) if is_marked(operands) else plain(operands)

    def plain(self, eqn: Any, debug_info: Any, operands: Sequence[Any]) -> Sequence[Any]:
        """The outputs of an equation on arrays and operators: by a rule, or with the operators merged."""
        run = lambda eqn, operands: compat.single(eqn, operands, debug_info, named=False)
        if not any(isinstance(x, Weight) for x in operands):
            return run(eqn, operands)
        outs = rules.act(eqn, operands, run)
        if outs is None:
            return run(eqn, [self.merged(x, eqn) for x in operands])
        if eqn.primitive.name in rules.CONTRACTIONS and not any(isinstance(x, Weight) for x in outs):
            for x in operands:
                if isinstance(x, Weight):
                    idle = x.plain is None and x.only_for(eqn.primitive.name).plain is not None
                    self.note([x], eqn, "left alone" if idle else "acted")
        return outs

    def stream(self, eqn: Any) -> int | None:
        """Which operand of an addition is the residual stream, where the other is the output of a layer that read it."""
        return self.streams.get((self.around, id(eqn)))

    def merged(self, x: Any, eqn: Any = None) -> Any:
        """The array that a value stands for; merging an operator is noted, and an overlay of outputs refuses."""
        x = inner(x)
        where = eqn.primitive.name if eqn is not None else "the function's output"
        if isinstance(x, (Hook, Rows, Pending)):
            why = "; it waits for the one addition of what the layer read" if isinstance(x, Pending) else ""
            raise ValueError(f"the overlay at {x.path} reached {where} before it could act on its layer's output{why}")
        if not isinstance(x, Weight):
            return x
        seen = x if eqn is None else x.only_for(eqn.primitive.name)
        whole = seen.plain is not None  # an array of its own, or the base: nothing to merge
        self.note([x], eqn, "merged" if not whole else "acted" if x.plain is not None else "left alone")
        return dense(seen, f" for {where}")

    def note(self, weights: Sequence[Weight], eqn: Any, how: str) -> None:
        """Remembers what an equation did with these operators."""
        self.events += [self.event(w.path, how, eqn) for w in weights]

    def event(self, path: str, how: str, eqn: Any, overlay: str | None = None) -> Event:
        """What an equation (None: the function's output) did with the overlay at a path."""
        name = eqn.primitive.name if eqn is not None else "output"
        return Event(path, overlay or self.names[path], how, name, self.scope_of(eqn) if eqn is not None else "")

    def scope_of(self, eqn: Any) -> str:
        """The name stack of an equation, with those of the regions around it."""
        return "/".join(filter(None, (*self.stacks, str(eqn.source_info.name_stack))))

    def tokens(self, eqn: Any, path: str, owners: Sequence[Any], others: Sequence[int]) -> tuple[Any, Any]:
        """The axis of tokens in an equation's output, and which of them are virtual; `others` are axes that it is not."""
        if self.sequence is None:
            return None, None
        axis = self.sequence.axis(eqn, others)
        if isinstance(axis, str) and (needy := [o for o in owners if o.virtual or o.sequential]):
            raise ValueError(
                f"the {_name(needy[0])} at {path} acts on tokens, and {axis} ({self.scope_of(eqn) or 'top level'})"
            )
        return (None if isinstance(axis, str) else axis), self.sequence.span

    def fire(self, path: str, owner: Any, eqn: Any) -> None:
        """Remembers that an overlay of outputs or rows met its equation."""
        self.events.append(self.event(path, "acted", eqn, _name(owner)))

    def met(self, path: str, owners: Sequence[Any], eqn: Any) -> None:
        """Remembers that a waiting output, and its overlays with it, met its residual add."""
        if path not in self.waiting:
            raise ValueError(
                f"the output of {path} is added to a second array ({self.scope_of(eqn)}), and its overlay acts at one "
                'residual add; attach it with where="output"'
            )
        self.waiting.remove(path)
        self.events += [self.event(path, "met the residual", eqn, _name(owner)) for owner in owners]

    def refuse_inner_gradient(self, eqn: Any, path: str) -> None:
        """Overlays of outputs do not act in a derivative that the function itself takes."""
        stack = self.scope_of(eqn)
        if "jvp(" in stack or "transpose(" in stack:
            raise ValueError(
                f"the overlay at {path} lies inside a derivative that the function takes itself ({stack}): its equations "
                "are those of the bare layer. Overlays of weights, such as lora, are exact there"
            )

    def finish(self, expected: Sequence[str], came: Sequence[str]) -> None:
        """Raises if an overlay of outputs or rows, `expected`, never acted; `came` are those that came out untouched."""
        acted = {e.path for e in self.events if e.how != "left alone"}
        if missed := [p for p in expected if p not in acted]:
            raise ValueError(f"never reached by the model, so their overlays did nothing: {', '.join(missed)}")
        if self.waiting:
            raise ValueError(
                f"the outputs of {', '.join(self.waiting)} never met a residual add, which their overlays wait for"
            )
        used = {e.path for e in self.events}
        self.idle = [path for path in self.names if path not in used and path not in came]


def _name(owner: Any) -> str:
    """What an overlay is called: what acts in the place of another goes by its name."""
    return getattr(owner, "name", type(owner).__name__)
