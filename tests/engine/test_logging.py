"""What the logger "kvortex" tells: each thing once, with an event's name and fields, and nothing on the console."""

import logging
import subprocess
import sys

import pytest
from kvcache import DeviceCache, keys_of, make_engine

import kvortex
from kvortex import log as kvortex_log
from kvortex.memory import limits

ILLEGAL_ADDRESS = 700
PAGE = 4096


@pytest.fixture(autouse=True)
def nothing_was_told(monkeypatch):
    monkeypatch.setattr(kvortex_log, "_told", set())


@pytest.fixture
def told(caplog):
    """Return the records of an event that were logged so far."""
    caplog.set_level(logging.DEBUG, "kvortex")
    return lambda event: [record for record in caplog.records if getattr(record, "event", None) == event]


def test_a_new_engine_tells_what_it_is(make_bench, told):
    bench = make_bench(8)
    (record,) = told("engine_created")
    assert record.levelno == logging.INFO and record.name == "kvortex"
    assert (record.device, record.pool_blocks) == (bench.cache.device.name, 8)
    assert record.pool_bytes == bench.engine.pool.nbytes and record.block_bytes == bench.cache.block_bytes
    assert f"pool_blocks=8 block_bytes={bench.cache.block_bytes}" in record.getMessage()


def test_a_gather_that_does_nothing_is_told(make_bench, told):
    bench = make_bench(8, piece_bytes=1 << 16, gather_ctas=4)  # not small
    (record,) = told("gather_unused")
    assert record.piece_bytes == bench.engine.layout.piece_bytes == 1 << 16


@pytest.mark.host
def test_a_failed_engine_is_told_once_by_the_next_call(bench, host, told):
    bench.saved([1])
    host.hold()
    job = bench.load([1], [8])
    host.kill(0, ILLEGAL_ADDRESS)
    host.release()
    with pytest.raises(kvortex.DriverError):
        job.wait(20_000)
    for _ in range(3):
        assert bench.leading([1]) == 0
        assert bench.engine.get_stats().failed
    (record,) = told("engine_failed")
    assert record.levelno == logging.ERROR
    assert (record.device, record.error) == (bench.cache.device.name, "CUDA_ERROR_ILLEGAL_ADDRESS")
    bench.engine.shutdown()
    bench.engine.shutdown()
    (leak,) = told("memory_leaked")
    assert leak.levelno == logging.WARNING and leak.pool_bytes_ready == bench.engine.pool.bytes_ready > 0


@pytest.mark.host
def test_whoever_hears_of_a_failed_engine_may_shut_it_down(bench, host, told):
    class ShutDown(logging.Handler):
        def emit(self, record):
            if record.event == "engine_failed":
                bench.engine.shutdown()

    bench.saved([1])
    host.hold()
    job = bench.load([1], [8])
    host.kill(0, ILLEGAL_ADDRESS)
    host.release()
    with pytest.raises(kvortex.DriverError):
        job.wait(20_000)
    handler = ShutDown()
    kvortex_log.logger.addHandler(handler)
    try:
        with pytest.raises(kvortex.EngineClosed):
            bench.leading([1])
    finally:
        kvortex_log.logger.removeHandler(handler)
    assert len(told("memory_leaked")) == 1


@pytest.mark.host
def test_memory_that_a_late_copy_may_still_use_is_told_when_it_leaks(make_bench, host, told):
    bench = make_bench(4, shutdown_timeout_ms=50)
    bench.saved([1])
    host.hold()
    bench.load([1], [8])
    bench.engine.shutdown()
    host.release()
    assert [record.timeout_ms for record in told("memory_leaked")] == [50]
    bench.stream.synchronize()


def test_an_orderly_shutdown_tells_of_no_leak(make_bench, told):
    bench = make_bench(4)
    bench.saved([1])
    bench.engine.shutdown()
    assert not told("memory_leaked") and not told("engine_failed") and not told("pool_incomplete")


@pytest.mark.host
def test_a_pool_that_stays_incomplete_is_told(device, host, told):
    cache = DeviceCache(device)
    host.fail_call(3, 2, field="mem_host_register")
    engine = make_engine(cache, 64, pool_first_chunk_bytes=PAGE, pool_chunk_bytes=PAGE)
    with pytest.raises(kvortex.PoolExhausted):
        engine.wait_ready(20_000)
    for _ in range(3):
        engine.check_blocks(keys_of([1]))
    (record,) = told("pool_incomplete")
    assert record.levelno == logging.WARNING and record.error == "CUDA_ERROR_OUT_OF_MEMORY"
    assert (record.pool_bytes, record.pool_bytes_ready) == (64 * PAGE, 2 * PAGE)
    engine.shutdown()
    cache.close()


@pytest.mark.host
def test_a_fallback_to_host_memory_is_told_once(told):
    if "cuda:0" in kvortex.driver.list_devices():
        pytest.skip("there is a GPU here")
    for _ in range(3):
        kvortex.Device.open("auto").close()
    (record,) = told("host_fallback")
    assert record.levelno == logging.WARNING and "device='host'" in record.reason


def test_a_device_that_was_named_falls_back_on_nothing(device, told):
    kvortex.Device.open(device.name).close()
    assert not told("host_fallback")


