"""How things are written: tables, curves, figures, run folders, the terminal. Knows no model."""
