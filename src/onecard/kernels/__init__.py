"""Operators that PyTorch has no single kernel for: one Triton kernel a file, its torch reference beside it."""
