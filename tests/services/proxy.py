"""A proxy in front of a real server that breaks what goes through it."""

import contextlib
import socket
import threading
import time


class Proxy:
    """Pass bytes both ways, until told to do harm.

    Attributes
    ----------
    stops_after : int or None
        Bytes of answers that a connection passes before it goes silent, connected for ever.
    cuts_after : int or None
        The same, but then it closes.
    http_status : int or None
        Answer each HTTP request by itself, with this.
    flips : bool
        Change a bit in the middle of each long answer.
    """

    def __init__(self, port):
        self.target, self.stops_after, self.cuts_after, self.http_status, self.flips = port, None, None, None, False
        self.num_requests = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.is_closed, self.sockets = False, []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while not self.is_closed:
            with contextlib.suppress(OSError):
                client, _ = self.listener.accept()
                self.sockets.append(client)
                work = self.answer if self.http_status else self.connect
                threading.Thread(target=work, args=(client,), daemon=True).start()

    def connect(self, client):
        with contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.target))
            self.sockets.append(server)
            threading.Thread(target=self.pass_on, args=(client, server, False), daemon=True).start()
            self.pass_on(server, client, True)

    def pass_on(self, source, target, is_answer):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_answer and self.flips and len(data) > 1000:
                    data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
                limit = (self.stops_after if self.stops_after is not None else self.cuts_after) if is_answer else None
                if limit is not None and passed + len(data) > limit:
                    target.sendall(data[: max(0, limit - passed)])
                    while self.stops_after is not None and not self.is_closed:
                        time.sleep(0.05)
                    break
                target.sendall(data)
                passed += len(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def answer(self, client):
        """Read a request whole, and answer it with a status."""
        with contextlib.suppress(OSError, ValueError), client:
            file = client.makefile("rb")
            while line := file.readline():
                length, is_head = 0, line.startswith(b"HEAD")
                while (header := file.readline()).strip():
                    name, _, value = header.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                file.read(length)
                self.num_requests += 1
                body = b"" if is_head else b"<Error><Code>Planted</Code></Error>"
                client.sendall(
                    b"HTTP/1.1 %d Planted\r\ncontent-length: %d\r\n\r\n%s" % (self.http_status, len(body), body)
                )

    def drop_connections(self):
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.sockets = []

    def close(self):
        self.is_closed = True
        self.listener.close()
        self.drop_connections()
