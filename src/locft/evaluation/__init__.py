"""Measurements: answers, scores with intervals, and drift."""
