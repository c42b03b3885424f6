from cachebus.table import RECORD_BYTES, Record, State, Table


def record(slot: int) -> Record:
    return Record(State.COMMITTED, slot + 1, slot * 4096, 4096, slot % 2 == 0, bytes([slot]) * 32, b"d" * 32, b"l" * 16, "holder")


def test_records_are_read_back() -> None:
    table = Table(memoryview(bytearray(4 * RECORD_BYTES)))
    for slot in (0, 2):
        table.write(slot, record(slot))
    assert dict(table.read()) == {0: record(0), 2: record(2)}
    table.wipe(0)
    assert dict(table.read()) == {2: record(2)}


def test_a_record_with_any_bit_flipped_reads_as_free() -> None:
    memory = bytearray(RECORD_BYTES)
    table = Table(memoryview(memory))
    table.write(0, record(0))
    whole = bytes(memory)
    used = len(whole.rstrip(b"\0"))
    for place in range(used):
        memory[:] = whole
        memory[place] ^= 0x40
        assert dict(table.read()) == {}, place
    memory[:] = whole
    assert dict(table.read()) == {0: record(0)}


def test_a_torn_record_reads_as_free() -> None:
    memory = bytearray(RECORD_BYTES)
    Table(memoryview(memory)).write(0, record(0))
    whole = bytes(memory)
    for cut in range(len(whole.rstrip(b"\0"))):
        torn = Table(memoryview(bytearray(whole[:cut].ljust(RECORD_BYTES, b"\0"))))
        assert dict(torn.read()) == {}, cut
