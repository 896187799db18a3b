"""What a run left, as values: its rounds, its model, and what it cost in privacy."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedclaw.api.arguments import place, public
from fedclaw.errors import PluginError, UsageError
from fedclaw.identity.data_keys import Keyring, load_keyring
from fedclaw.learning.workload import load_parameters
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.terms import CentralNoise, PrivacyRequest
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt

if TYPE_CHECKING:
    import torch

    from fedclaw.api.module import Model
    from fedclaw.api.reading import Bundle


@dataclass(frozen=True)
class Run:
    """A run, read from its directory: one of `simulate`, or of `fedclaw server`. Nothing in it changes.

    Where no directory was named it is a temporary one, which goes with the last `Run` that holds it.
    """

    path: Path
    """Its directory."""
    _factory: "Model | None" = field(default=None, repr=False, compare=False)
    _holder: object = field(default=None, repr=False, compare=False)
    """Keeps a temporary directory from being removed."""
    _keys: Keyring | None = field(default=None, repr=False, compare=False)
    """Opens the run's parameters, where they are encrypted at rest."""

    def _directory(self) -> RunDirectory:
        return RunDirectory.open(self.path, self._keys)

    @cached_property
    def record(self) -> RunRecord:
        """All that was asked for."""
        return self._directory().record()

    @cached_property
    def history(self) -> tuple[dict[str, float], ...]:
        """One entry a round, {"round": 3, "accuracy": 0.91, ...}: pandas.DataFrame(run.history) is a table of it."""
        lines = self._directory().read_metrics()
        return tuple({"round": line["round"], **line["metrics"]} for line in lines)

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last round that was evaluated: accuracy, f1, auroc and others; for numbers rmse, mae and r2."""
        last = next((entry for entry in reversed(self.history) if len(entry) > 1), {})
        return {name: value for name, value in last.items() if name != "round"}

    @cached_property
    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        """The final global parameters, by name. Raises CheckpointError for a run that has not finished."""
        directory = self._directory()
        directory.require_whole()
        return directory.read_model()

    @public
    def model(self, model: "Model | None" = None) -> "torch.nn.Module":
        """The trained torch module, in evaluation mode.

        `model`: its class, for a run that was read again and whose module is the caller's own. Raises UsageError if
        the parameters are not those of that module, PluginError if none was given and no workload builds it.
        """
        built = self._build(model)
        try:
            load_parameters(built, self.parameters)
        except ValueError as error:
            raise UsageError(f"the run's model is not a {type(built).__name__}: {error}") from error
        return built.eval()

    @public
    def export(
        self,
        target: str | os.PathLike[str],
        *,
        federation: str | os.PathLike[str],
        model: "Model | None" = None,
        inputs: "ArrayLike | None" = None,
        quantise: bool = False,
        overwrite: bool = False,
        key: str | None = None,
    ) -> "Bundle":
        """Write the trained model as a signed bundle, and return it verified.

        Any installation serves it (`fedclaw predict bundle=...`): the graph is in it, and none of the module's code. Of
        a federation of data frames rows are read from CSV or Parquet with the same columns, of arrays from .npz files
        with `x` (N, *D).

        Args:
            target: the bundle's directory, not there yet.
            federation: the coordinator's directory, whose release key signs (`fedclaw provision init`).
            model: the module's class, for a run that was read again.
            inputs: (N, *D) real inputs on which the graph is compared with the module; None: such as the schema makes.
            quantise: add an 8-bit and a 16-bit graph, and say which one is recommended.
            overwrite: replace a bundle that is there.
            key: encrypts the bundle at rest: file:PATH, env:NAME or a PKCS#11 URI. A run that is encrypted needs one.

        A simulation's bundle says that it is one, in its card and its privacy statement. Raises BundleError for a
        module that cannot be exported, or whose graph gives other answers, UsageError where the export extra is
        missing, ProvisionError for a directory that is no coordinator's.
        """
        from fedclaw.api.exporting import export_run
        from fedclaw.clients.arrays import inputs_of
        from fedclaw.export.bundle import Request

        given = model or self._factory
        self._require_module(given)
        real = None if inputs is None else inputs_of(inputs, "inputs")
        keys = None if key is None else load_keyring(key)
        if keys is None and self._keys is not None:
            raise UsageError("the run is encrypted at rest: name the key of its bundle, key=")
        request = Request(inputs=real, quantised=quantise, overwrite=overwrite, keys=keys)
        return export_run(self._directory(), given, place(federation, "federation"), place(target, "target"), request)

    def _require_module(self, given: "Model | None") -> None:
        from fedclaw.api.module import OWN

        if given is None and self.record.model.name == OWN:
            raise PluginError(
                "the model is a torch module of the program that made the run: give its class, model=MyNet"
            )

    def _build(self, model: "Model | None") -> "torch.nn.Module":
        from fedclaw.api.module import factory_of

        self._require_module(given := model or self._factory)
        if given is not None:
            return factory_of(given)()
        return self.record.make_workload().build(self.record.model)

    @cached_property
    def receipts(self) -> Mapping[str, SiteReceipt]:
        """How many examples each client or site has and what it spent, by its name."""
        return self._directory().read_receipts()

    @property
    def epsilon(self) -> float:
        """An upper bound on what the run cost, at `delta`, for the unit that was asked for; infinite without noise.

        With noise by the clients it is that of the client that spent most, and holds for each of its examples, whoever
        else may be dishonest. With noise on the sum alone it is what was asked for, and holds if the server is honest.
        It covers neither other runs nor metrics, which are exact.
        """
        if (asked := self._guarantee) is not None and not mechanism_of(self.record).noises_steps:
            return asked.epsilon
        spent = [receipt.receipt.epsilon_run for receipt in self.receipts.values()]
        return max((math.inf if epsilon is None else epsilon for epsilon in spent), default=math.inf)

    @property
    def delta(self) -> float | None:
        """The delta that goes with `epsilon`; None: the run had no privacy."""
        return None if self._guarantee is None else self._guarantee.delta

    @property
    def _guarantee(self) -> PrivacyRequest | CentralNoise | None:
        return mechanism_of(self.record).guarantee(trust_server_noise=True)

    def __repr__(self) -> str:
        record, rounds = self.record, len(self.history)
        metrics = self.metrics
        quality = "".join(f", {name} {metrics[name]:.3g}" for name in ("accuracy", "rmse") if name in metrics)
        cost = "without privacy" if self.delta is None else f"epsilon {self.epsilon:.3g} at delta {self.delta:g}"
        return f"Run({record.strategy.name}, {rounds} of {record.rounds} rounds{quality}, {cost})"


@public
def read_run(path: str | os.PathLike[str], *, key: str | None = None) -> Run:
    """The run in a directory such as runs/NAME.

    `key` is where the key of a run that is encrypted at rest is: file:PATH, env:NAME or a PKCS#11 URI. Raises
    UsageError if the directory is no run's, CheckpointError if it is damaged, EncryptionError if it does not open.
    """
    run = Run(place(path, "path"), _keys=None if key is None else load_keyring(key))
    run._directory().check()
    return run
