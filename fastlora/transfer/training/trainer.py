"""The training loop, which can be killed at any step and ends as if it had not been."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora._core.files import check_output_folder
from fastlora._core.interruption import Stop
from fastlora._core.memory import PeakMemory
from fastlora._core.progress import Reporter
from fastlora.anatomy.stages import head as find_head
from fastlora.distributed.tuned import share
from fastlora.transfer.data import LabelledImages
from fastlora.transfer.models.freezing import keep_frozen_in_eval
from fastlora.transfer.training import checks
from fastlora.transfer.training.average import WeightAverage
from fastlora.transfer.training.batches import BatchPlan, Part
from fastlora.transfer.training.checkpoint import CHECKPOINTS, Checkpoints
from fastlora.transfer.training.device import make_accelerator
from fastlora.transfer.training.engine import Engine, logits_of
from fastlora.transfer.training.fingerprint import check_same, fingerprint
from fastlora.transfer.training.logs import NoLogs, RunLogs
from fastlora.transfer.training.loss import Loss
from fastlora.transfer.training.prediction import predict
from fastlora.transfer.training.progress import Progress
from fastlora.transfer.training.randomness import others_draw, start_from
from fastlora.transfer.training.records import EpochRecord, TrainResult, scores
from fastlora.transfer.training.settings import TrainSettings
from fastlora.transfer.training.snapshot import put_back, taken
from fastlora.transfer.training.stage_switch import StageSwitch
from fastlora.transfer.unfreezing import GradualUnfreezing


class Trainer:
    """Trains a model on labelled pictures, checkpoint by checkpoint.

    A subclass may train something else by overriding :meth:`_load`, :meth:`_part_loss` and :meth:`_record`.

    What trains is what requires gradients (or what ``unfreezing`` switches on); frozen parts stay in eval
    mode. On a CPU a run that was killed at any step and resumed ends bit-identical to one that wasn't:
    weights, averages, optimiser, schedule and generators are in the checkpoints, order and augmentation
    depend on seed, epoch and example alone.

    In several processes (``accelerate launch``, ``torchrun``) a batch is divided among them, so the loss
    curve is that of one process to rounding; layers that compute over the batch, such as a BatchNorm in
    train mode, see their process's part.

    Attributes:
        step_seconds: What each optimiser step of this process took.

    Args:
        model: A classifier: from a batch of transformed pictures to logits ``[B, classes]``.
        train: To learn from, with the training transform.
        validation: To watch, with the evaluation transform and the same classes.
        settings: Hyper-parameters.
        output: Folder for checkpoints and logs.
        unfreezing: When stages begin to train.
        head: The classifier inside the model; None looks for it.
        configuration: What else a resumed run must share: JSON values, by name.
        reporter: Is told about the progress.
        checkpoints: Whether to write any; a run without can't be resumed, and signals end it at once.
        accelerator: An ``accelerate.Accelerator``; None makes one of the settings.

    Raises:
        ValueError: Classes that differ, nothing that trains, or more processes than a batch has examples.
        ImportError: ``accelerate`` is not installed.
        NotADirectoryError, PermissionError: ``output`` can't be written to.
    """

    _record_kind: type[EpochRecord] = EpochRecord
    _resumed_at: int | None

    def __init__(
        self,
        model: nn.Module,
        train: LabelledImages,
        validation: LabelledImages,
        settings: TrainSettings,
        *,
        output: Path,
        unfreezing: GradualUnfreezing | None = None,
        head: nn.Module | None = None,
        configuration: Mapping[str, Any] | None = None,
        reporter: Reporter | None = None,
        checkpoints: bool = True,
        accelerator: Any = None,
    ) -> None:
        """See the class."""
        checks.check_classes(train, validation)
        check_output_folder(output)
        self.model = keep_frozen_in_eval(model)
        self._head = find_head(model)[1] if head is None else head
        self._settings, self._unfreezing, self._reporter = settings, unfreezing, reporter
        self._train, self._validation, self._output = train, validation, output
        count, self._monitor, self._resumable = len(train), str(settings.monitor), checkpoints
        plan = {} if unfreezing is None else {"unfreezing": [list(unfreezing.at), unfreezing.unit]}
        self._configuration = {**(configuration or {}), **plan}
        self.accelerator = make_accelerator(settings.precision) if accelerator is None else accelerator
        # ranks that sum in different orders drift apart
        share()
        checks.check_processes(self.accelerator.num_processes, count, settings, unfreezing)
        self.total_steps, self._steps_per_epoch = settings.total_steps(count), settings.steps_per_epoch(count)
        self._saved = checks.what_changes(self.model, self._head, unfreezing)
        self._checkpoints = Checkpoints(output / CHECKPOINTS)
        self._peak, self.step_seconds = PeakMemory(self.accelerator.device), list[float]()
        self._loss = Loss.of(train, settings, self.accelerator.device)
        self._plan = BatchPlan.of(train, settings, self.accelerator, in_pairs=settings.mixup > 0)

    def fit(self, *, resume: bool = False) -> TrainResult:
        """Train to the end, or to an early stop.

        Args:
            resume: Go on from the last whole checkpoint in ``output``, if there is one.

        Raises:
            ValueError: ``output`` holds another run's checkpoints and ``resume`` is False, or the run to
                resume had another configuration (all differences are listed).
            FloatingPointError: The loss or the gradients are no longer finite; the last checkpoint stays.
            OSError: A checkpoint couldn't be written; those before stay.
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint; in several processes, or repeated, at once.
        """
        with self._running(resume=resume), self._stop:
            while not self._finished:
                with self._peak:
                    self._run_epoch()
        return self.result()

    def epochs(self, *, resume: bool = False) -> Generator[EpochRecord, None, None]:
        """Train as :meth:`fit` does, an epoch whenever the next record is asked for: for runs in turns.

        Each ends bit-identical to the same run alone. Between epochs signals do what they did before; one
        that comes during an epoch, the last one too, ends the run with a checkpoint.

        Args:
            resume: Go on with the run that the output folder holds; :meth:`fit` says what is raised.
        """
        with self._running(resume=resume):
            while not self._finished:
                # not across the yield: two runs in turns would put back each other's handlers
                with self._stop, self._peak:
                    self._run_epoch()
                if self._stop.number is not None:
                    # it came after the epoch's last step, or the run is over but the others aren't
                    self._save()
                    raise self._checkpoints.interrupted(self._stop.number, self._progress.step)
                with others_draw():
                    yield self._progress.history[-1]

    @contextmanager
    def _running(self, *, resume: bool) -> Iterator[None]:
        """Begin or resume, and end with the weights that are kept."""
        checks.check_unused(self._output, resume=resume)
        found = self._checkpoints.latest(checks.check_state)
        self._resumed_at, state = (None, None) if found is None else found
        # of the model as it was given, before it is wrapped or trained
        self._fingerprint = fingerprint(
            self.model, self._saved, self._train, self._validation, self._settings, self._configuration
        )
        if state is not None:
            check_same(state["fingerprint"], self._fingerprint)
        with nullcontext() if state is None else checks.told_as_damage(self._checkpoints.folder):
            self._begin(state)
        # several processes would stop at different steps, and wait for each other
        self._stop = Stop(watch=self._resumable and self.accelerator.num_processes == 1)
        try:
            yield
            best = self._progress.best_weights
            self._engine.set_weights(self._validated_weights() if best is None else best)
        finally:
            self._logs.close()
            self._engine.release()
        self.model.eval()

    def result(self) -> TrainResult:
        """What the epochs so far gave."""
        return self._progress.result(self._peak.bytes, self._resumed_at)

    def _begin(self, state: dict[str, Any] | None) -> None:
        start_from(self._settings.seed)
        progress = Progress() if state is None else Progress.restored(state["progress"], self._record_kind)
        self._progress = progress
        self._stages = StageSwitch(self.model, self._head, self._unfreezing, self._steps_per_epoch)
        self._stages.turn(self._progress.step)
        self._engine = Engine(
            self.model, self._head, self._saved, self._settings, self.total_steps, self.accelerator
        )
        self._average = WeightAverage(self.model, self._saved, self._settings.ema)
        if state is not None:
            put_back(state, self._engine, self._average, self.accelerator)
        # the logs of a finished run stay as they are
        writes = self.is_main and not self._finished
        self._logs = RunLogs(self._output, self._progress.step) if writes else NoLogs()

    @property
    def _finished(self) -> bool:
        return self._progress.stopped or self._progress.step >= self.total_steps

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self.accelerator.is_main_process)

    def predict(self, images: LabelledImages) -> Tensor:
        """Logits ``[n, classes]`` (float32, CPU) of pictures with the evaluation transform.

        Every process has to call it, and gets all of them.
        """
        return predict(
            self.model, images, self._settings.batch_size, self._settings.workers, self.accelerator
        )

    def _run_epoch(self) -> None:
        progress = self._progress
        epoch, first = divmod(progress.step, self._steps_per_epoch)
        batches = self._plan.batches(epoch)
        for parts in self._load(epoch, first):
            started = time.perf_counter()
            if self._stages.turn(progress.step):
                self._engine.rewrap()
            self.model.train()
            self._step(parts, epoch, batches[progress.step % self._steps_per_epoch])
            self.step_seconds.append(time.perf_counter() - started)
            progress.seconds += self.step_seconds[-1]
            over = progress.step % self._steps_per_epoch == 0 or progress.step == self.total_steps
            if over:
                self._validate(epoch)
            every = self._settings.checkpoint_every
            due = self._finished or (over if every is None else progress.step % every == 0)
            if (due and self._resumable) or self._stop.number is not None:
                self._save()
            if self._stop.number is not None and not self._finished:
                raise self._checkpoints.interrupted(self._stop.number, progress.step)
            if over:
                return

    def _step(self, parts: Sequence[Part], epoch: int, indices: Sequence[int]) -> None:
        progress = self._progress
        share = self._loss.share(progress.step)
        weight = self._loss.weight([self._train.labels[i] for i in indices], share)
        # processes average their gradients, so each one's are multiplied by how many there are
        scale = self.accelerator.num_processes / weight
        total = torch.zeros((), device=self.accelerator.device)
        for place, part in enumerate(parts):
            with self._engine.part(last=place == len(parts) - 1):
                loss = self._part_loss(part, share, weight)
                self._engine.backward(loss * scale)
            total += loss.detach()
        value = float(self.accelerator.reduce(total, reduction="sum")) / weight
        lr, told = self._engine.lr, (progress.step + 1, parts, self._settings.lr, self._output)
        checks.check_finite("loss", value, *told)
        norm = self._engine.step()
        if norm is not None and self.accelerator.scaler is None:
            checks.check_finite("norm of the gradients", norm, *told)
        progress.take_step(value, len(indices))
        self._average.update(progress.step)
        self._logs.step(progress.step, epoch + 1, value, lr, norm)
        self._lr = lr
        if self._reporter is not None and self.is_main:
            self._reporter.advance("train", progress.step, self.total_steps, value, memory=self._peak.bytes)

    def _load(self, epoch: int, first: int) -> Iterator[Sequence[Part]]:
        """The parts of the epoch's batches from number ``first`` on."""
        return self._plan.load(epoch, first, self._settings.workers)

    def _part_loss(self, part: Part, share: float, weight: float) -> Tensor:
        """Summed loss of a part; ``weight`` is what the sum over the batch is divided by."""
        device = self.accelerator.device
        logits = logits_of(self._engine.forward(self._loss.mix(part.inputs.to(device), share)))
        return self._loss.sum(logits.float(), part.labels.to(device), part.counted.to(device), share)

    def _validate(self, epoch: int) -> None:
        with self._average.swapped_in():
            record = self._record(epoch)
        self._progress.end_epoch(record, self._monitor, self._settings, self._validated_weights)
        self._logs.epoch(self._progress.history)

    def _record(self, epoch: int) -> EpochRecord:
        """What an epoch, counted from 0, gave."""
        return EpochRecord(**self._figures(epoch, self.predict(self._validation)))

    def _figures(self, epoch: int, logits: Tensor) -> dict[str, Any]:
        """Fields of :class:`EpochRecord`, from the logits of the validation pictures."""
        plan = {"lr": self._lr, "trained_stages": self._stages.trained}
        return self._progress.figures(epoch) | scores(logits, self._validation) | plan

    def _validated_weights(self) -> dict[str, Tensor]:
        with self._average.swapped_in():
            return self._engine.weights()

    def _save(self) -> None:
        state = taken(self._engine, self._average, self._progress, self.accelerator)
        if self.is_main:
            self._logs.flush()
            self._checkpoints.save(self._progress.step, {**state, "fingerprint": self._fingerprint})
        self.accelerator.wait_for_everyone()
