"""One function a verb; the command line and Python call the same ones."""
