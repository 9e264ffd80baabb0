"""The kernels' benchmark: shapes of real models, contenders, exactness, timing, rows, tables.

``bitnet bench kernels`` and ``bitnet bench report`` are thin layers over it. In the order of a run:
:mod:`.shapes` and :mod:`.contenders` (what to time), :mod:`.verify` (checks it before it is timed),
:mod:`.timing` and :mod:`.run`, :mod:`.estimate` (GPUs that are not present), :mod:`.rows` (the CSV
files), :mod:`.report` (tables and plots).
"""
