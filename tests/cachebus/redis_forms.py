"""Redis in its other forms, each of a test's own: with TLS, as a cluster, with a sentinel."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis_server import RedisServer
from tests_shared import wait_for

from cachebus.ports import free_port

SLOTS = 16384


class Certificates:
    """An authority of a test's own and what it signed: ``FOLDER/ca.pem``, ``NAME.pem`` and ``NAME.key``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        made = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def sign(self, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
        """The files of a new certificate for an address, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        made = builder.add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        certificate, private = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        plain = serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        return certificate, private

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        return builder.not_valid_after(now + datetime.timedelta(days=1))


class TlsServer(RedisServer):
    """One that speaks nothing but TLS."""

    def __init__(self, folder: Path, certificates: Certificates, *options: str, address: str = "127.0.0.1", known_only: bool = False) -> None:
        self.ca = certificates.ca
        self._certificate, self._key = certificates.sign("server", address)
        port = free_port("127.0.0.1")
        tls = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "yes" if known_only else "no"]
        tls += ["--tls-cert-file", str(self._certificate), "--tls-key-file", str(self._key), "--tls-ca-cert-file", str(self.ca)]
        self._tls_port = port
        super().__init__(folder, *tls, *options)
        self.port = port
        self.url = f"rediss://127.0.0.1:{port}/0"

    def make_client(self) -> redis.Redis:
        own: dict[str, Any] = {"ssl_certfile": str(self._certificate), "ssl_keyfile": str(self._key)}
        own |= {"ssl_ca_certs": str(self.ca), "ssl_check_hostname": False, "password": self._password()}
        return redis.Redis(port=self._tls_port, socket_timeout=5, ssl=True, **own)


class RedisCluster:
    """Three masters that share the slots; with TLS where there are certificates."""

    def __init__(self, folder: Path, certificates: Certificates | None = None, *, whole: bool = False) -> None:
        self.nodes: list[RedisServer] = []
        self._buses = [free_port("127.0.0.1") for _ in range(3)]
        for number, bus in enumerate(self._buses):
            own = folder / f"node{number}"
            own.mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000"]
            options += ["--cluster-require-full-coverage", "yes" if whole else "no"]
            if certificates:
                self.nodes.append(TlsServer(own, certificates, "--tls-cluster", "yes", *options))
            else:
                self.nodes.append(RedisServer(own, *options))
        for number, node in enumerate(self.nodes):
            self._say(node, "ADDSLOTSRANGE", SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1)
            if number:
                self._say(node, "MEET", "127.0.0.1", self.nodes[0].port, self._buses[0])
        wait_for(lambda: all(self._whole(node) for node in self.nodes), 15)
        scheme = "rediss" if certificates else "redis"
        query = f"?ssl_ca_certs={certificates.ca}" if certificates else ""
        self.url = f"{scheme}+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}{query}"

    def node_of(self, name: bytes) -> int:
        """The number of the node that holds a value."""
        return next(number for number, node in enumerate(self.nodes) if name in node.client.keys("*"))

    def move(self, name: bytes, to: int) -> None:
        """Moves the slot of a value, and all values in it, to another node."""
        source, target = self.nodes[self.node_of(name)], self.nodes[to]
        slot = int(self._say(source, "KEYSLOT", name))
        self._say(target, "SETSLOT", slot, "IMPORTING", self._id(source))
        self._say(source, "SETSLOT", slot, "MIGRATING", self._id(target))
        for value in source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, value, 0, 5000)
        for node in (target, source, *self.nodes):
            self._say(node, "SETSLOT", slot, "NODE", self._id(target))

    def begin_to_move(self, name: bytes, to: int) -> None:
        """Moves a value and leaves its slot on the way."""
        source, target = self.nodes[self.node_of(name)], self.nodes[to]
        slot = int(self._say(source, "KEYSLOT", name))
        self._say(target, "SETSLOT", slot, "IMPORTING", self._id(source))
        self._say(source, "SETSLOT", slot, "MIGRATING", self._id(target))
        source.client.execute_command("MIGRATE", "127.0.0.1", target.port, name, 0, 5000)

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def _id(self, node: RedisServer) -> str:
        found = node.client.execute_command("CLUSTER MYID")
        return found.decode() if isinstance(found, bytes) else str(found)

    def _whole(self, node: RedisServer) -> bool:
        found = node.client.execute_command("CLUSTER INFO")
        told = found if isinstance(found, dict) else dict(line.split(":") for line in found.decode().split())
        return told["cluster_state"] == "ok" and int(told["cluster_known_nodes"]) == 3

    @staticmethod
    def _say(node: RedisServer, *words: object) -> Any:
        return node.client.execute_command(f"CLUSTER {words[0]}", *words[1:])


class Watched:
    """A master, its replica, and a sentinel that watches them under the name "main"; all with TLS and nothing else where there are certificates.

    ``password`` is the servers', ``sentinel_password`` what the sentinel asks its user "watcher" for.
    """

    def __init__(self, folder: Path, password: str = "", certificates: Certificates | None = None, sentinel_password: str = "") -> None:
        self._certificates, self._password, self._sentinel_password = certificates, password, sentinel_password
        for name in ("master", "replica", "sentinel"):
            (folder / name).mkdir()
        self._stack = contextlib.ExitStack()
        try:
            self.master = self._server(folder / "master", "--repl-diskless-sync-delay", "0")
            self.replica = self._server(folder / "replica", "--replicaof", "127.0.0.1", str(self.master.port))
            self.port = free_port("127.0.0.1")
            self.client = self._watch(folder / "sentinel")
            wait_for(self._watches, 15)
        except BaseException:
            self.stop()
            raise
        user = f":{quote(password)}@" if password else ""
        self.url = f"redis{'s' if certificates else ''}+sentinel://{user}127.0.0.1:{self.port},127.0.0.1:9/main"

    def _server(self, folder: Path, *options: str) -> RedisServer:
        secret = ["--requirepass", self._password, "--masterauth", self._password] if self._password else []
        if self._certificates:
            server: RedisServer = TlsServer(folder, self._certificates, "--tls-replication", "yes", *secret, *options)
        else:
            server = RedisServer(folder, *secret, *options)
        self._stack.callback(server.stop)
        return server

    def _watch(self, folder: Path) -> redis.Redis:
        lines = ["bind 127.0.0.1", f"dir {folder}", f"sentinel monitor main 127.0.0.1 {self.master.port} 1"]
        lines += ["sentinel down-after-milliseconds main 500", "sentinel failover-timeout main 3000"]
        lines += [f'sentinel auth-pass main "{self._password}"'] if self._password else []
        own: dict[str, Any] = {}
        if self._certificates:
            certificate, key = self._certificates.sign("sentinel")
            lines += ["port 0", f"tls-port {self.port}", "tls-replication yes", "tls-auth-clients no"]
            lines += [f"tls-cert-file {certificate}", f"tls-key-file {key}", f"tls-ca-cert-file {self._certificates.ca}"]
            own = {"ssl": True, "ssl_ca_certs": str(self._certificates.ca)}
        else:
            lines += [f"port {self.port}"]
        if self._sentinel_password:
            lines += ["user default off", f"user watcher on >{self._sentinel_password} allchannels +@all"]
            own |= {"username": "watcher", "password": self._sentinel_password}
        file = folder / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        program = shutil.which("redis-server")
        assert program
        sentinel = subprocess.Popen([program, str(file), "--sentinel"], stdout=subprocess.DEVNULL)
        self._stack.callback(sentinel.wait)
        self._stack.callback(sentinel.kill)
        client = redis.Redis("127.0.0.1", self.port, socket_timeout=5, **own)
        self._stack.callback(client.close)
        return client

    def replicated(self) -> bool:
        """Whether the replica has all that the master was told. Counts of keys don't tell: a replica that lags passes through every count."""
        theirs = self.replica.client.info("replication")
        told = self.master.client.info("replication")["master_repl_offset"]
        return theirs.get("master_link_status") == "up" and theirs["slave_repl_offset"] >= told

    def master_port(self) -> int:
        """Where the sentinel says that the master is."""
        return int(self.client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "main")[1])

    def fail_over(self) -> None:
        """Makes the replica the master, though the master lives."""
        self.client.execute_command("SENTINEL FAILOVER", "main")

    def stop(self) -> None:
        self._stack.close()

    def _watches(self) -> bool:
        try:
            return bool(self.client.sentinel_slaves("main")) and self.replica.client.info("replication")["master_link_status"] == "up"
        except redis.RedisError:
            return False
