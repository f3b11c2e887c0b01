"""The training loop: steps of stages, with what is measured, saved and written on the way."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..errors import T3Error
from . import checkpoint, validation
from .config import Stage
from .curves import Curves
from .finish import Finish
from .log import Log
from .progress import Clock, Progress, fraction, learning_rate, merge, ways, windows
from .session import Session
from .stop import Stop

LOST, INTERRUPTED = 1, 130


class Loop:
    """A run from where it is to its end. `run()` returns the exit status.

    `started` is the time of the program's start (`time.monotonic`), from which the first stage's seconds count.
    """

    def __init__(self, session: Session, folder: Path, started: float) -> None:
        self.session = session
        self.config = session.config
        self.folder = folder
        self.at = Progress(Clock(started))
        self.stepping = False
        self.unsaved: str | None = None
        self.stop = Stop()
        # Of the CPUs: a card would be waited for at every step, and what it runs next could not be queued meanwhile.
        # Nor is there a limit to waiting: one process samples clips, which may take hours.
        several = session.accelerator.num_processes > 1
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30)) if several else None
        self.words = group if isinstance(group, torch.distributed.ProcessGroup) else None
        self.finish = Finish(session, folder, self._aside, self.words)
        self.mean = torch.zeros((), device=session.accelerator.device)
        self.log = Log(session)
        self.curves: Curves | None = None

    def _aside(self, seconds: float) -> None:
        """Something else than steps was done for so long. Before the first step all of the time is lost anyway."""
        if self.stepping:
            self.at.clock.aside += seconds

    # --- where the run is ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the loop."""
        at = self.at
        return {
            "stage": at.stage,
            "stage_steps": at.stage_steps,
            "clock": at.clock.state(),
            "training": at.training,
            "seconds": at.seconds,
            "feeder": self.session.feeder.state(),
            "processes": self.session.accelerator.num_processes,
            "config": self.config.identity(),
            "data": self.session.clips.marks,
        }

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises `T3Error` when it is damaged or of another run."""
        session, state = self.session, checkpoint.read_state(folder)
        check_same(state, self.config.identity(), session.accelerator.num_processes, folder)
        check_data(state, session.clips.marks, folder)
        checkpoint.load(folder, session.objective, session.torch_optimizers, session.average)
        session.feeder.restore(state["feeder"])
        clock = Clock(self.at.clock.started, **state["clock"])
        places = {name: state[name] for name in ("step", "stage", "stage_steps", "training", "seconds")}
        self.at = Progress(clock, **places)

    # --- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Take all steps that are left, and leave everything on disk."""
        output, session = self.config.output, self.session
        if session.main:
            self.curves = Curves(self.folder, self.at.step, output.tensorboard, session.say)
        with self.stop:
            if session.accelerator.device.type == "cuda" or self.config.train.compile:
                self.warm_up()
            if self.at.step == 0:
                self.validate("start")
            self.at.clock.begin()
            self.stepping = True
            while self.at.stage < len(self.config.stages):
                if not self.run_stage(self.config.stages[self.at.stage]):
                    return self.stopped()
            return self.end()

    def run_stage(self, stage: Stage) -> bool:
        """Take the steps that are left of a stage. False when the run was asked to stop."""
        at, output = self.at, self.config.output
        self.session.say(f"stage {stage.name}: from step {at.step}")
        last = at.stage == len(self.config.stages) - 1
        saved = at.step
        while stage.bounded:
            clock, reserve, stop = self.agree()
            if stop:
                return False
            reserve = reserve if last else 0.0
            if fraction(stage, at.stage_steps, clock, reserve) >= 1:
                break
            self.take_step(stage, fraction(stage, at.stage_steps + 1, clock, reserve))
            if at.step % output.log_every == 0:
                self.write_log(stage)
            if self.config.validation.every and at.step % self.config.validation.every == 0:
                self.validate(stage.name)
            if self.config.samples.every and at.step % self.config.samples.every == 0:
                self.finish.sample(at.step)
            if output.checkpoint_every and at.step % output.checkpoint_every == 0:
                saved = self.save()
        at.next_stage()
        if at.step > saved and not last:
            self.save()
        return True

    def agree(self) -> tuple[dict[str, float], float, bool]:
        """The stage's clock, the seconds that the run's end will take, and whether to stop: the same on every process.
        Where they differed, so would the learning rate, and one process would wait for another for ever."""
        clock = self.at.clock
        found = {"seconds": clock.seconds(), "training": clock.training(), "lost": clock.lost}
        *numbers, reserve, stop = self.greatest(*found.values(), self.finish.reserve(), self.stop.asked)
        return dict(zip(found, numbers, strict=True)), reserve, bool(stop)

    def greatest(self, *numbers: float) -> list[float]:
        """Of each of these numbers the greatest that any process has."""
        if self.words is None:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.words)
        return found.tolist()

    def take_step(self, stage: Stage, done: float) -> None:
        """One step of the optimiser; `done` is the part of the stage that will then be over."""
        session, train, at = self.session, self.config.train, self.at
        self.prepare_operator(stage, done)
        rate = learning_rate(stage, done)
        for optimizer in session.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        for part in range(train.accumulate):
            batch = session.feeder.next(stage)
            if part < train.accumulate - 1:
                with session.accelerator.no_sync(session.objective):
                    self.backward(batch, stage)
            else:
                self.backward(batch, stage)
        if train.clip:
            self.log.norm(session.accelerator.clip_grad_norm_(session.parameters, train.clip))
        session.update_weights()
        session.forget_gradients()
        at.step, at.stage_steps = at.step + 1, at.stage_steps + 1
        self.log.step(rate)
        if session.average is not None:
            session.average.update(at.step)

    def prepare_operator(self, stage: Stage, done: float) -> None:
        """Windows and merge as the curriculum has them."""
        weight = merge(stage, done)
        operator = self.session.operator
        operator.windows = windows(stage, done)
        # One tensor for the run: a compiled block would be compiled anew for every number.
        operator.mean = None if weight is None else self.mean.fill_(weight)

    def backward(self, batch, stage: Stage) -> None:
        """Forward and backward of one round; gradients add up."""
        total, parts = self.session.objective(batch, stage)
        self.session.accelerator.backward(total / self.config.train.accumulate)
        self.log.losses(total, parts)

    def warm_up(self) -> None:
        """Run everything once for each size of clip, so that compiling and choosing kernels is no part of training."""
        session = self.session
        if session.clips.held_out:
            validation.warm_up(session, self.config.validation)
        for stage in self.config.stages[self.at.stage :]:
            for pool in session.feeder.pools(stage) if stage.bounded else ():
                for done in ways(stage):
                    self.prepare_operator(stage, done)
                    self.backward(session.feeder.example(pool, stage), stage)
        session.forget_gradients()
        self.log = Log(session)

    # --- what happens on the way --------------------------------------------------------------------------------

    def write_log(self, stage: Stage) -> None:
        """Write the means since the last line. Raises `T3Error` when they are not finite."""
        row, pace = self.log.take()
        if not math.isfinite(row["loss"]):
            raise self.astray(f"the loss is {row['loss']}")
        if self.curves is not None:
            place = {"step": self.at.step, "stage": stage.name, "clips": self.session.feeder.serial}
            self.curves.add("metrics", {**place, **self.at.all_seconds(), **row})
            said = f"loss {row['loss']:.5f}, lr {row['lr']:.2e}, {pace:.3f} s a step"
            self.session.say(f"step {self.at.step}: {said}")

    def validate(self, stage: str) -> None:
        """Measure held-out clips, where there are any."""
        session, at = self.session, self.at
        if not session.clips.held_out:
            return
        with self.finish.timed("validation"):
            found = validation.measure(session, self.config.validation)
        if self.curves is not None:
            found.write(self.folder / "validation" / f"step-{at.step:08}.csv", session.clips.held_out)
            place = {"step": at.step, "stage": stage, "clips": session.feeder.serial}
            self.curves.add("validation", {**place, **at.all_seconds(), **found.summary})
            numbers = ", ".join(f"{name} {value:.5f}" for name, value in found.summary.items())
            session.say(f"step {at.step}: held-out velocity error {numbers}")

    def astray(self, what: str) -> T3Error:
        """The error that ends a run whose numbers are none any more."""
        kept = checkpoint.listed(self.folder)
        before = f"{kept[-1]} is from before" if kept else "There is no checkpoint from before"
        return T3Error(
            f"{what} after step {self.at.step}: training went astray. {before}. Lower lr, or raise warmup; with "
            "clip = 0, set clip = 1."
        )

    def save(self) -> int:
        """Write a checkpoint. Where the disk does not take it the former one stays, and the run goes on.

        Raises `T3Error` where weights are not finite: that would push out the checkpoints that are.
        """
        session, step = self.session, self.at.step
        with self.finish.timed("checkpoint"):
            parts = checkpoint.collect(session.objective, session.torch_optimizers, session.average)
            self.unsaved = None
            [lost] = self.greatest(not all(tensor.isfinite().all() for tensor in parts["weights"].values()))
            if lost:
                raise self.astray("weights are not finite")
            if session.main:
                try:
                    checkpoint.save(self.folder, step, parts, self.state(), self.config.output.keep)
                except checkpoint.NotSaved as error:
                    self.unsaved = str(error)
                    kept = checkpoint.listed(self.folder)
                    former = f"the one of {kept[-1].name} is kept" if kept else "there is none yet"
                    session.say(f"step {step}: no checkpoint could be written ({error}); {former}.")
            session.accelerator.wait_for_everyone()
        return step

    def write(self) -> None:
        """Write the result. Where the disk does not take it, the checkpoint has it, and the run's status tells."""
        try:
            self.finish.write()
        except (T3Error, OSError) as error:
            self.unsaved = str(error)
            self.session.say(f"the result could not be written ({error}). Make room, and run again with --resume.")

    def stopped(self) -> int:
        """The end of a run that was asked to stop."""
        if self.at.step:
            self.save()
        self.close()
        if self.unsaved:
            return LOST
        self.session.say(f"stopped at step {self.at.step}; go on with --resume.")
        return INTERRUPTED

    def end(self) -> int:
        """The end of a run that is through: what was learnt is on disk before it is measured."""
        if self.at.step:
            self.save()
            self.write()
            if self.log.steps:
                self.write_log(self.config.stages[-1])
            self.validate("end")
            self.finish.sample(self.at.step)
        elif any(stage.bounded for stage in self.config.stages):
            self.unsaved = "no step"
            self.session.say(
                "no step was taken: the start took all of max_seconds, compilation included. Raise max_seconds, bound "
                "the stage by training_seconds instead, or set compile = false."
            )
        self.close()
        return LOST if self.unsaved else 0

    def close(self) -> None:
        """Let go of what reads ahead, and draw the curves."""
        self.session.feeder.close()
        if self.curves is not None:
            if self.config.output.png:
                self.curves.draw()
            self.curves.close()


