"""What may stand where an array stood: overlays, their fields, and references between them."""

import dataclasses
from numbers import Number
from typing import Any, Iterator, NoReturn, TypeVar, dataclass_transform

import jax

from peftjax import compat

C = TypeVar("C", bound=type)

BARE = (
    "an overlay, {}{}, reached code that expects an array. The model was called on a tuned tree without "
    "`peftjax.wrap`: call `wrap(fn)(tuned, ...)` instead of `fn(tuned, ...)`, or give the model `merge(tuned)`"
)
ARRAY_ATTRIBUTES = {name for name in dir(jax.Array) if not name.startswith("_")} | {"aval", "weak_type"}


def trained(**kwargs: Any) -> Any:
    """A field of an overlay that trains."""
    return dataclasses.field(metadata={"kind": "trained"}, **kwargs)


def frozen(**kwargs: Any) -> Any:
    """A field of an overlay that holds arrays which never move."""
    return dataclasses.field(metadata={"kind": "frozen"}, **kwargs)


def static(**kwargs: Any) -> Any:
    """A field of an overlay that is part of its type: hashable, never traced."""
    return dataclasses.field(metadata={"kind": "static"}, **kwargs)


@dataclass_transform(field_specifiers=(trained, frozen, static), frozen_default=True, kw_only_default=True)
def overlay(cls: C) -> C:
    """Makes a class of fields an overlay: a frozen dataclass and a pytree node whose paths name its fields."""
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)(cls)
    kinds = {f.name: f.metadata.get("kind", "frozen") for f in dataclasses.fields(made)}
    made.kinds = kinds
    return jax.tree_util.register_dataclass(
        made,
        data_fields=[n for n, k in kinds.items() if k != "static"],
        meta_fields=[n for n, k in kinds.items() if k == "static"],
    )


@dataclasses.dataclass(frozen=True)
class At:
    """The path of the leaf that an overlay was laid on, for messages alone: any two are equal.

    So trees that were laid at other paths compare as equals, can be stacked, and share their compiled programs.
    """

    path: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, At)

    def __hash__(self) -> int:
        return hash(At)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Laid:
    """What every overlay has, whatever its own fields are."""

    laid_at: At = static(default=At())


class Overlay(Laid):
    """A node that stands where an array stood, of the same logical type.

    `base` is what it stands on: an array, or another overlay. Fields are `trained`, `frozen` or `static`;
    `locked` names the trained fields that no longer train, and `scale`, an array of 1 unless a method says otherwise, is
    what `peftjax.scale` and `disable` multiply. A field `key` and a static `dropout` make it one of `peftjax.with_key`.
    Of itself it has `laid_at`, the path where a method laid it, which only messages read.

    An overlay of a weight gives its formula by `expand`: from the terms of its base, those of its own, products over the
    base's axes (`peftjax.factored`). wrap, merge and every view of the weight go by it. `labels` says which axis of a
    field is which of the base's; stacks and shardings go by that. `Output` and `Table` act otherwise.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> from typing import Any
      >>> from peftjax.factored import Factor
      >>> from peftjax.overlay import Overlay, frozen, overlay, static, trained
      >>> @overlay
      ... class Gain(Overlay):
      ...     "`W diag(1 + scale g)`, of a kernel (in, out)."
      ...     base: Any = frozen()
      ...     g: Any = trained()  # (out,)
      ...     scale: Any = frozen()  # ()
      ...     locked: tuple[str, ...] = static(default=())
      ...     def labels(self):
      ...         return {"g": ((1,),), "scale": ()}
      ...     def expand(self, terms):
      ...         return tuple(term.times(Factor(1 + self.scale * self.g, ((1,),))) for term in terms)
      >>> tuned = {"w": Gain(base=jnp.ones((3, 2)), g=jnp.array([0.0, 1.0]), scale=jnp.ones(()))}
      >>> pj.wrap(lambda params, x: x @ params["w"])(tuned, jnp.ones((1, 3)))
      Array([[3., 6.]], dtype=float32)
    """

    kinds: dict[str, str]
    base: Any
    locked: tuple[str, ...]
    virtual: int = 0  # how many virtual tokens it needs in the sequence: only `peftjax.wrap_tokens` runs it then
    guided: bool = False  # whether it is its method's `update` that moves some of it: a train step has to be given that
    sequential: bool = False  # whether it reads `site.sequence`, the axis of tokens: only `wrap_tokens` knows it

    @property
    def type(self) -> Any:
        """The logical type of the array replaced (shape, dtype, weak type, sharding, varying axes)."""
        return type_of(self.base)

    @property
    def merges(self) -> bool:
        """Whether an array can stand for it: what `peftjax.merge` asks."""
        return True

    @property
    def trained_fields(self) -> tuple[str, ...]:
        """Names of the fields that train."""
        return tuple(n for n, k in self.kinds.items() if k == "trained" and n not in self.locked)

    @property
    def bottom(self) -> Any:
        """The array below every overlay."""
        return self.base.bottom if isinstance(self.base, Overlay) else self.base

    def replace(self, **fields: Any) -> Any:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """For each array field: its axes, `(k,)` where it is axis k of the base, a word where it is the overlay's own."""
        raise NotImplementedError(f"{type(self).__name__}.labels")

    def summary(self) -> str:
        """What the short repr says beside the type: a method's rank, width or length."""
        return ""

    def __repr__(self) -> str:
        below = repr(self.base) if isinstance(self.base, Overlay) else short(self.base)
        return f"{type(self).__name__}({', '.join(filter(None, (below, self.summary())))})"

    def __str__(self) -> str:
        return f"{self!r} (an overlay: it needs peftjax.wrap to act)"

    @property
    def __jax_array__(self) -> Any:
        _bare(self)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        _bare(self)

    def __eq__(self, other: object) -> bool:
        """Identity, among overlays; a model that compares its weight with a number or an array was not wrapped."""
        if isinstance(other, Number) or (hasattr(other, "dtype") and not isinstance(other, Overlay)):
            _bare(self)
        return self is other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name in ARRAY_ATTRIBUTES:
            raise AttributeError(_unwrapped(self))
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")


