"""Finished cells of a study, written by hand."""

import json
from pathlib import Path

from foretune.evaluation.predictors import OF_SCORE
from foretune.evaluation.records import SECONDS
from foretune.study.stored import FACTS, measured

KEYS = ("a" * 20, "b" * 20, "c" * 20)


STEPS = "step,loss,learning_rate,grad_norm,seconds\r\n1,0.7,0.1,,0.1\r\n2,0.5,0.1,,0.2\r\n"


HISTORY = "epoch,step,eval_loss,eval_accuracy\r\n0,0,0.7,0.5\r\n1,2,0.6,0.8\r\n"


def result_of(key: str, index: int = 0, **names) -> dict:
    return {
        "schema": 1,
        "key": key,
        "names": {"model": "m", "dataset": "d", "placement": f"p{index}", "r": 8, "seed": 0, **names},
        "family": "d",
        "facts": {**dict.fromkeys(FACTS, 2), "majority_accuracy": 0.5, "diverged": False},
        "quantities": {predictor.name: 0.5 + index for predictor in OF_SCORE},
        "outcomes": dict.fromkeys(measured("classification"), 0.6 + 0.1 * index),
        "seconds": dict.fromkeys(SECONDS[:6], 1.0),
        "versions": {},
    }


def write_cell(store: Path, key: str, index: int = 0, **names) -> Path:
    folder = store / "cells" / key
    (folder / "tune").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result_of(key, index, **names)), encoding="utf-8")
    (folder / "tune" / "steps.csv").write_text(STEPS, encoding="utf-8")
    (folder / "tune" / "history.csv").write_text(HISTORY, encoding="utf-8")
    return folder


def write_simulation(store: Path, key: str) -> Path:
    (store / "outlooks").mkdir(exist_ok=True)
    path = store / "outlooks" / f"{key}.json"
    content = {"schema": 1, "key": key, "quantities": {"simulated_accuracy": 0.7}, "seconds": {"survey": 1.0}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "no text": b"\xff\xfe\x00\x00",
    "another type": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "an empty object": b"{}",
    "nested without end": b"[" * 100_000,
    "text": b"not what was here\n",
}


FILES = ("result.json", "tune/steps.csv", "tune/history.csv")
