"""Real servers on the loopback interface, as operators run them: Redis in four ways, and an S3 gateway."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid

STARTING_S = 60
PASSWORD, USER = "password-of-kvortex", "kvortex-user"
ACCESS_KEY, SECRET_KEY, BUCKET = "ACCESSKEYOFKVORTEX", "secretkeyofkvortex", "kvortex-test"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(works, what):
    deadline = time.monotonic() + STARTING_S
    while True:
        with contextlib.suppress(Exception):
            if works():
                return
        assert time.monotonic() < deadline, f"{what} does not start"
        time.sleep(0.05)


def run(*command, **settings):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def require(*programs):
    for program in programs:
        assert shutil.which(program), f"{program} is not there: run `make test-services`, which installs it"


class Server:
    """A process that is started, hung, woken, killed and started again."""

    process = None

    def start(self):
        self.process = subprocess.Popen([str(part) for part in self.command], stdout=self.log, stderr=self.log)
        wait_until(self.answers, self.command[0])
        return self

    def hang(self):
        """It accepts connections and never answers."""
        self.process.send_signal(signal.SIGSTOP)

    def wake(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Redis(Server):
    """A redis-server. `settings` are those of its configuration file."""

    def __init__(self, folder, **settings):
        require("redis-server", "redis-cli")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.socket = folder, free_port(), folder / "socket"
        settings = {"port": self.port, "unixsocket": self.socket, "save": '""', "dir": folder,
                    "bind": "127.0.0.1", **settings}  # fmt: skip
        lines = [f"{name.replace('_', '-')} {value}" for name, value in settings.items()]
        (folder / "redis.conf").write_text("\n".join(lines) + "\n")
        self.command = ["redis-server", folder / "redis.conf"]
        self.log = (folder / "log").open("ab")
        self.cli_options = []

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def cli(self, *words):
        environment = {**os.environ, "REDISCLI_AUTH": PASSWORD} if self.cli_options else None
        return run("redis-cli", "-s", self.socket, *self.cli_options, *words, env=environment)

    def answers(self):
        return "PONG" in self.cli("ping")


class RedisWithTLS(Redis):
    """Nothing but TLS on its port, and a user who may do what the tier needs, and no more."""

    def __init__(self, folder, *, days=30):
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = make_certificates(folder, days)
        (folder / "users.acl").write_text(
            "user default off\n"
            f"user {USER} on >{PASSWORD} ~kvortex:* +get +set +strlen +expire +unlink +ping +hello +client +info\n"
            f"user admin on >{PASSWORD} ~* &* +@all\n"
        )
        port = free_port()
        super().__init__(folder, port=0, tls_port=port, tls_cert_file=folder / "server.crt", tls_auth_clients="no",
                         tls_key_file=folder / "server.key", aclfile=folder / "users.acl")  # fmt: skip
        self.port, self.cli_options = port, ["--user", "admin"]

    @property
    def url(self):
        return f"rediss://{USER}@localhost:{self.port}"


class RedisCluster:
    """Three masters that share the slots."""

    def __init__(self, folder):
        self.nodes = []
        for i in range(3):
            port = free_port()
            self.nodes.append(Redis(folder / str(i), port=port, cluster_enabled="yes", cluster_port=free_port(),
                                    cluster_node_timeout=2000, cluster_config_file="nodes.conf"))  # fmt: skip
            self.nodes[-1].port = port

    def start(self):
        for node in self.nodes:
            node.start()
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        run("redis-cli", "--cluster", "create", *addresses, "--cluster-yes")
        wait_until(lambda: all("cluster_state:ok" in node.cli("cluster", "info") for node in self.nodes), "the cluster")
        return self

    @property
    def url(self):
        return self.nodes[0].url

    def kill(self):
        for node in self.nodes:
            node.kill()


def make_certificates(folder, days=30, name="localhost"):
    """An authority, and a certificate of its for this machine; return the authority's path."""
    require("openssl")
    ca, key = folder / "ca.crt", folder / "ca.key"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=kvortex tests",
        "-keyout", key, "-out", ca, "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    request, extensions = folder / "server.csr", folder / "extensions"
    extensions.write_text(f"subjectAltName=DNS:{name},IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", folder / "server.key",
        "-out", request)  # fmt: skip
    if days > 0:
        run("openssl", "x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", str(days),
            "-extfile", extensions, "-out", folder / "server.crt")  # fmt: skip
    else:  # one that has expired: only `openssl ca` of this version sets both dates
        database = folder / "database"
        database.write_text("")
        (folder / "serial").write_text("01\n")
        (folder / "ca.conf").write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={database}\nserial={folder}/serial\nnew_certs_dir={folder}\n"
            "default_md=sha256\npolicy=any\nunique_subject=no\n[any]\ncommonName=supplied\n"
        )
        run("openssl", "ca", "-batch", "-config", folder / "ca.conf", "-in", request, "-cert", ca, "-keyfile", key,
            "-startdate", "20200101000000Z", "-enddate", "20200201000000Z", "-extfile", extensions, "-notext",
            "-out", folder / "server.crt")  # fmt: skip
    return ca


