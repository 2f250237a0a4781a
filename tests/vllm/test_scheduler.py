"""The connector under a real vLLM scheduler: what is kept, what comes back, and what must wait for whom.

Every test ends with `require_clean`: no token was read wrong, nothing is left pinned, written or in flight.
"""

import pytest
from rig import BLOCK_TOKENS
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256

from kvortex.integrations.vllm.connector import keeps_blocks_of_aborted_loads
from kvortex.integrations.vllm.keys import as_keys

try:
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector as AuxOutputs
except ImportError:  # before 0.32
    AuxOutputs = None


def leading(rig, request_id):
    """How many leading blocks of a request's prompt are in host memory."""
    request = rig.requests[request_id]
    return rig.index.lookup(as_keys(request.block_hashes[: request.num_prompt_tokens // BLOCK_TOKENS]))[1]


# ---- hits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_a_prompt_seen_before_comes_from_host_memory(make_rig, prompt, load_async, pipelined):
    rig = make_rig(load_async=load_async, pipelined=pipelined)
    assert rig.serve("first", prompt("p", 100), 20) == 0
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100), 20) == 96
    assert rig.outputs("first") == rig.outputs("second") and len(rig.outputs("second")) == 20
    rig.require_clean()


def test_of_a_whole_prompt_in_host_memory_one_token_is_computed(make_rig, prompt, load_async):
    """Where the load is inside the step, a block is: vLLM computes at least one token, and we load whole blocks."""
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 96), 20)
    rig.forget_device()
    assert rig.serve("second", prompt("p", 96), 20) == (95 if load_async else 80)
    rig.require_clean()


def test_the_last_block_alone_is_not_worth_a_load(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 96))
    matched = rig.half.blocks_matched
    assert rig.serve("second", prompt("p", 96)) == 80  # by vLLM's own prefix cache
    assert rig.half.blocks_matched == matched
    rig.require_clean()


def test_the_last_block_alone_is_not_worth_waiting_for_its_save(make_rig, prompt, host):
    rig = make_rig()
    rig.serve("first", prompt("p", 80))
    host.hold()
    rig.add("writer", prompt("p", 96), 1)
    rig.step_until_served()
    assert len(rig.half.writing) == 1 and rig.scheduler.reset_prefix_cache()
    rig.add("second", prompt("p", 96), 1)
    rig.step()
    assert list(rig.half.loading) == ["second"]
    host.release()
    rig.run()
    assert rig.computed_at_first["second"] == 80
    rig.require_clean()


@pytest.mark.skipif(not hasattr(AuxOutputs, "cap_external_hit"), reason="from vLLM 0.33 on")
def test_where_outputs_are_kept_beside_the_kv_a_token_is_left(make_rig, prompt):
    """There vLLM refuses a hit that leaves none."""
    from vllm.config.aux_output import AuxOutputConfig

    class WithoutWorkers(AuxOutputs):
        def build_connector_meta(self, *args):
            return None

        def take_output(self, *args):
            return None

    rig = make_rig()
    rig.config.aux_output_config = AuxOutputConfig(enable_return_routed_experts=True)
    rig.connector = KVConnectorFactory.create_connector(rig.config, KVConnectorRole.SCHEDULER, rig.cache_config)
    rig.scheduler.connector = rig.connector
    rig.scheduler.aux_output_connector = WithoutWorkers(rig.scheduler.kv_cache_manager, rig.connector)
    for count, hits in ((96, 80), (97, 96)):
        rig.serve(f"first {count}", prompt(str(count), count))
        rig.run()
        rig.scheduler.kv_cache_manager.block_pool.reset_prefix_cache()
        assert rig.serve(f"second {count}", prompt(str(count), count)) == hits
    rig.require_clean()


def test_a_session_loads_nothing(make_rig, prompt):
    """Up to vLLM 0.31 its hashes keep a token that it has dropped: another request's block would be found by it."""
    rig = make_rig()
    rig.serve("plain", prompt("p", 90), 8)
    rig.forget_device()
    tokens = rig.truths["plain"].tokens
    session = rig.add("session", prompt("p", 90), 6, resumable=True)
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        rig.step()
    rig.add_to_session("session", tokens[:95], [(tokens[95] + 5) % 990 + 3], 4)
    rig.step()
    rig.scheduler.reset_prefix_cache(reset_running_requests=True)  # of the device alone
    matched = rig.half.blocks_matched
    for _ in range(20):
        rig.step()
    assert rig.half.blocks_matched == matched and rig.read_tokens
    rig.abort("session")
    rig.run()
    rig.require_clean()


