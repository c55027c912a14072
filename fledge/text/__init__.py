"""Rules about texts: sentences, words, limits, overlap with a reference. Tasks and judges use them."""
