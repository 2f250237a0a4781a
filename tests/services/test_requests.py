"""Blocks that share a value, counted by the server."""

import redis
from test_joined_blocks import COUNT, get, put
from tier_rig import HEADER_BYTES, PAYLOAD_BYTES, SPACE, TAG, RemoteRig, keys_of
from tiered_rig import wait_until

from kvortex.index import BlockIndex
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.view import Names, View


def calls(server):
    """How often a server was asked for each command."""
    stats = redis.Redis(port=server.port).info("commandstats")
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}


def test_a_server_is_asked_once_for_each_object(settings_of, redis_server):
    settings = settings_of("redis")
    rig = RemoteRig(settings.client(HEADER_BYTES), name_format=settings.key_prefix + "{name}")
    catalogue = BlockIndex(100)
    catalogue.add_slots(0, 100)
    names = Names(SPACE, 0, settings.key_prefix + "{name}")
    view = View(settings.client(HEADER_BYTES), names, PAYLOAD_BYTES, catalogue, TAG, 10)
    before = calls(redis_server)
    assert put(rig, range(3 * COUNT)) == [BlockStatus.OK] * 3 * COUNT
    question = view.ask(keys_of(range(5 * COUNT)), count=COUNT)
    wait_until(lambda: question.is_over)
    assert catalogue.lookup(keys_of(range(5 * COUNT)))[1] == 3 * COUNT
    assert get(rig, range(3 * COUNT)) == [BlockStatus.OK] * 3 * COUNT
    after = calls(redis_server)
    for command, num_calls in (("set", 3), ("strlen", 5), ("get", 3)):
        assert after[command] - before.get(command, 0) == num_calls, command
    view.stop()
    view.client.close()
    rig.close()
