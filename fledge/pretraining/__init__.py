"""Raw text → token ids on disk → a base, through transformers' `Trainer`."""
