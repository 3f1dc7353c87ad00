"""Where the time of a kernel goes: passes through the model, products of features, files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Work = Literal["passes", "products", "files"]


@dataclass(frozen=True)
class KernelSeconds:
    """Parts of the time that a kernel takes.

    Attributes:
        passes: Passes through the model, and the features that are made of them.
        products: Gram products of features.
        files: Writing, reading and checking the files of features and products.
    """

    passes: float = 0.0
    products: float = 0.0
    files: float = 0.0

    def __add__(self, other: "KernelSeconds") -> "KernelSeconds":
        """Add part by part."""
        return KernelSeconds(self.passes + other.passes, self.products + other.products, self.files + other.files)


class Clock:
    """Adds up what each kind of work takes.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = KernelSeconds()

    @contextmanager
    def of(self, work: Work) -> Iterator[None]:
        """Count what is done inside.

        Args:
            work: What kind of work it is; no other may be counted inside.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        yield
        self.seconds += KernelSeconds(**{work: time.perf_counter() - start})
