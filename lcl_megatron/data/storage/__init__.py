"""A preprocessed corpus on disk: written, read, merged."""
