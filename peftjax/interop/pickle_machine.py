"""A machine that follows a pickle without running it: it knows dictionaries, lists and numbers, and calls nothing.

A pickle is a program, and the usual reader calls whatever it names. This one stops at every instruction and every name
that a file of arrays does not need; what the admitted names make is up to the format (`Format`).
"""

import pickletools
from typing import IO, Any, Collection, NamedTuple, Protocol

LIMIT = 1_000_000  # instructions; a state of a thousand tensors takes some thirty thousand
VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
BYTES = {"BINBYTES", "SHORT_BINBYTES"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """A name that the program may use; it stands for itself and is never looked up."""

    module: str
    name: str


class Format(Protocol):
    """What a kind of file may ask for: which names, and what stands for what it makes of them."""

    @property
    def admitted(self) -> Collection[tuple[str, str]]:
        """The names, each a module's and one in it."""

    def made(self, name: Any, arguments: Any) -> Any:
        """What a call of a name gives; raises ValueError where it is none that arrays need."""

    def built(self, value: Any, state: Any) -> Any:
        """What a value is once it has its state; raises ValueError likewise."""

    def persistent(self, reference: Any) -> Any:
        """What a reference out of the program stands for; raises ValueError likewise."""


class Mark:
    """Where a run of items begins on the stack."""


class Program:
    """The machine: a stack, a memory, and a format that says what its names mean."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, code: bytes | IO[bytes]) -> Any:
        """What the program leaves on the stack; of a file, it reads no further than the program's end.

        Raises:
          ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError: the program is
            damaged, or asks for more than the format admits.
        """
        for count, (op, argument, _) in enumerate(pickletools.genops(code)):
            if count > LIMIT:
                raise ValueError(f"more than {LIMIT} instructions")
            if op.name == "STOP":
                if len(self.stack) != 1:
                    raise ValueError(f"it ends with {len(self.stack)} values, expected one")
                return self.stack.pop()
            self._step(op.name, argument)
        raise ValueError("it does not end")

    def _step(self, op: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if op in VALUES or op in BYTES:
            push(argument)
        elif op in CONSTANTS:
            push(CONSTANTS[op])
        elif op in ("PROTO", "FRAME"):
            pass
        elif op == "MARK":
            push(Mark)
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[op])
        elif op in TUPLES or op == "TUPLE":
            push(tuple(reversed([pop() for _ in range(TUPLES[op])])) if op in TUPLES else tuple(self._run()))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memory[len(self.memory) if argument is None else argument] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            push(self.memory[argument])
        elif op == "GLOBAL":
            push(self._admitted(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = pop(), pop()
            push(self._admitted(module, name))
        elif op in ("SETITEM", "SETITEMS"):
            items = self._run() if op == "SETITEMS" else list(reversed([pop(), pop()]))
            self._of(dict).update(zip(items[::2], items[1::2], strict=True))
        elif op in ("APPEND", "APPENDS"):
            items = self._run() if op == "APPENDS" else [pop()]
            self._of(list).extend(items)
        elif op == "BINPERSID":
            push(self.format.persistent(pop()))
        elif op == "REDUCE":
            arguments, name = pop(), pop()
            push(self.format.made(name, arguments))
        elif op == "BUILD":
            state, value = pop(), pop()
            push(self.format.built(value, state))
        else:
            raise ValueError(f"it uses the instruction {op}, which no dictionary of arrays needs")

    def _run(self) -> list[Any]:
        start = max(k for k, x in enumerate(self.stack) if x is Mark)  # by identity: arrays compare by element
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _of(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__}, expected a {kind.__name__}")
        return self.stack[-1]

    def _admitted(self, module: Any, name: Any) -> Name:
        if (module, name) not in self.format.admitted:
            raise ValueError(f"it asks for {module}.{name}, which is not run; only arrays are read")
        return Name(module, name)
