"""Edits: read, checked, and turned into token ids."""
