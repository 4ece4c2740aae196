"""Formats of quantised weights, by the one name that files, the command line and the lab use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """A format: the dtype of the values, and how many inputs share a scale (None: all of them)."""

    dtype: str
    group: int | None


FORMATS = {"int8": Spec("int8", None), "int4": Spec("int4", 128), "fp8": Spec("float8_e4m3fn", 128)}
