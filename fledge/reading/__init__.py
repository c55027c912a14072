"""Reads raw data from disk or the Hub: files → chunks of records, or the documents of a corpus."""
