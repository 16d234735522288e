"""A run's use of the Hugging Face Hub: the check before the run, uploads during it, and the final push.

Everything runs on the first rank and outside collectives. Only `check_hub` may stop a run. A later upload that fails
after its retries causes a warning and an entry in the list that `close` returns. huggingface_hub does the transfers and
reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

Not supported, on purpose: pull requests, and resuming directly from the Hub (download the folder `last-checkpoint/` of
hub_strategy `checkpoint` and pass it to --resume_from_checkpoint).
"""

import functools
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars

from sft_core.run.config import TrainingConfig

logger = logging.getLogger(__name__)

# TRAINING_STATE: files of a checkpoint that are not the model. NOT_PUSHED: files of output_dir that stay private.
TRAINING_STATE = ("state", "rank-*", "scheduler.pt", "progress.json", "manifest.json")
NOT_PUSHED = (
    "checkpoint-*",
    "*previous-*",
    ".*",
    "*/.*",
    "wandb/*",
    "wandb_id",
    "rollouts/*",
    "*.parquet",
    "latest",
    "completions.jsonl",
    "benchmarks/*",
    "runs/*",
    "merged/*",
)  # these hold prompts and answers, which may be private

# Weights that an earlier push may have left under other names: with them the folder would hold two models.
STALE = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_PROCESS = uuid.uuid4().hex[:8]


# --- before the run ----------------------------------------------------------------------------------------------


def check_hub(config: TrainingConfig) -> None:
    """If the run will push, check that it can: reach the Hub, log in, and create the repository.

    Raises:
        ValueError: there is no token with write access; the Hub cannot be reached; or `hub_model_revision` holds a
            model already (it has a README.md) and `overwrite_hub_revision` is not set.
    """
    if not (config.push_to_hub or config.push_to_hub_revision or config.callbacks):
        return
    repo, branch = model_repository(config), config.hub_model_revision
    if not config.push_to_hub_revision or config.overwrite_hub_revision:
        return
    if HfApi().file_exists(repo, "README.md", revision=branch):
        raise ValueError(
            f"branch {branch} of {repo} already holds a model (it has a README.md): choose another "
            "--hub_model_revision, or give --overwrite_hub_revision true."
        )


def model_repository(config: TrainingConfig) -> str:
    """`hub_model_id`, else the name of `output_dir`; in the user's namespace if the name has none."""
    return repository(config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private_repo, "model")


def repository(name: str, private: bool | None, kind: str) -> str:
    """The repository's full name, `owner/name`; a new repository is created.

    Raises:
        ValueError: the name is not valid, the Hub cannot be reached, or there is no token with write access.
    """
    endpoint = HfApi().endpoint
    try:
        return _made(endpoint, get_token(), name, private, kind)
    except (HTTPError, OSError, HFValidationError) as error:
        raise ValueError(
            f"the Hub at {endpoint} does not accept {kind} {name} ({_reason(error)}): check its name (of a model: "
            "--hub_model_id), the token (`hf auth login` or HF_TOKEN, with write access), the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, or do not push."
        ) from error


@functools.cache
def _made(endpoint: str, token: str | None, name: str, private: bool | None, kind: str) -> str:
    """Create the repository. The result is cached, because the Hub limits the rate of these requests."""
    return HfApi(endpoint, token).create_repo(name, repo_type=kind, private=private, exist_ok=True).repo_id


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def check_dataset_push(repo: str | None, private: bool) -> None:
    """If a data set will be pushed to `repo`, check that it can be (see `repository`)."""
    if repo:
        repository(repo, private or None, "dataset")


def push_dataset(file: Path, repo: str | None, private: bool, config_name: str = "default") -> None:
    """Push the file as the data set `repo`. If that fails, the file stays and the same command tries again."""
    if not repo:
        return
    import pyarrow.parquet as pq  # imported only if rows are read
    from datasets import Dataset

    if pq.read_metadata(file).num_rows == 0:
        return print(f"{file} has no rows and was not pushed.", file=sys.stderr)
    Dataset.from_parquet(str(file)).push_to_hub(repo, config_name=config_name, private=private or None)


