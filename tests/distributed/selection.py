"""What `make test` leaves to `make test-distributed`: more than two ranks, and faults that take long to notice."""

import os

import pytest

LATER = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("K2_ALL_RANKS"), reason="make test-distributed runs it"),
]
