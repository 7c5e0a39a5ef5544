"""Students made of trained ones: the mean of runs, another image size."""
