"""A small etcd client: what instances and routers need, over etcd's JSON gateway (`/v3/...`), which is on by default since 3.4.

Why not a client library: `aetcd` brings grpcio and protobuf for seven calls, `etcd3gw` blocks (requests, and a thread for each
watch). `httpx` is here already.

Every call has a time-out. A call that was not sent, for nobody listened, goes to the next endpoint; one that was sent is
tried again only where it reads. What is left of it is `EtcdUnavailable`, and then a write may have happened or not: callers
write transactions that compare, so that doing them again is safe.
"""

import base64
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import httpx
import msgspec

from xllm.cluster.etcd_types import Compare, Event, KeyValue, Put, Range, Transaction, WatchBatch
from xllm.core.errors import ConfigError, XllmError

_TRY_NEXT = {4, 14}  # gRPC's DeadlineExceeded and Unavailable: no leader, stopping, timed out


class EtcdError(XllmError):
    """etcd answered, with an error. `grpc_code` is gRPC's number, 5 for what does not exist."""

    type = "etcd_error"

    def __init__(self, message: str, grpc_code: int = 2):
        super().__init__(message)
        self.grpc_code = grpc_code


class EtcdUnavailable(EtcdError):
    """Nobody answered in time. What was asked for may have been done."""

    type = "etcd_unavailable"


class Compacted(EtcdError):
    """The revisions that a watch wanted are gone: list again and watch from there."""

    def __init__(self, revision: int):
        super().__init__(f"etcd has compacted what is older than revision {revision}", 11)
        self.revision = revision


