"""A pytest plugin: wherever vLLM's own tests make a connector, KVortex's is made in its place.

* A scheduler without a connector gets KVortex's.
* `ExampleConnector` and `NixlConnector` are replaced.
* `MockKVConnector` claims tokens that a test makes up: KVortex stands beside it, in a `MultiConnector`.
* `create_mock_connector()` answers what a test says: KVortex is told all the same, as beside another connector.
* Configurations of a KV cache name no tensors in these tests: KVortex's get those that vLLM always makes.

There are no workers, so that every save fails at once; else requests would wait for what others are saving.
"""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.v1.kv_cache_interface import KVCacheTensor

from kvortex.integrations.vllm import KVortexConnector
from kvortex.integrations.vllm.messages import SAVE, StepMetadata, WorkerReport
from kvortex.integrations.vllm.scheduler import SchedulerHalf

OURS = {
    "kv_connector": "KVortexConnector",
    "kv_connector_module_path": "kvortex.integrations.vllm",
    "kv_connector_extra_config": {"cpu_pool_size_bytes": "64MiB"},
}
TOLD = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output",
    "request_finished", "take_events", "get_kv_connector_stats",
)  # fmt: skip
made, num_made = [], 0  # the connectors of the test that runs, and how many there were


class BesideMock(MultiConnector):
    """Tests look into the metadata of the mock."""

    def build_connector_meta(self, scheduler_output):
        metadata = super().build_connector_meta(scheduler_output)
        metadata.requests = metadata.metadata[0].requests
        return metadata


class MockWithGroups(base.SupportsHMA):
    """Makes a mock one that vLLM lets stand in a `MultiConnector`; every test has one KV cache group."""

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids[0])


class Told(Mock):
    """A method of a mocked connector that tells KVortex first, and answers what the test says."""

    def __call__(self, *args, **kwargs):
        tell = self.__dict__.get("tell")
        if tell is not None:
            tell(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _get_child_mock(self, **kwargs):
        return Mock(**kwargs)


def substitute(config):
    if config.kv_connector in ("ExampleConnector", "NixlConnector"):
        for name, value in OURS.items():
            setattr(config, name, value)
    elif config.kv_connector == "MockKVConnector" and not config.kv_connector_extra_config.pop("beside", False):
        mock = {"kv_connector": "MockKVConnector", "kv_role": config.kv_role}
        mock["kv_connector_extra_config"] = {**config.kv_connector_extra_config, "beside": True}
        config.kv_connector, config.kv_connector_module_path = "BesideMock", __name__
        config.kv_connector_extra_config = {"connectors": [mock, {**OURS, "kv_role": config.kv_role}]}


def tell_kvortex(create):
    def create_mock_connector():
        connector = create()
        if made:
            kvortex = made[-1]

            def update_state_after_alloc(request, blocks, num_external_tokens):
                kvortex.update_state_after_alloc(request, blocks, 0)  # what the mock has is not from KVortex

            for name in TOLD:
                method = Told()
                method.__dict__["tell"] = locals().get(name) or getattr(kvortex, name)
                setattr(connector, name, method)
        return connector

    return create_mock_connector


def with_tensors(config):
    """`config` with a tensor for the layers of each group, as vLLM makes it where layers are alike."""
    if config.kv_cache_tensors:
        return config
    tensors = []
    for group in config.kv_cache_groups:
        page_bytes = group.kv_cache_spec.page_size_bytes
        layer_bytes = page_bytes * config.num_blocks
        tensors.append(
            KVCacheTensor(
                size=layer_bytes * len(group.layer_names),
                layers=group.layer_names,
                layer_stride=layer_bytes,
                block_stride=page_bytes,
            )
        )
    return replace(config, kv_cache_tensors=tensors)


def pytest_configure(config):
    after_init, init = KVTransferConfig.__post_init__, KVortexConnector.__init__

    def post_init(self):
        substitute(self)
        after_init(self)

    def noted(self, vllm_config, role, kv_cache_config):
        global num_made
        init(self, vllm_config, role, with_tensors(kv_cache_config))
        made.append(self)
        num_made += 1

    after_config = VllmConfig.__post_init__

    def post_config(self):
        if self.kv_transfer_config is None and self.model_config is not None:
            self.kv_transfer_config = KVTransferConfig(**OURS, kv_role="kv_both")
        after_config(self)

    build = SchedulerHalf.build

    def build_and_fail(self, output):
        step = build(self, output)
        for save in step.of(SAVE):
            report = WorkerReport()
            report.add(SAVE, save.number, bad=save.slots)
            self.reported(report)
        return step

    SchedulerHalf.build = build_and_fail
    StepMetadata.requests = ()  # tests look into the metadata of the mock
    VllmConfig.__post_init__ = post_config
    KVTransferConfig.__post_init__ = post_init
    KVortexConnector.__init__ = noted
    from tests.v1.kv_connector.unit import utils

    utils.MockKVConnector.__bases__ = (*utils.MockKVConnector.__bases__, MockWithGroups)
    utils.create_mock_connector = tell_kvortex(utils.create_mock_connector)


def pytest_runtest_setup(item):
    made.clear()


def pytest_collection_modifyitems(items):
    """What does not apply must fail; see the list."""
    lines = (Path(__file__).parent / "does_not_apply.txt").read_text().splitlines()
    reasons, reason = {}, []
    for line in lines:
        if line.startswith("#"):
            reason.append(line[1:].strip())
        elif line:
            reasons[line] = " ".join(reason)
        else:
            reason = []
    listed = set()
    for item in items:
        for name in (item.name, item.name.partition("[")[0]):
            if name in reasons:
                listed.add(name)
                item.add_marker(pytest.mark.xfail(reason=reasons[name], strict=True))
                break
    if stale := reasons.keys() - listed:
        raise pytest.UsageError(f"does_not_apply.txt names tests that are not there: {', '.join(sorted(stale))}")


def pytest_sessionfinish(session):
    """Were nothing replaced, every test would pass as well."""
    if num_made < session.testscollected // 2:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    print(f"\n{num_made} of KVortex's connectors took part")
