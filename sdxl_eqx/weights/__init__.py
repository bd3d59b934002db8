"""Weights between Equinox modules and the files that people exchange."""
