"""Repositories for the Hub: their files and cards, the checks before an upload, and the upload."""
