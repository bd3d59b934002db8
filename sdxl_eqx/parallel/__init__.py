"""Devices: what is there, how they share the work, and where each array lies."""
