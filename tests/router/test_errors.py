import json

import pytest

from router.errors import ApiError, refusal


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "not_found_error"), (405, "invalid_request_error"), (413, "invalid_request_error"), (503, "server_error")],
)
def test_an_error_has_openais_shape(status: int, kind: str) -> None:
    response = ApiError(status, "why", code="c", param="p", retry_seconds=2 if status == 503 else 0).response({"x-request-id": "r"})
    assert json.loads(response.body) == {"error": {"message": "why", "type": kind, "param": "p", "code": "c"}}
    assert (response.status_code, response.headers["x-request-id"]) == (status, "r")
    assert response.headers.get("retry-after") == ("2" if status == 503 else None)


def test_an_engines_refusal_is_passed_on_in_the_form_of_the_api_that_was_asked() -> None:
    told = b'{"error":{"message":"no","type":"BadRequestError","param":"n","code":400}}'
    assert refusal(400, told, "/v1/responses") == told
    assert json.loads(refusal(400, told, "/v1/messages")) == {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    for path in ("/v1/completions", "/v1/messages/count_tokens"):
        assert json.loads(refusal(404, b"404: Not Found", path))["error"]["message"] == "404: Not Found"
        assert json.loads(refusal(400, b"\xff", path))["error"]["message"]
