"""What pydicom raises when a header is damaged: values are only decoded when looked at, and each kind fails its own way."""

from __future__ import annotations

import struct

from pydicom.errors import BytesLengthException, InvalidDicomError

#: Catch these only where the header of a received object is read, and say which object it was.
DAMAGE: tuple[type[Exception], ...] = (
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
