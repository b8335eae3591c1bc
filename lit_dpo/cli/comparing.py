"""`lit-dpo compare`: the trainings and predictions that a comparison needs, by the other commands."""

from __future__ import annotations

import re
from pathlib import Path

from lit_dpo.checkpoints.run import Run
from lit_dpo.cli.configs import shipped
from lit_dpo.tools import page
from lit_dpo.tools.before import without_news
from lit_dpo.tools.compare import compare, html, read_predictions, show
from lit_dpo.tools.runs import config_file, config_of, find_run

_DONE = "DONE"  # in the folder of a training that reached its end
_ALONE = ["--trainer.devices", "1", "--trainer.num_nodes", "1"]  # Lightning starts other processes by this command line


def compare_runs(
    runs: list[str] = [],  # noqa: B006 - read only
    train: list[str] = [],  # noqa: B006
    seeds: int | None = None,
    folder: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Tell whether runs differ, by paired bootstrap intervals over the validation rows that they share.

    Compared are the accuracy of the implicit rewards, over all rows, by source and by which completion is longer, and
    the log-prob of the chosen completions. Several differences are looked at, so each p is corrected (Holm), and where
    nothing was found it says "no difference". The predictions of each run are written to its folder once.

    With `train`, configurations are trained first, each with several seeds, which change the order of the rows. The
    same command goes on where it was stopped. Each training and prediction takes one device. Token ids are shared by
    the trainings, and so are reference log-probs, if the configurations name `CachedReference`.

    Args:
        runs: Folders of runs, or files that `predict` wrote; each is compared with those before it.
        train: Configurations to train and compare, in place of `runs`.
        seeds: Trainings of each configuration; 5 by default.
        folder: Where those go; `runs/compare` by default.
        output: An `.html` file to write the comparison to; none only prints.
        overwrite: Replace that file.

    Raises:
        FileNotFoundError: There is no such run, or it has no checkpoint yet.
        ValueError: Fewer than two runs, no rows in common, or an option is out of its range.
        FileExistsError: `output` exists already.
    """
    if bool(runs) == bool(train):
        raise ValueError("Give either runs to compare, or `--train` with configurations: one of the two.")
    if len(runs or train) < 2 or len(set(runs or train)) < len(runs or train):
        raise ValueError(f"To compare takes two or more that are not the same, got {' '.join(runs or train)}.")
    if runs and (seeds is not None or folder is not None):
        raise ValueError("`--seeds` and `--folder` are for `--train`: leave them out, or name configurations by it.")
    if seeds is not None and seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}.")
    if output is not None:
        page.refuse_taken(output, overwrite, endings=[".html"])
    if train:
        root, trainings = Path(folder or "runs/compare"), range(seeds or 5)
        settings = {config: [_trained(config, root, seed) for seed in trainings] for config in _named(train)}
    else:
        settings = {run: [Path(run)] for run in runs}
    files = {name: [_predictions(path) for path in paths] for name, paths in settings.items()}
    count = len(next(iter(files.values())))
    found = compare({name: [read_predictions(file) for file in each] for name, each in files.items()})
    show(found, count)
    if output is not None:
        print(f"Wrote {page.write(output, html(found, count), overwrite)}")


def _named(train: list[str]) -> list[str]:
    """The configurations, which must exist and have different names, as their folders are called by them.

    Raises:
        FileNotFoundError: One does not exist.
        ValueError: Two have one name.
    """
    for config in train:
        if not Path(config).is_file() and config not in shipped():
            raise FileNotFoundError(f"There is no configuration `{config}`: `lit-dpo configs` lists the shipped ones.")
    if len({Path(config).stem for config in train}) < len(train):
        raise ValueError("Two of the configurations have the same name: rename one, as folders are called by them.")
    return train


def _trained(config: str, folder: Path, seed: int) -> Path:
    """The run of a configuration with a seed: trained now, gone on with, or found done."""
    from lit_dpo.cli.app import main

    root = folder / Path(config).stem / f"seed_{seed}"
    if not (root / _DONE).exists():
        words = ["fit", "--config", config, "--trainer.default_root_dir", str(root)]
        words += ["--seed_everything", str(seed), "--data.seed", str(seed), *_ALONE]
        begun = [run for run in root.glob("version_*") if re.fullmatch(r"version_\d+", run.name)]
        newest = max(begun, key=lambda run: int(run.name.rpartition("_")[2]), default=None)
        resume = newest is not None and Run(newest).last is not None
        main([*words, *(["--ckpt_path", "last"] if resume else [])])
        (root / _DONE).touch()
    return find_run(root).folder


def _predictions(path: Path) -> Path:
    """The file with a run's predictions of its validation rows, made now unless it is there."""
    from lit_dpo.cli.app import main

    if path.suffix == ".jsonl" and path.exists():
        return path
    run = find_run(path)
    checkpoint = Run(run.folder).best or Run(run.folder).last
    if checkpoint is None:
        raise FileNotFoundError(
            f"`{run.folder}` has no checkpoint yet: wait until it has saved one, or start it again if it was stopped."
        )
    config = config_of(run)
    time = max(file.stat().st_mtime_ns for file in (checkpoint, *checkpoint.glob("*")))  # a folder of shards, too
    name = f"validation-{re.sub(r'[^A-Za-z0-9.=_-]', '_', checkpoint.stem)}-{time}.jsonl"
    file = run.folder / name
    if not file.exists():
        words = ["predict", "--config", str(config_file(run)), "--ckpt_path", str(checkpoint)]
        words += ["--predictions", str(file), "--data.predict", "null", "--data.test", "null", *_ALONE]
        words += ["--first_reference", "false"]  # which is for validations of a fit
        if not config["data"].get("validation") and not config["data"].get("validation_fraction", 0.1):
            raise ValueError(f"`{run.folder}` has no validation rows: predict other rows, and give the files.")
        print(f"Predicting the validation rows of {run.folder} with {checkpoint.name}", flush=True)
        with without_news():
            main(words)
    return file
