"""The constants of windowed attention, computed once from the bias table, so that the graph need not compute them."""

import numpy as np

from vit_convert.families.swin.architecture import Swin

# Microsoft's value; exp(-100) is negligible beside any actual score, and unlike -inf it is finite in fp16
_MASKED = -100.0


def relative_index(window: int) -> np.ndarray:
    """The row of the bias table for each pair of tokens of a window.

    For tokens at (r, c) and (r', c') it is (r − r' + w − 1)(2w − 1) + c − c' + w − 1 (models/swin_transformer.py,
    WindowAttention).

    Args:
        window: side w in tokens.

    Returns:
        int64 [w², w²], queries first; tokens row by row.
    """
    rows, columns = np.divmod(np.arange(window**2), window)
    down, across = rows[:, None] - rows, columns[:, None] - columns
    return (down + window - 1) * (2 * window - 1) + across + window - 1


def shift_mask(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """What is added to the scores in windows that the roll has assembled from opposite sides of the image.

    Args:
        grid: tokens down and across.
        window: side of a window in tokens.
        shift: number of tokens by which the image was rolled.

    Returns:
        float32 [windows, w², w²]: 0 for tokens that were neighbours before the roll, -100 for others.
    """
    regions = [np.zeros(side, np.int64) for side in grid]
    for region, side in zip(regions, grid):
        region[side - window : side - shift] = 1
        region[side - shift :] = 2
    labels = 3 * regions[0][:, None] + regions[1]
    rows, columns = grid[0] // window, grid[1] // window
    by_window = labels.reshape(rows, window, columns, window).transpose(0, 2, 1, 3).reshape(rows * columns, window**2)
    same = by_window[:, :, None] == by_window[:, None, :]
    return np.where(same, 0.0, _MASKED).astype(np.float32)


def bias_shape(architecture: Swin, stage: int, block: int) -> tuple[int, int, int, int]:
    """Shape of `attention_bias`."""
    rows, columns = architecture.windows(stage)
    windows = rows * columns if architecture.shift(stage, block) else 1
    tokens = architecture.window**2
    return 1, windows * architecture.num_heads[stage], tokens, tokens


def attention_bias(table: np.ndarray, architecture: Swin, stage: int, block: int) -> np.ndarray:
    """What a block adds to its scores: the relative position bias, and the mask if its windows are shifted.

    Args:
        table: [(2w − 1)², heads].
        architecture: the model.
        stage: of the block.
        block: its number in the stage.

    Returns:
        float32 [1, heads, w², w²]; for a shifted block [1, windows · heads, w², w²].
    """
    bias = table[relative_index(architecture.window)].transpose(2, 0, 1)  # [heads, w², w²]
    if shift := architecture.shift(stage, block):
        bias = shift_mask(architecture.grid(stage), architecture.window, shift)[:, None] + bias
    return np.ascontiguousarray(bias, np.float32).reshape(bias_shape(architecture, stage, block))
