import json

import pytest

from router.errors import ApiError


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "not_found_error"), (405, "invalid_request_error"), (413, "invalid_request_error"), (503, "server_error")],
)
def test_an_error_has_openais_shape(status: int, kind: str) -> None:
    response = ApiError(status, "why", code="c", param="p", retry_seconds=2 if status == 503 else 0).response({"x-request-id": "r"})
    assert json.loads(response.body) == {"error": {"message": "why", "type": kind, "param": "p", "code": "c"}}
    assert (response.status_code, response.headers["x-request-id"]) == (status, "r")
    assert response.headers.get("retry-after") == ("2" if status == 503 else None)
