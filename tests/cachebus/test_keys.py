import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from cachebus.keys import chunk_keys, extend_chunk_keys, namespace_digest, root_key, tail_keys

TOKENS = list(range(1000))
ROOT = root_key(b"n" * 32)


def test_a_key_names_the_whole_prefix() -> None:
    keys = chunk_keys(ROOT, TOKENS, 256)
    assert len(keys) == 3
    changed = [TOKENS[0] + 1, *TOKENS[1:]]
    assert not set(keys) & set(chunk_keys(ROOT, changed, 256))
    later = [*TOKENS[:300], 7, *TOKENS[301:]]
    assert [a == b for a, b in zip(keys, chunk_keys(ROOT, later, 256), strict=True)] == [True, False, False]


def test_namespace_salt_and_adapter_part_the_keys() -> None:
    roots = {root_key(b"n" * 32), root_key(b"m" * 32), root_key(b"n" * 32, "salt"), root_key(b"n" * 32, "", "salt"), root_key(b"n" * 32, "sal", "t")}
    assert len(roots) == 5


def test_any_part_of_a_namespace_changes_it() -> None:
    parts = {"weights": "a", "dtype": "b"}
    assert namespace_digest(parts) == namespace_digest(dict(reversed(parts.items())))
    others = [{"weights": "ab", "dtype": ""}, {"weights": "a", "dtype": "c"}, {"weights": "a"}, {"weightsa": "", "dtype": "b"}]
    assert len({namespace_digest(p) for p in [parts, *others]}) == 5


def test_a_tail_block_is_never_a_chunk() -> None:
    assert not set(chunk_keys(ROOT, TOKENS, 16)) & set(tail_keys(ROOT, TOKENS, 16))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=100), st.integers(0, 100))
def test_extending_gives_the_same_keys_as_starting_over(tokens: list[int], cut: int) -> None:
    keys = chunk_keys(ROOT, tokens[:cut], 16)
    extend_chunk_keys(keys, ROOT, tokens, 16)
    assert keys == chunk_keys(ROOT, tokens, 16)


def test_another_process_gives_the_same_keys() -> None:
    code = "from cachebus.keys import *; print(chunk_keys(root_key(b'n' * 32), list(range(1000)), 256)[-1].hex())"
    for seed in ("0", "1"):
        shown = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == chunk_keys(ROOT, TOKENS, 256)[-1].hex()
