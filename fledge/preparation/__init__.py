"""Records → rows on disk: encoded in chunks, split and balanced, written as a dataset with its budget report."""
