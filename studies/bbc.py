"""Write the BBC news corpus of the extra `demo` as a data set for studies: 1,800 texts train, 425 evaluate.

python studies/bbc.py data/bbc
"""

import csv
import sys
from pathlib import Path

import numpy as np

from foretune.tasks.demo import bbc_news

TRAIN = 1800


def main() -> None:
    """Write train.csv and validation.csv, columns text and label, rows in one random order."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    texts, topics = bbc_news()
    names = sorted(set(topics))
    order = np.random.default_rng(0).permutation(len(texts))
    for name, rows in (("train", order[:TRAIN]), ("validation", order[TRAIN:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows((texts[row], names.index(topics[row])) for row in rows)


if __name__ == "__main__":
    main()
