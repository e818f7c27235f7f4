"""A source whose examples a test makes."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dynjax.data.source import Spec


@dataclasses.dataclass
class Made:
    count: int
    spec: Spec
    example: Callable[[int], dict[str, np.ndarray]]
    name: str = "made"
    split: str = "train"
    classes: tuple[str, ...] = ("a", "b", "c")
    handed: bool = False
    seen: frozenset[int] | None = None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.example(index)

    def describe(self):
        return f"made: {self.count} examples"
