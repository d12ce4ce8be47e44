"""Metadata of a GGUF file: typed values, to bytes and from bytes.

A value is ``u32 type | payload``, little endian. A string is ``u64 length | UTF-8``, an array ``u32 element type | u64 count |
elements``. Numbers of an array are kept as an ``array.array`` and its strings where they lie in the file: an array takes no
more memory than its part of the file, whatever it holds.
"""

import operator
import reprlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, overload

from lq_formats.errors import FormatError, SpecError, UnsupportedError

# Above any chat template, and above the largest tokenizer.json that converters embed. A decoded string has up to four bytes for
# each of its bytes in the file.
MAX_STRING = 64 << 20
MAX_KEY = (1 << 16) - 1
_SHOWN = 64


class ValueType(IntEnum):
    """The type of a metadata value; the number is the one in files."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# Codes that struct and array share, by the number in files.
_LETTERS: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
_SCALARS = {code: struct.Struct("<" + letter) for code, letter in _LETTERS.items()}
_BY_LETTER = {letter: ValueType(code) for code, letter in _LETTERS.items() if code != ValueType.BOOL}


class StringArray(Sequence[str]):
    """The strings of an array, decoded when they are asked for; where they are in the file has been checked.

    Args:
        buffer: Of the file.
        ends: Where each string ends.
        start: Where the first string's length is.
    """

    def __init__(self, buffer: memoryview, ends: "array[int]", start: int) -> None:
        self._buffer = buffer
        self._ends = ends
        self._start = start

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one string, or a list of some."""
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        begin = (self._ends[position - 1] if position else self._start) + 8
        return str(self._buffer[begin : self._ends[position]], "utf-8")

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings, the first {self[:3]})"


@dataclass(frozen=True)
class GGUFValue:
    """A typed metadata value.

    Attributes:
        type: Of the value.
        value: An ``int``, ``float``, ``bool`` or ``str``; of an array, an ``array.array`` of its numbers (booleans are 0 and 1)
            or a sequence of strings.
        element: Type of an array's elements; None for all else.
    """

    type: ValueType
    value: Any
    element: ValueType | None = None

    @classmethod
    def of(cls, value: Any) -> "GGUFValue":
        """Return a Python value with the type that GGUF writers give it.

        ``bool``, ``str`` and ``float`` (as FLOAT32) have one; an ``int`` is UINT32, else INT32, UINT64 or INT64, the first that
        holds it. A sequence is an array of one such type for all its items, an ``array.array`` one of its type code.

        Raises:
            SpecError: If the value has no such type.
        """
        if isinstance(value, GGUFValue):
            return value
        if isinstance(value, array):
            if value.typecode not in _BY_LETTER:
                raise SpecError(f"an array of type code {value.typecode!r}: expected one of {', '.join(_BY_LETTER)}")
            return cls(ValueType.ARRAY, value, _BY_LETTER[value.typecode])
        if isinstance(value, str | bool | int | float):
            return cls(_type_of([value]), value)
        if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | memoryview) or not len(value):
            raise SpecError(
                f"{value!r} has no GGUF type: expected a bool, int, float, str or a sequence of such that is not empty"
            )
        return cls(ValueType.ARRAY, value, _type_of(value))

    def encode(self) -> bytes:
        """Return the bytes of this value: type and payload.

        Raises:
            SpecError: If the value does not fit its type.
        """
        try:
            return _U32.pack(self.type) + self._payload()
        except (struct.error, OverflowError, TypeError, ValueError, AttributeError) as error:
            kind = self.type.name if self.element is None else f"ARRAY of {self.element.name}"
            raise SpecError(f"{reprlib.repr(self.value)} is not a GGUF value of type {kind}: {error}") from None

    def _payload(self) -> bytes:
        if self.type is ValueType.STRING:
            return encode_string(self.value)
        if self.type is not ValueType.ARRAY:
            return _SCALARS[self.type].pack(_byte(self.value) if self.type is ValueType.BOOL else self.value)
        if self.element is None or self.element is ValueType.ARRAY:
            raise ValueError("an array has one element type, not ARRAY")
        head = _U32.pack(self.element) + _U64.pack(len(self.value))
        if self.element is ValueType.STRING:
            return head + b"".join(encode_string(item) for item in self.value)
        if self.element is ValueType.BOOL:
            return head + bytes(map(_byte, self.value))
        letter = _LETTERS[self.element]
        if sys.byteorder == "little" and isinstance(self.value, array) and self.value.typecode == letter:
            return head + self.value.tobytes()
        return head + struct.pack(f"<{len(self.value)}{letter}", *self.value)


def _byte(value: Any) -> int:
    """Return a boolean as its byte."""
    number = operator.index(value)
    if number not in (0, 1):
        raise ValueError(f"{number} is no boolean: expected True or False")
    return number


def encode_string(text: str) -> bytes:
    """Return ``u64 length | UTF-8``."""
    octets = text.encode("utf-8")
    return _U64.pack(len(octets)) + octets


