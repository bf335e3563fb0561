"""How data sets refuse: shared by the tests of their refusals."""

import pytest

from descent.errors import DataError


def refusal(make, *args, **kwargs) -> str:
    """The one line with which `make` refuses."""
    with pytest.raises(DataError) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)
