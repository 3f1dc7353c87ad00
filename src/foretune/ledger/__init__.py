"""The ledger: forecasts beside what came of them, in a CSV file that only grows."""