def _unwrapped(self: Overlay) -> str:
    return BARE.format(repr(self), f" at {self.laid_at.path}" if self.laid_at.path else "")


def _bare(self: Overlay, *args: Any) -> NoReturn:
    raise TypeError(_unwrapped(self))


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift".split()
_OTHER = "getitem len iter contains neg pos abs invert round lt le gt ge float int complex index".split()
for _name in (*_OTHER, *(p + n for n in _BINARY for p in ("", "r"))):
    setattr(Overlay, f"__{_name}__", _bare)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Ref:
    """A field that lives elsewhere: the overlay at `path` holds it as `field`; without a field, the leaf at `path` itself.

    One array, one gradient: that of a leaf under overlays reaches what they train. Of several overlays at `path` with
    that field, `depth` tells which: how many of them it has below it. Without a depth there is to be one only.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"down": jnp.ones((6, 3)), "up": jnp.ones((3, 6))}
      >>> pj.vera(rank=4).init(jax.random.key(0), params)["up"].shared_a
      Ref(path='down', field='shared_a', depth=0)
    """

    path: str
    field: str | None = None
    depth: int | None = None

    @classmethod
    def above(cls, path: str, value: Any, field: str) -> "Ref":
        """A reference to a field of the next overlay at `path`, where `value` stands so far."""
        return cls(path, field, sum(field in x.kinds for x in layers(value)))


def atoms(axes: str, letters: str) -> tuple[Any, ...]:
    """The axes of a leaf that have one of these letters, as `labels` writes them: `(k,)` for axis k."""
    return tuple((k,) for k, letter in enumerate(axes) if letter in letters)


def is_overlay(x: Any) -> bool:
    """Whether x is an overlay; the `is_leaf` of every walk over a tuned tree."""
    return isinstance(x, Overlay)


def is_key(x: Any) -> bool:
    """Whether x is a typed PRNG key, or an array of them."""
    return jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)


def type_of(x: Any) -> Any:
    """The logical type of an array, an abstract array, or an overlay."""
    return x.type if isinstance(x, Overlay) else compat.type_of(x)


def layers(x: Any) -> Iterator[Overlay]:
    """The overlays stacked on one leaf, outermost first."""
    while isinstance(x, Overlay):
        yield x
        x = x.base


def short(x: Any) -> str:
    """`float32[768,768]` of an array, `-` of what is absent."""
    if x is None or not hasattr(x, "shape"):
        return "-"
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


class Output(Overlay):
    """Lets its base act, then changes what comes out.

    On a kernel it fires at the kernel's contraction; on a bias (`kernel` names the bias's kernel), where the bias is
    added to that kernel's output. With `where = "residual"` it waits there for the residual add. Its functions see
    arrays with the layer's output features flattened into one last axis; what they return is cast to the base's dtype.

    Several on one leaf act each at its own place, and at one place from the inside out, every one on what the one
    below it made: at the output `y <- on_output(y)`, then at the residual add `h <- on_residual(h, r)` with the same
    stream r for all, and at last the sum `h + r`.

    Its functions are given the site (`peftjax.site.Site`): where they fire, and which axis has the tokens.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> from peftjax.overlay import Output, frozen, overlay, static, trained
      >>> @overlay
      ... class Shifted(Output):
      ...     "`y + scale c`, on a kernel (in, out)."
      ...     base: Any = frozen()
      ...     c: Any = trained()  # (out,)
      ...     scale: Any = frozen()  # ()
      ...     kernel: Any = static(default=None)
      ...     where: str = static(default="output")
      ...     locked: tuple[str, ...] = static(default=())
      ...     def labels(self):
      ...         return {"c": ((1,),), "scale": ()}
      ...     def on_output(self, y, site):
      ...         return y + self.scale * self.c
      >>> tuned = {"w": Shifted(base=jnp.ones((3, 2)), c=jnp.array([0.0, 1.0]), scale=jnp.ones(()))}
      >>> pj.wrap(lambda params, x: x @ params["w"])(tuned, jnp.ones((1, 3)))
      Array([[3., 4.]], dtype=float32)
    """

    merges = False
    kernel: str | None
    where: str

    def expand(self, terms: tuple[Any, ...]) -> tuple[Any, ...]:
        """The base's terms: the weight stays what it is."""
        return terms

    def ready(self) -> "Output":
        """What acts in its place in one call: an overlay whose fields may be computed from its own."""
        return self

    def on_output(self, y: Any, site: Any) -> Any:
        """The layer's output, of y's shape, from its base's output `y` (..., F)."""
        raise NotImplementedError(f"{type(self).__name__}.on_output")

    def on_residual(self, h: Any, r: Any, site: Any) -> Any:
        """What is added to the residual stream r (..., F) in the place of the layer's output h (..., F)."""
        raise NotImplementedError(f"{type(self).__name__}.on_residual")


class Table(Overlay):
    """Gives its base, a table of embeddings (vocabulary, D), more rows: ids from the vocabulary's size on read `rows()`."""

    merges = False

    def expand(self, terms: tuple[Any, ...]) -> tuple[Any, ...]:
        """The base's terms: the rows of the vocabulary stay what they are."""
        return terms

    def rows(self) -> Any:
        """The extra rows, (n, D)."""
        raise NotImplementedError(f"{type(self).__name__}.rows")
