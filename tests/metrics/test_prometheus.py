"""The Prometheus page, read back by prometheus_client's own parser, and the exporter, scraped over HTTP."""

import dataclasses
import subprocess
import sys
import typing
import urllib.request

import numpy as np
import pytest
from kvcache import DeviceCache, keys_of, make_engine
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import kvortex
from kvortex import metrics
from kvortex.transfer import PlannerRow


def stats_of(**changes):
    """Stats in which every number differs from every other."""
    values = {}
    for number, field in enumerate(dataclasses.fields(kvortex.EngineStats)):
        by_type = {int: 1000 + number, float: 0.5 + number, bool: True, str: "host:0", tuple: ()}
        values[field.name] = by_type[typing.get_origin(field.type) or field.type]
    return kvortex.EngineStats(**{**values, **changes})


def samples(text):
    """Return {(name, labels): value} of a page, each sample checked against its family."""
    found = {}
    for family in parse(text):
        assert family.documentation and family.type in {"counter", "gauge", "summary"}, family
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


def test_every_field_of_the_stats_is_exported_or_left_out_on_purpose():
    named = {*metrics.COUNTERS, *metrics.GAUGES, "device", "planner", "tiers"}
    named |= {f"{what}_latency_us_p{percent}" for what in metrics.LATENCIES for percent in (50, 99)}
    assert named == {field.name for field in dataclasses.fields(kvortex.EngineStats)}


def tier_stats(**changes):
    values = {}
    for number, field in enumerate(dataclasses.fields(kvortex.TierStats)):
        by_type = {int: 2000 + number, float: 1000.0 * number, bool: True, str: "disk", dict: {"LATE": 3, "FULL": 4}}
        values[field.name] = by_type.get(typing.get_origin(field.type) or field.type)
    return kvortex.TierStats(**{**values, **changes})


def test_every_field_of_a_tier_is_exported_or_left_out_on_purpose():
    named = {*metrics.TIER_COUNTERS, *metrics.TIER_GAUGES, *metrics.TIER_SECONDS}
    named |= {"name", "misses", "last_error", "io", "io_reason", "codec"}
    assert named == {field.name for field in dataclasses.fields(kvortex.TierStats)}


def test_the_page_says_what_a_tier_says():
    tier = tier_stats()
    found = samples(kvortex.prometheus_text(stats_of(tiers=(tier,))))
    label = (("tier", "disk"),)
    for field, (name, _) in metrics.TIER_COUNTERS.items():
        assert found[f"kvortex_{name}_total", label] == getattr(tier, field)
    for field, (name, _) in metrics.TIER_GAUGES.items():
        assert found[f"kvortex_{name}", label] == {True: 1, None: 0}.get(getattr(tier, field), getattr(tier, field))
    assert found["kvortex_tier_reading_seconds_total", label] == tier.ms_reading / 1000
    assert found["kvortex_tier_misses_total", (("cause", "FULL"), *label)] == 4
    found = samples(kvortex.prometheus_text(stats_of(tiers=(tier_stats(read_only="No space left on device"),))))
    assert found["kvortex_tier_read_only", label] == 1


def test_the_page_says_what_the_stats_say():
    stats = stats_of()
    found = samples(kvortex.prometheus_text(stats))
    for field, (name, _) in metrics.COUNTERS.items():
        assert found[f"kvortex_{name}_total", ()] == getattr(stats, field)
    for field, (name, _) in metrics.GAUGES.items():
        assert found[f"kvortex_{name}", ()] == getattr(stats, field)
    for what in metrics.LATENCIES:
        for percent, quantile in ((50, "0.5"), (99, "0.99")):
            value = found[f"kvortex_{what}_latency_seconds", (("quantile", quantile),)]
            assert value == pytest.approx(getattr(stats, f"{what}_latency_us_p{percent}") / 1e6)
    assert found["kvortex_engine_info", (("device", "host:0"), ("version", kvortex.__version__))] == 1
    assert len(found) == len(metrics.COUNTERS) + len(metrics.GAUGES) + 2 * len(metrics.LATENCIES) + 2


