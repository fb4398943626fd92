"""The paper's controlled experiments, on any model: a module for each study."""
