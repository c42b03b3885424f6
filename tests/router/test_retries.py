from router.retries import FLOOR_PER_SECOND, SAVED_MAX, SHARE, RetryBudget


def test_retries_are_a_share_of_requests_and_a_few_more() -> None:
    budget = RetryBudget(0)
    saved = sum(budget.take(0) for _ in range(1000))
    assert saved == SAVED_MAX
    made = 0
    for number in range(100_000):
        budget.came()
        # Every one of them fails, again and again; a thousand come a second.
        made += sum(budget.take(number / 1000) for _ in range(3))
    assert 0.99 < made / (100_000 * SHARE + 100 * FLOOR_PER_SECOND) < 1.01


def test_what_is_saved_has_a_limit() -> None:
    budget = RetryBudget(0)
    for _ in range(10_000):
        budget.came()
    assert sum(budget.take(1e6) for _ in range(1000)) == SAVED_MAX
