"""Where the time of a command goes: imports, by package, and its own stages.

    python benchmarks/startup.py [ARGUMENTS OF foretune]      by default `demo --output` in a temporary folder

The command runs twice: once as it is, for its stages (`seconds` in the `result.json` files that it writes), once with
Python's account of imports, which slows them a little.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s*([\w.]+)")


def run(arguments: list[str], *, imports: bool) -> tuple[float, str]:
    """Seconds of a command, and what it wrote to stderr."""
    start = time.perf_counter()
    command = [sys.executable, *(("-X", "importtime") if imports else ()), "-m", "foretune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - start, done.stderr


def by_package(account: str) -> Counter[str]:
    """Seconds that each package's own modules took, without what they import."""
    seconds: Counter[str] = Counter()
    for own, _, module in IMPORT.findall(account):
        seconds[module.split(".")[0]] += int(own) / 1e6
    return seconds


def main() -> None:
    """Print the shares."""
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1:]
        outputs = [Path(folder) / name for name in ("stages", "imports")]
        total, _ = run(given or ["demo", "--output", str(outputs[0])], imports=False)
        print(f"{total:7.2f} s  the command")
        for result in sorted(outputs[0].rglob("result.json")):
            for stage, seconds in json.loads(result.read_text()).get("seconds", {}).items():
                print(f"{seconds:7.2f} s  {seconds / total:4.0%}  {result.parent.name}: {stage}")
        _, account = run(given or ["demo", "--output", str(outputs[1])], imports=True)
        packages = by_package(account)
        print(f"{packages.total():7.2f} s  {packages.total() / total:4.0%}  all imports, of which")
        for package, seconds in packages.most_common(12):
            print(f"{seconds:7.2f} s  {seconds / total:4.0%}    {package}")


if __name__ == "__main__":
    main()
