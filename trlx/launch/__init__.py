"""The command line: ``python -m trlx`` and one file or package for each command."""
