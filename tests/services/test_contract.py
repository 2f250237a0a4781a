"""What every store promises, over real servers."""

from test_joined_blocks import *  # noqa: F403
from test_store_contract import *  # noqa: F403
