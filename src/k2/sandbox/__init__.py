"""Programs that nobody has read, such as a model's: run with nothing to reach and bounded in everything."""
