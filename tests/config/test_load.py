"""KVortexConfig.load: keywords over environment over file over defaults, and errors that say where a value stands."""

import dataclasses
import logging
import pickle
import re
from pathlib import Path

import pytest

import kvortex
from kvortex import ConfigError, KVortexConfig, codec, config
from kvortex.config import OTHER_VARIABLES, PREFIX, REMOVED, parse_bytes

ROOT = Path(__file__).resolve().parents[2]
POOL = {"KVORTEX_CPU_POOL_SIZE_BYTES": "1GiB"}
KEYWORDS = {"cpu_pool_size_bytes": 1 << 30}


@pytest.fixture
def toml(tmp_path):
    """Write a configuration file and return its path."""

    def write(text):
        path = tmp_path / "kvortex.toml"
        path.write_text(text)
        return path

    return write


def test_keywords_win_over_environment_over_file_over_defaults(toml):
    path = toml('cpu_pool_size_bytes = "2GiB"\nmax_jobs = 11\ngather_ctas = 12\nnum_transfer_streams = 4\n')
    environ = {"KVORTEX_MAX_JOBS": "21", "KVORTEX_GATHER_CTAS": "22"}
    config = KVortexConfig.load(path, environ=environ, gather_ctas=32)
    assert config == KVortexConfig(cpu_pool_size_bytes=2 << 30, num_transfer_streams=4, max_jobs=21, gather_ctas=32)
    assert config.sources["cpu_pool_size_bytes"] == config.sources["num_transfer_streams"] == str(path)
    assert config.sources["max_jobs"] == "KVORTEX_MAX_JOBS"
    assert config.sources["gather_ctas"] == "keyword"
    assert config.sources["block_bytes"] == "default"
    assert list(config.sources) == KVortexConfig.names()


def test_every_setting_can_be_given_each_way(toml):
    given = {
        "cpu_pool_size_bytes": ("3MiB", 3 << 20),
        "num_transfer_streams": ("5", 5),
        "device": ("host:1", "host:1"),
        "block_bytes": ("64KiB", 64 << 10),
        "max_jobs": ("7", 7),
        "shutdown_timeout_ms": ("0", 0),
        "pool_first_chunk_bytes": ("1MiB", 1 << 20),
        "pool_chunk_bytes": ("12288", 12288),
        "pool_driver_allocated": ("yes", True),
        "pool_huge_pages": ("0", False),
        "gather_ctas": ("4", 4),
        "gpu_pool_size_bytes": ("8GiB", 8 << 30),
        "codec": ("k8v5", "k8v5"),
        "exact_layers": ("0,-1", (0, -1)),
        "deferred": ("auto", "auto"),
        "namespace": ("a model", "a model"),
        "weights": ("step-1200", "step-1200"),
        "prefill_tokens_per_s": ("9000", 9000),
        "block_tokens": ("16", 16),
        "enable_numa": ("Off", False),
    }
    assert sorted(given) == sorted({*KVortexConfig.names()} - {"tiers"}), "a new setting: say here how it is written"
    expected = KVortexConfig(**{name: value for name, (_, value) in given.items()})
    variables = {PREFIX + name.upper(): text for name, (text, _) in given.items()}
    assert KVortexConfig.load(environ=variables) == expected
    lines = []
    for name, (text, value) in given.items():
        if name.endswith("_bytes") or isinstance(value, str | tuple):
            lines.append(f'{name} = "{text}"')
        else:
            lines.append(f"{name} = {str(value).lower()}")
    assert KVortexConfig.load(toml("\n".join(lines)), environ={}) == expected
    assert KVortexConfig.load(environ={}, **dataclasses.asdict(expected)) == expected


