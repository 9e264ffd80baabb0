"""The kernels' benchmark: shapes of real models, contenders, exactness, timing, rows, tables.

``bitnet bench kernels`` and ``bitnet bench report`` are thin layers over it. The order of a run:
what to time (:mod:`.shapes`, :mod:`.contenders`), whether it is right (:mod:`.verify`: nothing is
timed that is not), how long it takes (:mod:`.timing`, :mod:`.run`), what GPUs that are not here
would take (:mod:`.estimate`), where it is kept (:mod:`.rows`), what is shown (:mod:`.report`).
"""
