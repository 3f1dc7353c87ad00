"""Tables of texts and labels, read as they were written: csv, tsv, json, jsonl, parquet and what `datasets` saves."""