def test_what_the_device_has_is_not_loaded(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("whole", prompt("p", 161))
    rig.forget_device()
    assert rig.serve("head", prompt("p", 65)) == 64
    before = rig.half.blocks_matched
    assert rig.serve("again", prompt("p", 161)) == 160
    assert rig.half.blocks_matched - before == 10 - 4
    rig.require_clean()


def test_a_hit_ends_where_the_prompts_part(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 200))
    rig.forget_device()
    assert rig.serve("second", prompt("p", 70) + prompt("q", 70)) == 64
    rig.require_clean()


def test_what_was_generated_is_kept_too(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 40), 60)
    rig.forget_device()
    assert rig.serve("second", prompt("p", 40) + rig.outputs("first")) == 96
    rig.require_clean()


def test_the_last_token_sampled_has_no_kv_and_completes_no_block(make_rig, prompt):
    rig = make_rig()
    rig.serve("full but for its kv", prompt("p", 15), 1)
    assert rig.requests["full but for its kv"].num_tokens == 16 and rig.index.num_ready == 0
    rig.serve("one more", prompt("p", 15), 2)
    assert rig.index.num_ready == 1
    rig.require_clean()


def test_a_long_prompt_is_kept_chunk_by_chunk(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async, max_tokens=40)
    rig.add("long", prompt("p", 300))
    kept = []
    while rig.scheduler.requests:
        rig.step()
        kept.append(rig.index.num_ready + rig.index.num_writing)
    assert kept[:8] == [tokens // 16 for tokens in (40, 80, 120, 160, 200, 240, 280, 300)]
    rig.forget_device()
    assert rig.serve("again", prompt("p", 300)) == 288
    rig.require_clean()


def test_a_request_that_skips_the_prefix_cache_loads_nothing(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    rig.add("second", prompt("p", 100)).skip_reading_prefix_cache = True
    rig.run()
    assert rig.computed_at_first["second"] == 0 and rig.half.blocks_matched == 0
    rig.require_clean()


def test_hashes_of_16_bytes_are_keys_as_well(make_rig, prompt):
    rig = make_rig(hash_function=lambda content: sha256(content)[:16])
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()


def test_what_others_are_loading_is_loaded_once(make_rig, prompt, host):
    rig = make_rig()
    rig.serve("first", prompt("p", 160) + prompt("a", 60))
    rig.serve("second", prompt("p", 160) + prompt("b", 60))
    rig.forget_device()
    host.hold()
    matched = rig.half.blocks_matched
    for name in "abc":
        rig.add(name + " again", prompt("p", 160) + prompt(name, 60))
    for _ in range(3):
        rig.step()
    assert rig.half.blocks_matched - matched == 13 and len(rig.half.loading) == 1
    host.release()
    rig.run()
    assert [rig.computed_at_first[name + " again"] for name in "abc"] == [208, 208, 160]
    assert rig.half.blocks_matched - matched == 13 + 3  # and what "a" and "b" do not share
    rig.require_clean()


def test_a_request_that_shares_little_with_a_load_does_not_wait_for_it(make_rig, prompt, host):
    rig = make_rig(num_blocks=101)
    rig.serve("first", prompt("p", 32) + prompt("a", 160))
    rig.serve("second", prompt("p", 32) + prompt("b", 160))
    rig.forget_device()
    host.hold()
    matched = rig.half.blocks_matched
    for name in "ab":
        rig.add(name + " again", prompt("p", 32) + prompt(name, 160))
    rig.step()
    assert rig.half.blocks_matched - matched == 2 * 12 and len(rig.half.loading) == 2
    host.release()
    rig.run()
    rig.require_clean()


def test_who_waits_for_the_load_of_another_goes_on_when_that_is_aborted(make_rig, prompt, host):
    rig = make_rig()
    rig.serve("first", prompt("p", 160))
    rig.forget_device()
    host.hold()
    for name in ("second", "third"):
        rig.add(name, prompt("p", 160))
    rig.step()
    assert list(rig.half.loading) == ["second"]
    rig.abort("second")
    rig.step()
    assert list(rig.half.loading) == ["third"]
    host.release()
    rig.run()
    assert rig.computed_at_first["third"] == 159
    rig.require_clean()


@pytest.mark.parametrize(
    "apart", [{"cache_salt": "tenant"}, {"lora_request": LoRARequest("adapter", 1, "nowhere")}], ids=["salt", "lora"]
)
def test_the_same_tokens_under_another_salt_or_adapter_are_other_blocks(make_rig, prompt, apart):
    rig = make_rig()
    rig.serve("plain", prompt("p", 100))
    rig.forget_device()
    assert rig.serve("apart", prompt("p", 100), **apart) == 0
    rig.forget_device()
    assert rig.serve("plain again", prompt("p", 100)) == 96
    rig.forget_device()
    assert rig.serve("apart again", prompt("p", 100), **apart) == 96
    rig.require_clean()


@pytest.mark.parametrize("hash_function", [sha256, lambda content: sha256(content)[:16]], ids=["32", "16"])
@pytest.mark.parametrize(
    "reloaded", [LoRARequest("adapter", 2, "nowhere"), LoRARequest("adapter", 1, "elsewhere")], ids=["id", "path"]
)
def test_an_adapter_loaded_anew_under_its_name_has_other_blocks(make_rig, prompt, load_async, reloaded, hash_function):
    """vLLM's own hashes do not tell them apart: before 0.32 they know of the name alone."""
    rig = make_rig(load_async=load_async, hash_function=hash_function)
    first = LoRARequest("adapter", 1, "nowhere")
    rig.serve("plain", prompt("p", 100))
    rig.serve("first", prompt("p", 100), lora_request=first)
    for name, lora in (("reloaded", reloaded), ("other name", LoRARequest("other", 1, "nowhere"))):
        rig.forget_device()
        assert rig.serve(name, prompt("p", 100), lora_request=lora) == 0
    for name, lora in (("plain", None), ("first", first), ("reloaded", reloaded)):
        rig.forget_device()
        rig.add(f"beside {name}", prompt(name, 80))  # names of both kinds in one step
        assert rig.serve(f"{name} again", prompt("p", 100), lora_request=lora) == 96
    rig.require_clean()


def test_who_shares_a_load_does_not_wait_until_one_with_less_priority_may_run(make_rig, prompt, host):
    rig = make_rig(num_blocks=101, max_seqs=2, policy="priority")
    rig.serve("first", prompt("p", 161))
    rig.forget_device()
    host.hold()
    rig.add("low", prompt("p", 161), priority=9)
    rig.step()
    for number in range(20):
        rig.add(f"middle {number}", prompt(number, 20), 8 + number % 2, priority=5)
    rig.step()
    rig.add("high", prompt("p", 161), priority=0)
    host.release()
    while "high" not in rig.computed_at_first:
        rig.step()
    assert "middle 6" not in rig.computed_at_first
    rig.run()
    assert rig.computed_at_first["high"] == 160
    rig.require_clean()


def test_those_that_wait_for_a_load_are_not_looked_up_in_every_step(make_rig, prompt, host, monkeypatch):
    rig = make_rig()
    rig.serve("first", prompt("p", 160))
    rig.forget_device()
    host.hold()
    for number in range(20):
        rig.add(f"again {number}", prompt("p", 160) + prompt(number, 20))
    rig.step()
    looked_up = []
    monkeypatch.setattr("kvortex.integrations.vllm.scheduler.longest_hit", lambda *args: looked_up.append(args))
    for _ in range(5):
        rig.step()
    monkeypatch.undo()
    assert not looked_up and len(rig.half.loading) == 1
    host.release()
    rig.run()
    assert all(rig.computed_at_first[f"again {number}"] >= 144 for number in range(20))
    rig.require_clean()


# ---- saves in flight -------------------------------------------------------------------------------------------------


def test_a_request_waits_while_its_next_block_is_being_saved_and_others_do_not(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert rig.scheduler.reset_prefix_cache()
    rig.add("second", prompt("p", 100))
    rig.add("other", prompt("q", 50))
    for _ in range(3):
        rig.step()
    assert "second" not in rig.computed_at_first and rig.outputs("other")
    host.release()
    rig.run()
    assert rig.computed_at_first["second"] == 96
    rig.require_clean()


def test_a_block_being_saved_is_not_served(make_rig, prompt, host):
    rig = make_rig()
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert rig.index.num_writing == 6 and rig.index.num_ready == 0 and leading(rig, "first") == 0
    host.release()
    rig.run()
    assert rig.index.num_ready == 6 and leading(rig, "first") == 6
    rig.require_clean()


def test_device_blocks_being_saved_are_overwritten_only_afterwards(make_rig, prompt, host):
    rig = make_rig(num_blocks=13)
    waits = rig.open_gate_when_waited_for(host)
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert not waits
    rig.serve("second", prompt("q", 180))  # needs the blocks of the first
    assert len(waits) == 1
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 96
    rig.require_clean()


@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_preempted_requests_come_back_right(make_rig, prompt, host, load_async, pipelined):
    rig = make_rig(num_blocks=13, load_async=load_async, pipelined=pipelined)
    host.set_delay_us(0, 2000)
    for name in "abc":
        rig.add(name, prompt(name, 40), 80)
    rig.run()
    assert sum(request.num_preemptions for request in rig.requests.values()) > 0
    assert all(len(rig.outputs(name)) == 80 for name in "abc")
    rig.require_clean()


# ---- aborts ----------------------------------------------------------------------------------------------------------


def test_an_abort_before_the_first_step_leaves_nothing(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    rig.add("second", prompt("p", 100))
    rig.abort("second")
    rig.run()
    rig.require_clean()


def test_an_abort_while_the_next_block_is_being_saved_leaves_nothing(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert rig.scheduler.reset_prefix_cache()
    rig.add("second", prompt("p", 100))
    rig.step()
    rig.abort("second")
    host.release()
    rig.run()
    rig.require_clean()


def test_an_aborted_load_ends_before_its_device_blocks_are_anothers(make_rig, prompt, host):
    rig = make_rig(num_blocks=13)
    rig.serve("first", prompt("p", 150))
    rig.forget_device()
    waits = rig.open_gate_when_waited_for(host)
    host.hold()
    rig.add("second", prompt("p", 150))
    rig.step()
    assert rig.index.num_pinned == 9
    rig.abort("second")
    rig.add("third", prompt("q", 150), 10)  # needs the same blocks
    for _ in range(3):
        rig.step()
    if keeps_blocks_of_aborted_loads():
        assert not waits and "third" not in rig.tables
    else:  # vLLM 0.15 has given them away
        assert len(waits) == 1
    host.release()
    rig.run()
    assert len(rig.outputs("third")) == 10
    rig.require_clean()


def test_an_abort_between_a_load_and_the_first_step_leaves_nothing(make_rig, prompt):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    rig.add("second", prompt("p", 100))
    while not rig.half.landed:
        rig.step()
    rig.abort("second")
    rig.run()
    assert rig.serve("third", prompt("p", 100)) == 96
    rig.require_clean()


def test_an_abort_with_a_save_in_flight_keeps_what_was_computed(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    host.hold()
    rig.add("first", prompt("p", 100), 50)
    for _ in range(5):
        rig.step()
    rig.abort("first")
    rig.step()
    host.release()
    rig.run()
    rig.abort("first")  # finished long ago: nothing to do
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()


def test_the_id_of_an_aborted_load_may_come_again(make_rig, prompt, host):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    host.hold()
    rig.add("again", prompt("p", 100))
    rig.step()
    rig.abort("again")
    rig.step()
    host.release()
    rig.run()
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == 96
    rig.require_clean()


# ---- a full pool -----------------------------------------------------------------------------------------------------


def test_heads_of_prompts_outlive_their_tails(make_rig, prompt):
    rig = make_rig(num_slots=8)
    rig.serve("first", prompt("p", 100))
    rig.serve("second", prompt("q", 100))
    assert (leading(rig, "first"), leading(rig, "second")) == (2, 6)
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 32
    rig.require_clean()


def test_a_prompt_larger_than_the_pool_is_served_right(make_rig, prompt, load_async):
    rig = make_rig(num_slots=4, load_async=load_async)
    rig.serve("first", prompt("p", 200))
    rig.forget_device()
    found = leading(rig, "first")
    assert rig.serve("second", prompt("p", 200)) == found * BLOCK_TOKENS
    rig.require_clean()


@pytest.mark.parametrize("num_slots", [1, 2, 5, 12, 40])
def test_a_repeated_prompt_finds_what_the_pool_holds_of_it(make_rig, prompt, load_async, num_slots):
    """The tail of a prompt never evicts its head, in whatever steps it is computed."""
    rig = make_rig(num_slots=num_slots, load_async=load_async)
    tokens = prompt("p", 29 * BLOCK_TOKENS + 1)
    rig.serve("first", tokens)
    for again in range(4):
        rig.forget_device()
        assert rig.serve(f"again {again}", tokens) == min(num_slots, 29) * BLOCK_TOKENS
    rig.require_clean()


def test_of_two_prompts_that_together_exceed_the_pool_one_keeps_its_head(make_rig, prompt):
    """Whose head was evicted for the other does not evict that one's head for a tail that nobody finds."""
    rig = make_rig(num_slots=12)
    prompts = {name: prompt(name, 20 * BLOCK_TOKENS + 1) for name in "ab"}
    for name, tokens in prompts.items():
        rig.serve(f"short {name}", tokens[: 6 * BLOCK_TOKENS + 1], 1)
    for turn in range(3):
        rig.forget_device()
        for name, tokens in prompts.items():
            rig.add(f"{name}{turn}", tokens, 1)
        rig.run()
        assert max(leading(rig, f"{name}{turn}") for name in "ab") >= 6
    rig.require_clean()


def test_who_loses_what_it_loaded_does_not_evict_the_head_of_whom_it_lost_it_to(make_rig, prompt, host):
    """The tail of the other is still being saved, so that only its head could go, and nobody would find the tail."""
    rig = make_rig(num_slots=12)
    prompts = {name: prompt(name, 20 * BLOCK_TOKENS + 1) for name in "ab"}
    for name, num_blocks in (("a", 5), ("b", 7)):
        rig.serve(f"short {name}", prompts[name][: num_blocks * BLOCK_TOKENS + 1], 1)
    rig.forget_device()
    host.hold()
    for name, tokens in prompts.items():
        rig.add(name, tokens, 1)
    rig.step()
    assert len(rig.half.loading) == 2
    host.release()
    rig.halves[0].drain()
    host.hold()
    rig.step_until_served()
    host.release()
    rig.run()
    assert leading(rig, "a") == 12
    rig.require_clean()


def test_a_request_whose_blocks_were_evicted_for_others_keeps_what_is_left_of_its_chain(make_rig, prompt):
    rig = make_rig(num_slots=12, num_blocks=131)
    rig.serve("short", prompt("p", 8 * BLOCK_TOKENS + 1), 1)
    rig.add("long", prompt("p", 8 * BLOCK_TOKENS + 1), 8 * BLOCK_TOKENS)  # goes on for eight blocks
    for _ in range(3):
        rig.step()
    rig.serve("other", prompt("q", 9 * BLOCK_TOKENS + 1), 1)
    rig.run()
    assert 0 < leading(rig, "long") < 8  # `other` took the tail; what `long` saved since took none of its head
    rig.require_clean()


def test_a_working_set_larger_than_the_pool_is_served_right(make_rig, prompt, host, load_async):
    rig = make_rig(num_blocks=41, num_slots=24, load_async=load_async)
    host.set_delay_us(0, 500)
    for turn in range(3):
        for name in range(12):
            rig.add(f"{name} {turn}", prompt(name, 60), 6)
            rig.step()
    rig.run()
    assert rig.index.counters()["evictions"] > 24
    rig.require_clean()


def test_blocks_being_loaded_are_not_evicted(make_rig, prompt, host):
    rig = make_rig(num_slots=8)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    host.hold()
    rig.add("second", prompt("p", 100))
    rig.step()
    assert rig.index.num_pinned == 6
    rig.add("third", prompt("q", 128))
    for _ in range(3):
        rig.step()
    assert rig.index.num_pinned == 6 and leading(rig, "second") == 6
    host.release()
    rig.run()
    assert rig.computed_at_first["second"] == 96
    rig.require_clean()


def test_requests_that_load_never_fill_the_device_so_that_none_can_go_on(make_rig, prompt):
    rig = make_rig(num_blocks=29, num_slots=200)
    for name in "abc":
        rig.serve(name, prompt(name, 224))
    rig.forget_device()
    for name in "abc":
        rig.add(name + " again", prompt(name, 224) + prompt("q" + name, 30))  # 14 of 28 blocks by a load, then 16
    rig.run()
    assert [rig.computed_at_first[name + " again"] for name in "abc"] == [224, 224, 224]
    rig.require_clean()


def test_loads_leave_room_for_those_that_run(make_rig, prompt):
    rig = make_rig(num_blocks=32, num_slots=200)
    for name in "abc":
        rig.serve(name, prompt(name, 161))
    rig.forget_device()
    for name in "abc":
        rig.add(name + " again", prompt(name, 161), 40)  # 10 blocks by a load, 13 in the end; 31 are there
    rig.run()
    assert [rig.requests[name + " again"].num_preemptions for name in "abc"] == [0, 0, 0]
    assert [rig.computed_at_first[name + " again"] for name in "abc"] == [160, 160, 160]
    rig.require_clean()


def test_nobody_overtakes_a_load_that_finds_no_room(make_rig, prompt):
    rig = make_rig(num_blocks=32, num_slots=200, max_seqs=20)
    rig.serve("first", prompt("p", 161))
    rig.forget_device()
    rig.add("runs", prompt("q", 340), 60)
    rig.step()
    rig.add("again", prompt("p", 161), 4)
    for number in range(12):
        rig.add(f"small {number}", prompt(number, 20), 30)
    while "again" not in rig.half.loading:
        assert list(rig.computed_at_first) == ["first", "runs"]
        rig.step()
    rig.run()
    assert rig.computed_at_first["again"] == 160
    rig.require_clean()


def test_small_loads_do_not_overtake_a_large_one_for_ever(make_rig, prompt, host):
    rig = make_rig(num_blocks=41, num_slots=800)
    rig.serve("large", prompt("large", 465))  # 30 blocks of 40
    for number in range(12):
        rig.serve(f"small {number}", prompt(number, 161))  # 11 blocks
    rig.forget_device()
    host.set_delay_us(3000, 3000)
    rig.add("small 0 again", prompt(0, 161))
    rig.step()
    rig.add("large again", prompt("large", 465))
    for number in range(1, 12):
        rig.add(f"small {number} again", prompt(number, 161))
    while "large again" not in rig.half.loading:
        rig.step()
    assert [name for name in rig.computed_at_first if name.endswith("again")] == ["small 0 again"]
    rig.run()
    rig.require_clean()


def test_room_is_found_for_what_nobody_holds_on_the_device_too(make_rig, prompt):
    rig = make_rig(num_blocks=41, num_slots=200)
    rig.serve("long", prompt("p", 321))
    rig.forget_device()
    rig.serve("head", prompt("p", 161))  # 10 blocks, which are on the device, and free
    for name in "abc":
        rig.add(name, prompt(name, 94), 24)  # 6 blocks, and 8 in the end
    rig.step()
    rig.add("long again", prompt("p", 321), 30)  # 21 blocks, only 10 of them by a load
    rig.run()
    assert not any(request.num_preemptions for request in rig.requests.values())
    assert rig.computed_at_first["long again"] == 320
    rig.require_clean()


def test_a_queue_is_not_asked_in_every_step_while_the_device_is_full(make_rig, prompt):
    rig = make_rig(num_blocks=32, num_slots=200)
    rig.serve("first", prompt("p", 161))
    rig.forget_device()
    rig.add("runs", prompt("q", 400), 30)  # 26 of 31 blocks
    for _ in range(5):
        rig.step()
    asked = []
    match = rig.half.match
    rig.half.match = lambda request, num_computed: asked.append(request.request_id) or match(request, num_computed)
    for number in range(20):
        rig.add(f"again {number}", prompt("p", 161) + prompt(number, 20), 4)
    for _ in range(5):
        rig.step()
    assert asked == ["again 0"] * 5
    rig.run()
    assert rig.computed_at_first["again 0"] == 160
    rig.require_clean()


def test_requests_that_a_reset_preempted_hold_no_blocks(make_rig, prompt):
    rig = make_rig(num_blocks=50, num_slots=200)
    for name in "abc":
        rig.add(name, prompt(name, 226), 60)
    for _ in range(10):
        rig.step()
    rig.scheduler.reset_prefix_cache(reset_running_requests=True)  # of the device alone: they come back by loads
    rig.step()
    pool = rig.scheduler.kv_cache_manager.block_pool
    assert rig.half.room.num_taken == pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    rig.run()
    rig.require_clean()


def test_a_request_whose_load_failed_computes_though_others_have_saved_its_blocks_since(make_rig, prompt, host):
    rig = make_rig(num_blocks=29)
    rig.serve("first", prompt("p", 260))
    rig.forget_device()
    rig.half.failed = lambda moving, bad: None  # as if they were there again before vLLM asks
    host.fail_call(1, 2, field="memcpy_batch_async")
    rig.add("second", prompt("p", 260))  # 17 of 28 blocks
    rig.run()
    host.fail_call(0, 0)
    assert len(rig.outputs("second")) == 2
    assert rig.computed_at_first["second"] == 0
    rig.require_clean()


# ---- forgetting ------------------------------------------------------------------------------------------------------


def test_a_reset_forgets_at_once(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100))
    assert rig.reset() and rig.index.num_ready == 0
    assert rig.serve("second", prompt("p", 100)) == 0
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 96
    rig.require_clean()


def test_a_reset_forgets_saves_in_flight(make_rig, prompt, host):
    rig = make_rig()
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    assert rig.reset()
    host.release()
    rig.run()
    assert rig.index.num_ready == 0 and rig.index.num_free == 64
    assert rig.serve("second", prompt("p", 100)) == 0
    rig.require_clean()


def test_requests_computed_before_a_reset_store_nothing_after_it(make_rig, prompt):
    rig = make_rig()
    rig.add("old", prompt("p", 100), 60)
    for _ in range(5):
        rig.step()
    rig.connector.reset_cache()
    rig.add("new", prompt("q", 50), 10)
    rig.run()
    assert rig.index.num_ready == leading(rig, "new") == 3
    rig.require_clean()


def test_a_request_that_starts_anew_after_a_reset_stores_again(make_rig, prompt, load_async):
    rig = make_rig(load_async=load_async)
    rig.add("first", prompt("p", 100), 60)
    for _ in range(5):
        rig.step()
    assert rig.reset()
    rig.run()
    assert leading(rig, "first") == 6
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()


def test_what_was_being_loaded_at_a_reset_is_not_stored_again(make_rig, prompt, host):
    rig = make_rig()
    rig.add("first", prompt("p", 100), 60)
    while rig.index.num_ready < 7:
        rig.step()
        rig.workers[0].worker.drain()
    while rig.half.in_flight:  # or the request would wait for a save first
        rig.step()
    rig.scheduler.reset_prefix_cache(reset_running_requests=True)  # of the device alone: it comes back by a load
    host.hold()
    rig.step()
    assert rig.index.num_pinned > 0
    rig.connector.reset_cache()
    host.release()
    rig.run()
    assert rig.index.num_ready == 0 and rig.index.num_free == 64
    rig.require_clean()


# ---- sleep -----------------------------------------------------------------------------------------------------------


def test_no_copy_is_in_flight_when_sleep_unmaps_the_cache_and_what_was_kept_comes_back(make_rig, prompt, host):
    rig = make_rig()
    host.set_delay_us(20_000, 20_000)
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    connector = rig.workers[0]
    assert connector.worker.saver.jobs_in_flight
    connector.unregister_kv_caches()
    assert not connector.worker.saver.jobs_in_flight
    assert rig.scheduler.reset_prefix_cache()
    for cache in rig.caches:
        for tensor in cache.values():
            tensor.fill_(-1)  # what is mapped after sleep is other memory
    connector.restore_kv_caches()
    assert rig.serve("second", prompt("p", 100)) == 96
    rig.require_clean()
