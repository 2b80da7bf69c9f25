"""The folder of a run: its files, where a result was made, and the table of several runs."""
