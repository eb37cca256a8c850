"""The generated reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "tools" / "generate_reference.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("page", sorted(generate.PAGES))
def test_page_is_current(page: str) -> None:
    assert (ROOT / page).read_text("utf-8") == generate.PAGES[page](), "run: python tools/generate_reference.py"
