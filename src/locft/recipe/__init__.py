"""The whole stories: edit a model, ask it, evaluate it."""
