from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_data() -> Path:
    """The data sets that are not ours to ship: $TERSOR_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("TERSOR_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set TERSOR_DATA")
    return folder
