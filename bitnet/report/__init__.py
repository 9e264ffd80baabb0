"""One page about runs: ``bitnet report``. runs.py reads, verdict.py judges, charts.py draws,
page.py makes the page and picture.py the PNG."""
