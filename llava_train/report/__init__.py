"""Looks at runs: from the files of a run folder to report.html. Needs no torch."""
