"""Put the pieces of run.py together: `python studies/smollm2/collect.py PIECES RESULTS` writes two files of lines.

`forecasts.jsonl` and `runs.jsonl` hold an object for each, numbers with six digits.
"""

import json
import sys
from pathlib import Path
from typing import Any


def rounded(value: Any) -> Any:
    """Six digits of every number that has a fraction."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items() if one is not None}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def main(pieces: Path, results: Path) -> None:
    """Collect forecasts and runs."""
    results.mkdir(parents=True, exist_ok=True)
    for kind in ("forecast", "run"):
        found: list[Any] = []
        for path in sorted(pieces.glob(f"{kind}-*.json")):
            content = json.loads(path.read_text())
            found += content if isinstance(content, list) else [content]
        found.sort(key=lambda one: (one["set"], one["rows"], one["rate"], one["adapter"]))
        lines = "".join(json.dumps(rounded(one)) + "\n" for one in found)
        (results / f"{kind}s.jsonl").write_text(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
