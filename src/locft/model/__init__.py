"""Models: found, loaded, and split at a tuning location."""
