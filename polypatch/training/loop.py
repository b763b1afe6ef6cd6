"""The training loop, on Accelerate: one CPU, several GPUs or nodes, the same code and results.

A step is a pure function of weights, optimiser state and step number: samples, augmentation and
dropout are drawn from the run's seed and the step (``sampling.py``). So resuming needs no replay,
and two processes with half a batch each do what one does with the whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.windows import ForecastData
from ..errors import PolypatchError
from ..spec import Part, Spec, parse, plug
from .best import Best
from .budget import Budget
from .evaluate import evaluate
from .forecasts import score
from .recipe import Recipe, learning_rate, parameter_groups
from .runs import Run, RunConfig
from .sampling import generator_of, indices_of, seed_of
from .tasks import Data, Place, check_task, task_of

__all__ = ["Progress", "build", "train"]

#: called with (step, total, loss, step_seconds) now and then
Progress = Callable[[int, int, float, float], None]

_PRECISION = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def build(config: RunConfig) -> nn.Module:
    """The model of a run, with its initial weights.

    Weights to start from belong to the bare host, onto which the techniques are plugged then,
    unless they are those of a run with the same techniques.
    """
    spec, task = parse(config.spec), task_of(config.task)
    if not config.init:
        return task.create(spec, config)
    from ..checkpoints import load_weights

    start = Path(config.init)
    if not spec.techniques or _techniques_of(start) == spec.techniques:
        model = task.create(spec, config)
        load_weights(model, start)
        return model
    host = task.create(Spec(spec.host), config)
    load_weights(host, start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for part in spec.techniques:
            host = plug(host, part.name, **part.options)
    return host


def _techniques_of(path: Path) -> tuple[Part, ...]:
    """Techniques of the run whose folder or weights these are."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return ()
    return parse(Run(folder).config.spec).techniques


