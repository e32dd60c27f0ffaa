"""Between the server's processes: shared memory for tensors, and small messages about it."""
