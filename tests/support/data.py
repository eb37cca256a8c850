"""Where real data lies, and what to do when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(relative: str) -> Path:
    """A file or folder of the shared data; skips the test when it is not on this machine."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"real data {relative} is not on this machine")
    return path
