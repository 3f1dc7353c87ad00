"""Predictors of others, which forecasts and rankings are measured against."""
