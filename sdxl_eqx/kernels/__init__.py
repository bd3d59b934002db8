"""Attention implementations behind one typed signature."""
