"""Records → rows on disk: encoded in blocks, split and balanced, written as a dataset with its budget report."""