class Gateway(Server):
    """radosgw over a monitor and an OSD in memory: S3 by a server that others run in earnest."""

    def __init__(self, folder):
        require("radosgw", "ceph-mon", "ceph-osd", "ceph", "radosgw-admin", "monmaptool")
        self.folder = folder
        for name in ("mon", "osd", "tls"):
            (folder / name).mkdir(parents=True)
        self.ca = make_certificates(folder / "tls")
        (folder / "tls" / "both.pem").write_text(
            "".join((folder / "tls" / name).read_text() for name in ("server.crt", "server.key"))
        )
        self.port, self.tls_port = free_port(), free_port()
        monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
        self.cluster_id = str(uuid.uuid4())
        frontends = f"beast endpoint=127.0.0.1:{self.port} ssl_endpoint=127.0.0.1:{self.tls_port} "
        frontends += f"ssl_certificate={folder}/tls/both.pem"
        self.conf = folder / "ceph.conf"
        self.conf.write_text(f"""
[global]
fsid={self.cluster_id}
mon host={monitor}
auth cluster required=none
auth service required=none
auth client required=none
osd pool default size=1
osd pool default min size=1
osd pool default pg num=1
osd crush chooseleaf type=0
mon allow pool size one=true
mon warn on pool no redundancy=false
osd pool default pg autoscale mode=off
public network=127.0.0.0/8
run dir={folder}
admin socket={folder}/$name.asok
log file={folder}/$name.log
pid file={folder}/$name.pid
[mon.a]
mon data={folder}/mon
[osd.0]
osd data={folder}/osd
osd objectstore=memstore
memstore device bytes=1073741824
osd journal={folder}/osd/journal
[client.rgw.a]
ms mon client mode=crc
rgw frontends={frontends}
rgw thread pool size=32
""")
        self.monitor, self.log = monitor, (folder / "out.log").open("ab")
        self.command = ["radosgw", "-c", self.conf, "-n", "client.rgw.a", "-f"]
        self.below = []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint(self):
        return f"https://localhost:{self.tls_port}"

    def start(self):
        if not self.below:
            self.start_cluster()
        super().start()
        with contextlib.suppress(self.s3().exceptions.BucketAlreadyOwnedByYou):
            self.s3().create_bucket(Bucket=BUCKET)  # a name has three characters or more
        return self

    def start_cluster(self):
        conf, folder = ["-c", self.conf], self.folder
        run("monmaptool", "--create", "--addv", "a", self.monitor, "--fsid", self.cluster_id, folder / "monmap")
        run("ceph-mon", *conf, "-i", "a", "--mkfs", "--monmap", folder / "monmap")
        self.spawn("ceph-mon", *conf, "-i", "a", "-f")
        osd = str(uuid.uuid4())  # the monitor ignores an OSD that has another one than it was created with
        run("ceph", *conf, "osd", "create", osd, timeout=STARTING_S)
        run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        run("ceph", *conf, "osd", "crush", "add", "0", "1.0", "host=h", "root=default")
        self.spawn("ceph-osd", *conf, "-i", "0", "-f")
        run("radosgw-admin", *conf, "user", "create", "--uid=kvortex", "--display-name=kvortex",
            f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}", timeout=STARTING_S)  # fmt: skip

    def spawn(self, *command):
        self.below.append(subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log))

    def s3(self):
        """Another client, to look at what lies there."""
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, region_name="default",
                            aws_secret_access_key=SECRET_KEY)  # fmt: skip

    def answers(self):
        self.s3().list_buckets()
        return True

    def end(self):
        for process in (self.process, *reversed(self.below)):
            if process is not None:
                process.kill()
                process.wait()
