"""Patches: the changed matrices as a small, checked file, and their way into a checkpoint."""
