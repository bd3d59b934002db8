"""From prompt to picture: noise levels, samplers, guidance and the pipeline."""
