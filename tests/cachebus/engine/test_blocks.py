import pytest
import torch

from cachebus.engine.blocks import layer_memory, open_blocks
from cachebus.errors import UnsupportedModel

KEY = b"k" * 32
BLOCKS, HEADS, TOKENS, WIDTH = 6, 2, 4, 8


def caches(layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"layer {n}": torch.randn(BLOCKS, HEADS, TOKENS, WIDTH) for n in range(layers)}


def test_what_is_saved_comes_back_in_other_blocks_of_another_engine() -> None:
    source, target = caches(), {name: torch.zeros_like(tensor) for name, tensor in caches().items()}
    one, other = open_blocks(source, BLOCKS), open_blocks(target, BLOCKS)
    extent = memoryview(bytearray(2 * one.block_bytes))
    one.save([4, 1], extent)
    other.load([0, 5], extent)
    for name, tensor in source.items():
        assert torch.equal(target[name][0], tensor[4])
        assert torch.equal(target[name][5], tensor[1])
        assert not target[name][1:5].any()
    assert one.digest([4, 1], extent, KEY) == other.digest([0, 5], extent, KEY)
    assert one.digest([4, 1], extent, KEY) != one.digest([1, 4], extent, KEY)
    assert one.digest([4, 1], extent, KEY) != one.digest([4, 1], extent, b"x" * 32)


def test_a_block_left_out_is_not_touched_but_counts() -> None:
    source, target = caches(), {name: torch.zeros_like(tensor) for name, tensor in caches().items()}
    one, other = open_blocks(source, BLOCKS), open_blocks(target, BLOCKS)
    extent = memoryview(bytearray(2 * one.block_bytes))
    one.save([4, 1], extent)
    other.load([-1, 5], extent)
    assert not any(tensor[:5].any() for tensor in target.values())
    assert other.digest([-1, 5], extent, KEY) == one.digest([4, 1], extent, KEY)


def test_one_flipped_bit_in_any_page_changes_the_digest() -> None:
    source = caches()
    blocks = open_blocks(source, BLOCKS)
    extent = memoryview(bytearray(2 * blocks.block_bytes))
    blocks.save([2, 3], extent)
    whole = blocks.digest([2, 3], extent, KEY)
    for tensor in source.values():
        for block in (2, 3):
            pattern = tensor.view(torch.int32)
            pattern[block, 1, 2, 3] ^= 1
            assert blocks.digest([2, 3], extent, KEY) != whole
            pattern[block, 1, 2, 3] ^= 1
    assert blocks.digest([2, 3], extent, KEY) == whole


def test_blocks_may_be_part_of_a_larger_allocation() -> None:
    packed = torch.randn(BLOCKS, 3, HEADS, TOKENS, WIDTH)
    views = {f"layer {n}": packed[:, n] for n in range(3)}
    blocks = open_blocks(views, BLOCKS)
    extent = memoryview(bytearray(blocks.block_bytes))
    blocks.save([5], extent)
    assert bytes(extent) == packed[5].numpy().tobytes()


def test_a_kernels_smaller_blocks_are_taken_together() -> None:
    tensor = torch.randn(BLOCKS * 2, HEADS, TOKENS, WIDTH)
    memory = layer_memory("layer", tensor, BLOCKS)
    assert memory.page_bytes == memory.stride_bytes == 2 * HEADS * TOKENS * WIDTH * 4


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(2, BLOCKS + 1, TOKENS, WIDTH), id="K and V before blocks"),
        pytest.param(torch.zeros(BLOCKS, HEADS, TOKENS, 2 * WIDTH)[..., :WIDTH], id="rows with gaps"),
    ],
)
def test_layouts_without_dense_blocks_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="layer"):
        layer_memory("layer", tensor, BLOCKS)


def test_layers_of_different_sizes_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="different sizes"):
        open_blocks({"a": torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH), "b": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * WIDTH)}, BLOCKS)
