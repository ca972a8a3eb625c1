"""Methods that fit a model to a job."""
