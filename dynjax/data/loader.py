"""Batches from a source, by grain: shuffled, augmented, shared between processes, resumable to the exact batch.

What is in a batch, and how each example of it is changed, follows from the seed and the example's place in the stream:
neither from the number of processes nor from which of them reads it. B is the number of examples in this process's part
of a batch.
"""

import dataclasses

import grain
import numpy as np

from dynjax.config import AugmentConfig, UserError
from dynjax.data.augment import Augment
from dynjax.data.source import Draws, Source, read, stack

# Two threads and a short queue, of examples or of whole batches: grain's own defaults (16 and 500) start slowly and
# hold much memory.
EXAMPLES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
BATCHES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def make_loader(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    augment: AugmentConfig | None,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Elements are dicts of the fields of the source's spec, each with one more first axis B; see `read`. With
    `augment`, whatever it says, examples of sources that draw them are drawn.

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
    change = None
    if augment is not None and any(field.pixels for field in source.spec.values()):
        change = Augment.of(augment, source)
    count = len(source)
    data = _indices(count, batch_size, seed, shuffle, repeat)
    share = batch_size // process_count
    part = slice(process_index * share, (process_index + 1) * share)

    def fetch(index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        example = read(source, index, rng)
        return example if repeat else {**example, "valid": np.asarray(index < count)}

    drawn = augment is not None and isinstance(source, Draws)
    if drawn or any(field.role in ("mask", "film") for field in source.spec.values()):
        data = data.random_map(fetch) if drawn else data.map(fetch)
        if change is not None:
            data = data.random_map(change)
        mine = grain.MapDataset.source(_Part(data, batch_size, part)).to_iter_dataset(EXAMPLES)
        return Batches(mine.batch(share, drop_remainder=True), share)
    # Examples one by one would cost more than all that is done to small ones: batches of indices come first.
    data = data.batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    data = data.map(lambda indices: stack([fetch(index) for index in indices[part].tolist()]))
    if change is not None:
        data = data.random_map(lambda batch, rng: change.batch(batch, rng, batch_size, part))
    return Batches(data.to_iter_dataset(BATCHES), 1)


def _indices(count: int, batch_size: int, seed: int, shuffle: bool, repeat: bool) -> grain.MapDataset:
    """Places in a source of `count`; without `repeat` also past its end, up to whole batches."""
    data = grain.MapDataset.range(count).seed(seed)
    if shuffle:
        data = data.shuffle()
    if repeat:
        return data.repeat()
    total = -(-count // batch_size) * batch_size
    return grain.MapDataset.concatenate([data, grain.MapDataset.range(count, total)]) if total > count else data


@dataclasses.dataclass(frozen=True)
class Batches:
    """Iterates over `data`, of which a batch takes `per_batch` elements; `iter` starts at the first batch."""

    data: grain.IterDataset
    per_batch: int

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(iter(self.data), self.per_batch)


class BatchIterator:
    """An iterator whose state is how many batches it has given: an int, the same on every process."""

    def __init__(self, inner: grain.DatasetIterator, per_batch: int):
        self._inner, self._per_batch, self._given = inner, per_batch, 0

    def __iter__(self) -> "BatchIterator":
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
