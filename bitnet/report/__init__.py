"""One page about runs: ``bitnet report``. runs.py reads, verdict.py judges, charts.py draws,
page.py puts it together and picture.py is the PNG."""
