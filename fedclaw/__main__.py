"""FedClaw's commands, one after the other: `fedclaw COMMAND ...` is `python -m fedclaw.COMMAND ...`.

fedclaw server federation=DIR workload.schema_file=schema.yaml rounds=10 privacy.epsilon=4
fedclaw client site=DIR check
fedclaw COMMAND --help          what a command takes
"""

import ast
import sys
from importlib import import_module

from fedclaw.catalogue import one_of, plugin_lines, source_of, table
from fedclaw.startup import begin, give_help

COMMANDS = {
    "provision": "fedclaw.provision",
    "server": "fedclaw.server",
    "client": "fedclaw.client",
    "statistics": "fedclaw.statistics",
    "ledger": "fedclaw.ledger",
    "audit": "fedclaw.audit",
    "compress": "fedclaw.compress",
    "export": "fedclaw.export",
    "verify": "fedclaw.verify",
    "layouts": "fedclaw.layouts",
    "lineage": "fedclaw.lineage",
    "predict": "fedclaw.predict",
    "serve": "fedclaw.serve",
    "encryption": "fedclaw.encryption",
    "ray": "fedclaw.transport.ray",
}
_WITH_PLUGINS = frozenset({"server", "audit", "ray"})
_WRONG_USE = 2


def main() -> None:
    """The console script `fedclaw`, and `python -m fedclaw`. Never returns."""
    words = sys.argv[1:]
    if not words or words[0] in {"-h", "--help"}:
        give_help(overview())
    name = words[0]
    if name not in COMMANDS:
        sys.stderr.write(f"fedclaw: there is no command {name!r}{one_of(name, COMMANDS)}\n")
        sys.exit(_WRONG_USE)
    module, usage = COMMANDS[name], usage_of(COMMANDS[name])
    sys.argv = [f"fedclaw {name}", *words[1:]]
    begin(module, usage, plugins=name in _WITH_PLUGINS, spoken=f"fedclaw {name}")
    from fedclaw.cli import run_main

    run_main(module, usage, import_module(_file_of(module)).main)


def overview() -> str:
    """The commands, and what is installed."""
    commands = [(name, usage_of(module).partition("\n")[0].rstrip(".")) for name, module in COMMANDS.items()]
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", *table(commands), "", *plugin_lines()])


def usage_of(module: str) -> str:
    """A command's help, out of its file, which is not imported for it."""
    path = source_of(_file_of(module))
    return "" if path is None else ast.get_docstring(ast.parse(path.read_bytes())) or ""


def _file_of(module: str) -> str:
    """The module with `main`: a package's is its __main__."""
    path = source_of(module)
    return f"{module}.__main__" if path is not None and path.name == "__init__.py" else module


if __name__ == "__main__":
    main()
