"""A model behind an OpenAI-compatible server, for the terminal commands."""

from typing import Any

import httpx
import msgspec

from xllm.core.errors import XllmError
from xllm.server.answer import Answer, Piece

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0  # a first token may be long in coming


class ServerError(XllmError):
    """What the server refused, or that there is none."""


class RemoteModel:
    def __init__(self, url: str, model: str | None, key: str | None, sampling: dict[str, Any]):
        """Raises `ServerError` when nobody answers at `url`, which may end in /v1 or not."""
        base = url if "://" in url else f"http://{url}"
        base = base.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, ValueError) as e:
            raise ServerError(f"{url} is not a URL: {e}") from e
        self._sampling = sampling
        try:
            self.model = model or self._first_model()
        except BaseException:
            self._http.close()
            raise

    def chat(self, messages: list[dict[str, str]]) -> Answer:
        return self._stream("/chat/completions", {"messages": messages})

    def complete(self, prompt: str) -> Answer:
        return self._stream("/completions", {"prompt": prompt})

    def close(self) -> None:
        self._http.close()

    def _first_model(self) -> str:
        try:
            response = self._http.get("/models")
            if response.status_code != 200:
                raise _refused(response)
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        except (ValueError, LookupError, TypeError) as e:
            raise ServerError(f"{self._http.base_url} does not list its models like an OpenAI server") from e

    def _stream(self, path: str, what: dict[str, Any]) -> Answer:
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
            **what,
        }
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield _piece(msgspec.json.decode(line[6:]))
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        except msgspec.DecodeError as e:
            raise ServerError("the server sent what is not an event of an answer") from e

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerError(f"nobody answers at {self._http.base_url}; `xllm serve` starts a server")
        return ServerError(f"the connection to {self._http.base_url} failed: {error or type(error).__name__}")


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise ServerError(str(event["error"].get("message", "the server failed")))
    usage = event.get("usage") or {}
    text = ""
    for choice in event.get("choices", ()):
        text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
    return Piece(text, 1 if text else 0, usage.get("completion_tokens"))


def _refused(response: httpx.Response) -> ServerError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return ServerError(f"the server refused ({response.status_code}): {message}")