# --- during the run ----------------------------------------------------------------------------------------------


class Uploader:
    """Uploads folders, one after another, to the repository that `check_hub` has made. Each upload runs in a daemon
    thread, so that a crashed run does not wait for it."""

    waits_s: tuple[float, ...] = (5.0, 30.0)  # before each retry of a failed upload

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.failures: list[str] = []
        self.results: list[tuple[int, dict[str, float]]] = []  # step, {`benchmarks/<task>/<metric>`: value}
        self._last: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._last is not None and self._last.is_alive()

    def start(
        self,
        folder: Path,
        message: str,
        revision: str = "main",
        path_in_repo: str = "",
        ignore: Sequence[str] = (),
        remove: bool = False,
    ) -> None:
        """Upload `folder` as one commit to branch `revision`. A new branch starts from the first commit.

        `ignore`: glob patterns relative to `folder`. `remove`: delete the folder afterwards, even if the upload failed.
        Weights of an earlier push that this one does not replace are removed from the branch.
        """
        before = self._last

        def upload() -> None:
            disable_progress_bars()  # they would disturb the trainer's own
            api, repo = HfApi(), model_repository(self.config)
            if revision != "main":
                initial = api.list_repo_commits(repo)[-1].commit_id
                api.create_branch(repo, branch=revision, revision=initial, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                ignore_patterns=[*ignore],
                path_in_repo=path_in_repo,
                delete_patterns=["*"] if path_in_repo else [*STALE],
            )

        def job() -> None:
            if before is not None:
                before.join()
            for wait_s in (*self.waits_s, None):
                try:
                    upload()
                    break
                except Exception as error:  # no failure may stop the training
                    what = f"{message}, to branch {revision}: {_reason(error)}"
                logger.warning("the Hub did not accept %s%s", what, f"; trying again in {wait_s} s" if wait_s else "")
                if wait_s is None:
                    self.failures.append(what)
                else:
                    time.sleep(wait_s)
            if remove:
                shutil.rmtree(folder)

        self._last = threading.Thread(target=job, daemon=True)
        self._last.start()

    def close(self) -> list[str]:
        """Wait for all uploads; returns the failures, one sentence each."""
        if self._last is not None:
            self._last.join()
        return self.failures


class PushToHub(Uploader):
    """A run's callback (see `benchmarks.py`). It pushes each checkpoint's model to main, and with hub_strategy
    `checkpoint` or `all_checkpoints` the whole checkpoint to the folder `last-checkpoint` or `checkpoint-<step>`."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        if self.busy and not self.config.hub_always_push:
            return
        folder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(self.config.hub_strategy)
        message = f"Training in progress, step {step}"
        self.start(stage(checkpoint, TRAINING_STATE), message, remove=True)
        if folder:
            self.start(stage(checkpoint), f"{message}, {folder}", path_in_repo=folder, remove=True)


def stage(checkpoint: Path, ignore: Sequence[str] = ()) -> Path:
    """A copy of `checkpoint`, next to it, that outlives its removal by save_total_limit; the caller removes the copy.

    Files are hard links, which take no space, or copies if the file system has no links. A checkpoint's files are never
    written again. Copies left by a killed run are removed; the lock on output_dir ensures that no other run uses them.
    """
    for old in checkpoint.parent.glob(".upload-*"):
        if not old.name.startswith(f".upload-{_PROCESS}-"):
            shutil.rmtree(old)
    folder = checkpoint.parent / f".upload-{_PROCESS}-{uuid.uuid4().hex[:8]}"
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*ignore), copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def push_final(config: TrainingConfig, folder: Path, message: str = "End of training") -> list[str]:
    """Push the model in `folder` (output_dir), without checkpoints and private files: to main with `push_to_hub`, to
    `hub_model_revision` with `push_to_hub_revision`. Waits for the uploads; returns the failures."""
    branches = ["main"] * config.push_to_hub + [config.hub_model_revision] * config.push_to_hub_revision
    uploader = Uploader(config)
    for branch in dict.fromkeys(branches):
        uploader.start(folder, message, branch, ignore=NOT_PUSHED)
    return uploader.close()
