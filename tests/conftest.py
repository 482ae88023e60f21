"""What tests share: the long counts of `--campaign`, and real text where the machine has it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

CAMPAIGN_SECONDS = 4 * 3600  # of one test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run fault, fuzz and soak tests at their full counts")
    parser.addoption("--fake-gpu", metavar="FOLDER", help="of a fake H100 (its README): run tests of a CUDA build")


def pytest_configure(config: pytest.Config) -> None:
    # Whoever starts us in the background may have SIGINT ignored, which every process inherits: Ctrl-C could not be tested.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--campaign"):  # limits are of the small counts
        for item in items:
            item.add_marker(pytest.mark.timeout(CAMPAIGN_SECONDS), append=False)


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Choose how often a fault test repeats: `count(small, full)`, the full one under --campaign."""
    campaign = bool(request.config.getoption("--campaign"))
    return lambda small, full: full if campaign else small


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text shards beside the checkout: a must under CI=true, elsewhere the test skips without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "cpp-docs").is_dir():
        reason = "needs the real text of ../shared/data beside the checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}: under CI=true it has to be there")
        pytest.skip(reason)
    return folder
