"""Shared memory: the arena of a process, and the tensors in it. Used by parent and workers."""
