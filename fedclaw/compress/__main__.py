"""Prune a run's model to a fraction of its parameters and recover it by distillation from the run's own model.

python -m fedclaw.compress run=runs/NAME [key=value ...]

  run=DIR              the finished run; the result goes to DIR/compressed
  overwrite=true       replace an earlier result there, once the new one is whole
  fraction=0.3         largest share of the parameters that may be left
  mode=proxy           recover at the coordinator on public or synthetic inputs: costs no privacy
  mode=federated       recover at the sites, on their ledgers; needs federation=DIR
  inputs=FILE          proxy: public unlabelled inputs; without it, synthetic ones are made from the schema
  evaluation=FILE      labelled public data for the accuracies
  controls=true        proxy: also train the same net from scratch, and without a teacher (labelled=FILE)

Examples:
  python -m fedclaw.compress run=runs/demo
  python -m fedclaw.compress run=runs/demo fraction=0.1 inputs=public.csv evaluation=test.csv controls=true
  python -m fedclaw.compress run=runs/demo mode=federated federation=DIR sites.rounds=5 sites.epsilon=1

All settings are in conf/compress.yaml.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.compress", __doc__)

from collections.abc import Sequence

from fedclaw import startup
from fedclaw.cli import naming, require_paths, run_main, settings_of
from fedclaw.compress.record import require_room
from fedclaw.compress.settings import CompressSettings
from fedclaw.console import make_console
from fedclaw.identity.federation_home import FederationHome
from fedclaw.server.run_directory import RunDirectory


def main(arguments: Sequence[str]) -> None:
    """Compress and print the table. Raises FedClawError."""
    settings = settings_of(arguments, "compress", CompressSettings)
    require_paths(inputs=settings.inputs, evaluation=settings.evaluation, labelled=settings.labelled)
    if settings.federation is not None:
        with naming(federation=settings.federation):
            FederationHome.open(settings.federation)
    require_room(RunDirectory.open(settings.run), settings.overwrite)
    with startup.loading("torch and the pruning library"):
        from fedclaw.compress.stage import compress
        from fedclaw.compress.table import before_after, notes
    startup.next_step("the run is as it was: give the same command again")

    if settings.mode == "federated":
        from fedclaw.report.terminal import TerminalProgress

        progress = TerminalProgress()
        try:
            record = compress(settings, [progress])
        finally:
            progress.close()
    else:
        record = compress(settings)
    console = make_console()
    console.print(before_after(record))
    for note in notes(record, settings.run / "compressed"):
        console.print(note, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_main("fedclaw.compress", __doc__ or "", main)
