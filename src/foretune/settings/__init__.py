"""Settings: one tree of frozen dataclasses for the command line, YAML files and Python."""
