"""Experiments from YAML: data, training, evaluation and reports around the library."""
