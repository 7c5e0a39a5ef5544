"""Start a student from the teacher's weights."""
