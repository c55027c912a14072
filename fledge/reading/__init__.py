"""Raw data as it is on disk or on the Hub: files → chunks of records, or the documents of a corpus."""
