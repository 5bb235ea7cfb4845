import pytest

from xllm.core import errors


@pytest.mark.parametrize(
    ("error", "status", "type", "code"),
    [
        (errors.XllmError("m"), 500, "internal_error", None),
        (errors.ConfigError("m"), 500, "config_error", None),
        (errors.InvalidRequest("m"), 400, "invalid_request_error", None),
        (errors.NotFound("m"), 404, "not_found_error", None),
        (errors.Overloaded("m"), 429, "rate_limit_error", "overloaded"),
        (errors.Unavailable("m"), 503, "unavailable_error", "unavailable"),
        (errors.EngineFault("m"), 500, "engine_error", None),
    ],
)
def test_each_knows_how_a_user_sees_it(error, status, type, code):
    assert isinstance(error, errors.XllmError)
    assert (error.status, error.type, error.code, error.message, str(error)) == (status, type, code, "m", "m")


def test_the_field_at_fault_is_named():
    error = errors.InvalidRequest("top_p is wrong", param="top_p", code="out_of_range")
    assert (error.param, error.code) == ("top_p", "out_of_range")


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.Unavailable])
def test_who_may_come_again_is_told_when(kind):
    assert kind("later").retry_after_s == 1
    assert kind("later", retry_after_s=7).retry_after_s == 7
