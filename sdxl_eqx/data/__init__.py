"""Pictures and captions: from a folder to batches, with a cache of what the frozen encoders make of them."""
