"""``bitnet bench``: measure speed, and draw tables and plots from the results."""

from bitnet.cli.lazy import group

bench_group = group(
    {
        "train": "bitnet.cli.bench_train:train_command",
        "decode": "bitnet.cli.bench_decode:decode_command",
        "kernels": "bitnet.cli.bench_kernels:kernels_command",
        "exact": "bitnet.cli.bench_exact:exact_command",
        "tune": "bitnet.cli.bench_tune:tune_command",
        "report": "bitnet.cli.bench_report:report_command",
    },
    "Measure speed; draw tables and plots from the figures.",
)
