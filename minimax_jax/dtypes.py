"""The dtype names of the safetensors format and the numpy dtypes that hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from minimax_jax.errors import FormatError, Problem

# F4, F6_E2M3 and F6_E3M2 are left out: they pack several numbers into one byte, which no numpy dtype does.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "F32": np.dtype(np.float32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
    }
)
"""numpy dtype by format name."""

NAMES: Mapping[np.dtype[Any], str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
"""Format name by numpy dtype."""

FLOATS = ("BF16", "F32", "F16")
"""Names of the dtypes that weights may have when they are not quantised."""


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a format name such as `F8_E4M3`; the inverse of `name_of`.

    Raises:
        FormatError: the name is unknown, or names a dtype that packs several numbers into one byte.
    """
    if name not in DTYPES:
        raise FormatError(Problem(what="unsupported dtype", expected=f"one of {', '.join(DTYPES)}", got=name))
    return DTYPES[name]


def name_of(dtype: npt.DTypeLike) -> str:
    """The format name of a numpy dtype; the inverse of `dtype_of`.

    Raises:
        FormatError: safetensors has no such dtype.
    """
    found = np.dtype(dtype)
    if found not in NAMES:
        raise FormatError(
            Problem(what="safetensors cannot store this dtype", expected=", ".join(DTYPES), got=str(found))
        )
    return NAMES[found]
