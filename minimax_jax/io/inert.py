"""Pickles read as data: what they name is noted, and nothing of it is imported or called.

torch keeps descriptions of tensors as pickles. Python's own loader runs whatever a pickle names; here each class and
function is a name, and what a pickle makes by it keeps what it was made of.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from minimax_jax.errors import FormatError, Problem, saying
from minimax_jax.io.location import Location

_MOST_NAME = 200
_SHOWN = 200
_DAMAGE = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, struct.error)
"""What Python's loader says of damage."""

_TAKEN = (
    *(pickle.PROTO, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
)
"""Opcodes left to Python's loader. Others are of old protocols, or take memory that the pickle does not fill."""


@dataclass(eq=False, slots=True)
class Named:
    """A class or function that a pickle names, or what it makes by one.

    Attributes:
        name: its name, with its module.
        args: what it was called with; None for the class or function itself.
        state: what it was given afterwards.
    """

    name: str
    args: tuple[object, ...] | None = None
    state: object = None


def read_pickle(data: bytes, *, file: Location, what: str) -> object:
    """What a pickle describes: plain values, and `Named` for all else. A persistent id stands for itself.

    Args:
        data: the pickle, of protocol 2 or later.
        file: where it is from, for messages.
        what: what it is, likewise.

    Raises:
        FormatError: it is damaged, or not of the plain sort that describes tensors.
    """
    return _load(data, file, what)[0]


def names_in(data: bytes, *, file: Location, what: str) -> frozenset[str]:
    """The classes and functions that a pickle names, each with its module; arguments and errors as `read_pickle`."""
    return _load(data, file, what)[1]


def _load(data: bytes, file: Location, what: str) -> tuple[object, frozenset[str]]:
    loader = _Loader(io.BytesIO(data))
    try:
        return loader.load(), frozenset(loader.names)
    except _DAMAGE as error:
        got = f"{type(error).__name__}: {saying(error)}"[:_SHOWN]
        remedy = "copy the file again, or save the checkpoint anew"
        raise FormatError(Problem(what=f"{what} cannot be read", file=str(file), got=got, remedy=remedy)) from error


class _Loader(pickle._Unpickler):  # the one in C makes room for as many references as a pickle says that it has
    stack: list[Any]
    metastack: list[list[Any]]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.names: set[str] = set()
        self.read, self.readline = stream.read, stream.readline
        self.stack, self.metastack, self.proto = [], [], 0
        self.append = self.stack.append

    def load(self) -> object:
        """As the base class does it, but for frames: what is in memory is not read in parts."""
        read, dispatch = self.read, self.dispatch
        while (code := read(1)) != pickle.STOP:
            if not code:
                raise EOFError
            dispatch[code[0]](self)
        return self.stack.pop()

    def skip_frame(self) -> None:
        """The size of a frame."""
        self.read(8)

    def find_class(self, module: str, name: str) -> Named:
        """The name."""
        if len(module) + len(name) > _MOST_NAME:
            raise ValueError("name too long")
        self.names.add(f"{module}.{name}")
        return Named(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """The id."""
        return pid

    def call(self) -> None:
        """Note a call, or a new instance."""
        args = self.stack.pop()
        match self.stack[-1]:
            case Named(args=None) as made if isinstance(args, tuple):
                self.stack[-1] = Named(made.name, args)
            case _:
                raise TypeError("not a call of a class or function")

    def build(self) -> None:
        """Note a state."""
        state = self.stack.pop()
        match self.stack[-1]:
            case Named(args=tuple()) as made:
                made.state = state
            case _:
                raise TypeError("not the state of an instance")  # that of a class would change it for the whole process

    def set_item(self) -> None:
        """One item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set([(key, value)])

    def set_items(self) -> None:
        """Several of them."""
        found = self.pop_mark()
        self._set(zip(found[::2], found[1::2], strict=True))

    def _set(self, items: Iterable[tuple[object, object]]) -> None:
        for key, value in items:
            if not isinstance(key, str | Named) or not isinstance(self.stack[-1], dict):
                raise TypeError("not an item of a dict by name")  # a deep tuple would be hashed without bound
            self.stack[-1][key] = value

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _TAKEN},
        pickle.FRAME[0]: skip_frame,
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
    }