def test_names_carry_units_and_counters_end_with_total():
    for family in parse(kvortex.prometheus_text(stats_of())):
        for sample in family.samples:
            assert sample.name.startswith("kvortex_")
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            for word, unit in (("latency", "seconds"), ("saved_bytes", "bytes_total")):
                assert word not in sample.name or sample.name.endswith(unit)
    text = kvortex.prometheus_text(stats_of())
    assert "# TYPE kvortex_blocks_hit_total counter\n" in text and "# HELP kvortex_blocks_hit_total " in text


def test_labels_go_into_every_sample_whatever_is_in_them():
    labels = {"model": 'a "quoted" \\ name\nof two lines', "rank": 3}
    found = samples(kvortex.prometheus_text(stats_of(), labels))
    assert found
    for _, pairs in found:
        assert {("model", labels["model"]), ("rank", "3")} <= set(pairs)


@pytest.mark.parametrize("name", ["", "1st", "a-b", "é", "__name__", "quantile", "device", "backend", "a\n"])
def test_a_label_that_cannot_be_one_is_refused(name):
    with pytest.raises(kvortex.ConfigError, match="cannot be a label"):
        kvortex.prometheus_text(stats_of(), {name: "x"})


def test_planner_rows_that_look_alike_count_together():
    rows = [PlannerRow("D2H", 4096, 8, pitch, 2, "strided", 1.0, None) for pitch in (65536, 65536, 131072)]
    found = samples(kvortex.prometheus_text(stats_of(planner=tuple(rows))))
    groups = {dict(labels)["pitch_bytes"]: value for (name, labels), value in found.items() if "planner" in name}
    assert groups == {"65536": 4, "131072": 2}


@pytest.fixture
def engine(device):
    cache = DeviceCache(device)
    engine = make_engine(cache, 8)
    yield engine
    engine.shutdown()
    cache.close()


def scrape(exporter, accept="text/plain"):
    request = urllib.request.Request(f"http://127.0.0.1:{exporter.port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def test_a_scrape_reads_the_engine_anew(engine, stream):
    with metrics.start_exporter(engine, 0, labels={"rank": "0"}) as exporter:
        assert samples(scrape(exporter))["kvortex_blocks_saved_total", (("rank", "0"),)] == 0
        engine.save_blocks(keys_of([1, 2]), np.arange(2), stream=stream).wait(20_000)
        page = scrape(exporter)
        assert samples(page)["kvortex_blocks_saved_total", (("rank", "0"),)] == 2
        own = kvortex.prometheus_text(engine.get_stats(), {"rank": "0"})
        assert {*samples(page)} == {*samples(own)}, "the exporter and the text name the same samples"
        strict = scrape(exporter, "application/openmetrics-text; version=1.0.0")
        assert "kvortex_pool_bytes" in {family.name for family in parse_openmetrics(strict)}


def test_an_engine_that_was_shut_down_says_so(engine):
    with metrics.start_exporter(engine, 0, labels={"rank": "3"}) as exporter:
        page = samples(scrape(exporter))
        assert page["kvortex_up", (("rank", "3"),)] == 1 and ("kvortex_pool_bytes", (("rank", "3"),)) in page
        engine.shutdown()
        assert samples(scrape(exporter)) == {("kvortex_up", (("rank", "3"),)): 0}
    exporter.close()


def test_the_exporter_complains_before_it_serves(engine):
    with pytest.raises(kvortex.ConfigError, match="cannot be a label"):
        metrics.start_exporter(engine, 0, labels={"0": "x"})
    for port in (-1, 70000, "9400", True, 9400.0):
        with pytest.raises(kvortex.ConfigError, match="port must be"):
            metrics.start_exporter(engine, port)
    with metrics.start_exporter(engine, 0) as exporter, pytest.raises(OSError):
        metrics.start_exporter(engine, exporter.port)


def test_without_prometheus_client_the_text_works_and_the_exporter_says_what_is_missing(device):
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import kvortex, kvortex.metrics\n"
        f"config = kvortex.KVortexConfig(cpu_pool_size_bytes=1 << 20, device={device.name!r}, block_bytes=4096)\n"
        "with kvortex.KVortexEngine.create(config) as engine:\n"
        "    assert 'kvortex_pool_blocks 256' in kvortex.prometheus_text(engine.get_stats())\n"
        "    try:\n"
        "        kvortex.metrics.start_exporter(engine)\n"
        "    except kvortex.ConfigError as error:\n"
        "        assert 'kvortex[metrics]' in str(error)\n"
        "    else:\n"
        "        raise SystemExit('no complaint')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
