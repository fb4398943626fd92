"""Proof by injected faults that what locft writes is the old state or the new one."""
