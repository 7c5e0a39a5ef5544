"""Teachers, students and the folders of runs."""
