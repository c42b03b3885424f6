import asyncio

from cachebus.messages import Report
from router.reports import Reports, arrived


def test_the_first_report_counts_and_strangers_are_passed_over() -> None:
    async def scenario() -> None:
        reports = Reports()
        future = reports.expect("t")
        for transfer, tokens in (("other", 1), ("t", 2), ("t", 3)):
            reports.deliver(Report(transfer, "decode", "w", 10, tokens, {}))
        report = await arrived(future, 1000)
        assert report is not None
        assert report.hbm_tokens == 2

    asyncio.run(scenario())


def test_one_that_does_not_come_is_given_up_and_a_late_one_does_no_harm() -> None:
    async def scenario() -> None:
        reports = Reports()
        assert await arrived(reports.expect("t"), 10) is None
        reports.forget("t")
        reports.deliver(Report("t", "decode", "w", 10, 1, {}))
        assert reports._expected == {}

    asyncio.run(scenario())
