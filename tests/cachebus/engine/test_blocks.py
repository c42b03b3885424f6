import pytest
import torch

from cachebus.engine.blocks import Entry, layer_memory, open_blocks
from cachebus.errors import UnsupportedModel

KEY = b"k" * 32
NOWHERE = memoryview(b"")
BLOCKS, HEADS, TOKENS, WIDTH = 6, 2, 4, 8


def caches(layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"layer {n}": torch.randn(BLOCKS, HEADS, TOKENS, WIDTH) for n in range(layers)}


def test_what_is_saved_comes_back_in_other_blocks_of_another_engine() -> None:
    source, target = caches(), {name: torch.zeros_like(tensor) for name, tensor in caches().items()}
    one, other = open_blocks(source, BLOCKS, NOWHERE), open_blocks(target, BLOCKS, NOWHERE)
    extent = memoryview(bytearray(2 * one.block_bytes))
    saved = one.save([Entry([4, 1], extent)], KEY)
    assert other.load([Entry([0, 5], extent)], KEY) == saved
    for name, tensor in source.items():
        assert torch.equal(target[name][0], tensor[4])
        assert torch.equal(target[name][5], tensor[1])
        assert not target[name][1:5].any()
    assert other.load([Entry([0, 5], extent)], b"x" * 32) != saved
    assert one.save([Entry([1, 4], extent)], KEY) != saved
    assert one.load([Entry([4, 1], extent)], None) == [b""]


def test_a_block_left_out_is_not_touched_but_counts() -> None:
    source, target = caches(), {name: torch.zeros_like(tensor) for name, tensor in caches().items()}
    one, other = open_blocks(source, BLOCKS, NOWHERE), open_blocks(target, BLOCKS, NOWHERE)
    extent = memoryview(bytearray(2 * one.block_bytes))
    saved = one.save([Entry([4, 1], extent)], KEY)
    assert other.load([Entry([-1, 5], extent)], KEY) == saved
    assert not any(tensor[:5].any() for tensor in target.values())


def test_one_flipped_bit_anywhere_in_an_extent_changes_the_digest_of_what_arrives() -> None:
    blocks = open_blocks(caches(), BLOCKS, NOWHERE)
    extent = memoryview(bytearray(2 * blocks.block_bytes))
    whole = blocks.save([Entry([2, 3], extent)], KEY)
    for place in range(len(extent)):
        extent[place] ^= 1 << place % 8
        assert blocks.load([Entry([0, 1], extent)], KEY) != whole
        assert blocks.load([Entry([0, -1], extent)], KEY) != whole
        extent[place] ^= 1 << place % 8
    assert blocks.load([Entry([0, 1], extent)], KEY) == whole


def test_blocks_may_be_part_of_a_larger_allocation() -> None:
    packed = torch.randn(BLOCKS, 3, HEADS, TOKENS, WIDTH)
    views = {f"layer {n}": packed[:, n] for n in range(3)}
    blocks = open_blocks(views, BLOCKS, NOWHERE)
    extent = memoryview(bytearray(blocks.block_bytes))
    blocks.save([Entry([5], extent)], None)
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
        open_blocks({"a": torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH), "b": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * WIDTH)}, BLOCKS, NOWHERE)