def test_the_constructor_reads_neither_environment_nor_file(monkeypatch, toml):
    monkeypatch.setenv("KVORTEX_CONFIG", str(toml("max_jobs = 1")))
    monkeypatch.setenv("KVORTEX_GATHER_CTAS", "3")
    monkeypatch.setenv("KVORTEX_NUM_STREAMS", "nonsense")
    config = KVortexConfig(cpu_pool_size_bytes=1 << 20, max_jobs=8)
    assert (config.max_jobs, config.gather_ctas) == (8, 0)
    assert config.sources["max_jobs"] == "keyword" and config.sources["gather_ctas"] == "default"


def test_load_reads_the_process_environment_as_it_is_now(monkeypatch):
    monkeypatch.setenv("KVORTEX_CPU_POOL_SIZE_BYTES", "5MiB")
    assert KVortexConfig.load().cpu_pool_size_bytes == 5 << 20


def test_a_variable_names_the_file_and_a_path_wins_over_it(toml, tmp_path):
    path = toml('cpu_pool_size_bytes = "1MiB"')
    assert KVortexConfig.load(environ={"KVORTEX_CONFIG": str(path)}).cpu_pool_size_bytes == 1 << 20
    other = tmp_path / "other.toml"
    other.write_text('cpu_pool_size_bytes = "2MiB"')
    assert KVortexConfig.load(other, environ={"KVORTEX_CONFIG": str(path)}).cpu_pool_size_bytes == 2 << 20
    assert KVortexConfig.load(environ={"KVORTEX_CONFIG": "", **POOL}).cpu_pool_size_bytes == 1 << 30


def test_sources_survive_a_copy(toml):
    config = KVortexConfig.load(environ=POOL)
    copied = pickle.loads(pickle.dumps(config))
    assert copied == config and copied.sources == config.sources


def test_an_empty_variable_counts_as_unset():
    assert KVortexConfig.load(environ={**POOL, "KVORTEX_MAX_JOBS": ""}).max_jobs == 256


def test_a_missing_pool_says_how_to_set_it():
    with pytest.raises(ConfigError, match="KVORTEX_CPU_POOL_SIZE_BYTES=16GiB"):
        KVortexConfig.load(environ={})


@pytest.mark.parametrize(
    "variable, text, complaint",
    [
        ("KVORTEX_MAX_JOBS", "many", "max_jobs must be a whole number, got 'many'"),
        ("KVORTEX_MAX_JOBS", "-1", "max_jobs must be 1 to 65536, got -1"),
        ("KVORTEX_MAX_JOBS", "٣", "max_jobs must be a whole number"),
        ("KVORTEX_MAX_JOBS", "0", "max_jobs must be 1 to 65536, got 0"),
        ("KVORTEX_MAX_JOBS", "4KiB", "max_jobs must be a whole number"),
        (
            "KVORTEX_CPU_POOL_SIZE_BYTES",
            "16PB",
            "2Mi, 32GiB or 500GB, got '16PB'",
        ),
        ("KVORTEX_CPU_POOL_SIZE_BYTES", "9999TiB", "cpu_pool_size_bytes must be 1 to"),
        ("KVORTEX_ENABLE_NUMA", "maybe", "enable_numa must be one of 1, true, yes, on, 0, false, no, off, got 'maybe'"),
        ("KVORTEX_DEVICE", "tpu", "device must be 'auto', 'host', 'host:N', 'cuda' or 'cuda:N', got 'tpu'"),
    ],
)
def test_a_bad_value_in_the_environment_names_its_variable(variable, text, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)) as raised:
        KVortexConfig.load(environ={**POOL, variable: text})
    assert f"(environment variable {variable})" in str(raised.value)


def given_by_keyword(name, value, toml):
    return KVortexConfig(**{**KEYWORDS, name: value})


def given_to_load(name, value, toml):
    return KVortexConfig.load(environ={}, **{**KEYWORDS, name: value})


def given_in_a_file(name, value, toml):
    return KVortexConfig.load(toml(f"{name} = {value}\n"), environ=POOL)


def given_in_the_environment(name, value, toml):
    return KVortexConfig.load(environ={**POOL, f"KVORTEX_{name.upper()}": str(value)})


