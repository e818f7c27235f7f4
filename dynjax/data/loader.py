"""Batches from a source, by grain: shuffled, augmented, shared between processes, resumable to the exact batch.

What is in a batch, and how each example of it is changed, follows from the seed and the example's place in the stream:
neither from the number of processes nor from which of them reads it. B is the number of examples in this process's part
of a batch; H, W are height and width in pixels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from dynjax.config import AugmentConfig, UserError
from dynjax.data.augment import IGNORED, Augment, AugmentBatch, check_augment, mean_colour
from dynjax.data.source import read, stack

# Two threads and a short queue, of examples with masks or of whole batches with labels: grain's own defaults (16 and
# 500) start slowly and hold much memory.
_READ = {
    "mask": grain.ReadOptions(num_threads=2, prefetch_buffer_size=16),
    "label": grain.ReadOptions(num_threads=2, prefetch_buffer_size=4),
}


def make_loader(
    source: Any,
    batch_size: int,
    *,
    seed: int,
    augment: AugmentConfig | None,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Elements {"image": uint8 (B, H, W, 3), "mask": int32 (B, H, W)}, or with "label": int32 (B,) for labels.

    Every ignored pixel of a mask is -1. `batch_size` is that of all processes together, which get equal parts of each
    batch, process 0 the first examples: one after the other these are the batch of a single process. With `repeat` the
    stream never ends, passes follow each other without a gap, and each has its own order and noise. Without it the last
    batch is filled up with blank examples (mask or label -1) and every element has "valid": bool (B,). The iterator's
    get_state and set_state resume at the exact batch by its number, which holds for any number of processes. Sources
    that are `handed`, such as digits, are never mirrored. Raises UserError.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: a batch has at least 1 example")
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} cannot be shared equally by {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is outside [0, 2**32)")
    fill = (0, 0, 0)
    if augment is not None:
        check_augment(augment, source.size)
        fill = mean_colour(source) if augment.cutout else fill
        augment = dataclasses.replace(augment, flip=augment.flip and not getattr(source, "handed", False))

    count = len(source)
    total = count if repeat else -(-count // batch_size) * batch_size
    data = grain.MapDataset.range(count).seed(seed)
    if shuffle:
        data = data.shuffle()
    if repeat:
        data = data.repeat()
    else:
        data = _fill_up(data, total)
    share = batch_size // process_count
    part = slice(process_index * share, (process_index + 1) * share)
    target = getattr(source, "target", "mask")
    if target == "label":
        # Examples one by one would cost more than all that is done to these pictures: batches of indices come first.
        data = data.batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
        data = data.map(_FetchBatch(source, part, with_valid=not repeat))
        if augment is not None:
            data = data.random_map(AugmentBatch(augment, batch_size, part, fill))
        return Batches(data.to_iter_dataset(_READ[target]), 1)
    data = data.map(_Fetch(source, with_valid=not repeat))
    if augment is not None:
        data = data.random_map(Augment(augment, fill))
    mine = grain.MapDataset.source(_Part(data, batch_size, part)).to_iter_dataset(_READ[target])
    return Batches(mine.batch(share, drop_remainder=True), share)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Iterates over `data`, of which a batch takes `per_batch` elements; `iter` starts at the first batch."""

    data: grain.IterDataset
    per_batch: int

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(iter(self.data), self.per_batch)


class BatchIterator:
    """An iterator whose state is how many batches it has given: an int, the same on every process."""

    def __init__(self, inner: Any, per_batch: int):
        self._inner, self._per_batch, self._given = inner, per_batch, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._inner)
        self._given += 1
        return batch

    def get_state(self) -> int:
        return self._given

    def set_state(self, given: int) -> None:
        self._inner.set_state({"next_index": given * self._per_batch})
        self._given = given


def calibration_batches(source: Any, batch_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """`count` batches spread evenly over the source; a short one is used again."""
    if len(source) == 0 or batch_size < 1 or count < 1:
        raise UserError(
            f"calibration needs examples: {len(source)} in the source, {count} batches of {batch_size} wanted"
        )
    wanted = batch_size * count
    # Every batch takes from all over the source: neighbours (frames of a film) are alike.
    indices = np.arange(wanted) * max(1.0, len(source) / wanted)
    indices = (indices.astype(int) % len(source)).reshape(batch_size, count).T
    return [stack([read(source, int(index)) for index in batch]) for batch in indices]


def _fill_up(data: grain.MapDataset, total: int) -> grain.MapDataset:
    """Adds indices past the source's end, which `_Fetch` turns into blank examples, up to `total`."""
    count = len(data)
    return grain.MapDataset.concatenate([data, grain.MapDataset.range(count, total)]) if total > count else data


@dataclasses.dataclass(frozen=True)
class _Part:
    """The examples of `data` that lie in `part` of their batch, as a source of grain's."""

    data: grain.MapDataset
    batch_size: int
    part: slice

    def __len__(self) -> int:
        return len(self.data) // self.batch_size * (self.part.stop - self.part.start)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, place = divmod(int(index), self.part.stop - self.part.start)
        return self.data[batch * self.batch_size + self.part.start + place]


@dataclasses.dataclass(frozen=True)
class _Fetch:
    """Example of an index, ignored pixels marked alike for every source; blank past the source's end."""

    source: Any
    with_valid: bool

    def __call__(self, index: int) -> dict[str, np.ndarray | np.bool_]:
        valid = index < len(self.source)
        if valid:
            example = self.source[index]
            image, mask = example["image"], example["mask"]
        else:
            height, width = self.source.size
            image, mask = np.zeros((height, width, 3), np.uint8), np.full((height, width), IGNORED, np.int32)
        if self.source.ignore_label is not None:
            mask = np.where(mask == self.source.ignore_label, np.int32(IGNORED), mask)
        found: dict[str, np.ndarray | np.bool_] = {"image": image, "mask": mask}
        return {**found, "valid": np.bool_(valid)} if self.with_valid else found


@dataclasses.dataclass(frozen=True)
class _FetchBatch:
    """The part of a batch of indices that is this process's, as pictures and labels; blank past the source's end."""

    source: Any
    part: slice
    with_valid: bool

    def __call__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        indices = indices[self.part]
        valid = indices < len(self.source)
        images = np.zeros((len(indices), *self.source.size, 3), np.uint8)
        labels = np.full(len(indices), IGNORED, np.int32)
        memory = getattr(self.source, "memory", None)
        if memory is not None:
            images[valid], labels[valid] = memory[0][indices[valid]], memory[1][indices[valid]]
        else:
            for position in np.flatnonzero(valid):
                example = self.source[int(indices[position])]
                images[position], labels[position] = example["image"], example["label"]
        found = {"image": images, "label": labels}
        return {**found, "valid": valid} if self.with_valid else found
