"""How a frozen weight is stored, as an option of commands that predict."""

from enum import StrEnum


class Weight(StrEnum):
    """How a frozen weight is stored."""

    dense = "dense"
    nf4 = "nf4"
    int8 = "int8"
    fp8 = "fp8"
    fp8_rows = "fp8-rows"
