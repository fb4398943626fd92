"""Reports: read results only; needs no torch."""
