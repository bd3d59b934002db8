"""Measurements that anyone can run again: what is compared runs side by side in one run."""
