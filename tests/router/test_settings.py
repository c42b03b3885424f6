import pytest

from router.settings import RouterSettings


def test_the_defaults_are_possible() -> None:
    assert RouterSettings().problems() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", 65536),
        ("port", -1),
        ("prefill_tokens_min", 0),
        ("body_bytes_max", 0),
        ("requests_max", 0),
        ("worker_requests_max", 0),
        ("request_seconds_max", 0),
        ("queue_max", -1),
        ("queue_seconds_max", -1),
        ("decode_tokens_max", -1),
        ("health_ms", -1),
        ("connect_seconds_max", 0),
        ("report_ms_max", -1),
        ("single_flight_seconds_max", -1),
        ("drain_seconds_max", -1),
    ],
)
def test_what_no_router_can_run_with_is_named(key: str, value: int) -> None:
    ((named, message),) = RouterSettings(**{key: value}).problems()
    assert named == key
    assert str(value) in message
