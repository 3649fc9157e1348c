"""What surrounds training: the folder of a run, what it prints, how it stops, and how it resumes."""
