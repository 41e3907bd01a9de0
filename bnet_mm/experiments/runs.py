"""Trains what a plan says, by tools/train.py in processes of its own, and keeps one line of a CSV file per run."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import torch
from mmengine.config import Config

import bnet_mm
from bnet_mm.cli import UserError
from bnet_mm.experiments.plan import Plan, Variant
from bnet_mm.files import written
from bnet_mm.host.configs import zoo_root
from bnet_mm.visualization.page import revision
from bnet_mm.visualization.runs import Run, read_run

TOOLS = zoo_root() / 'tools'
DONE = 'done'


@dataclass(frozen=True)
class Result:
    """A run that ended: a line of the CSV file.

    status: 'done', or why it failed.
    config: Plan.digest of its variant.
    metrics, losses: Of every epoch, the mean of the logged losses; separated by spaces.
    seconds, cpu_seconds: Of the process; of a run that was killed, of the process that ended it.
    resumed: The epoch from which that process went on; 0 for a run that was never killed.
    """

    variant: str
    seed: int
    status: str
    config: str
    last: float
    best: float
    metrics: str
    losses: str
    seconds: float
    cpu_seconds: float
    resumed: int
    threads: int
    device: str
    torch: str
    bnet_mm: str
    revision: str
    date: str

    @property
    def key(self) -> tuple[str, int]:
        return self.variant, self.seed


def read_results(path: Path) -> list[Result]:
    """The lines of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    kinds = dict(seed=int, resumed=int, threads=int, last=float, best=float, seconds=float, cpu_seconds=float)
    with open(path, newline='') as file:
        return [
            Result(**{name: kinds.get(name, str)(value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write_results(results: list[Result], path: Path) -> None:
    """Write the CSV file, seed by seed."""
    with written(path) as temporary, open(temporary, 'w', newline='') as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in sorted(results, key=lambda result: result.seed))


def still_to_run(plan: Plan) -> list[tuple[Variant, int]]:
    """The runs of a plan that are not done, in its order; those that failed are tried again.

    Raises:
        UserError: If a line of the CSV file is of another config than the plan now has.
    """
    digests = {name: plan.digest(variant) for name, variant in plan.variants.items()}
    done = set()
    for result in read_results(plan.csv):
        if result.status == DONE:
            if digests.get(result.variant) != result.config:
                raise UserError(
                    f'{plan.csv} has a run of {result.variant} with other settings than {plan.path} has now: a changed '
                    'plan is a new plan, give it a name of its own'
                )
            done.add(result.key)
    return [(variant, seed) for variant, seed in plan.runs() if (variant.name, seed) not in done]


def run_plan(plan: Plan, folder: Path, workers: int, report: Callable[[Result, int], None]) -> None:
    """Train what is not done; a run that fails is recorded and the others go on.

    Args:
        folder: For the work dirs. A run that was killed goes on from its last epoch there.
        workers: Runs at a time; they share the cores.
        report: Called with each result and the number of runs that are left.

    Raises:
        UserError: If a run starts from the weights of another plan's that are not there.
    """
    waiting = still_to_run(plan)
    for variant, seed in waiting:
        if variant.weights:
            trained_weights(folder, variant.weights, seed)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_train, plan, variant, seed, folder, threads) for variant, seed in waiting]
        try:
            for left, future in zip(reversed(range(len(futures))), as_completed(futures)):
                result = future.result()
                others = [one for one in read_results(plan.csv) if one.key != result.key]
                write_results([*others, result], plan.csv)
                report(result, left)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train(plan: Plan, variant: Variant, seed: int, folder: Path, threads: int) -> Result:
    place = place_of(folder, plan.name, variant.name, seed)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / 'lock', 'w') as lock:
        # The training holds it too: where this program was killed alone, it goes on, and is waited for here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        cfg = plan.config(variant, seed)
        if variant.weights:
            cfg.load_from = str(trained_weights(folder, variant.weights, seed))
        config, work_dir = place / f'{place.parent.name}.py', place / 'run'
        if config.exists() and Config.fromfile(config).to_dict() != cfg.to_dict():
            shutil.rmtree(work_dir, ignore_errors=True)
        with written(config) as temporary:
            cfg.dump(temporary)
        began_at = _epochs(work_dir)
        resume = ['--resume'] if began_at else []
        train = ['bash', str(TOOLS / 'dist_train.sh'), str(config), str(variant.processes)]
        if variant.processes == 1:
            train = [sys.executable, str(TOOLS / 'train.py'), str(config)]
        start = time.monotonic()
        with open(place / 'output.txt', 'w') as output:
            process = subprocess.Popen(
                [*train, '--work-dir', str(work_dir), *resume], stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': str(max(1, threads // variant.processes))},
                pass_fds=[lock.fileno()],
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - start
    metrics: list[float] = []
    losses: list[float] = []
    problem = DONE
    if process.returncode:
        lines = (place / 'output.txt').read_text(errors='replace').split('\n')
        said = next((line for line in reversed(lines) if line.startswith('error: ')), None)
        problem = said or f'exit code {process.returncode}'
    else:
        run = read_run(work_dir)
        metrics = [float(value) for value in run.metric(plan.metric).values]
        losses = epoch_losses(run)
        if not metrics:
            problem = f'no {plan.metric} was logged, there are {", ".join(run.metrics())}'
    return Result(
        variant=variant.name, seed=seed, status=problem, config=plan.digest(variant),
        last=metrics[-1] if metrics else float('nan'), best=max(metrics, default=float('nan')),
        metrics=' '.join(f'{value:.6g}' for value in metrics), losses=' '.join(f'{value:.6g}' for value in losses),
        seconds=round(seconds, 1), cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1), resumed=began_at,
        threads=threads, device=_device(), torch=torch.__version__, bnet_mm=bnet_mm.__version__, revision=revision(),
        date=date.today().isoformat(),
    )  # fmt: skip


def place_of(folder: Path, plan: str, variant: str, seed: int) -> Path:
    """The folder of a run below the work dir: its config, what it printed, and its own work dir, ``run``."""
    return folder / plan / variant.replace(' ', '_').replace('/', '_') / f'seed{seed}'


def trained_weights(folder: Path, source: str, seed: int) -> Path:
    """The last checkpoint of a run of another plan, 'PLAN/VARIANT'.

    Raises:
        UserError: If there is none.
    """
    plan, variant = source.split('/')
    run = place_of(folder, plan, variant, seed) / 'run'
    if not (run / 'last_checkpoint').exists():
        raise UserError(f'{source}, seed {seed}, was not trained in {folder}: run the plan {plan}.yml first')
    return run / Path((run / 'last_checkpoint').read_text().strip()).name


def epoch_losses(run: Run) -> list[float]:
    """The mean of the logged losses of each epoch."""
    epochs: dict[int, dict[int, float]] = {}
    for line in run.scalars:
        if 'loss' in line and 'epoch' in line:
            epochs.setdefault(line['epoch'], {})[line['step']] = line['loss']
    return [statistics.fmean(epochs[epoch].values()) for epoch in sorted(epochs)]


def _epochs(work_dir: Path) -> int:
    """The epoch of the checkpoint that a run goes on from; 0 without one."""
    note = work_dir / 'last_checkpoint'
    return int(Path(note.read_text().strip()).stem.rpartition('_')[2]) if note.exists() else 0


def _device() -> str:
    """The GPU, or the processor with the vector width that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'CPU, {torch.backends.cpu.get_cpu_capability()}'
