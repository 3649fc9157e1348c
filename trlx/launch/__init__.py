"""What starts runs and looks at their results."""
