"""What each parameter does in a model, from one abstract trace: `roles(fn, params, *args)`."""

import dataclasses
import math
from typing import Any, Callable, Iterator, Mapping, Sequence

import jax

from peftjax.call import Call
from peftjax.overlay import type_of
from peftjax.role_book import CONTRACTED, PRODUCTS, Book, Notes
from peftjax.role_values import MIXING, UNKNOWN, Act, Derived, Fixed, Head, Product, Source, Track, Value, heads
from peftjax.role_walk import walk
from peftjax.streams import streams
from peftjax.views import Layout


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm (`centred`) or an RMS norm: the paths of its scale and bias, and the constant below its root.

    It multiplies by `offset` and the scale: an offset of 1 is that of norms whose scale starts at zero.
    """

    scale: str | None
    bias: str | None
    eps: float
    centred: bool = True
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Role:
    """What one parameter does.

    Attributes:
        op: "linear", "conv", "embedding" (looked up first), "bias" (added), "scale" (multiplied), "other" or "unused".
        axes: a letter for each axis: i in (contracted or looked up), o out, b batch (an expert), s stacked (a layer);
            "?" where a reshape cuts one axis into parts of several kinds, which `unclear` tells.
        order: its place among all leaves, by first use.
        uses: the names of the equations that use it, in order.
        bias: of a kernel, the path of the bias that is added to its output.
        kernel: of a bias or of a scale, the path of the kernel whose output it meets.
        residual: of a kernel, whether its output is added to the residual stream before anything nonlinear.
        norm: of such a kernel, the norm that is all that reads the sum, and stands for the stream from there (post-LN).
        unread: of such a kernel, whether all that reads the sum is what may be a norm, and is none that is known.
        sublayer: of a residual kernel, what it ends: "attention" where it reads a mixture of what kernels made of the stream
            (queries and keys), else "feed-forward"; "unknown" where some equation does not show what it mixes.
        head: whether it makes the output: no other kernel contracts what it makes, and no later one reaches an output.
        groups: of a convolution, the number of its groups.
        window: of a convolution, the axes of its window.
        unclear: which axes have parts of several kinds, and which equations made them so; else empty.
        follows: of a bias, for each of its axes those of its kernel that it lies along; None where that is not known, or
            where the bias is added to something else too.
        rotary: of a kernel, whether entries of its output are added to each other, as rotary positions do.
        bent: of a kernel, whether something happens to its output that is not linear before it is contracted again.

    Example:
        >>> import jax.numpy as jnp, peftjax as pj
        >>> fn = lambda params, x: x @ params["w"] + params["b"][None]
        >>> role = pj.roles(fn, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((1, 3)))["w"]
        >>> role.op, role.axes, role.bias
        ('linear', 'io', 'b')
    """

    op: str
    axes: str
    order: int
    uses: tuple[str, ...] = ()
    bias: str | None = None
    kernel: str | None = None
    residual: bool = False
    norm: Norm | None = None
    sublayer: str | None = None
    head: bool = False
    groups: int = 1
    window: tuple[int, ...] = ()
    follows: tuple[tuple[int, ...], ...] | None = None
    unclear: str = ""
    rotary: bool = False
    bent: bool = False
    unread: bool = False


class Roles(Mapping[str, Role]):
    """The role of each leaf by its path, in tree order; immutable.

    Args:
        items: a mapping, or pairs, of path and `Role`.

    Example:
        >>> Roles({"w": Role(op="linear", axes="io", order=0, uses=("dot_general",))})["w"].axes
        'io'
    """

    def __init__(self, items: Any) -> None:
        self._roles: dict[str, Role] = dict(items)

    def __getitem__(self, path: str) -> Role:
        return self._roles[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __hash__(self) -> int:
        return hash(tuple(self._roles.items()))

    def __repr__(self) -> str:
        rows = [("path", "op", "axes", "uses", "")]
        rows += [(path, r.op, r.axes, " ".join(r.uses), _remarks(r)) for path, r in self.items()]
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]).rstrip() for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """The roles as plain values.

        Returns:
            Dicts, lists, strings and numbers, fit for JSON.

        Example:
            >>> Roles({"w": Role("linear", "io", 0)}).to_dict()["w"]["axes"]
            'io'
        """
        return {path: {**dataclasses.asdict(role), "uses": list(role.uses)} for path, role in self.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Roles":
        """The inverse of `to_dict`.

        Args:
            plain: what `to_dict` gave.

        Returns:
            The roles.

        Example:
            >>> roles = Roles({"w": Role("linear", "io", 0)})
            >>> Roles.from_dict(roles.to_dict()) == roles
            True
        """
        norm = lambda fields: fields["norm"] and Norm(**fields["norm"])
        sequences = lambda fields: {name: tuple(fields[name]) for name in ("uses", "window")}
        follows = lambda fields: fields["follows"] and tuple(map(tuple, fields["follows"]))
        make = lambda f: Role(**{**f, **sequences(f), "norm": norm(f), "follows": follows(f)})
        return cls({path: make(fields) for path, fields in plain.items()})


def _remarks(role: Role) -> str:
    said = [f"bias {role.bias}" if role.bias else "", f"of {role.kernel}" if role.kernel else ""]
    said += [f"residual, after {role.sublayer}" if role.residual else "", f"then {role.norm}" if role.norm else ""]
    said += [
        "rotary" if role.rotary else "",
        "then a norm that is not known" if role.unread else "",
        "head" if role.head else "",
        f"groups {role.groups}" if role.groups > 1 else "",
    ]
    return ", ".join(filter(None, said))


def roles(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Roles:
    """What each parameter does in a model, read from one abstract trace; nothing is computed.

    Args:
        fn: the model, a function of `params` and of the other arguments, which can be traced.
        params: its parameters: arrays, `jax.ShapeDtypeStruct`s, or overlays (read as the arrays they stand for).
        *args: its other arguments. Arrays and `jax.ShapeDtypeStruct`s are traced, everything else is static.
        **kwargs: the same, by name.

    Returns:
        The `Roles`, one for each leaf of `params`.

    Raises:
        Exception: whatever `fn` raises when it is traced.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]
        >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.zeros(8), "down": jnp.ones((8, 2))}
        >>> found = roles(fn, params, jax.ShapeDtypeStruct((3, 4), "float32"))
        >>> found["up"].axes, found["up"].bias, found["down"].head
        ('io', 'bias', True)
    """
    call = Call.of(params, args, kwargs)
    types = [(call.paths.get(k), type_of(call.leaves[k])) for k in call.dynamic]
    closed = _traced(fn, call, [x for _, x in types])
    fixed = [path is not None for path, _ in types]
    book = Book({path: x.ndim for path, x in types if path is not None}, streams(closed, fixed))
    values: list[Value] = [Act() if path is None else Fixed((Track(path, Layout.of(x.shape)),)) for path, x in types]
    outs = walk(book, closed, values)
    for value in outs:
        value.touch()
    head = _head(book, heads(outs))
    place = {path: k for k, path in enumerate(sorted(book.notes, key=lambda path: book.notes[path].first))}
    return Roles({path: _role(book, path, place[path], path == head) for path in book.notes})


def _traced(fn: Callable[..., Any], call: Call, types: Sequence[Any]) -> Any:
    def flat(*arrays: Any) -> Any:
        params, args, kwargs = call.filled(arrays)
        return fn(params, *args, **kwargs)

    return jax.make_jaxpr(flat)(*types)


def _head(book: Book, found: frozenset[Head]) -> str | None:
    """The head: the last kernel to reach an output, unless it adds to a stream, or is the only kernel there is."""
    last = max(found, default=None)
    if last is None:
        return None
    notes = book.notes[last.path]
    alone = sum(n.op in CONTRACTED for n in book.notes.values()) == 1
    return None if alone or notes.product and notes.product.total else last.path


def _role(book: Book, path: str, order: int, head: bool) -> Role:
    notes = book.notes[path]
    times = sum(use in PRODUCTS for use in book.notes[notes.kernel].uses) if notes.kernel else 0
    op = notes.op or notes.hint or ("other" if notes.uses else "unused")
    follows = None if notes.strays or notes.meetings > times else notes.follows
    sublayer = _sublayer(notes.product) if notes.product and notes.product.total else None
    more = dict(bias=notes.bias, kernel=notes.kernel, residual=sublayer is not None, norm=_norm(notes))
    more |= dict(sublayer=sublayer, head=head, groups=notes.groups, window=notes.window, follows=follows)  # type: ignore[dict-item]
    turned, bent = (bool(notes.product and getattr(notes.product, name)) for name in ("turned", "bent"))
    more |= dict(unclear=notes.unclear, rotary=turned, bent=bent)  # type: ignore[dict-item]
    more |= dict(unread=_unread(notes))  # type: ignore[dict-item]
    return Role(op, notes.axes, order, tuple(notes.uses), **more)  # type: ignore[arg-type]


def _sublayer(product: Product) -> str:
    """What ends at a residual sum, told by what the kernel before it read."""
    if MIXING in product.reads:
        return "attention"
    return "unknown" if UNKNOWN in product.reads else "feed-forward"


def _norm(notes: Notes) -> Norm | None:
    """The norm of the residual sum, where nothing else reads the sum, and the stream itself was not read by a norm."""
    product = notes.product
    if product is None or product.total is None or product.stream is None:
        return None
    found: Derived | None = product.total.norm
    if found is None or product.total.escaped or product.stream.normed or not _over_features(found, product.total):
        return None
    scale, offset = found.scale or (None, 0.0)
    return Norm(scale, found.bias, found.eps, found.centred, offset)


def _over_features(norm: Derived, total: Source) -> bool:
    """Whether a norm of a residual sum is taken over the axes of the layer's outputs."""
    if norm.ndim == len(total.shape):
        return frozenset(norm.axes) == total.features
    return norm.count == math.prod(total.shape[k] for k in total.features)


def _unread(notes: Notes) -> bool:
    """Whether what follows the residual sum may be its norm, and cannot be read."""
    product = notes.product
    if product is None or product.total is None or product.stream is None or _norm(notes):
        return False
    return product.total.normed and not product.total.left and not product.stream.normed
