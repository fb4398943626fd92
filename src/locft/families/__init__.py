"""Whether a family of models can be edited: tiny models of all that transformers knows, tried out."""
