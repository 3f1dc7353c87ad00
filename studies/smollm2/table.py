"""Tables of the study: `python studies/smollm2/table.py FOLDER`, FOLDER with what run.py wrote; prints Markdown."""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr


def pairs(folder: Path) -> dict[str, dict[str, dict]]:
    """Forecast and run of each cell, by data set."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*-forecasts.json")):
        name = path.name.removesuffix("-forecasts.json")
        runs = folder / f"{name}-runs.json"
        real = json.loads(runs.read_text()) if runs.exists() else {}
        said = json.loads(path.read_text())
        found[name] = {key: {**said[key], "real": real[key]} for key in said if key in real}
    return found


def main(folder: Path) -> None:
    """Print each cell, the errors and the order."""
    print("| texts | adapter | rate | before | forecast | run | error | linearised | run's first epoch |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    cells = []
    for name, of_set in pairs(folder).items():
        for key, one in of_set.items():
            place, rate = key.rsplit("-", 1) if not key.endswith(("e-05",)) else key.rsplit("-", 2)[:2]
            real, first = one["real"]["final"]["eval_loss"], one["real"]["epochs"][1]
            cells.append(
                (name, place, float(rate), one["base"], one["forecast"], real, one["linear"], first, one["parameters"])
            )
            print(
                f"| {name} | {place} | {float(rate):g} | {one['base']:.3f} | {one['forecast']:.3f} | {real:.3f} | "
                f"{one['forecast'] - real:+.3f} | {one['linear']:.3f} | {first:.3f} |"
            )
    print("\n| rate | runs | error, nats | error, relative | of the change | linearised | no change at all |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rate in sorted({cell[2] for cell in cells}):
        some = [cell for cell in cells if cell[2] == rate]
        base, said, real, linear = (np.array([cell[i] for cell in some]) for i in (3, 4, 5, 6))
        print(
            f"| {rate:g} | {len(some)} | {np.abs(said - real).mean():.3f} | "
            f"{100 * np.abs(said / real - 1).mean():.1f}% | "
            f"{100 * (np.abs(said - real) / np.abs(base - real)).mean():.0f}% | {np.abs(linear - real).mean():.3f} | "
            f"{np.abs(base - real).mean():.3f} |"
        )
    print("\n| texts | cells | ρ of the forecast | linearised | of size | first epoch | lost, nats | by the largest |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in dict.fromkeys(cell[0] for cell in cells):
        for rate in (3e-4, None):  # the adapters at one rate; all
            some = [cell for cell in cells if cell[0] == name and rate in (None, cell[2])]
            if len(some) < 4:
                continue
            said, real, linear, first, size = (np.array([cell[i] for cell in some]) for i in (4, 5, 6, 7, 8))
            rho = [spearmanr(values, real).statistic for values in (said, linear, -size, first)]
            lost, largest = real[said.argmin()] - real.min(), real[size == size.max()].mean() - real.min()
            which = name if rate is None else f"{name}, {rate:g}"
            numbers = " | ".join(f"{value:+.2f}" for value in rho)
            print(f"| {which} | {len(some)} | {numbers} | {lost:.3f} | {largest:.3f} |")
    apart = [(abs(cell[6] - cell[4]), abs(cell[4] - cell[5])) for cell in cells]
    for close in (True, False):
        errors = [error for distance, error in apart if (distance <= 0.05) == close]
        words = "within 0.05 nats" if close else "further"
        mean, worst = np.mean(errors), max(errors)
        print(f"\nLinearised and plugged in {words}: {len(errors)} runs, error {mean:.3f}, at most {worst:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
