"""Settings of every stage, the same for flags, run files and Prefect. No torch; checked before a model is built."""
