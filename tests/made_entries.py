"""Lines of a ledger, made by hand."""

import dataclasses

from foretune.ledger.entries import Entry, Told

LINE = Entry(
    made="2026-03-01T12:00:00+00:00",
    began="2026-03-01T12:01:00+00:00",
    ended="2026-03-01T13:00:00+00:00",
    command="tune",
    model="m",
    dataset="d",
    task="classification",
    adapter="query, r = 8, α = 8",
    rows=2000,
    known_rows=512,
    spend=0.02,
    metric="accuracy",
    main=Told(0.8, 0.7, 0.9, 0.85),
    eval_loss=Told(0.5, 0.25, 1.0, 0.4),
    hash="0" * 64,
    run="1" * 20,
    state="ok",
)


def line(**changes):
    return dataclasses.replace(LINE, **changes)
