"""What crosses the boundary between parent and worker: pure data. No torch, no I/O."""
