"""What every refusal of bad input has in common, for the tests of all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dipole.errors import DipoleError


@contextmanager
def assert_refused(words: str) -> Iterator[pytest.ExceptionInfo[DipoleError]]:
    """Assert that the block raises a DipoleError that matches the pattern `words`, in one line."""
    with pytest.raises(DipoleError, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)
