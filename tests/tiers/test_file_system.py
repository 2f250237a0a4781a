"""Which file system lies under a path, and what is said of it."""

import errno
import os

import pytest

from kvortex import log
from kvortex.tiers.disk import file_system
from kvortex.tiers.disk._io_calls import IoCalls
from kvortex.tiers.disk.file_system import direct_io_of, file_system_of

TABLE = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
22 21 0:21 / /proc rw - proc proc rw
30 21 0:30 / {path}/nfs rw,relatime shared:2 master:1 - nfs4 server:/export rw
31 21 0:31 / {path}/nfs/inner rw - xfs /dev/sdb rw
32 21 0:32 / {path}/with\\040space rw - lustre 10.0.0.1@tcp:/fs rw
33 21 0:33 / {path}/twice rw - ceph mon:/ rw
34 33 0:34 / {path}/twice rw - ext4 /dev/sdc rw
35 21 0:35 / {path}/mine rw - fuse.sshfs host: rw
36 21 0:36 / {path}/usb rw - fuseblk /dev/sdd rw
37 21 0:37 / {path}/layer rw - overlay overlay rw
a line that nobody understands
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """A table of mounts below a folder that has a folder for each."""
    path = os.path.realpath(tmp_path)
    (tmp_path / "mountinfo").write_text(TABLE.format(path=path))
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")
    for name in ("nfs/inner", "nfsx", "with space", "twice", "mine", "usb", "layer"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("name, kind", [
    ("nfs", "nfs4"), ("nfs/deep/er", "nfs4"), ("nfs/inner/x", "xfs"), ("nfsx", "ext4"), ("with space", "lustre"),
    ("twice", "ext4"), ("mine", "fuse.sshfs"), ("layer", "overlay"), ("usb/not/yet", "fuseblk"),
])  # fmt: skip
def test_the_mount_that_a_path_lies_on_is_found(mounts, name, kind):
    assert file_system_of(mounts / name)["file_system"] == kind


def test_a_link_is_followed(mounts):
    (mounts / "link").symlink_to(mounts / "nfs")
    assert file_system_of(mounts / "link" / "kv")["file_system"] == "nfs4"


@pytest.mark.parametrize("name, words", [
    ("nfs", "not a local disk"), ("with space", "not a local disk"), ("mine", "not a local disk"),
    ("layer", "the container's own layer"), ("nfs/inner", None), ("twice", None), ("usb", None),
])  # fmt: skip
def test_who_is_not_on_a_local_disk_is_warned(mounts, name, words):
    warning = file_system_of(mounts / name)["warning"]
    assert words in warning if words else warning is None


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "lustre", "ceph", "9p", "fuse", "fuse.s3fs", "virtiofs", "beegfs"]
)
def test_every_network_file_system_is_known(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(f"1 0 0:1 / / rw - {kind} source rw\n")
    assert f"lies on {kind}, not a local disk" in file_system_of(tmp_path)["warning"]


def test_a_kernel_without_a_table_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "none")
    facts = file_system_of(tmp_path)
    assert (facts["file_system"], facts["warning"]) == (None, None) and facts["free_bytes"] > 0


def test_a_tier_that_is_opened_on_such_a_path_warns_once(tmp_path, open_tier, caplog, monkeypatch):
    monkeypatch.setattr(log, "_told", set())
    monkeypatch.setattr(file_system, "MOUNTS", tmp_path / "mountinfo")
    for kind in ("ext4", "overlay", "overlay"):
        (tmp_path / "mountinfo").write_text(f"1 0 0:1 / / rw - {kind} source rw\n")
        open_tier().close()
    (record,) = (record for record in caplog.records if record.event == "disk_file_system")
    assert "are free" in record.message and "mount a volume" in record.message
    assert (record.file_system, record.path) == ("overlay", str(tmp_path))


def test_direct_i_o_is_told_as_the_store_does_it(tmp_path, open_tier):
    with open_tier() as tier:
        told, done = direct_io_of(tmp_path), tier.store.stats()
    assert (told["io"], told["io_reason"]) == (done["io"], done["io_reason"])


@pytest.mark.parametrize("call, how, reason", [
    ("set_direct", "EINVAL", "direct I/O was refused: Invalid argument"),
    ("direct_align", "nothing", "the file system has no direct I/O"),
])  # fmt: skip
def test_why_i_o_is_buffered_is_told(tmp_path, faulty, call, how, reason):
    faulty.plan(call, how)
    facts = direct_io_of(tmp_path, IoCalls(faulty.address))
    assert (facts["io"], facts["io_reason"]) == ("buffered", reason)


def test_an_older_kernel_tells_no_alignment(tmp_path, faulty):
    faulty.plan("direct_align", errno.ENOSYS)
    facts = direct_io_of(tmp_path, IoCalls(faulty.address))
    assert facts["align_bytes"] is None and facts["io"] == direct_io_of(tmp_path)["io"]
