from pathlib import Path

import pytest

from cachebus.errors import RegionError
from cachebus.region import Region

SIZE = 4 << 20


def test_a_region_is_adopted_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "region"
    first = Region.make_or_adopt(path, SIZE, may_replace=True)
    assert not first.adopted
    first.data[10:14] = b"here"
    first.close()
    again = Region.make_or_adopt(path, SIZE, may_replace=False)
    assert again.adopted
    assert bytes(again.data[10:14]) == b"here"
    again.close()


def test_workers_see_what_others_write(tmp_path: Path) -> None:
    daemon = Region.make_or_adopt(tmp_path / "region", SIZE, may_replace=True)
    worker = Region.map(tmp_path / "region")
    worker.data[0:3] = b"abc"
    assert bytes(daemon.data[0:3]) == b"abc"


def test_a_region_of_another_size_is_replaced_only_when_nobody_maps_it(tmp_path: Path) -> None:
    path = tmp_path / "region"
    Region.make_or_adopt(path, SIZE, may_replace=True).close()
    with pytest.raises(RegionError, match="stop the workers"):
        Region.make_or_adopt(path, 2 * SIZE, may_replace=False)
    replaced = Region.make_or_adopt(path, 2 * SIZE, may_replace=True)
    assert not replaced.adopted


def test_a_file_that_is_no_region_is_named(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_bytes(b"x" * SIZE)
    with pytest.raises(RegionError, match="no region"):
        Region.map(path)
    with pytest.raises(RegionError, match="can't open"):
        Region.map(tmp_path / "missing")


def test_more_than_the_file_system_holds_is_refused_before_anything_is_made() -> None:
    path = Path("/dev/shm/headstart-test-too-large")
    with pytest.raises(RegionError, match="max_local_cpu_size"):
        Region.make_or_adopt(path, 1 << 50, may_replace=True)
    assert not path.exists()


def test_too_small_a_region_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="too small"):
        Region.make_or_adopt(tmp_path / "region", 8192, may_replace=True)
