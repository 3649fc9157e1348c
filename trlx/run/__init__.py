"""What surrounds training: the folder a run writes to, what it shows, how it stops, and how it resumes."""
