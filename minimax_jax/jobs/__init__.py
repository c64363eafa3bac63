"""Long work over whole checkpoints: planned, streamed, verified."""
