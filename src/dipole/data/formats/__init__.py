"""Datasets on disk: one module per format, each with `read(path)`."""
