"""From a hand-written checkpoint to a proven Hugging Face model: load, recognise, write, prove."""