def train(
    config: RunConfig,
    data: Data,
    *,
    root: Path = Path("runs"),
    device: str | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = 20.0,
    tensorboard: bool = False,
    stop_after: int | None = None,
) -> Run:
    """Train until the budget is spent, from the newest checkpoint if there is one.

    Args:
        root: where the run's folder lies or will lie.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; default: Accelerate's choice.
        checkpoint_seconds: time between checkpoints, at most so much work is lost by a kill.
        tensorboard: also write TensorBoard event files into the run's folder.
        stop_after: leave after this step as if interrupted, with a checkpoint (for tests).

    Returns:
        The run; ``run.result`` holds the evaluation.

    Raises:
        PolypatchError: a batch that processes can't share, a precision the device lacks, a loss
            that is no longer finite.
    """
    run = Run.of(config, root)
    if run.result is not None:
        return run
    task = task_of(config.task)
    check_task(task, data)
    accelerator = _accelerator(config.recipe, device, uses_everything=task.uses_everything)
    recipe, processes = config.recipe, accelerator.num_processes
    if recipe.batch % (processes * recipe.accumulate):
        raise PolypatchError(
            f"a batch of {recipe.batch} can't be shared by {processes} processes with "
            f"{recipe.accumulate} accumulated parts each; use a multiple of "
            f"{processes * recipe.accumulate}"
        )
    model = build(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    average = _average(accelerator.unwrap_model(model), recipe.ema)
    if average is not None:
        accelerator.register_for_checkpointing(average)
    stepper = _Stepper(config, data, model, optimizer, accelerator, average)
    best = None
    if isinstance(data, ForecastData):
        best = Best(data.val, patience=recipe.patience)
        accelerator.register_for_checkpointing(best)

    start = 0
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        start, folder = checkpoint
        accelerator.load_state(str(folder))
    total = _planned_steps(run, config, data, stepper)
    if accelerator.is_main_process:
        run.rewind(start)
    accelerator.wait_for_everyone()

    log = _Log(run, accelerator.is_main_process, tensorboard)
    spent = float(_spent(run))
    began = saved = time.perf_counter()
    said = 0.0
    losses: list[Tensor] = []
    epoch = -(-len(data.train) // recipe.batch)
    model.train()
    for step in range(start, total):
        losses.append(stepper(step, total))
        now = time.perf_counter()
        last = step + 1 == total
        if last or now - said > 0.2 or (stop_after is not None and step + 1 >= stop_after):
            loss = _mean_loss(losses, step)
            if progress is not None and accelerator.is_main_process:
                progress(step + 1, total, loss, (now - began) / (step + 1 - start))
            log.write(
                {
                    "step": step + 1,
                    "loss": loss,
                    "lr": learning_rate(recipe, step, total),
                    "seconds": spent + now - began,
                }
            )
            losses, said = [], now
        if best is not None and ((step + 1) % epoch == 0 or last):
            error = best.look(stepper.trained, accelerator=accelerator)
            log.write({"step": step + 1, "val_mse": error})
            if best.exhausted:
                total = step + 1
                break
        stopping = stop_after is not None and step + 1 >= stop_after and not last
        if stopping or _agreed(now - saved > checkpoint_seconds, accelerator):
            _save(run, accelerator, step + 1)
            saved = time.perf_counter()
        if stopping:
            log.close()
            return run
    seconds = spent + time.perf_counter() - began
    if best is not None:
        best.restore(stepper.trained)
    _finish(run, data, stepper, accelerator, total=total, seconds=seconds, log=log)
    return run


@dataclass
class _Stepper:
    """One optimiser step, numbered; everything random in it comes from seed and number."""

    config: RunConfig
    data: Data
    model: nn.Module
    optimizer: Any
    accelerator: Any
    average: Any

    def __post_init__(self) -> None:
        self.host = self.accelerator.unwrap_model(self.model)
        self.task = task_of(self.config.task)

    @property
    def trained(self) -> nn.Module:
        """What is evaluated and kept: the average of the weights where there is one."""
        return self.host if self.average is None else self.average.module

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this process."""
        config, data, accelerator = self.config, self.data, self.accelerator
        chosen = indices_of(
            step,
            batch=config.recipe.batch,
            samples=len(data.train),
            seed=config.seed,
            endless=data.endless,
        )
        place = Place(
            step, accelerator.process_index, accelerator.num_processes, accelerator.device
        )
        return self.task.batch(data, chosen, config, place)  # type: ignore[arg-type]

    def __call__(self, step: int, total: int) -> Tensor:
        """Make the step; the mean loss over all processes, still on the device."""
        recipe, accelerator = self.config.recipe, self.accelerator
        inputs, targets = self.batch(step)
        hooks = getattr(self.host, "hooks", ())
        for number, hook in enumerate(hooks):
            generator = generator_of(self.config.seed, "hook", number, step)
            hook.before_step(self.host, step=step, total=total, generator=generator)
        torch.manual_seed(seed_of(self.config.seed, "dropout", step, accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, total)
        parts = zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate))
        loss_sum = torch.zeros((), device=inputs.device)
        for number, (x, y) in enumerate(parts, start=1):
            for hook in hooks:
                y = hook.targets(self.host, y)
            if number < recipe.accumulate:
                with accelerator.no_sync(self.model):
                    loss_sum += self._backward(x, y, hooks)
            else:
                loss_sum += self._backward(x, y, hooks)
        if recipe.clip:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.host)
        return accelerator.reduce(loss_sum, reduction="mean")

    def _backward(self, x: Tensor, y: Tensor, hooks: tuple) -> Tensor:
        with self.accelerator.autocast():
            logits = self.model(x)
        loss = self.task.loss(logits.float(), y, self.config.recipe)
        for hook in hooks:
            extra = hook.loss(self.host, x, logits)
            if extra is not None:
                loss = loss + extra
        loss = loss / self.config.recipe.accumulate
        self.accelerator.backward(loss)
        return loss.detach()


def _accelerator(recipe: Recipe, device: str | None, *, uses_everything: bool) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    if recipe.precision == "fp16" and (device == "cpu" or not torch.accelerator.is_available()):
        raise PolypatchError("fp16 needs an accelerator; on a CPU use bf16 or float32")
    if device is not None and device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise PolypatchError(f"there is no device {device}; use cpu")
        torch.cuda.set_device(torch.device(device))
    # Accelerate keeps its state in a singleton; a run may want another precision than the last.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=_PRECISION[recipe.precision],
        cpu=device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not uses_everything)],
    )


def _average(model: nn.Module, decay: float) -> Any:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _planned_steps(run: Run, config: RunConfig, data: Data, stepper: _Stepper) -> int:
    """Steps of the budget. A time budget is turned into steps once, by timing a few real steps on
    a copy of the weights, and the number is kept: from then on the run is deterministic."""
    if run.plan is not None:
        return int(run.plan["steps"])
    budget, seconds = Budget.parse(config.budget), None
    if not any(p.requires_grad for p in stepper.host.parameters()):  # nothing to learn
        run.write_plan({"steps": 0, "step_seconds": None})
        return 0
    if budget.kind == "seconds":
        seconds = _step_seconds(stepper, budget.amount)
    steps = budget.steps(batch=config.recipe.batch, samples=len(data.train), step_seconds=seconds)
    if stepper.accelerator.num_processes > 1:  # all processes must agree
        from accelerate.utils import broadcast_object_list

        steps = broadcast_object_list([steps])[0]
    if stepper.accelerator.is_main_process:
        run.write_plan({"steps": steps, "step_seconds": seconds})
    return steps


def _step_seconds(stepper: _Stepper, limit: float) -> float:
    """Median time of a step; weights and optimiser are as before afterwards."""
    host, optimizer = stepper.host, stepper.optimizer
    kept = {name: value.detach().clone() for name, value in host.state_dict().items()}
    host.train()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 12 and time.perf_counter() - began < 0.1 * limit):
        start = time.perf_counter()
        stepper(len(times), 1000)
        times.append(time.perf_counter() - start)
    host.load_state_dict(kept)
    optimizer.state.clear()
    if stepper.average is not None:
        stepper.average.load_state_dict({"n_averaged": torch.tensor(0)}, strict=False)
    # The first steps pay for lazily made buffers and code.
    return sorted(times[1:])[len(times[1:]) // 2]


def _mean_loss(losses: list[Tensor], step: int) -> float:
    loss = torch.stack(losses).mean().item()
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise PolypatchError(
            f"the loss is {loss} at step {step + 1}; use a lower --lr, --clip 1 or float32"
        )
    return loss


def _agreed(mine: bool, accelerator: Any) -> bool:
    """The main process' word, so that all processes write a checkpoint together."""
    if accelerator.num_processes == 1:
        return mine
    flag = torch.tensor([int(mine and accelerator.is_main_process)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def _save(run: Run, accelerator: Any, step: int) -> None:
    scratch = run.checkpoints / "writing"
    if accelerator.is_main_process:
        run.fresh_checkpoint()
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.publish_checkpoint(scratch, step)
    accelerator.wait_for_everyone()


def _spent(run: Run) -> float:
    rows = [row["seconds"] for row in run.metrics() if "seconds" in row]
    return rows[-1] if rows else 0.0


def _finish(
    run: Run,
    data: Data,
    stepper: _Stepper,
    accelerator: Any,
    *,
    total: int,
    seconds: float,
    log: _Log,
) -> None:
    """Evaluate, write the weights, then the result: its presence says that all of it is there."""
    from safetensors.torch import save_file

    model, config, task = stepper.trained, stepper.config, stepper.task
    for hook in getattr(model, "hooks", ()):
        hook.after_training(model)
    if isinstance(data, ForecastData):
        outcome = score(model, data.test, accelerator=accelerator)
    else:
        outcome = evaluate(model, data, accelerator=accelerator)
    log.write({"step": total, **outcome.scores()})
    log.close()
    if accelerator.is_main_process:
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        beside = run.model_file.with_name(".model.safetensors")
        about = json.dumps(task.about(data))  # type: ignore[arg-type]
        metadata = {"polypatch": json.dumps(config.to_dict()), "data": about}
        save_file(state, beside, metadata=metadata)
        beside.replace(run.model_file)
        run.write_result(
            {
                **outcome.to_dict(),
                "steps": total,
                "seconds": seconds,
                f"{task.unit}_per_second": total * config.recipe.batch / max(seconds, 1e-9),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    accelerator.wait_for_everyone()


class _Log:
    """Metric lines of the main process, and TensorBoard events if wanted."""

    def __init__(self, run: Run, active: bool, tensorboard: bool) -> None:
        self.handle = run.metrics_file.open("a", encoding="utf-8") if active else None
        self.board: Any = None
        if active and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.folder / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        if self.handle is not None:
            self.handle.write(json.dumps(row) + "\n")
            self.handle.flush()
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()
        if self.board is not None:
            self.board.close()
