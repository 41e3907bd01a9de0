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
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import IO, NamedTuple

import torch
from mmengine.config import Config

import bnet_mm
from bnet_mm.checkpoint.latest import latest_checkpoint
from bnet_mm.cli import UserError
from bnet_mm.experiments.plan import Plan, Variant
from bnet_mm.files import make_folder, written
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
    metrics, losses: Of every epoch, the mean of the logged losses; separated by spaces. Metrics are in percent, also
        those of COCO, which are logged as shares.
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


def finished(plan: Plan) -> list[Result]:
    """Lines of the plan's runs that are done: of its own CSV file, and of those in the same folder.

    A run of another plan with the same config, weights and seed is the same run, and is not trained twice.

    Raises:
        UserError: If a line of the plan's CSV file is of another config than the plan now has.
    """
    digests = {name: plan.digest(variant) for name, variant in plan.variants.items()}
    own = [result for result in read_results(plan.csv) if result.status == DONE]
    for result in own:
        if digests.get(result.variant) != result.config:
            raise UserError(
                f'{plan.csv} has a run of {result.variant} with other settings than {plan.path} has now: a changed '
                'plan is a new plan, give it a name of its own'
            )
    beside = {
        (result.config, result.seed): result
        for path in sorted(plan.results.glob('*.csv'))
        for result in read_results(path)
        if result.status == DONE
    }
    done = {result.key for result in own}
    shared = [
        replace(beside[digests[variant.name], seed], variant=variant.name)
        for variant, seed in plan.runs()
        if (variant.name, seed) not in done and (digests[variant.name], seed) in beside
    ]
    return [*own, *shared]


def still_to_run(plan: Plan) -> list[tuple[Variant, int]]:
    """The runs of a plan that are not :func:`finished`, in its order; those that failed are tried again."""
    done = {result.key for result in finished(plan)}
    return [(variant, seed) for variant, seed in plan.runs() if (variant.name, seed) not in done]


def run_plan(plan: Plan, folder: Path, workers: int, report: Callable[[Result], None]) -> None:
    """Train what is not done; a run that fails is recorded and the others go on.

    Args:
        folder: For the work dirs. A run that was killed goes on from its last epoch there.
        workers: Runs at a time; they share the cores.
        report: Called with each result.

    Raises:
        UserError: If a run starts from the weights of another plan's that are not there.
    """
    make_folder(plan.results)
    done = finished(plan)
    failed = [result for result in read_results(plan.csv) if result.key not in {one.key for one in done}]
    if done or failed:
        write_results([*done, *failed], plan.csv)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    jobs = [_prepare(plan, variant, seed, folder, threads) for variant, seed in still_to_run(plan)]
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_train, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                result = _result(plan, futures[future], future.result())
                others = [one for one in read_results(plan.csv) if one.key != result.key]
                write_results([*others, result], plan.csv)
                report(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Job:
    """A run to start. Made and evaluated by one thread: mmengine's reading of configs is not for several."""

    variant: Variant
    seed: int
    digest: str
    place: Path
    command: list[str]
    threads: int
    resumed: int
    lock: IO[str]


class _Ended(NamedTuple):
    code: int
    seconds: float
    cpu_seconds: float


def _prepare(plan: Plan, variant: Variant, seed: int, folder: Path, threads: int) -> _Job:
    cfg = plan.config(variant, seed)
    if variant.weights:
        cfg.load_from = str(trained_weights(folder, variant.weights, seed))
    if torch.cuda.is_available():
        _read_ahead(cfg)
    place = place_of(folder, plan.name, variant.name, seed)
    place.mkdir(parents=True, exist_ok=True)
    # The training holds it too: where this program was killed alone, it goes on, and is waited for here.
    lock = open(place / 'lock', 'w')
    fcntl.flock(lock, fcntl.LOCK_EX)
    config, work_dir = place / f'{place.parent.name}.py', place / 'run'
    if config.exists() and Config.fromfile(config).to_dict() != cfg.to_dict():
        shutil.rmtree(work_dir, ignore_errors=True)
    with written(config) as temporary:
        cfg.dump(temporary)
    command = ['bash', str(TOOLS / 'dist_train.sh'), str(config), str(variant.processes)]
    if variant.processes == 1:
        command = [sys.executable, str(TOOLS / 'train.py'), str(config)]
    epoch = _epochs(work_dir)
    command += ['--work-dir', str(work_dir), *(['--resume'] if epoch else [])]
    return _Job(variant, seed, plan.digest(variant), place, command, threads, epoch, lock)


def _read_ahead(cfg: Config) -> None:
    """Images are read by processes of their own, so that a GPU need not wait; on a CPU they would only take turns."""
    for name in ('train_dataloader', 'val_dataloader'):
        cfg[name].update(num_workers=4, persistent_workers=True)


def _train(job: _Job) -> _Ended:
    threads = max(1, job.threads // job.variant.processes)
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHON': sys.executable}  # PYTHON: dist_train.sh's
    start = time.monotonic()
    with job.lock, open(job.place / 'output.txt', 'w') as output:
        process = subprocess.Popen(
            job.command, stdout=output, stderr=subprocess.STDOUT, env=environment, pass_fds=[job.lock.fileno()]
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return _Ended(process.returncode, time.monotonic() - start, usage.ru_utime + usage.ru_stime)


def _result(plan: Plan, job: _Job, ended: _Ended) -> Result:
    metrics: list[float] = []
    losses: list[float] = []
    problem = DONE
    if ended.code:
        lines = (job.place / 'output.txt').read_text(errors='replace').split('\n')
        said = next((line for line in reversed(lines) if line.startswith('error: ')), None)
        problem = said or f'exit code {ended.code}'
    else:
        run = read_run(job.place / 'run')
        unit = 100 if plan.metric.startswith('coco/') else 1
        metrics = [unit * float(value) for value in run.metric(plan.metric).values]
        losses = epoch_losses(run)
        if not metrics:
            problem = f'no {plan.metric} was logged, there are {", ".join(run.metrics())}'
    return Result(
        variant=job.variant.name, seed=job.seed, status=problem, config=job.digest,
        last=metrics[-1] if metrics else float('nan'), best=max(metrics, default=float('nan')),
        metrics=' '.join(f'{value:.6g}' for value in metrics), losses=' '.join(f'{value:.6g}' for value in losses),
        seconds=round(ended.seconds, 1), cpu_seconds=round(ended.cpu_seconds, 1), resumed=job.resumed,
        threads=job.threads, device=_device(), torch=torch.__version__, bnet_mm=bnet_mm.__version__,
        revision=revision(), date=date.today().isoformat(),
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
    if (latest := latest_checkpoint(run)) is None:
        raise UserError(f'{source}, seed {seed}, was not trained in {folder}: run the plan {plan}.yml first')
    return latest


def epoch_losses(run: Run) -> list[float]:
    """The mean of the logged losses of each epoch."""
    epochs: dict[int, dict[int, float]] = {}
    for line in run.scalars:
        if 'loss' in line and 'epoch' in line:
            epochs.setdefault(line['epoch'], {})[line['step']] = line['loss']
    return [statistics.fmean(epochs[epoch].values()) for epoch in sorted(epochs)]


def _epochs(work_dir: Path) -> int:
    """The epoch of the checkpoint that a run goes on from; 0 without one."""
    latest = latest_checkpoint(work_dir)
    return int(latest.stem.rpartition('_')[2]) if latest else 0


def _device() -> str:
    """The GPU, or the processor with the vector width that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'CPU, {torch.backends.cpu.get_cpu_capability()}'
