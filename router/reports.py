"""Reports on their way from the engines to the requests they speak of."""

from __future__ import annotations

import asyncio

from cachebus.messages import Report


class Reports:
    """Requests expect reports by transfer id; what nobody expects any more is passed over."""

    def __init__(self) -> None:
        self._expected: dict[str, asyncio.Future[Report]] = {}

    def expect(self, transfer_id: str) -> asyncio.Future[Report]:
        """The report to come; ``forget`` it when the request ends."""
        future = asyncio.get_running_loop().create_future()
        self._expected[transfer_id] = future
        return future

    def deliver(self, report: Report) -> None:
        """Hands a report over. Several come for a request with n > 1: the first one counts."""
        future = self._expected.get(report.transfer_id)
        if future is not None and not future.done():
            future.set_result(report)

    def forget(self, transfer_id: str) -> None:
        """Nobody waits for it any longer."""
        self._expected.pop(transfer_id, None)


async def arrived(report: asyncio.Future[Report], wait_ms: int) -> Report | None:
    """The report, if it comes within ``wait_ms``."""
    done, _ = await asyncio.wait([report], timeout=wait_ms / 1000)
    return report.result() if done else None
