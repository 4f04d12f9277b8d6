"""The command line: ``fedsb run | submit | watch | report | eval | export | cost | node | worker | federation | doctor | completion``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from fedsb.commands.completion import ASKED, answer, completion
from fedsb.commands.flags import SHOWING, SWEEP, flags_in, has_flag, without_flags
from fedsb.commands.outcome import MISTAKE, guarded
from fedsb.commands.pages import USAGE, page
from fedsb.core.collector import uncollected
from fedsb.core.errors import unknown
from fedsb.core.signals import heeding_sigterm
from fedsb.core.streams import hand_on, spell_out
from fedsb.runtime.early import begin
from fedsb.sweep.crew import begin_early


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the run failed, 2 a mistake in what was given, 128 and more: a signal ended it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    spell_out()
    with heeding_sigterm():
        status = guarded(lambda: _dispatch(arguments))
    raise SystemExit(hand_on(status))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else MISTAKE
    if arguments[0] in ("--version", "-V", "version"):
        print(f"fedsb {version('fedsb')} (flwr {version('flwr')}, torch {version('torch')})")
        return 0
    command, *rest = arguments
    if command == ASKED:
        return answer(rest)
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    if has_flag(rest, ("-h", "--help")):
        print(page(command))
        return 0
    return COMMANDS[command](rest)


def run(arguments: list[str]) -> int:
    """Run a federation, or a sweep of them."""
    # A flag that nobody knows is told before anything is begun.
    flags = flags_in(arguments)
    if not has_flag(flags, SHOWING):
        begin(arguments)
        if has_flag(flags, SWEEP) and any(text.startswith("sweep.jobs=") and text != "sweep.jobs=1" for text in arguments):
            begin_early()
    with uncollected(for_good=True):
        from fedsb.commands.run import run as run_command

    return run_command(arguments)


def submit(arguments: list[str]) -> int:
    """Submit a run to a real federation and watch it."""
    with uncollected(for_good=True):
        from fedsb.commands.submit import submit as submit_command

    return submit_command(arguments)


def watch(arguments: list[str]) -> int:
    """Show how a run or a sweep stands."""
    with uncollected(for_good=True):
        from fedsb.commands.watch import watch as watch_command

    return watch_command(arguments)


def report(arguments: list[str]) -> int:
    """Write the report of one run, or the comparison of several."""
    with uncollected(for_good=True):
        from fedsb.commands.report import report as report_command

    return report_command(arguments)


def evaluate(arguments: list[str]) -> int:
    """Measure the model of a run again, beside its untouched base."""
    with uncollected(for_good=True):
        from fedsb.commands.evaluate import evaluate as evaluate_command

    return evaluate_command(arguments)


def export(arguments: list[str]) -> int:
    """Write the model of a finished run for others to load."""
    with uncollected(for_good=True):
        from fedsb.commands.export import export as export_command

    return export_command(arguments)


def cost(arguments: list[str]) -> int:
    """Print what every method costs."""
    with uncollected(for_good=True):
        from fedsb.cost.table import print_costs
        from strategies import STRATEGIES

    print_costs(without_flags("cost", arguments), list(STRATEGIES))
    return 0


def node(arguments: list[str]) -> int:
    """Try what the operator of a node has said."""
    with uncollected(for_good=True):
        from fedsb.commands.node import node as node_command

    return node_command(arguments)


def worker(arguments: list[str]) -> int:
    """Answer for a node, in one process that keeps its model and data."""
    from fedsb.commands.worker import worker as worker_command

    return worker_command(arguments)


def federation(arguments: list[str]) -> int:
    """Run a side of a federation over TLS, or make what it needs."""
    from fedsb.commands.federation import federation as federation_command

    return federation_command(arguments)


def doctor(arguments: list[str]) -> int:
    """Try what a run needs of this machine."""
    from fedsb.commands.doctor import doctor as doctor_command

    return doctor_command(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "submit": submit,
    "cost": cost,
    "watch": watch,
    "report": report,
    "eval": evaluate,
    "export": export,
    "node": node,
    "worker": worker,
    "federation": federation,
    "doctor": doctor,
    "completion": completion,
}

if __name__ == "__main__":
    main()