def check_data(state: dict[str, Any], marks: dict[str, str], folder: Path) -> None:
    """Raise `T3Error` where a data set holds other clips than when a checkpoint was written: it would go on with
    others, and measure on some that it was trained on."""
    changed = [name for name, mark in marks.items() if state.get("data", {}).get(name) != mark]
    if changed:
        raise T3Error(
            f"{' and '.join(changed)} changed since {folder} was written: other clips would be trained on and "
            "measured. Put it back as it was, or start a run of its own in another [output] folder."
        )


def check_same(state: dict[str, Any], identity: dict[str, Any], processes: int, folder: Path) -> None:
    """Raise `T3Error` unless a checkpoint belongs to this run: the same config, as many processes."""
    # Through JSON, as the checkpoint went: lists for tuples.
    now = json.loads(json.dumps(identity))
    for table, content in now.items():
        former = state["config"].get(table)
        if former != content:
            both = isinstance(content, dict) and isinstance(former, dict)
            keys = [key for key in content if former.get(key) != content[key]] if both else []
            raise T3Error(
                f"[{table}] {', '.join(keys)} has changed since {folder} was written. Use the config of that run, or "
                "another [output] folder."
            )
    if state["processes"] != processes:
        raise T3Error(
            f"{folder} was written by {state['processes']} processes and these are {processes}: steps would have other "
            f"clips. Start {state['processes']}."
        )
