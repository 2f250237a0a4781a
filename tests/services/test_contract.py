"""What every store promises, over real servers."""

from test_store_contract import *  # noqa: F403
