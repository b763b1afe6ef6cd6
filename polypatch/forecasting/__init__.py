"""Forecasters: (batch, look-back, series) in, (batch, horizon, series) out."""