def given_by_replace(name, value, toml):
    return dataclasses.replace(KVortexConfig(**KEYWORDS), **{name: value})


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("value", [0, 4096])
@pytest.mark.parametrize(
    "give", [given_by_keyword, given_to_load, given_in_a_file, given_in_the_environment, given_by_replace]
)
def test_what_is_no_setting_any_more_is_refused_with_what_to_do(give, name, value, toml):
    with pytest.raises(ConfigError, match=f"{name} is no setting any more: .*leave it out"):
        give(name, value, toml)


def test_a_variable_of_what_is_no_setting_any_more_counts_as_unset_when_it_is_empty():
    assert KVortexConfig.load(environ={**POOL, "KVORTEX_HEADER_BYTES": ""}).header_bytes == 0


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('max_jobs = "7"', "max_jobs must be a whole number, got '7'"),
        ("max_jobs = 7.0", "max_jobs must be a whole number, got 7.0"),
        ("max_jobs = true", "max_jobs must be a whole number, got True"),
        ("deferred = 1", "deferred must be True, False or 'auto', got 1"),
        ("enable_numa = 1", "enable_numa must be True or False, got 1"),
        ("device = 0", "device must be a str"),
        ('block_bytes = "1 mB"', "bytes are expected"),
        ("block_bytes = [1]", "block_bytes must be a whole number, got [1]"),
    ],
)
def test_a_bad_value_in_a_file_names_file_and_key(toml, line, complaint):
    path = toml(line)
    with pytest.raises(ConfigError, match=re.escape(complaint)) as raised:
        KVortexConfig.load(path, environ=POOL)
    assert f"(key {line.split()[0]!r} of the configuration file {path})" in str(raised.value)


def test_a_bad_value_is_refused_although_another_overrides_it(toml):
    with pytest.raises(ConfigError, match="key 'max_jobs'"):
        KVortexConfig.load(toml("max_jobs = 0"), environ={**POOL, "KVORTEX_MAX_JOBS": "3"}, max_jobs=4)


@pytest.mark.parametrize("text", ["max_jobs", "max_jobs = 1\nmax_jobs = 2", "a = 'unfinished"])
def test_a_file_that_is_no_toml_is_named(toml, text):
    path = toml(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is not TOML")):
        KVortexConfig.load(path, environ=POOL)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(f"{path} cannot be read")):
            KVortexConfig.load(path, environ=POOL)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        KVortexConfig.load(environ={"KVORTEX_CONFIG": str(binary)})


def test_unknown_names_are_refused_with_the_nearest(toml):
    with pytest.raises(ConfigError, match="unknown setting 'max_job'; did you mean 'max_jobs'?"):
        KVortexConfig.load(environ=POOL, max_job=3)
    with pytest.raises(ConfigError, match="key 'enable_nuna' of .* did you mean 'enable_numa'?"):
        KVortexConfig.load(toml("enable_nuna = true"), environ=POOL)
    with pytest.raises(ConfigError, match="KVORTEX_CPU_POOL_SIZE is no setting; .*KVORTEX_CPU_POOL_SIZE_BYTES?"):
        KVortexConfig.load(environ={"KVORTEX_CPU_POOL_SIZE": "1GiB"})
    with pytest.raises(ConfigError, match="did you mean KVORTEX_CONFIG?"):
        KVortexConfig.load(environ={"KVORTEX_CONFIG_FILE": "x.toml"})
    with pytest.raises(ConfigError, match="'colour'; known are cpu_pool_size_bytes, num_transfer_streams"):
        KVortexConfig.load(environ=POOL, colour="green")
    with pytest.raises(ConfigError, match="key 'tiers' .* is taken as a keyword only"):
        KVortexConfig.load(toml("[tiers]\ndisk = 1"), environ=POOL)


