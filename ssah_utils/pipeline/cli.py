"""The command ``ssah``: one door to the runner, the figures, publishing and downloads. Knows their
options only.
"""

import importlib
import sys

COMMANDS = {
    "run": ("ssah_utils.pipeline.run", "execute notebooks in order"),
    "figures": ("ssah_utils.pipeline.redraw", "draw all figures from stored results"),
    "publish": ("ssah_utils.pipeline.publish", "store the results of a run"),
    "download": ("ssah_utils.assets", "fetch and check what comes in wheels"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its module is imported only then, so that help is there at once."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print("usage: ssah COMMAND [options]\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print("\nssah COMMAND --help says what a command takes.")
        return 0
    if words[0] not in COMMANDS:
        print(
            f"error: unknown command '{words[0]}' (there are: {', '.join(COMMANDS)})",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
