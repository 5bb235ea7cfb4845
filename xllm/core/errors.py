"""Errors that cross rooms. Each knows how a user should see it: an HTTP status, a type, the field at fault."""


class XllmError(Exception):
    """Base of every error we raise on purpose.

    `status` is the HTTP status the front door answers with, `type` the machine-readable error type, `param`
    the request field at fault (if one is), `code` a short stable code (if there is one).
    """

    status = 500
    type = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigError(XllmError):
    """What was asked for cannot work on this machine or in this combination. Raised at start, never later."""

    type = "config_error"


class InvalidRequest(XllmError):
    """The request itself is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


class NotFound(XllmError):
    status = 404
    type = "not_found_error"


class Overloaded(XllmError):
    """Queues are full. `retry_after_s` is what the `Retry-After` header says."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1):
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class Unavailable(XllmError):
    """Starting, draining or broken: nothing new is accepted here for now."""

    status = 503
    type = "unavailable_error"

    def __init__(self, message: str, *, retry_after_s: int = 1):
        super().__init__(message, code="unavailable")
        self.retry_after_s = retry_after_s


class EngineFault(XllmError):
    """The engine could not finish an admitted request (an exception in a step, a hang, a dead process)."""

    type = "engine_error"


class DeviceLost(EngineFault):
    """The device takes no more work in this process. The engine ends; a new one may find the device well."""