def end_of(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`, which must not be empty nor end in 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


class Etcd:
    """One etcd cluster. `urls`: `http[s]://host:port`, one or several (a list, or separated by commas)."""

    def __init__(
        self, urls: str | Sequence[str], *, timeout_s: float = 2.0, tls: ssl.SSLContext | None = None
    ):
        given = urls.split(",") if isinstance(urls, str) else list(urls)
        self.urls = [url.strip().rstrip("/") for url in given if url.strip()]
        if not self.urls:
            raise ConfigError("etcd wants at least one URL, such as http://127.0.0.1:2379")
        for url in self.urls:
            _check(url)
        secure = any(url.startswith("https://") for url in self.urls)
        self._timeout = httpx.Timeout(timeout_s)
        # proxies of the environment are for the world outside; reading the system's certificates takes tens of ms
        self._http = httpx.AsyncClient(
            timeout=self._timeout,
            trust_env=False,
            verify=tls if tls is not None else secure,
        )
        self.current = 0  # index of the endpoint that is asked first; changes when it fails

    async def aclose(self) -> None:
        await self._http.aclose()

    # ---- keys

    async def range(self, key: bytes, end: bytes | None = None, *, newest_only: bool = False) -> Range:
        """Linearizable. `newest_only`: only the key changed last, without its value; `count` counts all."""
        asked: dict[str, Any] = {"key": _text(key)}
        if end is not None:
            asked["range_end"] = _text(end)
        if newest_only:
            asked |= {"keys_only": True, "limit": "1", "sort_order": "DESCEND", "sort_target": "MOD"}
        return _range(await self._call("kv/range", asked, reads=True))

    async def list(self, prefix: bytes) -> Range:
        return await self.range(prefix, end_of(prefix))

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Returns the revision at which it was written."""
        asked = {"key": _text(key), "value": _text(value), "lease": str(lease)}
        return _revision(await self._call("kv/put", asked))

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put]) -> Transaction:
        """All of `then` where all of `compare` holds, else nothing."""
        asked = {"compare": [c.to_json() for c in compare], "success": [put.to_json() for put in then]}
        done = await self._call("kv/txn", asked)
        return Transaction(bool(done.get("succeeded")), _revision(done))

    async def compact(self, revision: int) -> None:
        await self._call("kv/compaction", {"revision": str(revision), "physical": True})

    # ---- leases

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """`(lease id, seconds)`; etcd may give more seconds than asked for."""
        done = await self._call("lease/grant", {"TTL": str(ttl_s)})
        return int(done["ID"]), int(done["TTL"])

    async def keep_alive(self, lease: int) -> int:
        """Seconds that it lives on; 0: it is gone."""
        done = await self._call(
            "lease/keepalive", {"ID": str(lease)}, reads=True
        )  # doing it twice does no harm
        return int(done["result"].get("TTL", 0))

    async def revoke(self, lease: int) -> None:
        """Takes the lease's keys away with it. One that is gone already is fine."""
        try:
            await self._call("lease/revoke", {"ID": str(lease)})
        except EtcdUnavailable:
            raise
        except EtcdError as e:
            if e.grpc_code != 5:
                raise

    # ---- changes

    async def watch(self, prefix: bytes, start_revision: int) -> AsyncIterator[WatchBatch]:
        """What happens to keys under `prefix` from `start_revision` on, for ever. The first batch is empty and says that the
        watch stands. Raises `Compacted`, `EtcdUnavailable` when the connection ends. It does not notice a peer that is
        silent because it hangs: ask something beside it from time to time."""
        wanted = {
            "key": _text(prefix),
            "range_end": _text(end_of(prefix)),
            "start_revision": str(start_revision),
        }
        body = msgspec.json.encode({"create_request": wanted})
        url = f"{self.urls[self.current]}/v3/watch"
        endless = httpx.Timeout(self._timeout.connect, read=None)
        try:
            async with self._http.stream("POST", url, content=body, timeout=endless) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    _raise(answer)
                async for line in answer.aiter_lines():
                    if line.strip():
                        yield _batch(line)
        except (httpx.HTTPError, httpx.StreamError) as e:
            self._turn(self.urls.index(url.removesuffix("/v3/watch")))
            raise EtcdUnavailable(f"the watch at {url} broke: {_why(e)}", 14) from e
        raise EtcdUnavailable(f"etcd ended the watch at {url}", 14)

    # ---- one call

    async def _call(self, path: str, asked: dict[str, Any], *, reads: bool = False) -> dict[str, Any]:
        body = msgspec.json.encode(asked)
        failures: list[str] = []
        first = self.current
        for n in range(len(self.urls)):
            index = (first + n) % len(self.urls)
            url = f"{self.urls[index]}/v3/{path}"
            try:
                answer = await self._http.post(url, content=body)
                if answer.status_code != 200:
                    _raise(answer)
                return _object(answer.content)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as e:
                failures.append(f"{url}: {_why(e)}")  # nothing was sent
            except (httpx.HTTPError, EtcdUnavailable) as e:
                failures.append(f"{url}: {_why(e)}")
                if not reads:
                    self._turn(index)
                    break
            self._turn(index)
        raise EtcdUnavailable("no etcd answers (" + "; ".join(failures) + ")", 14)

    def _turn(self, failed: int) -> None:
        """Ask the next one first from here on, unless somebody has turned already."""
        if self.current == failed:
            self.current = (failed + 1) % len(self.urls)


def _check(url: str) -> None:
    """Raises ConfigError for what is no address of an etcd."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ConfigError(f"an etcd URL is http://host:port or https://host:port; {e}") from e
    if parsed.userinfo:  # not repeated: it is a secret
        raise ConfigError("an etcd URL is http://host:port; users and passwords of etcd are not supported")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"an etcd URL is http://host:port or https://host:port, not {url!r}")


def _why(e: Exception) -> str:
    return str(e) or type(e).__name__


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _object(data: bytes | str) -> dict[str, Any]:
    """Raises EtcdUnavailable where it is no JSON object, as when a proxy answers in etcd's place."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as e:
        raise EtcdUnavailable(f"this is no answer of etcd's: {e}", 14) from e


def _raise(answer: httpx.Response) -> None:
    """The error that an answer other than 200 stands for."""
    try:
        said = msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.MsgspecError:
        said = {}
    code = int(said.get("code", 14 if answer.status_code >= 500 else 2))
    message = str(said.get("message") or said.get("error") or f"HTTP status {answer.status_code}")
    if code in _TRY_NEXT:
        raise EtcdUnavailable(message, code)
    raise EtcdError(message, code)


def _revision(answer: dict[str, Any]) -> int:
    return int(answer["header"].get("revision", 0))


def _key_value(found: dict[str, Any]) -> KeyValue:
    return KeyValue(
        key=base64.b64decode(found["key"]),
        value=base64.b64decode(found.get("value", "")),
        create_revision=int(found.get("create_revision", 0)),
        mod_revision=int(found.get("mod_revision", 0)),
        lease=int(found.get("lease", 0)),
    )


def _range(answer: dict[str, Any]) -> Range:
    found = [_key_value(kv) for kv in answer.get("kvs", ())]
    return Range(found, _revision(answer), int(answer.get("count", 0)))


def _batch(line: str) -> WatchBatch:
    said = _object(line)
    if "error" in said:
        error = said["error"]
        raise EtcdUnavailable(str(error.get("message", error)) if isinstance(error, dict) else str(error), 14)
    result = said["result"]
    if result.get("canceled"):
        if "compact_revision" in result:
            raise Compacted(int(result["compact_revision"]))
        raise EtcdUnavailable(
            f"etcd cancelled the watch: {result.get('cancel_reason', 'no reason given')}", 14
        )
    events: list[Event] = []
    for event in result.get("events", ()):
        kind: Literal["put", "delete"] = "delete" if event.get("type") == "DELETE" else "put"
        events.append(Event(kind, _key_value(event["kv"])))
    return WatchBatch(events, _revision(result))
