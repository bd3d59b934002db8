"""Training: state, optimizer, the pure step, checkpoints, metrics and the loop that ties them together."""