def test_variables_of_others_are_let_through_and_logged_once(caplog):
    """Kubernetes gives every pod beside a service named kvortex variables like these."""
    environ = {
        "KVORTEX_SERVICE_HOST": "10.0.0.1",
        "KVORTEX_SERVICE_PORT": "80",
        "KVORTEX_PORT": "tcp://10.0.0.1:80",
        "KVORTEX_PORT_80_TCP_ADDR": "10.0.0.1",
        "KVORTEX_VERSION": "1",
        "PATH": "/bin",
    }
    with caplog.at_level(logging.WARNING, "kvortex"):
        KVortexConfig.load(environ={**POOL, **environ})
        KVortexConfig.load(environ={**POOL, **environ})
    told = [record.variable for record in caplog.records if record.event == "unknown_variable"]
    assert sorted(told) == sorted(name for name in environ if name != "PATH")


def test_variables_of_build_and_tests_do_not_make_load_fail():
    found = set()
    for path in ("Makefile", "setup.py", ".ci", "tests", "bench"):
        path = ROOT / path
        for file in [path] if path.is_file() else (f for f in path.rglob("*") if f.is_file()):
            if "__pycache__" not in file.parts and file != Path(__file__) and file.suffix not in {".c", ".patch"}:
                text = file.read_text(errors="replace")
                found |= set(re.findall(r"(?:environ\S*[\"']|\bexport |\$\{?|^\t|\s)(KVORTEX_[A-Z_]+)", text, re.M))
    found = {name for name in found if name.removeprefix(PREFIX).lower() not in (*KVortexConfig.names(), "config")}
    found = {name for name in found if not name.endswith("_H")}  # guards of headers
    assert {"KVORTEX_TEST_DEVICE", "KVORTEX_CFLAGS", "KVORTEX_SEED"} <= found
    assert found <= OTHER_VARIABLES | {"KVORTEX_NAME"}, "name it in kvortex.config.OTHER_VARIABLES"
    assert KVortexConfig.load(environ={**POOL, **dict.fromkeys(OTHER_VARIABLES, "x")})


@pytest.mark.parametrize(
    "text, nbytes",
    [("0", 0), ("65536", 65536), ("64KiB", 65536), ("2 MiB", 2 << 20), ("32GiB", 32 << 30), ("1TiB", 1 << 40)]
    + [("32Gi", 32 << 30), ("32G", 32 * 10**9), ("64 GB", 64 * 10**9), ("3K", 3000), ("3KB", 3000), ("5M", 5 * 10**6)],
)
def test_sizes_are_whole_numbers_with_a_unit(text, nbytes):
    assert parse_bytes(text) == nbytes


def test_sizes_may_be_texts_wherever_they_are_settings(tmp_path):
    config = KVortexConfig(cpu_pool_size_bytes="2GiB", block_bytes="64K", pool_chunk_bytes="1Mi")
    assert (config.cpu_pool_size_bytes, config.block_bytes, config.pool_chunk_bytes) == (2 << 30, 64_000, 1 << 20)
    tier = kvortex.DiskTier(tmp_path, "500GB", segment_bytes="64MiB", write_bytes_per_s="0")
    assert (tier.disk_bytes, tier.segment_bytes, tier.write_bytes_per_s) == (500 * 10**9, 64 << 20, 0)
    with pytest.raises(ConfigError, match="bytes are expected, .* got '1 mile'"):
        KVortexConfig(cpu_pool_size_bytes="1 mile")


def test_the_constructor_gives_the_nearest_name_too():
    with pytest.raises(ConfigError, match="unknown setting 'max_job'; did you mean 'max_jobs'?"):
        KVortexConfig(cpu_pool_size_bytes=1 << 20, max_job=3)


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "1.5GiB", "-1", "16PB", "16gib", "16kB", "1i", "1  KiB", "1KiB ", "٣KiB", "0x10", "1_000"],
)
def test_other_sizes_are_refused(text):
    with pytest.raises(kvortex.ConfigError, match="bytes are expected"):
        parse_bytes(text)


def test_codecs_are_those_that_there_are():
    assert tuple(codec.CODECS) == config.CODECS
