"""Coded concepts, the way DICOM writes them (PS3.3 section 8), and the few that caregrid itself speaks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A coded concept: value, coding scheme designator (SCT, DCM, UCUM, 99CAREGRID …) and meaning."""

    value: str
    scheme: str
    meaning: str

    def as_list(self) -> list[str]:
        """The triple as JSON keeps it."""
        return [self.value, self.scheme, self.meaning]

    @classmethod
    def from_list(cls, triple: list[str] | tuple[str, ...]) -> Code:
        """Read a triple; raises ValueError when it is not three non-empty texts."""
        if len(triple) != 3 or not all(isinstance(part, str) and part for part in triple):
            raise ValueError(f"a code is [value, scheme, meaning], not {triple!r}")
        return cls(*triple)


# UCUM units
NO_UNITS = Code("1", "UCUM", "no units")
PERCENT = Code("%", "UCUM", "percent")
MILLIMETRE = Code("mm", "UCUM", "mm")
SQUARE_CENTIMETRE = Code("cm2", "UCUM", "cm2")
MILLILITRE = Code("ml", "UCUM", "ml")
HOUNSFIELD = Code("[hnsf'U]", "UCUM", "Hounsfield unit")

# Presence, for qualitative findings (SNOMED CT)
PRESENT = Code("52101004", "SCT", "Present")
ABSENT = Code("2667000", "SCT", "Absent")
INDETERMINATE = Code("82334004", "SCT", "Indeterminate")
