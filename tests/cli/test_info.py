"""`kvortex info`: what is in force and why, for people and for machines, with and without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import kvortex
from kvortex.cli import main
from kvortex.codec import CODECS
from kvortex.memory import limits
from kvortex.tiers.disk import file_system

DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
SECTIONS = ["kvortex", "driver", "device", "cpu", "memory", "pool", "device_pool", "settings", "planner", "codecs",
            "tiers", "disks"]  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("KVORTEX_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def facts(capsys):
    """Run `info --json` on the device under test and return what it printed."""

    def run(*args, status=0):
        assert main(["info", "--json", *([] if "--device" in args else ["--device", DEVICE]), *args]) == status
        return json.loads(capsys.readouterr().out)

    return run


def settings_of(facts):
    return {row["name"]: (row["value"], row["source"]) for row in facts["settings"]}


def test_info_works_as_a_user_runs_it_without_any_setting():
    done = subprocess.run([sys.executable, "-m", "kvortex", "info"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for word in ("kvortex", kvortex.__version__, "driver", "because", "NUMA node", "keys", "memlock", "huge pages",
                 "pool", "tiers", "cpu_pool_size_bytes", "not set", "enable_numa"):  # fmt: skip
        assert word in done.stdout
    assert done.stderr == ""


def test_help_has_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["info", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "exit status: 0" in text and "--probe" in text


def test_every_section_is_there_for_machines(facts, device):
    found = facts()
    assert list(found) == SECTIONS
    assert found["kvortex"]["version"] == kvortex.__version__
    assert found["device"]["name"] == device.name and device.name in found["device"]["all"]
    assert found["device"]["description"] == device.description
    assert found["driver"]["kind"] == ("host" if device.is_host else "cuda")
    assert found["driver"]["cuda_version"] == device.cuda_version
    assert found["planner"] is found["codecs"] is None and found["tiers"] == found["disks"] == []
    assert found["cpu"]["usable_cpus"] == limits.usable_cpus()
    assert 0 < found["memory"]["available_bytes"] < 1 << 50


def test_settings_say_where_they_come_from(facts, tmp_path, monkeypatch):
    path = tmp_path / "kvortex.toml"
    path.write_text('cpu_pool_size_bytes = "16MiB"\nmax_jobs = 9\nshutdown_timeout_ms = 1\n')
    monkeypatch.setenv("KVORTEX_MAX_JOBS", "10")
    found = settings_of(facts("--config", str(path), "--block-bytes", "64KiB"))
    assert list(found) == kvortex.KVortexConfig.names()
    assert found["cpu_pool_size_bytes"] == (16 << 20, str(path))
    assert found["shutdown_timeout_ms"] == (1, str(path))
    assert found["max_jobs"] == (10, "KVORTEX_MAX_JOBS")
    assert found["block_bytes"] == (64 << 10, "command line")
    assert found["gather_ctas"] == (0, "default")
    monkeypatch.setenv("KVORTEX_CONFIG", str(path))
    assert settings_of(facts())["shutdown_timeout_ms"] == (1, str(path))


@pytest.mark.parametrize("block_bytes", [1, 4096, 70_000])
@pytest.mark.parametrize("header_bytes", [0, 4096])
def test_the_pool_it_names_is_the_one_that_is_made(facts, device, monkeypatch, block_bytes, header_bytes):
    monkeypatch.setattr(kvortex.KVortexConfig, "header_bytes", header_bytes)  # as with tiers, which are not there yet
    found = facts("--pool-bytes", "1MiB", "--block-bytes", str(block_bytes))["pool"]
    with kvortex.PinnedPool(1 << 20, block_bytes, device, header_bytes=header_bytes) as pool:
        assert (found["pool_bytes"], found["stride_bytes"], found["num_slots"]) == (
            pool.nbytes,
            pool.stride_bytes,
            pool.num_slots,
        )
    assert found["problem"] is None


def test_the_pool_of_device_memory_is_shown(facts, monkeypatch):
    assert facts()["device_pool"] == {"limit_bytes": 0, "problem": None}
    monkeypatch.setenv("KVORTEX_GPU_POOL_SIZE_BYTES", "3GiB")
    assert facts()["device_pool"] == {"limit_bytes": 3 << 30, "problem": None}


@pytest.mark.host
def test_a_device_without_pools_is_shown_and_exits_2(host, capsys, monkeypatch):
    monkeypatch.setenv("KVORTEX_GPU_POOL_SIZE_BYTES", "3GiB")
    assert main(["info", "--device", DEVICE]) == 0
    assert "device pool 3 GiB" in capsys.readouterr().out
    host.fail_call(2, 1, field="device_get_attribute")  # after that for the NUMA node
    assert main(["info", "--device", DEVICE]) == 2
    printed = capsys.readouterr()
    assert "  problem   host:0 has no memory pools" in printed.out and "no memory pools" in printed.err


@pytest.mark.parametrize(
    "pool_bytes, complaint",
    [("100000GiB", "exceeds what available memory leaves"), ("100", "holds no slot of 4096 bytes")],
)
def test_a_pool_that_does_not_fit_is_shown_and_exits_2(capsys, pool_bytes, complaint):
    args = ["info", "--device", DEVICE, "--pool-bytes", pool_bytes, "--block-bytes", "4096"]
    assert main(args) == 2
    captured = capsys.readouterr()
    assert complaint in captured.out and complaint in captured.err and "settings" in captured.out


def test_the_probe_shows_both_directions(facts, capsys):
    rows = facts("--probe", "--block-bytes", "64KiB", "--pieces", "16")["planner"]
    assert {row["direction"] for row in rows} == {"D2H", "H2D"}
    assert all(row["rows"] * row["num_groups"] == 16 and row["piece_bytes"] == 4096 for row in rows)
    assert all((row["strided_gbps"] is not None) == (DEVICE == "cuda") for row in rows)
    assert main(["info", "--device", DEVICE, "--probe", "--block-bytes", "64KiB", "--pieces", "16"]) == 0
    assert "8 x 4 KiB" in capsys.readouterr().out


def test_the_probe_shows_what_each_codec_reaches(facts, capsys):
    rows = facts("--probe", "--block-bytes", "1MiB", "--pieces", "16")["codecs"]
    assert [row["codec"] for row in rows] == list(CODECS)
    assert all(row["save_gbps"] > 0 < row["load_gbps"] for row in rows)
    assert [round(row["ratio"], 1) for row in rows] == [1.0, 2.0, 2.4, 3.1, 3.9]
    assert main(["info", "--device", DEVICE, "--probe", "--block-bytes", "1MiB", "--pieces", "16"]) == 0
    text = capsys.readouterr().out
    assert "all but exact are lossy" in text and re.search(r"^  q8 +1\.97 +\d+\.\d\d +\d+\.\d\d$", text, re.M)


def test_the_probe_says_that_codecs_can_pack_nothing_of_short_pieces(facts):
    rows = facts("--probe", "--block-bytes", "1KiB", "--pieces", "64")["codecs"]  # 8 numbers
    assert [row["codec"] for row in rows if row["ratio"] is None] == list(CODECS)[1:]
    assert rows[0]["ratio"] == 1 and rows[0]["save_gbps"] > 0 and rows[1]["save_gbps"] is None


@pytest.mark.host
def test_the_probe_gives_everything_back(facts, host):
    before = host.live_objects()
    facts("--probe")
    assert host.live_objects() == before


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--probe", "--pieces", "3"], "cannot lie in 3 pieces"),
        (["--probe", "--block-bytes", "100"], "cannot lie in 64 pieces"),
        (["--config", "/no/such/file.toml"], "/no/such/file.toml cannot be read"),
        (["--device", "host:9"], "'host:9' does not exist"),
    ],
)
def test_bad_settings_exit_2_with_a_reason(args, complaint, capsys):
    assert main(["info", "--device", DEVICE, *args]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.startswith("kvortex info: error: ") and not captured.out


def test_a_misspelt_variable_exits_2_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setenv("KVORTEX_CPU_POOL_SIZE", "1GiB")
    assert main(["info", "--device", DEVICE]) == 2
    assert "did you mean KVORTEX_CPU_POOL_SIZE_BYTES?" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--pool-bytes", "16PB"], ["--device", "tpu"], ["--pieces", "0"], ["--jsn"], ["x"]])
def test_bad_usage_exits_2(args):
    with pytest.raises(SystemExit) as caught:
        main(["info", *args])
    assert caught.value.code == 2


def test_a_disk_s_file_system_room_and_mode_are_shown(facts, tmp_path, capsys):
    path = tmp_path / "not" / "yet"
    (disk,) = facts("--disk", str(path))["disks"]
    assert disk["path"] == str(path) and os.path.ismount(disk["mount_point"])
    assert 0 < disk["free_bytes"] <= shutil.disk_usage(tmp_path).total
    assert main(["info", "--device", DEVICE, "--disk", str(path), "--disk", "/"]) == 0
    text = capsys.readouterr().out
    assert f"  disk        {path}: {disk['file_system']}, " in text and "  disk        /: " in text
    assert f"    I/O       {disk['io']}" in text
    assert not path.parent.exists() and not list(tmp_path.iterdir())


def test_a_disk_that_is_not_local_has_a_warning(facts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text("1 0 0:1 / / rw - overlay overlay rw\n")
    (disk,) = facts("--disk", str(tmp_path))["disks"]
    assert disk["file_system"] == "overlay" and "mount a volume" in disk["warning"]
    main(["info", "--device", DEVICE, "--disk", str(tmp_path)])
    assert f"  warning   {tmp_path} lies on overlay" in capsys.readouterr().out


def test_a_disk_that_cannot_be_written_is_shown_and_exits_2(capsys):
    assert main(["info", "--device", DEVICE, "--disk", "/proc"]) == 2
    printed = capsys.readouterr()
    assert "unknown: no file can be made there" in printed.out
    assert "kvortex info: error: /proc: no file can be made there" in printed.err


@pytest.mark.host
def test_a_fallback_says_why(capsys):
    if "cuda:0" in kvortex.driver.list_devices():
        pytest.skip("there is a GPU here")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "device = 'auto' (default), and " in text and kvortex.driver.why_no_cuda() in text


def test_huge_pages_are_told_as_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(limits, "HUGE_PAGES_SETTING", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert main(["info", "--device", DEVICE]) == 0
    assert "never: pinning takes twice as long" in capsys.readouterr().out
    monkeypatch.setenv("KVORTEX_POOL_HUGE_PAGES", "no")
    assert main(["info", "--device", DEVICE]) == 0
    assert "not asked for (pool_huge_pages is False)" in capsys.readouterr().out
