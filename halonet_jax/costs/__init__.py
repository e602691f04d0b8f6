"""Pictures and figures of models and runs."""
