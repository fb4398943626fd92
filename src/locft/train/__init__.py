"""Training: the cached prefix, the loss, and the breadth-first loop."""
