"""Runs pickles on a machine that has nothing to call: what comes of them are plain values, containers and views.

A pickle is a program for a machine with a stack, and what makes it dangerous is that it can call whatever it names.
This one knows the names that `torch.save` writes, which stand for containers and for tensors, and refuses any other.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from math import prod
from typing import IO, Any, NamedTuple

# A checkpoint of 1558M and its optimizer takes 75,000 steps; one can take a microsecond and 100 bytes of memory.
STEPS_LIMIT = 2**19
# NumPy before 2.0 has no more dimensions.
DIMENSIONS_LIMIT = 32

# PyTorch's types: what a storage of them is called, ours and bytes.
STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
# Types that have no storage of their own are said beside the tensor, whose storage is of plain bytes.
ITEM_SIZES = dict(STORAGES.values()) | {"uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
UNTYPED = "torch.storage.UntypedStorage"
# What a pickle may name; what becomes of a call is in `Machine._call`.
CALLED = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
NAMES = {
    *CALLED,
    UNTYPED,
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    *(f"torch.{name}" for name in (*STORAGES, *ITEM_SIZES)),
}


class _Name(NamedTuple):
    """Something in Python or PyTorch that a pickle names."""

    name: str


class Storage(NamedTuple):
    """A run of numbers in the file: its key there, their type, None for bytes of any, and how many bytes they are."""

    key: str
    dtype: str | None
    size: int


class View(NamedTuple):
    """A tensor: which numbers of a storage it has; `offset` and `strides` count numbers, not bytes."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def reach(self) -> int:
        """How many numbers of the storage it spans, from its first to its last."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def transposed(self) -> View:
        """The same numbers, with the dimensions in the opposite order."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


class Machine:
    """Runs the pickles of one file; ValueError where they are damaged, or ask for anything but values and tensors."""

    def __init__(self) -> None:
        self.steps = 0
        self.storages: dict[str, Storage] = {}  # all that were described

    def run(self, data: io.BytesIO) -> Any:
        """What the next pickle in `data` describes, which is read to its end."""
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        code = b""
        try:
            while code != b".":
                self.steps += 1
                if self.steps > STEPS_LIMIT:
                    raise ValueError(f"takes more than the {STEPS_LIMIT:,} steps that such a file can have")
                code = data.read(1)
                opcode = _OPCODES.get(code)
                if opcode is None:  # whose argument isn't looked at: a number in digits can take minutes
                    raise ValueError(f"has a step {code!r}, which no file of tensors has" if code else "has no end")
                _STEPS[opcode.name](self, _read_argument(opcode, data))
            if len(self.stack) != 1:
                raise IndexError
        except (IndexError, KeyError, TypeError):
            raise ValueError("takes what isn't there") from None
        return self.stack[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def make_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.stack[len(self.stack) - size :] = [tuple(self.stack[len(self.stack) - size :])]

    def remember(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Others can take long to hash, or be made to have the same hash.
            if not (type(key) is str or (type(key) is int and abs(key) < 2**32)):
                raise ValueError(f"has a {type(key).__name__} as the key of a dictionary")
            target[key] = value

    def name(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(
                f"asks for {name[:200]!r}, which is neither a tensor nor a plain value, and is not run;"
                " if you trust the file, load it in PyTorch and save the model's state_dict() alone"
            )
        self.push(_Name(name))

    def call(self, _: None) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _call(self, function: object, arguments: Any) -> Any:
        """What PyTorch's functions of these names return."""
        if type(function) is not _Name or function.name not in CALLED or type(arguments) is not tuple:
            raise ValueError("calls what is no function")
        name = function.name.rpartition(".")[2]
        if name == "OrderedDict" and not arguments:
            return {}
        if name in ("Size", "device"):
            return arguments
        if name == "_rebuild_from_type_v2" and len(arguments) == 4:  # a tensor with attributes
            rebuild, _, arguments, _ = arguments
            if type(rebuild) is _Name and "_rebuild_tensor" in rebuild.name:
                return self._call(rebuild, arguments)
        if name.startswith("_rebuild_parameter") and arguments and type(arguments[0]) is View:
            return arguments[0]
        if name.startswith("_rebuild_tensor"):
            return self._tensor(name, *arguments)
        raise ValueError(f"calls {function.name} as PyTorch doesn't")

    def _tensor(
        self,
        name: str,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        _grad: Any = 0,
        _hooks: Any = 0,
        *more: Any,
    ) -> View:
        """more: the type, where the function is the one for bytes of any; then `{"conj": …, "neg": …}`, if they are."""
        dtype = getattr(storage, "dtype", None)
        if name == "_rebuild_tensor_v3":
            dtype, more = more[0].name.removeprefix("torch.") if type(more[0]) is _Name else None, more[1:]
        if type(storage) is not Storage or dtype not in ITEM_SIZES:
            raise ValueError("has a tensor of no storage")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise ValueError("has a tensor of no shape")
        if len(shape) > DIMENSIONS_LIMIT or not all(map(_is_size, (offset, *shape, *strides))):
            raise ValueError("has a tensor of an impossible shape")
        if any(more):
            raise ValueError("has a tensor whose numbers are to be negated or conjugated")
        tensor = View(storage, dtype, shape, strides, offset)
        if 0 not in shape and (offset + tensor.reach) * ITEM_SIZES[dtype] > storage.size:
            raise ValueError("has a tensor that reaches beyond the end of its storage")
        return tensor

    def build(self, _: None) -> None:
        """Attributes of a dictionary, where modules note their versions, change nothing."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError(f"sets attributes of a {type(self.stack[-1]).__name__}")

    def storage(self, _: None) -> None:
        described = self.stack.pop()
        if type(described) is not tuple or len(described) not in (5, 6) or described[0] != "storage":
            raise ValueError("asks for something outside of it that is no storage")
        _, kind, key, _, count, *view = described
        if type(kind) is not _Name or type(key) is not str or not _is_size(count) or any(view):
            raise ValueError("has a storage that is not described properly")
        dtype, item_size = (None, 1) if kind.name == UNTYPED else STORAGES[kind.name.removeprefix("torch.")]
        storage = Storage(key, dtype, count * item_size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"describes the storage {key[:20]!r} in two ways")
        self.push(storage)


_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), Machine.push
    ),
    "MARK": Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BINPUT": Machine.remember,
    "LONG_BINPUT": Machine.remember,
    "MEMOIZE": Machine.remember,
    "BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.push(machine.memo[number]),
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": lambda machine, _: machine.name(".".join([machine.stack.pop(-2), machine.stack.pop()])),
    "REDUCE": Machine.call,
    "BUILD": Machine.build,
    "BINPERSID": Machine.storage,
}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in _STEPS}


def _read_argument(opcode: pickletools.OpcodeInfo, data: IO[bytes]) -> Any:
    """What stands behind a step, if anything does."""
    if opcode.name == "GLOBAL":  # a module and a name in it, each on a line, which pickletools would unquote
        module, name = data.readline(), data.readline()
        if not name.endswith(b"\n"):
            raise ValueError("ends within a name")
        return f"{module[:-1].decode()}.{name[:-1].decode()}"
    return opcode.arg.reader(data) if opcode.arg else None