def quote(name: str) -> str:
    """Return a name of a file as messages show it: quoted, escaped and not longer than a line."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def _type_of(values: Sequence[Any]) -> ValueType:
    for kind, found in ((bool, ValueType.BOOL), (str, ValueType.STRING), (float, ValueType.FLOAT32)):
        if all(isinstance(value, kind) for value in values):
            return found
    if not all(type(value) is int for value in values):
        raise SpecError(f"{reprlib.repr(values)} mixes types: expected only bool, int, float or str")
    low, high = min(values), max(values)
    for bits in (32, 64):
        if low >= 0 and high < 1 << bits:
            return ValueType[f"UINT{bits}"]
        if -(1 << bits - 1) <= low and high < 1 << bits - 1:
            return ValueType[f"INT{bits}"]
    raise SpecError(f"{reprlib.repr(values)} does not fit 64 bits")


class Cursor:
    """Reads a file's header field by field; every count and length is held against the bytes that are left.

    Args:
        buffer: The whole file.
        name: Of the file, for messages.
    """

    __slots__ = ("_size", "buffer", "name", "position")

    def __init__(self, buffer: memoryview, name: str) -> None:
        self.buffer = buffer
        self.name = name
        self.position = 0
        self._size = len(buffer)

    def error(self, message: str) -> FormatError:
        """Return an error that names the file and the place."""
        return FormatError(f"{self.name}, byte {self.position}: {message}")

    def advance(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they begin."""
        begin = self.position
        if count > self._size - begin:
            raise self.error(
                f"{what} has {count} bytes and the file only {self._size - begin} more: truncated or damaged; fetch it again"
            )
        self.position = begin + count
        return begin

    def u32(self, what: str) -> int:
        """Read a u32."""
        number: int = _U32.unpack_from(self.buffer, self.advance(4, what))[0]
        return number

    def u64(self, what: str) -> int:
        """Read a u64."""
        number: int = _U64.unpack_from(self.buffer, self.advance(8, what))[0]
        return number

    def count(self, what: str, smallest: int, limit: int) -> int:
        """Read a u64 count of things that take ``smallest`` bytes or more each."""
        number = self.u64(f"the number of {what}")
        left = self._size - self.position
        if number > limit or number * smallest > left:
            raise self.error(
                f"the file claims {number} {what} in the {left} bytes that are left: expected at most "
                f"{min(limit, left // smallest)}; it is truncated or damaged"
            )
        return number

    def text(self, what: str, limit: int = MAX_STRING) -> str:
        """Read a string of at most ``limit`` bytes."""
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.error(f"{what} has {length} bytes: expected at most {limit}; the file is damaged")
        begin = self.advance(length, what)
        try:
            return str(self.buffer[begin : self.position], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason}): the file is damaged") from None

    def value(self, key: str) -> GGUFValue:
        """Read the type and payload of a metadata value; ``key`` is :func:`quote` of its key."""
        code = self.u32(f"the type of {key}")
        if code == ValueType.STRING:
            return GGUFValue(ValueType.STRING, self.text(f"the value of {key}"))
        if code == ValueType.ARRAY:
            return self._array(key)
        layout = _SCALARS.get(code)
        if layout is None:
            raise self.error(f"{key} has the value type {code}: expected 0 to 12; the file is damaged")
        number = layout.unpack_from(self.buffer, self.advance(layout.size, f"the value of {key}"))[0]
        if code == ValueType.BOOL:
            if number > 1:
                raise self.error(f"{key} is the boolean {number}: expected 0 or 1; the file is damaged")
            return GGUFValue(ValueType.BOOL, bool(number))
        return GGUFValue(ValueType(code), number)

    def _array(self, key: str) -> GGUFValue:
        code = self.u32(f"the element type of {key}")
        if code == ValueType.ARRAY:
            raise UnsupportedError(
                f"{self.name}: {key} is an array of arrays, which no model needs and lq does not read; leave it out"
            )
        layout = _SCALARS.get(code)
        if layout is None and code != ValueType.STRING:
            raise self.error(f"{key} has the element type {code}: expected 0 to 12; the file is damaged")
        size = 8 if layout is None else layout.size
        number = self.count(f"elements of {key}", size, 1 << 60)
        if layout is None:
            return GGUFValue(ValueType.ARRAY, self._strings(key, number), ValueType.STRING)
        begin = self.advance(number * size, f"the value of {key}")
        numbers = array(_LETTERS[code])
        numbers.frombytes(self.buffer[begin : self.position])
        if sys.byteorder == "big":
            numbers.byteswap()
        if code == ValueType.BOOL and number and max(numbers) > 1:
            raise self.error(f"{key} holds the boolean {max(numbers)}: expected 0 or 1; the file is damaged")
        return GGUFValue(ValueType.ARRAY, numbers, ValueType(code))

    def _strings(self, key: str, number: int) -> StringArray:
        start = self.position
        ends = array("Q", [0]) * number
        for index in range(number):
            self.text(f"a string of {key}")
            ends[index] = self.position
        return StringArray(self.buffer, ends, start)
