"""The command line, one file a verb. `slimba VERB --help`, `python -m slimba VERB --help`."""