def test_missing_huge_pages_are_told_unless_they_were_not_asked_for(device, told, monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    monkeypatch.setattr(limits, "HUGE_PAGES_SETTING", setting)
    for text in ("always [madvise] never\n", "[always] madvise never\n"):
        setting.write_text(text)
        kvortex.PinnedPool(PAGE, PAGE, device).close()
    setting.write_text("always madvise [never]\n")
    kvortex.PinnedPool(PAGE, PAGE, device, huge_pages=False).close()
    assert not told("huge_pages_off")
    for _ in range(2):
        kvortex.PinnedPool(PAGE, PAGE, device).close()
    (record,) = told("huge_pages_off")
    assert "transparent_hugepage/enabled" in record.getMessage()


@pytest.mark.host
def test_a_refused_numa_node_is_told(device, host, told):
    host.set_numa_node(900)
    kvortex.PinnedPool(PAGE, PAGE, device).close()
    (record,) = told("numa_refused")
    assert record.node == 900


def test_nobody_hears_it_who_did_not_ask():
    """An application without logging set up sees nothing on its console, not even of warnings."""
    code = (
        "import kvortex\n"
        "from kvortex.log import warn_once\n"
        "warn_once('test', 'a warning', number=1)\n"
        "config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device='host', block_bytes=4096)\n"
        "kvortex.KVortexEngine.create(config).shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_place_of_a_record_is_the_caller(told):
    kvortex_log.log(logging.INFO, "test_event", "a message", number=1)
    (record,) = told("test_event")
    assert record.filename == "test_logging.py" and record.number == 1
    assert record.getMessage() == "a message [number=1]"


def test_a_warning_with_other_fields_is_another_one(told):
    for number in (1, 2, 1):
        kvortex_log.warn_once("test_event", "a message", number=number)
    assert [record.number for record in told("test_event")] == [1, 2]


# ---- what logging runs is the application's, and may be broken -------------------------------------------------------


class Broken(logging.Handler):
    """A handler, or a filter, that lets its error escape."""

    def emit(self, record):
        raise OSError("the disk is full")

    def filter(self, record):
        raise OSError("no such field")


def set_same_names(record):
    record.device, record.event, record.error = "mine", "mine", "mine"


def refuse(record):
    raise OSError("no record today")


@pytest.fixture(params=["clash", "factory", "filter", "handler", "handler's filter", "class"])
def broken_logging(request, monkeypatch):
    """Logging that is set up so that a call of it raises, or that its records have fields of our names."""
    logger, kind, handler = kvortex_log.logger, request.param, Broken()
    plain, level = logging.getLogRecordFactory(), logger.level
    logger.setLevel(logging.DEBUG)
    if kind in ("clash", "factory"):
        spoil = set_same_names if kind == "clash" else refuse

        def make(*arguments, **keywords):
            record = plain(*arguments, **keywords)
            spoil(record)
            return record

        logging.setLogRecordFactory(make)
    elif kind == "filter":
        logger.addFilter(handler)
    elif kind == "class":
        monkeypatch.setattr(logger, "findCaller", refuse)
    else:
        if kind == "handler":
            handler.filter = lambda record: True
        logger.addHandler(handler)
    yield kind
    logging.setLogRecordFactory(plain)
    logger.setLevel(level)
    logger.removeFilter(handler)
    logger.removeHandler(handler)


@pytest.mark.host
def test_broken_logging_breaks_no_call(device, host, broken_logging, caplog, capsys):
    cache = DeviceCache(device)
    host.fail_call(3, 2, field="mem_host_register")
    engine = make_engine(cache, 64, pool_first_chunk_bytes=PAGE, pool_chunk_bytes=PAGE, shutdown_timeout_ms=50)
    with pytest.raises(kvortex.PoolExhausted):
        engine.wait_ready(20_000)
    assert engine.check_blocks(keys_of([1])).leading == 0  # tells of the incomplete pool
    host.hold()
    engine.save_blocks(keys_of([1]), [0], stream=0)
    engine.shutdown()  # tells of a leak
    host.release()
    kvortex_log.warn_once("test_event", "a message", number=1)
    cache.close()
    told = {record.args[0] for record in caplog.records}
    if broken_logging in ("clash", "factory"):  # then the message is not lost
        assert {"an engine serves", "a message"} <= told and len(told) == 4
    if broken_logging != "clash":
        assert "Logging error" in capsys.readouterr().err


@pytest.mark.host
def test_a_field_that_the_application_sets_stays_the_applications(told):
    plain = logging.getLogRecordFactory()

    def make(*arguments, **keywords):
        record = plain(*arguments, **keywords)
        record.device = "mine"
        return record

    logging.setLogRecordFactory(make)
    try:
        kvortex_log.log(logging.INFO, "test_event", "a message", device="host:0", number=1, name="x", asctime="y")
    finally:
        logging.setLogRecordFactory(plain)
    (record,) = told("test_event")
    assert (record.device, record.number, record.name) == ("mine", 1, "kvortex")
    assert record.getMessage() == "a message [device=host:0 number=1 name=x asctime=y]"


def test_an_interrupt_in_a_handler_is_no_error_of_logging():
    class Interrupted(logging.Handler):
        def emit(self, record):
            raise KeyboardInterrupt

    handler = Interrupted()
    kvortex_log.logger.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            kvortex_log.log(logging.WARNING, "test_event", "a message")
    finally:
        kvortex_log.logger.removeHandler(handler)


def test_a_guarded_logger_names_its_caller_and_breaks_nothing(caplog, capsys):
    guarded = kvortex_log.Guarded(logging.getLogger("vllm.kvortex"))
    guarded.warning("%d blocks", 3)
    assert [(record.filename, record.getMessage()) for record in caplog.records] == [("test_logging.py", "3 blocks")]
    handler = Broken()
    guarded.logger.addHandler(handler)
    try:
        guarded.warning("%d blocks", 3)
    finally:
        guarded.logger.removeHandler(handler)
    assert "no such field" in capsys.readouterr().err
