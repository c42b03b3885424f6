"""The console in a real browser before a real router; only the engines are doubles."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from browser import dom, is_hidden, part
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

from cachebus.ports import free_port

LONG, NOTHING = "x" * 1100, "\u2013"


def console(router: RouterUnderTest) -> str:
    return f"http://127.0.0.1:{router.port}/console"


def test_the_live_figures_appear(make_engine: MakeEngine, router: RouterUnderTest, tmp_path: Path) -> None:
    make_engine("p-1", "prefill"), make_engine("d-1", "decode")
    router.knows(2)
    ids = [router.post({"model": "m", "prompt": LONG, "stream": True})[1]["x-request-id"] for _ in range(3)]
    wait_for(lambda: not router.gateway.recent.under_way)
    page = dom(console(router), tmp_path / "profile")
    assert not is_hidden(page, "main")
    assert is_hidden(page, "problem")
    assert part(page, "summary") == "ready · 1 prefill, 1 decode, no other router · policy prefix_affinity"
    # Two of three prompts came from DRAM but for their last token: 2,198 of 3,300 tokens.
    assert part(page, "hit-rate") == "66.6 %"
    assert part(page, "hits") == "dram 2,198 tokens · 66.6 % computed 1,102 tokens · 33.4 %"
    assert part(page, "ttft-note") == "3 requests in 5 min"
    assert re.fullmatch(r"[\d.]+ m?s", part(page, "ttft-median"))
    assert re.fullmatch(r"[\d.]+ m?s", part(page, "ttft-p99"))
    assert part(page, "tiers").startswith("dram 4 chunks · ")
    assert f"d-1 decode ready 0 0 {NOTHING} not known m p-1 prefill ready 0 0 {NOTHING} not known m" in part(page, "workers")
    assert page.count('class="median dot"') >= 1
    assert part(page, "flights") == "No prefix is being computed that others could wait for."
    request = part(page, "request")
    assert request.startswith(ids[-1])
    assert "decode to first token · d-1 · cached: 1,099 dram" in request
    assert "stream · d-1" in request
    assert part(page, "last").count(" 200 ") == 3


def test_the_path_through_prefill_is_a_waterfall_with_the_ways_there_were(bus: Bus, make_engine: MakeEngine, tmp_path: Path) -> None:
    make_engine("p-1", "prefill"), make_engine("d-1", "decode")
    router = RouterUnderTest(bus, policy="cost")
    try:
        router.knows(2)
        headers = router.post({"model": "m", "prompt": LONG, "stream": True}, headers={"x-headstart-explain": "1"})[1]
        wait_for(lambda: not router.gateway.recent.under_way)
        request = part(dom(console(router), tmp_path / "profile"), "request")
    finally:
        router.stop()
    names = [
        "receive the body",
        "render the prompt",
        *(["prefill"] if headers["x-headstart-route"] == "prefill+decode" else []),
        "decode to first token",
    ]
    places = [request.index(name) for name in [*names, "stream"]]
    assert places == sorted(places)
    assert "The ways it had" in request
    assert "p-1, then d-1" in request
    assert "d-1 alone" in request


def test_what_runs_is_seen_while_it_runs(make_engine: MakeEngine, router: RouterUnderTest, tmp_path: Path) -> None:
    prefill = make_engine("p-1", "prefill")
    make_engine("d-1", "decode")
    router.knows(2)
    prefill.hold.clear()
    client = threading.Thread(target=router.post, args=({"model": "m", "prompt": LONG},))
    client.start()
    wait_for(lambda: len(prefill.bodies) == 1)
    page = dom(console(router), tmp_path / "profile")
    prefill.hold.set()
    client.join()
    assert part(page, "under-way") == "1"
    assert "a prefill worker 4 0" in part(page, "flights")
    assert "p-1 prefill ready 1 0" in part(page, "workers")
    assert "under way" in part(page, "last")
    assert "prefill · p-1" in part(page, "request")


def test_an_empty_cluster_is_described_in_words(router: RouterUnderTest, tmp_path: Path) -> None:
    page = dom(console(router), tmp_path / "profile")
    assert part(page, "summary").startswith("not ready · 0 prefill, 0 decode")
    assert part(page, "hit-rate") == NOTHING
    for name, words in {
        "workers": "No worker has registered yet",
        "last": "No request has come yet.",
        "request": "No request has come yet.",
        "hits": "No prompt was answered in the last minutes.",
        "ttft-chart": "No first token came in the last minutes.",
    }.items():
        assert part(page, name).startswith(words)


def test_names_are_text_and_never_markup(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest, tmp_path: Path) -> None:
    name = "<img src=x onerror=document.title='bad'>"
    make_engine("d-1", "decode", model=name)
    router.knows(1)
    page = dom(console(router), tmp_path / "profile")
    assert name in part(page, "workers")
    assert "<title>Headstart</title>" in page


def test_a_router_that_went_away_is_told(bus: Bus, tmp_path: Path) -> None:
    router = RouterUnderTest(bus)

    def stop() -> None:
        # The page, its style, its script, and its figures twice: the page is up and asks again.
        wait_for(lambda: router.requests_seen >= 5)
        router.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    # Minutes of the page's own time: what it waits for on the network takes real time.
    page = dom(console(router), tmp_path / "profile", milliseconds=600_000)
    stopping.join()
    assert part(page, "problem").startswith("The router can't be reached")
    assert not is_hidden(page, "problem")
    assert 'class="stale"' in page


def test_where_a_key_is_needed_the_page_asks_for_it(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text("root:\n  keys: []\n  admin: true\n")
    router = RouterUnderTest(bus, str(tmp_path / "tenants.yaml"), admin_port=free_port("127.0.0.1"), admin_host="0.0.0.0")
    try:
        page = dom(f"http://127.0.0.1:{router.settings.admin_port}/console", tmp_path / "profile")
    finally:
        router.stop()
    assert part(page, "problem") == "This router asks for an admin's key."
    assert not is_hidden(page, "key-form")
    assert is_hidden(page, "main")
