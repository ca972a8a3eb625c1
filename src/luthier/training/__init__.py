"""One training loop for every method and task."""
