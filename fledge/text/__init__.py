"""What can be told of a text by rule alone: no model, no dataset, no opinion. Tasks and judges are built on it."""
