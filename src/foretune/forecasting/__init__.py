"""Forecast of a fine-tune: its recipe simulated on the linearised model, calibrated on finished runs."""
