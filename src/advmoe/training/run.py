"""A run in progress: where it is, its checkpoints, and how it goes back after a non-finite value."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch.optim.optimizer import StateDict

from advmoe import distributed
from advmoe.config import RunConfig
from advmoe.data import Splits
from advmoe.errors import UserError
from advmoe.models import Classifier
from advmoe.moe import synchronise
from advmoe.provenance import code
from advmoe.training.checkpoint import Checkpoint, RunFolder
from advmoe.training.ema import Ema
from advmoe.training.health import NonFinite
from advmoe.training.interrupts import Interrupts, Stopped
from advmoe.training.manifest import LARGEST, EpochRow, History, Progress
from advmoe.training.methods import METHODS, Phase
from advmoe.training.observers import Observer
from advmoe.training.resume import TRAINED, restore, restore_average
from advmoe.training.schedule import routers_learn
from advmoe.training.start import initial_network, train_state
from advmoe.training.statistics import calibrate
from advmoe.training.steps import TrainState
from advmoe.training.totals import Totals, Value, means

log = logging.getLogger("advmoe")
MAX_RESTORES = 3
BEFORE_VALIDATION = 1.0  # minutes without a checkpoint after which one is saved before the validation, which saves nothing


@dataclass
class Run:
    """`latest` is the checkpoint that the next epoch starts from, or None if it starts from the model in memory.
    `digests` are those of the teacher and the generated images, as the history has them; `code` is the code that this process
    trains with."""

    config: RunConfig
    splits: Splits
    folder: RunFolder
    model: Classifier
    interrupts: Interrupts
    observers: Sequence[Observer]
    latest: Checkpoint | None
    digests: Mapping[str, str]
    history: History = field(init=False)
    restores: int = 0
    code: Mapping[str, str] = field(default_factory=code)

    def __post_init__(self) -> None:
        self._continue_from(self.latest)

    def _continue_from(self, checkpoint: Checkpoint | None) -> None:
        self.latest, self.history = checkpoint, list(checkpoint.history) if checkpoint else []
        self.restores = max(self.restores, checkpoint.restores if checkpoint else 0)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run's method."""
        return METHODS[self.config.method].phases

    @property
    def phase_number(self) -> int:
        """The phase of the next epoch, from 0; `len(phases)` at the end of the run."""
        return len(self.history) // self.config.training.epochs

    @property
    def is_done(self) -> bool:
        """Whether no epoch remains."""
        return self.phase_number >= len(self.phases)

    @property
    def epochs_of_phase(self) -> int:
        """How many epochs of the current phase are done."""
        return len(self.history) % self.config.training.epochs

    @property
    def last_row(self) -> Mapping[str, object]:
        """The row of the last epoch, with the digests of an unfinished one; empty at the start of a run."""
        partial = None if self.latest is None else self.latest.partial
        return {**(self.history[-1] if self.history else {}), **(partial.digests if partial else {})}

    def begin_phase(self) -> TrainState:
        """The state of the current phase, as the latest checkpoint has it."""
        config, latest = self.config, self.latest
        if self.phase_number > 0:  # the experts differ, and the groups of `confusion` are known: routers learn from the start
            config = config.replace(training=config.training.replace(tied_share=0.0, router_schedule="phase"))
        state = train_state(config, self.model, self.phases[self.phase_number])
        trained: StateDict = {}
        within = latest is not None and (self.epochs_of_phase > 0 or latest.partial is not None)
        synchronise(self.model, False)
        if latest is not None:
            trained = restore(state, latest, within)
        elif not self.history:
            distributed.broadcast_state(self.model)
            calibrate(self.model, self.config, self.splits.train)
        synchronise(self.model, distributed.world_size() > 1 and self.config.training.sync_norm)
        if self.config.training.ema:
            state.ema = Ema(self.model, self.config.training.ema)
            if latest is not None and within:
                restore_average(state.ema, latest, trained)
        return state

    def begin_epoch(self, iterations: int) -> Totals:
        """The totals of the next epoch, as the latest checkpoint has them. Raises UserError if the checkpoint is further
        into the epoch than `iterations`."""
        totals = Totals.resumed(self.latest.partial if self.latest else None)
        self.latest = None
        if totals.iteration > iterations:
            raise UserError(f"{self.folder.path}: its checkpoint is {totals.iteration} iterations into an epoch of {iterations}")
        return totals

    def finish_iteration(self, state: TrainState, totals: Totals, iterations: int) -> None:
        """Tell the observers, and save if the last checkpoint is old or a signal was caught, which raises Stopped."""
        epoch = len(self.history) + 1
        try:
            for observer in self.observers:
                observer.iteration(epoch, totals.iteration, iterations, totals.sums, totals.images)
        except OSError:  # the signal may also have ended the reader of a pipe that an observer writes to
            self._save_if_due(state, totals, iterations)
            raise
        self._save_if_due(state, totals, iterations)

    def _save_if_due(self, state: TrainState, totals: Totals, iterations: int) -> None:
        minutes = self.config.runtime.save_minutes
        if totals.iteration == iterations:
            minutes = min(minutes, BEFORE_VALIDATION)
        due = totals.seconds_unsaved >= 60 * minutes
        signal_or_due = distributed.maximum(self.interrupts.caught or int(due))  # no signal that is caught has the number 1
        if signal_or_due:
            check_finite(state, means(*totals.over_ranks()))
            self._save(state, totals)
        if signal_or_due > 1:
            raise Stopped(
                signal_or_due, f"after epoch {len(self.history) + 1}, iteration {totals.iteration} of {iterations}, which is saved"
            )

    def finish_epoch(self, state: TrainState, figures: dict[str, Value]) -> None:
        """Add the epoch's figures to the history, save, and tell the observers. Raises Stopped if a signal was caught."""
        score = figures[METHODS[self.config.method].selects]
        row = cast(EpochRow, {**figures, "phase": 1 + self.phase_number, "score": score})
        self.history.append(distributed.broadcast(row))
        self._save(state)
        for observer in self.observers:
            observer.epoch(row)
        caught = distributed.maximum(self.interrupts.caught)
        if caught and not self.is_done:
            raise Stopped(caught, f"after epoch {len(self.history)}, which is saved")

    def _save(self, state: TrainState, totals: Totals | None = None) -> None:
        """Write a checkpoint after an epoch, or within the one of `totals`."""
        states: dict[str, StateDict] = {level: optimizer.state_dict() for level, optimizer in state.optimizers.items()}
        if state.ema is not None:  # the weights' file holds the average, which is what a network is used for
            states[TRAINED] = {"weights": state.model.state_dict(), "updates": state.ema.updates}
        progress = Progress(self.history, None if totals is None else totals.partial(self.digests), self.restores)
        model, splits = state.network.state_dict(), self.splits
        distributed.on_rank_zero(lambda: self.folder.save(model, states, progress, splits.fingerprint, splits.spec))

    def recover(self, error: NonFinite, state: TrainState) -> None:
        """Go back to the last good checkpoint if the configuration says so, else raise UserError."""
        epoch, latest = len(self.history) + 1, distributed.on_rank_zero(self.folder.latest)
        last = f"{latest.folder.name} in {self.folder.checkpoint_path}" if latest else "none yet"
        back, rate = last if latest else "the start", "the routers' rate" if routers_learn(state) else "the rate"
        if self.config.training.on_nonfinite == "stop" or self.restores == MAX_RESTORES:
            after = f" (after {self.restores} restores)" if self.restores else ""
            raise UserError(f"epoch {epoch}: {error}{after}; last good checkpoint: {last}") from None
        self.restores += 1
        log.warning("epoch %d: %s; back to %s, with half %s (%d of %d)", epoch, error, back, rate, self.restores, MAX_RESTORES)
        self._continue_from(latest)
        if latest is None:
            self.model.load_state_dict(initial_network(self.config, self.splits).state_dict())


def check_finite(state: TrainState, figures: Mapping[str, Value]) -> None:
    """Raises NonFinite if a figure or the network is not finite, or a figure too large for a checkpoint: a user's step need not
    check what it computes."""
    for name, value in figures.items():
        if isinstance(value, float) and not abs(value) < LARGEST:
            raise NonFinite(f"the metric '{name}' is {value:g}")
    state.watch.network(state.model)
    try:
        state.watch.check()
    except NonFinite as error:
        raise NonFinite(f"{error} is not finite after the last iteration") from None
