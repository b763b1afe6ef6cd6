"""Fewer tokens on the way through a transformer; one file a paper."""
