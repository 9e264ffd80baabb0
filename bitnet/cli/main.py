"""The ``bitnet`` command collects the commands, one per file in this folder.

Every command is a thin layer over functions of the library; ``bitnet COMMAND --help`` explains it.
A user's mistake ends in one line on stderr and exit code 2.
"""

from bitnet.cli.lazy import group
from bitnet.cli.shell import run

bitnet = group(
    {
        "train": "bitnet.cli.train:train",
        "prepare": "bitnet.cli.prepare:prepare_command",
        "inspect": "bitnet.cli.inspect:inspect_group",
        "plan": "bitnet.cli.plan:plan_command",
        "pack": "bitnet.cli.pack:pack_command",
        "generate": "bitnet.cli.generate:generate_command",
        "chat": "bitnet.cli.chat:chat_command",
        "eval": "bitnet.cli.eval:eval_command",
        "convert": "bitnet.cli.convert:convert_command",
        "export": "bitnet.cli.export:export_command",
        "ptq": "bitnet.cli.ptq:ptq_command",
        "report": "bitnet.cli.report:report_command",
        "bench": "bitnet.cli.bench:bench_group",
    },
    "Ternary language models: train, inspect configs, pack, generate, chat, evaluate.\n\n"
    "Try: bitnet train quickstart\n\n"
    "With --debug anywhere in a command, or BITNET_DEBUG=1, an error shows its traceback.",
)


def main() -> None:
    """Run the command on ``sys.argv`` and exit."""
    run(bitnet)
