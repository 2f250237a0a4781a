"""What the pages show of torch and of vLLM runs as printed. `tests/meta/test_pages.py` has the rest."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pages
import pytest
from vllm.config import KVTransferConfig

from kvortex.integrations.vllm import options

EXAMPLES = pages.python_examples(with_torch=True)
CONNECTOR = pages.ROOT / "kvortex/integrations/vllm/README.md"


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_example_with_torch_runs_as_printed(example, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, f"{example}\n{done.stderr}"


def test_vllm_takes_the_configuration_that_readme_shows():
    config = KVTransferConfig(**pages.transfer_config())
    taken = options.ConnectorOptions.parse(config.kv_connector_extra_config)
    assert config.is_kv_transfer_instance and taken.engine.cpu_pool_size_bytes == 32 << 30


def test_the_table_of_options_names_those_that_there_are():
    rows = pages.table(pages.section(CONNECTOR, "Options"))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    own = {field.name for field in fields(options.ConnectorOptions)} - {"engine", options.BLOCKS_PER_OBJECT}
    assert named == {
        *own, *options.ENGINE_OPTIONS, "disk_path", *options.TIER_SIZES, *options.CODED, *options.REMOTE,
    }  # fmt: skip


def test_the_table_of_options_shows_their_defaults():
    rows = {row[0]: row[1] for row in pages.table(pages.section(CONNECTOR, "Options"))}
    found = options.ConnectorOptions.parse({"cpu_pool_size_bytes": 1 << 30})
    for name in ("load_async", "save", "save_after_hits", "promote_timeout_ms", "flush_timeout_ms", "verify"):
        assert rows[f"`{name}`"].strip("`") == json.dumps(getattr(found, name)), name
    assert rows["`gather_ctas`"] == str(found.engine.gather_ctas)
    assert rows["`max_jobs`, `shutdown_timeout_ms`"] == f"{found.engine.max_jobs}, {found.engine.shutdown_timeout_ms}"
