"""Examples of a source as batches have them."""

from typing import Any

import numpy as np

IGNORED = -1


def read(source: Any, index: int) -> dict[str, np.ndarray]:
    """Example `index`, ignored pixels -1."""
    example = source[index]
    ignored = source.ignore_label
    return {
        key: np.where(each == ignored, np.int32(IGNORED), each)
        if key == "mask" and ignored is not None
        else np.asarray(each)
        for key, each in example.items()
    }


def stack(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A batch of examples."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def size_of(source: Any) -> tuple[int, int]:
    """Height and width of a source's pictures."""
    return tuple(source.size)
