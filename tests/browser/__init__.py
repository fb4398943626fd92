"""Proof in a browser that a report shows what users wrote, and does nothing else."""
