"""The command line: ``trlx`` and one file or package for each command."""
