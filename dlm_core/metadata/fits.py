"""FITS headers (FITS standard 4.0) by astropy, an optional extra: ``pip install dlm[fits]``."""

from __future__ import annotations

import io
import math
import warnings
from functools import lru_cache
from typing import Any

from dlm_core.storages.port import ReadStream, Storage
from dlm_core.types import Observation, PayloadKind

_NAMES = (".fits", ".fit", ".fts", ".fits.gz", ".fits.fz")
_LIMIT = 256 << 20
_MAX_HDUS = 50
_LEFT_OUT = ("COMMENT", "HISTORY", "")


def extract(storage: Storage, path: str, seen: Observation) -> dict[str, Any] | None:
    """Cards of the primary header, and name, type and shape of each HDU; None for other files.

    Raises
    ------
    ValueError, OSError
        if the file is not what its name says, or above 256 MiB where it cannot be read in part.
    """
    if seen.kind is not PayloadKind.FILE or not path.lower().endswith(_NAMES):
        return None
    fits = _fits()
    if fits is None:
        return None
    with storage.open_read(path) as stream:
        file = stream if isinstance(stream, io.IOBase) and stream.seekable() else _whole(stream)
        try:
            with fits.open(file, lazy_load_hdus=True, memmap=False) as hdus:
                return {
                    "primary": _cards(hdus[0].header),
                    "hdus": [_summary(hdu) for _, hdu in zip(range(_MAX_HDUS), hdus, strict=False)],
                }
        except (TypeError, KeyError, IndexError, AttributeError, fits.VerifyError) as error:
            # what astropy raises for headers that are beyond repair
            raise ValueError(f"unreadable header: {error}") from error


@lru_cache(maxsize=1)
def _fits() -> Any:
    """astropy's module, or None where it is not installed."""
    try:
        from astropy.io import fits
    except ImportError:
        return None
    # what it says of odd cards would fill the logs; the cards are told as they stand
    warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
    warnings.filterwarnings("ignore", message="File may have been truncated")
    return fits


def _whole(stream: ReadStream) -> io.BytesIO:
    if stream.size > _LIMIT:
        raise ValueError(f"FITS headers are read up to {_LIMIT} bytes here")
    return io.BytesIO(stream.read())


def _cards(header: Any) -> dict[str, Any]:
    return {
        key: _value(header, key) for key in dict.fromkeys(header.keys()) if key not in _LEFT_OUT
    }


def _value(header: Any, key: str) -> Any:
    try:
        return _plain(header[key])
    except _fits().VerifyError:
        # one card against the standard does not spoil the others: it is told as it stands
        return header.cards[key].image.strip().replace("\0", "")


def _summary(hdu: Any) -> dict[str, Any]:
    axes = [hdu.header.get(f"NAXIS{n}") for n in range(1, int(hdu.header.get("NAXIS", 0)) + 1)]
    return {"name": str(hdu.name), "type": type(hdu).__name__, "axes": [_plain(a) for a in axes]}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    # JSON in PostgreSQL has no NUL
    return str(value).replace("\0", "")
