"""Measures locft on the machine at hand: commands below `locft bench`."""
