"""What a run tells about itself, and the page that shows it: ``report.html`` in the run's folder."""
