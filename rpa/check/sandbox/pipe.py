"""Numbered messages over a pipe between two processes.

A message is a number and an object. It travels as its length and its pickle, so that a reader knows
where it ends, and half a message (its writer was killed) is an EOFError instead of nonsense.
"""

import pickle
import struct
from typing import BinaryIO

_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 20


def send(stream: BinaryIO, number: int, message: object) -> None:
    """Write a message; it is pickled as a whole first, so what cannot be pickled sends nothing.

    Raises:
        OSError: the reader is gone.

    >>> import io
    >>> stream = io.BytesIO()
    >>> send(stream, 7, "text")
    >>> _ = stream.seek(0)
    >>> receive(stream)
    (7, 'text')
    """
    data = pickle.dumps((number, message))
    for part in (_LENGTH.pack(len(data)), data):
        rest = memoryview(part)
        while rest:  # an unbuffered stream writes as much as its pipe has room for
            rest = rest[stream.write(rest) :]
    stream.flush()


def receive(stream: BinaryIO) -> tuple[int, object]:
    """Read the next message, (number, object).

    Raises:
        EOFError: the writer is gone, perhaps in the middle of a message.
    """
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    return pickle.loads(_read(stream, length))


def _read(stream, num_bytes):
    data = bytearray()
    while len(data) < num_bytes:
        part = stream.read(min(num_bytes - len(data), _CHUNK_BYTES))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
