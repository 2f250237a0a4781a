"""Every test of the keys runs twice: with the best code this processor has, and with portable C."""

import pytest

from kvortex.keys._block_keys import use_portable_sha256


@pytest.fixture(autouse=True, params=[False, True], ids=["best", "portable"])
def sha256_code(request):
    use_portable_sha256(request.param)
    yield
    use_portable_sha256(False)
