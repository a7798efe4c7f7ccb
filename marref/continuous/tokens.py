"""Images to tokens and back: patches of pixels (or of an autoencoder's latents), side by side.

With p the patch size, a token holds c p² numbers in the order (channel, row, column):

    tokens[b, i·(width/p) + j, (ch·p + u)·p + v] = images[b, ch, i·p + u, j·p + v]

Li et al. 2024 (arXiv 2406.11838, published code).
"""

from marref.trees import Array


def from_images(images: Array, patch_size: int) -> Array:
    """[batch, channels, height, width] -> [batch, length, channels·patch_size²]."""
    batch, channels, height, width = images.shape
    p = patch_size
    cut = images.reshape(batch, channels, height // p, p, width // p, p)
    rows = cut.transpose(0, 2, 4, 1, 3, 5)
    return rows.reshape(batch, height // p * (width // p), channels * p * p)


def to_images(tokens: Array, patch_size: int, channels: int, height: int) -> Array:
    """[batch, length, channels·patch_size²] -> [batch, channels, height, width]."""
    batch, length, _ = tokens.shape
    p = patch_size
    down = height // p
    cut = tokens.reshape(batch, down, length // down, channels, p, p)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, length // down * p)
