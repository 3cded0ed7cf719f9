"""Fixtures every test may use: a fixed seed, and the folder of real data sets where there is one."""

from pathlib import Path

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a cache folder of its own, so that no test sees what another decomposed."""
    monkeypatch.setenv("SVDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets, `../shared/data` beside the checkout; skips where it does not exist."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}, which is not there")
    return SHARED_DATA
