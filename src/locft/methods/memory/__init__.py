"""What editors share that treat a matrix as a memory, which gives a value for each key."""
