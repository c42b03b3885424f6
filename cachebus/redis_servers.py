"""Where the shared tier's servers are, as its URL says: one, a master that sentinels name, or the nodes of a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis import cluster, sentinel
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from cachebus.errors import TierError
from cachebus.resp import Line

_PORTS = {"sentinel": 26379, "cluster": 6379}
_TRIED_MAX = 10_000
"""Tags that are tried in search of one that a given node keeps."""


class RemoteUnavailable(TierError):
    """The shared tier does not answer, or did not a moment ago."""


class Servers:
    """Where the server is: one, a master that sentinels name, or the nodes of a cluster, each of which is a place. One server is the place "".

    ``kind`` is "", "sentinel" or "cluster". Raises TierError where the URL says nothing that can be done.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        scheme, _, self.kind = parts.scheme.partition("+")
        query = dict(parse_qsl(parts.query))
        self._files = {"password": query.pop("password_file", ""), "sentinel": query.pop("sentinel_password_file", "")}
        self._watcher = query.pop("sentinel_username", None)
        # Retries would multiply the silence; what a second protocol version could push in between would be taken for an answer.
        own = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": Retry(NoBackoff(), 0), "protocol": 2}
        self._timeout, self._own = timeout, own
        self._one: Any = None
        self._cluster: Any = None
        user, _, hosts = parts.netloc.rpartition("@")
        plain = url.partition("?")[0] if not self.kind else f"{scheme}://{user}{'@' if user else ''}localhost"
        try:
            self._hosts = [_host_and_port(item, _PORTS[self.kind]) for item in hosts.split(",")] if self.kind else []
            self._service = parts.path.strip("/") or "mymaster"
            options = {**parse_url(f"{plain}?{urlencode(query)}"), **own}  # type: ignore[no-untyped-call]
            # Makes no connection yet, and refuses what it does not know.
            options.get("connection_class", redis.Connection)(**{name: value for name, value in options.items() if name != "connection_class"})
        except (TypeError, ValueError, redis.RedisError) as error:
            raise TierError(f"cache.remote_url: {redacted(url)} can't be used: {error}") from error
        if self.kind == "cluster" and (options.pop("db", 0) or parts.path.strip("/")):
            raise TierError(f"cache.remote_url: {redacted(url)}: a cluster has one database; leave the number away")
        if self.kind:
            secure = {"ssl": True} if scheme == "rediss" else {}
            options = {name: value for name, value in options.items() if name not in ("connection_class", "host", "port")} | secure
        self._options = options

    def find(self) -> None:
        """Looks the server up (again). Raises RemoteUnavailable."""
        options = dict(self._options)
        try:
            if self._files["password"]:
                options["password"] = Path(self._files["password"]).read_text().strip()
            if self.kind == "sentinel":
                watching = {name: value for name, value in options.items() if name.startswith("ssl")} | self._own | {"username": self._watcher}
                if self._files["sentinel"]:
                    watching["password"] = Path(self._files["sentinel"]).read_text().strip()
                watchers: Any = sentinel.Sentinel(self._hosts, sentinel_kwargs=watching)  # type: ignore[no-untyped-call]
                self._one = watchers.master_for(self._service, **options)
            elif self.kind == "cluster":
                known = [(node.host, node.port) for node in self._cluster.get_nodes()] if self._cluster else []
                nodes = [cluster.ClusterNode(*host) for host in [*self._hosts, *known]]  # type: ignore[no-untyped-call]
                retry = options.pop("retry")
                self._cluster = cluster.RedisCluster(startup_nodes=nodes, retry=retry, **options)
            else:
                self._one = redis.Redis(connection_pool=redis.ConnectionPool(**options))
        except (OSError, redis.RedisError) as error:
            raise RemoteUnavailable(f"the shared tier does not answer: {error}") from error

    def places(self) -> set[str]:
        """Every place."""
        return {node.name for node in self._cluster.get_primaries()} if self._cluster else {""}

    def where(self, name: str) -> str:
        """The place that keeps ``name``; "" where a cluster has none for it."""
        try:
            return str(self._cluster.get_node_from_key(name).name) if self._cluster else ""
        except redis.RedisError:
            return ""

    def tag(self, where: str) -> str:
        """A hash tag whose values that place keeps, the same for all who know the same nodes; "" where none is found."""
        return next((str(number) for number in range(_TRIED_MAX) if self.where(f"{{{number}}}") == where), "")

    def client(self, where: str) -> Any:
        """redis-py's client of a place. Raises RedisError where there is none such (any more)."""
        if not self._cluster:
            return self._one
        node = self._cluster.get_node(node_name=where)
        if node is None:
            raise redis.RedisError("no node of the cluster keeps that")
        return self._cluster.get_redis_connection(node)

    def connect(self, where: str) -> Line:
        """A connection to a place."""
        connection = self.client(where).connection_pool.make_connection()
        connection.connect()
        return Line(connection._sock, connection.disconnect, self._timeout)


def redacted(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"([?&](?:ssl_)?password=)[^&]*", r"\1***", re.sub(r"(://[^:@/]*):[^@/]*@", r"\1:***@", url))


def _host_and_port(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return parts.hostname, parts.port or port
