from __future__ import annotations

from decode.settings import DecodeSettings


def test_two_by_default_and_never_none() -> None:
    assert DecodeSettings().count == 2
    assert DecodeSettings().problems() == []
    assert [key for key, _ in DecodeSettings(count=0).problems()] == ["count"]
